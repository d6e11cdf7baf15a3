"""Curves, bands, histograms and heat maps in one style, and how figures reach a notebook or a file.

The colours are told apart by the colour-blind too, and right and wrong also by their line and sign.
A function returns a matplotlib `Figure`: `show(figure, alt)` puts it into the notebook, `save` into a
file. None goes through pyplot, so none is left open behind, and none shows up twice. Figures made of
photographs stand in `look.photographs`.

>>> figure = curves({"a": ([1, 2], [3, 4])}, x_label="rank", y_label="share")
>>> [line.get_label() for line in figure.axes[0].lines]
['a']
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
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


def img(figure: Figure, alt: str, photo: bool = False) -> str:
    """Return a figure as an `<img>` with its data inside, JPEG (photo) or PNG."""
    data = base64.b64encode(encode(figure, photo)).decode()
    kind, width = "jpeg" if photo else "png", round(100 * figure.get_figwidth())
    return (
        f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" width="{width}" '
        f'style="max-width: 100%; height: auto">'
    )


def show(figure: Figure, alt: str, photo: bool = False) -> None:
    """Show a figure in the notebook, with a text for those who cannot see it.

    It goes into the notebook as an `<img>`: JupyterLab shows alt text only there, not on images of
    their own type. `photo` makes it a JPEG, some ten times smaller for photographs; curves stay PNG.

    Args:
        figure: what to show.
        alt: one sentence on what it shows.
        photo: whether it holds photographs.

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
    Path(path).write_bytes(encode(figure, Path(path).suffix.lower() in (".jpg", ".jpeg")))


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
        ranks = pd.Series(ranks, dtype=float).dropna().to_numpy()
        series[name] = (k, 100 * (ranks[:, None] <= k).mean(axis=0))  # (Q, K) -> (K,)
    figure = curves(series, "rank k", "queries with a match by rank k, %")
    figure.axes[0].set(xlim=(0.5, up_to + 0.5), ylim=(0, 101))
    figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def camera_bars(per_query: pd.DataFrame) -> Figure:
    """Draw the mAP of the queries of each camera; queries without a match have none.

    Args:
        per_query: an evaluation's, with `camid` and `AP`.
    """
    mean = 100 * per_query.dropna(subset="AP").groupby("camid")["AP"].mean()
    figure, axes = subplots(width=6, height=2.8)
    names = ["unknown" if camera < 0 else str(camera) for camera in mean.index]
    axes.bar(names, mean, color=PALETTE[0])
    axes.set(xlabel="camera of the query", ylabel="mAP, %", title="mAP by the query's camera")
    return figure


def hardest_camera(per_query: pd.DataFrame) -> str:
    """Say from which camera queries are hardest, and from which easiest: what `camera_bars` shows."""
    by_camera = per_query.dropna(subset="AP").groupby("camid")["AP"].agg(["mean", "size"])
    if len(by_camera) < 2:
        return "One camera is known, or none, so cameras cannot be compared here."
    low, high = by_camera["mean"].idxmin(), by_camera["mean"].idxmax()
    ends = [
        f"{by_camera['mean'][c]:.1%} mAP over {by_camera['size'][c]} queries" for c in (low, high)
    ]
    return f"Queries of camera {low} are hardest ({ends[0]}), those of camera {high} easiest ({ends[1]})."


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
    figure, ((loss, active, distances), (norm, rate, last)) = subplots(2, 3, width=10, height=5.2)
    for panel, column, title in (
        (loss, "loss", "loss"),
        (active, "active", "share of active triplets"),
        (norm, "norm", "embedding norm"),
        (rate, "lr", "learning rate"),
    ):
        _column(panel, history, column)
        panel.set(title=title, ylim=(0, None))
    active.set(ylim=(-0.03, 1.03))
    if history["lr"].max() > 5 * history["lr"].min():
        rate.set(ylim=(0.5 * history["lr"].min(), 2 * history["lr"].max()), yscale="log")
    if recipe is not None:
        name = "ln 2" if recipe.margin == "soft" else f"margin {recipe.margin:g}"
        line = {"color": PALETTE[1], "ls": "--", "lw": 1.2}
        loss.axhline(recipe.collapsed_loss, label=f"collapsed: {name}", **line)
        loss.legend()
    _distances(distances, history)
    distances.set(title="distances: median, 5–95 %", ylim=(0, None))
    distances.legend()
    if _has_held_out(history):
        _held_out(last, history, ("mAP", "top1"))
        last.set(title="held-out identities, %", ylim=(0, 100))
        last.legend(loc="lower right")
    else:
        _column(last, history, "images_per_s")
        last.set(title="images per second", ylim=(0, None))
    for panel in figure.axes:
        panel.set_xlim(0, None)
    for panel in (norm, rate, last):
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
    if any(map(_has_held_out, histories.values())):
        words.append("held-out mAP, %")
    figure = Figure(figsize=(1 + 2.1 * len(histories), 1.6 * len(words)), layout="constrained")
    axes = figure.subplots(len(words), len(histories), sharex="col", sharey="row", squeeze=False)
    for column, (name, history) in zip(axes.T, histories.items(), strict=True):
        column[0].set_title(name)
        for panel, key in ((column[0], "loss"), (column[1], "active"), (column[3], "norm")):
            _column(panel, history, key)
        _distances(column[2], history)
        if _has_held_out(history):
            _held_out(column[4], history, ("mAP",))
        column[-1].set(xlabel="step", xlim=(0, None))
    for panel, label in zip(axes[:, 0], words, strict=True):
        panel.set(ylabel=label, ylim=(0, None))
    axes[2, 0].legend(fontsize=8)
    return figure


