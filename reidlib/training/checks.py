"""What can be wrong with a training: one function a check.

A check takes what is `Watched` and returns None, or three sentences: what happened, the numbers that
show it, and what to try first. To add one, write such a function and add it to `CHECKS`; its name, with
spaces, is the finding's.

Thresholds were set so that all four variants and random triplets, on the built-in data for 60 to 400
steps and on Market-1501, are healthy; the numbers of those runs stand beside the thresholds.
"""

import math
from contextlib import suppress

from reidlib.extras import own_normalisation
from reidlib.recipes import bare
from reidlib.training.watched import MIN_ROWS, Watched, falls, stretch
from reidlib.words import some

Sentences = tuple[str, str, str] | None

# The learning rate is as good as 0 below this share of the recipe's: the schedule has ended.
DECAYED = 0.05
# A held-out mAP is a mean over some 50 to 300 queries; two scores of one network differ by so much.
MAP_NOISE = 0.02
# That of fewer people is moved by more, and is near 1 before any training.
FEW_PEOPLE = 10
# TriNet's rate for Adam, and that of most recipes since.
GOOD_RATE = 3e-4
# Below 2 P identities each batch shows more than half of all people: an anchor meets the same
# strangers at nearly every step. (Market-1501 with P = 18 has 42 P, the built-in data 7 P.)
MIN_BATCHES_OF_IDENTITIES = 2
# Of Market-1501's identities 2 % have fewer than K = 4 images.
MAX_SHORT_IDENTITIES = 0.2
# No healthy run's logged loss was above 1.1 times the first one; large steps take it beyond 10.
LOSS_GROWN = 3.0
# Where it ends, the loss of healthy runs is a twentieth to a half of the first one.
LOSS_ENDED_HIGHER = 1.25
# Norms of healthy runs grow to 3.5 times the first one.
NORM_GROWN = 30.0
# Distances that are a tenth of what the loss asks for leave it within a tenth of its value at 0.
COLLAPSED = 0.1
# Of healthy runs, the median distance between identities ends at 4 times what the loss asks for or
# more. The run market1501_batchhard_softplus_erasing fell from 5.4 to 0.9, stayed with a loss of
# ln 2, and scored 22 points of mAP lower than the same without erasing.
SHRUNK = 0.25
NEAR_COLLAPSED_LOSS = 0.85
# A network that learns puts strangers 1.4 (60 steps) to 2.9 times as far as the same person.
MOVED_APART = 1.1
# Under the soft margin a triplet's gradient is about its loss, once that is small: 1 of 1000.
SOFT_IDLE = 1e-3
# Five points below the best is more than the noise of both scores.
MAP_FALLEN = 0.05
# The loss of healthy runs whose schedule has ended is below 0.25 times the first one, and 0.3 to
# 0.55 times for the built-in data at 60 steps, where 400 give 25 points of mAP more.
LOSS_LEFT = 0.3
LOSS_FALLING = 0.9
# bfloat16 keeps 8 bits: at 5 times the distance from the origin, rounding is 1 % of the distance.
# Healthy runs have 0.3 to 0.8.
FAR = 5.0


def weights_did_not_load(run: Watched) -> Sentences:
    """The backbone was to start from a file of weights, and some of its layers are as made."""
    if run.fresh:
        return (
            f"Layers of the backbone have no weights of {bare(run.recipe.weights)!r}.",
            f"{len(run.fresh)} BatchNorm layers are as PyTorch makes them: {some(run.fresh, 4)}",
            'Take the file from its source again, or weights="imagenet"; "none" starts from random ones.',
        )


def wrong_normalisation(run: Watched) -> Sentences:
    """Pretrained weights expect the pixels that they were trained on."""
    weights, normalise = run.recipe.weights, run.recipe.normalise
    own = normalise
    with suppress(RuntimeError):  # where timm is no longer there to be asked
        own = own_normalisation(run.recipe.backbone)
    if weights != "none" and normalise != own:
        return (
            f"The backbone's weights expect pixels of {own}'s mean and deviation, and get others.",
            f'normalise = "{normalise}" with weights = {bare(weights)!r}',
            f'normalise="{own}"',
        )


