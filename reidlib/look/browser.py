"""The ranked-list browser: pick a query, see the list that was scored, click on, compare two runs.

`ranked_list_page` makes one HTML page that needs nothing else: lists, thumbnails and script are in it,
and its content security policy lets nothing reach the network. `Browser` is the same in a notebook,
where Python is asked for lists and thumbnails as they are wanted, so that every query of a large test
is there at once. What is drawn comes from `evaluation.retrieval.Retrieval`, like the scores (see
`look.lists`): the AP that stands over a list can be worked out again from the ranks that it shows.

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import pandas as pd
import traitlets
from IPython import get_ipython

from reidlib.evaluation.retrieval import Retrieval
from reidlib.look import figures, photographs
from reidlib.look.lists import Key, Lists, rows_of
from reidlib.look.pages import encodable, fill, script_json

HERE = Path(__file__).parent
PARTS = ("browser_picker.js", "browser_lists.js", "browser.js")  # the last one starts it
SCRIPT = "\n".join((HERE / part).read_text(encoding="utf-8") for part in PARTS)
PAGE = (HERE / "browser.html").read_text(encoding="utf-8")
STYLE = (HERE / "browser.css").read_text(encoding="utf-8")
PAGE_STYLE = "body { margin: 0; }\n.ranked-lists { min-height: 100vh; }\n" + STYLE


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

    >>> from reidlib.data.tables import load
    >>> dataset = load("synthetic")
    >>> query, gallery = dataset.query, dataset.gallery
    >>> rng = np.random.default_rng(0)
    >>> draw = lambda table: rng.normal(size=(len(table), 8))
    >>> retrieval = Retrieval(draw(query), query, draw(gallery), gallery)
    >>> ranked_list_page(retrieval, queries=[0], topk=3)[:15]
    '<!DOCTYPE html>'
    """
    shown = Lists(retrievals, topk)
    rows, choice = shown.choose(queries, seed)
    records = shown.records("q", rows)
    first = rows_of(records)
    if any(shown.follows.values()):
        records |= shown.records("g", first)
    every = rows_of(records)
    # What stands in further lists only has smaller pictures: it is most of the gallery.
    heights = {Key("g", row): 72 for row in every}
    heights |= dict.fromkeys(
        [*(Key("q", row) for row in rows), *(Key("g", row) for row in first)], 112
    )
    photos, broken = shown.thumbnails(heights, 35, show_progress)
    about = shown.about(rows, title)
    about["notes"] += [choice, _sentence_on_follow(shown, len(first))]
    if broken:
        about["notes"].append(f"No picture of {len(broken):,} images. The first: {broken[0]}")
    return fill(
        PAGE,
        title=html.escape(encodable(title)),
        script_digest=_digest(SCRIPT),
        style_digest=_digest(PAGE_STYLE),
        style=PAGE_STYLE,
        data=script_json({"about": about, "lists": records, "images": shown.images(every)}),
        photos=script_json(photos),
        script=SCRIPT,
    )


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

    >>> from reidlib.data.tables import load
    >>> dataset = load("synthetic")
    >>> query, gallery = dataset.query, dataset.gallery
    >>> rng = np.random.default_rng(0)
    >>> draw = lambda table: rng.normal(size=(len(table), 8))
    >>> retrieval = Retrieval(draw(query), query, draw(gallery), gallery)
    >>> browser = Browser(retrieval, topk=3, live=False)
    """

    _esm = SCRIPT
    _css = STYLE
    about = traitlets.Dict(help="What stands over the lists, and the queries.").tag(sync=True)
    ticked = traitlets.List(help="[number of the run, key, gallery row] each.").tag(sync=True)
    view = traitlets.Dict(help="The query's key, the camera, excluded shown?").tag(sync=True)

    def __init__(
        self,
        retrievals: Retrieval | Mapping[str, Retrieval],
        *,
        topk: int = 20,
        title: str = "Ranked lists",
        live: bool | None = None,
    ):
        self._lists = Lists(retrievals, topk)
        self._live = _is_watched() if live is None else live
        about = self._lists.about(np.arange(len(self._lists.tables["q"])), title)
        about["notes"].append(_sentence_on_follow(self._lists, None))
        first = Key("q", self._lists.first())
        super().__init__(about=about, view={"key": str(first), "camera": "", "excluded": True})
        self.on_msg(lambda _, question, __: self.send(self.answer(question)))

    def open(self) -> None:
        """Meet the front end, if there is one: a headless run is to leave nothing of a widget."""
        if self._live:
            super().open()

    @property
    def selection(self) -> pd.DataFrame:
        """The ticked results, list by list; where nothing is ticked, the list in view as filtered.

        Columns: `run`, `asked` ("query" or "gallery": the table that the query's row number is of),
        `query`, `query_path`, and those of `Retrieval.ranked_lists` from `rank` on.
        """
        runs = [*self._lists.runs]
        if self.ticked:
            wanted = pd.DataFrame(self.ticked, columns=["run", "key", "row"])
            parts = [
                table[table["gallery"].isin(group["row"])]
                for (run, key), group in wanted.groupby(["run", "key"], sort=False)
                for table in [self._lists.table(runs[run], self._lists.key(key))]
            ]
            return pd.concat(parts, ignore_index=True)
        key, camera = self._lists.key(self.view["key"]), self.view["camera"]
        able = [run for run in runs if key.side == "q" or self._lists.follows[run]]
        table = pd.concat([self._lists.table(run, key) for run in able], ignore_index=True)
        if camera:
            table = table[table["camid"] == int(camera)]
        if not self.view["excluded"]:
            table = table.dropna(subset="rank")
        return table.reset_index(drop=True)

    def answer(self, question: dict) -> dict:
        """Answer a question of the front end.

        Args:
            question: `id`; `ask`: "lists" or "photos"; and `keys` of images.

        Returns:
            `id` and `answer`, or `error`: it must reach the person who clicked, not a log.
        """
        try:
            keys = [self._lists.key(key) for key in question["keys"]]
            if question["ask"] == "photos":
                answer, _broken = self._lists.thumbnails(dict.fromkeys(keys, 256), 80)
            else:
                records = {}
                for key in keys:
                    records |= self._lists.records(key.side, [key.row])
                own = np.array([key.row for key in keys if key.side == "g"], np.int64)
                images = self._lists.images(np.union1d(rows_of(records), own))
                answer = {"lists": records, "images": images}
            return {"id": question["id"], "answer": answer}
        except Exception as error:
            return {"id": question.get("id"), "error": f"{type(error).__name__}: {error}"}

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        """The widget, and for all who cannot show one a picture of the first list."""
        title = self.about["title"]
        bundle = {"text/plain": f"[{title}]", "text/html": _picture(self._lists, title)}
        if not self._live:
            return bundle, {}
        found = super()._repr_mimebundle_()
        data, metadata = found if isinstance(found, tuple) else (found, {})
        return bundle | {k: v for k, v in data.items() if k != "text/plain"}, metadata


def _picture(shown: Lists, title: str) -> str:
    """Return the query that the browser starts with, its list in each run, as an `<img>`."""
    rows = []
    if all(
        table["path"].astype(bool).all() for table in shown.tables.values()
    ):  # else files are not named
        for name, retrieval in shown.runs.items():
            before = photographs.one_line(name) if len(shown.runs) > 1 else ""
            topk = min(10, shown.topk)
            rows.append(photographs.ranked_row(retrieval, shown.first(), before, topk))
    try:
        figure = photographs.ranked_lists(rows)
    except ValueError as error:  # the files are elsewhere, or not named
        return f"<p>No picture of the ranked lists: {html.escape(encodable(str(error)))}</p>"
    alt = f"{title}: the ranked list of the query that the browser starts with"
    return figures.img(figure, alt, photo=True)


def _sentence_on_follow(shown: Lists, in_file: int | None) -> str:
    if not any(shown.follows.values()):
        return "Results cannot be made the query: distances among gallery images are not known."
    if in_file is None:
        return "A click on a result makes it the query."
    return (
        f"A click on a result makes it the query: the lists of {in_file:,} gallery images are in this "
        "file, of all that stand in a list of its queries. Others cannot be followed here."
    )


def _is_watched() -> bool:
    """Return whether a front end runs this cell and can show widgets.

    JupyterLab, Notebook 7 and VS Code send the cell's id along with its code; nbclient, with which
    papermill and nbconvert run notebooks, does not.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and "cellId" in kernel.get_parent("shell").get("metadata", {})


def _digest(text: str) -> str:
    """Return the source expression of a content security policy that allows just this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
