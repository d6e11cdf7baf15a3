"""Figures made of photographs: grids, ranked lists, a map of embeddings, what a network looks at.

The axes of these figures are in inches, from the upper left corner. Right and wrong are told by the
frame, its line, its colour and a sign. Each function returns a matplotlib `Figure`, for `figures.show`
and `figures.save`.

>>> image = np.zeros((128, 64, 3), np.uint8)
>>> figure = photo_grid([image, image], ["one", "two"], marks=[RIGHT, WRONG])
>>> [text.get_text() for text in figure.axes[0].texts]
['✓ one', '✗ two']
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
from reidlib.look.figures import EXCLUDED, MARKERS, PALETTE, PLAIN, QUERY, RIGHT, WRONG, Mark

# Of `Retrieval.ranked_lists`; all others: EXCLUDED.
UNKNOWN = Mark("#444444", "", "-")
STATUS = {"match": RIGHT, "wrong": WRONG, "unknown": UNKNOWN}
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
    for name, given, wanted in (
        ("titles", titles, n),
        ("marks", marks, n),
        ("row_titles", row_titles, rows),
    ):
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
        if image is None:
            continue
        colour = mark.colour if mark.sign else "black"
        axes.text(x + width / 2, y - 0.04, lines[i], ha="center", size=7.5, color=colour)
        _photo(axes, image, x, y, width, height, mark)
    return figure


class RankedRow(NamedTuple):
    """One query and what the gallery answered, for `ranked_lists`."""

    title: str
    """Over the row: who asks."""
    query: np.ndarray | str
    """The query image (H, W, 3) uint8, or its path."""
    results: pd.DataFrame
    """What `Retrieval.ranked_list` returned, with `path`; made with `show_missed=True`, for the AP
    that is written under the title is computed from it."""


def ranked_lists(rows: Sequence[RankedRow], height: float = 1.5) -> Figure:
    """Draw ranked lists, one a row: the query, then the gallery from the nearest on.

    ✓ and a full frame: the same identity; ✗ and a dashed frame: another one, under it whose. Images
    that the protocol leaves out stand in their place, pale and smaller, with the reason; where
    several follow each other the nearest is drawn and all are counted. Under each title stand the
    list's AP and the ranks of all matches, those beyond the list too. A list wider than `WIDEST` is
    broken into lines.

    Raises:
        ValueError: no rows, a list without results, or one made without `show_missed=True`.
    """
    if len(rows) == 0 or any(len(row.results) == 0 for row in rows):
        raise ValueError("There is nothing to draw: no rows, or a ranked list without results.")
    full, small, gap, head, foot = height / 2 + 0.1, 0.62, 0.08, 0.68, 0.36
    left = full + 4 * gap  # where results start
    rank = 0.2  # height of what stands over those of a further line

    def width(tile) -> float:
        return (small if tile[0] else full) + gap

    def in_lines(tiles) -> list[list]:
        lines, x = [], WIDEST
        for tile in tiles:
            if x + width(tile) > WIDEST:
                lines.append([])
                x = left
            lines[-1].append(tile)
            x += width(tile)
        return lines

    laid_out = [in_lines(_tiles(row.results[~_missed(row.results)])) for row in rows]
    widest = max(sum(map(width, line)) for lines in laid_out for line in lines)
    bands = [head - rank + len(lines) * (rank + height + foot) for lines in laid_out]
    top = 0.3  # of the legend
    figure, axes = _sheet(max(8.5, left + gap + widest), top + sum(bands))
    words = [
        f"{RIGHT.sign} full frame: same person",
        f"{WRONG.sign} dashed frame: somebody else",
        f"{EXCLUDED.sign} pale: left out of the ranking",
        "c: camera, id: identity, last line: distance",
    ]
    if all((row.results["status"] == "unknown").any() for row in rows):  # nothing is judged
        nameless = all((row.results[["pid", "camid"]] < 0).all(axis=None) for row in rows)
        words = [words[2], "under each: its file, its distance" if nameless else words[3]]
    axes.text(gap, 0.17, (5 * " ").join(words), size=8.5, va="center", color="#444444")
    for row, lines, band in zip(rows, laid_out, bands, strict=True):
        y = top + head
        axes.text(gap, top + 0.17, row.title, size=10, va="center", weight="bold")
        axes.text(gap, top + 0.36, _account(row.results), size=8.5, va="center")
        query = row.query if isinstance(row.query, np.ndarray) else read_image(row.query)
        _photo(axes, query, gap, y, full, height, QUERY)
        axes.text(gap + full / 2, y - 0.05, "query", size=8.5, ha="center")
        bar = [left - 1.5 * gap] * 2, [y, top + band - foot]
        axes.plot(*bar, "-", color="#BBBBBB", lw=1)
        for line in lines:
            x = left
            for tile in line:
                excluded, path, mark, over, under = tile
                w, h = (small, height * small / full) if excluded else (full, height)
                _photo(axes, read_image(path), x, y + height - h, w, h, mark)
                text = {"size": 7 if excluded else 8.5, "ha": "center", "color": mark.colour}
                weight = "normal" if excluded else "bold"
                over_y = y + height - h - 0.05
                axes.text(x + w / 2, over_y, over, va="bottom", weight=weight, **text)
                axes.text(x + w / 2, y + height + 0.04, under, va="top", **text | {"size": 7.5})
                x += width(tile)
            y += rank + height + foot
        top += band
    return figure


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


def _tiles(results: pd.DataFrame) -> list[tuple[bool, str, Mark, str, str]]:
    """Return what a ranked list shows: (excluded?, path, mark, text over it, text under it).

    A run of excluded images becomes one tile.
    """
    tiles, run = [], []

    def camera(result) -> str:
        return f"c{result.camid} " if result.camid >= 0 else ""

    def end_run() -> None:
        if run:
            reasons = pd.Series([r.status for r in run]).value_counts(sort=False)
            lines = [
                f"{reason.replace(' ', chr(10))}{f' ×{n}' if n > 1 else ''}"
                for reason, n in reasons.items()
            ]
            over = "\n".join([EXCLUDED.sign, *lines])
            tiles.append((True, run[0].path, EXCLUDED, over, camera(run[0])))
            run.clear()

    for result in results.itertuples():
        if result.status not in STATUS:
            run.append(result)
            continue
        end_run()
        mark = STATUS[result.status]
        who = f"id {result.pid}" if result.pid > 0 else ("" if result.pid else "distractor")
        of = f"{camera(result)}{who}".strip()
        if not of and result.status == "unknown":  # all that there is to know it by
            of = one_line(Path(result.path).name, 13)
        under = f"{of}\n{result.distance:#.3g}"
        tiles.append(
            (False, result.path, mark, f"{mark.sign} {result.rank}".strip(), under.strip())
        )
    end_run()
    return tiles


def embedding_map(
    points: np.ndarray,
    pids: Sequence[int],
    images: Sequence[np.ndarray] | None = None,
    highlight: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """Draw a map of embeddings: grey dots, and some identities by colour, marker and photograph.

    Args:
        points: (N, 2), t-SNE's or PCA's.
        pids: (N,) identities.
        images: N arrays (H, W, 3) uint8, for one photograph an identity in the legend; or None.
        highlight: up to ten identities; by default the ten with most points (ties: smallest pid).
        title: over the figure.

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
    axes = figure.add_axes((0.02, 0.02, 0.78, 0.93))
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
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_color("#CCCCCC")
    return figure


# --- search


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


# --- why


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
