"""Triplet losses: pairwise distances, batch-hard, batch-all, a random baseline, and diagnostics.

A batch has embeddings e (B, D) and identities y (B,). With D(i, j) = ‖eᵢ − eⱼ‖₂, a *triplet* is an
anchor a, a positive p (p ≠ a, same identity) and a negative n (another identity). Its *gap* is

    g = D(a, p) − D(a, n),        wanted: far below zero

and its loss is max(0, m + g) for a margin m, or softplus(g) = ln(1 + exp g) for the margin "soft".
The three losses differ only in the triplets they take:

- `batch_hard`: one an anchor, its farthest positive and its nearest negative;
- `batch_all`: every triplet in the batch;
- `random_triplet`: one an anchor, drawn at random. The baseline that shows why mining matters.

One device, written once: what is no positive lies at distance −∞ and what is no negative at +∞.
A masked triplet then has the gap −∞, where hinge and softplus are both exactly 0, with gradient 0.
(Multiplying the *gap* by a 0/1 mask would leave softplus(0) = ln 2 in the loss for each of them.)

Source: Hermans, Beyer and Leibe, "In Defense of the Triplet Loss for Person Re-Identification",
arXiv 1703.07737. Batch-hard is its L_BH, batch-all its L_BA and L_BA≠0.
"""

import math
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

INF = float("inf")
Margin = float | Literal["soft"]


def pairwise_distance(x: Tensor, y: Tensor | None = None, squared: bool = False) -> Tensor:
    """Return Euclidean distances of embeddings, or their squares: (B, D), (C, D) -> (B, C).

    By default `y` is `x`. Half precision is lifted to float32, also under autocast; float64 stays. The
    gradient where two embeddings are equal is 0.

    Raises:
        TypeError: integers.
        ValueError: shapes that do not fit.

    >>> pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    y = x if y is None else y
    if not (x.is_floating_point() and y.is_floating_point()):
        raise TypeError(f"Embeddings are floating-point tensors, not {x.dtype} and {y.dtype}.")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"Embeddings have shape (B, D) and (C, D) with one D, not {shapes}.")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    # Lifted once, so that the two gradients of cdist(x, x) are added before they are rounded.
    lifted = x.to(dtype)
    y = lifted if y is x else y.to(dtype)
    # Not the expanded form ‖x‖² − 2x·y + ‖y‖², which is a fast matrix product: it subtracts large
    # numbers to find a small one, so far from the origin every digit is lost; where x = y, rounding
    # leaves it anywhere around 0, and the square root's slope there is infinite.
    with torch.autocast(x.device.type, enabled=False):
        # (B, D), (C, D) -> (B, C)
        distances = torch.cdist(lifted, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.square() if squared else distances


class TripletLoss(NamedTuple):
    """A loss and what comes free with it; only `loss` and `total` have a gradient. On the device.

    The properties are computed when asked for; `diagnostics` makes plain floats of them and of the
    fields. Distances are squared if the loss was asked for that.
    """

    loss: Tensor  # () to call `backward` on. An exact 0, still part of the graph, if no triplets
    total: Tensor  # () the sum that `loss` is the mean of
    counted: Tensor  # () int64, over how many triplets; 0 if there are none
    # (A,) mean loss of each anchor over the triplets that `loss` counts; NaN if it has none at all,
    # 0 if it has some and none of them is counted
    per_anchor: Tensor
    triplets: Tensor  # () int64, how many: anchors for batch-hard and random, all (a, p, n) else
    # () share of them that is active, 0 to 1; 0 if there are none. For a margin m: loss > 0. For
    # "soft", where every triplet has some loss: gap ≥ 0, the negative is no farther than the positive,
    # which is where the loss is ln 2 or more. A collapsed network shows 1 in both cases (m > 0).
    active: Tensor
    distances: Tensor  # (A, B) from anchors to all images, that the loss was computed from
    anchors: Tensor  # (A,) int64, which images are anchors; all of them unless the loss was asked
    pids: Tensor  # (B,) the identities
    norms: Tensor  # (B,) the Euclidean norms of the embeddings

    @property
    def positives(self) -> Tensor:
        """(pairs,) distances within identities, each pair once, none to itself."""
        return self.distances[_shares_identity(self.pids, self.anchors) & self._once]

    @property
    def negatives(self) -> Tensor:
        """(pairs,) distances between identities, each pair once."""
        return self.distances[~_shares_identity(self.pids, self.anchors) & self._once]

    @property
    def _once(self) -> Tensor:
        """(A, B), true where the image stands behind the anchor: each pair has one such place."""
        return self.anchors[:, None] < torch.arange(len(self.pids), device=self.pids.device)

    @property
    def hardest_positive(self) -> Tensor:
        """(A,) each anchor's largest distance to a positive; NaN if it has none."""
        hardest = _to_positives(self.distances, self.pids, self.anchors).amax(dim=1)
        return hardest.masked_fill(hardest == -INF, math.nan)

    @property
    def hardest_negative(self) -> Tensor:
        """(A,) each anchor's smallest distance to a negative; NaN if it has none."""
        hardest = _to_negatives(self.distances, self.pids, self.anchors).amin(dim=1)
        return hardest.masked_fill(hardest == INF, math.nan)


