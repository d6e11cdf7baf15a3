"""Ranked lists as data: what the browser shows of one run, or of two over the same queries and gallery.

All comes from `evaluation.retrieval.Retrieval`, like the scores. `Lists` checks the runs and scores
them; then it gives, as JSON will hold it, the table of the queries, the lists of some of them, and the
thumbnails of their images. A key names an image: "q12" is row 12 of the query table, "g7" row 7 of the
gallery table.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from reidlib.data.pixels import read_image
from reidlib.evaluation.metrics import average_precision
from reidlib.evaluation.retrieval import STATUSES, Retrieval
from reidlib.look.figures import EXCLUDED, RIGHT, WRONG
from reidlib.look.pages import encodable, short_names, thumbnail
from reidlib.progress import progress

CODES = dict(zip(STATUSES, "mwucji", strict=True))
COLOURS = {"right": RIGHT.colour, "wrong": WRONG.colour, "excluded": EXCLUDED.colour}
SIDES = {"q": "query", "g": "gallery"}


class Run:
    """One run, scored.

    Attributes:
        about: for JSON: `name`, `scored`, and `scores` in words, or why it has none.
        protocol: what was left out and counted.
        ap: (Q,), NaN for queries without one.
        first: (Q,), the rank of the first match, or NaN.
        follows: can gallery images be its queries?
    """

    def __init__(self, name: str, retrieval: Retrieval):
        self.name, self.retrieval = encodable(name), retrieval
        self.protocol, self.ap = "", np.full(len(retrieval.query), np.nan)
        self.first = self.ap
        try:
            evaluation = retrieval.evaluate()
            self.protocol, table = evaluation.protocol, evaluation.per_query
            self.ap, self.first = table["AP"].to_numpy(), table["first_rank"].to_numpy()
            scores = _in_words(evaluation.scores)
        except ValueError as error:  # nobody is known, or has a match: lists are there still
            nobody = (retrieval.query["pid"] < 1).all() or (retrieval.gallery["pid"] == -1).all()
            scores = f"Not scored: {'nobody is known in these pictures' if nobody else error}"
        self.scored = bool(self.protocol)
        self.about = {"name": self.name, "scored": self.scored, "scores": scores}
        try:
            self.follows = retrieval.ask([0]) is not None
        except ValueError:  # it was made from distances
            self.follows = False

    def ranked(self, side: str, rows: Sequence[int], topk: int) -> pd.DataFrame:
        """Return the lists of images of either table, with all their matches."""
        asking, at = (self.retrieval, rows) if side == "q" else (self.retrieval.ask(rows), None)
        return asking.ranked_lists(at, topk=topk, show_missed=True)


class Lists:
    """The ranked lists of one run, or of two (by name) over the same queries and gallery.

    A list has `topk` ranked images; matches beyond it follow, with their rank.

    Attributes:
        runs: a list of `Run`.
        tables: the query table and the gallery table, under "q" and "g", with `camid` -1 and `path` ""
            where they have none, and `name`, the path without the folders that all of a table share.

    Raises:
        ValueError: no run or more than two, two runs that differ in their queries, gallery or
            protocol (says in what), or `topk` below 1.
        TypeError: what is given is no `Retrieval` and no dict of them.
    """

    def __init__(self, retrievals: Retrieval | Mapping[str, Retrieval], topk: int):
        runs = {"": retrievals} if isinstance(retrievals, Retrieval) else retrievals
        if not (isinstance(runs, Mapping) and all(isinstance(r, Retrieval) for r in runs.values())):
            raise TypeError("the browser shows a Retrieval, or a dict of one or two by name")
        if not 1 <= len(runs) <= 2:
            raise ValueError(f"the browser shows one run or two side by side, not {len(runs)}")
        if topk < 1:
            raise ValueError(f"topk must be 1 or more, not {topk}")
        first, *others = runs.values()
        if others and (difference := _difference(first, *others)):
            raise ValueError(f"{' and '.join(map(repr, runs))} differ: {difference}")
        self.topk, self.runs = topk, [Run(*run) for run in runs.items()]
        self.tables = {}
        for side, table in (("q", first.query), ("g", first.gallery)):
            table = pd.DataFrame({"camid": -1, "path": "", **table})
            self.tables[side] = table.assign(name=short_names(table))
        # Whose people are numbered otherwise here than where each data set is by itself.
        self.several = "+".join(dict.fromkeys(self.tables["q"].get("dataset", ())))

    # --- queries

    def choose(self, queries: Sequence[int] | int | None, seed: int) -> tuple[np.ndarray, str]:
        """Return rows of queries, ascending, and a sentence on how they were chosen.

        `queries` and `seed` are those of `browser.ranked_list_page`.

        Raises:
            ValueError: no such query row, or a number below 1.
        """
        total = len(self.tables["q"])
        number = isinstance(queries, int | np.integer) and queries >= 1
        if queries is None or (number and queries >= total):
            return np.arange(total), f"All {total:,} queries are in this file."
        if number:
            return self._mixed(int(queries), seed)
        rows = np.unique(queries)
        whole = np.ndim(queries) == 1 and rows.dtype.kind in "iu" and len(rows) > 0
        if not whole or rows[0] < 0 or rows[-1] >= total:
            raise ValueError(f"queries must be rows below {total}, how many, or None for all")
        return rows, f"{len(rows):,} of {total:,} queries are in this file, as asked."

    def _mixed(self, n: int, seed: int) -> tuple[np.ndarray, str]:
        """Return n rows of all kinds, fewer than there are, and how they were chosen."""
        first, last = self.runs[0], self.runs[-1]
        change = f"of AP from {first.name} to {last.name}"
        wanted = [  # how many, of what, what is sorted ascending
            (n // 4, f"of largest loss {change}", last.ap - first.ap),
            (n // 4, f"of largest gain {change}", first.ap - last.ap),
            (n // 4, f"of lowest AP in {first.name}", first.ap),
        ]
        if first is last:
            wanted = [(n // 2, "of lowest AP", first.ap), (n // 4, "of highest AP", -first.ap)]
        chosen, parts, total = [], [], len(self.tables["q"])
        for size, what, value in wanted if first.scored and last.scored else ():
            order = [row for row in np.argsort(value, kind="stable") if not np.isnan(value[row])]
            rows = [row for row in order if row not in chosen][:size]
            chosen += rows
            parts.append(f"the {len(rows):,} {what}")
        left = np.setdiff1d(np.arange(total), chosen)
        drawn = np.random.default_rng(seed).choice(left, n - len(chosen), replace=False)
        parts.append(f"{len(drawn):,} drawn at random" + (" from the rest" if parts else ""))
        sentence = f"{n:,} of {total:,} queries are in this file: {', '.join(parts)}."
        return np.sort([*chosen, *drawn]), sentence

    def first(self) -> int:
        """Return the row of the query that the browser starts with: the worst by AP."""
        return int(np.argsort(self.runs[0].ap, kind="stable")[0])

    def about(self, rows: np.ndarray, title: str) -> dict:
        """Return what stands over the lists, and the table of the queries that can be picked."""
        tables = self.tables.items()
        names = [table["name"].tolist() for _, table in tables]
        first = self.runs[0].retrieval.ranked_lists(rows, topk=1, show_excluded=False)
        near = first.set_index("query").reindex(index=rows, columns=["camid"], fill_value=-1)
        query = self.tables["q"][["name", "pid", "camid"]].iloc[rows]
        listed = query.assign(row=rows, near=near["camid"].array).to_dict("list")
        aps = [run.ap[rows].tolist() for run in self.runs]
        firsts = [run.first[rows].tolist() for run in self.runs]
        listed["ap"] = [[None if np.isnan(ap) else ap for ap in its] for its in aps]
        listed["wrong"] = [[None if np.isnan(rank) else rank > 1 for rank in its] for its in firsts]
        what = (
            f"A list holds the {self.topk} nearest ranked images, or more if you ask, the images that the "
            "protocol leaves out where they would have stood among them, and all further matches with "
            "their rank: the ranks of the matches are all that AP is made of."
        )
        return {
            "title": encodable(title),
            "runs": [run.about for run in self.runs],
            "topk": self.topk,
            "total": len(self.tables["q"]),
            "most": len(self.tables["g"]),
            "id": hashlib.sha256(repr(names).encode()).hexdigest()[:16],  # of whom tags are kept
            "folders": {key: _folder(table) for key, table in tables},
            "several": self.several,
            "follows": any(run.follows for run in self.runs),
            "colours": COLOURS,
            "notes": [*dict.fromkeys(run.protocol for run in self.runs if run.scored), what],
            "cameras": {SIDES[key]: sorted({*t["camid"].tolist()} - {-1}) for key, t in tables},
            "queries": listed,
        }

    # --- lists and images

    def lists(self, side: str, rows: Sequence[int], topk: int) -> dict[str, dict]:
        """Return the lists of some queries (side "q") or gallery images ("g"), as JSON has them.

        `lists` has, by the key of who asks, a list of each run: columns, with a rank of 0 where an
        image is left out; None for a run that cannot be asked. `images` has file name, identity and
        camera of all gallery images in them, by key.
        """
        runs, shown = [], {*rows} if side == "g" else set()
        for run in self.runs:
            runs.append([None] * len(rows))
            if side == "q" or run.follows:
                table = run.ranked(side, rows, topk)
                runs[-1] = [_record(one) for _, one in table.groupby("query", sort=False)]
                shown |= {*table["gallery"]}
        gallery = self.tables["g"][["name", "pid", "camid"]].iloc[sorted(shown)]
        labels = zip(sorted(shown), gallery.to_numpy(object).tolist(), strict=True)
        return {
            "lists": {f"{side}{row}": [*own] for row, *own in zip(rows, *runs, strict=True)},
            "images": {f"g{row}": own for row, own in labels},
        }

    def table(self, run: Run, key: str, topk: int) -> pd.DataFrame:
        """Return one list as a table to take away."""
        side, row = self.place(key)
        table = run.ranked(side, [row], topk).drop(columns="query")
        asking = {"run": run.name, "asked": SIDES[side], "query": row}
        paths = {"query_path": self.path(key), "path": table.pop("path")}  # long, so they come last
        return pd.concat([pd.DataFrame(asking, table.index), table.assign(**paths)], axis=1)

    def path(self, key: str) -> str:
        """Return the path of an image's file; "" where it is not known."""
        side, row = self.place(key)
        return str(self.tables[side]["path"].iloc[row])

    def place(self, key: str) -> tuple[str, int]:
        """Return side and row of a key; a front end may ask for anything.

        Raises:
            ValueError: there is no such image.
        """
        side, row = key[:1], key[1:]
        if side in self.tables and row.isdecimal() and int(row) < len(self.tables[side]):
            return side, int(row)
        raise ValueError(f"there is no image {key!r}")

    def thumbnails(
        self, heights: Mapping[str, int], quality: int, show_progress: bool = False
    ) -> tuple[dict[str, str], list[str]]:
        """Return photographs by key, and what is wrong with the files that cannot be read.

        `heights` has by key how many pixels high a photograph may be, see `pages.thumbnail`.
        """

        def one(key: str) -> tuple[str, str]:
            path = self.path(key)
            try:
                if not path:
                    raise ValueError("the table does not name its files.")
                return thumbnail(read_image(path), heights[key], quality), ""
            except ValueError as error:
                return "", encodable(str(error))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            options = {"desc": "thumbnails", "unit": "img", "show": show_progress}
            made = [*progress(pool.map(one, heights), total=len(heights), **options)]
        photos = {key: photo for key, (photo, _) in zip(heights, made, strict=True) if photo}
        return photos, [error for _, error in made if error]


