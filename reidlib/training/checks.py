"""What can be wrong with a training: one function a check.

A check takes what is `Watched` and returns a `Finding` or None. To add one, write such a function and
add it to `health.CHECKS`; a finding's name is its function's, with spaces. Thresholds are constants
with a reason. They were set so that all four variants and random triplets, on the built-in data for 60
to 400 steps and on Market-1501, are healthy; the numbers of those runs stand beside the thresholds.
"""

import math
from pathlib import Path
from typing import NamedTuple

from reidlib.training.watched import Watched, falls, stretch
from reidlib.words import some

# A trend needs this many logged rows; with fewer, Kendall's test cannot reach 1 % in half of them.
MIN_ROWS = 10
# The learning rate is as good as 0 below this share of the recipe's: the schedule has ended.
DECAYED = 0.05
# A held-out mAP is a mean over some 50 to 300 queries; two scores of one network differ by so much.
MAP_NOISE = 0.02


class Finding(NamedTuple):
    """Something that is wrong with a run, or was."""

    name: str
    """what it is called: "collapsed", "too easy", …"""
    says: str
    """one sentence: what happened"""
    evidence: str
    """the numbers that show it"""
    try_first: str
    """what to do about it"""


# TriNet's rate for Adam, and that of most recipes since.
GOOD_RATE = 3e-4


# --- before the first step


def weights_did_not_load(run: Watched) -> Finding | None:
    """The backbone was to start from a file of weights, and some of its layers are as made."""
    if not run.fresh:
        return None
    return Finding(
        "weights did not load",
        f"Layers of the backbone were never trained, although its weights are said to come from "
        f"{Path(run.recipe.weights).name!r}.",
        f"{len(run.fresh)} BatchNorm layers are as PyTorch makes them (mean 0 and variance 1, or "
        f"scale 1 and shift 0): {some(run.fresh, 4)}",
        'Take the file from its source again, or weights="imagenet"; or say weights="none", if the '
        "network is meant to start from random weights.",
    )


def wrong_normalisation(run: Watched) -> Finding | None:
    """Pretrained weights expect the pixels that they were trained on."""
    if run.recipe.weights == "none" or run.recipe.normalise == "imagenet":
        return None
    return Finding(
        "wrong normalisation",
        "The backbone's weights were trained on pixels of ImageNet's mean and deviation, and are "
        "given others.",
        f'normalise = "{run.recipe.normalise}" with weights = {Path(run.recipe.weights).name!r}',
        'normalise="imagenet"',
    )


def no_margin(run: Watched) -> Finding | None:
    """A hinge with margin 0 asks for nothing that one point for all images does not give."""
    if run.recipe.margin != 0:
        return None
    return Finding(
        "no margin",
        "With a margin of 0 a network that maps all images to one point has no loss: nothing pushes "
        "people apart, and the loss cannot show a collapse.",
        "margin = 0, so a collapsed network sits at a loss of 0, where one that has learnt all does",
        'margin=0.2 to 1, or margin="soft".',
    )


# Below 2 P identities each batch shows more than half of all people: an anchor meets the same
# strangers at nearly every step. (Market-1501 with P = 18 has 42 P, the built-in data 7 P.)
MIN_BATCHES_OF_IDENTITIES = 2
# Of Market-1501's identities 2 % have fewer than K = 4 images.
MAX_SHORT_IDENTITIES = 0.2


def too_few_identities(run: Watched) -> Finding | None:
    """P × K batches want many identities, with K images each."""
    p, k, identities = run.recipe.p, run.recipe.k, run.identities
    if identities is None:
        return None
    says, advice = [], []
    if identities < MIN_BATCHES_OF_IDENTITIES * p:
        says += ["each batch shows the same people, or more than half of them"]
        advice += [f"p={max(2, identities // 4)}, or more identities"]
    if run.short is not None and run.short > MAX_SHORT_IDENTITIES * identities:
        says += ["many identities fill their K images with copies of the same ones"]
        advice += ["a smaller k, or leave out people with few images"]
    if not says:
        return None
    return Finding(
        "too few identities",
        f"The data is small for batches of P × K: {'; '.join(says)}.",
        f"P = {p} of {identities} identities"
        + (f"; {run.short} have fewer than K = {k} images" if run.short else ""),
        f"{'; '.join(advice)}. Trust held-out scores only.",
    )


# --- the loss and the distances


# No healthy run's logged loss was above 1.1 times the first one; large steps take it beyond 10.
LOSS_GROWN = 3.0
# Where it ends, the loss of healthy runs is a twentieth to a half of the first one.
LOSS_ENDED_HIGHER = 1.25
# Norms of healthy runs grow to 3.5 times the first one.
NORM_GROWN = 30.0


