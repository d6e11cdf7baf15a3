"""What can be done to a ranking without the network: re-ranking, query expansion, unit length.

No function here sees a label. `k_reciprocal` and `query_expansion` do look at the whole gallery, and
`k_reciprocal` at all the queries together: their scores are not those of the single-query protocol
and are reported apart from them. Junk (pid -1) must be dropped before, from embeddings and table,
or it takes part in every neighbourhood.
"""

from numbers import Integral
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from reidlib.evaluation.distances import as_embeddings, blocks, both_sides, nearest, squared


def normalise(emb: Any) -> np.ndarray:
    """Return the embeddings, (N, D), at unit length, float64. A row of zeros stays as it is.

    Then ‖a − b‖² = 2 − 2 cos(a, b): ranking by Euclidean distance is ranking by cosine.

    >>> normalise([[3, 4], [0, 0]])
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    emb = as_embeddings(emb, "these").astype(np.float64)
    length = np.linalg.norm(emb, axis=1, keepdims=True)
    return emb / np.where(length > 0, length, 1)


def query_expansion(
    query_emb: Any, gallery_emb: Any, n: int = 5, alpha: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Replace each query by the weighted mean of itself and its n nearest gallery images.

    Average query expansion (Chum et al., ICCV 2007) is alpha = 0: all weigh the same.
    With alpha > 0 a neighbour weighs max(cos, 0)^alpha, the query itself 1 (Radenović et al., PAMI
    2018, arXiv 1711.02512). Either way on embeddings of unit length. One query does not
    see the others; whether a neighbour is the same person is not looked at.

    Args:
        query_emb, gallery_emb: (Q, D) and (G, D), without junk.
        n: how many neighbours; all of them where the gallery has fewer.
        alpha: how fast the weight falls with the cosine.

    Returns:
        Queries (Q, D) and gallery (G, D) of unit length, float64. Compare these two only with each
        other. Equal distances are taken in gallery order.

    Raises:
        ValueError: n below 1, alpha below 0, or embeddings that do not fit each other.

    >>> query, gallery = query_expansion([[1, 0]], [[0, 1], [3, 4]], n=1, alpha=0)
    >>> query.round(3), gallery.round(3)  # the mean of (1, 0) and (0.6, 0.8), at unit length
    (array([[0.894, 0.447]]), array([[0. , 1. ],
           [0.6, 0.8]]))
    """
    query, gallery = (normalise(emb) for emb in both_sides(query_emb, gallery_emb))
    if not isinstance(n, Integral) or n < 1 or not alpha >= 0:
        raise ValueError(f"n must be a whole number from 1 and alpha 0 or more: {n=}, {alpha=}")
    rows, apart = nearest(query, gallery, min(n, len(gallery)))  # (Q, n)
    weights = _neighbours(rows, len(gallery), np.maximum(1 - apart / 2, 0) ** alpha)
    # (Q, G) @ (G, D) -> (Q, D)
    return normalise(query + weights @ gallery), gallery


