"""Figures made of photographs: grids, ranked lists, a map of embeddings, what a network looks at.

The axes of these figures are in inches, from the upper left corner. Right and wrong are told by the
frame, its line, its colour and a sign.

>>> image = np.zeros((128, 64, 3), np.uint8)
>>> figure = photo_grid([image, image], ["one", "two"], marks=[RIGHT, WRONG])
>>> [text.get_text() for text in figure.axes[0].texts]
['✓ one', '✗ two']
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from PIL import Image

from reidlib.data.pixels import read_image
from reidlib.evaluation.metrics import average_precision
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look.figures import EXCLUDED, MARKERS, PALETTE, PLAIN, QUERY, RIGHT, WRONG, Mark
from reidlib.words import typeset

# How the statuses of `Retrieval.ranked_lists` are drawn; all others are EXCLUDED.
STATUS = {"match": RIGHT, "wrong": WRONG, "unknown": Mark("#444444", "", "-")}
PAGE = 9  # inches across a page; shown 800 pixels wide, print of 8 points has 9 pixels
COLUMNS = 10  # places in a line of a ranked list


def _sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one axes over all of it, its coordinates inches from the upper left."""
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _resize(axes, width, height)
    return figure, axes


def _resize(axes: Axes, width: float, height: float) -> None:
    axes.figure.set_size_inches(width, height)
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)


def _photo(
    axes: Axes, image: np.ndarray, x: float, y: float, w: float, h: float, mark: Mark = PLAIN
) -> None:
    """Draw one photograph, as large as fits into the box in its own proportions, and its frame."""
    rows, columns = image.shape[:2]
    scale = min(w / columns, h / rows)
    if (shrink := int(1 / (400 * scale))) > 1:  # photographs of 12 megapixels would fill the memory
        image = np.asarray(Image.fromarray(image).reduce(shrink))
    x, y = x + (w - columns * scale) / 2, y + (h - rows * scale) / 2
    w, h = columns * scale, rows * scale
    style = {"alpha": 0.35 if mark == EXCLUDED else 1, "interpolation": "antialiased"}
    axes.imshow(image, extent=(x, x + w, y + h, y), aspect="auto", **style)
    if mark != PLAIN:
        axes.add_patch(Rectangle((x, y), w, h, fill=False, ec=mark.colour, ls=mark.line, lw=2.5))


