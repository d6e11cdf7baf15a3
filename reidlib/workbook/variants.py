"""The rows of the comparison: the variants, the grid of margins, and what makes the numbers."""

import itertools
from collections.abc import Iterator
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
PLAIN = ("plain", 0)  # the row that it starts from

# Single changes: what the row is called, the variant it departs from, the settings, what they are.
DEPARTURES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("last stride 1", BASE, {"last_stride": 1}, "a feature map of twice the size"),
    ("no head", BASE, {"head": False}, "the embedding is the pooled features"),
    ("sum, not mean", BASE, {"reduction": "sum"}, "a gradient as many times larger"),
    ("epochs of images", BASE, {"epoch": "images"}, "all images are shown equally often"),
    ("mean over all triplets", "batch-all 0.2", {"mean": "valid"}, "L_BA instead of L_BA≠0"),
)


class Gain(NamedTuple):
    """Two rows, with and without one step."""

    label: str
    after: Key
    before: Key
    what: str  # the step is, or how you see that your own code lacks it


class Comparison(NamedTuple):
    """The rows of a comparison, and what is asked of them."""

    rows: dict[Key, Row]
    grid: dict[tuple[str, float | str], Key]  # (loss, margin): its row; empty if not asked for
    gains: list[Gain]  # the steps; empty if not asked for


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
    shared = base.model_dump() | {"evaluate_every": often, "checkpoint_every": often}

    def row(words: str, settings: dict[str, Any]) -> Row:
        return Row(Recipe(**(shared | settings)), "_".join(filter(None, (str(tag), words))))

    rows = {
        (name, seed): row(f"s{seed}", settings | {"seed": seed})
        for name, settings in VARIANTS.items()
        for seed in range(seeds)
    }
    grid, gains = {}, []
    for loss, margin in itertools.product(("batch_all", "batch_hard"), MARGINS) if margins else ():
        grid[loss, margin] = key = (f"{loss.replace('_', '-')} {margin}", 0)
        rows.setdefault(key, row(f"m{margin}", {"loss": loss, "margin": margin}))
    if ladder:
        rows[PLAIN] = row("plain", _plain(base))
        for gain, words, settings in _steps(rows[BASE, 0].recipe):
            rows.setdefault(gain.after, row(words, settings))
            gains.append(gain)
    return Comparison(rows, grid, gains)


def _plain(base: Recipe) -> dict[str, Any]:
    """Return what the field's small repositories set otherwise than `base`."""
    half = {"height": max(32, base.height // 2), "width": max(16, base.width // 2)}
    settings = {"loss": "batch_hard", "margin": 0.2, "normalise": "unit", "lr": base.lr / 10}
    return settings | {"decay_start": 1.0, "enlarge": 1.0} | half


def _steps(base: Recipe) -> Iterator[tuple[Gain, str, dict[str, Any]]]:
    """Yield the steps from plain to the base, then from it: gain, tag and settings of the row after."""
    more = "" if base.weights == "none" else ", though the weights were trained with more"
    path = [  # the name, the settings that the step gives back, how its lack shows
        ("normalise as ImageNet", ["normalise"], f"pixels divided by 255 and nothing more{more}"),
        (f"rate {base.lr:g}, not {base.lr / 10:g}", ["lr"], "the loss still falls at the end"),
        ("decaying rate", ["decay_start"], "a constant rate: the scores jump until the end"),
        ("resize and crop", ["enlarge"], "training images are resized to the input and no more"),
        ("soft margin", ["margin"], "margin 0.2: triplets right by the margin teach no more"),
        (f"input {base.height}×{base.width}", ["height", "width"], "images are needlessly small"),
    ]
    settings, before = _plain(base), PLAIN
    for i, (name, given_back, lack) in enumerate(path, 1):
        settings = settings | {setting: getattr(base, setting) for setting in given_back}
        after = (BASE if i == len(path) else f"+ {name}", 0)
        yield Gain(f"+ {name}", after, before, lack), f"step{i}", settings
        before = after
    for name, variant, changes, what in DEPARTURES:
        start = base.model_dump() | VARIANTS[variant]
        if not changes.items() <= start.items():  # else all rows have it: no departure
            gain = Gain(f"{name} ({variant})", (name, 0), (variant, 0), what)
            yield gain, name.replace(",", "").replace(" ", "-"), VARIANTS[variant] | changes