def k_reciprocal(
    query_emb: Any, gallery_emb: Any, k1: int = 20, k2: int = 6, lam: float = 0.3
) -> np.ndarray:
    """Re-rank with k-reciprocal encoding: the distance is small where neighbours are shared.

    Zhong et al., CVPR 2017, arXiv 1701.08398, section 3, as their Python code computes it. All
    N = Q + G images look for neighbours among all N. With d(i, j) the squared Euclidean distance
    divided by the largest one of i, and N(i, k) the k + 1 images nearest to i, itself among them:

    - R(i, k) = those j in N(i, k) that have i in N(j, k): the k-reciprocal neighbours.
    - R*(i) = R(i, k1), joined by each R(c, k1/2) of a c in R(i, k1) of which more than 2/3 lie in
      R(i, k1) already ("at least 2/3" in the paper's text; k1/2 rounded, halves to even).
    - V(i, j) = exp(−d(i, j)) for j in R*(i), else 0; each row scaled to sum to 1.
    - Local query expansion: V(i) becomes the mean of V over the k2 nearest of i, itself among them;
      not if k2 is 1.
    - Jaccard distance of q and g: 1 − s / (2 − s), with s = Σ_j min(V(q, j), V(g, j)).
    - Result: (1 − lam) · Jaccard + lam · d.

    What is exact: all of that, in float64, not an approximation; neighbours are chosen by distances
    summed directly, of which equal ones stand in row order, queries before gallery images (the
    published code leaves ties to an unstable sort). The result is rounded to multiples of
    2^-24, the step of float32 near 1, so that images with equal values tie in spite of rounding.
    Where all images are equal, d is 0. V is sparse, and distances exist in blocks only: beyond the
    result, memory grows with N. Many equal images (a dead network) are right but slower.

    Args:
        query_emb, gallery_emb: (Q, D) and (G, D), without junk.
        k1: neighbours that may be reciprocal; where there are fewer images, all are.
        k2: neighbours whose V is averaged.
        lam: share of the original distance, 0 to 1. 1 ranks as the embeddings do.

    Returns:
        (Q, G) float32, in [0, 1]. They order the gallery of a query; between queries they are not
        comparable, for each query's d is scaled by itself.

    Raises:
        ValueError: k1, k2 or lam out of range, or embeddings that do not fit each other.
    """
    for name, k in (("k1", k1), ("k2", k2)):
        if not isinstance(k, Integral) or k < 1:
            raise ValueError(f"{name} must be a whole number from 1, not {k!r}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is the share of the original distance, 0 to 1, not {lam!r}")
    query, gallery = both_sides(query_emb, gallery_emb)
    queries = len(query)
    # (Q, D), (G, D) -> (N, D)
    emb = np.concatenate([query, gallery])
    total = len(emb)
    k = min(max(k1 + 1, k2), total)

    near_rows = np.empty((total, k), np.int32)
    furthest = np.empty(total)
    result = np.empty((queries, len(gallery)), np.float32)
    for part, near, rows, _ in blocks(emb, emb, k):
        near_rows[part] = rows
        furthest[part] = squared(emb, np.arange(total)[part], emb, near.argmax(axis=1))
        # (B, N) -> (B', G), of queries alone
        result[part] = near[: max(0, queries - part.start), queries:]
    furthest[furthest == 0] = 1  # all images are equal

    i, j = expanded_reciprocal(near_rows, k1)
    weight = np.exp(-squared(emb, i, emb, j) / furthest[i])
    weight /= np.bincount(i, weight, minlength=total)[i]
    v = csr_array((weight, (i, j)), shape=(total, total))
    if k2 > 1:
        few = near_rows[:, :k2]
        v = _neighbours(few, total).astype(np.float64) @ v / few.shape[1]

    # (G, N) -> (N, G): the inverted index. Row j: who in the gallery has j among its neighbours.
    having = v[queries:].T.tocsr()
    for q in range(queries):
        own = slice(v.indptr[q], v.indptr[q + 1])
        theirs = having[v.indices[own]]  # (nnz of q, G)
        smaller = np.minimum(theirs.data, np.repeat(v.data[own], np.diff(theirs.indptr)))
        shared = np.bincount(theirs.indices, smaller, minlength=len(gallery))  # (G,)
        final = (1 - lam) * (1 - shared / (2 - shared)) + lam * (result[q] / furthest[q])
        result[q] = np.round(final * 2**24) / 2**24
    return result


def _neighbours(rows: np.ndarray, total: int, weights: np.ndarray | None = None) -> csr_array:
    """(M, k) rows of neighbours to a sparse (M, total) of weights, or of ones."""
    weights = np.ones(rows.size, np.int32) if weights is None else weights.ravel()
    ends = np.arange(0, rows.size + 1, rows.shape[1])
    return csr_array((weights, rows.ravel(), ends), shape=(len(rows), total))


def expanded_reciprocal(rows: np.ndarray, k1: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with j in R*(i) of `k_reciprocal`, sorted: two arrays.

    ``rows`` (N, k) are the nearest of each image, itself among them.
    """

    def reciprocal(k: int) -> csr_array:
        forward = _neighbours(rows[:, : k + 1], len(rows))
        return forward.multiply(forward.T).tocsr()

    full, half = reciprocal(k1), reciprocal(round(k1 / 2))
    sizes = half.sum(axis=1)  # (N,)
    # common[i, c] = |R(c, k1/2) ∩ R(i, k1)|, for c in R(i, k1); `half` is symmetric.
    common = (full @ half).multiply(full).tocoo()
    join = 3 * common.data > 2 * sizes[common.col]
    joined = csr_array((common.data[join], (common.row[join], common.col[join])), full.shape)
    pairs = (full + joined @ half).tocsr()
    pairs.sort_indices()
    return pairs.nonzero()
