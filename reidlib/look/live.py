"""A training seen while it runs: its loss and its held-out score, in a notebook alone."""

import time

import pandas as pd
from IPython.display import display

from reidlib.look.figures import PALETTE, Figure, img, subplots
from reidlib.progress import in_notebook
from reidlib.recipes import Recipe


class Live:
    """Curves that grow in a notebook while a training runs, in one place; elsewhere nothing.

    `steps` has the whole training. Two to ten seconds pass between drawings, 30 times what one takes.
    """

    def __init__(self, recipe: Recipe, steps: int, show: bool = True):
        self.recipe, self.steps, self._show = recipe, steps, show and in_notebook()
        self._due, self._drawn = 0.0, False  # when it may be drawn again

    def draw(self, history: list[dict], ended: bool = False) -> None:
        """Draw the rows of `history.csv` so far, if it is time, or the training has `ended`."""
        began = time.monotonic()
        if not self._show or (began < self._due and not ended):
            return
        alt = f"How training went, up to step {history[-1]['step']:,} of {self.steps:,}"
        image = img(growth(pd.DataFrame(history), self.recipe, self.steps), alt)
        content = {"text/html": image, "text/plain": f"[Figure: {alt}]"}
        display(content, raw=True, display_id=str(id(self)), update=self._drawn)
        self._drawn = True
        self._due = time.monotonic() + min(10, max(2, 30 * (time.monotonic() - began)))


def growth(history: pd.DataFrame, recipe: Recipe, steps: int) -> Figure:
    """Draw the loss of a training under way, and the held-out mAP, if anybody is held out."""
    figure, _ = subplots(1, 2 if recipe.hold_out else 1, height=2.2)
    shown = {"loss": ("loss of a batch", 1), "held_out_mAP": ("held-out mAP, %", 100)}
    for panel, (column, (title, times)) in zip(figure.axes, shown.items(), strict=False):
        rows = history.reindex(columns=["step", column]).dropna()
        panel.plot(rows["step"], times * rows[column], marker="o", ms=3)
        panel.set(title=title, xlabel="step", xlim=(0, steps), ylim=(0, None))
    figure.axes[0].axhline(recipe.collapsed_loss, color=PALETTE[1], ls="--", label="if collapsed")
    figure.axes[0].legend()
    return figure
