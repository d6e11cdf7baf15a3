"""Verification against the definitions, written out as loops over plain Python lists."""

import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

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


def table(pids, camids=None, paths=None):
    columns = {"pid": pids, "camid": camids, "path": paths}
    return pd.DataFrame({name: list(c) for name, c in columns.items() if c is not None})


def line(*positions):
    """Embeddings on a line, where distances can be read off."""
    return np.array(positions, dtype=np.float64)[:, None]


def problem(seed, *, ties=False, cameras=True, queries=14, size=60, people=6, dim=3):
    """A random problem with junk, distractors, a query without match and a query in the gallery."""
    rng = np.random.default_rng(seed)
    query_pids = np.append(rng.integers(1, people, queries - 1), 99)
    gallery_pids = np.append(rng.integers(-1, people, size - 1), query_pids[0])
    centres = rng.normal(size=(100, dim))
    query_emb = centres[query_pids] + rng.normal(size=(queries, dim))
    gallery_emb = centres[gallery_pids] + rng.normal(size=(size, dim))
    if ties:  # many different images at the same distance
        query_emb, gallery_emb = query_emb.round(), gallery_emb.round()
    query_camids = rng.integers(1, 4, queries) if cameras else np.full(queries, -1)
    gallery_camids = rng.integers(1, 4, size) if cameras else np.full(size, -1)
    gallery_camids[-1] = 1 + query_camids[0] % 3 if cameras else -1
    query_paths = [f"q{i}" for i in range(queries)]
    gallery_paths = [f"g{i}" for i in range(size)]
    gallery_paths[-1] = query_paths[0]  # the query itself, whatever its camera says
    return (
        query_emb,
        table(query_pids, query_camids, query_paths),
        gallery_emb,
        table(gallery_pids, gallery_camids, gallery_paths),
    )


def oracle_pairs(query_emb, query, gallery_emb, gallery):
    """(genuine, impostor) lists of (distance, query row, gallery row), from the protocol."""
    by_camera = "camid" in query and (query["camid"] >= 0).any() and (gallery["camid"] >= 0).any()
    genuine, impostor = [], []
    for i, asked in enumerate(query.itertuples()):
        for j, shown in enumerate(gallery.itertuples()):
            if shown.pid == -1:
                continue
            distance = math.dist(query_emb[i], gallery_emb[j])
            if asked.pid != shown.pid:
                impostor.append((distance, i, j))
            elif by_camera and asked.camid == shown.camid:
                continue
            elif not ("path" in query and asked.path == shown.path):
                genuine.append((distance, i, j))
    return sorted(genuine), sorted(impostor)


def oracle_rates(genuine, impostor, fmr):
    """(threshold, TMR) by trying every distance there is, and all that lies between."""
    true, false = (np.array([d for d, *_ in group]) for group in (genuine, impostor))
    candidates = [t for d in {*true, *false} for t in (d, np.nextafter(d, -np.inf))]
    good = [t for t in candidates if np.count_nonzero(false <= t) <= fmr * len(false) + 1e-9]
    return max(good), np.count_nonzero(true <= max(good)) / len(true)


def measured(args):
    """The pairs, and the genuine and impostor ones of the loop."""
    return pair_distances(*args), *oracle_pairs(*args)


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
        assert pairs.impostors == len(impostor) and math.isinf(pairs.limit)
        _, query, _, gallery = args
        for row in pairs.impostor.itertuples():
            assert query["pid"][row.query] == row.query_pid != row.gallery_pid
            assert gallery["pid"][row.gallery] == row.gallery_pid
            assert query["camid"][row.query] == row.query_camid
            assert gallery["camid"][row.gallery] == row.gallery_camid
        assert f"{len(genuine):,} genuine and {len(impostor):,} impostor pairs" in repr(pairs)