def diverging(run: Watched) -> Finding | None:
    """The loss or the embeddings grow out of bounds."""
    loss, norm, steps = run.loss, run.history["norm"], run.history["step"]
    high = max(loss.iloc[0], run.recipe.collapsed_loss)
    lower = f"A lower learning rate (now lr = {run.recipe.lr:g}): " + (
        f"{GOOD_RATE:g}" if run.recipe.lr > 10 * GOOD_RATE else "a tenth of it"
    )
    lower += ", or squared=False" if run.recipe.squared else ""
    if run.failed:
        logged = loss.notna().any()
        return Finding(
            "diverging",
            f"{run.failed} became NaN or infinite, so training stopped.",
            f"loss {loss.iloc[0]:.3g} at step {steps.iloc[0]:.0f}, {loss.iloc[-1]:.3g} at step "
            f"{steps.iloc[-1]:.0f}, the last that was logged"
            if logged
            else "it was the first step, before any weight had changed",
            f"{lower}."
            if logged
            else "Look at what goes in: the file of weights, and the images (00_explore_data).",
        )
    for values, first, limit, name in (
        (loss, high, LOSS_GROWN, "loss"),
        (norm, max(norm.iloc[0], 1.0), NORM_GROWN, "embedding norm"),
    ):
        first_step, last_step, rows = stretch(values > limit * first, steps)
        if rows >= 2:
            over = "has" if last_step == steps.iloc[-1] else "had for a while"
            return Finding(
                "diverging",
                f"The {name} {over} grown far beyond where it began.",
                f"{name} {values.iloc[0]:.3g} at step {steps.iloc[0]:.0f}, up to "
                f"{values.max():.3g}, {values.iloc[-1]:.3g} at the end; over {limit:g} times the "
                f"start from step {first_step:.0f} to {last_step:.0f}",
                lower + ".",
            )
    if len(loss) >= MIN_ROWS and run.loss_at_end > LOSS_ENDED_HIGHER * high:
        return Finding(
            "diverging",
            "The loss ended higher than it began.",
            f"{loss.iloc[0]:.3g} at the start, {run.loss_at_end:.3g} at the end (median of the "
            f"last quarter of the logged batches)",
            lower + ".",
        )
    return None


# Distances that are a tenth of what the loss asks for leave it within a tenth of its value at 0.
COLLAPSED = 0.1


def collapsed(run: Watched) -> Finding | None:
    """All embeddings are nearly equal, at the end or for a while.

    It is called so when, in two logged batches in a row, even the largest distances between
    identities (95th percentile) are below a tenth of the margin. For the soft margin, and margins
    above 1, below 0.1.
    """
    recipe, rows = run.recipe, run.history
    small = rows["negative_p95"] < COLLAPSED * run.asked
    first, last, long = stretch(small, rows["step"])
    if long < 2:
        return None
    at_end, from_start = last == rows["step"].iloc[-1], first == rows["step"].iloc[0]
    says = "The network has collapsed: it maps all images to nearly one point."
    if not at_end:
        says = "The network had collapsed for a while, and has left it."
    value = "ln 2 = 0.693" if recipe.margin == "soft" else f"the margin, {recipe.margin:g}"
    return Finding(
        "collapsed",
        says,
        f"from step {first:.0f} to {last:.0f}, 95 % of the distances between identities were at most "
        f"{rows.loc[rows['step'].between(first, last), 'negative_p95'].max():.2g}; the loss was "
        f"{run.loss.iloc[-1]:.3f} at step {rows['step'].iloc[-1]:.0f}, and a collapsed network sits "
        f"at {value}",
        "Look at the images (00_explore_data): they give one embedding from the start, as black or "
        "identical pictures do"
        + (". Or the file of weights: zeros do so, too." if recipe.weights != "none" else ".")
        if from_start
        else 'A lower learning rate, or loss="batch_all". Some runs leave it by themselves, with more '
        "steps. If none helps, look at the labels (00_explore_data): wrong ones cannot be learnt.",
    )


# Of healthy runs, the median distance between identities ends at 4 times what the loss asks for or
# more. The run market1501_batchhard_softplus_erasing fell from 5.4 to 0.9, stayed with a loss of
# ln 2, and scored 22 points of mAP lower than the same without erasing.
SHRUNK = 0.25
NEAR_COLLAPSED_LOSS = 0.85