def batch_hard(
    emb: Tensor,
    pids: Tensor,
    margin: Margin,
    *,
    squared: bool = False,
    anchors: Tensor | None = None,
) -> TripletLoss:
    """Batch-hard: each anchor with its farthest positive and its nearest negative.

    L_BH = mean of loss(max_p D(a, p) − min_n D(a, n)) over the anchors a that have both a positive and
    a negative (in a PK batch all). Those that are equally hard share the gradient.

    Args:
        emb: (B, D) embeddings, floating point, B ≥ 1.
        pids: (B,) their identities, integers, on the same device.
        margin: a number ≥ 0, or "soft".
        squared: take squared distances.
        anchors: (A,) int64, the images that are anchors, against all; None: every image.

    Returns:
        If no anchor has both (B = 1, K = 1, one identity): loss 0 with gradient 0, and `triplets` 0.

    Raises:
        TypeError, ValueError: anything else.

    >>> emb = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    >>> result = batch_hard(emb, torch.tensor([7, 7, 8, 8]), margin=1.5)
    >>> result.per_anchor.tolist(), result.loss.item(), result.active.item()
    ([0.0, 0.5, 0.0, 0.0], 0.125, 0.25)
    """
    distances, anchors = _distances(emb, pids, margin, squared, anchors)
    # (A, B) -> (A,)
    positive = _to_positives(distances, pids, anchors).amax(dim=1)
    negative = _to_negatives(distances, pids, anchors).amin(dim=1)
    # (A,) -> (A, 1)
    gap = (positive - negative)[:, None]
    return _reduce(gap, None, margin, "valid", emb, pids, distances, anchors)


def batch_all(
    emb: Tensor,
    pids: Tensor,
    margin: Margin,
    *,
    squared: bool = False,
    anchors: Tensor | None = None,
    mean: str = "active",
) -> TripletLoss:
    """Batch-all: every triplet (a, p, n) of the batch.

    Time and memory follow the number of positive pairs times B: 3 B² for PK batches with K = 4, never
    B³. With a margin m, the mean over valid triplets is the mean over active ones times `active`.
    Under "soft" every loss is above zero, so the two means are the same number, although `active`
    counts less than all (see `TripletLoss`).

    Args:
        emb, pids, margin, squared, anchors: as in `batch_hard`, and so are errors and batches without
            triplets.
        mean: "valid": over all triplets, the paper's L_BA. "active": over those with a loss above
            zero, its L_BA≠0, and 0 if there are none. That is the default: late in training nearly all
            triplets are easy, and their zeros would wash out the few that still teach.

    >>> emb, pids = torch.tensor([[0.0], [1.0], [3.0], [3.5]]), torch.tensor([7, 7, 8, 8])
    >>> result = batch_all(emb, pids, margin=1.5)
    >>> result.triplets.item(), result.active.item(), result.loss.item()
    (8, 0.125, 0.5)
    >>> batch_all(emb, pids, margin=1.5, mean="valid").loss.item()
    0.0625
    """
    if mean not in ("active", "valid"):
        raise ValueError(f'mean is "active" or "valid", not {mean!r}.')
    distances, anchors = _distances(emb, pids, margin, squared, anchors)
    # (A, B) -> (pairs,), (pairs,): who is whose positive. Waits for the GPU, to count the pairs.
    row, positive = _is_positive(pids, anchors).nonzero(as_tuple=True)
    # (A, B) -> (pairs, B). index_select, not [row]: torch promises no fixed order for adding up
    # the gradient of the latter on a CPU. On CUDA, torch.use_deterministic_algorithms fixes it.
    negatives = _to_negatives(distances, pids, anchors).index_select(0, row)
    # (pairs,) -> (pairs, 1) -> (pairs, B)
    gap = distances[row, positive][:, None] - negatives
    return _reduce(gap, row, margin, mean, emb, pids, distances, anchors)


