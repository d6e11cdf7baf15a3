"""Euclidean distances between embeddings, in float64, where equal images have equal distances.

A matrix product is quick, but it rounds an image by its place in a block, and copies of one image
would not tie. So order is decided by `squared`, summed pair by pair; `product_with` has a bound on
its rounding, which says what few pairs have to be summed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

BLOCK = 2**26  # bytes of distances held at one time, at least one row's


def as_embeddings(emb: Any, name: str) -> np.ndarray:
    """Return the embeddings of one side as floats, (N, D), checked.

    Floats keep their type, but for those that NumPy does not know (bfloat16).

    Args:
        emb: tensor or array; or floats on disk that give (n, D) for a slice, such as `Shards` or a
            dataset of h5py, which stay there: see `taken`.
        name: of the side, for messages: "query" or "gallery".

    Raises:
        ValueError: not (N, D) numbers, none at all, NaN or infinity, or too large for a sum of squares.

    >>> as_embeddings([[3, 4]], "query")
    array([[3., 4.]])
    """
    if isinstance(emb, torch.Tensor):
        emb = emb.detach().cpu()
        emb = emb.float() if emb.element_size() < 4 else emb
    if isinstance(emb, np.ndarray | torch.Tensor) or not hasattr(emb, "shape"):
        emb = np.asarray(emb)
    if emb.ndim != 2 or emb.shape[1] == 0 or emb.dtype.kind not in "fiu":
        raise ValueError(f"{name} embeddings must be (N, D) numbers, not {emb.shape} {emb.dtype}")
    if len(emb) == 0:
        raise ValueError(f"the {name} is empty: there is nothing to evaluate")
    emb = emb if emb.dtype.kind == "f" else np.asarray(emb).astype(np.float64)
    step = max(1, 2**22 // emb.shape[1])
    parts = [slice(start, start + step) for start in range(0, len(emb), step)]
    # The ends alone: a mask of all numbers would be large. NaN is neither below nor above.
    ends = np.array([(part.min(), part.max()) for part in map(emb.__getitem__, parts)], np.float64)
    if not (np.abs(ends) < 1e150).all():
        broken = np.concatenate([~np.isfinite(emb[part]).all(axis=1) for part in parts])
        broken = np.flatnonzero(broken)
        what = "are so large that their squared distances overflow float64"
        if len(broken):
            what = f"hold NaN or infinity in {listed(broken)}"
        raise ValueError(f"{name} embeddings {what}")
    return emb


def both_sides(query_emb: Any, gallery_emb: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return `as_embeddings` of query and gallery; a ValueError too if their dimensions differ."""
    query, gallery = as_embeddings(query_emb, "query"), as_embeddings(gallery_emb, "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query embeddings have {query.shape[1]} dimensions, gallery embeddings "
            f"{gallery.shape[1]}: they must come from the same network"
        )
    return query, gallery


