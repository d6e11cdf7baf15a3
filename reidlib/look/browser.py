"""The ranked-list browser: pick a query, see the list that was scored, click on, compare two runs.

`ranked_list_page` makes one HTML page that needs nothing else: lists, thumbnails and script are in it,
and its content security policy lets nothing reach the network. `Browser` is the same in a notebook,
where Python is asked for lists and thumbnails as they are wanted, so that every query of a large test
is there at once. What is drawn comes from `evaluation.Retrieval`, like the scores: the AP that stands
over a list is the evaluator's, and can be worked out again from the ranks that the list shows.

>>> import numpy as np, pandas as pd
>>> from reidlib.evaluation.retrieval import Retrieval
>>> table = pd.DataFrame({"path": ["a.jpg", "b.jpg"], "pid": [1, 2], "camid": [-1, -1]})
>>> found = Retrieval(np.zeros((1, 2)), table[:1], np.eye(2), table.assign(path=["c.jpg", "d.jpg"]))
>>> ranked_list_page(found, title="two & two").split("<title>")[1].split("</title>")[0]
'two &amp; two'
"""

import base64
import hashlib
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import anywidget
import numpy as np
import pandas as pd
import traitlets
from IPython import get_ipython
from PIL import Image

from reidlib.data.pixels import read_image
from reidlib.evaluation.metrics import Evaluation, average_precision
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look import figures, photographs
from reidlib.progress import progress

SCRIPT = Path(__file__).with_name("browser.js").read_text(encoding="utf-8")
STYLE = Path(__file__).with_name("browser.css").read_text(encoding="utf-8")
CODES = {
    "match": "m",
    "wrong": "w",
    "unknown": "u",
    "same camera": "c",
    "junk": "j",
    "query itself": "i",
}
COLOURS = {
    "right": figures.RIGHT.colour,
    "wrong": figures.WRONG.colour,
    "excluded": figures.EXCLUDED.colour,
}


class _Shown(NamedTuple):
    """One or two runs over the same queries and gallery, checked and scored."""

    runs: dict[str, Retrieval]
    scored: dict[str, Evaluation | str]  # the reason, where a run cannot be scored
    asks: dict[str, bool]  # can gallery images be its queries?
    names: dict[str, list[str]]  # "q" and "g": file names of both tables, without shared folders
    topk: int

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The query table and the gallery table, by the letter that keys of their images have."""
        first = next(iter(self.runs.values()))
        return {"q": first.query, "g": first.gallery}


def ranked_list_page(
    retrievals: Retrieval | Mapping[str, Retrieval],
    *,
    queries: Sequence[int] | int | None = 200,
    topk: int = 20,
    title: str = "Ranked lists",
    seed: int = 0,
    show_progress: bool = False,
) -> str:
    """Return the ranked-list browser as one HTML page, with all that it shows inside.

    Every image of the lists that are in it can be made the query too: its own list is in the page.
    The images of those further lists cannot, unless they are among the former; the page says so.

    Args:
        retrievals: one run, or one or two by name, over the same queries and the same gallery.
        queries: row numbers; or how many, of which the page says how they were chosen (the worst,
            the best, the largest changes between two runs, some at random); None for all.
        topk: ranked images in a list. Matches beyond it are listed too, as missed, with their rank.
        title: of the page.
        seed: of the random choice.
        show_progress: draw a bar while thumbnails are made.

    Raises:
        ValueError: no run or more than two, two runs that differ in their queries, gallery or
            protocol (says in what), no such query row, or a number below 1.
        TypeError: what is given is no `Retrieval` and no dict of them.
    """
    shown = _shown(retrievals, topk)
    rows, choice = _choose(shown, queries, seed)
    lists = _lists(shown, "q", rows)
    first = _rows_of(lists)
    if any(shown.asks.values()):
        lists |= _lists(shown, "g", first)
    # What stands in further lists only has smaller pictures: it is most of the gallery.
    heights = {f"g{row}": 72 for row in _rows_of(lists)}
    heights |= {f"{side}{row}": 112 for side, rows_ in (("q", rows), ("g", first)) for row in rows_}
    thumbnails = _thumbnails(shown, heights, 35, show_progress)
    about = _about(shown, rows, title)
    about["notes"] += [choice, _sentence_on_follow(shown, len(first))]
    photos, broken = thumbnails
    if broken:
        about["notes"].append(f"No picture of {len(broken):,} images. The first: {broken[0]}")
    data = {"about": about, "lists": lists, "images": _images(shown, _rows_of(lists))}
    policy = (
        f"default-src 'none'; img-src data:; script-src '{_digest(SCRIPT)}'; "
        f"style-src '{_digest(PAGE_STYLE)}'; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(_clean(title))}</title>
<style>{PAGE_STYLE}</style>
</head>
<body>
<div id="ranked-lists" class="ranked-lists"><noscript>This page needs JavaScript.</noscript></div>
<script type="application/json" id="ranked-lists-data">{_json(data)}</script>
<script type="application/json" id="ranked-lists-photos">{_json(photos)}</script>
<script type="module">{SCRIPT}</script>
</body>
</html>
"""


