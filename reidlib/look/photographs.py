"""Figures made of photographs: grids, ranked lists, a map of embeddings, what a network looks at.

The axes of these figures are in inches, from the upper left corner. Right and wrong are told by the
frame, its line, its colour and a sign. Each function returns a matplotlib `Figure`, for `figures.show`
and `figures.save`.

>>> image = np.zeros((128, 64, 3), np.uint8)
>>> figure = photo_grid([image, image], ["one", "two"], marks=[RIGHT, WRONG])
>>> [text.get_text() for text in figure.axes[0].texts]
['✓ one', '✗ two']
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
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

# How the statuses of `Retrieval.ranked_lists` are drawn; all others are EXCLUDED.
STATUS = {"match": RIGHT, "wrong": WRONG, "unknown": Mark("#444444", "", "-")}
WIDEST = 16  # inches of a ranked list; across a page of paper, turned, its small print has 5 points


def _sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one axes over all of it, its coordinates inches from the upper left."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


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
    alpha = 0.35 if mark == EXCLUDED else 1
    axes.imshow(
        image, extent=(x, x + w, y + h, y), aspect="auto", alpha=alpha, interpolation="antialiased"
    )
    if mark != PLAIN:
        frame = Rectangle((x, y), w, h, fill=False, ec=mark.colour, ls=mark.line, lw=2.5)
        axes.add_patch(frame)


def photo_grid(
    images: Sequence[np.ndarray | None],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    marks: Sequence[Mark] | None = None,
    row_titles: Sequence[str] | None = None,
    height: float = 1.4,
    together: int = 1,
) -> Figure:
    """Draw photographs in rows, read like text.

    Args:
        images: N arrays (H, W, 3) uint8, of any sizes; a photograph keeps its proportions. None
            leaves its place empty.
        titles: N short lines, one over each photograph; "" for none.
        columns: photographs in a row.
        marks: N of `RIGHT`, `WRONG`, `EXCLUDED`, `QUERY`, `PLAIN`: the frame, and the sign that
            goes before the title.
        row_titles: one line left of each row.
        height: of a photograph, inches.
        together: how many in a row belong together, such as pairs: a wider gap parts them from others.

    Raises:
        ValueError: no images, or lists that do not fit them.
    """
    n, rows = len(images), math.ceil(len(images) / columns)
    shapes = [image.shape for image in images if image is not None]
    if not shapes:
        raise ValueError("There are no photographs to draw.")
    lists = {"titles": (titles, n), "marks": (marks, n), "row_titles": (row_titles, rows)}
    for name, (given, wanted) in lists.items():
        if given is not None and len(given) != wanted:
            raise ValueError(f"photo_grid needs {wanted} {name}, not {len(given)}.")
    marks = marks or [PLAIN] * n
    width = max(height * min(shape[1] / shape[0], 2) for shape in shapes)
    lines = [f"{m.sign} {titles[i] if titles else ''}".strip() for i, m in enumerate(marks)]
    heads = [0.18 if any(lines[i * columns : (i + 1) * columns]) else 0.0 for i in range(rows)]
    gap, wider = 0.11, 0.25 if together > 1 else 0.0
    left = 0.1 + 0.075 * max(map(len, row_titles)) if row_titles else 0.0
    places = [left + gap + i * (width + gap) + i // together * wider for i in range(columns)]
    figure, axes = _sheet(
        places[min(n, columns) - 1] + width + gap, gap + rows * (height + gap) + sum(heads)
    )
    for i, (image, mark) in enumerate(zip(images, marks, strict=True)):
        row, column = divmod(i, columns)
        x = places[column]
        y = gap + row * (height + gap) + sum(heads[: row + 1])  # of the photograph itself
        if row_titles and column == 0:
            axes.text(0.08, y + height / 2, row_titles[row], va="center", size=9)
        if image is not None:
            colour = mark.colour if mark.sign else "black"
            axes.text(x + width / 2, y - 0.04, lines[i], ha="center", size=7.5, color=colour)
            _photo(axes, image, x, y, width, height, mark)
    return figure


# --- ranked lists


class RankedRow(NamedTuple):
    """One query and what the gallery answered, for `ranked_lists`."""

    title: str
    """Over the row: who is searched for."""
    query: np.ndarray | str
    """The query image (H, W, 3) uint8, or its path."""
    results: pd.DataFrame
    """What `Retrieval.ranked_list` returned, with `path`; made with `show_missed=True`, for the AP
    that is written under the title is computed from it."""


def ranked_row(
    retrieval: Retrieval, query: int, before: str = "", topk: int = 10, show_excluded: bool = True
) -> RankedRow:
    """Return one query with its ranked list, its identity and camera in the title.

    Args:
        retrieval: with `path` in its tables.
        query: row number in its query table.
        before: words that stand in the title before a colon.
        topk: ranked images in the list.
        show_excluded: show what the protocol leaves out too.

    Raises:
        ValueError: no such query.
    """
    results = retrieval.ranked_list(query, topk=topk, show_missed=True, show_excluded=show_excluded)
    who = retrieval.query.iloc[query]
    title = f"{before}: " if before else ""
    title += f"identity {who['pid']}" if who["pid"] > 0 else "somebody unknown"
    title += f", camera {who['camid']}" if who.get("camid", -1) >= 0 else ""
    return RankedRow(title, who["path"], results)


def ranked_examples(retrieval: Retrieval, lists: int = 3, topk: int = 10) -> list[RankedRow]:
    """Return the best, the median and the worst queries by AP, `lists` of each, for `ranked_lists`.

    Queries without a match have no AP and are left out.

    Raises:
        ValueError: the retrieval cannot be scored.
    """
    by_ap = retrieval.evaluate().per_query.dropna(subset="AP").sort_values("AP", kind="stable")
    queries = by_ap["query"].to_numpy()
    middle = max(0, (len(queries) - lists) // 2)
    groups = {"best": queries[::-1], "median": queries[middle:], "worst": queries}
    return [
        ranked_row(retrieval, query, name, topk)
        for name, group in groups.items()
        for query in group[:lists]
    ]


# Inches: between images; titles of a row; what stands over and under the images of a line.
GAP, HEAD, RANK, FOOT = 0.08, 0.48, 0.2, 0.36


def ranked_lists(rows: Sequence[RankedRow], height: float = 1.5) -> Figure:
    """Draw ranked lists, one a row: the query, then the gallery from the nearest on.

    ✓ and a full frame: the same identity; ✗ and a dashed frame: another one, under it whose. Images
    that the protocol leaves out stand in their place, pale and smaller, with the reason; where
    several follow each other the nearest is drawn and all are counted. Under each title stand the
    list's AP and the ranks of all matches, those beyond the list too. A list wider than `WIDEST` is
    broken into lines.

    Args:
        rows: the lists, as of `ranked_row`.
        height: of an image, inches.

    Raises:
        ValueError: no rows, a list without results, or one made without `show_missed=True`.
    """
    if len(rows) == 0 or any(len(row.results) == 0 for row in rows):
        raise ValueError("There is nothing to draw: no rows, or a ranked list without results.")
    query_width = height / 2 + 0.1
    left = query_width + 4 * GAP  # where results start
    laid_out = [_in_lines(_tiles(row.results, height), WIDEST - left) for row in rows]
    widest = max(sum(t.width + GAP for t in line) for lines in laid_out for line in lines)
    line_height = RANK + height + FOOT
    bands = [HEAD + len(lines) * line_height for lines in laid_out]
    top = 0.3  # of the legend
    figure, axes = _sheet(max(8.5, left + GAP + widest), top + sum(bands))
    axes.text(GAP, 0.17, _legend(rows), size=8.5, va="center", color="#444444")
    for row, lines, band in zip(rows, laid_out, bands, strict=True):
        axes.text(GAP, top + 0.17, row.title, size=10, va="center", weight="bold")
        axes.text(GAP, top + 0.36, _account(row.results), size=8.5, va="center")
        y = top + HEAD + RANK
        query = row.query if isinstance(row.query, np.ndarray) else read_image(row.query)
        _photo(axes, query, GAP, y, query_width, height, QUERY)
        axes.text(GAP + query_width / 2, y - 0.05, "query", size=8.5, ha="center")
        bar = [left - 1.5 * GAP] * 2, [y, top + band - FOOT]
        axes.plot(*bar, "-", color="#BBBBBB", lw=1)
        for line in lines:
            x = left
            for tile in line:
                tile.draw(axes, x, y + height)
                x += tile.width + GAP
            y += line_height
        top += band
    return figure


def _legend(rows: Sequence[RankedRow]) -> str:
    """Return what the marks of ranked lists mean, as far as they can occur."""
    words = [
        f"{RIGHT.sign} full frame: same person",
        f"{WRONG.sign} dashed frame: somebody else",
        f"{EXCLUDED.sign} pale: left out of the ranking",
        "c: camera, id: identity, last line: distance",
    ]
    if all((row.results["status"] == "unknown").any() for row in rows):  # nothing is judged
        nameless = all((row.results[["pid", "camid"]] < 0).all(axis=None) for row in rows)
        words = [words[2], "under each: its file, its distance" if nameless else words[3]]
    return (5 * " ").join(words)


def _missed(results: pd.DataFrame) -> pd.Series:
    """Return which rows are matches from beyond the list: those whose rank does not follow on."""
    return results["rank"].notna() & (results["rank"] != results["rank"].notna().cumsum())


def _account(results: pd.DataFrame, most: int = 8) -> str:
    """Return a list's AP and what it is made of, the ranks of its matches; "" without labels."""
    if (results["status"] == "unknown").any():
        return ""
    if not results.attrs.get("all_matches", True):
        raise ValueError(
            "A ranked list that lacks its later matches has no AP to state: make it with "
            "show_missed=True."
        )
    is_match = results["status"] == "match"
    ranks = results.loc[is_match, "rank"].to_numpy(np.int64)
    if len(ranks) == 0:
        return "no match in the gallery: not scored"

    def listed(ranks) -> str:
        words = [f"{rank:,}" for rank in ranks[:most]]
        more = [f"… {ranks[-1]:,}"] if len(ranks) > most else []
        return ", ".join(words + more) or "none"

    missed = _missed(results)[is_match].to_numpy()
    of = "1 match" if len(ranks) == 1 else f"{len(ranks)} matches"
    text = f"AP {average_precision(ranks)[0]:.2%} of {of}, ranks: {listed(ranks[~missed])}"
    if missed.any():
        text += f"     missed here: {missed.sum()}, at {listed(ranks[missed])}"
    return text


