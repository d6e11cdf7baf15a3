"""The losses against loops written from their definitions, an independent library, and hazards."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from torch.utils._python_dispatch import TorchDispatchMode

from reidlib.training.losses import (
    LOSSES,
    batch_all,
    batch_hard,
    diagnostics,
    pairwise_distance,
    random_triplet,
)

MARGINS = [0, 0.2, 1.0, "soft"]
each_loss = pytest.mark.parametrize("name", LOSSES)
each_mined = pytest.mark.parametrize("loss_fn", [batch_hard, batch_all])
each_margin = pytest.mark.parametrize("margin", MARGINS)
either_power = pytest.mark.parametrize("squared", [False, True])


same = torch.testing.assert_close


def gradient_of(loss, emb):
    return torch.autograd.grad(loss, emb)[0]


def draw_batch(seed, counts=None, dim=3, dtype=torch.float64):
    """A shuffled batch; without `counts` ragged, with identities of one image among them."""
    g = torch.Generator().manual_seed(seed)
    if counts is None:
        counts = [1] + torch.randint(1, 5, (3,), generator=g).tolist() + [2]
    pids = torch.repeat_interleave(torch.arange(len(counts)) * 7 + 3, torch.tensor(counts))
    # Identities as clouds that overlap in part: some triplets are easy, some are not.
    emb = torch.randn(len(counts), dim, generator=g, dtype=torch.float64)[pids // 7]
    emb = emb + 0.5 * torch.randn(emb.shape, generator=g, dtype=torch.float64)
    order = torch.randperm(len(pids), generator=g)
    return emb[order].to(dtype).requires_grad_(), pids[order]


# --- the definitions, as slow loops


def loop_distances(emb, pids, squared):
    """For each anchor the lists of its distances to positives and to negatives."""
    for a, pid in enumerate(pids.tolist()):
        to_positives, to_negatives = [], []
        for other, other_pid in enumerate(pids.tolist()):
            if other != a:
                d = ((emb[a] - emb[other]) ** 2).sum() ** (1 if squared else 0.5)
                (to_positives if other_pid == pid else to_negatives).append(d)
        yield to_positives, to_negatives


def loop_term(d_pos, d_neg, margin):
    """The loss of one triplet and whether it is active."""
    if margin == "soft":
        return torch.log1p(torch.exp(d_pos - d_neg)), bool(d_pos >= d_neg)
    term = margin + d_pos - d_neg
    return (term, True) if term > 0 else (term * 0, False)


def loop_batch_hard(emb, pids, margin, squared):
    """For each anchor a list of one (term, active), or of none if it lacks either."""
    return [
        [loop_term(max(to_pos), min(to_neg), margin)] if to_pos and to_neg else []
        for to_pos, to_neg in loop_distances(emb, pids, squared)
    ]


def loop_batch_all(emb, pids, margin, squared):
    """A list of (term, active) an anchor."""
    return [
        [loop_term(d_pos, d_neg, margin) for d_pos in to_pos for d_neg in to_neg]
        for to_pos, to_neg in loop_distances(emb, pids, squared)
    ]


def loop_mean(terms, mean):
    """Mean of [(term, active), …] over those above zero, or over all of them."""
    terms = [term for term, _ in terms if mean == "valid" or term > 0]
    return sum(terms) / len(terms) if terms else torch.tensor(0.0)


def metric_learning(emb, pids, margin, squared, mined, mean):
    """The loss of pytorch-metric-learning, an independent oracle."""
    distance = LpDistance(normalize_embeddings=False, p=2, power=2 if squared else 1)
    loss = TripletMarginLoss(
        # Its smooth loss is softplus(margin + gap): ours has no margin inside.
        margin=0 if margin == "soft" else margin,
        smooth_loss=margin == "soft",
        distance=distance,
        reducer=MeanReducer() if mean == "valid" else AvgNonZeroReducer(),
    )
    return loss(emb, pids, BatchHardMiner(distance=distance)(emb, pids) if mined else None)


CASES = {
    "hard": (batch_hard, loop_batch_hard, {}, "valid"),
    "all-active": (batch_all, loop_batch_all, {}, "active"),  # the default
    "all-valid": (batch_all, loop_batch_all, {"mean": "valid"}, "valid"),
}


@pytest.mark.parametrize("case", CASES)
@either_power
@each_margin
def test_equals_the_loop_and_metric_learning_in_values_and_gradients(case, margin, squared):
    loss_fn, loop, options, mean = CASES[case]
    seen, seen_active = 0, 0
    for seed in range(8):
        emb, pids = draw_batch(seed)
        result = loss_fn(emb, pids, margin, squared=squared, **options)
        terms = loop(emb, pids, margin, squared)
        flat = [term for anchor in terms for term in anchor]
        assert result.loss > 0
        gradient = gradient_of(result.loss, emb)
        theirs = metric_learning(emb, pids, margin, squared, case == "hard", mean)
        for expected in (loop_mean(flat, mean), theirs):
            same(result.loss, expected)
            same(gradient, gradient_of(expected, emb))
        assert result.triplets.item() == len(flat)
        active = sum(active for _, active in flat)
        assert result.active.item() == pytest.approx(active / len(flat))
        for value, anchor in zip(result.per_anchor, terms, strict=True):
            if anchor:
                same(value, loop_mean(anchor, mean).detach().double())
            else:
                assert value.isnan()
        seen, seen_active = seen + len(flat), seen_active + active
    # Nothing above compared 0 with 0 throughout, and nothing was active throughout.
    assert 0.05 * seen < seen_active < 0.95 * seen


@either_power
def test_distances_for_histograms_equal_the_loop(squared):
    emb, pids = draw_batch(0)
    result = batch_hard(emb, pids, 0.2, squared=squared)
    gaps = [*loop_distances(emb.detach(), pids, squared)]
    # In the loop each pair comes twice, once from either end.
    for values, which in ((result.positives, 0), (result.negatives, 1)):
        both_ends = torch.stack([d for gap in gaps for d in gap[which]])
        assert len(values) > 0
        same(values.repeat(2).sort().values, both_ends.sort().values)
    for a, (to_pos, to_neg) in enumerate(gaps):
        same(result.hardest_negative[a], min(to_neg))
        if to_pos:
            same(result.hardest_positive[a], max(to_pos))
        else:
            assert result.hardest_positive[a].isnan()


def test_pairwise_distance_of_two_sets():
    x, y = torch.randn(4, 5), torch.randn(3, 5)
    expected = torch.stack([torch.stack([(a - b).norm() for b in y]) for a in x])
    same(pairwise_distance(x, y), expected)
    same(pairwise_distance(x, y, squared=True), expected**2)
    assert pairwise_distance(x.half(), y.double()).dtype == torch.float64


# --- the random baseline


def test_random_triplet_draws_every_triplet_alike():
    emb, pids = draw_batch(2, counts=[3, 3, 1])
    terms = loop_batch_all(emb.detach(), pids, "soft", False)
    counts = [dict.fromkeys((round(t.item(), 9) for t, _ in anchor), 0) for anchor in terms]
    g = torch.Generator().manual_seed(0)
    draws = 800
    for _ in range(draws):
        result = random_triplet(emb.detach(), pids, "soft", generator=g)
        for value, count in zip(result.per_anchor.tolist(), counts, strict=True):
            if count:
                count[round(value, 9)] += 1  # KeyError if it is no triplet of this anchor
            else:
                assert math.isnan(value)
    assert result.triplets == 6
    for count in filter(None, counts):
        assert len(count) == 2 * 4  # two positives, four negatives
        assert all(draws / 8 * 0.6 < n < draws / 8 * 1.4 for n in count.values()), count


def test_random_triplet_follows_its_generator_and_has_gradients():
    emb, pids = draw_batch(2, counts=[4] * 6)
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = (random_triplet(emb, pids, 1.0, generator=g).loss for g in draws)
    assert first == again != other
    gradient = gradient_of(first, emb)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


# --- degenerate batches


@each_loss
@each_margin
@pytest.mark.parametrize("pids", [[5], [5, 5, 5], [1, 2, 3]], ids=["B=1", "one identity", "K=1"])
def test_no_triplets_gives_a_zero_that_backward_accepts(name, margin, pids):
    emb = torch.randn(len(pids), 4, requires_grad=True)
    result = LOSSES[name](emb, torch.tensor(pids), margin)
    result.loss.backward()
    assert result.loss == 0 and (emb.grad == 0).all()
    assert result.triplets == 0 and result.active == 0
    assert result.per_anchor.isnan().all()
    numbers = diagnostics(result)
    assert numbers["triplets"] == 0 and numbers["norm"] > 0
    assert math.isnan(numbers["positive_p50"]) == (len(set(pids)) == len(pids))
    assert math.isnan(numbers["hardest_negative"]) == (len(set(pids)) == 1)


@each_loss
@either_power
def test_collapsed_network_sits_at_the_margin_or_ln_2_with_finite_gradients(name, squared):
    pids = torch.arange(4).repeat_interleave(3)
    for margin, expected in ((0.2, 0.2), (1.0, 1.0), ("soft", math.log(2))):
        emb = torch.full((12, 4), 3.7, requires_grad=True)
        result = LOSSES[name](emb, pids, margin, squared=squared)
        result.loss.backward()
        assert result.loss.item() == pytest.approx(expected)
        assert result.active == 1
        assert (emb.grad == 0).all()  # a NaN would not be 0


@each_loss
@pytest.mark.parametrize("margin", [0.2, "soft"])
@either_power
def test_equal_embeddings_among_others_have_finite_gradients(name, margin, squared):
    emb, pids = draw_batch(3, counts=[4] * 4, dtype=torch.float32)
    emb = emb.detach()
    emb[1], emb[2] = emb[0], emb[pids != pids[0]][0]  # an equal pair, positive or negative
    emb.requires_grad_()
    LOSSES[name](emb, pids, margin, squared=squared).loss.backward()
    assert emb.grad.isfinite().all() and emb.grad.abs().sum() > 0


def test_no_active_triplet_is_a_zero_loss():
    emb = torch.tensor([[0.0], [0.1], [9.0], [9.1]], requires_grad=True)
    result = batch_all(emb, torch.tensor([0, 0, 1, 1]), 0.2)
    result.loss.backward()
    assert result.loss == 0 and result.active == 0 and result.triplets == 8
    assert (emb.grad == 0).all() and (result.per_anchor == 0).all()


@each_mined
def test_a_nan_embedding_is_not_hidden(loss_fn):
    emb, pids = draw_batch(0, counts=[4] * 4)
    emb = emb.detach()
    emb[5] = math.nan
    assert loss_fn(emb, pids, 0.2).loss.isnan()
    assert math.isnan(diagnostics(loss_fn(emb, pids, "soft"))["loss"])


def test_equally_hard_positives_and_negatives_share_the_gradient():
    emb = torch.tensor([[0.0], [-1.0], [1.0], [2.0], [-2.0]], requires_grad=True)
    result = batch_hard(emb, torch.tensor([0, 0, 0, 1, 2]), 2.0)
    assert result.per_anchor[0] == 1.0  # 2 + 1 − 2, whichever is taken
    gradient = gradient_of(result.loss, emb)
    same(gradient, -gradient[[0, 2, 1, 4, 3]])  # mirror images


# --- numerics: far from the origin, half precision, autocast


@each_mined
@pytest.mark.parametrize("margin", [20.0, "soft"])
def test_right_far_from_the_origin(loss_fn, margin):
    emb, pids = draw_batch(4, counts=[4] * 8, dim=128, dtype=torch.float32)
    far = (emb.detach() + 1e4).requires_grad_()
    exact = far.detach().double().requires_grad_()
    loss, expected = loss_fn(far, pids, margin).loss, loss_fn(exact, pids, margin).loss
    assert expected > 0
    same(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward(), expected.backward()
    same(far.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@each_mined
@each_margin
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss_fn, margin, dtype):
    emb, pids = draw_batch(5, counts=[4] * 8, dtype=dtype)
    lifted = emb.detach().float().requires_grad_()
    loss, expected = loss_fn(emb, pids, margin).loss, loss_fn(lifted, pids, margin).loss
    assert loss.dtype == torch.float32 and loss == expected > 0
    loss.backward(), expected.backward()
    assert emb.grad.dtype == dtype
    assert torch.equal(emb.grad, lifted.grad.to(dtype))  # rounded once, at the very end


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_autocast_changes_nothing(name, dtype):
    emb, pids = draw_batch(6, counts=[4] * 8, dtype=dtype)
    for margin in (1.0, "soft"):
        torch.manual_seed(0)
        expected = LOSSES[name](emb, pids, margin).loss
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[name](emb, pids, margin).loss
        assert loss.dtype == expected.dtype and loss == expected > 0


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@either_power
def test_soft_margin_is_finite_at_huge_distances(name, dtype, squared):
    # Gaps of +1e4 and −1e4 (squared: 1e8), more than exp can hold (squared: than float16 can).
    emb = torch.tensor([[-5e3], [5e3], [-5e3], [5e3]], dtype=dtype, requires_grad=True)
    for pids, wrong in (([0, 0, 1, 1], True), ([0, 1, 0, 1], False)):
        result = LOSSES[name](emb, torch.tensor(pids), "soft", squared=squared)
        assert result.loss.isfinite() and gradient_of(result.loss, emb).isfinite().all()
        if wrong:
            assert result.loss > (0 if name == "random" else 4e3)
        else:
            assert result.loss == 0 and result.active == 0 and result.triplets > 0


def test_soft_means_agree_even_where_float32_underflows():
    emb = torch.tensor([[0.0], [1.0], [2.0], [900.0], [901.0]])
    pids = torch.tensor([0, 0, 1, 2, 2])  # gaps from about 0 to −900: some losses underflow to 0
    active = batch_all(emb, pids, "soft", mean="active").loss
    assert active == batch_all(emb, pids, "soft", mean="valid").loss > 0


@each_loss
@each_margin
def test_total_is_the_sum_that_loss_is_the_mean_of(name, margin):
    emb, pids = draw_batch(0)
    result = LOSSES[name](emb, pids, margin)
    hinged = name == "batch_all" and margin != "soft"
    counted = result.triplets * (result.active if hinged else 1)
    assert counted > 1
    same(result.total, result.loss * counted.round())
    assert result.total.requires_grad


# --- order, types of identities, graph


@each_mined
@pytest.mark.parametrize("margin", [0.2, "soft"])
def test_order_of_the_batch_and_type_of_pids_do_not_matter(loss_fn, margin):
    emb, pids = draw_batch(7)
    result = loss_fn(emb, pids, margin)
    assert result.loss > 0
    gradient = gradient_of(result.loss, emb)
    order = torch.randperm(len(pids), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.int64, torch.int32, torch.uint8):
        shuffled = emb.detach()[order].requires_grad_()
        other = loss_fn(shuffled, pids[order].to(dtype), margin)
        same(other.loss, result.loss)
        same(other.per_anchor, result.per_anchor[order], equal_nan=True)
        same(gradient_of(other.loss, shuffled), gradient[order])


@each_loss
def test_only_the_loss_and_its_sum_carry_gradients(name):
    emb, pids = draw_batch(8)
    result = LOSSES[name](emb, pids, "soft")  # every triplet has some loss, whichever are drawn
    for field in result._fields:
        assert getattr(result, field).requires_grad == (field in ("loss", "total")), field
    for field in ("positives", "negatives", "hardest_positive", "hardest_negative"):
        assert not getattr(result, field).requires_grad, field
    diagnostics(result)
    assert emb.grad is None
    result.loss.backward()
    assert emb.grad.abs().sum() > 0


def test_diagnostics():
    emb = torch.tensor([[0.0], [1.0], [3.0], [3.5], [10.0]])
    numbers = diagnostics(batch_all(emb, torch.tensor([7, 7, 8, 8, 9]), 1.5))
    expected = {"loss": 0.5, "active": 1 / 12, "triplets": 12}
    expected |= {"positive_p5": 0.525, "positive_p50": 0.75, "positive_p95": 0.975}
    # Of 2, 2.5, 3, 3.5, 6.5, 7, 9 and 10.
    expected |= {"negative_p5": 2.175, "negative_p50": 5.0, "negative_p95": 9.65}
    expected |= {"hardest_positive": (1 + 1 + 0.5 + 0.5) / 4}
    expected |= {"hardest_negative": (3 + 2 + 2 + 2.5 + 6.5) / 5, "norm": 3.5}
    assert numbers == pytest.approx(expected)
    assert all(type(value) is float for value in numbers.values())


def test_same_input_same_bits():
    emb, pids = draw_batch(9, counts=[4] * 64, dim=16, dtype=torch.float32)
    for loss_fn in (batch_hard, batch_all):
        gradients = [gradient_of(loss_fn(emb, pids, 1.0).loss, emb) for _ in range(4)]
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# --- memory


class Allocations(TorchDispatchMode):
    """Sees every tensor that is made, in the forward and the backward pass."""

    largest = total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return out


@pytest.mark.parametrize("margin", [0.2, "soft"])
def test_memory_of_batch_all_follows_pairs_times_batch(margin):
    emb, pids = draw_batch(0, counts=[4] * 12 + [7, 1, 1])
    pairs = 12 * 4 * 3 + 7 * 6
    with Allocations() as seen:
        batch_all(emb, pids, margin).loss.backward()
    assert seen.largest == pairs * len(pids)
    # All that is ever made, freed or not: 1024 images need less than 300 MiB, where B³ is 4 GiB.
    assert seen.total < 25 * pairs * len(pids)


# --- errors

EMB, PIDS = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("emb", "pids", "margin", "error", "match"),
    [
        (EMB[0], PIDS, 0.2, ValueError, "emb has shape"),
        (EMB[:0], PIDS[:0], 0.2, ValueError, "emb has shape"),
        (EMB.long(), PIDS, 0.2, TypeError, "floating-point"),
        (EMB, PIDS[:3], 0.2, ValueError, "one identity a row"),
        (EMB, PIDS[:, None], 0.2, ValueError, "one identity a row"),
        (EMB, PIDS.to("meta"), 0.2, ValueError, "on its device"),
        (EMB, PIDS.float(), 0.2, TypeError, "integers"),
        (EMB, PIDS.bool(), 0.2, TypeError, "integers"),
        (EMB, PIDS.tolist(), 0.2, TypeError, "integers, not list"),
        (EMB, PIDS, -0.1, ValueError, "margin"),
        (EMB, PIDS, math.nan, ValueError, "margin"),
        (EMB, PIDS, math.inf, ValueError, "margin"),
        (EMB, PIDS, "softplus", ValueError, "margin.*softplus"),
        (EMB, PIDS, None, ValueError, "margin"),
    ],
)
def test_wrong_input_says_what_is_wrong(emb, pids, margin, error, match):
    with pytest.raises(error, match=match):
        batch_hard(emb, pids, margin)


def test_wrong_options():
    for loss_fn in LOSSES.values():
        with pytest.raises(ValueError, match="emb has shape"):
            loss_fn(EMB[0], PIDS, 0.2)
    with pytest.raises(ValueError, match="mean"):
        batch_all(EMB, PIDS, 0.2, mean="all")
    with pytest.raises(ValueError, match="one D"):
        pairwise_distance(EMB, EMB[:, :1])
    with pytest.raises(TypeError, match="floating-point"):
        pairwise_distance(EMB, PIDS[:, None])
