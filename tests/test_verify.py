"""Verification against the definitions, written out as loops over plain Python lists."""

import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from conftest import problem, table
from reidlib.evaluation.pairs import halves, pair_distances
from reidlib.evaluation.retrieval import Retrieval
from reidlib.evaluation.verify import (
    FMRS,
    at_threshold,
    auc,
    camera_rates,
    equal_error_rate,
    match_probability,
    roc,
    roc_band,
    true_match_rate,
)

same = pd.testing.assert_frame_equal


def measure(query_emb, query, gallery_emb, gallery, **options):
    return pair_distances(Retrieval(query_emb, query, gallery_emb, gallery), **options)


def on_a_line(query, pids, gallery, gallery_pids, *camids, **options):
    """Pairs of people at positions on a line, where distances can be read off."""
    emb = (np.array(places, dtype=np.float64)[:, None] for places in (query, gallery))
    tables = map(table, (pids, gallery_pids), *camids)
    return measure(next(emb), next(tables), next(emb), next(tables), **options)


def oracle_pairs(query_emb, query, gallery_emb, gallery):
    """(genuine, impostor) lists of (distance, query row, gallery row), from the protocol."""
    by_camera = (query["camid"] >= 0).any() and (gallery["camid"] >= 0).any()
    genuine, impostor = [], []
    for i, asked in enumerate(query.itertuples()):
        for j, shown in enumerate(gallery.itertuples()):
            pair = math.dist(query_emb[i], gallery_emb[j]), i, j
            if shown.pid not in (-1, asked.pid):
                impostor.append(pair)
            if shown.pid != asked.pid or asked.path == shown.path:
                continue
            if not (by_camera and asked.camid == shown.camid):
                genuine.append(pair)
    return sorted(genuine), sorted(impostor)


def oracle_rates(genuine, impostor, fmr):
    """(threshold, TMR) by trying every distance there is, and all that lies between."""
    true, false = (np.array([d for d, *_ in group]) for group in (genuine, impostor))
    candidates = [t for d in {*true, *false} for t in (d, np.nextafter(d, -np.inf))]
    good = [t for t in candidates if np.count_nonzero(false <= t) <= fmr * len(false) + 1e-9]
    return max(good), np.count_nonzero(true <= max(good)) / len(true)


def measured(args):
    """The pairs, and the genuine and impostor ones of the loop."""
    return measure(*args), *oracle_pairs(*args)


TIES = pytest.mark.parametrize("ties", [False, True], ids=["reals", "ties"])


@pytest.mark.parametrize("cameras", [True, False], ids=["cameras", "unknown"])
@TIES
def test_pairs_are_those_of_the_protocol(ties, cameras):
    for seed in range(6):
        args = problem(seed, ties=ties, cameras=cameras)
        pairs, genuine, impostor = measured(args)
        for found, wanted in ((pairs.genuine, genuine), (pairs.impostor, impostor)):
            by_row = found.sort_values(["query", "gallery"])
            wanted = sorted(wanted, key=lambda pair: pair[1:])
            assert by_row[["query", "gallery"]].values.tolist() == [[i, j] for _, i, j in wanted]
            np.testing.assert_allclose(by_row["distance"], [d for d, *_ in wanted], atol=1e-12)
            assert found["distance"].is_monotonic_increasing
            for side, of_side in (("query", args[1]), ("gallery", args[3])):
                for column in ("pid", "camid"):
                    shown = of_side[column].iloc[found[side]]
                    assert found[f"{side}_{column}"].tolist() == shown.tolist()
                who = pairs.people["pid"].iloc[found[f"{side}_person"]]
                assert who.tolist() == found[f"{side}_pid"].tolist()
        strangers = pairs.impostor.query("gallery_pid == 0")
        assert strangers["gallery_person"].nunique() == pairs.distractors > 1
        assert (strangers.groupby("gallery")["gallery_person"].nunique() == 1).all()
        assert pairs.impostors == len(impostor) and math.isinf(pairs.limit)
        assert f"{len(genuine):,} genuine and {len(impostor):,} impostor pairs" in repr(pairs)