def taken(emb: Any, rows: np.ndarray) -> np.ndarray:
    """Return rows of embeddings, (n, D), that lie in memory, or on disk and are read by slices.

    >>> taken(np.eye(3), np.array([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if isinstance(emb, np.ndarray) or not len(rows):
        return emb[rows] if len(rows) else emb[:0]
    wanted, back = np.unique(rows, return_inverse=True)
    # Rows near each other come in one read.
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 16) + 1)
    read = [emb[run[0] : run[-1] + 1][run - run[0]] for run in runs]
    return np.concatenate(read)[back]


def listed(rows: np.ndarray) -> str:
    """Say how many rows, and the first few of them.

    >>> listed(np.array([3, 8]))
    '2 rows (3, 8)'
    """
    first = ", ".join(str(row) for row in rows[:5])
    return f"{len(rows):,} row{'s'[: len(rows) > 1]} ({first}{', ...'[: 5 * (len(rows) > 5)]})"


def squared(a: np.ndarray, rows: np.ndarray | int, b: Any, columns: np.ndarray) -> np.ndarray:
    """Return the squared distances of pairs of rows, (n,): the measure that decides order.

    A pair's value does not depend on its neighbours: each step rounds by itself, unlike in a BLAS,
    whose edge blocks round differently.

    Args:
        a, b: (M, D) and (N, D) floats; ``b`` may lie on disk, as in `taken`.
        rows, columns: (n,) rows of ``a`` and of ``b``; one row of ``a`` stands for all.

    >>> squared(np.eye(2), 0, np.eye(2), np.array([0, 1]))
    array([0., 2.])
    """
    out = np.empty(len(columns))
    if not isinstance(b, np.ndarray):  # on disk: each row is read once, in order, some MB at a time
        step = max(1, 2**22 // a.shape[1])
        order = np.argsort(columns, kind="stable")
        for some in (order[n : n + step] for n in range(0, len(order), step)):
            there, back = np.unique(columns[some], return_inverse=True)
            asked = rows if np.ndim(rows) == 0 else rows[some]
            out[some] = squared(a, asked, taken(b, there), back)
        return out
    step = max(1, 2**16 // a.shape[1])  # 512 kB at a time, at home in the cache
    for start in range(0, len(columns), step):
        part = slice(start, start + step)
        # (n', D)
        difference = b[columns[part]].astype(np.float64)
        difference -= a[rows if np.ndim(rows) == 0 else rows[part]]
        # (n', D) -> (n',)
        out[part] = np.square(difference, out=difference).sum(axis=1)
    return out


def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances of all pairs, (M, D) and (N, D) to (M, N), summed directly."""
    a, b = (torch.from_numpy(np.ascontiguousarray(x, np.float64)) for x in (a, b))
    # (M, D), (N, D) -> (M, N)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def product_with(b: np.ndarray, dtype: type = np.float64) -> Callable:
    """Return a function of (B, D) to squared distances (B, N) to these (N, D), by a matrix product.

    With the distances, right but for rounding (even below 0), it returns ``slack`` (B,), a bound on
    twice that rounding: pairs of a row that are farther apart than that are in the right order. It
    is infinite where ``dtype`` cannot hold the numbers.

    The product is made in ``dtype``, float32 or float64.
    """
    # The product loses its digits far from the origin, so both sides are centred first.
    centre = b.mean(axis=0, dtype=np.float64)
    unit, tiny = float(np.finfo(dtype).eps) / 2, float(np.finfo(dtype).tiny)
    most = float(np.finfo(dtype).max) / 4

    def centred(emb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Subtracted in float64, and rounded once, into `out`.
        # (N, D) -> (N, D), (N,)
        out = np.subtract(emb, centre, out=np.empty(emb.shape, dtype), casting="same_kind")
        return out, np.einsum("nd,nd->n", out, out, dtype=np.float64)

    with np.errstate(over="ignore", invalid="ignore"):
        b, b_norms = centred(b)
    dim, farthest = b.shape[1], np.sqrt(b_norms.max())

    def product(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            a, a_norms = centred(a)
            reach = np.sqrt(a_norms) + farthest  # (B,)
            # Higham, Accuracy and Stability, section 3.1, whatever the order in which a BLAS adds
            # up: dim / 2 for the product, as 2 |a| |b| is at most reach^2 / 2; less than 8 for
            # coordinates, norms and their sum; in float64 dim for the norms, and less than 32 for
            # the direct sum. Below `tiny` a processor may take numbers for 0.
            bound = ((dim / 2 + 8) * unit + (dim + 32) * 2.0**-53) * reach**2
            slack = 2 * bound + 8 * dim * tiny * (1 + reach)
            slack[~(reach**2 < most)] = np.inf
            a *= -2
            # (B, D) @ (D, N) -> (B, N): |b|^2 - 2 a.b + |a|^2
            near = a @ b.T
            near += b_norms.astype(dtype)
            near += a_norms.astype(dtype)[:, None]
        return near, slack

    return product


def blocks(a: np.ndarray, b: np.ndarray, k: int) -> Iterator[tuple]:
    """Yield which rows of ``a``, their distances (B, N) by `product_with`, and `nearest` of them."""
    product = product_with(b)
    step = max(1, BLOCK // (8 * len(b)))
    for start in range(0, len(a), step):
        near, slack = product(a[start : start + step])
        # Many times as fast as NumPy's partition of rows.
        kth = torch.from_numpy(near).topk(k, dim=1, largest=False).values.amax(dim=1).numpy()
        # All that rounding could put among the k, at least k a row; sorted by row and column.
        row, column = np.divmod(np.flatnonzero(near <= (kth + slack)[:, None]), len(b))
        exact = squared(a, start + row, b, column)
        order = np.lexsort((exact, row))  # stable, and columns ascend
        first = np.searchsorted(row, np.arange(len(near)))
        # (B,) and (k,) -> (B, k)
        chosen = order[first[:, None] + np.arange(k)]
        yield slice(start, start + len(near)), near, column[chosen], exact[chosen]


def nearest(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest rows of ``b`` for each row of ``a``, and their squared distances.

    (M, D) and (N, D) floats to twice (M, k), nearest first, with k at most N: exactly those that a
    stable argsort of directly summed distances gives, where equal ones stand in the order of ``b``.
    Many equal rows are right, but slower.

    >>> rows, apart = nearest(np.zeros((1, 1)), np.array([[3.0], [-1.0], [1.0]]), k=2)
    >>> rows.tolist(), apart.tolist()
    ([[1, 2]], [[1.0, 1.0]])
    """
    rows, apart = zip(*(found for _, _, *found in blocks(a, b, k)), strict=True)
    return np.concatenate(rows), np.concatenate(apart)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return one distance over another, where 0 / 0 is 1: two that are both nothing are alike."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((above == 0) & (below == 0), 1.0, np.divide(above, below))
