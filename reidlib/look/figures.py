"""Curves, bands, histograms and heat maps in one style, and how figures reach a notebook or a file.

A function returns a matplotlib `Figure`: `show(figure, alt)` puts it into the notebook, `save` into a
file. None goes through pyplot, so none is left open behind, and none shows up twice.

>>> figure = curves({"a": ([1, 2], [3, 4])}, x_label="rank", y_label="share")
>>> [line.get_label() for line in figure.axes[0].lines]
['a']
"""

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from reidlib.evaluation.metrics import SCORES
from reidlib.recipes import Recipe
from reidlib.runs import write_atomically
from reidlib.words import typeset

# Okabe and Ito's colours, which the colour-blind can tell apart, the darker ones first; the palest two
# are darkened until they stand out from white, 3 to 1.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#BF8300", "#3D97CE", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vP*X<>"  # ten; those that share a colour differ in shape
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend that covers nothing


class Mark(NamedTuple):
    """How one kind of thing is drawn: never by its colour alone."""

    colour: str
    sign: str
    line: str


RIGHT = Mark(PALETTE[0], "✓", "-")
WRONG = Mark(PALETTE[1], "✗", "--")
EXCLUDED = Mark("#6E6E6E", "–", ":")
QUERY = Mark("#000000", "?", "-")
PLAIN = Mark("#FFFFFF", "", "-")

# No ink has enough contrast on white and on black. So figures are drawn on white, and where a page is
# dark, in JupyterLab or the book, its browser turns the lightness of drawn ones around and keeps the
# hues. Photographs stay as they are.
DARK = f"<style>{Path(__file__).with_suffix('.css').read_text()}</style>"


def use_style() -> None:
    """Set the one style of all figures, for this process."""
    matplotlib.style.use(Path(__file__).with_suffix(".mplstyle"))
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=PALETTE, linestyle=LINES)


class Table(Styler):
    """A table in a notebook, as `frame.style` is, but no text in it is markup: names may be anybody's.

    >>> frame = pd.DataFrame({"<b>": ["<b>"]}, index=["<b>"])
    >>> "<b>" in Table(frame).format(precision=1).set_caption("<b>").to_html()
    False
    """

    def __init__(self, data: pd.DataFrame):
        super().__init__(data)
        for axis in ("index", "columns"):
            self.format_index(escape="html", axis=axis)

    def format(self, *args, **options) -> Styler:
        """Choose how cells are written, as a `Styler` does."""
        return super().format(*args, **options | {"escape": "html"})

    def to_html(self, *args, **options) -> str:
        """Return the table, its numbers as people write them."""
        cells = r"(?<=>)[^<>]+(?=</t[dh]>)"
        return re.sub(cells, lambda cell: typeset(cell[0]), super().to_html(*args, **options))

    def set_caption(self, caption: str) -> Styler:
        """Set the line over the table."""
        return super().set_caption(html.escape(caption))