@TIES
def test_counts_and_curves_agree_with_scikit_learn(ties):
    for seed in range(8):
        pairs, genuine, impostor = measured(problem(seed, ties=ties))
        distances = np.array([d for d, *_ in genuine + impostor])
        is_genuine = np.repeat([1, 0], [len(genuine), len(impostor)])
        assert auc(pairs) == pytest.approx(roc_auc_score(is_genuine, -distances), abs=1e-12)

        curve = roc(pairs)
        fmr, tmr, _ = roc_curve(is_genuine, -distances, drop_intermediate=False)
        # FMR + TMR rises all along a curve; each of their points lies on ours, and ours on theirs
        ours, theirs = curve["FMR"] + curve["TMR"], fmr + tmr
        np.testing.assert_allclose(np.interp(theirs, ours, curve["FMR"]), fmr, atol=1e-12)
        np.testing.assert_allclose(np.interp(ours, theirs, fmr), curve["FMR"], atol=1e-12)
        assert all(curve[name].is_monotonic_increasing for name in curve)
        for row in curve.itertuples():  # a threshold gives what its row says
            for group, rate in ((pairs.impostor, row.FMR), (pairs.genuine, row.TMR)):
                assert (group["distance"] <= row.threshold).mean() == pytest.approx(rate)
        assert equal_error_rate(pairs) == pytest.approx(np.interp(1, theirs, fmr))


@pytest.mark.parametrize(
    ("gallery", "pids", "error", "area"),
    [
        # Genuine 1, 2, 5, 6; impostor 3, 4, 7, 8: at 4 half are wrong of both kinds.
        (range(1, 9), [1, 1, 2, 3, 1, 1, 4, 5], 0.5, 12 / 16),
        ([1, 2, 3], [1, 2, 2], 0, 1),  # all apart
        ([3, 2, 1], [1, 2, 2], 1, 0),  # all the wrong way round
        ([2, 2, 2], [1, 2, 3], 0.5, 0.5),  # all alike
    ],
)
def test_equal_error_rate_by_hand(gallery, pids, error, area):
    pairs = on_a_line([0], [1], gallery, pids)
    assert equal_error_rate(pairs) == error and auc(pairs) == area


@TIES
def test_true_match_rate_agrees_with_trying_every_threshold(ties):
    at = (0.003, 0.01, 0.05, 0.29, 0.5, 1.0)
    for seed in range(6):
        args = problem(seed, ties=ties)
        pairs, genuine, impostor = measured(args)
        found = true_match_rate(pairs, at)
        for fmr in at:
            threshold, tmr = oracle_rates(genuine, impostor, fmr)
            assert found.loc[fmr, "TMR"] == pytest.approx(tmr), fmr
            accepted = [(i, j) for d, i, j in impostor if d <= threshold]
            assert found.loc[fmr, "false_matches"] == len(accepted)
            if fmr < 1 and math.floor(fmr * len(impostor)):
                assert found.loc[fmr, "threshold"] == pytest.approx(threshold, abs=1e-9)
            people = set()
            for i, j in accepted:
                other = args[3]["pid"][j] or f"distractor {j}"
                people.add(frozenset([args[1]["pid"][i], other]))
            assert found.loc[fmr, "people_pairs"] == len(people)
        assert found["TMR"].nunique() > 2
        assert math.isinf(found.loc[1.0, "threshold"])


def test_a_rate_counts_pairs_and_one_below_a_single_pair_is_nan():
    pids = np.arange(2, 102)
    pairs = on_a_line([0, -0.5], [1, 1], [500, *pids], [1, *pids])
    assert 0.29 * 200 < 58, "floats do not count"
    found = true_match_rate(pairs, [0.0049, 0.005, 0.0099, 0.29], draws=20)
    assert found["false_matches"].tolist() == [0, 1, 1, 58]
    assert found.iloc[1:].notna().all(axis=None)
    assert found.iloc[0].drop(["false_matches", "people_pairs"]).isna().all()


@TIES
def test_nothing_depends_on_blocks_or_on_how_many_pairs_are_kept(ties):
    args = problem(5, ties=ties, queries=30, size=200)
    whole = measure(*args)
    fmr = 0.02
    allowed = int(fmr * whole.impostors)
    point = true_match_rate(whole, [fmr], draws=10)
    for keep, block in ((allowed, 1), (allowed + 1, 77), (20 * allowed, 1000), (10**6, 10**6)):
        pairs = measure(*args, keep=keep, block_pairs=block)
        same(pairs.genuine, whole.genuine)
        same(pairs.cameras, whole.cameras)
        same(pairs.impostor, whole.impostor.iloc[: len(pairs.impostor)])
        assert len(pairs.impostor) <= keep
        assert (whole.impostor["distance"] < pairs.limit).sum() == len(pairs.impostor)
        one = true_match_rate(pairs, [fmr])
        same(one, point[one.columns])
        if keep >= 20 * allowed:
            same(true_match_rate(pairs, [fmr], draws=10), point)
    # A draw that may need a pair that was not kept is refused, and every other is right.
    refused, some = 0, measure(*args, keep=int(1.3 * allowed))
    for seed in range(30):
        try:
            one = true_match_rate(some, [fmr], draws=1, seed=seed)
        except ValueError:
            refused += 1
        else:
            same(one, true_match_rate(whole, [fmr], draws=1, seed=seed))
    assert refused
    few, enough = measure(*args, keep=allowed - 1), measure(*args, keep=allowed)
    inside = np.nextafter(few.limit, 0)
    same(at_threshold(few, inside, draws=9), at_threshold(whole, inside, draws=9))
    for ask in (
        lambda: true_match_rate(few, [fmr]),
        lambda: true_match_rate(enough, [fmr], draws=50),
        lambda: at_threshold(few, few.limit),
    ):
        with pytest.raises(ValueError, match="a larger keep"):
            ask()