# --- small things


def _in_words(scores: Mapping[str, float]) -> str:
    return (
        f"mAP {scores['mAP']:.1%} (Market's definition: {scores['mAP_market']:.1%}), top-1 "
        f"{scores['top1']:.1%}, over {scores['queries'] - scores['queries_without_match']:,} queries"
    ).replace("%", " %")


def _difference(first: Retrieval, other: Retrieval) -> str:
    """Return in what two retrievals cannot be laid side by side; "" if they can."""
    for side in SIDES.values():
        a, b = getattr(first, side), getattr(other, side)
        if len(a) != len(b):
            return f"{len(a):,} and {len(b):,} {side} images"
        for column, name in (("pid", "pid"), ("camid", "camid"), ("path", "file name")):
            if column in a and column in b:
                x, y = (short_names(t) if column == "path" else t[column].tolist() for t in (a, b))
                if rows := [row for row in range(len(a)) if x[row] != y[row]]:
                    at = f"{name} of row {rows[0]} of the {side} table"
                    return f"{at} is {x[rows[0]]} in the first and {y[rows[0]]} in the second"
    if first.exclude_same_camera != other.exclude_same_camera:
        return "one leaves out results of the query's own camera, the other does not"
    return ""


def _record(table: pd.DataFrame) -> dict:
    """Return one list as JSON has it, with its AP, which needs the ranks of all matches."""
    matches = table["rank"][table["status"] == "match"].to_numpy(np.int64)
    ap, ap_market = average_precision(matches) if len(matches) else (None, None)
    return {
        "rows": table["gallery"].tolist(),
        "ranks": table["rank"].fillna(0).tolist(),
        # Four digits: a page is half as large, and nobody reads more.
        "distances": [float(f"{distance:.4g}") for distance in table["distance"]],
        "status": "".join(table["status"].map(CODES)),
        "ap": ap,
        "ap_market": ap_market,
    }


def _folder(table: pd.DataFrame) -> str:
    """Return the last of the folders that all of a table share, as `query/`; "" where there is none.

    Before a name it makes a path that says whose image it is, and nothing of this machine.
    """
    name = table["name"].iloc[0] if len(table) else ""
    path = encodable(str(table["path"].iloc[0]).replace(os.sep, "/")) if name else ""
    folder = path.removesuffix(name).rstrip("/").rpartition("/")[2]
    return folder and folder + "/"