def test_pairs_are_what_the_ranked_lists_rank():
    args = problem(3, ties=True)
    pairs = pair_distances(*args)
    both = {"match": pairs.genuine, "wrong": pairs.impostor}
    for i in range(len(args[1])):
        ranked = Retrieval(*args).ranked_list(i, topk=None, show_excluded=False)
        for status, group in both.items():
            mine = group[group["query"] == i].sort_values("gallery")
            theirs = ranked[ranked["status"] == status].sort_values("gallery")
            assert mine["gallery"].tolist() == theirs["gallery"].tolist()
            np.testing.assert_allclose(mine["distance"], theirs["distance"], atol=1e-12)


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
        assert curve["FMR"].is_monotonic_increasing and curve["TMR"].is_monotonic_increasing
        assert curve["threshold"].is_monotonic_increasing
        for row in curve.itertuples():  # a threshold gives what its row says
            for group, rate in ((pairs.impostor, row.FMR), (pairs.genuine, row.TMR)):
                assert (group["distance"] <= row.threshold).mean() == pytest.approx(rate)
        assert equal_error_rate(pairs) == pytest.approx(np.interp(1, theirs, fmr))
        assert 0 < auc(pairs) < 1


def test_equal_error_rate_by_hand():
    # Genuine 1, 2, 5, 6; impostor 3, 4, 7, 8: at 4 half are wrong of both kinds.
    asked, shown = table([1]), table([1, 1, 2, 3, 1, 1, 4, 5])
    pairs = pair_distances(line(0), asked, line(1, 2, 3, 4, 5, 6, 7, 8), shown)
    assert equal_error_rate(pairs) == 0.5
    assert auc(pairs) == pytest.approx(12 / 16)
    # All apart: no error at all; all the wrong way round: nothing but errors
    apart = pair_distances(line(0), table([1]), line(1, 2, 3), table([1, 2, 2]))
    assert equal_error_rate(apart) == 0 and auc(apart) == 1
    wrong = pair_distances(line(0), table([1]), line(3, 2, 1), table([1, 2, 2]))
    assert equal_error_rate(wrong) == 1 and auc(wrong) == 0


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


def test_a_rate_counts_pairs_although_floats_do_not():
    pids = np.arange(2, 102)
    pairs = pair_distances(line(0), table([1]), line(500, *pids), table([1, *pids]))
    assert 0.29 * 100 < 29
    assert true_match_rate(pairs, [0.29])["false_matches"].tolist() == [29]


def test_a_rate_that_cannot_be_measured_is_nan():
    args = problem(0)
    pairs = pair_distances(*args)
    f = 1 / pairs.impostors
    found = true_match_rate(pairs, [0.99 * f, f, 1.5 * f], draws=20)
    assert found.iloc[0].drop(["false_matches", "people_pairs"]).isna().all()
    assert found.iloc[0]["false_matches"] == 0
    assert found["false_matches"].tolist()[1:] == [1, 1]
    assert found.iloc[1].notna().all()


@TIES
def test_nothing_depends_on_blocks_or_on_how_many_pairs_are_kept(ties):
    args = problem(5, ties=ties, queries=30, size=200)
    whole = pair_distances(*args)
    fmr = 0.02
    allowed = int(fmr * whole.impostors)
    point = true_match_rate(whole, [fmr], draws=10)
    for keep, block in ((allowed, 1), (allowed + 1, 77), (20 * allowed, 1000), (10**6, 10**6)):
        pairs = pair_distances(*args, keep=keep, block_pairs=block)
        pd.testing.assert_frame_equal(pairs.genuine, whole.genuine)
        pd.testing.assert_frame_equal(pairs.cameras, whole.cameras)
        pd.testing.assert_frame_equal(pairs.impostor, whole.impostor.iloc[: len(pairs.impostor)])
        assert len(pairs.impostor) <= keep
        assert (whole.impostor["distance"] < pairs.limit).sum() == len(pairs.impostor)
        one = true_match_rate(pairs, [fmr])
        pd.testing.assert_frame_equal(one, point[one.columns])
        if keep >= 20 * allowed:
            pd.testing.assert_frame_equal(true_match_rate(pairs, [fmr], draws=10), point)
    few = pair_distances(*args, keep=allowed - 1)
    with pytest.raises(ValueError, match="a larger keep"):
        true_match_rate(few, [fmr])
    with pytest.raises(ValueError, match="a larger keep"):
        true_match_rate(pair_distances(*args, keep=allowed), [fmr], draws=50)
    with pytest.raises(ValueError, match="a larger keep"):
        at_threshold(few, few.limit)
    inside = np.nextafter(few.limit, 0)
    pd.testing.assert_frame_equal(
        at_threshold(few, inside, draws=9), at_threshold(whole, inside, draws=9)
    )


