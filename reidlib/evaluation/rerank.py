"""What can be done to a ranking without the network: re-ranking, query expansion, unit length.

No function here sees a label. `k_reciprocal` and `query_expansion` do look at the whole gallery, and
`k_reciprocal` at all the queries together: their scores are not those of the single-query protocol
and are reported apart from them. Junk (pid -1) must be dropped before, from embeddings and table,
or it takes part in every neighbourhood.

Embeddings are (N, D) NumPy arrays or tensors.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array


def normalise(emb: Any) -> np.ndarray:
    """Return the embeddings at unit length, float64: (N, D). A row of zeros stays as it is.

    Then ‖a − b‖² = 2 − 2 cos(a, b): ranking by Euclidean distance is ranking by cosine.

    >>> normalise([[3, 4], [0, 0]])
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    emb = _array(emb)
    length = np.linalg.norm(emb, axis=1, keepdims=True)
    return emb / np.where(length > 0, length, 1)


def query_expansion(
    query_emb: Any,
    gallery_emb: Any,
    n: int = 5,
    alpha: float = 3.0,
    *,
    both: bool = False,
    block_bytes: int = 64 * 2**20,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace each query by the weighted mean of itself and its n nearest gallery images.

    Average query expansion (Chum et al., ICCV 2007) is alpha = 0: all weigh the same.
    With alpha > 0 a neighbour weighs max(cos, 0)^alpha, the query itself 1 (Radenović et al., PAMI
    2018, arXiv 1711.02512). Either way on embeddings of unit length. One query does not
    see the others; whether a neighbour is the same person is not looked at.

    Args:
        query_emb: (Q, D).
        gallery_emb: (G, D), without junk.
        n: how many neighbours; all of them where the gallery has fewer.
        alpha: how fast the weight falls with the cosine.
        both: expand gallery images too, each by its n nearest others ("database-side
            augmentation"; with G > 1). That changes the gallery for every query.
        block_bytes: bytes of distances held at one time.

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
    query, gallery = (normalise(emb) for emb in _checked(query_emb, gallery_emb))
    if not isinstance(n, Integral) or n < 1 or not alpha >= 0:
        raise ValueError(f"n must be a whole number from 1 and alpha 0 or more: {n=}, {alpha=}")

    def expanded(emb: np.ndarray, others: bool) -> np.ndarray:
        """Of (M, D); ``others``: they are the gallery, and none is a neighbour of itself."""
        out = np.empty_like(emb)
        k = min(n + others, len(gallery))
        for start, near, slack in _blocks(emb, gallery, block_bytes):
            # (B, k) gallery rows and squared distances
            rows, squared = _nearest(emb, gallery, start, near, slack, k)
            weight = np.maximum(1 - squared / 2, 0) ** alpha
            own = np.arange(start, start + len(near))[:, None]
            if others:  # where it is not among them, all k equal it, and their number is no matter
                weight[rows == own] = 0
            # (B, D) + (B, k) over k of (B, k, D)
            out[start : start + len(near)] = emb[own[:, 0]] + np.einsum(
                "bk,bkd->bd", weight, gallery[rows]
            )
        return normalise(out)

    new_query = expanded(query, others=False)
    return new_query, expanded(gallery, others=True) if both and len(gallery) > 1 else gallery


def k_reciprocal(
    query_emb: Any,
    gallery_emb: Any,
    k1: int = 20,
    k2: int = 6,
    lam: float = 0.3,
    *,
    block_bytes: int = 64 * 2**20,
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
        query_emb: (Q, D).
        gallery_emb: (G, D), without junk.
        k1: neighbours that may be reciprocal; where there are fewer images, all are.
        k2: neighbours whose V is averaged.
        lam: share of the original distance, 0 to 1. 1 ranks as the embeddings do.
        block_bytes: bytes of distances held at one time (at least one row's).

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
    query, gallery = _checked(query_emb, gallery_emb)
    queries = len(query)
    emb = np.concatenate([query, gallery])  # (N, D)
    total = len(emb)
    k = min(max(k1 + 1, k2), total)

    nearest = np.empty((total, k), np.int32)
    furthest = np.empty(total)
    result = np.empty((queries, len(gallery)), np.float32)
    for start, near, slack in _blocks(emb, emb, block_bytes):
        rows = np.arange(start, start + len(near))
        nearest[rows] = _nearest(emb, emb, start, near, slack, k)[0]
        furthest[rows] = _squared(emb, rows, emb, near.argmax(axis=1))
        asking = rows[rows < queries]
        result[asking] = near[: len(asking), queries:]  # (B', N) -> (B', G)
    furthest[furthest == 0] = 1  # all images are equal

    i, j = _expanded_reciprocal(nearest, k1)
    weight = np.exp(-_squared(emb, i, emb, j) / furthest[i])
    weight /= np.bincount(i, weight, minlength=total)[i]
    v = csr_array((weight, (i, j)), shape=(total, total))
    if k2 > 1:
        few = nearest[:, :k2]
        v = _neighbours(few).astype(np.float64) @ v / few.shape[1]

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


def _array(emb: Any) -> np.ndarray:
    """Float64, also of a tensor (NumPy knows no bfloat16)."""
    emb = emb.detach().cpu().double() if isinstance(emb, torch.Tensor) else emb
    return np.asarray(emb, dtype=np.float64)


def _checked(query_emb: Any, gallery_emb: Any) -> list[np.ndarray]:
    """Both as (N, D) float64, or a ValueError."""
    sides = [_array(emb) for emb in (query_emb, gallery_emb)]
    for name, emb in zip(("query", "gallery"), sides, strict=True):
        if emb.ndim != 2 or 0 in emb.shape:
            raise ValueError(f"{name} embeddings must be (N, D) with N and D from 1: {emb.shape}")
        if not (np.abs(emb) < 1e150).all():
            raise ValueError(
                f"{name} embeddings hold NaN, infinity, or numbers of which the squares overflow"
            )
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(
            f"query embeddings have {sides[0].shape[1]} dimensions, gallery embeddings "
            f"{sides[1].shape[1]}: they must come from the same network"
        )
    return sides


def _blocks(
    emb: np.ndarray, others: np.ndarray, block_bytes: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Squared distances of (M, D) to (N, D), some rows at a time.

    Yields the first row's number, squared distances (B, N) right but for rounding (even below 0), and
    a bound on twice that rounding (B,). The array is written over by the next block.
    """
    # The matrix product loses its digits far from the origin, so both are centred first.
    centre = others.mean(axis=0)
    emb, others = emb - centre, others - centre
    norms, other_norms = (np.einsum("nd,nd->n", x, x) for x in (emb, others))
    # Higham, Accuracy and Stability, section 3.1: whatever the order in which a BLAS adds up.
    reach = np.sqrt(norms) + np.sqrt(other_norms.max())
    slack = 4 * (emb.shape[1] + 8) * np.finfo(np.float64).eps * reach**2
    # |a|^2 - 2 a.b + |b|^2 as one matrix product: (M, D + 2) and (N, D + 2).
    emb = np.column_stack([-2 * emb, norms, np.ones(len(emb))])
    others = np.column_stack([others, np.ones(len(others)), other_norms])
    step = max(1, block_bytes // (8 * len(others)))
    block = np.empty((min(step, len(emb)), len(others)))
    for start in range(0, len(emb), step):
        part = slice(start, start + step)
        # (B, D + 2) @ (D + 2, N) -> (B, N)
        near = np.matmul(emb[part], others.T, out=block[: len(emb[part])])
        yield start, near, slack[part]


def _nearest(
    emb: np.ndarray,
    others: np.ndarray,
    start: int,
    near: np.ndarray,
    slack: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each row of a block: their rows and squared distances, both (B, k).

    As a stable argsort of directly summed distances has them. All images that rounding could put
    among the k are measured directly, however many they are.
    """
    kth = torch.from_numpy(near).topk(k, dim=1, largest=False).values.amax(dim=1).numpy()
    close = np.flatnonzero(near <= (kth + slack)[:, None])  # at least k a row; sorted
    row, other = np.divmod(close, near.shape[1])
    squared = _squared(emb, start + row, others, other)
    order = np.lexsort((squared, row))  # stable, and `other` ascends
    first = np.searchsorted(row, np.arange(len(near)))
    chosen = order[first[:, None] + np.arange(k)]  # (B, k)
    return other[chosen], squared[chosen]


def _squared(emb: np.ndarray, rows: np.ndarray, others: np.ndarray, columns: np.ndarray):
    """Squared distances of pairs, summed directly: (len(rows),). The measure that decides order."""
    squared = np.empty(len(rows))
    step = max(1, 2**18 // emb.shape[1])  # 2 MB at a time, at home in the cache
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = emb[rows[part]] - others[columns[part]]  # (n, D)
        squared[part] = np.square(difference, out=difference).sum(axis=1)
    return squared


def _neighbours(nearest: np.ndarray) -> csr_array:
    """(N, k) rows of neighbours to the sparse (N, N) of ones."""
    total, k = nearest.shape
    ones = np.ones(nearest.size, np.int32)
    return csr_array(
        (ones, nearest.ravel(), np.arange(0, nearest.size + 1, k)), shape=(total, total)
    )


def _expanded_reciprocal(nearest: np.ndarray, k1: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with j in R*(i), sorted: two arrays."""

    def reciprocal(k: int) -> csr_array:
        forward = _neighbours(nearest[:, : k + 1])
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
