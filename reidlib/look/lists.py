"""Ranked lists as data: what the browser shows of one run, or of two over the same queries and gallery.

All comes from `evaluation.retrieval.Retrieval`, like the scores. `Lists` checks the runs and scores
them; then it gives, as JSON will hold it, the table of the queries, the lists of some of them, and the
thumbnails of their images. A `Key` names an image of either table.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd

from reidlib.data.pixels import read_image
from reidlib.evaluation.metrics import average_precision
from reidlib.evaluation.retrieval import STATUSES, Retrieval
from reidlib.look.figures import EXCLUDED, RIGHT, WRONG
from reidlib.look.pages import encodable, thumbnail
from reidlib.progress import progress

CODES = dict(zip(STATUSES, "mwucji", strict=True))
COLOURS = {"right": RIGHT.colour, "wrong": WRONG.colour, "excluded": EXCLUDED.colour}


class Key(NamedTuple):
    """An image: a row of the query table ("q") or of the gallery table ("g"); in JSON "q12", "g7"."""

    side: str
    row: int

    def __str__(self) -> str:
        return f"{self.side}{self.row}"


class Lists:
    """The ranked lists of one run, or of two over the same queries and gallery.

    Args:
        retrievals: one run, or one or two by name.
        topk: ranked images in a list; matches beyond it follow, with their rank.

    Attributes:
        runs: the retrievals by name.
        evaluations: by name, of those that can be scored; `reasons` says why others cannot.
        follows: by name, can gallery images be its queries?
        tables: the query table and the gallery table, under "q" and "g", with `camid` -1 and `path` ""
            where they have none.

    Raises:
        ValueError: no run or more than two, two runs that differ in their queries, gallery or
            protocol (says in what), or `topk` below 1.
        TypeError: what is given is no `Retrieval` and no dict of them.
    """

    def __init__(self, retrievals: Retrieval | Mapping[str, Retrieval], topk: int):
        runs = {"": retrievals} if isinstance(retrievals, Retrieval) else retrievals
        if not (isinstance(runs, Mapping) and all(isinstance(r, Retrieval) for r in runs.values())):
            raise TypeError(
                "the browser shows a Retrieval, or one or two of them by name in a dict"
            )
        if not 1 <= len(runs) <= 2:
            raise ValueError(f"the browser shows one run or two side by side, not {len(runs)}")
        if topk < 1:
            raise ValueError(f"topk must be 1 or more, not {topk}")
        first, *others = runs.values()
        for other in others:
            if difference := _difference(first, other):
                raise ValueError(
                    f"{' and '.join(map(repr, runs))} are not about the same: {difference}"
                )
        self.topk = topk
        self.runs = {encodable(name): retrieval for name, retrieval in runs.items()}
        self.evaluations, self.reasons, self.follows = {}, {}, {}
        for name, retrieval in self.runs.items():
            try:
                self.evaluations[name] = retrieval.evaluate()
            except ValueError as error:  # nobody is known, or has a match: lists are there still
                self.reasons[name] = _why_not_scored(retrieval, error)
            try:
                self.follows[name] = retrieval.ask([0]) is not None
            except ValueError:  # it was made from distances
                self.follows[name] = False
        self.tables = {"q": _complete(first.query), "g": _complete(first.gallery)}
        self._names = {side: _names(table) for side, table in self.tables.items()}

    # --- queries

    def choose(self, queries: Sequence[int] | int | None, seed: int) -> tuple[np.ndarray, str]:
        """Return rows of queries, ascending, and a sentence on how they were chosen.

        Args:
            queries: row numbers; or how many: the worst, the best, the largest changes between two
                runs, some at random; None for all.
            seed: of the random choice.

        Raises:
            ValueError: no such query row, or a number below 1.
        """
        total = len(self.tables["q"])
        if isinstance(queries, int | np.integer):
            if queries < 1:
                raise ValueError(
                    f"queries must be 1 or more, None for all, or row numbers, not {queries}"
                )
            if queries < total:
                return self._mixed(int(queries), seed)
        elif queries is not None:
            rows = np.unique(np.asarray(queries))
            if rows.dtype.kind not in "iu" or len(rows) == 0 or rows[0] < 0 or rows[-1] >= total:
                raise ValueError(f"queries must be rows of the query table, 0 to {total - 1}")
            return rows, f"{len(rows):,} of {total:,} queries are in this file, as asked."
        return np.arange(total), f"All {total:,} queries are in this file."

    def _mixed(self, n: int, seed: int) -> tuple[np.ndarray, str]:
        """Return n rows of all kinds, fewer than there are, and how they were chosen."""
        aps = [evaluation.per_query["AP"].to_numpy() for evaluation in self.evaluations.values()]
        wanted = []  # (how many, of what, what is sorted ascending)
        if len(aps) == len(self.runs) == 1:
            wanted = [(n // 2, "of lowest AP", aps[0]), (n // 4, "of highest AP", -aps[0])]
        elif len(aps) == len(self.runs) == 2:
            first, second = self.runs
            wanted = [
                (n // 4, f"of largest loss of AP from {first} to {second}", aps[1] - aps[0]),
                (n // 4, f"of largest gain of AP from {first} to {second}", aps[0] - aps[1]),
                (n // 4, f"of lowest AP in {first}", aps[0]),
            ]
        total = len(self.tables["q"])
        left, chosen, parts = np.arange(total), np.empty(0, int), []
        for size, what, value in wanted:
            known = left[~np.isnan(value[left])]
            rows = known[np.argsort(value[known], kind="stable")][:size]
            chosen, left = np.union1d(chosen, rows), np.setdiff1d(left, rows)
            parts.append(f"the {len(rows):,} {what}")
        rows = np.random.default_rng(seed).choice(left, n - len(chosen), replace=False)
        parts.append(f"{len(rows):,} drawn at random" + (" from the rest" if parts else ""))
        sentence = f"{n:,} of {total:,} queries are in this file: {', '.join(parts)}."
        return np.union1d(chosen, rows).astype(int), sentence

    def first(self) -> int:
        """Return the row of the query that the browser starts with: the worst by AP."""
        evaluation = self.evaluations.get(next(iter(self.runs)))
        return int(evaluation.per_query["AP"].argmin()) if evaluation else 0

    def about(self, rows: np.ndarray, title: str) -> dict:
        """Return what stands over the lists, and the table of the queries that can be picked."""
        query = self.tables["q"].iloc[rows]
        runs, aps, notes = [], [], []
        for name in self.runs:
            evaluation = self.evaluations.get(name)
            line, ap = f"Not scored: {self.reasons.get(name)}", np.full(len(rows), np.nan)
            if evaluation:
                line, ap = _in_words(evaluation.scores), evaluation.per_query["AP"].to_numpy()[rows]
                notes.append(evaluation.protocol)
            runs.append({"name": name, "scored": evaluation is not None, "scores": line})
            aps.append([None if np.isnan(value) else float(value) for value in ap])
        notes.append(
            f"A list holds the {self.topk} nearest ranked images, the images that the protocol leaves "
            "out where they would have stood among them, and all further matches with their rank: "
            "the ranks of the matches are all that AP is made of."
        )
        return {
            "title": encodable(title),
            "runs": runs,
            "topk": self.topk,
            "total": len(self.tables["q"]),
            "follows": any(self.follows.values()),
            "colours": COLOURS,
            "notes": [*dict.fromkeys(notes)],
            "cameras": {side: _cameras(self.tables[side[0]]) for side in ("query", "gallery")},
            "queries": {
                "row": rows.tolist(),
                "name": [self._names["q"][row] for row in rows],
                "pid": query["pid"].tolist(),
                "camid": query["camid"].tolist(),
                "ap": aps,
            },
        }

    # --- lists

    def records(self, side: str, rows: Sequence[int]) -> dict[str, list[dict | None]]:
        """Return by the key of each query its list in each run: columns, as long as the list.

        `ranks` are 0 where an image is left out of the ranking. None for a run that cannot be asked.
        """
        runs = [self._records(run, side, rows) for run in self.runs]
        lists = zip(*runs, strict=True)
        return {str(Key(side, row)): [*one] for row, one in zip(rows, lists, strict=True)}

    def _records(self, run: str, side: str, rows: Sequence[int]) -> list[dict | None]:
        if side == "g" and not self.follows[run]:
            return [None] * len(rows)
        table = self._ranked(run, side, rows)
        starts = np.flatnonzero(np.diff(table["query"].to_numpy()) != 0) + 1
        columns = (
            table["gallery"].to_numpy(),
            table["rank"].fillna(0).to_numpy(np.int64),
            _rounded(table["distance"].to_numpy(np.float64)),
            table["status"].map(CODES).to_numpy(),
        )
        lists = zip(*(np.split(column, starts) for column in columns), strict=True)
        return [_record(*one) for one in lists]

    def table(self, run: str, key: Key) -> pd.DataFrame:
        """Return one list as a table to take away."""
        table = self._ranked(run, key.side, [key.row]).drop(columns="query")
        query = self.tables[key.side]
        table.insert(0, "run", run)
        table.insert(1, "asked", "query" if key.side == "q" else "gallery")
        table.insert(2, "query", key.row)
        table.insert(3, "query_path", query["path"].iloc[key.row])
        return table

    def _ranked(self, run: str, side: str, rows: Sequence[int]) -> pd.DataFrame:
        retrieval = self.runs[run]
        asking, at = (retrieval, rows) if side == "q" else (retrieval.ask(rows), None)
        return asking.ranked_lists(at, topk=self.topk, show_missed=True)

    # --- images

    def key(self, text: str) -> Key:
        """Return the key that JSON has as text; a front end may ask for anything.

        Raises:
            ValueError: there is no such image.
        """
        if text[:1] in self.tables and text[1:].isdecimal():
            key = Key(text[0], int(text[1:]))
            if key.row < len(self.tables[key.side]):
                return key
        raise ValueError(f"there is no image {text!r}")

    def images(self, rows: np.ndarray) -> dict[str, list]:
        """Return file name, identity and camera of gallery rows, by key."""
        gallery = self.tables["g"].iloc[rows]
        columns = zip(rows, gallery["pid"].tolist(), gallery["camid"].tolist(), strict=True)
        return {str(Key("g", row)): [self._names["g"][row], *labels] for row, *labels in columns}

    def thumbnails(
        self, heights: Mapping[Key, int], quality: int, show_progress: bool = False
    ) -> tuple[dict[str, str], list[str]]:
        """Return photographs by key, and what is wrong with the files that cannot be read.

        `heights` has, by key, how many pixels high a photograph may be, see `pages.thumbnail`.
        """

        paths = {side: table["path"].tolist() for side, table in self.tables.items()}

        def one(key: Key) -> tuple[str, str]:
            path = paths[key.side][key.row]
            if not path:
                return "", "the table does not name its files."
            try:
                return thumbnail(read_image(path), heights[key], quality), ""
            except ValueError as error:
                return "", encodable(str(error))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            options = {"desc": "thumbnails", "unit": "img", "show": show_progress}
            made = [*progress(pool.map(one, heights), total=len(heights), **options)]
        photos = {str(key): photo for key, (photo, _) in zip(heights, made, strict=True) if photo}
        return photos, [error for _, error in made if error]


def rows_of(records: Mapping[str, list[dict | None]]) -> np.ndarray:
    """Return the gallery rows that stand in lists, ascending, once each."""
    every = [record["rows"] for runs in records.values() for record in runs if record]
    return np.unique(np.concatenate([[], *every]).astype(np.int64))


# --- the runs


def _why_not_scored(retrieval: Retrieval, error: ValueError) -> str:
    nobody = (retrieval.query["pid"] < 1).all() or (retrieval.gallery["pid"] == -1).all()
    return "nobody is known in these pictures" if nobody else str(error)


def _difference(first: Retrieval, other: Retrieval) -> str:
    """Return in what two retrievals cannot be laid side by side; "" if they can."""
    for side in ("query", "gallery"):
        a, b = getattr(first, side), getattr(other, side)
        if len(a) != len(b):
            return f"{len(a):,} and {len(b):,} {side} images"
        columns = [(c, a[c].tolist(), b[c].tolist()) for c in ("pid", "camid") if c in a and c in b]
        if "path" in a and "path" in b:
            columns.append(("file name", _names(a), _names(b)))
        for column, x, y in columns:
            rows = [row for row in range(len(a)) if x[row] != y[row]]
            if rows:
                return (
                    f"{column} of row {rows[0]} of the {side} table is {x[rows[0]]} in the first and "
                    f"{y[rows[0]]} in the second ({len(rows):,} rows differ)"
                )
    if first.exclude_same_camera != other.exclude_same_camera:
        return "one leaves out results of the query's own camera, the other does not"
    return ""


def _in_words(scores: Mapping[str, float]) -> str:
    return (
        f"mAP {scores['mAP']:.1%} (Market's definition: {scores['mAP_market']:.1%}), top-1 "
        f"{scores['top1']:.1%}, over {scores['queries'] - scores['queries_without_match']:,} queries"
    ).replace("%", " %")


# --- small things


def _record(rows: np.ndarray, ranks: np.ndarray, distances: np.ndarray, codes: np.ndarray) -> dict:
    """Return one list as JSON has it, with its AP, which needs the ranks of all matches."""
    matches = ranks[codes == "m"]
    ap, ap_market = average_precision(matches) if len(matches) else (None, None)
    return {
        "rows": rows.tolist(),
        "ranks": ranks.tolist(),
        "distances": distances.tolist(),
        "status": "".join(codes),
        "ap": ap,
        "ap_market": ap_market,
    }


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table that has a camera and a path, known or not."""
    blank = {"camid": -1, "path": ""}
    return table.assign(**{name: blank[name] for name in blank if name not in table})


def _names(table: pd.DataFrame) -> list[str]:
    """Return file names, without the folders that all of a table share; "" where they are unknown."""
    if not table["path"].astype(bool).all():
        return [""] * len(table)
    paths = [str(path).replace(os.sep, "/") for path in table["path"]]
    shared = os.path.commonprefix([path[: path.rfind("/") + 1] for path in paths])
    start = shared.rfind("/") + 1  # at the end of a whole folder's name
    return [encodable(path[start:]) for path in paths]


def _cameras(table: pd.DataFrame) -> list[int]:
    return sorted({*table["camid"].tolist()} - {-1})


def _rounded(values: np.ndarray, digits: int = 4) -> np.ndarray:
    """Round to so many significant digits: a page is half as large, and nobody reads more."""
    return np.array([float(f"{value:.{digits}g}") for value in values])
