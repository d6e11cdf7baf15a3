"""What can be seen of a training, and what it says in plain words."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from scipy import stats
from torch import nn

from reidlib.recipes import Recipe

# A trend needs this many logged rows; with fewer, Kendall's test cannot reach 1 % in half of them.
MIN_ROWS = 10
# Findings beside which nothing good can be said of a network.
BROKEN = {"diverging", "collapsed", "near collapse", "not learning"}


def last_quarter(rows: pd.DataFrame | pd.Series):
    """Return the medians of the last quarter of the rows: one batch tells little."""
    return rows.iloc[-max(1, len(rows) // 4) :].median()


class Watched(NamedTuple):
    """What can be seen of a training: its history, its recipe, and a few facts that are in neither."""

    history: pd.DataFrame  # the rows of history.csv, one or more
    recipe: Recipe
    identities: float = math.inf  # training identities; infinite: not known
    short: int = 0  # those with fewer than K images
    fresh: Sequence[str] = ()  # layers that pretrained weights have left as made: `fresh_layers`
    before: float = math.nan  # held-out mAP before training
    failed: str = ""  # when and what became NaN or infinite: "At step 7 the loss"

    @property
    def start(self) -> pd.Series:
        """The first row: the network before its first step."""
        return self.history.iloc[0]

    @property
    def end(self) -> pd.Series:
        """The medians of the last quarter of the rows."""
        return last_quarter(self.history)

    @property
    def over_active(self) -> bool:
        """Whether the logged loss is a mean over active triplets: it may rise while a network learns."""
        r = self.recipe
        return r.loss == "batch_all" and r.margin != "soft" and r.mean == "active"

    @property
    def loss(self) -> pd.Series:
        """The mean loss over all triplets."""
        return self.history["loss"] * (self.history["active"] if self.over_active else 1)

    @property
    def loss_at_end(self) -> float:
        """The median loss of the last quarter of the rows."""
        return float(last_quarter(self.loss))

    @property
    def shows_trends(self) -> bool:
        """Whether enough rows are logged to judge how the run went on."""
        return len(self.history) >= MIN_ROWS

    @property
    def asked(self) -> float:
        """How far apart the loss wants two distances, roughly: the margin, at most 1; 1 for soft."""
        return 1.0 if self.recipe.margin == "soft" else min(self.recipe.margin, 1.0) or 1.0

    @property
    def held_out(self) -> pd.Series:
        """Held-out mAP by step; empty if there is none."""
        by_step = self.history.set_index("step")
        return by_step.get("held_out_mAP", pd.Series(dtype=float)).dropna()

    def apart(self, row: pd.Series) -> float:
        """Return how many times as far a stranger is as the same person (medians)."""
        return self.plain(row["negative_p50"]) / max(self.plain(row["positive_p50"]), 1e-12)

    def plain(self, distance: float) -> float:
        """Return a logged distance as a Euclidean one, not squared."""
        return math.sqrt(distance) if self.recipe.squared else distance

    # --- in words

    def curves_in_words(self) -> list[str]:
        """Say what the loss, the active share, the distances and the norm did, a sentence each."""
        start, end = self.start, self.end
        loss = f"**Loss** {start['loss']:.3f} → {end['loss']:.3f}"
        if self.over_active:
            loss += (
                ", a mean over active triplets alone, which may rise while fewer and fewer are active; "
                f"over all of them it went {self.loss.iloc[0]:.3f} → {self.loss_at_end:.3f}"
            )
        return [
            f"{loss}. A collapsed network would sit at {self.recipe.collapsed_loss:.3f}, the dashed line.",
            f"**Active triplets** {start['active']:.0%} → {end['active']:.0%}. Near 0%, these batches have "
            "little left to teach; at 100% for long, the network is not learning.",
            f"**Distances**: strangers were {self.apart(start):.2f} times as far as the same person, and "
            f"are now {self.apart(end):.1f} times as far (medians).",
            f"**Norm** {start['norm']:.2f} → {end['norm']:.2f}. If it grows, the loss falls by scale alone.",
        ]

    def held_out_in_words(self) -> str:
        """Say how people whom the training never saw were found."""
        scores = self.held_out
        if scores.empty:
            return "No identities were held out, so this run was not watched on unseen people."
        said = f"People that training never saw are found with {scores.iloc[-1]:.1%} mAP at the end"
        if scores.idxmax() == scores.index[-1]:
            return f"{said}, the best of the run."
        return f"{said}; the best was {scores.max():.1%} at step {scores.idxmax()}."

    def takeaways(self, findings: Sequence[str]) -> list[str]:
        """Return what to remember of a training, given the names of its health findings."""
        before, apart = self.apart(self.start), self.apart(self.end)
        # The threshold of `checks.not_learning`.
        learnt = "has learnt" if apart > 1.1 * max(1, before) else "has hardly learnt"
        verdict = f"it {learnt} to tell them apart"
        if broken := [name for name in findings if name in BROKEN]:
            verdict = f"but first read what the health report says of **{broken[0]}**"
        return [
            f"The loss went from {self.start['loss']:.2f} to {self.end['loss']:.2f}. By itself that does not "
            f"tell learning from collapse, which has a loss of {self.recipe.collapsed_loss:.2f}.",
            f"For this network a stranger is now {apart:.2f} times as far as the same person: {verdict}.",
            f"The health report found: {', '.join(findings) or 'nothing'}.",
            self.held_out_in_words(),
        ]


def fresh_layers(backbone: nn.Module) -> list[str]:
    """Return the names of the BatchNorm layers that no training has touched.

    PyTorch makes them with running mean 0 and variance 1, scale 1 and shift 0. Training moves all of
    them, so a layer where either pair is as it was made did not get weights.

    >>> fresh_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    ['1']
    """
    fresh = []
    for name, layer in backbone.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            pairs = ((layer.running_mean, layer.running_var), (layer.bias, layer.weight))
            if any((zeros == 0).all() and (ones == 1).all() for zeros, ones in pairs):
                fresh.append(name)
    return fresh


def stretch(marked: pd.Series, steps: pd.Series) -> tuple[float, float] | None:
    """Return first and last step of two or more True in a row: those at the end, else the longest.

    >>> stretch(pd.Series([True, True, True, False]), pd.Series([1, 20, 40, 60]))
    (1, 40)
    >>> stretch(pd.Series([True, True, True, False, True, True]), pd.Series(range(6)))
    (4, 5)
    """
    groups = steps[marked].groupby((~marked).cumsum())
    stretches = [rows.tolist() for _, rows in groups if len(rows) >= 2]
    if not stretches:
        return None
    lasts = stretches[-1][-1] == steps.iloc[-1]
    chosen = stretches[-1] if lasts else max(stretches, key=len)
    return chosen[0], chosen[-1]


def falls(values: pd.Series) -> bool:
    """Whether a series falls: Kendall's rank correlation with its order, one-sided, at 1 %."""
    if len(values) < 5:  # five in a row that fall reach 1 %
        return False
    return bool(stats.kendalltau(range(len(values)), values, alternative="less").pvalue < 0.01)