def random_triplet(
    emb: Tensor,
    pids: Tensor,
    margin: Margin,
    *,
    squared: bool = False,
    anchors: Tensor | None = None,
    generator=None,
) -> TripletLoss:
    """One random triplet an anchor: a positive and a negative, each drawn uniformly.

    Args:
        emb, pids, margin, squared, anchors: as in `batch_hard`, and so are errors and batches without
            triplets. An anchor draws the same triplet whichever others are anchors, too.
        generator: torch's, of the draws, on the device of `emb`; by default the global one.

    >>> emb, pids = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([7, 7, 8])
    >>> random_triplet(emb, pids, margin=1.0).triplets.item()  # the third has no positive
    2
    """
    distances, anchors = _distances(emb, pids, margin, squared, anchors)
    # The largest of uniform numbers is a uniform choice. One matrix serves both draws: an image is
    # never positive and negative at once, so they use different entries of it. (B, B) -> (A, B)
    draw = torch.rand(len(emb), len(emb), generator=generator, device=emb.device)
    draw = draw.index_select(0, anchors)
    # (A, B) -> (A, 1)
    positive = _to_positives(draw, pids, anchors).argmax(dim=1, keepdim=True)
    negative = _to_negatives(draw, pids, anchors).argmin(dim=1, keepdim=True)
    # Where there is nothing to draw from, the index means nothing, and the distance there is ∓∞.
    # (A, B) -> (A, 1)
    gap = _to_positives(distances, pids, anchors).gather(1, positive)
    gap = gap - _to_negatives(distances, pids, anchors).gather(1, negative)
    return _reduce(gap, None, margin, "valid", emb, pids, distances, anchors)


LOSSES = {"batch_all": batch_all, "batch_hard": batch_hard, "random": random_triplet}