class Browser(anywidget.AnyWidget):
    """The ranked-list browser in a notebook: the widget that a cell shows as its last value.

    In a headless run, where no front end watches, no widget is made: the cell shows a picture of the
    list that the browser would start with. It is also left for viewers that know no widgets.

    Args:
        retrievals: as for `ranked_list_page`; all queries are there, and all gallery images.
        topk: ranked images in a list.
        title: over the browser.
        live: whether to make a widget; None: where a front end names the cell that it runs, as
            JupyterLab, Notebook 7 and VS Code do and papermill and nbconvert do not.

    Raises:
        ValueError: as `ranked_list_page`.
    """

    _esm = SCRIPT
    _css = STYLE
    _about = traitlets.Dict().tag(sync=True)
    _ticked = traitlets.List().tag(sync=True)  # [number of the run, key of the query, gallery row]
    _view = traitlets.Dict().tag(sync=True)  # the query's key, the camera filter, excluded shown?

    def __init__(
        self,
        retrievals: Retrieval | Mapping[str, Retrieval],
        *,
        topk: int = 20,
        title: str = "Ranked lists",
        live: bool | None = None,
    ):
        self._shown = _shown(retrievals, topk)
        self._live = _is_watched() if live is None else live
        rows = np.arange(len(self._shown.tables["q"]))
        about = _about(self._shown, rows, title)
        about["notes"].append(_sentence_on_follow(self._shown, None))
        self._start = int(_worst_first(self._shown)[0])  # the query that is shown first
        view = {"key": f"q{self._start}", "camera": "", "excluded": True}
        super().__init__(_about=about, _view=view)
        self.on_msg(self._answer)

    def open(self) -> None:
        """Meet the front end, if there is one: a headless run is to leave nothing of a widget."""
        if self._live:
            super().open()

    @property
    def selection(self) -> pd.DataFrame:
        """The ticked results, list by list; where nothing is ticked, the list in view as filtered.

        Columns: ``run``, ``asked`` ("query" or "gallery": the table that the query's row number is
        of), ``query``, ``query_path``, and those of `Retrieval.ranked_lists` from ``rank`` on.
        """
        runs = [*self._shown.runs]
        if self._ticked:
            wanted = pd.DataFrame(self._ticked, columns=["run", "key", "row"])
            parts = [
                table[table["gallery"].isin(group["row"])]
                for (run, key), group in wanted.groupby(["run", "key"], sort=False)
                for table in [_table(self._shown, runs[run], key)]
            ]
            return pd.concat(parts, ignore_index=True)
        key, camera = self._view["key"], self._view["camera"]
        able = runs if key[0] == "q" else [run for run in runs if self._shown.asks[run]]
        table = pd.concat([_table(self._shown, run, key) for run in able], ignore_index=True)
        if camera:
            table = table[table["camid"] == int(camera)]
        if not self._view["excluded"]:
            table = table.dropna(subset="rank")
        return table.reset_index(drop=True)

    def _answer(self, _: Any, question: dict, __: Any) -> None:
        """Answer a question of the front end: lists, or thumbnails, of some keys."""
        try:
            keys = [_checked_key(self._shown, key) for key in question["keys"]]
            if question["ask"] == "photos":
                answer, _broken = _thumbnails(self._shown, dict.fromkeys(keys, 256), 80)
            else:
                lists = {}
                for key in keys:
                    lists |= _lists(self._shown, key[0], np.array([int(key[1:])]))
                rows = np.union1d(_rows_of(lists), [int(k[1:]) for k in keys if k[0] == "g"])
                answer = {"lists": lists, "images": _images(self._shown, rows.astype(int))}
            self.send({"id": question["id"], "answer": answer})
        except Exception as error:  # it must reach the person who clicked, not a log
            self.send({"id": question.get("id"), "error": f"{type(error).__name__}: {error}"})

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        """The widget, and for all who cannot show one a picture of the first list."""
        bundle = {"text/plain": f"[{self._about['title']}]", "text/html": _picture(self)}
        if not self._live:
            return bundle, {}
        found = super()._repr_mimebundle_()
        data, metadata = found if isinstance(found, tuple) else (found, {})
        return bundle | {k: v for k, v in data.items() if k != "text/plain"}, metadata