def test_the_band_of_a_curve_ends_where_pairs_were_not_kept():
    args = problem(5, queries=60, size=300, people=60)
    whole, few = pair_distances(*args), pair_distances(*args, keep=2000)
    for pairs in (whole, few):
        band = roc_band(pairs, 9, draws=20, seed=1)
        most = min(1, 0.5 * len(pairs.impostor) / pairs.impostors)
        rates = {*np.geomspace(1 / pairs.impostors, most, 9), *FMRS}
        assert set(band.index) == {f for f in rates if f * pairs.impostors > 1 - 1e-9}
        assert band.index.max() == pytest.approx(most) and band.index.is_monotonic_increasing
        same = true_match_rate(pairs, band.index, draws=20, seed=1)
        pd.testing.assert_frame_equal(band, same)
    assert len(few.impostor) < len(whole.impostor)


def resampled(args, times):
    """Weighted pairs of a draw of people, by listing every copy; {person: how often}."""
    _, query, _, gallery = args

    def copies(table, row):
        pid = table["pid"][row]
        return times[pid if pid else f"distractor {row}"]

    genuine, impostor = oracle_pairs(*args)
    drawn = [p for p in genuine for _ in range(copies(query, p[1]))]
    others = [p for p in impostor for _ in range(copies(query, p[1]) * copies(gallery, p[2]))]
    return drawn, others