def diagnostics(result: TripletLoss) -> dict[str, float]:
    """Return the numbers to watch while training, as plain floats. Waits for the GPU: not every step.

    `loss`, `active`, `triplets`; `positive_p5`, `_p50`, `_p95` and the same for `negative`, percentiles
    of the distances within and between identities; `hardest_positive` and `hardest_negative`, means
    over the anchors that have one; the mean `norm`. What a batch does not have is NaN.

    Healthy: the positive percentiles sink below the negative ones. Collapsed: all distances go to 0,
    active stays near 1, and the loss sits at the margin, or at ln 2 for "soft".
    """
    values = {"loss": result.loss, "active": result.active, "triplets": result.triplets}
    for name, distances in (("positive", result.positives), ("negative", result.negatives)):
        levels = distances.new_tensor([0.05, 0.5, 0.95])
        # (pairs,) -> (3,); quantile knows no empty input
        percentiles = distances.quantile(levels) if len(distances) else levels * math.nan
        values |= zip((f"{name}_p5", f"{name}_p50", f"{name}_p95"), percentiles, strict=True)
    values["hardest_positive"] = result.hardest_positive.nanmean()
    values["hardest_negative"] = result.hardest_negative.nanmean()
    values["norm"] = result.norms.mean()
    # One trip from the device for all of them.
    numbers = torch.stack([value.detach().double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def _distances(
    emb: Tensor, pids: Tensor, margin: Margin, squared: bool, anchors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, D) -> (A, B), and the anchors (A,), after a look at all that goes into a loss."""
    if emb.ndim != 2 or not len(emb):
        raise ValueError(f"emb has shape (B, D) with B ≥ 1, not {tuple(emb.shape)}.")
    if not isinstance(pids, Tensor) or pids.is_floating_point() or pids.dtype == torch.bool:
        kind = pids.dtype if isinstance(pids, Tensor) else type(pids).__name__
        raise TypeError(f"pids is a tensor of integers, not {kind}.")
    if pids.shape != emb.shape[:1] or pids.device != emb.device:
        raise ValueError(
            f"pids holds one identity a row of emb, on its device: expected shape ({len(emb)},) on "
            f"{emb.device}, not {tuple(pids.shape)} on {pids.device}."
        )
    if margin != "soft" and not (isinstance(margin, Real) and 0 <= margin < INF):
        raise ValueError(f'margin is a finite number ≥ 0 or "soft", not {margin!r}.')
    if anchors is None:
        return pairwise_distance(emb, squared=squared), torch.arange(len(emb), device=emb.device)
    # (B, D) -> (A, D); as in `batch_all`, in an order that is fixed
    return pairwise_distance(emb.index_select(0, anchors), emb, squared=squared), anchors


def _shares_identity(pids: Tensor, anchors: Tensor) -> Tensor:
    """(B,), (A,) -> (A, B), true where the column is an image of the anchor's identity, or itself."""
    return pids[anchors][:, None] == pids


def _is_positive(pids: Tensor, anchors: Tensor) -> Tensor:
    """(B,), (A,) -> (A, B), true where the column is another image of the anchor's identity."""
    itself = anchors[:, None] == torch.arange(len(pids), device=pids.device)
    return _shares_identity(pids, anchors) & ~itself


def _to_positives(distances: Tensor, pids: Tensor, anchors: Tensor) -> Tensor:
    """(A, B) distances, −∞ where the column is no positive of the anchor."""
    return distances.masked_fill(~_is_positive(pids, anchors), -INF)


def _to_negatives(distances: Tensor, pids: Tensor, anchors: Tensor) -> Tensor:
    """(A, B) distances, +∞ where the column is no negative of the anchor."""
    return distances.masked_fill(_shares_identity(pids, anchors), INF)


def _reduce(gap, row, margin, mean, emb, pids, distances, anchors) -> TripletLoss:
    """Turn gaps (R, N), −∞ where there is no triplet, into a loss.

    `row` (R,) says which of the anchors (A,) each line belongs to; None: line after line.
    """
    # (R, N) each: true where there is a triplet, its loss, true where it is active
    valid = ~gap.isneginf()
    soft = margin == "soft"
    terms = softplus(gap) if soft else (gap + margin).relu()
    active = (gap >= 0) & valid if soft else terms > 0
    # Under softplus every loss is above zero, even where float32 no longer shows it.
    counted = valid if mean == "valid" or soft else active
    total = terms.sum()

    def per_anchor(values: Tensor) -> Tensor:
        # (R, N) -> (R,) -> (A,)
        sums = values.detach().sum(dim=1)
        return sums if row is None else sums.new_zeros(len(anchors)).index_add(0, row, sums)

    means = per_anchor(terms) / per_anchor(counted).clamp(min=1)
    return TripletLoss(
        # At least 1: without triplets the sum is 0, part of the graph, and so is the loss.
        loss=total / counted.sum().clamp(min=1),
        total=total,
        counted=counted.sum(),
        per_anchor=means.masked_fill(per_anchor(valid) == 0, math.nan),
        triplets=valid.sum(),
        active=active.sum() / valid.sum().clamp(min=1),
        distances=distances.detach(),
        anchors=anchors,
        pids=pids,
        norms=torch.linalg.vector_norm(emb.detach(), dim=1, dtype=distances.dtype),
    )