class _Tile(NamedTuple):
    """One image of a ranked list, with the words over and under it."""

    path: str
    mark: Mark
    over: str
    under: str
    width: float  # inches
    height: float

    def draw(self, axes: Axes, x: float, y: float) -> None:
        """Draw it, with its lower left corner at a place."""
        top, middle = y - self.height, x + self.width / 2
        _photo(axes, read_image(self.path), x, top, self.width, self.height, self.mark)
        size, weight = (7, "normal") if self.mark == EXCLUDED else (8.5, "bold")
        text = {"ha": "center", "color": self.mark.colour}
        axes.text(middle, top - 0.05, self.over, va="bottom", size=size, weight=weight, **text)
        axes.text(middle, y + 0.04, self.under, va="top", size=7.5, **text)


def _tiles(results: pd.DataFrame, height: float) -> list[_Tile]:
    """Return what a ranked list shows; a run of excluded images becomes one tile, a smaller one."""
    width, small = height / 2 + 0.1, 0.62
    tiles = []
    shown = results[~_missed(results)].itertuples()
    for excluded, run in itertools.groupby(shown, lambda result: result.status not in STATUS):
        if not excluded:
            tiles += [_Tile(r.path, *_words(r), width, height) for r in run]
            continue
        run = list(run)
        over = [EXCLUDED.sign]
        for reason, n in Counter(result.status for result in run).items():
            over.append(reason.replace(" ", "\n") + (f" ×{n}" if n > 1 else ""))
        words = "\n".join(over), _camera(run[0])
        tiles.append(_Tile(run[0].path, EXCLUDED, *words, small, height * small / width))
    return tiles