# --- out of here: into a notebook, into a file


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Let a notebook go on where a figure cannot be drawn, and say which, and why.

    >>> with optional("The map"):
    ...     raise ValueError("There is one image alone.")
    The map cannot be shown here: There is one image alone.
    """
    try:
        yield
    except Exception as error:  # of small data a figure may fail in any way, and scores must stay
        why = str(error).strip() or type(error).__name__
        why = "it builds on one that could not." if isinstance(error, NameError) else why
        print(f"{what} cannot be shown here: {why}")


def encode(figure: Figure, photo: bool = False, density: float = 1.5) -> bytes:
    """Return a figure as JPEG (photo) or PNG; `density` is its pixels for one of the screen's.

    Raises ValueError: it is higher or wider than a JPEG can be.
    """
    if (side := max(figure.get_size_inches()) * 100 * density) > 65_500:
        raise ValueError(f"The figure would have {side:,.0f} pixels on a side: show fewer images.")
    buffer = io.BytesIO()
    options = {"pil_kwargs": {"quality": 85, "optimize": True}} if photo else {}
    figure.savefig(buffer, format="jpeg" if photo else "png", dpi=100 * density, **options)
    return buffer.getvalue()


def img(figure: Figure, alt: str, photo: bool = False) -> str:
    """Return a figure as an `<img>` with its data inside, JPEG (photo) or PNG, right on dark pages too.

    The class `dark-light` keeps the book's theme from changing it once more.
    """
    data = base64.b64encode(encode(figure, photo)).decode()
    kind, width = "jpeg" if photo else "png", round(100 * figure.get_figwidth())
    return (
        f'{DARK}<img class="dark-light{"" if photo else " drawn"}" '
        f'src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" width="{width}" '
        f'style="max-width: 100%; height: auto; border-radius: 4px">'
    )


def show(figure: Figure, alt: str, photo: bool = False) -> None:
    """Show a figure in the notebook, with one sentence (`alt`) for those who cannot see it.

    It goes in as an `<img>`: JupyterLab shows alt text only there, not on images of their own type.
    `photo` makes it a JPEG, for photographs some ten times smaller than a PNG.

    Raises:
        ValueError: no alt text.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("A figure needs alt text: one sentence on what it shows.")
    image = img(figure, alt, photo)
    display({"text/html": image, "text/plain": f"[Figure: {alt}]"}, raw=True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file: `.jpg` for photographs, `.png` for curves."""
    content = encode(figure, Path(path).suffix.lower() in (".jpg", ".jpeg"))
    write_atomically(Path(path), lambda fresh: fresh.write_bytes(content), len(content))


# --- curves


def subplots(
    rows: int = 1, columns: int = 1, width: float = 9, height: float = 3
) -> tuple[Figure, Any]:
    """Return a figure of that many inches and its axes, as pyplot's function of this name does."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def curves(
    series: Mapping[str, tuple[Sequence, Sequence]],
    x_label: str,
    y_label: str,
    width: float = 9,
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw one line for each name, (x, y), each with a colour and a line style of its own."""
    figure, axes = subplots(width=width, height=3.6)
    for i, (name, (x, y)) in enumerate(series.items()):
        few = {"marker": MARKERS[i % 10], "ms": 4} if len(x) <= 30 else {}
        style = {"color": PALETTE[i % 7], "ls": LINES[(i + i // 7) % 7]}  # a pair repeats after 49
        axes.plot(x, y, label=name, **style, **few)
    axes.set(xlabel=x_label, ylabel=y_label, ylim=y_limits)
    if len(series) > 1:
        axes.legend()
    return figure


def cmc_curve(first_ranks: Mapping[str, Sequence[float]], up_to: int = 20) -> Figure:
    """Draw CMC curves: the share of queries whose first match is at rank k or before, by name.

    `first_ranks` is an evaluation's `per_query["first_rank"]`; NaN, no match, does not count.
    """
    k = np.arange(1, up_to + 1)
    series = {}
    for name, ranks in first_ranks.items():
        found = pd.Series(ranks, dtype=float).dropna().to_numpy()
        series[name] = (k, 100 * (found[:, None] <= k).mean(axis=0))  # (Q, K) -> (K,)
    figure = curves(series, "rank k", "queries with a match by rank k, %")
    figure.axes[0].set(xlim=(0.5, up_to + 0.5), ylim=(0, 101))
    figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def camera_bars(per_query: pd.DataFrame) -> Figure:
    """Draw the mAP of each camera's queries, from an evaluation's `per_query`."""
    mean = 100 * per_query.dropna(subset="AP").groupby("camid")["AP"].mean()
    figure, axes = subplots(height=2.8)
    axes.bar(["unknown" if camera < 0 else str(camera) for camera in mean.index], mean)
    axes.set(xlabel="camera of the query", ylabel="mAP, %", title="mAP by the query's camera")
    return figure


def hardest_camera(per_query: pd.DataFrame) -> str:
    """Say from which camera queries are hardest, and from which easiest: what `camera_bars` shows."""
    by_camera = per_query.dropna(subset="AP").groupby("camid")["AP"].agg(["mean", "size"])
    if len(by_camera) < 2:
        return "One camera is known, or none, so cameras cannot be compared here."
    hard, *_, easy = by_camera.sort_values("mean").itertuples()
    if hard.mean == easy.mean:
        return f"Queries of every camera have the same mAP, {hard.mean:.1%}."
    return (
        f"Queries of camera {hard.Index} are hardest ({hard.mean:.1%} mAP over {hard.size} queries), "
        f"those of camera {easy.Index} easiest ({easy.mean:.1%} mAP over {easy.size} queries)."
    )


def training_curves(history: pd.DataFrame, recipe: Recipe) -> Figure:
    """Draw what tells whether a training is healthy, from the columns of `history.csv`.

    The loss has a line where a collapsed network sits, distances within and between identities a
    band from the 5th to the 95th percentile. Where no identities were held out, the last panel is
    the speed.

    Raises:
        ValueError: an empty history.
    """
    if len(history) == 0:
        raise ValueError("The history is empty: the run has not logged a step yet.")
    figure, _ = subplots(2, 3, width=10, height=5.2)
    loss, active, distances, norm, rate, last = figure.axes
    shown = {"loss": "loss", "active": "share of active triplets"}
    shown |= {"distances": "distances: median, 5–95 %", "norm": "embedding norm"}
    shown |= {"lr": "learning rate", "images_per_s": "images per second"}
    if _has_held_out(history):
        del shown["images_per_s"]
        shown["held_out_mAP"] = "held-out identities, %"
    for panel, (column, title) in zip(figure.axes, shown.items(), strict=True):
        _over_steps(panel, history, column)
        panel.set(title=title, xlim=(0, None), ylim=(0, None))
    if _has_held_out(history):
        _over_steps(last, history, "held_out_top1")
        last.set(ylim=(0, 100))
        last.legend()
    active.set(ylim=(-0.03, 1.03))
    if history["lr"].max() > 5 * history["lr"].min():
        rate.set(ylim=(0.5 * history["lr"].min(), 2 * history["lr"].max()), yscale="log")
    name = "ln 2" if recipe.margin == "soft" else f"margin {recipe.margin:g}"
    collapsed = {"label": f"collapsed: {name}", "color": PALETTE[1], "ls": "--", "lw": 1.2}
    loss.axhline(recipe.collapsed_loss, **collapsed)
    loss.legend()
    distances.legend()
    for panel in (norm, rate, last):
        panel.set_xlabel("step")
    return figure


def side_by_side(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the histories of several runs, a column each, with the same scales along each row.

    Raises:
        ValueError: no history, or an empty one.
    """
    if not histories or any(len(history) == 0 for history in histories.values()):
        raise ValueError("There is nothing to draw: no history, or one without a step.")
    shown = {"loss": "loss", "active": "active share", "distances": "distances", "norm": "norm"}
    if any(map(_has_held_out, histories.values())):
        shown["held_out_mAP"] = "held-out mAP, %"
    figure = Figure(figsize=(1 + 2.1 * len(histories), 1.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(histories), sharex="col", sharey="row", squeeze=False)
    for panels, (name, history) in zip(axes.T, histories.items(), strict=True):
        panels[0].set_title(name)
        for panel, column in zip(panels, shown, strict=True):
            if column != "held_out_mAP" or _has_held_out(history):
                _over_steps(panel, history, column)
        panel.set(xlabel="step", xlim=(0, None))
    for panel, label in zip(axes[:, 0], shown.values(), strict=True):
        panel.set(ylabel=label, ylim=(0, None))
    axes[2, 0].legend(fontsize=8)
    return figure


def _has_held_out(history: pd.DataFrame) -> bool:
    return "held_out_mAP" in history and history["held_out_mAP"].notna().any()


def _over_steps(panel: Axes, history: pd.DataFrame, column: str) -> None:
    """Draw a column of a history, or "distances": the medians of both kinds, each in its band."""
    dots = {"marker": "o", "ms": 3} if len(history) <= 30 else {}
    if column == "distances":
        for name, mark in (("positive", RIGHT), ("negative", WRONG)):
            p5, p50, p95 = (history[f"{name}_p{p}"] for p in (5, 50, 95))
            panel.fill_between(history["step"], p5, p95, color=mark.colour, alpha=0.18, lw=0)
            line = {"color": mark.colour, "ls": mark.line, "label": f"{name}s"}
            panel.plot(history["step"], p50, **line, **dots)
    elif column.startswith("held_out_"):  # a fraction, at some steps only
        scored = history.dropna(subset=column)
        label = SCORES[column.removeprefix("held_out_")]
        line = {"marker": MARKERS[len(panel.lines)], "label": label}
        panel.plot(scored["step"], 100 * scored[column], **line, clip_on=False)
    else:
        panel.plot(history["step"], history[column], **dots)


def intervals(panels: Mapping[str, pd.DataFrame], zero: bool = True) -> Figure:
    """Draw numbers with their intervals: the tables `value`, `low`, `high` by what is under them.

    All tables have the same rows; the first is at the top. `zero` draws a line there, for differences.
    """
    names = next(iter(panels.values())).index
    place = np.arange(len(names))[::-1]
    figure, _ = subplots(1, len(panels), width=9, height=0.35 * len(names) + 1)
    for i, (panel, (words, table)) in enumerate(zip(figure.axes, panels.items(), strict=True)):
        ends = [table["value"] - table["low"], table["high"] - table["value"]]
        panel.errorbar(table["value"], place, xerr=ends, fmt="o", capsize=4, color=PALETTE[i % 7])
        if zero:
            panel.axvline(0, color="black", lw=1)
        panel.set(xlabel=words, yticks=place, yticklabels=[] if i else names)
        panel.margins(y=0.1)
    return figure


def distance_histograms(
    matches: Sequence[float],
    non_matches: Sequence[float],
    names: tuple[str, str] = ("same person", "somebody else"),
) -> Figure:
    """Draw how distances of matches and of non-matches spread; where they overlap, ranks go wrong.

    Both are densities over common bins: their areas are 1, however many pairs there are.
    """
    values = [np.asarray(v, dtype=float) for v in (matches, non_matches)]
    for name, of_one in zip(names, values, strict=True):
        if not len(of_one):
            raise ValueError(f"there is no distance of {name}.")
    edges = np.histogram_bin_edges(np.concatenate(values), bins=30)
    densities = [np.histogram(v, edges, density=True)[0] for v in values]
    figure, axes = subplots()
    for density, name, mark in zip(densities, names, (RIGHT, WRONG), strict=True):
        axes.stairs(density, edges, color=mark.colour, alpha=0.2, fill=True)
        axes.stairs(density, edges, color=mark.colour, ls=mark.line, lw=1.8, label=name)
    both = np.minimum(*densities)
    hatched = {"fill": True, "fc": "none", "ec": "#555555", "lw": 0, "hatch": "///"}
    hatched["label"] = f"overlap: {both @ np.diff(edges):.0%} of the area"
    axes.stairs(both, edges, **hatched)
    axes.set(xlabel="distance", ylabel="density", yticks=[])
    axes.legend(**BESIDE)
    return figure


def distances_in_words(matches: np.ndarray, others: np.ndarray, ranked: int) -> str:
    """Say where strangers stand beside matches (`Retrieval.distance_sample`), of so many ranked images."""
    median = np.median(matches)
    nearer = float((others <= median).mean())  # all of a collapsed network
    front = f"about {nearer * ranked:.0f}" if nearer * ranked >= 1 else "less than one"
    means = "Retrieval is decided in the left tail of the strangers, for they are many."
    if nearer * ranked < 1:
        means = "What errors there are come of the farther matches."
    if nearer > 0.3:
        means = "That is no left tail: distance hardly tells who is who."
    return (
        f"Matches have a median distance of {median:.2f}, non-matches {np.median(others):.2f}. Of "
        f"{len(others):,} strangers drawn {100 * nearer:.3g}% are as near as the median match or nearer: of "
        f"{ranked:,} ranked images {front}, on average, in front of every second match. {means}"
    )


def lists_in_words(per_query: pd.DataFrame, topk: int) -> str:
    """Say how many lists are perfect, and in how many none of the first `topk` is right."""
    scored = per_query.dropna(subset="AP")
    perfect, missed = (scored["AP"] == 1).sum(), (scored["first_rank"] > topk).sum()
    return (
        f"Perfect lists: {perfect:,} of {len(scored):,} queries; no match among the first {topk}: "
        f"{missed:,}."
    )


def heat_maps(tables: Mapping[str, tuple[pd.DataFrame, str]]) -> Figure:
    """Draw tables of numbers as colours, beside each other: by title, each with the form of its numbers.

    The number stands in each cell; NaN cells stay white. All tables have the same rows.
    """
    rows = max(len(table) for table, _ in tables.values())
    figure, _ = subplots(1, len(tables), height=1.1 + 0.36 * rows)
    for axes, (title, (table, form)) in zip(figure.axes, tables.items(), strict=True):
        values = table.to_numpy(dtype=float)
        least = min(0, np.nanmin(values))
        axes.imshow(values, cmap="Blues", vmin=least, aspect="auto")
        dark = 0.3 * least + 0.7 * np.nanmax(values)  # from here on white has more contrast
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > dark else "black"
                text = typeset(form.format(value))
                axes.text(column, row, text, ha="center", va="center", color=colour)
        axes.set_xticks(range(table.shape[1]), table.columns)
        axes.set_yticks(range(table.shape[0]), table.index)
        axes.set(xlabel=table.columns.name, ylabel=table.index.name, title=title)
        axes.grid(False)
        axes.label_outer()
    return figure
