"""At which rank does each match of each query stand? The engine that `Retrieval` scores with.

A rank is 1, plus the matches before it, plus the others before it. Matches are few: all are measured
directly. The others are counted in a matrix product, and measured only where its rounding leaves open
on which side of a match they stand. So ranks are those of a stable sort of directly measured
distances, whatever the blocks and threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
from threadpoolctl import threadpool_limits

from reidlib.evaluation.partial import Partial

UNSURE = 1000  # a query with more unsure images than this in float32 is counted again in float64

NUMBERS = 2**22  # of gallery embeddings, and as many distances a thread, held at one time
ONE_AT_A_TIME = Lock()  # two threads at many short calls would wait for each other at each of them


def match_ranks(
    query: np.ndarray,
    rows: np.ndarray,
    is_match: np.ndarray,
    kept: np.ndarray,
    measure: Callable,
    tile_of: Callable,
    dim: int,
    partial_file: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the matches of each query, nearest first, and their ranks among the gallery rows kept.

    Time grows with the gallery, memory does not: it is cut into tiles, each read once, and the queries
    into blocks. Counts add up over tiles, so that work which was interrupted goes on. Many ties
    (binary codes, a dead network) are right but slower.

    Args:
        query, rows: (P,) the pairs of one identity: query, ascending, and gallery row.
        is_match: (P,) which of them are matches; the rest is not ranked.
        kept: (K,) the gallery rows that are ranked, ascending.
        measure: what decides order, of (n,) queries, or one, and (n,) gallery rows: (n,).
        tile_of: gallery rows and float type to two functions. The first, of (B,) queries, gives what
            `measure` does but for rounding, (B, n), and its slack (B,): see `distances.product_with`.
            The second is `measure` with places in the tile for rows.
        dim: numbers in an embedding.
        partial_file: where counts so far are kept, and taken up again: see `Partial`.

    Returns:
        Gallery rows and ranks from 1, both (M,), query by query.
    """
    places = np.searchsorted(kept, rows)  # (P,)
    asking, match = query[is_match], rows[is_match]  # (M,)
    key = measure(asking, match)
    order = np.lexsort((match, key, asking))  # equal distances rank in gallery order
    match, key = match[order], key[order]
    first = np.searchsorted(asking, np.arange(query.max(initial=-1) + 2))
    width = max(1, min(2**15, NUMBERS // dim, len(kept)))
    height = max(1, min(2**8, NUMBERS // width))
    work = asking, match, key, kept, measure(0, kept[::width])
    so_far = _begin(partial_file, work, len(first))
    others, later, left, (first_turn, place) = so_far.state.values()

    def count(start: int, product: Callable, measure: Callable, block: np.ndarray) -> None:
        """Add the others in a tile of the gallery, from `start`, for some queries."""
        near, slack = product(block)  # (B, W), (B,)
        own = np.flatnonzero((places >= start) & (places < start + near.shape[1]))
        own = own[np.isin(query[own], block)]
        near[np.searchsorted(block, query[own]), places[own] - start] = np.inf  # no others
        mine = np.flatnonzero(np.isin(asking, block))
        keys = [key[first[i] : first[i + 1]] for i in block]
        before, close = _count_sure(near, keys, slack / 2)
        if near.dtype == np.float32:
            later[block] |= [len(one) > UNSURE for one in close] | ~np.isfinite(slack)
        whose = np.repeat(block, [len(one) for one in close])
        found, whose = (x[~later[whose]] for x in (np.concatenate(close), whose))
        measured = whose, measure(whose, found), kept[start + found]
        others[mine] += before + _count_measured((asking[mine], key[mine], match[mine]), measured)

    # A thread a block, instead of a matrix product in threads and all the rest in one.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for turn in range(first_turn, 2):
            blocks = [left[i : i + height] for i in range(0, len(left), height)]
            for start in range(place, len(kept), width) if blocks else ():
                tile = tile_of(kept[start : start + width], (np.float32, np.float64)[turn])
                list(pool.map(partial(count, start, *tile), blocks))
                so_far.keep(left=left, at=(turn, start + width))
            left, place = np.flatnonzero(later), 0  # none after float64
            others[np.isin(asking, left)], later[:] = 0, False
    return match, np.arange(len(match)) - first[asking] + 1 + others


def _begin(file: Path | None, work: tuple, queries: int) -> Partial:
    """Nothing is counted yet, or what the file has kept; ``work`` begins with whose the matches are."""
    state = {
        "others": np.zeros(len(work[0]), np.int64),  # how many stand before each match
        "later": np.zeros(queries, bool),  # queries of which float32 leaves too much open
        "left": np.unique(work[0]),
        "at": np.zeros(2, np.int64),  # float32 or float64, and the next tile's first place
    }
    return Partial(file, work, state)


def _count_sure(near: np.ndarray, keys: list[np.ndarray], apart: np.ndarray) -> tuple:
    """Count what surely stands before each match, (m,), and list what is too close to one.

    Args:
        near: (B, W), right to ``apart``.
        keys: of each query, what was measured of its matches, ascending.
        apart: (B,)

    Returns:
        The counts of all matches, and of each query the columns of what was too close to count.
    """
    last = [key[-1] for key in keys] + apart
    front = np.flatnonzero(near <= last.astype(near.dtype)[:, None])  # the rest is behind all
    values = near.ravel()[front]
    cuts = np.searchsorted(front, near.shape[1] * np.arange(len(near) + 1))
    counts, close = [], []
    with ONE_AT_A_TIME:
        for n, key in enumerate(keys):
            value = values[cuts[n] : cuts[n + 1]]
            low, high = ((key + by).astype(near.dtype) for by in (-apart[n], apart[n]))
            ordered = np.sort(value)
            before = ordered.searchsorted(low)
            is_close = np.zeros(len(value), bool)
            for m in np.flatnonzero(ordered.searchsorted(high, "right") > before):  # mostly a few
                is_close |= (value >= low[m]) & (value <= high[m])
            counts.append(before - np.sort(value[is_close]).searchsorted(low))
            close.append(front[cuts[n] : cuts[n + 1]][is_close] - n * near.shape[1])
    return np.concatenate(counts), close


def _count_measured(matches: tuple, close: tuple) -> np.ndarray:
    """Count what was too close to a match and stands before it, (m,).

    Both are queries, measures and gallery rows, (m,) and (U,), query by query; matches in their order.
    """
    query, key, rows = (np.concatenate(both) for both in zip(matches, close, strict=True))
    is_close = np.lexsort((rows, key, query)) >= len(matches[0])
    return np.cumsum(is_close)[~is_close] - np.searchsorted(close[0], matches[0])
