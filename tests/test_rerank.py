"""Re-ranking against the published algorithm written out in loops, ties and dead networks among it."""

import tracemalloc

import numpy as np
import pytest
import torch

from reidlib.evaluation import distances
from reidlib.evaluation.rerank import expanded_reciprocal, k_reciprocal, normalise, query_expansion


def dense(query, gallery, k1=20, k2=6, lam=0.3):
    """The definition, image by image in float64, with stable sorts and whole matrices."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    squared = np.square(x[:, None] - x[None]).sum(axis=2)
    nearest = np.argsort(squared, axis=1, kind="stable")
    largest = squared.max(axis=1, keepdims=True)
    d = squared / np.where(largest > 0, largest, 1)

    def reciprocal(i, k):
        return {int(j) for j in nearest[i, : k + 1] if i in nearest[j, : k + 1]}

    v = np.zeros_like(d)
    for i in range(len(x)):
        expanded = set(near := reciprocal(i, k1))
        for c in near:
            others = reciprocal(c, int(np.around(k1 / 2)))
            if len(others & near) > 2 / 3 * len(others):
                expanded |= others
        for j in expanded:
            v[i, j] = np.exp(-d[i, j])
        if expanded:
            v[i] /= v[i].sum()
    if k2 != 1:
        v = np.stack([v[nearest[i, :k2]].mean(axis=0) for i in range(len(x))])
    final = np.empty((len(query), len(gallery)))
    for q in range(len(query)):
        for g in range(len(gallery)):
            shared = np.minimum(v[q], v[len(query) + g]).sum()
            jaccard = 1 - shared / (2 - shared)
            final[q, g] = (1 - lam) * jaccard + lam * d[q, len(query) + g]
    return final


def people(queries, gallery, dim=8, identities=12, seed=0):
    """Embeddings in clusters, as a network gives them."""
    rng = np.random.default_rng(seed)
    centres = 2 * rng.normal(size=(identities, dim))
    return [
        (centres[rng.integers(identities, size=n)] + rng.normal(size=(n, dim))).astype(np.float32)
        for n in (queries, gallery)
    ]


RNG = np.random.default_rng(1)
FOUR = RNG.normal(size=(4, 5)).astype(np.float32)
SHELL = RNG.normal(size=(90, 4))

SCENES = {
    "people": people(15, 130),
    # Small whole numbers: many exactly equal distances and some equal images.
    "ties": [RNG.integers(-2, 3, size=(n, 3)).astype(np.float32) for n in (15, 110)],
    "copies": [FOUR[RNG.integers(4, size=n)] for n in (10, 120)],  # more equal ones than k1
    "one query": people(1, 60),
    "one query, one image": people(1, 1),
    "fewer images than k1": people(3, 5),
    "all equal": [np.full((4, 3), 1.3), np.full((50, 3), 1.3)],
    "far from the origin": [emb.astype(np.float64) + 1e7 for emb in people(8, 80)],
    # Around the origin, at distances that differ in the eleventh digit; the queries stand there.
    "near ties": [np.zeros((2, 4)), normalise(SHELL) * (1 + 1e-10 * RNG.random((90, 1)))],
    # Lengths and distances have no rounding, and most distances tie.
    "corners of a cube": [RNG.choice([-1.0, 1.0], size=(count, 4)) for count in (9, 70)],
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    ("k1", "k2", "lam"), [(20, 6, 0.3), (5, 1, 0.0), (7, 12, 0.6), (1, 1, 0.3), (6, 3, 1.0)]
)
def test_it_is_the_published_algorithm(scene, k1, k2, lam, monkeypatch):
    query, gallery = SCENES[scene]
    monkeypatch.setattr(distances, "BLOCK", 8 * len(gallery) * 7)
    expected = dense(query, gallery, k1, k2, lam)
    found = k_reciprocal(query, gallery, k1, k2, lam)
    assert found.dtype == np.float32 and found.shape == (len(query), len(gallery))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
    # The order too: what the loop calls equal, up to its own rounding, ties here.
    expected = np.argsort(np.round(expected * 2**24), axis=1, kind="stable")
    np.testing.assert_array_equal(np.argsort(found, axis=1, kind="stable"), expected)


def test_the_scenes_are_not_trivial():
    query, gallery = SCENES["people"]
    plain, reranked = (k_reciprocal(query, gallery, lam=lam) for lam in (1.0, 0.3))
    order = np.argsort(np.square(query[:, None] - gallery).sum(axis=2), axis=1)
    np.testing.assert_array_equal(np.argsort(plain, axis=1), order)
    assert (np.argsort(reranked, axis=1) != order).mean() > 0.3
    ties = SCENES["ties"][1]
    squared = np.square(np.float64(ties[:, None] - ties)).sum(axis=2)
    assert all(len(np.unique(row)) < 0.3 * len(row) for row in squared)
    # Where every expansion fails or succeeds, the 2/3 rule is not tested.
    x = np.concatenate([query, gallery]).astype(np.float64)
    nearest = np.argsort(np.square(x[:, None] - x).sum(axis=2), axis=1, kind="stable")
    i, _ = expanded_reciprocal(nearest, 20)
    forward = (nearest[:, :21, None] == np.arange(len(x))).any(axis=1)
    grown = np.bincount(i, minlength=len(x)) > (forward & forward.T).sum(axis=1)
    assert 0.1 < grown.mean() < 0.95


def test_equal_gallery_images_tie_whatever_the_blocks(monkeypatch):
    query, gallery = people(5, 60, dim=32)
    gallery[40:] = gallery[:20]
    whole = k_reciprocal(query, gallery)
    for block in (1, 8 * 65 * 9):
        monkeypatch.setattr(distances, "BLOCK", block)
        np.testing.assert_array_equal(k_reciprocal(query, gallery), whole)
    plain = k_reciprocal(query, gallery, lam=1.0)
    np.testing.assert_array_equal(plain[:, 40:], plain[:, :20])
    # Copies of the query too: a rounding error near 0 is not lost in a float32 by itself.
    gallery[:20] = query[0]
    assert (k_reciprocal(query, gallery, lam=1.0)[0, :20] == 0).all()


def test_moving_and_scaling_changes_nothing():
    query, gallery = SCENES["people"]
    expected = k_reciprocal(query, gallery)
    moved = [8.0 * emb.astype(np.float64) + 3.0 for emb in (query, gallery)]
    np.testing.assert_allclose(k_reciprocal(*moved), expected, atol=1e-6)
    tensors = [torch.from_numpy(emb).requires_grad_() for emb in (query, gallery)]
    np.testing.assert_array_equal(k_reciprocal(*tensors), expected)
    half = [emb.bfloat16() for emb in tensors]
    exact = [emb.detach().float().numpy() for emb in half]
    np.testing.assert_array_equal(k_reciprocal(*half), k_reciprocal(*exact))


def test_memory_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 2**21)
    query, gallery = people(40, 4000, dim=16, identities=300)
    tracemalloc.start()
    result = k_reciprocal(query, gallery)
    peak = tracemalloc.get_traced_memory()[1] - result.nbytes
    tracemalloc.stop()
    assert peak < 0.25 * 8 * 4040**2, "a dense (N, N) matrix of float64 is four times as much"


ONES, NAN = np.ones((2, 3)), float("nan")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("k1", (0, 2.5), "k1 must be a whole number from 1, not"),
        ("k2", (-1,), "k2 must be a whole number from 1, not -1"),
        ("lam", (1.1, NAN), "lam is the share of the original distance, 0 to 1, not"),
        ("n", (0, 1.5), "n must be a whole number from 1 and alpha 0 or more"),
        ("alpha", (-1, NAN), "n must be a whole number from 1 and alpha 0 or more"),
    ],
)
def test_bad_settings(name, values, message):
    function = query_expansion if name in ("n", "alpha") else k_reciprocal
    for value in values:
        with pytest.raises(ValueError, match=message):
            function(*SCENES["people"], **{name: value})
    # and embeddings, as those of a retrieval, see test_retrieval
    with pytest.raises(ValueError, match="query embeddings have 4 dimensions.*3"):
        function(np.ones((2, 4)), ONES)
    with pytest.raises(ValueError, match="gallery embeddings hold NaN"):
        function(ONES, NAN * ONES)


# --- unit length, query expansion


def test_unit_length_ranks_as_the_cosine_does():
    query, gallery = (normalise(emb) for emb in SCENES["people"])
    np.testing.assert_allclose(np.linalg.norm(gallery, axis=1), 1)
    euclidean = np.square(query[:, None] - gallery[None]).sum(axis=2)
    np.testing.assert_array_equal(np.argsort(euclidean, 1), np.argsort(-query @ gallery.T, 1))


def expanded(emb, gallery, n, alpha):
    """One image at a time."""
    out = []
    for x in emb:
        cosines = gallery @ x
        near = np.argsort(np.square(gallery - x).sum(1), kind="stable")[:n]
        total = x + sum(max(cosines[g], 0) ** alpha * gallery[g] for g in near)
        out.append(total / np.linalg.norm(total))
    return np.array(out)


@pytest.mark.parametrize("scene", ["people", "corners of a cube", "copies", "fewer images than k1"])
@pytest.mark.parametrize(("n", "alpha"), [(1, 0.0), (5, 3.0), (200, 1.0)])
def test_query_expansion_is_the_loop(scene, n, alpha, monkeypatch):
    query, gallery = (normalise(emb) for emb in SCENES[scene])
    monkeypatch.setattr(distances, "BLOCK", 8 * 70)
    # Not of unit length, and the sides of different length.
    found, same = query_expansion(3 * query, 7 * gallery, n, alpha)
    np.testing.assert_allclose(found, expanded(query, gallery, n, alpha), atol=1e-6)
    np.testing.assert_allclose(same, gallery, atol=1e-12)