@pytest.mark.parametrize("keep", [2_000_000, 2000])
def test_the_band_of_a_curve_ends_where_pairs_were_not_kept(keep):
    pairs = measure(*problem(5, queries=60, size=300, people=60), keep=keep)
    assert pairs.impostors > 2000
    band = roc_band(pairs, draws=20, seed=1)
    most = min(1, 0.5 * len(pairs.impostor) / pairs.impostors)
    rates = {*np.geomspace(1 / pairs.impostors, most, 25), *FMRS}
    assert set(band.index) == {f for f in rates if f * pairs.impostors > 1 - 1e-9}
    assert band.index.max() == pytest.approx(most) and band.index.is_monotonic_increasing
    same(band, true_match_rate(pairs, band.index, draws=20, seed=1))


def resampled(genuine, impostor, query, gallery, times):
    """Pairs of a draw of people, by listing every copy; {person: how often}."""
    asked = [times[pid] for pid in query["pid"]]
    shown = [times.get(pid or f"distractor {row}") for row, pid in gallery["pid"].items()]
    drawn = [p for p in genuine for _ in range(asked[p[1]])]
    return drawn, [p for p in impostor for _ in range(asked[p[1]] * shown[p[2]])]


def drawn_times(args, seed, draws):
    """What the module says that it draws: identities and distractors apart."""
    pids = sorted({*args[1]["pid"], *args[3]["pid"]} - {0, -1})
    strangers = [f"distractor {row}" for row in np.flatnonzero(args[3]["pid"] == 0)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        times = {}
        for who in (pids, strangers):
            picked = rng.integers(len(who), size=len(who))
            times |= {w: int(np.sum(picked == i)) for i, w in enumerate(who)}
        yield times


@TIES
def test_intervals_are_those_of_drawn_people(ties):
    args = problem(8, ties=ties, queries=20, size=70)
    pairs, genuine, impostor = measured(args)
    fmr, threshold = 0.05, 1.7

    def rate(group):
        return np.mean([d <= threshold for d, *_ in group])

    for seed in range(12):
        (times,) = drawn_times(args, seed, 1)
        drawn, others = resampled(genuine, impostor, args[1], args[3], times)
        here = at_threshold(pairs, threshold, draws=1, seed=seed)
        assert here["low"].tolist() == pytest.approx([rate(others), rate(drawn)])
        found = true_match_rate(pairs, [fmr], draws=1, seed=seed).iloc[0]
        wanted, tmr = oracle_rates(drawn, others, fmr)
        assert found["TMR_low"] == pytest.approx(tmr)
        assert found["threshold_low"] == found["threshold_high"] == pytest.approx(wanted, abs=1e-9)
    # and over several, the quantiles
    draws = (resampled(genuine, impostor, args[1], args[3], t) for t in drawn_times(args, 5, 41))
    rates = [rate(others) for _, others in draws]
    here = at_threshold(pairs, threshold, draws=41, seed=5)
    low, high = np.quantile(rates, [0.025, 0.975], method="nearest")
    assert here.loc["FMR", ["low", "high"]].tolist() == pytest.approx([low, high])
    assert low < here.loc["FMR", "value"] < high
    assert here["value"].tolist() == pytest.approx([rate(impostor), rate(genuine)])
    assert here["pairs"].tolist() == [len(impostor), len(genuine)]


def test_no_false_match_is_not_a_rate_of_zero():
    pairs = on_a_line([0, 50], [1, 2], [1, 51, 20, 70], [1, 2, 3, 4])
    found = at_threshold(pairs, 5, draws=30)
    assert found.loc["FMR"].tolist() == [0, 0, 3 / 6, 0, 6]
    assert found.loc["TMR"].tolist() == [1, 0, 1, 2, 2]  # 3/2 is more than all
    found = at_threshold(pairs, 0.5, draws=30)
    assert found.loc["TMR", ["value", "low", "high"]].tolist() == [0, 0, 1]


def test_camera_rates_agree_with_loops():
    args = problem(4, queries=40, size=150)
    pairs, genuine, impostor = measured(args)
    threshold = 2.0
    found = camera_rates(pairs, threshold).set_index(["query_camid", "gallery_camid"])
    assert len(found) == 9 and threshold < pairs.impostor["distance"].max()
    for cameras, row in found.iterrows():
        mine, others = (
            [d for d, i, j in group if (args[1]["camid"][i], args[3]["camid"][j]) == cameras]
            for group in (genuine, impostor)
        )
        assert (row["genuine"], row["impostor"]) == (len(mine), len(others))
        assert row["FMR"] == pytest.approx(np.mean(np.array(others) <= threshold))
        if cameras[0] == cameras[1]:
            assert not mine and math.isnan(row["TMR"]) and math.isnan(row["AUC"])
            continue
        labels = np.repeat([1, 0], [len(mine), len(others)])
        assert row["TMR"] == pytest.approx(np.mean(np.array(mine) <= threshold))
        assert row["AUC"] == pytest.approx(roc_auc_score(labels, -np.array(mine + others)))
    assert found["TMR"].nunique() > 3 and (found["FMR"] > 0).any()


def test_a_camera_pair_without_a_single_stranger_is_nan():
    # Camera 2 sees person 1 alone, so it has no stranger to offer.
    found = camera_rates(on_a_line([0], [1], [1, 2], [1, 3], [[1], [2, 3]]), 5)
    assert found[["TMR", "FMR"]].fillna(-1).values.tolist() == [[1, -1], [-1, 1]]
    assert found["AUC"].isna().all()


@pytest.mark.parametrize("camids", [(), ([[-1] * 2, [-1] * 3],)], ids=["no column", "all -1"])
def test_unknown_cameras_leave_no_pair_out_and_make_one_row(camids):
    found = camera_rates(on_a_line([0, 9], [1, 2], [1, 8, 4], [1, 2, 0], *camids), 2)
    assert found[["query_camid", "gallery_camid"]].values.tolist() == [[-1, -1]]
    assert found.loc[0, ["genuine", "impostor", "TMR", "FMR"]].tolist() == [2, 4, 1, 0]


def test_all_distances_equal():
    places, pids = [0] * 4, [1, 2, 3, 4]
    pairs = on_a_line(places, pids, places, pids)
    assert roc(pairs)[["FMR", "TMR"]].values.tolist() == [[0, 0], [1, 1]]
    found = true_match_rate(pairs, [0.5, 1.0], draws=20)
    assert found["TMR"].tolist() == [0, 1] and found["false_matches"].tolist() == [0, 12]
    assert found.loc[0.5, "threshold"] < 0  # below all of them
    # and where only some of a crowd of ties could be kept, none is
    few = on_a_line(places, pids, places, pids, keep=7, block_pairs=4)
    assert len(few.impostor) == 0 and few.limit == 0
    same(true_match_rate(few, [0.5]), true_match_rate(pairs, [0.5]))


@pytest.mark.parametrize("dim", [3, 17, 128, 130])
def test_equal_images_tie_exactly_where_a_matrix_product_would_not(dim):
    # Copies of one image, each with its own identity, and every second image another, far off.
    rng, pids = np.random.default_rng(0), np.arange(1, 202)
    gallery_emb = np.repeat(rng.normal(size=(1, dim)), 201, axis=0)
    gallery_emb[1::2] += 100
    query_emb = gallery_emb[::2] + rng.normal(size=(101, dim))
    pairs = measure(query_emb, table(pids[::2]), gallery_emb, table(pids), block_pairs=1000)
    assert (pairs.impostor.groupby("query")["distance"].nunique() == 2).all()
    # Of the 101 copies, the one of the query's own identity ties with the other 100.
    assert (pairs.genuine["up_to"] - pairs.genuine["below"] == 100).all()


BAD_RATES = [], [0], [1.1], [np.nan], 0.1
PAIRS, ALONE = measure(*problem(0)), on_a_line([0], [1], [1, 2], [1, 0])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        *((lambda at=at: true_match_rate(PAIRS, at), r"in \(0, 1\]") for at in BAD_RATES),
        (lambda: at_threshold(PAIRS, np.nan), "the threshold is NaN"),
        (lambda: at_threshold(PAIRS, 1.0, draws=0), "draws=0"),
        (lambda: true_match_rate(ALONE, [1.0], draws=5), "two people or more"),
        (lambda: measure(*problem(0), keep=0), "keep and block_pairs"),
        (
            lambda: on_a_line([1, 2], [1, 0], [3], [1]),
            "1 row .* of the query table have a pid of 0",
        ),
        (lambda: on_a_line([1], [1], [2, 3], [-1, -1]), "all 2 gallery images are junk"),
        (lambda: on_a_line([1], [1], [2, 3], [2, 0]), "no genuine pair"),
        (lambda: on_a_line([1], [1], [2, 3], [1, -1]), "one person alone"),
        (lambda: match_probability(0.5, 80, 0.1), "prior and rates"),
    ],
)
def test_bad_questions_are_refused(ask, message):
    assert true_match_rate(ALONE, [1.0])["TMR"].tolist() == [1]  # without draws, one will do
    with pytest.raises(ValueError, match=message):
        ask()


