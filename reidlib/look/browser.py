"""The ranked-list browser: pick a query, see the list that was scored, click on, compare two runs.

`ranked_list_page` makes one HTML page that needs nothing else: lists, thumbnails and script are in it,
and its content security policy lets nothing reach the network. `Browser` is the same in a notebook,
where Python is asked for lists and thumbnails as they are wanted, so that every query of a large test
is there at once. The AP that stands over a list can be worked out again from the ranks that it shows.
"""

import base64
import hashlib
import html
import re
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
from reidlib.look.lists import CODES, Lists
from reidlib.look.maps import Sides
from reidlib.look.pages import HELPERS, encodable, fill, script_json, thumbnail

HERE = Path(__file__).parent
NAMES = ("picker", "lists", "larger")  # the parts of the script; what follows them starts it
PARTS = [*(f"browser_{name}.js" for name in NAMES), "browser.js"]
SCRIPT = "\n".join([HELPERS, *((HERE / part).read_text(encoding="utf-8") for part in PARTS)])
PAGE = (HERE / "browser.html").read_text(encoding="utf-8")
STYLE = (HERE / "browser.css").read_text(encoding="utf-8")
MORE = 3  # a page holds so many times the ranked images that a list shows at first
FEW = 1500  # up to so many pictures in a page are kept large
WHY = '<script type="application/json" id="ranked-lists-why">'
PAGE_STYLE = "body { margin: 0; }\n.ranked-lists { min-height: 100vh; }\n" + STYLE