def no_margin(run: Watched) -> Sentences:
    """A hinge with margin 0 asks for nothing that one point for all images does not give."""
    if run.recipe.margin == 0:
        return (
            "With a margin of 0 nothing pushes people apart: one point for all images has no loss.",
            "margin = 0, so a collapsed network sits at a loss of 0, where one that has learnt all does",
            'margin=0.2 to 1, or margin="soft".',
        )


def too_few_identities(run: Watched) -> Sentences:
    """P × K batches want many identities, with K images each."""
    p, k, identities, short = run.recipe.p, run.recipe.k, run.identities, run.short
    advice = []
    if identities < MIN_BATCHES_OF_IDENTITIES * p:
        fewer = max(2, identities // 4)
        advice.append(f"p={fewer}, or more identities." if fewer < p else "More identities.")
    if short > MAX_SHORT_IDENTITIES * identities:
        advice.append("A smaller k, or leave out people with few images.")
    if advice:
        return (
            "The data is small for batches of P × K: they show the same people or images again and again.",
            f"P = {p} of {identities} identities; {short} have fewer than K = {k} images",
            f"{' '.join(advice)} Trust held-out scores only.",
        )


def diverging(run: Watched) -> Sentences:
    """The loss or the embeddings grow out of bounds."""
    recipe, loss, norm, steps = run.recipe, run.loss, run.history["norm"], run.history["step"]
    advice = f"A lower learning rate: {min(GOOD_RATE, recipe.lr / 10):g} (now lr = {recipe.lr:g})"
    advice += ', or precision="float32"' if recipe.precision == "bfloat16" else ""
    advice += ", or squared=False." if recipe.squared else "."
    evidence = (
        f"loss {loss.iloc[0]:.3g} → {loss.iloc[-1]:.3g}, at most {loss.max():.3g}; embedding norm "
        f"{norm.iloc[0]:.3g} → {norm.iloc[-1]:.3g}, at most {norm.max():.3g}"
    )
    if run.failed:
        if loss.isna().all():
            evidence = "it was the first step, before any weight had changed"
            advice = "Look at what goes in: the file of weights, and the images (00_explore_data)."
        return f"{run.failed} became NaN or infinite, so training stopped.", evidence, advice
    high, high_norm = max(loss.iloc[0], recipe.collapsed_loss), max(norm.iloc[0], 1.0)
    grown = {"loss": loss > LOSS_GROWN * high, "embedding norm": norm > NORM_GROWN * high_norm}
    for name, too_high in grown.items():
        if found := stretch(too_high, steps):
            over = "has" if found[1] == steps.iloc[-1] else "had for a while"
            evidence = f"{evidence}; too high from step {found[0]} to {found[1]}"
            return f"The {name} {over} grown far beyond where it began.", evidence, advice
    if run.shows_trends and run.loss_at_end > LOSS_ENDED_HIGHER * high:
        evidence = f"{evidence}; median loss of the last quarter {run.loss_at_end:.3g}"
        return "The loss ended higher than it began.", evidence, advice


def collapsed(run: Watched) -> Sentences:
    """All embeddings are nearly equal, at the end or for a while.

    So it is when, in two logged batches in a row, even the largest distances between identities
    (95th percentile) are below a tenth of the margin; of 1 for the soft margin, and margins above 1.
    """
    far, steps = run.history["negative_p95"], run.history["step"]
    found = stretch(far < COLLAPSED * run.asked, steps)
    if not found:
        return None
    says = "has collapsed: it maps all images to nearly one point."
    if found[1] != steps.iloc[-1]:
        says = "had collapsed for a while, and has left it."
    advice = 'A lower learning rate, loss="batch_all", or more steps. Then look at the labels.'
    if found[0] == steps.iloc[0]:
        advice = "Look at the images and any file of weights: black pictures do this, and zeros."
    return (
        f"The network {says}",
        f"from step {found[0]} to {found[1]}, 95 % of the distances between identities were at most "
        f"{far[steps.between(*found)].max():.2g}; the loss ended at {run.loss.iloc[-1]:.3f}, where a "
        f"collapsed network sits at {run.recipe.collapsed_loss:.3f}",
        f"{advice} (00_explore_data shows images and labels.)",
    )


def near_collapse(run: Watched) -> Sentences:
    """Distances have shrunk below what the loss asks for, and it sits where a collapsed one does."""
    start, end = run.start["negative_p50"], run.end["negative_p50"]
    floor = run.recipe.collapsed_loss
    near = end < run.asked and end < SHRUNK * start
    if run.shows_trends and near and run.loss_at_end > NEAR_COLLAPSED_LOSS * floor:
        return (
            "The network has drawn all images together, and its loss sits where a collapsed one's does.",
            f"median distance between identities {start:.2f} → {end:.2f}; loss {run.loss_at_end:.3f} at "
            f"the end, collapsed: {floor:.3f}; active triplets {run.end['active']:.0%}",
            'A lower learning rate, loss="batch_all", less augmentation, or a rate that decays later.',
        )


def not_learning(run: Watched) -> Sentences:
    """Strangers are no farther than before training, or are not found any better."""
    evidence, best, before, after = [], run.held_out.max(), run.apart(run.start), run.apart(run.end)
    few = run.recipe.hold_out in range(1, FEW_PEOPLE)
    if best < run.before + MAP_NOISE and not few:
        evidence.append(f"held-out mAP {run.before:.1%} before training, {best:.1%} at best")
    if after < MOVED_APART * max(1, before) and run.end["active"] > 0.1:
        apart = f"{before:.2f} → {after:.2f} times as far as the same person (medians)"
        evidence.append(f"strangers {apart}; loss {run.loss.iloc[0]:.3f} → {run.loss_at_end:.3f}")
    if run.shows_trends and evidence:
        return (
            "The network tells people apart no better than before training.",
            "; ".join(evidence),
            f"A higher learning rate (now lr = {run.recipe.lr:g}; {GOOD_RATE:g} is a good first one)."
            if run.recipe.lr < GOOD_RATE / 10
            else "Look at the labels and images (00_explore_data): does each identity show one person?",
        )


def too_easy(run: Watched) -> Sentences:
    """Most batches of the last half of the run have no active triplet."""
    half = run.history.iloc[len(run.history) // 2 :]
    soft = run.recipe.margin == "soft"
    idle = (half["loss"] < SOFT_IDLE) if soft else (half["active"] == 0)
    have = f"a loss below {SOFT_IDLE:g}" if soft else "no active triplet at all"
    advice = (
        "Stop here if held-out scores are good. Or a larger p, a larger margin, or erasing=0.5."
    )
    if run.shows_trends and idle.mean() > 0.5:
        return (
            "No active triplets are left: most batches teach nothing any more.",
            f"{idle.sum()} of the {len(half)} batches logged since step {half['step'].iloc[0]} have {have}",
            advice if run.recipe.loss == "batch_hard" else 'loss="batch_hard"',
        )


def margin_out_of_reach(run: Watched) -> Sentences:
    """The margin asks for a distance that hardly two images have."""
    margin, far = run.recipe.margin, run.end["negative_p95"]
    if run.shows_trends and margin != "soft" and margin > far:
        return (
            "The margin is larger than distances between people: every triplet is active, learnt ones too.",
            f"margin {margin:g}; 95 % of the distances between identities end below {far:.2f}; active "
            f"triplets {run.end['active']:.0%}",
            'A smaller margin (0.2 to 1), or margin="soft".',
        )


def overfitting(run: Watched) -> Sentences:
    """Held-out scores fall while the loss falls."""
    scores = run.held_out
    if len(scores) < 3:
        return None
    best = scores.idxmax()
    late = scores[scores.index > max(best, scores.index[-1] * 2 / 3)]
    loss = run.loss.groupby(run.history["step"] > best).median()
    if not late.empty and scores.max() - late.mean() >= MAP_FALLEN and loss[True] < loss[False]:
        return (
            "It learns the training images by heart: people it never saw are found less and less well.",
            f"held-out mAP {scores.max():.1%} at step {best}, {scores.iloc[-1]:.1%} at the end; median loss "
            f"{loss[False]:.3f} up to then, {loss[True]:.3f} since",
            "Fewer steps (checkpoint_best.pt is the best network), more identities, or erasing=0.5.",
        )


def still_learning(run: Watched) -> Sentences:
    """The run ended while it was still getting better.

    With held-out scores: the mean of the last third of the steps is above that of the third before
    by more than the noise. Without: the loss falls over the last half of the rows, by a tenth or more
    from one quarter to the next. A run whose learning rate has decayed has ended by design, unless its
    loss was falling before the decay and a large part of it is left.
    """
    lr, loss, scores, step = run.history["lr"], run.loss, run.held_out, run.history["step"].iloc[-1]
    if lr.iloc[-1] < DECAYED * run.recipe.lr:
        before = loss[lr > 0.5 * run.recipe.lr]
        left = run.loss_at_end / max(loss.iloc[0], 1e-12)
        better = left > LOSS_LEFT and falls(before.iloc[len(before) // 4 :])
        evidence = f"the loss fell until the rate decayed, and {left:.0%} of the first one is left"
    elif len(scores) >= 3:
        third = scores.index[-1] / 3
        last = scores[scores.index > 2 * third].mean()
        middle = scores[(scores.index > third) & (scores.index <= 2 * third)].mean()
        better = last > middle + MAP_NOISE
        evidence = f"held-out mAP {middle:.1%} in the second third of steps, {last:.1%} in the last"
    else:
        half = loss.iloc[len(loss) // 2 :]
        one, two = half.iloc[: len(half) // 2].median(), half.iloc[len(half) // 2 :].median()
        better = two <= LOSS_FALLING * one and falls(half)
        evidence = f"loss {one:.3f} → {two:.3f} from the third quarter of the steps to the last"
    if run.shows_trends and better:
        return (
            "The run stopped while it was still getting better.",
            f"{evidence}; learning rate {lr.iloc[-1]:.2g} at the end, {run.recipe.lr:g} at most",
            f"More steps: {2 * step} instead of {step}.",
        )


def far_from_origin(run: Watched) -> Sentences:
    """The embeddings lie in a small cloud far from 0.

    Half the mean squared distance of two embeddings is their variance, so the centre c of the cloud
    follows from what is logged: ‖c‖² = norm² − D²/2, with D the median distance between identities.
    """
    distance = run.plain(run.end["negative_p50"])
    centre = math.sqrt(max(0.0, run.end["norm"] ** 2 - distance**2 / 2))
    if centre > FAR * distance:
        return (
            "The embeddings lie in a small cloud far from the origin: half precision and cosines blur it.",
            f"their centre is {centre:.3g} from the origin, their median distance {distance:.3g}",
            "A lower learning rate; and subtract the embeddings' mean before you store or compare them.",
        )


def too_short(run: Watched) -> Sentences:
    """Too few rows are logged to judge a trend."""
    rows, step = len(run.history), run.history["step"].iloc[-1]
    if not run.shows_trends:
        return (
            "Too few batches were logged to judge how the run went on.",
            f"{rows} rows for {step} steps; trends need {MIN_ROWS}",
            f"More steps, or log_every={max(1, step // (2 * MIN_ROWS))}.",
        )


# Worth a line as soon as they are seen: the rest of the run is lost time.
AT_ONCE = (weights_did_not_load, wrong_normalisation, no_margin)
AT_ONCE += (too_few_identities, diverging, collapsed)
# Of a run that was stopped or killed on its way; the others ask how it ended.
UNDER_WAY = (*AT_ONCE, near_collapse)
CHECKS = (*UNDER_WAY, not_learning, margin_out_of_reach, too_easy, overfitting)
CHECKS += (still_learning, far_from_origin, too_short)