def test_draws_of_one_person_alone_are_left_out():
    # Of two people every second draw holds one alone, and then there is no impostor pair.
    pairs = on_a_line([0, 9], [1, 2], [1, 8.5], [1, 2])
    with np.errstate(all="raise"):
        found = at_threshold(pairs, 8.2, draws=40)
        operating = true_match_rate(pairs, [0.5], draws=40).iloc[0]
    assert found.loc["FMR", ["value", "low", "high"]].tolist() == [0.5, 0.5, 0.5]
    ends = ["threshold_low", "threshold_high", "TMR_low", "TMR_high"]
    assert operating[ends].tolist() == [np.nextafter(8.5, 0)] * 2 + [1, 1]


def test_halves_share_nobody_and_leave_out_nobody():
    query_emb, query, gallery_emb, gallery = problem(7, queries=60, size=300, people=20)
    gallery.loc[:9, "pid"] = np.arange(200, 210)  # people that nobody asks for
    query["path"], gallery["path"] = query.index.astype(str), gallery.index.astype(str)
    whole = Retrieval(query_emb, query, gallery_emb, gallery, exclude_same_camera=False)
    parts = halves(whole, seed=1)
    rows, people, counts = [], [], []
    for part in parts:
        asked, shown = (side["path"].astype(int) for side in (part.query, part.gallery))
        rows += [*asked, *(60 + shown)]
        assert asked.is_monotonic_increasing and shown.is_monotonic_increasing
        np.testing.assert_array_equal(part.query_side.emb, query_emb[asked])
        assert [*part.query.index] == [*range(len(asked))], "a row number finds another row"
        assert [*part.gallery.index] == [*range(len(shown))]
        np.testing.assert_array_equal(part.gallery_side.emb, gallery_emb[shown])
        people.append({*part.query["pid"], *part.gallery["pid"]} - {0})
        strangers = (part.gallery["pid"] == 0).sum()
        counts.append([part.query["pid"].nunique(), strangers, len(people[-1] - {*query["pid"]})])
        assert not part.exclude_same_camera
    assert not people[0] & people[1]
    assert sorted(rows) == [*range(60), *(60 + np.flatnonzero(gallery["pid"] != -1))]
    assert (np.abs(np.diff(counts, axis=0)) <= 1).all() and np.min(counts) > 1
    same(halves(whole, seed=1)[0].query, parts[0].query)
    assert not halves(whole, seed=2)[0].query.equals(parts[0].query)
    with pytest.raises(ValueError, match="show one person"):
        halves(Retrieval(query_emb, query.assign(pid=1), gallery_emb, gallery))


def test_match_probability_counts_pairs():
    # 10 genuine pairs of which 8 are accepted, 990 impostor pairs of which 99 are
    assert match_probability(0.01, 0.8, 0.1) == pytest.approx(8 / (8 + 99))
    assert match_probability(0, 0.8, 0.1) == 0 and match_probability(0.3, 0.8, 0) == 1
    assert math.isnan(match_probability(0.5, 0, 0))


@pytest.mark.slow
def test_memory_follows_what_is_kept_not_how_many_pairs_there_are():
    rng = np.random.default_rng(0)
    query, gallery = table(rng.integers(1, 90, 900)), table(rng.integers(1, 90, 6000))
    retrieval = Retrieval(rng.normal(size=(900, 8)), query, rng.normal(size=(6000, 8)), gallery)
    tracemalloc.start()
    pairs = pair_distances(retrieval, keep=1000, block_pairs=2**15)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs.impostors > 5_000_000 and len(pairs.genuine) > 50_000
    assert peak < 25e6, "5 million distances alone are 40 MB"