def ranked_list_page(
    retrievals: Retrieval | Mapping[str, Retrieval],
    *,
    queries: Sequence[int] | int | None = 200,
    topk: int = 20,
    title: str = "Ranked lists",
    seed: int = 0,
    why: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> str:
    """Return the ranked-list browser as one HTML page, with all that it shows inside.

    Every image of the lists that are in it can be made the query too: its own list is in the page.

    Args:
        retrievals: one run, or one or two by name, over the same queries and the same gallery.
        queries: row numbers; or how many, and the page says which (the worst, the best, the largest
            changes between two runs, some at random); None for all.
        topk: ranked images in a list at first; the page shows three times as many if asked. Matches
            beyond it are listed too, as missed, with their rank.
        title: of the page.
        seed: of the random choice.
        why: what is known of failures, by the keys of images ("q12", "g7"): `causes` by query; `maps`
            by "q12 g7", two photographs of `pages.thumbnail`, the query's and the other's; and `map`,
            the keys of the images in an `embedding_map.html` beside the page.
        show_progress: draw a bar while thumbnails are made.

    Raises:
        ValueError: no run or more than two, two runs that differ in their queries, gallery or
            protocol (says in what), no such query row, or a number below 1.
        TypeError: what is given is no `Retrieval` and no dict of them.

    >>> from reidlib.data.tables import load
    >>> data = load("synthetic")
    >>> query, gallery = ((np.random.rand(len(t), 8), t) for t in (data.query, data.gallery))
    >>> retrieval = Retrieval(*query, *gallery)
    >>> ranked_list_page(retrieval, queries=[0], topk=3)[:15]
    '<!DOCTYPE html>'
    """
    shown = Lists(retrievals, topk)
    rows, choice = shown.choose(queries, seed)
    about = shown.about(rows, title)
    about["most"] = min(MORE * topk, about["most"])
    data = shown.lists("q", rows, about["most"])
    records = [record for one in data["lists"].values() for record in one]
    near = {
        row
        for record in records
        for row, rank, code in zip(record["rows"], record["ranks"], record["status"], strict=True)
        if rank <= topk or code == CODES["match"]
    }
    if about["follows"]:
        further = shown.lists("g", sorted(near), topk)
        data = {part: data[part] | further[part] for part in data}
    # What stands in further lists only has smaller pictures: it is most of the gallery.
    first = [f"q{row}" for row in rows] + [f"g{row}" for row in sorted(near)]
    few = len(first) <= FEW
    heights = dict.fromkeys(data["images"], 72) | dict.fromkeys(first, 256 if few else 112)
    photos, broken = shown.thumbnails(heights, 70 if few else 35, show_progress)
    about["notes"] += [choice, _on_follow(about["follows"], len(near))]
    if broken:
        about["notes"].append(f"No picture of {len(broken):,} images. The first: {broken[0]}")
    content = {"data": {"about": about, **data}, "photos": photos, "why": why or {}}
    texts = {"title": html.escape(encodable(title)), "style": PAGE_STYLE, "script": SCRIPT}
    digests = {f"{name}_digest": _digest(texts[name]) for name in ("style", "script")}
    return fill(PAGE, **texts, **digests, **{n: script_json(part) for n, part in content.items()})


def with_why(page: str, why: Mapping[str, Any]) -> str:
    """Return a page of `ranked_list_page` with another `why`: nothing else has to be made again."""
    start = page.index(WHY) + len(WHY)
    return page[:start] + script_json(why) + page[page.index("</script>", start) :]


def listed_in(page: str) -> set[str]:
    """Return the keys of the images whose lists a page of `ranked_list_page` holds."""
    return {*re.findall(r'"([qg]\d+)":\[(?:\{|null)', page)}


def why_wrong(causes: pd.DataFrame, on_map: Sequence[str], rows: Sides, nine: Sequence) -> dict:
    """Return the `why` of `ranked_list_page` from what `why.causes` and `maps.rows_of_nine` return.

    `on_map` are the keys of the images of an `embedding_map.html`; `rows` the queries with maps, their
    strangers and matches, by row number.
    """
    maps, drawn = {}, [thumbnail(image, 256, 70) for image in nine]
    for k, (query, stranger, match) in enumerate(zip(*rows, strict=True)):
        for other, on_query, on_other in ((stranger, 2, 5), (match, 6, 8)):  # in `maps.NINE`
            maps[f"q{query} g{other}"] = [drawn[9 * k + on_query], drawn[9 * k + on_other]]
    named = {f"q{row}": cause for row, cause in causes[["query", "cause"]].to_numpy() if cause}
    return {"causes": named, "maps": maps, "map": [*on_map]}


class Browser(anywidget.AnyWidget):
    """The ranked-list browser in a notebook: the widget that a cell shows as its last value.

    In a headless run, where no front end watches, no widget is made: the cell shows a picture of the
    list that the browser would start with. It is also left for viewers that know no widgets.

    Args:
        retrievals, topk, title, why: as for `ranked_list_page`; all queries and gallery images are
            there.
        live: whether to make a widget; None: where a front end sends the id of the cell that it
            runs, as JupyterLab, Notebook 7 and VS Code do and papermill and nbconvert do not.

    Raises:
        ValueError: as `ranked_list_page`.

    >>> from reidlib.data.tables import load
    >>> data = load("synthetic")
    >>> query, gallery = ((np.random.rand(len(t), 8), t) for t in (data.query, data.gallery))
    >>> retrieval = Retrieval(*query, *gallery)
    >>> browser = Browser(retrieval, topk=3, live=False)
    """

    _esm = SCRIPT
    _css = STYLE
    about = traitlets.Dict(help="What stands over the lists, and the queries.").tag(sync=True)
    ticked = traitlets.List(help="[number of the run, key, gallery row] each.").tag(sync=True)
    view = traitlets.Dict(help="The query's key, the camera, excluded shown?").tag(sync=True)
    tagged = traitlets.Dict(help="What is noted of an image, by its key.").tag(sync=True)

    def __init__(
        self,
        retrievals: Retrieval | Mapping[str, Retrieval],
        *,
        topk: int = 20,
        title: str = "Ranked lists",
        why: Mapping[str, Any] | None = None,
        live: bool | None = None,
    ):
        self._lists = Lists(retrievals, topk)
        if live is None:
            kernel = getattr(get_ipython(), "kernel", None)
            live = kernel is not None and "cellId" in kernel.get_parent("shell").get("metadata", {})
        self._live = live
        about = self._lists.about(np.arange(len(self._lists.tables["q"])), title)
        about["notes"].append(_on_follow(about["follows"]))
        about["why"] = why or {}
        first = {"key": f"q{self._lists.first()}", "camera": "", "excluded": True}
        super().__init__(about=about, view=first)
        self.on_msg(lambda _, question, __: self.send(self.answer(question)))

    def open(self) -> None:
        """Meet the front end, if there is one: a headless run is to leave nothing of a widget."""
        if self._live:
            super().open()

    @property
    def selection(self) -> pd.DataFrame:
        """The ticked results, list by list; where nothing is ticked, the list in view as filtered.

        Columns: `run`, `asked` ("query" or "gallery": the table that the query's row number is of),
        `query`, those of `Retrieval.ranked_lists` from `rank` on, `query_path` and `path`.
        """
        runs, topk = self._lists.runs, self.view.get("topk", self._lists.topk)
        if self.ticked:
            parts = []
            wanted = pd.DataFrame(self.ticked, columns=["run", "key", "row"])
            for (run, key), group in wanted.groupby(["run", "key"], sort=False):
                table = self._lists.table(runs[run], key, topk)
                parts.append(table[table["gallery"].isin(group["row"])])
            return pd.concat(parts, ignore_index=True)
        key, camera = self.view["key"], self.view["camera"]
        able = (run for run in runs if key[0] == "q" or run.follows)
        table = pd.concat([self._lists.table(run, key, topk) for run in able], ignore_index=True)
        if camera:
            table = table[table["camid"] == int(camera)]
        if not self.view["excluded"]:
            table = table.dropna(subset="rank")
        return table.reset_index(drop=True)

    @property
    def tags(self) -> pd.DataFrame:
        """What was noted of images: `path`, `action` ("drop", "relabel" or ""), `pid`, `tag`, `note`.

        Saved as `corrections.csv` in the data set's folder it corrects the data, see `reidlib.load`.
        """
        columns = ["path", "action", "pid", "tag", "note"]
        rows = [{**entry, "path": self._lists.path(key)} for key, entry in self.tagged.items()]
        table = pd.DataFrame(rows, columns=columns).fillna("")
        if several := self._lists.several:  # `correct` refuses their numbers, as the page's
            table["pid"] = table["pid"].where(table["pid"] == "", table["pid"] + f" of {several}")
        return table

    def answer(self, question: dict) -> dict:
        """Answer the front end, which asks for "photos" of `keys`, or for the "lists" of one.

        An error goes back as one: it must reach the person who clicked, not a log.
        """
        try:
            if question["ask"] == "photos":
                answer, _broken = self._lists.thumbnails(dict.fromkeys(question["keys"], 256), 80)
            else:
                side, row = self._lists.place(*question["keys"])
                answer = self._lists.lists(side, [row], question.get("topk") or self._lists.topk)
            return {"id": question["id"], "answer": answer}
        except Exception as error:
            return {"id": question.get("id"), "error": f"{type(error).__name__}: {error}"}

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        """The widget, and for all who cannot show one a picture of the first list."""
        title = self.about["title"]
        bundle = {"text/plain": f"[{title}]", "text/html": _picture(self._lists, title)}
        if not self._live:
            return bundle, {}
        data, metadata = super()._repr_mimebundle_()
        return data | bundle, metadata


def _picture(shown: Lists, title: str) -> str:
    """Return the query that the browser starts with, its list in each run, as an `<img>`."""
    rows, topk = [], min(10, shown.topk)
    for run in shown.runs:
        if "path" in run.retrieval.query and "path" in run.retrieval.gallery:
            name = photographs.one_line(run.name) if len(shown.runs) > 1 else ""
            rows.append(photographs.ranked_row(run.retrieval, shown.first(), name, topk))
    try:
        figure = photographs.ranked_lists(rows)
    except ValueError as error:  # the files are elsewhere, or not named
        return f"<p>No picture of the ranked lists: {html.escape(encodable(str(error)))}</p>"
    alt = f"{title}: the ranked list of the query that the browser starts with"
    return figures.img(figure, alt, photo=True)


def _on_follow(follows: bool, in_file: int | None = None) -> str:
    if not follows:
        return "Results cannot be made the query: distances among gallery images are not known."
    if in_file is None:
        return "A click on a result makes it the query."
    return (
        f"A click on a result makes it the query: the lists of {in_file:,} gallery images are in this "
        "file, of all that stand in a list of its queries. Others cannot be followed here."
    )


def _digest(text: str) -> str:
    """Return the source expression of a content security policy that allows just this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