def _words(result: Any) -> tuple[Mark, str, str]:
    """Return how a ranked image is marked, and what stands over and under it."""
    mark = STATUS[result.status]
    who = f"id {result.pid}" if result.pid > 0 else ("" if result.pid else "distractor")
    of = f"{_camera(result)}{who}".strip()
    if not of and result.status == "unknown":  # all that there is to know it by
        of = one_line(Path(result.path).name, 13)
    return mark, f"{mark.sign} {result.rank}".strip(), f"{of}\n{result.distance:#.3g}".strip()


def _camera(result: Any) -> str:
    return f"c{result.camid} " if result.camid >= 0 else ""


def _in_lines(tiles: list[_Tile], room: float) -> list[list[_Tile]]:
    """Break a ranked list into lines of up to so many inches."""
    lines, used = [[]], 0.0
    for tile in tiles:
        if lines[-1] and used + tile.width + GAP > room:
            lines.append([])
            used = 0.0
        lines[-1].append(tile)
        used += tile.width + GAP
    return lines


# --- a map of embeddings


def embedding_map(
    points: np.ndarray,
    pids: Sequence[int],
    images: Sequence[np.ndarray] | None = None,
    highlight: Sequence[int] | None = None,
) -> Figure:
    """Draw a map of embeddings: grey dots, and some identities by colour, marker and photograph.

    Args:
        points: (N, 2), t-SNE's or PCA's.
        pids: (N,) identities.
        images: N arrays (H, W, 3) uint8, for one photograph an identity in the legend; or None.
        highlight: up to ten identities; by default the ten with most points (ties: smallest pid).

    Raises:
        ValueError: shapes that do not fit, more than ten identities, or one without a point.
    """
    points, pids = np.asarray(points), np.asarray(pids)
    if points.shape != (len(pids), 2) or (images is not None and len(images) != len(pids)):
        raise ValueError(f"{points.shape} points do not fit {len(pids)} pids, or the images.")
    if highlight is None:
        counts = pd.Series(pids[pids > 0]).value_counts().sort_index()
        highlight = counts.sort_values(ascending=False, kind="stable").index[:10]
    if len(highlight) > len(MARKERS) or not np.isin(highlight, pids).all():
        raise ValueError(f"highlight must be up to {len(MARKERS)} identities of the map.")
    figure, legend = _sheet(9.2, 6.6)
    axes = figure.add_axes((0.02, 0.02, 0.78, 0.96))
    axes.plot(*points.T, ls="", marker="o", color="#B8B8B8", ms=2.5, alpha=0.6)
    style = {"mec": "white", "mew": 0.5, "ms": 8, "ls": ""}
    for i, pid in enumerate(highlight):
        style |= {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i]}
        axes.plot(*points[pids == pid].T, **style)
        x, y = 7.55 + 0.85 * (i // 5), 0.35 + 1.25 * (i % 5)  # the legend: five rows, two columns
        legend.plot(x + 0.05, y, **style)
        legend.text(x + 0.17, y, f"id {pid}", va="center", size=8)
        if images is not None:  # the image nearest to the middle of its identity
            away = np.abs(points - np.median(points[pids == pid], axis=0)).sum(axis=1)
            nearest = np.where(pids == pid, away, np.inf).argmin()
            _photo(legend, images[nearest], x, y + 0.1, 0.6, 1)
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

    Orange is above zero, blue below it, and the stronger the larger, up to `most`: one `most` for
    all pictures that are to be compared, since a scale of its own makes any map look important.

    Args:
        image: (H, W, 3) uint8.
        values: (h, w), of any size; it is drawn up to that of the image.
        most: what is drawn in full colour.

    Raises:
        ValueError: `most` is not above zero.
    """
    if not most > 0:
        raise ValueError(f"most must be above zero, not {most}: the map has nothing to show.")
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)  # (H, W, 3)
    scaled = Image.fromarray(np.asarray(values, np.float32))
    scaled = np.asarray(scaled.resize(image.shape[1::-1], Image.Resampling.BILINEAR))  # (H, W)
    strength = np.clip(np.abs(scaled) / most, 0, 1)[:, :, None] * 0.8
    above, below = (np.array(to_rgb(m.colour)) * 255 for m in (WRONG, RIGHT))
    colour = np.where(scaled[:, :, None] > 0, above, below)
    return (grey * (1 - strength) + colour * strength).round().astype(np.uint8)
