"""The rows of the comparison: the variants, the grid of margins, and what makes the numbers."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from reidlib.recipes import Recipe
from reidlib.workbook.compare import Row

Key = tuple[str, int]  # what a row is called, and its seed

MARGINS = (0.1, 0.2, 0.5, 1.0, "soft")
VARIANTS: dict[str, dict[str, Any]] = {
    "batch-all 0.2": {"loss": "batch_all", "margin": 0.2},
    "batch-all soft": {"loss": "batch_all", "margin": "soft"},
    "batch-hard 0.2": {"loss": "batch_hard", "margin": 0.2},
    "batch-hard soft": {"loss": "batch_hard", "margin": "soft"},
    "random soft": {"loss": "random", "margin": "soft"},
}
BASE = "batch-hard soft"  # the variant that the ladder leads to


class Departure(NamedTuple):
    """One change to a variant."""

    label: str
    variant: str
    settings: dict[str, Any]
    what: str


DEPARTURES = (
    Departure("last stride 1", BASE, {"last_stride": 1}, "a feature map of twice the size"),
    Departure("no head", BASE, {"head": False}, "the embedding is the pooled features"),
    Departure("sum, not mean", BASE, {"reduction": "sum"}, "a gradient as many times larger"),
    Departure("epochs of images", BASE, {"epoch": "images"}, "all images are shown equally often"),
    Departure(
        "mean over all triplets", "batch-all 0.2", {"mean": "valid"}, "L_BA instead of L_BA≠0"
    ),
)


class Gain(NamedTuple):
    """Two rows, with and without one step."""

    label: str
    after: Key
    before: Key
    what: str
    """what the step is, or how you see that your own code lacks it"""


class Comparison(NamedTuple):
    """The rows of a comparison, and what is asked of them."""

    rows: dict[Key, Row]
    grid: dict[tuple[str, float | str], Key]
    """(loss, margin): the row in that place; empty if the grid was not asked for"""
    gains: list[Gain]
    """the steps; empty if they were not asked for"""


def comparison(
    base: Recipe, *, tag: str = "compare", seeds: int = 3, margins: bool = True, ladder: bool = True
) -> Comparison:
    """Return the rows that are trained under one recipe and differ in what their name says.

    Args:
        base: what all rows share.
        tag: in the names of runs that are trained for it.
        seeds: how many times each variant is trained.
        margins: also the grid of margins, of one seed.
        ladder: also single steps from a plain recipe to the base, and away from it, of one seed.
    """
    # Neither is part of what a row is. A row that is killed loses a fifth of its steps at most.
    often = max(1, (base.steps or 1000) // 5)
    watch = {"evaluate_every": often, "checkpoint_every": often}

    def row(words: str, **settings: Any) -> Row:
        label = "_".join(part for part in (tag, words) if part)
        return Row(Recipe(**(base.model_dump() | watch | settings)), label)

    rows = {
        (name, seed): row(f"s{seed}", seed=seed, **settings)
        for name, settings in VARIANTS.items()
        for seed in range(seeds)
    }
    grid = {}
    for loss, margin in itertools.product(("batch_all", "batch_hard"), MARGINS) if margins else ():
        variant = f"{loss.replace('_', '-')} {margin}"
        grid[loss, margin] = (variant, 0)
        if variant not in VARIANTS:
            rows[variant, 0] = row(f"m{margin}", loss=loss, margin=margin)
    gains = []
    if ladder:
        for made, gain in (*_path(rows, row), *_departures(rows, row)):
            rows |= made
            gains += [gain] * (gain is not None)
    return Comparison(rows, grid, gains)


def plain_settings(base: Recipe) -> dict[str, Any]:
    """Return what the field's small repositories set otherwise than `base`."""
    half = {"height": max(32, base.height // 2), "width": max(16, base.width // 2)}
    settings = {"loss": "batch_hard", "margin": 0.2, "normalise": "unit", "lr": base.lr / 10}
    return settings | {"decay_start": 1.0, "enlarge": 1.0} | half


def _path(rows: Mapping[Key, Row], row):
    """Yield the rows from the plain recipe up to the base, each with the gain of its step."""
    base = rows[BASE, 0].recipe
    more = "" if base.weights == "none" else ", though the weights were trained with more"
    steps = [
        ("normalise as ImageNet", ["normalise"], f"pixels divided by 255 and nothing more{more}"),
        (
            f"rate {base.lr:g}, not {base.lr / 10:g}",
            ["lr"],
            "the loss still falls when training ends",
        ),
        ("decaying rate", ["decay_start"], "a constant rate: the scores jump until the end"),
        ("resize and crop", ["enlarge"], "training images are resized to the input and no more"),
        ("soft margin", ["margin"], "margin 0.2: triplets right by the margin teach no more"),
        (
            f"input {base.height}×{base.width}",
            ["height", "width"],
            "images smaller than they could be",
        ),
    ]
    settings, before = plain_settings(base), ("plain", 0)
    yield {before: row("plain", **settings)}, None
    for i, (label, given_back, sign) in enumerate(steps, 1):
        settings |= {name: getattr(base, name) for name in given_back}
        last = i == len(steps)
        after = (BASE, 0) if last else (f"+ {label}", 0)
        made = {} if last else {after: row(f"step{i}", **settings)}
        yield made, Gain(f"+ {label}", after, before, sign)
        before = after


def _departures(rows: Mapping[Key, Row], row):
    """Yield the rows that depart from a variant, each with its gain."""
    for label, variant, settings, what in DEPARTURES:
        start = rows[variant, 0].recipe
        if all(getattr(start, name) == value for name, value in settings.items()):
            continue  # all rows have it: no departure
        words = label.replace(",", "").replace(" ", "-")
        made = {(label, 0): row(words, **VARIANTS[variant], **settings)}
        yield made, Gain(f"{label} ({variant})", (label, 0), (variant, 0), what)
