"""Every figure that two notebooks share: one style, right and wrong by colour and sign, alt text.

No figure here goes through pyplot, so none is left open behind and none shows up twice. A function
returns a matplotlib `Figure`; `show(figure, alt)` puts it into the notebook, `save` into a file.

>>> figure = curves({"a": ([1, 2], [3, 4])}, x_label="rank", y_label="share")
>>> [line.get_label() for line in figure.axes[0].lines]
['a']
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reidlib.recipes import Recipe

# Okabe and Ito's colours, which the colour-blind can tell apart, the darker ones first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vP*Xhd"
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

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE, linestyle=LINES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",  # readable in JupyterLab's dark theme too
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}


def use_style() -> None:
    """Set the one style of all figures, for this process."""
    matplotlib.rcParams.update(STYLE)


# --- out of here: into a notebook, into a file


def encode(figure: Figure, photo: bool = False, density: float = 1.5) -> bytes:
    """Return a figure as JPEG (photo) or PNG; `density` is pixels for one of the screen's."""
    buffer = io.BytesIO()
    options = {"pil_kwargs": {"quality": 85, "optimize": True}} if photo else {}
    figure.savefig(buffer, format="jpeg" if photo else "png", dpi=100 * density, **options)
    return buffer.getvalue()


def show(figure: Figure, alt: str, photo: bool = False) -> None:
    """Show a figure in the notebook, with a text for those who cannot see it.

    The picture goes into the notebook as an `<img>` with its data inside: JupyterLab shows alt text
    only there, not on images of their own type. `photo` makes it a JPEG, some ten times smaller for
    photographs; curves stay PNG.

    Raises:
        ValueError: no alt text.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("A figure needs alt text: one sentence on what it shows.")
    data = base64.b64encode(encode(figure, photo)).decode()
    kind, width = "jpeg" if photo else "png", round(100 * figure.get_figwidth())
    image = (
        f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" width="{width}" '
        f'style="max-width: 100%; height: auto">'
    )
    display({"text/html": image, "text/plain": f"[Figure: {alt}]"}, raw=True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file: `.jpg` for photographs, `.png` for curves."""
    Path(path).write_bytes(encode(figure, Path(path).suffix.lower() in (".jpg", ".jpeg")))


# --- curves