def near_collapse(run: Watched) -> Finding | None:
    """Distances have shrunk below what the loss asks for, and it sits where a collapsed one does."""
    if len(run.history) < MIN_ROWS:
        return None
    start, end = run.start["negative_p50"], run.end["negative_p50"]
    sits = run.loss_at_end > NEAR_COLLAPSED_LOSS * run.recipe.collapsed_loss
    if not (sits and end < run.asked and end < SHRUNK * start):
        return None
    return Finding(
        "near collapse",
        "The network has drawn all images together, and its loss sits where a collapsed one's does.",
        f"median distance between identities {start:.2f} → {end:.2f}; loss {run.loss_at_end:.3f} at "
        f"the end, collapsed: {run.recipe.collapsed_loss:.3f}; active triplets {run.end['active']:.0%}",
        'A lower learning rate, loss="batch_all", fewer augmentations at first, or more steps before '
        "the rate decays.",
    )


# A network that learns puts strangers 1.4 (60 steps) to 2.9 times as far as the same person.
MOVED_APART = 1.1


def not_learning(run: Watched) -> Finding | None:
    """Strangers are no farther than before training, or are not found any better."""
    if len(run.history) < MIN_ROWS:
        return None
    evidence, says = [], "The network tells people apart no better than before training."
    if len(run.held_out) and run.before is not None:
        best = run.held_out.max()
        if best < run.before + MAP_NOISE:
            evidence = [f"held-out mAP {run.before:.1%} before training, {best:.1%} at best"]
            says = "People whom the network never saw are found no better than before training."
    before, after = run.moved_apart
    if after < MOVED_APART * max(1, before) and run.end["active"] > 0.1:
        evidence += [
            f"a stranger is {after:.2f} times as far as the same person (medians), "
            f"{before:.2f} at the start",
            f"loss {run.loss.iloc[0]:.3f} → {run.loss_at_end:.3f}",
        ]
    if not evidence:
        return None
    data = (
        "the labels and images (00_explore_data): do the pictures of one identity show one person?"
    )
    rate = f"learning rate (now lr = {run.recipe.lr:g}; {GOOD_RATE:g} is a good first one)."
    return Finding(
        "not learning",
        says,
        "; ".join(evidence),
        f"A higher {rate} Then look at {data}"
        if run.recipe.lr < GOOD_RATE / 10
        else f"Look at {data} Then the {rate}",
    )


# --- nothing left to learn, or too much


# Under the soft margin a triplet's gradient is about its loss, once that is small: 1 of 1000.
SOFT_IDLE = 1e-3