def drawn_times(args, seed, draws):
    """What the module says that it draws: identities and distractors apart."""
    pids = sorted({*args[1]["pid"], *args[3]["pid"]} - {0, -1})
    strangers = [f"distractor {row}" for row in np.flatnonzero(args[3]["pid"] == 0)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        times = {}
        for who in (pids, strangers):
            picked = rng.integers(len(who), size=len(who)) if who else []
            times |= {w: int(np.sum(np.asarray(picked) == i)) for i, w in enumerate(who)}
        yield times


@TIES
def test_intervals_are_those_of_drawn_people(ties):
    args = problem(8, ties=ties, queries=20, size=70)
    pairs = pair_distances(*args)
    fmr, threshold = 0.05, 1.7
    for seed in range(12):
        (times,) = drawn_times(args, seed, 1)
        genuine, impostor = resampled(args, times)
        here = at_threshold(pairs, threshold, draws=1, seed=seed)
        for name, group in (("FMR", impostor), ("TMR", genuine)):
            rate = np.mean([d <= threshold for d, *_ in group])
            assert here.loc[name, "low"] == pytest.approx(rate)
        found = true_match_rate(pairs, [fmr], draws=1, seed=seed).iloc[0]
        wanted, tmr = oracle_rates(genuine, impostor, fmr)
        assert found["TMR_low"] == pytest.approx(tmr)
        assert found["threshold_low"] == found["threshold_high"] == pytest.approx(wanted, abs=1e-9)
    # and over several, the quantiles
    rates = []
    for times in drawn_times(args, 5, 41):
        _, impostor = resampled(args, times)
        rates.append(np.mean([d <= threshold for d, *_ in impostor]))
    here = at_threshold(pairs, threshold, draws=41, seed=5, level=0.9)
    low, high = np.quantile(rates, [0.05, 0.95], method="nearest")
    assert here.loc["FMR", ["low", "high"]].tolist() == pytest.approx([low, high])
    assert low < here.loc["FMR", "value"] < high
    exact = at_threshold(pairs, threshold)
    genuine, impostor = oracle_pairs(*args)
    assert exact["accepted"].tolist() == [
        sum(d <= threshold for d, *_ in group) for group in (impostor, genuine)
    ]
    assert exact["pairs"].tolist() == [len(impostor), len(genuine)]


def test_more_pictures_of_the_same_people_do_not_narrow_an_interval():
    args = problem(2, cameras=False, queries=20, size=50)
    args = (args[0], args[1].drop(columns="path"), args[2], args[3].drop(columns="path"))
    identified = np.flatnonzero(args[3]["pid"] > 0)  # each distractor image is a person of its own
    args = (*args[:2], args[2][identified], args[3].iloc[identified].reset_index(drop=True))
    many = tuple(
        pd.concat([x] * 5, ignore_index=True) if isinstance(x, pd.DataFrame) else np.tile(x, (5, 1))
        for x in args
    )
    once, often = (at_threshold(pair_distances(*a), 1.5, draws=200) for a in (args, many))
    assert often["pairs"].tolist() == [25 * n for n in once["pairs"]]
    np.testing.assert_allclose(once[["value", "low", "high"]], often[["value", "low", "high"]])
    rate, pairs = often.loc["FMR", ["value", "pairs"]]
    as_if_independent = 2 * 1.96 * math.sqrt(rate * (1 - rate) / pairs)
    assert often.loc["FMR", "high"] - often.loc["FMR", "low"] > 5 * as_if_independent


def test_no_false_match_is_not_a_rate_of_zero():
    pairs = pair_distances(line(0, 50), table([1, 2]), line(1, 51, 20, 70), table([1, 2, 3, 4]))
    assert (pairs.impostors, len(pairs.genuine)) == (6, 2)
    found = at_threshold(pairs, 5, draws=30)
    assert found.loc["FMR"].tolist() == [0, 0, 3 / 6, 0, 6]
    assert found.loc["TMR"].tolist() == [1, 0, 1, 2, 2]  # 3/2 is more than all
    found = at_threshold(pairs, 0.5, draws=30)
    assert found.loc["TMR", ["value", "low", "high"]].tolist() == [0, 0, 1]


def test_camera_rates_agree_with_loops():
    args = problem(4, queries=40, size=150)
    _, query, _, gallery = args
    pairs, genuine, impostor = measured(args)
    threshold = 2.0
    found = camera_rates(pairs, threshold).set_index(["query_camid", "gallery_camid"])
    assert len(found) == 9 and threshold < pairs.impostor["distance"].max()
    for (asks, answers), row in found.iterrows():
        mine, others = (
            [d for d, i, j in group if query["camid"][i] == asks and gallery["camid"][j] == answers]
            for group in (genuine, impostor)
        )
        assert (row["genuine"], row["impostor"]) == (len(mine), len(others))
        assert row["FMR"] == pytest.approx(np.mean(np.array(others) <= threshold))
        if asks == answers:
            assert not mine and math.isnan(row["TMR"]) and math.isnan(row["AUC"])
            continue
        labels = np.repeat([1, 0], [len(mine), len(others)])
        assert row["TMR"] == pytest.approx(np.mean(np.array(mine) <= threshold))
        assert row["AUC"] == pytest.approx(roc_auc_score(labels, -np.array(mine + others)))
    assert found["TMR"].nunique() > 3 and (found["FMR"] > 0).any()


def test_a_camera_pair_without_a_single_stranger_is_nan():
    # Camera 2 sees person 1 alone, so it has no stranger to offer.
    pairs = pair_distances(line(0), table([1], [1]), line(1, 2), table([1, 3], [2, 3]))
    found = camera_rates(pairs, 5).set_index("gallery_camid")
    assert math.isnan(found["FMR"][2]) and found["TMR"][2] == 1 and math.isnan(found["AUC"][2])
    assert math.isnan(found["TMR"][3]) and found["FMR"][3] == 1


@pytest.mark.parametrize("camids", [None, -1], ids=["no column", "all -1"])
def test_unknown_cameras_leave_no_pair_out_and_make_one_row(camids):
    def cameras(n):
        return None if camids is None else [camids] * n

    pairs = pair_distances(
        line(0, 9), table([1, 2], cameras(2)), line(1, 8, 4), table([1, 2, 0], cameras(3))
    )
    found = camera_rates(pairs, 2)
    assert found[["query_camid", "gallery_camid"]].values.tolist() == [[-1, -1]]
    assert found.loc[0, ["genuine", "impostor", "TMR", "FMR"]].tolist() == [2, 4, 1, 0]


def test_same_camera_pairs_can_be_asked_for():
    args = line(0), table([1], [1]), line(1, 2, 3), table([1, 1, 2], [1, 2, 2])
    assert pair_distances(*args).genuine["distance"].tolist() == [2]
    kept = pair_distances(*args, exclude_same_camera=False)
    assert kept.genuine["distance"].tolist() == [1, 2]


def test_all_distances_equal():
    people = table([1, 2, 3, 4])
    args = np.zeros((4, 2)), people, np.zeros((4, 2)), people
    pairs = pair_distances(*args)
    assert auc(pairs) == 0.5 and equal_error_rate(pairs) == 0.5
    assert roc(pairs)[["FMR", "TMR"]].values.tolist() == [[0, 0], [1, 1]]
    found = true_match_rate(pairs, [0.5, 1.0], draws=20)
    assert found["TMR"].tolist() == [0, 1] and found["false_matches"].tolist() == [0, 12]
    assert found.loc[0.5, "threshold"] < 0  # below all of them
    # and where only some of a crowd of ties could be kept, none is
    few = pair_distances(*args, keep=7, block_pairs=4)
    assert len(few.impostor) == 0 and few.limit == 0
    pd.testing.assert_frame_equal(true_match_rate(few, [0.5]), true_match_rate(pairs, [0.5]))


def test_equal_images_tie_exactly_where_a_matrix_product_would_not():
    # Copies of one image, each with its own identity, and every second image another, far off.
    rng = np.random.default_rng(0)
    pids = np.arange(1, 202)
    for dim in (3, 17, 128, 130):
        gallery_emb = np.repeat(rng.normal(size=(1, dim)), 201, axis=0)
        gallery_emb[1::2] += 100
        query_emb = gallery_emb[::2] + rng.normal(size=(101, dim))
        args = query_emb, table(pids[::2]), gallery_emb, table(pids)
        pairs = pair_distances(*args, block_pairs=1000)
        of_query = pairs.impostor.groupby("query")["distance"]
        assert (of_query.nunique() == 2).all()
        # Of the 101 copies, the one of the query's own identity ties with the other 100.
        ties = pairs.genuine["up_to"] - pairs.genuine["below"]
        assert (ties == 100).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_are_taken_too(dtype):
    args = problem(1)
    x, y = (torch.tensor(args[i], dtype=dtype) for i in (0, 2))
    pairs = pair_distances(x, args[1], y, args[3])
    same = pair_distances(x.double().numpy(), args[1], y.double().numpy(), args[3])
    pd.testing.assert_frame_equal(pairs.genuine, same.genuine)


def test_the_given_arrays_and_tables_stay_as_they_were():
    args = problem(1)
    before = [x.copy() for x in args]
    true_match_rate(pair_distances(*args), [0.1], draws=3)
    for x, was in zip(args, before, strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(was))


def query_with(**columns):
    return lambda a: (a[0], a[1].assign(**columns), *a[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0][:3], *a[1:]), "3 query embeddings beside a query table of 14 rows"),
        (lambda a: (a[0][:, :2], *a[1:]), "same network"),
        (lambda a: (a[0] * np.nan, *a[1:]), "query embeddings hold NaN"),
        (lambda a: (a[0][:0], a[1].iloc[:0], *a[2:]), "the query is empty"),
        (query_with(pid=0), "14 rows of the query table have a pid of 0"),
        (lambda a: (a[0], a[1].drop(columns="pid"), *a[2:]), "no column 'pid'"),
        (query_with(pid=1.5), "whole numbers"),
        (lambda a: (*a[:3], a[3].assign(pid=-1)), "gallery images are junk"),
        (lambda a: (*a[:3], a[3].assign(pid=50)), "no genuine pair"),
        (query_with(camid=[-1] + [1] * 13), "1 of 14 images of the query"),
        (lambda a: (a[0], a[1].assign(pid=1), a[2], a[3].assign(pid=1)), "one person alone"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pair_distances(*change(problem(0)))


def test_bad_questions_are_refused():
    args = problem(0)
    pairs = pair_distances(*args)
    for at in ([], [0], [-0.1], [1.1], [np.nan], 0.1):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            true_match_rate(pairs, at)
    with pytest.raises(ValueError, match="the threshold is NaN"):
        at_threshold(pairs, np.nan)
    with pytest.raises(ValueError, match="level must be"):
        at_threshold(pairs, 1.0, level=1.0)
    with pytest.raises(ValueError, match="keep and block_pairs"):
        pair_distances(*args, keep=0)
    alone = pair_distances(line(0), table([1]), line(1, 2), table([1, 0]))
    assert true_match_rate(alone, [1.0])["TMR"].tolist() == [1]
    with pytest.raises(ValueError, match="two people or more"):
        true_match_rate(alone, [1.0], draws=5)
    with pytest.raises(ValueError, match="draws=0"):
        at_threshold(pairs, 1.0, draws=0)


def test_draws_of_one_person_alone_are_left_out():
    # Of two people every second draw holds one alone, and then there is no impostor pair.
    pairs = pair_distances(line(0, 9), table([1, 2]), line(1, 8.5), table([1, 2]))
    with np.errstate(all="raise"):
        found = at_threshold(pairs, 8.2, draws=40)
        operating = true_match_rate(pairs, [0.5], draws=40).iloc[0]
    assert found.loc["FMR", ["value", "low", "high"]].tolist() == [0.5, 0.5, 0.5]
    ends = ["threshold_low", "threshold_high", "TMR_low", "TMR_high"]
    assert operating[ends].tolist() == [np.nextafter(8.5, 0)] * 2 + [1, 1]


def test_halves_share_nobody_and_leave_out_nobody():
    _, query, _, gallery = problem(7, queries=60, size=300, people=20)
    gallery.loc[:9, "pid"] = np.arange(200, 210)  # people that nobody asks for
    one, other = halves(query, gallery, seed=1)
    for side, whole in ((0, np.arange(60)), (1, np.flatnonzero(gallery["pid"] != -1))):
        rows = np.concatenate([one[side], other[side]])
        assert np.array_equal(np.sort(rows), whole)
        assert (np.diff(one[side]) > 0).all()

    def people(half):
        return {*query["pid"][half[0]], *gallery["pid"][half[1]]} - {0}

    assert not people(one) & people(other)
    asked = [query["pid"][half[0]].nunique() for half in (one, other)]
    assert abs(asked[0] - asked[1]) <= 1
    strangers = [(gallery["pid"][half[1]] == 0).sum() for half in (one, other)]
    unasked = [len(people(half) - {*query["pid"]}) for half in (one, other)]
    for counts in (strangers, unasked):
        assert abs(counts[0] - counts[1]) <= 1 and counts[0] > 1
    again = halves(query, gallery, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(one, again[0], strict=True))
    assert not np.array_equal(one[0], halves(query, gallery, seed=2)[0][0])
    with pytest.raises(ValueError, match="1 people"):
        halves(query.assign(pid=1), gallery)


def test_match_probability_counts_pairs():
    # 10 genuine pairs of which 8 are accepted, 990 impostor pairs of which 99 are
    assert match_probability(0.01, 0.8, 0.1) == pytest.approx(8 / (8 + 99))
    assert match_probability(0, 0.8, 0.1) == 0 and match_probability(0.3, 0.8, 0) == 1
    assert math.isnan(match_probability(0.5, 0, 0))
    with pytest.raises(ValueError, match="prior and rates"):
        match_probability(0.5, 80, 0.1)


def test_memory_follows_what_is_kept_not_how_many_pairs_there_are():
    rng = np.random.default_rng(0)
    query, gallery = table(rng.integers(1, 90, 900)), table(rng.integers(1, 90, 6000))
    query_emb, gallery_emb = rng.normal(size=(900, 8)), rng.normal(size=(6000, 8))
    tracemalloc.start()
    pairs = pair_distances(query_emb, query, gallery_emb, gallery, keep=1000, block_pairs=2**15)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs.impostors > 5_000_000 and len(pairs.genuine) > 50_000
    assert peak < 25e6, "5 million distances alone are 40 MB"