def subplots(rows: int = 1, columns: int = 1, width: float = 9, height: float = 3):
    """Return a figure of that many inches and its axes, as pyplot's function of this name does."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def curves(
    series: Mapping[str, tuple[Sequence, Sequence]],
    x_label: str,
    y_label: str,
    title: str = "",
    width: float = 6,
    height: float = 3.2,
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw one line for each name, (x, y), each with a colour and a line style of its own."""
    figure, axes = subplots(width=width, height=height)
    for i, (name, (x, y)) in enumerate(series.items()):
        few = {"marker": MARKERS[i % 10], "ms": 4} if len(x) <= 30 else {}
        style = {"color": PALETTE[i % 7], "ls": LINES[(i + i // 7) % 7]}  # a pair repeats after 49
        axes.plot(x, y, label=name, **style, **few)
    axes.set(xlabel=x_label, ylabel=y_label, title=title, ylim=y_limits)
    if len(series) > 1:
        axes.legend()
    return figure


def cmc_curve(first_ranks: Mapping[str, Sequence[float]], up_to: int = 20) -> Figure:
    """Draw CMC curves: the share of queries whose first match is at rank k or before.

    Args:
        first_ranks: by name, `per_query["first_rank"]` of an evaluation; queries without match
            (NaN) do not count.
        up_to: the largest k.
    """
    k = np.arange(1, up_to + 1)
    series = {}
    for name, ranks in first_ranks.items():
        ranks = np.asarray(ranks, dtype=float)
        ranks = ranks[~np.isnan(ranks)]
        series[name] = (k, 100 * (ranks[:, None] <= k).mean(axis=0))  # (Q, K) -> (K,)
    figure = curves(series, "rank k", "queries with a match by rank k, %")
    figure.axes[0].set(xlim=(0.5, up_to + 0.5), ylim=(0, 101))
    figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def training_curves(history: pd.DataFrame, recipe: Recipe | None = None) -> Figure:
    """Draw what tells whether a training is healthy, from the columns of `history.csv`.

    Six panels: loss, with the line where a collapsed network sits (needs `recipe`); share of active
    triplets; distances within and between identities, median in a band from the 5th to the 95th
    percentile; embedding norm; learning rate; retrieval on held-out identities, or the speed where
    none were held out.

    Raises:
        ValueError: an empty history.
    """
    if len(history) == 0:
        raise ValueError("The history is empty: the run has not logged a step yet.")
    figure, axes = subplots(2, 3, width=10, height=5.2)
    step, few = history["step"], {"marker": "o", "ms": 3} if len(history) <= 30 else {}
    for panel, column, title in (
        (axes[0, 0], "loss", "loss"),
        (axes[0, 1], "active", "share of active triplets"),
        (axes[1, 0], "norm", "embedding norm"),
        (axes[1, 1], "lr", "learning rate"),
    ):
        panel.plot(step, history[column], color=PALETTE[0], ls="-", **few)
        panel.set(title=title, ylim=(0, None))
    axes[0, 1].set(ylim=(-0.03, 1.03))
    if history["lr"].max() > 5 * history["lr"].min():
        axes[1, 1].set(ylim=(0.5 * history["lr"].min(), 2 * history["lr"].max()), yscale="log")
    if recipe is not None:
        collapsed = math.log(2) if recipe.margin == "soft" else recipe.margin
        name = "ln 2" if recipe.margin == "soft" else f"margin {recipe.margin:g}"
        line = {"color": PALETTE[1], "ls": "--", "lw": 1.2}
        axes[0, 0].axhline(collapsed, label=f"collapsed: {name}", **line)
        axes[0, 0].legend()
    for name, mark in (("positive", RIGHT), ("negative", WRONG)):
        p5, p50, p95 = (history[f"{name}_p{p}"] for p in (5, 50, 95))
        axes[0, 2].fill_between(step, p5, p95, color=mark.colour, alpha=0.18, lw=0)
        axes[0, 2].plot(step, p50, color=mark.colour, ls=mark.line, label=f"{name}s", **few)
    axes[0, 2].set(title="distances: median, 5–95 %", ylim=(0, None))
    axes[0, 2].legend()
    last = axes[1, 2]
    if "held_out_mAP" in history and history["held_out_mAP"].notna().any():
        scored = history.dropna(subset="held_out_mAP")
        for i, key in enumerate(("mAP", "top1")):
            style = {"color": PALETTE[i], "ls": LINES[i], "marker": MARKERS[i], "label": key}
            last.plot(scored["step"], 100 * scored[f"held_out_{key}"], **style)
        last.set(title="held-out identities, %", ylim=(0, 100))
        last.legend(loc="lower right")
    else:
        last.plot(step, history["images_per_s"], color=PALETTE[0], ls="-", **few)
        last.set(title="images per second", ylim=(0, None))
    for panel in axes.flat:
        panel.set_xlim(0, None)
    for panel in axes[1]:
        panel.set_xlabel("step")
    return figure


def side_by_side(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the histories of several runs, a column each, with the same scales along each row.

    Rows: loss; share of active triplets; distances within and between identities, median in a band
    from the 5th to the 95th percentile; embedding norm; mAP on held-out identities, where a run has
    any.

    Raises:
        ValueError: no history, or an empty one.
    """
    if not histories or any(len(history) == 0 for history in histories.values()):
        raise ValueError("There is nothing to draw: no history, or one without a step.")
    words = ["loss", "active share", "distances", "norm"]
    if any("held_out_mAP" in history for history in histories.values()):
        words.append("held-out mAP, %")
    figure = Figure(figsize=(1 + 2.1 * len(histories), 1.6 * len(words)), layout="constrained")
    axes = figure.subplots(len(words), len(histories), sharex="col", sharey="row", squeeze=False)
    for column, (name, history) in zip(axes.T, histories.items(), strict=True):
        step = history["step"]
        column[0].set_title(name)
        for panel, key in ((column[0], "loss"), (column[1], "active"), (column[3], "norm")):
            panel.plot(step, history[key], color=PALETTE[0], ls="-")
        for key, mark in (("positive", RIGHT), ("negative", WRONG)):
            p5, p50, p95 = (history[f"{key}_p{p}"] for p in (5, 50, 95))
            column[2].fill_between(step, p5, p95, color=mark.colour, alpha=0.18, lw=0)
            column[2].plot(step, p50, color=mark.colour, ls=mark.line, label=f"{key}s")
        if "held_out_mAP" in history:
            scored = history.dropna(subset="held_out_mAP")
            column[4].plot(scored["step"], 100 * scored["held_out_mAP"], "o-", color=PALETTE[0])
        column[-1].set(xlabel="step", xlim=(0, None))
    for panel, label in zip(axes[:, 0], words, strict=True):
        panel.set(ylabel=label, ylim=(0, None))
    axes[2, 0].legend(fontsize=8)
    return figure


def intervals(panels: Mapping[str, pd.DataFrame], zero: bool = True) -> Figure:
    """Draw values with their intervals, a panel for each table, a line for each of its rows.

    Args:
        panels: by the words under the panel, tables with columns `value`, `low` and `high`, and all
            with the same rows, which are drawn from the top.
        zero: draw the line of no difference.
    """
    tables = list(panels.values())
    rows = len(tables[0])
    figure, axes = subplots(1, len(tables), width=9, height=0.35 * rows + 1)
    for i, (axis, (words, table)) in enumerate(
        zip(np.atleast_1d(axes), panels.items(), strict=True)
    ):
        place = np.arange(rows)[::-1]
        ends = [table["value"] - table["low"], table["high"] - table["value"]]
        axis.errorbar(table["value"], place, xerr=ends, fmt="o", capsize=4, color=PALETTE[i % 7])
        if zero:
            axis.axvline(0, color="black", lw=1)
        axis.set(xlabel=words, yticks=place, yticklabels=[] if i else table.index)
        axis.margins(y=0.1)
    return figure


def distance_histograms(
    matches: Sequence[float],
    non_matches: Sequence[float],
    names: tuple[str, str] = ("same person", "somebody else"),
    x_label: str = "distance",
    bins: int = 30,
) -> Figure:
    """Draw how distances of matches and of non-matches spread; where they overlap, ranks go wrong.

    Both are densities over common bins, so their areas are 1 however many pairs there are.
    """
    values = [np.asarray(v, dtype=float) for v in (matches, non_matches)]
    edges = np.histogram_bin_edges(np.concatenate(values), bins=bins)
    densities = [np.histogram(v, edges, density=True)[0] for v in values]
    figure, axes = subplots(width=7, height=3)
    for density, name, mark in zip(densities, names, (RIGHT, WRONG), strict=True):
        axes.stairs(density, edges, color=mark.colour, alpha=0.2, fill=True)
        axes.stairs(density, edges, color=mark.colour, ls=mark.line, lw=1.8, label=name)
    both = np.minimum(*densities)
    overlap = (both * np.diff(edges)).sum()
    hatched = {"fill": True, "fc": "none", "ec": "#555555", "lw": 0, "hatch": "///"}
    axes.stairs(both, edges, label=f"overlap: {overlap:.0%} of the area", **hatched)
    axes.set(xlabel=x_label, ylabel="density", yticks=[])
    axes.legend(**BESIDE)
    return figure


def heat_map(table: pd.DataFrame, title: str = "", form: str = "{:.0f}") -> Figure:
    """Draw a table of numbers as colours, each number in its cell; NaN cells stay white.

    Rows and columns are labelled by index and columns of the table, axes by their names.
    """
    values = table.to_numpy(dtype=float)
    rows, columns = values.shape
    figure, axes = subplots(width=1.6 + 0.62 * columns, height=0.9 + 0.42 * rows)
    axes.imshow(values, cmap="Blues", vmin=min(0, np.nanmin(values)), aspect="auto")
    middle = (min(0, np.nanmin(values)) + np.nanmax(values)) / 2  # of the scale
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > middle else "black"
            text = {"ha": "center", "va": "center", "color": colour}
            axes.text(column, row, form.format(value), **text)
    axes.set(xticks=range(columns), yticks=range(rows), title=title)
    axes.set(xticklabels=table.columns, yticklabels=table.index)
    axes.set(xlabel=table.columns.name, ylabel=table.index.name)
    axes.grid(False)
    return figure
