"""A training seen while it runs: its loss and its held-out score, in a notebook alone."""

import time

import pandas as pd

from reidlib.look.figures import PALETTE, img, subplots
from reidlib.progress import Place, in_notebook
from reidlib.recipes import Recipe


class Live:
    """Curves that grow in a notebook while a training runs, in one place; elsewhere nothing.

    `steps` has the whole training. Two to ten seconds pass between drawings, 30 times what one takes.
    """

    def __init__(self, recipe: Recipe, steps: int, show: bool = True):
        self.recipe, self.steps = recipe, steps
        self._place = Place() if show and in_notebook() else None
        self._due = 0.0  # when it may be drawn again

    def draw(self, history: list[dict], ended: bool = False) -> None:
        """Draw the rows of `history.csv` so far, if it is time, or the training has `ended`."""
        began = time.monotonic()
        if self._place is None or (began < self._due and not ended):
            return
        alt = f"How the loss went, up to step {history[-1]['step']:,} of {self.steps:,}"
        alt += ", and the held-out mAP" if self.recipe.hold_out else ""
        image = img(growth(pd.DataFrame(history), self.recipe, self.steps), alt)
        self._place.show({"text/html": image, "text/plain": f"[Figure: {alt}]"})
        self._due = time.monotonic() + min(10, max(2, 30 * (time.monotonic() - began)))


def growth(history: pd.DataFrame, recipe: Recipe, steps: int):
    """Draw the loss of a training under way, and the held-out mAP, if anybody is held out."""
    columns = ["loss", "held_out_mAP"][: 2 if recipe.hold_out else 1]
    figure, _ = subplots(1, len(columns), height=2.2)
    for panel, column in zip(figure.axes, columns, strict=True):
        rows = history.reindex(columns=["step", column]).dropna()
        panel.plot(rows["step"], rows[column] * (100 if "mAP" in column else 1), marker="o", ms=3)
        title = "held-out mAP, %" if "mAP" in column else "loss of a batch"
        panel.set(title=title, xlabel="step", xlim=(0, steps), ylim=(0, None))
    collapsed = {"color": PALETTE[1], "ls": "--", "lw": 1.2, "label": "if collapsed"}
    figure.axes[0].axhline(recipe.collapsed_loss, **collapsed)
    figure.axes[0].legend()
    return figure