def too_easy(run: Watched) -> Finding | None:
    """Most batches of the last half of the run have no active triplet."""
    if len(run.history) < MIN_ROWS:
        return None
    half = run.history.iloc[len(run.history) // 2 :]
    soft = run.recipe.margin == "soft"
    idle = (half["loss"] < SOFT_IDLE) if soft else (half["active"] == 0)
    if idle.mean() <= 0.5:
        return None
    return Finding(
        "too easy",
        "No active triplets are left: most batches teach nothing any more.",
        f"{idle.sum()} of the {len(half)} batches logged since step {half['step'].iloc[0]:.0f} have "
        + (f"a loss below {SOFT_IDLE:g}" if soft else "no active triplet at all"),
        'loss="batch_hard"'
        if run.recipe.loss != "batch_hard"
        else "Stop here if the held-out scores are good. Or harder batches: a larger p, a larger "
        "margin, or erasing=0.5.",
    )


def margin_out_of_reach(run: Watched) -> Finding | None:
    """The margin asks for a distance that hardly two images have."""
    if run.recipe.margin == "soft" or len(run.history) < MIN_ROWS:
        return None
    margin, far = run.recipe.margin, run.end["negative_p95"]
    if margin <= far:
        return None
    return Finding(
        "margin out of reach",
        "The margin is larger than the distances between people, so every triplet is active, the "
        "learnt ones too.",
        f"margin {margin:g}; 95 % of the distances between identities are below {far:.2f} at the "
        f"end; active triplets {run.end['active']:.0%}",
        'A smaller margin (0.2 to 1), or margin="soft".',
    )


# Five points below the best is more than the noise of both scores.
MAP_FALLEN = 0.05


def overfitting(run: Watched) -> Finding | None:
    """Held-out scores fall while the loss falls."""
    scores = run.held_out
    if len(scores) < 3:
        return None
    best_step = scores.idxmax()
    late = scores[scores.index > scores.index[-1] * 2 / 3]
    late = late[late.index > best_step]
    loss = run.loss.groupby(run.history["step"] > best_step).median()
    if late.empty or scores.max() - late.mean() < MAP_FALLEN or loss[True] >= loss[False]:
        return None
    return Finding(
        "overfitting",
        "Retrieval of people that it never saw gets worse while the loss falls: it learns the "
        "training images by heart.",
        f"held-out mAP {scores.max():.1%} at step {best_step}, {scores.iloc[-1]:.1%} at the end; "
        f"loss {loss[False]:.3f} → {loss[True]:.3f} (medians before and after)",
        "Fewer steps (checkpoint_best.pt is the best network), more identities, or erasing=0.5.",
    )


# The loss of healthy runs whose schedule has ended is below 0.25 times the first one, and 0.3 to
# 0.55 times for the built-in data at 60 steps, where 400 give 25 points of mAP more.
LOSS_LEFT = 0.3
LOSS_FALLING = 0.9


def still_learning(run: Watched) -> Finding | None:
    """The run ended while it was still getting better.

    With held-out scores: the mean of the last third of the steps is above that of the third before
    by more than the noise. Without: the loss falls over the last half of the rows (Kendall's rank
    correlation with the step, one-sided, 1 %), by a tenth or more from one quarter to the next. A run
    whose learning rate has decayed has ended by design, unless its loss was falling before the decay
    and a large part of it is left.
    """
    rows, scores = run.history, run.held_out
    if len(rows) < MIN_ROWS:
        return None
    if rows["lr"].iloc[-1] < DECAYED * run.recipe.lr:
        learning = run.loss[run.learning]
        left = run.loss_at_end / max(run.loss.iloc[0], 1e-12)
        if left <= LOSS_LEFT or not falls(learning.iloc[len(learning) // 4 :]):
            return None
        evidence = (
            f"the loss fell until the rate decayed, and {left:.0%} of the first one is left: "
            f"{run.loss.iloc[0]:.3f} → {run.loss_at_end:.3f}"
        )
    elif len(scores) >= 3:
        third = scores.index[-1] / 3
        last = scores[scores.index > 2 * third].mean()
        middle = scores[(scores.index > third) & (scores.index <= 2 * third)].mean()
        if not last > middle + MAP_NOISE:
            return None
        evidence = (
            f"held-out mAP {middle:.1%} in the second third of the steps, {last:.1%} in the last"
        )
    else:
        half = run.loss.iloc[len(run.loss) // 2 :]
        one, two = half.iloc[: len(half) // 2].median(), half.iloc[len(half) // 2 :].median()
        if two > LOSS_FALLING * one or not falls(half):
            return None
        evidence = f"loss {one:.3f} → {two:.3f} from the third quarter of the steps to the last"
    return Finding(
        "still learning",
        "The run stopped while it was still getting better.",
        evidence
        + f"; learning rate {rows['lr'].iloc[-1]:.2g} at the end, {run.recipe.lr:g} at most",
        f"More steps: {2 * int(rows['step'].iloc[-1])} instead of {rows['step'].iloc[-1]:.0f}.",
    )


# bfloat16 keeps 8 bits: at 5 times the distance from the origin, rounding is 1 % of the distance.
# Healthy runs have 0.3 to 0.8.
FAR = 5.0


def far_from_origin(run: Watched) -> Finding | None:
    """The embeddings lie in a small cloud far from 0.

    Half the mean squared distance of two embeddings is their variance, so the centre c of the cloud
    follows from what is logged: ‖c‖² = norm² − D²/2, with D the median distance between identities.
    """
    end = run.end
    distance = run.plain(end["negative_p50"])
    centre = math.sqrt(max(0.0, end["norm"] ** 2 - distance**2 / 2))
    if centre <= FAR * distance:
        return None
    return Finding(
        "far from origin",
        "The embeddings lie in a small cloud far from the origin: in half precision their distances "
        "drown in rounding, and cosines say nothing.",
        f"the centre is {centre:.3g} from the origin, the median distance between identities "
        f"{distance:.3g}, {centre / max(distance, 1e-12):.0f} times less",
        "A lower learning rate; and subtract the mean of the embeddings before they are stored in "
        "half precision or compared by angle.",
    )


def too_short(run: Watched) -> Finding | None:
    """Too few rows are logged to judge a trend."""
    rows = run.history
    if len(rows) >= MIN_ROWS:
        return None
    return Finding(
        "too short",
        "Too few batches were logged to judge how the run went on.",
        f"{len(rows)} rows for {rows['step'].iloc[-1]:.0f} steps; trends need {MIN_ROWS}",
        f"More steps, or log_every={max(1, int(rows['step'].iloc[-1]) // (2 * MIN_ROWS))}.",
    )