def photo_grid(
    images: Sequence[np.ndarray | None],
    titles: Sequence[str] = (),
    columns: int = 8,
    marks: Sequence[Mark] = (),
    row_titles: Sequence[str] = (),
    height: float = 2,
    together: int = 1,
) -> Figure:
    """Draw photographs in rows, read like text.

    Args:
        images: N arrays (H, W, 3) uint8, of any sizes; None leaves its place empty.
        titles: N short lines, one over each photograph.
        columns: photographs in a row.
        marks: N of `RIGHT`, `WRONG`, `EXCLUDED`, `QUERY`, `PLAIN`: frame, and sign before the title.
        row_titles: one line left of each row.
        height: of a photograph, inches, or less where a row would be wider than a page.
        together: how many in a row belong together, such as pairs: a wider gap parts them from others.

    Raises:
        ValueError: no images, or lists that do not fit them.
    """
    n, rows = len(images), math.ceil(len(images) / columns)
    shapes = [image.shape for image in images if image is not None]
    if not shapes:
        raise ValueError("There are no photographs to draw.")
    given = {"titles": (titles, n), "marks": (marks, n), "row_titles": (row_titles, rows)}
    for name, (values, wanted) in given.items():
        if len(values) not in (0, wanted):
            raise ValueError(f"photo_grid needs {wanted} {name}, not {len(values)}.")
    marks = marks or [PLAIN] * n
    aspect = max(min(shape[1] / shape[0], 2) for shape in shapes)
    lines = [f"{m.sign} {t}".strip() for m, t in zip(marks, titles or [""] * n, strict=True)]
    heads = [0.18 * any(lines[i : i + columns]) for i in range(0, n, columns)]
    gap, wider = 0.11, 0.25 * (together > 1)
    left = 0.1 + 0.075 * max(map(len, row_titles)) if row_titles else 0.0
    room = PAGE - left - gap - (columns - 1) // together * wider
    width = min(height * aspect, max(0.3, room / columns - gap))
    height = width / aspect
    places = [left + gap + i * (width + gap) + i // together * wider for i in range(columns)]
    size = places[min(n, columns) - 1] + width + gap, gap + rows * (height + gap) + sum(heads)
    figure, axes = _sheet(*size)
    for i, (image, mark) in enumerate(zip(images, marks, strict=True)):
        row, column = divmod(i, columns)
        x, y = places[column], gap + row * (height + gap) + sum(heads[: row + 1])
        if row_titles and column == 0:
            axes.text(0.08, y + height / 2, row_titles[row], va="center", size=9)
        if image is not None:
            colour = mark.colour if mark.sign else "black"
            axes.text(x + width / 2, y - 0.04, lines[i], ha="center", size=8, color=colour)
            _photo(axes, image, x, y, width, height, mark)
    return figure


# --- ranked lists


class RankedRow(NamedTuple):
    """One query and what the gallery answered, for `ranked_lists`.

    `title` stands over the row, `query` is the path of its image, and `results` what
    `Retrieval.ranked_list` returned with `show_missed=True`: its AP is computed from it. Where `topk`
    is known no more lines are drawn than that many images take.
    """

    title: str
    query: str
    results: pd.DataFrame
    topk: int | None = None


def ranked_row(
    retrieval: Retrieval, query: int, before: str = "", topk: int = 10, show_excluded: bool = True
) -> RankedRow:
    """Return a query (row number) with its list of `topk` ranked images; tables must have `path`.

    Its title is who it is, after `before` and a colon.

    Raises:
        ValueError: no such query.
    """
    results = retrieval.ranked_list(query, topk=topk, show_missed=True, show_excluded=show_excluded)
    who = retrieval.query.iloc[query]
    title = f"identity {who['pid']}" if who["pid"] > 0 else "somebody unknown"
    title += f", camera {who['camid']}" if who.get("camid", -1) >= 0 else ""
    return RankedRow(f"{before}: {title}" if before else title, who["path"], results, topk)


def ranked_examples(retrieval: Retrieval, lists: int = 3, topk: int = 10) -> list[RankedRow]:
    """Return the best, the median and the worst queries by AP, for `ranked_lists`.

    Up to `lists` of each, none twice, and as far as can be of different people. Queries without a match
    have no AP and are left out.

    Raises:
        ValueError: the retrieval cannot be scored.
    """
    by_ap = retrieval.evaluate().per_query.dropna(subset="AP").sort_values("AP", kind="stable")
    lists, chosen = min(lists, math.ceil(len(by_ap) / 2)), {}
    middle = by_ap[max(0, (len(by_ap) - lists) // 2) :]
    for name, group in {"best": by_ap[::-1], "worst": by_ap, "median": middle}.items():
        free = group[~group["query"].isin(chosen)]
        by_person = pd.concat([free.drop_duplicates("pid"), free])
        chosen |= dict.fromkeys(by_person["query"].unique()[:lists], name)
    asked = [(q, name) for name in ("best", "median", "worst") for q in chosen if chosen[q] == name]
    return [ranked_row(retrieval, query, name, topk) for query, name in asked]


# Inches: between images; titles of a row; what stands over and under the images of a line.
GAP, HEAD, RANK, FOOT = 0.06, 0.48, 0.2, 0.36


def ranked_lists(rows: Sequence[RankedRow], height: float = 1.27) -> Figure:
    """Draw ranked lists, one a row: the query, then the gallery from the nearest on.

    ✓ and a full frame: the same identity; ✗ and a dashed frame: another one, under it whose. Images
    that the protocol leaves out stand in their place, pale and smaller, with the reason; where
    several follow each other the nearest is drawn and all are counted. Under each title stand the
    list's AP and the ranks of all matches, those that are not drawn too. A line has `COLUMNS` places,
    as wide as a page. `height` is that of an image, in inches.

    Raises:
        ValueError: no rows, a list without results, or one made without `show_missed=True`.
    """
    if len(rows) == 0 or any(len(row.results) == 0 for row in rows):
        raise ValueError("There is nothing to draw: no rows, or a ranked list without results.")
    width = height / 2 + 0.1
    left = width + 4 * GAP  # where results start
    figure, axes = _sheet(1, 1)
    axes.text(GAP, 0.17, _legend(rows), size=8.5, va="center", color="#444444")
    top, right = 0.3, PAGE - 2 * GAP  # under the legend, and where it ends
    for row in rows:
        tiles = [*_tiles(row.results)]
        if row.topk:
            tiles = tiles[: COLUMNS * math.ceil(row.topk / COLUMNS)]
        last = max((rank for *_, rank in tiles if rank), default=0)
        axes.text(GAP, top + 0.17, row.title, size=10, va="center", weight="bold")
        axes.text(GAP, top + 0.36, _account(row.results, last), size=8.5, va="center")
        x, y = left, top + HEAD + RANK  # of the next photograph
        bar = [y]
        _photo(axes, read_image(row.query), GAP, y, width, height, QUERY)
        axes.text(GAP + width / 2, y - 0.05, "query", size=8.5, ha="center")
        for place, (path, mark, over, under, _) in enumerate(tiles):
            scale = 0.52 / width if mark == EXCLUDED else 1  # two reasons fit over it
            w, h = scale * width, scale * height
            if place and place % COLUMNS == 0:
                x, y = left, y + height + FOOT + RANK
            foot = y + height
            _photo(axes, read_image(path), x, foot - h, w, h, mark)
            size, weight = (8, "normal") if mark == EXCLUDED else (8.5, "bold")
            text = {"x": x + w / 2, "ha": "center", "color": mark.colour}
            axes.text(y=foot - h - 0.05, s=over, va="bottom", size=size, weight=weight, **text)
            axes.text(y=foot + 0.04, s=under, va="top", size=8, **text)
            right = max(right, x + w)
            x += w + GAP
        axes.plot([left - 1.5 * GAP] * 2, [*bar, y + height], "-", color="#BBBBBB", lw=1)
        top = y + height + FOOT
    _resize(axes, right + 2 * GAP, top)
    return figure


def _legend(rows: Sequence[RankedRow]) -> str:
    """Return what the marks of ranked lists mean, as far as they can occur."""
    judged = [f"{RIGHT.sign} full frame: same person", f"{WRONG.sign} dashed frame: somebody else"]
    under = "c: camera, id: identity, last: distance"
    if all((row.results["status"] == "unknown").any() for row in rows):
        judged = []
        if all((row.results[["pid", "camid"]] < 0).all(axis=None) for row in rows):
            under = "under each: its file, its distance"
    return (4 * " ").join([*judged, f"{EXCLUDED.sign} pale: left out of the ranking", under])


def _missed(results: pd.DataFrame) -> pd.Series:
    """Return which rows are matches from beyond the list: those whose rank does not follow on."""
    return results["rank"].notna() & (results["rank"] != results["rank"].notna().cumsum())


def _account(results: pd.DataFrame, last: int) -> str:
    """Return a list's AP and what it is made of, the ranks of its matches; "" without labels.

    `last` is the last rank that is drawn.
    """
    if (results["status"] == "unknown").any():
        return ""
    if not results.attrs.get("all_matches", True):
        raise ValueError(
            "A ranked list that lacks its later matches has no AP: make it with show_missed=True."
        )
    is_match = results["status"] == "match"
    ranks = results.loc[is_match, "rank"].to_numpy(np.int64)
    if len(ranks) == 0:
        return "no match in the gallery: not scored"
    missed = _missed(results)[is_match].to_numpy() | (ranks > last)
    of = "1 match" if len(ranks) == 1 else f"{len(ranks)} matches"
    text = f"AP {average_precision(ranks)[0]:.2%} of {of}, ranks: {_listed(ranks[~missed])}"
    if missed.any():
        text += f"     not shown: {missed.sum()}, at {_listed(ranks[missed])}"
    return typeset(text)


def _listed(ranks: np.ndarray) -> str:
    named = [f"{rank:,}" for rank in ranks]
    if len(named) > 10:  # else one alone would be left out
        named[8:-1] = ["…"]
    return ", ".join(named).replace("…,", "…") or "none"


def _tiles(results: pd.DataFrame) -> Iterator[tuple[str, Mark, str, str, int]]:
    """Give for each image of a ranked list its path, mark, words over and under it, and rank or 0.

    Of a run of excluded images it is the nearest, over which all are counted.
    """
    shown = results[~_missed(results)].itertuples()
    for excluded, run in itertools.groupby(shown, lambda result: result.status not in STATUS):
        if not excluded:
            yield from map(_ranked, run)
            continue
        run = list(run)
        over = [EXCLUDED.sign]
        for reason, n in Counter(result.status for result in run).items():
            over.append(reason.replace(" ", "\n") + (f" ×{n}" if n > 1 else ""))
        yield run[0].path, EXCLUDED, "\n".join(over), _camera(run[0]), 0


def _ranked(result: Any) -> tuple[str, Mark, str, str, int]:
    mark = STATUS[result.status]
    who = f"id {result.pid}" if result.pid > 0 else ""
    of = f"{_camera(result)}{who}".strip()
    if not of and result.status == "unknown":  # all that there is to know it by
        of = one_line(Path(result.path).stem, 9)
    under = f"{of}\n{result.distance:#.3g}".strip()
    if result.pid == 0:  # a camera beside so long a word would not fit
        under = f"distractor\n{_camera(result)}{result.distance:#.3g}"
    return result.path, mark, f"{mark.sign} {result.rank}".strip(), under, result.rank


def _camera(result: Any) -> str:
    return f"c{result.camid} " if result.camid >= 0 else ""


# --- a map of embeddings


def embedding_map(points: np.ndarray, pids: Sequence[int], images: Sequence[np.ndarray]) -> Figure:
    """Draw a map of embeddings: grey dots, and ten identities by colour, marker and photograph.

    Those are the ten with most points (of equal ones, the smallest pids). `points` are (N, 2),
    `pids` (N,), `images` N arrays (H, W, 3) uint8.

    Raises:
        ValueError: shapes that do not fit.
    """
    points, pids = np.asarray(points), np.asarray(pids)
    if points.shape != (len(pids), 2) or len(images) != len(pids):
        raise ValueError(f"{points.shape} points, {len(images)} images for {len(pids)} pids")
    counts = pd.Series(pids[pids > 0]).value_counts().sort_index()
    largest = counts.sort_values(ascending=False, kind="stable").index[: len(MARKERS)]
    figure, legend = _sheet(9.2, 6.6)
    axes = figure.add_axes((0.02, 0.02, 0.78, 0.96))
    axes.plot(*points.T, ls="", marker="o", color="#B8B8B8", ms=2.5, alpha=0.6)
    style = {"mec": "white", "mew": 0.5, "ms": 8, "ls": ""}
    for i, pid in enumerate(largest):
        style |= {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i]}
        own = np.flatnonzero(pids == pid)
        axes.plot(*points[own].T, **style)
        x, y = 7.55 + 0.85 * (i // 5), 0.35 + 1.25 * (i % 5)  # the legend: five rows, two columns
        legend.plot(x + 0.05, y, **style)
        legend.text(x + 0.17, y, f"id {pid}", va="center", size=8)
        away = np.abs(points[own] - np.median(points[own], axis=0)).sum(axis=1)
        _photo(legend, images[own[away.argmin()]], x, y + 0.1, 0.6, 1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#CCCCCC")
    return figure


def search_lists(found: pd.DataFrame) -> Figure:
    """Draw what `look.search.search` found: one ranked list a row, under its query's folder and name.

    Nothing is marked right or wrong, and nothing is scored, also where labels are known.

    Raises:
        ValueError: nothing was found, or an image cannot be read.
    """
    rows = []
    for _, results in found.groupby("query", sort=False):
        path = results["query_path"].iloc[0]
        results = results.assign(status=results["status"].replace(["match", "wrong"], "unknown"))
        title = one_line("/".join(Path(path).parts[-2:]))  # names repeat in other folders
        rows.append(RankedRow(title, path, results))
    return ranked_lists(rows)


def one_line(name: str, longest: int = 80) -> str:
    """Return a file's name as matplotlib can draw it: no line breaks, no formulas, known glyphs.

    >>> one_line("price $x_1$\\n\u4eba.jpg")
    'price \\\\$x_1\\\\$\ufffd\ufffd.jpg'
    """
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    name = "".join(c if ord(c) in glyphs and c.isprintable() else "\ufffd" for c in name)
    name = name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 + 1 :]}"
    return name.replace("$", r"\$")


# --- where a network looks


def overlay(image: np.ndarray, values: np.ndarray, most: float) -> np.ndarray:
    """Return a photograph, greyed, with a map of numbers on it: (H, W, 3) uint8, for `photo_grid`.

    Orange is above zero, blue below it, and the stronger the larger, up to `most`, which is drawn in
    full colour: one `most` for all pictures that are to be compared, since a scale of its own makes
    any map look important. `image` is (H, W, 3) uint8, `values` (h, w) of any size.

    Raises:
        ValueError: `most` is not above zero.
    """
    if not most > 0:
        raise ValueError(f"most must be above zero, not {most}: the map has nothing to show.")
    scaled = Image.fromarray(np.asarray(values, np.float32))
    scaled = scaled.resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    scaled = np.asarray(scaled)[:, :, None]  # (H, W, 1)
    above, below = (np.array(to_rgb(mark.colour)) * 255 for mark in (WRONG, RIGHT))
    strength = np.clip(np.abs(scaled) / most, 0, 1) * 0.8
    grey = image.mean(axis=2, keepdims=True)
    drawn = grey * (1 - strength) + np.where(scaled > 0, above, below) * strength
    return drawn.round().astype(np.uint8)


def colour_key(figure: Figure, below: str, above: str) -> None:
    """Write under a `photo_grid` what the blue and the orange of `overlay` mean."""
    width, height = figure.get_size_inches()
    (axes,) = figure.axes
    _resize(axes, width, height + 0.35)
    ramp = overlay(np.full((1, 101, 3), 128, np.uint8), np.linspace(-1, 1, 101)[None], 1)
    x, y = width / 2, height + 0.15
    axes.imshow(ramp, extent=(x - 1, x + 1, y + 0.08, y - 0.08), aspect="auto")
    axes.text(x - 1.1, y, below, ha="right", va="center", size=8)
    axes.text(x + 1.1, y, above, ha="left", va="center", size=8)
