"""Distances and ranks against stable sorts of distances that are summed directly."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from conftest import table
from reidlib.evaluation import distances, ranks
from reidlib.evaluation.distances import nearest, product_with, squared
from reidlib.evaluation.ranks import match_ranks
from reidlib.evaluation.retrieval import Retrieval, evaluate


def by_sorting(measured, query, gallery):
    """Matches, AP, first and last rank of each query by a stable sort of (Q, G) measures."""
    kept = np.flatnonzero(gallery["pid"] != -1)
    pids, camids = gallery.iloc[kept].to_numpy().T
    rows = []
    for near, (pid, camid) in zip(measured, query.to_numpy(), strict=True):
        order = np.argsort(near[kept], kind="stable")
        order = order[(pids[order] != pid) | (camids[order] != camid)]
        found = np.flatnonzero(pids[order] == pid) + 1
        ap = np.mean(np.arange(1, len(found) + 1) / found) if len(found) else np.nan
        rows.append([len(found), ap, *(found[[0, -1]] if len(found) else [np.nan] * 2)])
    return pd.DataFrame(rows, columns=["matches", "AP", "first_rank", "last_rank"])


def agree(per_query, expected):
    for name in ("matches", "first_rank", "last_rank"):
        np.testing.assert_array_equal(per_query[name], expected[name], name)
    np.testing.assert_allclose(per_query["AP"], expected["AP"], rtol=0, atol=1e-12)


def crowd(seed, dim, queries=70, size=2600, people=40):
    """People so close to each other that float32 is unsure of many pairs; some images twice."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people + 1, dim))
    pids = [rng.integers(1, people, queries), rng.integers(-1, people, size)]
    embs = [centres[p] + 2 * rng.normal(size=(len(p), dim)) for p in pids]
    copies = rng.integers(0, size, (2, size // 4))
    # Every other copy is off by about the last digit of float32.
    embs[1][copies[0]] = embs[1][copies[1]]
    embs[1][copies[0, ::2]] *= 1 + 5e-8 * rng.normal(size=(len(copies[0, ::2]), dim))
    camids = [rng.integers(0, 4, len(p)) for p in pids]
    tables = [table(p, c) for p, c in zip(pids, camids, strict=True)]
    return embs[0], tables[0], embs[1], tables[1]


def assert_exact(args):
    """Scores are those of sorts of directly summed distances."""
    query_emb, query, gallery_emb, gallery = args
    result, shown = evaluate(*args).per_query, gallery_emb.astype(np.float64)
    direct = (np.square(shown - emb).sum(axis=1) for emb in query_emb.astype(np.float64))
    agree(result, by_sorting(direct, query, gallery))
    return result


# --- a product, and what is nearest by it


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_slack_of_a_product_holds(dtype):
    rng = np.random.default_rng(3)
    for offset, scale in ((0, 1), (1e3, 1), (0, 1e-25), (0, 1e25)):
        for dim in (1, 7, 300):
            a, b = (scale * (rng.normal(size=(n, dim)) + offset) for n in (40, 200))
            near, slack = product_with(b, dtype)(a)
            assert near.dtype == dtype and (slack > 0).all()
            exact = np.square(a[:, None] - b).sum(axis=2)
            off = np.abs(near - exact).max(axis=1)
            assert (off <= slack / 2).all() or np.isinf(slack).all()
            assert np.isinf(slack).all() == (dtype is np.float32 and scale == 1e25)
            if scale == 1:  # and it is no larger than it need be
                assert (slack < 1e-3 * exact.max()).all()


def test_nearest_are_those_of_a_stable_sort(monkeypatch):
    rng = np.random.default_rng(7)
    for seed in range(10):
        a, b = rng.integers(-2, 3, (9, 3)), rng.integers(-2, 3, (80, 3))  # many equal distances
        if seed % 2:
            a, b = a + 1e6 + rng.normal(size=(9, 1)), b + 1e6
        k = int(rng.integers(1, 81))
        monkeypatch.setattr(distances, "BLOCK", 8 * 80 * int(rng.integers(1, 9)))
        rows, apart = nearest(a, b, k)
        exact = np.square(np.float64(a)[:, None] - b).sum(axis=2)
        np.testing.assert_array_equal(rows, np.argsort(exact, axis=1, kind="stable")[:, :k])
        np.testing.assert_array_equal(apart, np.take_along_axis(exact, rows, axis=1))


def test_a_product_may_be_wrong_by_half_its_slack(monkeypatch):
    # Ranks must not depend on that, whether few images are unsure, or all of them: those of which
    # too many are unsure are counted again in float64.
    rng = np.random.default_rng(2)
    monkeypatch.setattr(ranks, "UNSURE", 5)
    types = set()
    for slack in (0, 1e-3, 0.1, 1, 100, np.inf):
        for count in (1, 2, 8):
            gallery_emb, pids = rng.normal(size=(30, 2)), np.zeros(30, int)
            gallery_emb[rng.permutation(30)[:10]] = gallery_emb[0]
            pids[rng.permutation(30)[:count]] = 1
            query_emb, rows = rng.normal(size=(1, 2)), np.flatnonzero(pids)
            order = np.argsort(np.square(gallery_emb - query_emb).sum(axis=1), kind="stable")
            expected = np.flatnonzero(pids[order]) + 1

            def measure(queries, rows, sides=(query_emb, gallery_emb)):
                return squared(sides[0], queries, sides[1], rows)

            def noisy(rows, dtype, measure=measure, slack=slack):
                types.add(dtype)
                by = slack if dtype is np.float32 else min(slack, 100)
                noise = rng.uniform(-0.49, 0.49, len(rows)) * np.nan_to_num(by, posinf=1e9)
                near = (measure(0, rows) + noise).astype(dtype)[None]
                places = lambda queries, n: measure(queries, rows[n])
                return lambda queries: (near.copy(), np.array([by + 1e-6])), places

            own = np.zeros(count, int), rows, np.ones(count, bool), np.arange(30)
            for _ in range(10):
                found, found_ranks = match_ranks(*own, measure, noisy, 2)
                assert found_ranks.tolist() == expected.tolist() and sorted(found) == rows.tolist()
    assert types == {np.float32, np.float64}


# --- ranks


def test_equal_images_tie_exactly_where_a_matrix_product_would_not(monkeypatch):
    # BLAS rounds an image differently at an edge of its blocks. Copies of one image, each with
    # its own identity, must rank in gallery order nonetheless. (Every second image is another,
    # far off: were all the same, centring would leave nothing but zeros.)
    rng = np.random.default_rng(0)
    pids = np.arange(1, 202)
    for dim in (3, 17, 128, 130):
        gallery_emb = np.repeat(rng.normal(size=(1, dim)), 201, axis=0)
        query_emb = gallery_emb[::2] + rng.normal(size=(101, dim))
        gallery_emb[1::2] += 100
        args = (query_emb, table(pids[::2]), gallery_emb, table(pids))
        for queries_at_once in (1, 2, 37, 101):
            monkeypatch.setattr(ranks, "NUMBERS", 2 * 201 * queries_at_once)
            result = evaluate(*args)
            assert result.per_query["first_rank"].tolist() == list(range(1, 102))


def test_memory_holds_blocks_not_the_whole_matrix(monkeypatch):
    args = crowd(0, 4, queries=500, size=3000, people=400)
    monkeypatch.setattr(ranks, "NUMBERS", 2**13)
    tracemalloc.start()  # counts what NumPy allocates
    evaluate(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20 < 500 * 3000 * 8 / 5


@pytest.mark.parametrize("dim", [2, 40, 600])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_are_exact_where_float32_is_unsure(dim, dtype, monkeypatch):
    query_emb, query, gallery_emb, gallery = crowd(dim, dim)
    args = query_emb.astype(dtype), query, gallery_emb.astype(dtype), gallery
    result = assert_exact(args)
    # Orders by float32 alone are others: else this test would prove nothing.
    centre = args[2].mean(axis=0)
    shown, asked = (np.float32(emb - centre) for emb in (args[2], args[0]))
    near = (shown**2).sum(axis=1) - 2 * asked @ shown.T
    exact = np.stack([np.square(np.float64(args[2]) - emb).sum(axis=1) for emb in args[0]])
    assert (near.argsort(axis=1, kind="stable") != exact.argsort(axis=1, kind="stable")).any()
    monkeypatch.setattr(ranks, "NUMBERS", 2**13)  # several tiles of the gallery, blocks of queries
    other = evaluate(*args).per_query
    pd.testing.assert_frame_equal(other, result, check_exact=True)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-15, 1e12, 1e18, 1e25, 1e100])
def test_numbers_that_float32_cannot_hold(scale):
    query_emb, query, gallery_emb, gallery = crowd(1, 6, queries=30, size=1200)
    assert_exact((query_emb * scale, query, gallery_emb * scale, gallery))


def test_far_queries_and_a_far_image():
    args = crowd(2, 6, queries=30, size=1200)
    args[0][::3] *= 1e6
    args[0][1::3] *= 1e20
    assert_exact(args)
    args[2][7] = 1e7
    assert_exact(args)


def test_dead_network_and_binary_codes_rank_by_gallery_order():
    rng = np.random.default_rng(0)
    _, query, _, gallery = crowd(3, 2, queries=20, size=2600)
    for codes in (1, 2):
        embs = [rng.integers(0, codes, (n, 5)) for n in (20, 2600)]
        assert_exact((embs[0], query, embs[1], gallery))


@pytest.mark.parametrize("people", [3, 40, 400])
def test_few_and_many_matches_a_query(people):
    assert_exact(crowd(9, 20, people=people))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint8])
def test_given_distances_rank_exactly(dtype, monkeypatch):
    rng = np.random.default_rng(4)
    _, query, _, gallery = crowd(4, 2, queries=30, size=2600)
    ready = rng.integers(0, 200, (30, 2600)).astype(dtype)
    if dtype == np.float64:  # apart by less than float32 shows
        ready = 1 + rng.permutation(ready.size).reshape(ready.shape) * 1e-12
    if dtype == np.int64:  # apart by less than float64 shows
        ready = 2**60 + rng.integers(0, 2000, ready.shape)
    monkeypatch.setattr(ranks, "NUMBERS", 2**10)
    result = Retrieval.from_distances(ready, query, gallery).evaluate()
    agree(result.per_query, by_sorting(ready, query, gallery))
