"""What can be seen of a training, and what it says in plain words."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from scipy import stats
from torch import nn

from reidlib.recipes import Recipe


class Watched(NamedTuple):
    """What can be seen of a training: its history, its recipe, and a few facts that are in neither."""

    history: pd.DataFrame
    """the rows of history.csv, one or more"""
    recipe: Recipe
    identities: int | None = None
    """training identities; None: not known, as in runs made before there was a report"""
    short: int | None = None
    """those with fewer than K images"""
    fresh: Sequence[str] = ()
    """layers that pretrained weights have left as they were made, see `fresh_layers`"""
    before: float | None = None
    """held-out mAP before training"""
    failed: str = ""
    """when and what became NaN or infinite: "At step 7 the loss" """

    @property
    def start(self) -> pd.Series:
        """The first row: the network before its first step."""
        return self.history.iloc[0]

    @property
    def end(self) -> pd.Series:
        """Medians of the last quarter of the rows: one batch tells little."""
        return self.history.iloc[-max(1, len(self.history) // 4) :].median()

    @property
    def loss(self) -> pd.Series:
        """The mean loss over all triplets of each row.

        The mean over active triplets may rise while a network learns: the easy ones leave it.
        """
        recipe, history = self.recipe, self.history
        of_active = (
            recipe.loss == "batch_all" and recipe.mean != "valid" and recipe.margin != "soft"
        )
        return history["loss"] * history["active"] if of_active else history["loss"]

    @property
    def loss_at_end(self) -> float:
        """The median loss of the last quarter of the rows."""
        return float(self.loss.iloc[-max(1, len(self.loss) // 4) :].median())

    @property
    def asked(self) -> float:
        """How far apart the loss wants two distances, roughly: the margin, at most 1; 1 for soft."""
        return 1.0 if self.recipe.margin == "soft" else min(self.recipe.margin, 1.0) or 1.0

    @property
    def held_out(self) -> pd.Series:
        """Held-out mAP by step; empty if there is none."""
        if "held_out_mAP" not in self.history:
            return pd.Series(dtype=float)
        return self.history.set_index("step")["held_out_mAP"].dropna()

    @property
    def moved_apart(self) -> tuple[float, float]:
        """How many times as far a stranger is as the same person (medians): start and end."""
        start, end = (
            self.plain(row["negative_p50"]) / max(self.plain(row["positive_p50"]), 1e-12)
            for row in (self.start, self.end)
        )
        return start, end

    def plain(self, distance: float) -> float:
        """Return a logged distance as a Euclidean one, not squared."""
        return math.sqrt(distance) if self.recipe.squared else distance

    @property
    def learning(self) -> pd.Series:
        """True for rows whose learning rate is over half of the recipe's: before the decay bites."""
        return self.history["lr"] > 0.5 * self.recipe.lr

    # --- in words

    def curves_in_words(self) -> list[str]:
        """Say what the loss, the active share, the distances and the norm did, a sentence each.

        From the first row to the medians of the last quarter: one batch tells little.
        """
        start, end = self.start, self.end
        before, after = self.moved_apart
        return [
            f"**Loss** {self.loss.iloc[0]:.3f} → {self.loss_at_end:.3f}. A collapsed network would sit at "
            f"{self.recipe.collapsed_loss:.3f}, the dashed line.",
            f"**Active triplets** {start['active']:.0%} → {end['active']:.0%}. Near 0 % nothing is left to "
            "learn from these batches; at 100 % for long, nothing is being learnt.",
            f"**Distances**: a stranger is now {after:.1f} times as far as the same person (medians; it was "
            f"{before:.2f} at the start).",
            f"**Norm** {start['norm']:.2f} → {end['norm']:.2f}. If it grew without end, the network would "
            "buy a smaller loss with scale.",
        ]

    def held_out_in_words(self) -> str:
        """Say how people whom the training never saw were found."""
        scores = self.held_out
        if not len(scores):
            return "No identities were held out, so this run was not watched on unseen people."
        said = (
            f"Retrieval among people that training never saw: {scores.iloc[-1]:.1%} mAP at the end"
        )
        if scores.idxmax() == scores.index[-1]:
            return f"{said}, the best of the run."
        return f"{said}; the best was {scores.max():.1%} at step {scores.idxmax()}."

    def takeaways(self, findings: Sequence[str]) -> list[str]:
        """Return what to remember of a training, given the names of its health findings."""
        collapsed, (_, apart) = self.recipe.collapsed_loss, self.moved_apart
        lines = [
            f"The loss went from {self.loss.iloc[0]:.2f} in the first batch to {self.loss_at_end:.2f} "
            "(median of the last quarter of the log). By itself that would not tell learning from "
            f"collapse ({collapsed:.2f}).",
            f"A stranger ends {apart:.1f} times as far as the same person: the network did not collapse."
            if apart > 1.1
            else f"A stranger ends {apart:.2f} times as far as the same person: it has hardly learnt.",
            f"The health report found: {', '.join(findings)}. What to try first stands there."
            if findings
            else "The health report found nothing.",
        ]
        if len(self.held_out):
            lines.append(f"People it never saw are found with {self.held_out.iloc[-1]:.1%} mAP.")
        return lines


def fresh_layers(backbone: nn.Module) -> list[str]:
    """Return the names of the BatchNorm layers that no training has touched.

    PyTorch makes them with running mean 0 and variance 1, scale 1 and shift 0. Training moves every
    one of them, so a layer where either pair still has these very values did not get weights.

    >>> fresh_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    ['1']
    """

    def untouched(zeros: torch.Tensor | None, ones: torch.Tensor | None) -> bool:
        return zeros is not None and bool((zeros == 0).all() and (ones == 1).all())

    return [
        name
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and (
            untouched(layer.running_mean, layer.running_var) or untouched(layer.bias, layer.weight)
        )
    ]


def stretch(marked: pd.Series, steps: pd.Series) -> tuple[float, float, int]:
    """Return first step, last step and number of rows of a run of True: the one that lasts to the
    end if it has two rows or more, else the longest.

    >>> stretch(pd.Series([True, True, True, False]), pd.Series([1, 20, 40, 60]))
    (1, 40, 3)
    >>> stretch(pd.Series([True, True, True, False, True, True]), pd.Series(range(6)))
    (4, 5, 2)
    """
    stretches = [group for _, group in steps[marked].groupby((~marked).cumsum()[marked])]
    at_end = [s for s in stretches[-1:] if len(s) >= 2 and s.iloc[-1] == steps.iloc[-1]]
    chosen = max(at_end or stretches, key=len, default=())
    return (
        (chosen.iloc[0].item(), chosen.iloc[-1].item(), len(chosen)) if len(chosen) else (0, 0, 0)
    )


def falls(values: pd.Series) -> bool:
    """Whether a series falls: Kendall's rank correlation with its order, one-sided, at 1 %."""
    if len(values) < 5:  # five in a row that fall reach 1 %
        return False
    return bool(stats.kendalltau(range(len(values)), values, alternative="less").pvalue < 0.01)