def _column(axes: Axes, history: pd.DataFrame, column: str) -> None:
    """Draw one column of a history over its steps."""
    axes.plot(history["step"], history[column], color=PALETTE[0], ls="-", **_dots(history))


def _distances(axes: Axes, history: pd.DataFrame) -> None:
    """Draw the medians of distances within and between identities, each in its band."""
    for name, mark in (("positive", RIGHT), ("negative", WRONG)):
        p5, p50, p95 = (history[f"{name}_p{p}"] for p in (5, 50, 95))
        axes.fill_between(history["step"], p5, p95, color=mark.colour, alpha=0.18, lw=0)
        style = {"color": mark.colour, "ls": mark.line, "label": f"{name}s"}
        axes.plot(history["step"], p50, **style, **_dots(history))


def _has_held_out(history: pd.DataFrame) -> bool:
    return "held_out_mAP" in history and history["held_out_mAP"].notna().any()


def _held_out(axes: Axes, history: pd.DataFrame, scores: Sequence[str]) -> None:
    """Draw scores on held-out identities, per cent, at the steps that have them."""
    scored = history.dropna(subset="held_out_mAP")
    for i, key in enumerate(scores):
        style = {"color": PALETTE[i], "ls": LINES[i], "marker": MARKERS[i], "label": key}
        axes.plot(scored["step"], 100 * scored[f"held_out_{key}"], **style)


def _dots(history: pd.DataFrame) -> dict:
    """Return the style that marks each step of a short history."""
    return {"marker": "o", "ms": 3} if len(history) <= 30 else {}


def intervals(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw differences with their intervals, a panel for each table, a line for each of its rows.

    Args:
        panels: by the words under the panel, tables with columns `value`, `low` and `high`, and all
            with the same rows, which are drawn from the top. A line stands at no difference.
    """
    names = next(iter(panels.values())).index
    place = np.arange(len(names))[::-1]
    figure, _ = subplots(1, len(panels), width=9, height=0.35 * len(names) + 1)
    for i, (words, table) in enumerate(panels.items()):
        panel = figure.axes[i]
        ends = [table["value"] - table["low"], table["high"] - table["value"]]
        panel.errorbar(table["value"], place, xerr=ends, fmt="o", capsize=4, color=PALETTE[i % 7])
        panel.axvline(0, color="black", lw=1)
        panel.set(xlabel=words, yticks=place, yticklabels=[] if i else names)
        panel.margins(y=0.1)
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
    least = min(0, np.nanmin(values))
    axes.imshow(values, cmap="Blues", vmin=least, aspect="auto")
    middle = (least + np.nanmax(values)) / 2  # of the scale
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > middle else "black"
            text = {"ha": "center", "va": "center", "color": colour}
            axes.text(column, row, form.format(value), **text)
    axes.set_xticks(range(columns), table.columns)
    axes.set_yticks(range(rows), table.index)
    axes.set(xlabel=table.columns.name, ylabel=table.index.name, title=title)
    axes.grid(False)
    return figure