# --- what is shown


def _shown(retrievals: Retrieval | Mapping[str, Retrieval], topk: int) -> _Shown:
    """Check the runs, and score them."""
    runs = {"": retrievals} if isinstance(retrievals, Retrieval) else retrievals
    if not (isinstance(runs, Mapping) and all(isinstance(one, Retrieval) for one in runs.values())):
        raise TypeError("the browser shows a Retrieval, or one or two of them by name in a dict")
    if not 1 <= len(runs) <= 2:
        raise ValueError(f"the browser shows one run or two side by side, not {len(runs)}")
    if topk < 1:
        raise ValueError(f"topk must be 1 or more, not {topk}")
    first, *others = runs.values()
    names = {"q": _names(first.query), "g": _names(first.gallery)}
    for other in others:
        difference = _difference(first, other)
        if difference:
            raise ValueError(
                f"{' and '.join(map(repr, runs))} are not about the same: {difference}"
            )
    scored, asks = {}, {}
    for name, retrieval in runs.items():
        try:
            scored[name] = retrieval.evaluate()
        except ValueError as error:  # nobody is known, or nobody has a match: lists are there still
            nobody = (retrieval.query["pid"] < 1).all() or (retrieval.gallery["pid"] == -1).all()
            scored[name] = "nobody is known in these pictures" if nobody else str(error)
        try:
            asks[name] = retrieval.ask([0]) is not None
        except ValueError:  # it was made from distances
            asks[name] = False
    return _Shown({_clean(n): r for n, r in runs.items()}, *_renamed(scored, asks), names, topk)


def _renamed(*tables: dict) -> list[dict]:
    return [{_clean(name): value for name, value in table.items()} for table in tables]


def _difference(first: Retrieval, other: Retrieval) -> str:
    """In what two retrievals cannot be laid side by side; "" if they can."""
    for side in ("query", "gallery"):
        a, b = getattr(first, side), getattr(other, side)
        if len(a) != len(b):
            return f"{len(a):,} and {len(b):,} {side} images"
        columns = [(c, a[c], b[c]) for c in ("pid", "camid") if c in a and c in b]
        if "path" in a and "path" in b:
            columns.append(("file name", pd.Series(_names(a)), pd.Series(_names(b))))
        for column, x, y in columns:
            rows = np.flatnonzero(x.to_numpy() != y.to_numpy())
            if len(rows):
                one, two = x.iloc[rows[0]], y.iloc[rows[0]]
                return (
                    f"{column} of row {rows[0]} of the {side} table is {one} in the first and {two} in "
                    f"the second ({len(rows):,} rows differ)"
                )
    if first.exclude_same_camera != other.exclude_same_camera:
        return "one leaves out results of the query's own camera, the other does not"
    return ""


