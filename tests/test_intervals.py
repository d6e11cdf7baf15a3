"""The paired comparison against loops, simulations in which the truth is known, and Holm's steps."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reidlib.evaluation.intervals import (
    Spread,
    confidence_interval,
    difference,
    holm,
    seed_spread,
    times_drawn,
)
from reidlib.evaluation.metrics import SCORES


def per_query(ap, pids, first_rank=None):
    """A per-query table; a query whose AP is NaN has no match."""
    ap = np.asarray(ap, dtype=float)
    table = pd.DataFrame({"query": np.arange(len(ap)), "pid": pids, "AP": ap, "AP_market": ap / 2})
    first_rank = np.where(np.isnan(ap), np.nan, 1) if first_rank is None else first_rank
    return table.assign(matches=2 * ~np.isnan(ap), first_rank=first_rank, INP=ap / 3)


def world(rng, rows=2, seeds=3, people=40):
    """Tables of rows that are equally good."""
    pids = np.repeat(np.arange(people), 3)

    def drawn(by_person, by_query):
        return rng.normal(0, by_person, people)[pids] + rng.normal(0, by_query, len(pids))

    hard, made = 0.6 + drawn(0.2, 0.15), []
    for _ in range(rows):
        likes = drawn(0.08, 0.05)
        noise = [rng.normal(0, 0.02) + rng.normal(0, 0.03, len(pids)) for _ in range(seeds)]
        made.append([per_query(hard + likes + some, pids) for some in noise])
    return made


def people(queries=60, seed=1):
    """A table of random scores, a query without match among it."""
    rng = np.random.default_rng(seed)
    ap = np.append(rng.random(queries - 1), np.nan)
    rank = np.append(rng.integers(1, 14, queries - 1), np.nan)
    return per_query(ap, rng.integers(1, 30, queries), rank)


def test_confidence_interval():
    table = people()
    interval = confidence_interval(table, repeats=500)
    assert list(interval.index) == list(SCORES)
    with_match = table.dropna()
    assert interval["value"]["mAP"] == pytest.approx(with_match["AP"].mean())
    assert interval["value"]["top5"] == pytest.approx((with_match["first_rank"] <= 5).mean())
    # Of a mean of n values: 1.96 standard errors on either side.
    half = 1.96 * with_match["AP"].std() / np.sqrt(59)
    assert (interval["value"] - interval["low"])["mAP"] == pytest.approx(half, rel=0.2)
    assert (interval["high"] - interval["value"])["mAP"] == pytest.approx(half, rel=0.2)
    pd.testing.assert_frame_equal(confidence_interval(table, repeats=500), interval)


def test_confidence_interval_draws_persons():
    # Two persons, one always found and one never: half of all draws hold one of them alone.
    pids, rank = [1] * 30 + [2] * 10, [1] * 30 + [3] * 10
    table = per_query(1 / np.array(rank), pids, rank)
    by_pid = confidence_interval(table, by="pid").loc["top1"]
    assert by_pid.tolist() == [0.75, 0, 1]
    by_query = confidence_interval(table).loc["top1"]
    assert 0.5 < by_query["low"] < by_query["high"] < 0.95


def test_paired_difference():
    a = people()
    b = a.assign(AP=a["AP"] - 0.01)  # every query a little worse: certain, though small
    gap = confidence_interval(a, versus=b)
    assert gap.loc["mAP"].to_numpy() == pytest.approx([0.01] * 3)
    assert (gap.loc["top1"] == 0).all()


def test_draws_are_those_of_released_intervals():
    rng = np.random.default_rng(5)
    for times in times_drawn(40, repeats=20, seed=5):
        np.testing.assert_array_equal(times, np.bincount(rng.integers(40, size=40), minlength=40))
    for times in times_drawn((3, 0, 5), repeats=20):  # two kinds, each drawn by itself
        assert times[:3].sum() == 3 and times[3:].sum() == 5


def test_difference_equals_the_formula_written_as_a_loop():
    rng = np.random.default_rng(0)
    pids = np.array([7, 7, 7, 3, 3, 5, 9, 9])
    first = [per_query(rng.random(8), pids) for _ in range(2)]
    second = [per_query(rng.random(8), pids) for _ in range(3)]
    found = difference(first, second, spread=Spread(0.03, 4))

    gaps = []
    for q in range(8):
        ours = sum(t["AP"][q] for t in first) / 2
        gaps.append(ours - sum(t["AP"][q] for t in second) / 3)
    mean = sum(gaps) / 8
    squares = sum(
        sum(g - mean for g, p in zip(gaps, pids, strict=True) if p == pid) ** 2 for pid in {*pids}
    )
    people = 4 / 3 * squares / 8**2
    seeds = 0.03**2 / 2 + 0.03**2 / 3
    freedom = (people + seeds) ** 2 / (people**2 / 3 + seeds**2 / 4)
    error = (people + seeds) ** 0.5
    reach, p = stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(abs(mean) / error, freedom)
    expected = (mean, mean - reach, mean + reach, p, people**0.5, seeds**0.5)
    assert found == pytest.approx(expected)
    assert difference(second, first, spread=Spread(0.03, 4)).value == pytest.approx(-mean)


def test_the_error_from_people_is_the_bootstrap_of_persons():
    rng = np.random.default_rng(1)
    one, other = world(rng, seeds=1, people=200)
    drawn = confidence_interval(one[0], versus=other[0], by="pid", repeats=4000).loc["mAP"]
    found = difference(one, other)
    assert found.people == pytest.approx((drawn["high"] - drawn["low"]) / 2 / 1.96, rel=0.05)
    # Queries of one person are alike: taken as independent they would promise too much.
    alone = [[t.assign(pid=t["query"]) for t in tables] for tables in (one, other)]
    assert difference(*alone).people < 0.8 * found.people


@pytest.mark.slow
def test_intervals_hold_the_truth_and_holm_claims_little_by_luck():
    rng = np.random.default_rng(2)
    inside, without_seeds, false, unadjusted = [], [], [], []
    for _ in range(200):
        rows = world(rng, rows=4)
        spread = seed_spread(dict(enumerate(rows)))
        found = [difference(rows[a], rows[b], spread=spread) for a in range(4) for b in range(a)]
        inside.append(found[0].low <= 0 <= found[0].high)
        blind = difference(rows[1], rows[0])
        without_seeds.append(blind.low <= 0 <= blind.high)
        p = np.array([d.p for d in found])
        unadjusted.append((p < 0.05).any())
        false.append((holm(p) < 0.05).any())
    assert 0.91 <= np.mean(inside) <= 0.985
    assert np.mean(without_seeds) < 0.91
    assert np.mean(false) <= 0.085 and np.mean(unadjusted) > 0.12


def test_queries_without_match_are_left_out():
    pids = [1, 1, 2, 3]
    one, two = ([per_query([ap, 0.5, 0.3, np.nan], pids)] for ap in (0.9, 0.6))
    assert difference(one, two).value == pytest.approx(0.1)
    same = difference(one, one)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_seed_spread_is_pooled_over_the_rows():
    pids = [1, 2]
    tables = {
        "a": [per_query([x, x], pids) for x in (0.1, 0.2, 0.3)],
        "b": [per_query([x, x], pids) for x in (0.5, 0.7)],
        "c": [per_query([0.9, 0.9], pids)],
    }
    spread = seed_spread(tables)
    # squares about the means: 0.01 + 0 + 0.01 and 0.01 + 0.01, over 2 + 1 degrees of freedom
    assert spread.deviation == pytest.approx((0.04 / 3) ** 0.5) and spread.freedom == 3
    alone = seed_spread({"c": tables["c"]})
    assert np.isnan(alone.deviation) and alone.freedom == 0
    blind, told = (difference(tables["a"], tables["b"], spread=s) for s in (None, alone))
    assert np.isnan(told.seeds) and told.p == blind.p


def test_holm_equals_its_definition():
    rng = np.random.default_rng(4)
    for _ in range(20):
        p = rng.random(7) ** 3
        steps = [min(1, (7 - place) * one) for place, one in enumerate(sorted(p))]
        expected = [max(steps[: sorted(p).index(one) + 1]) for one in p]
        assert holm(p) == pytest.approx(expected)
    assert holm([0.04, np.nan, 0.01]) == pytest.approx([0.04, np.nan, 0.02], nan_ok=True)
    assert len(holm([])) == 0


TABLE = per_query([0.1, 0.2], [1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: difference([], [TABLE]), "one seed at least"),
        (lambda: difference([TABLE], [TABLE.assign(pid=[1, 3])]), "same queries"),
        (lambda: difference([TABLE, TABLE.iloc[:1]], [TABLE]), "same queries"),
        (lambda: difference([TABLE.assign(pid=1)], [TABLE.assign(pid=1)]), "two people"),
        (lambda: confidence_interval(TABLE, versus=TABLE.iloc[:-1]), "same queries"),
        (lambda: confidence_interval(TABLE, repeats=0), "repeats must be 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_value_to_draw_from_has_no_interval():
    found = confidence_interval(TABLE.iloc[:1])
    assert found.loc["mAP", "value"] == 0.1 and found[["low", "high"]].isna().all(axis=None)