def _choose(shown: _Shown, queries: Any, seed: int) -> tuple[np.ndarray, str]:
    """Return the rows of the queries to show, ascending, and a sentence on how they were chosen."""
    total = len(shown.tables["q"])
    if queries is None:
        return np.arange(total), f"All {total:,} queries are in this file."
    if not isinstance(queries, int | np.integer):
        rows = np.unique(np.asarray(queries))
        if rows.dtype.kind not in "iu" or len(rows) == 0 or rows[0] < 0 or rows[-1] >= total:
            raise ValueError(f"queries must be rows of the query table, 0 to {total - 1}")
        return rows, f"{len(rows):,} of {total:,} queries are in this file, as asked."
    if queries < 1:
        raise ValueError(f"queries must be 1 or more, None for all, or row numbers, not {queries}")
    if queries >= total:
        return np.arange(total), f"All {total:,} queries are in this file."
    aps = [e.per_query["AP"].to_numpy() for e in shown.scored.values() if isinstance(e, Evaluation)]
    wanted = []  # (how many, of what, what is sorted ascending)
    if len(aps) == len(shown.runs) == 1:
        wanted = [(queries // 2, "of lowest AP", aps[0]), (queries // 4, "of highest AP", -aps[0])]
    elif len(aps) == len(shown.runs) == 2:
        first, second = shown.runs
        wanted = [
            (queries // 4, f"of largest loss of AP from {first} to {second}", aps[1] - aps[0]),
            (queries // 4, f"of largest gain of AP from {first} to {second}", aps[0] - aps[1]),
            (queries // 4, f"of lowest AP in {first}", aps[0]),
        ]
    left, parts = np.arange(total), []
    chosen = np.empty(0, int)
    for n, what, key in wanted:
        known = left[~np.isnan(key[left])]
        rows = known[np.argsort(key[known], kind="stable")][:n]
        chosen, left = np.union1d(chosen, rows), np.setdiff1d(left, rows)
        parts.append(f"the {len(rows):,} {what}")
    rows = np.random.default_rng(seed).choice(left, queries - len(chosen), replace=False)
    parts.append(f"{len(rows):,} drawn at random" + (" from the rest" if parts else ""))
    sentence = f"{queries:,} of {total:,} queries are in this file: {', '.join(parts)}."
    return np.union1d(chosen, rows).astype(int), sentence


def _worst_first(shown: _Shown) -> np.ndarray:
    """Query rows as the browser orders them at its start."""
    evaluation = next(iter(shown.scored.values()))
    if isinstance(evaluation, str):
        return np.arange(len(shown.tables["q"]))
    return np.argsort(evaluation.per_query["AP"].to_numpy(), kind="stable")  # NaN last


def _about(shown: _Shown, rows: np.ndarray, title: str) -> dict:
    """What stands over the lists, and the table of the queries that the picker offers."""
    query = shown.tables["q"].iloc[rows]
    runs, aps, notes = [], [], []
    for name, scored in shown.scored.items():
        ok = isinstance(scored, Evaluation)
        line = f"Not scored: {scored}"
        if ok:
            s = scored.scores
            line = (
                f"mAP {s['mAP']:.1%} (Market's definition: {s['mAP_market']:.1%}), top-1 {s['top1']:.1%}, "
                f"over {s['queries'] - s['queries_without_match']:,} queries"
            ).replace("%", " %")
            notes.append(scored.protocol)
        runs.append({"name": name, "scored": ok, "scores": line})
        ap = scored.per_query["AP"].to_numpy()[rows] if ok else np.full(len(rows), np.nan)
        aps.append([None if np.isnan(value) else float(value) for value in ap])
    return {
        "title": _clean(title),
        "runs": runs,
        "topk": shown.topk,
        "total": len(shown.tables["q"]),
        "follows": any(shown.asks.values()),
        "colours": COLOURS,
        "notes": [
            *dict.fromkeys(notes),
            f"A list holds the {shown.topk} nearest ranked images, the images that the protocol leaves "
            "out where they would have stood among them, and all further matches with their rank: "
            "the ranks of the matches are all that AP is made of.",
        ],
        "cameras": {side: _cameras(shown.tables[side[0]]) for side in ("query", "gallery")},
        "queries": {
            "row": rows.tolist(),
            "name": [shown.names["q"][row] for row in rows],
            "pid": query["pid"].tolist(),
            "camid": _camids(query).tolist(),
            "ap": aps,
        },
    }


def _sentence_on_follow(shown: _Shown, in_file: int | None) -> str:
    if not any(shown.asks.values()):
        return "Results cannot be made the query: distances among gallery images are not known."
    if in_file is None:
        return "A click on a result makes it the query."
    return (
        f"A click on a result makes it the query: the lists of {in_file:,} gallery images are in this "
        "file, of all that stand in a list of its queries. Others cannot be followed here."
    )


def _lists(shown: _Shown, side: str, rows: np.ndarray) -> dict[str, list[dict | None]]:
    """By the key of each query, its list in each run: columns, all as long as the list.

    ``ranks`` are 0 where an image is left out of the ranking. None for a run that cannot be asked.
    """
    lists = {f"{side}{row}": [] for row in rows}
    for name, retrieval in shown.runs.items():
        if side == "g" and not shown.asks[name]:
            for records in lists.values():
                records.append(None)
            continue
        asked, at = (retrieval, rows) if side == "q" else (retrieval.ask(rows), None)
        table = asked.ranked_lists(at, topk=shown.topk, show_missed=True)
        columns = {
            "rows": table["gallery"].to_numpy(),
            "ranks": table["rank"].fillna(0).to_numpy(np.int64),
            "distances": _rounded(table["distance"].to_numpy(np.float64)),
        }
        codes = "".join(table["status"].map(CODES))
        starts = np.flatnonzero(np.diff(table["query"].to_numpy(), prepend=-1))
        ends = np.append(starts[1:], len(table))
        scored = shown.scored[name]
        for row, start, end in zip(rows, starts, ends, strict=True):
            record = {key: column[start:end].tolist() for key, column in columns.items()}
            record["status"] = codes[start:end]
            ap = [np.nan, np.nan]
            if side == "q" and isinstance(scored, Evaluation):
                ap = scored.per_query.loc[row, ["AP", "AP_market"]].tolist()
            elif side == "g" and "m" in record["status"]:
                ranks = columns["ranks"][start:end]
                ap = average_precision(ranks[np.array([*record["status"]]) == "m"])
            record["ap"], record["ap_market"] = (None if np.isnan(v) else float(v) for v in ap)
            lists[f"{side}{row}"].append(record)
    return lists


def _rows_of(lists: dict[str, list[dict | None]]) -> np.ndarray:
    """Gallery rows that stand in lists, ascending, once each."""
    every = [record["rows"] for records in lists.values() for record in records if record]
    return np.unique(np.concatenate(every)) if every else np.empty(0, int)


def _table(shown: _Shown, run: str, key: str) -> pd.DataFrame:
    """One list as a table to take away."""
    retrieval, row = shown.runs[run], int(key[1:])
    asked, at = (retrieval, row) if key[0] == "q" else (retrieval.ask([row]), 0)
    table = asked.ranked_list(at, topk=shown.topk, show_missed=True)
    side = shown.tables[key[0]]
    table.insert(0, "query_path", side["path"].iloc[row] if "path" in side else "")
    table.insert(0, "query", row)
    table.insert(0, "asked", "query" if key[0] == "q" else "gallery")
    table.insert(0, "run", run)
    return table


def _images(shown: _Shown, rows: np.ndarray) -> dict[str, list]:
    """File name, identity and camera of gallery rows, by key."""
    gallery = shown.tables["g"].iloc[rows]
    columns = zip(rows, gallery["pid"].tolist(), _camids(gallery).tolist(), strict=True)
    return {f"g{row}": [shown.names["g"][row], pid, camid] for row, pid, camid in columns}


def _checked_key(shown: _Shown, key: str) -> str:
    """Return the key of an image that is there; a front end may ask for anything."""
    if key[:1] not in shown.tables or not key[1:].isdecimal():
        raise ValueError(f"there is no image {key!r}")
    if int(key[1:]) >= len(shown.tables[key[0]]):
        raise ValueError(f"there is no image {key!r}")
    return key


# --- photographs


def _thumbnails(
    shown: _Shown, heights: dict[str, int], quality: int, show_progress: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Photographs by key, as WebP in base64, and what is wrong with the files that cannot be read.

    ``heights`` has, by key, how many pixels high a photograph may be (and twice as wide).

    WebP has no tables in its header, so a small picture is some 600 bytes, of which a JPEG would
    spend as many again on its header alone.
    """
    paths = {
        side: table["path"].tolist() if "path" in table else [""] * len(table)
        for side, table in shown.tables.items()
    }

    def one(key: str) -> tuple[str, str]:
        path = paths[key[0]][int(key[1:])]
        if not path:
            return "", "the table does not name its files."
        try:
            image = Image.fromarray(read_image(path))
        except ValueError as error:
            return "", _clean(str(error))
        scale = min(heights[key] / image.height, 2 * heights[key] / image.width)
        if scale < 1:
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BILINEAR)
        file = io.BytesIO()
        image.save(file, "webp", quality=quality, method=4)
        return base64.b64encode(file.getvalue()).decode(), ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(one, heights)
        bar = progress(made, total=len(heights), desc="thumbnails", unit="img", show=show_progress)
        made = [*bar]
    photos = {key: photo for key, (photo, _) in zip(heights, made, strict=True) if photo}
    return photos, [error for _, error in made if error]


def _picture(browser: Browser) -> str:
    """The query that the browser starts with, its list in each run, as an `<img>`."""
    shown, row, rows = browser._shown, browser._start, []
    query = shown.tables["q"].iloc[row]
    for name, retrieval in shown.runs.items():
        title = f"identity {query['pid']}" if query["pid"] > 0 else "the first query"
        if len(shown.runs) > 1:
            title = f"{name}: {title}".replace("$", r"\$")  # else a formula, to matplotlib
        found = retrieval.ranked_list(row, topk=min(10, shown.topk), show_missed=True)
        if "path" in found and "path" in query:
            rows.append(photographs.RankedRow(title, query["path"], found))
    try:
        figure = photographs.ranked_lists(rows)
    except ValueError as error:  # the files are elsewhere, or not named
        return f"<p>No picture of the ranked lists: {html.escape(_clean(str(error)))}</p>"
    data = base64.b64encode(figures.encode(figure, photo=True)).decode()
    alt = f"{browser._about['title']}: the ranked list of the query that the browser starts with"
    width = round(100 * figure.get_figwidth())
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(alt)}" width="{width}" '
        f'style="max-width: 100%; height: auto">'
    )


# --- small things


def _is_watched() -> bool:
    """Is there a front end that runs this cell and can show widgets?

    JupyterLab, Notebook 7 and VS Code send the cell's id along with its code; nbclient, with which
    papermill and nbconvert run notebooks, does not.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and "cellId" in kernel.get_parent("shell").get("metadata", {})


def _names(table: pd.DataFrame) -> list[str]:
    """File names, without the folders that all of a table share; "" where they are not known."""
    if "path" not in table or not table["path"].astype(bool).all():
        return [""] * len(table)
    paths = [str(path).replace(os.sep, "/") for path in table["path"]]
    shared = os.path.commonprefix([path[: path.rfind("/") + 1] for path in paths])
    start = shared.rfind("/") + 1  # at the end of a whole folder's name
    return [_clean(path[start:]) for path in paths]


def _camids(table: pd.DataFrame) -> pd.Series:
    return table["camid"] if "camid" in table else pd.Series(-1, index=table.index)


def _cameras(table: pd.DataFrame) -> list[int]:
    return sorted(set(_camids(table).tolist()) - {-1})


def _rounded(values: np.ndarray, digits: int = 4) -> np.ndarray:
    """Round to so many significant digits: a page is half as large, and nobody reads more."""
    return np.array([float(f"{value:.{digits}g}") for value in values])


def _clean(text: str) -> str:
    """Text that can be encoded: file names may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _json(data: Any) -> str:
    """JSON that may stand inside `<script>`: nothing in it can end the element or open another."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII: line separators are escaped already
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    """The source expression of a content security policy that allows just this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


PAGE_STYLE = "body { margin: 0; }\n.ranked-lists { min-height: 100vh; }\n" + STYLE
