"""From embeddings to scores: ranks, AP by both definitions, CMC, mINP, and what stands behind them.

The protocol is that of Market-1501, single query. Gallery images with pid -1 are junk and dropped;
pid 0 are distractors and stay as negatives. For each query, gallery images of its identity from
its own camera are dropped, for they are nearly the same picture; so is the query image itself
where the gallery holds it (the same path), which matters when no camera is known. Queries with no
match left are counted, named and left out of every mean. Equal distances rank in gallery order.

Tables are pandas tables with the columns ``pid`` and, if known, ``camid`` and ``path``; a row
number is a position in the table, whatever its index. A ``camid`` of -1 in every row, or no such
column, says that cameras are unknown. Embeddings are (N, D) NumPy arrays or tensors beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

TOPK = (1, 2, 5, 10)


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """How good a retrieval is, as a whole and query by query.

    Attributes:
        scores: fractions under ``mAP``, ``mAP_market``, ``top1`` ..., ``mINP``; beside them
            the counts ``queries`` (all of them) and ``queries_without_match``.
        per_query: one row a query, in their order: ``query`` (row number), ``path`` if known,
            ``pid``, ``camid``, ``matches`` (N), ``AP``, ``AP_market``, ``first_rank`` and
            ``last_rank`` (ranks of the first and last match, from 1, among the gallery images
            kept for this query), ``INP`` (N / last_rank). NaN where a query has no match.
        protocol: what was dropped and counted, in plain sentences.
    """

    scores: dict[str, float | int]
    per_query: pd.DataFrame
    protocol: str

    def table(self) -> pd.DataFrame:
        """The scores in per cent and the two counts, one row, for people."""
        cells = {k: v if isinstance(v, int) else round(100 * v, 2) for k, v in self.scores.items()}
        return pd.DataFrame([cells])

    def __repr__(self) -> str:
        """The table in per cent, then the protocol."""
        return f"{self.table().to_string(index=False)}\n(per cent) {self.protocol}"


def average_precision(ranks: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """Average precision of one query by the standard and by the Market-1501 definition.

    With r_i the rank of the i-th of N matches, the standard AP is (1/N) sum i/r_i, the precision
    at each match. Market-1501's own code takes the area under the precision-recall curve by
    trapezia, (1/N) sum 1/2 [i/r_i + (i-1)/(r_i-1)], where the second term is 1 if r_i = 1. That
    is never more than the standard: less by exactly (1/2N) sum (r_i-i) / (r_i (r_i-1)).

    Args:
        ranks: (N,) ranks of the matches, from 1, strictly ascending.

    Returns:
        AP and Market AP, fractions.

    Raises:
        ValueError: no ranks, a rank below 1, or ranks that do not ascend.

    Example:
        >>> ap, ap_market = average_precision([1, 3])  # (1 + 2/3) / 2, (1 + (2/3 + 1/2) / 2) / 2
        >>> round(ap, 4), round(ap_market, 4)
        (0.8333, 0.7917)
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or ranks.size == 0 or ranks[0] < 1 or (ranks[1:] <= ranks[:-1]).any():
        raise ValueError("ranks must be one or more strictly ascending numbers from 1")
    found = np.arange(1, len(ranks) + 1)
    at_match = found / ranks
    # Just before the match; before rank 1 nothing is shown, and precision counts as 1 there.
    before = np.where(ranks > 1, (found - 1) / np.maximum(ranks - 1, 1), 1.0)
    return float(at_match.mean()), float((at_match + before).mean() / 2)


def evaluate(
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    *,
    topk: Sequence[int] = TOPK,
    exclude_same_camera: bool = True,
    block_bytes: int = 32 * 2**20,
) -> Evaluation:
    """Rank the gallery for every query by Euclidean distance, and score the ranks.

    Nothing is sorted but near ties: a match's rank is one more than the number of kept gallery
    images before it. Ranks are those of distances summed directly in float64, so equal images tie
    exactly and results do not depend on ``block_bytes``. Beyond the inputs, memory holds
    a float64 copy of query and gallery embeddings, and ``block_bytes`` of distances (at least
    one query's). Many exact ties (binary codes, a dead network) are right but slower.

    Args:
        query_emb: (Q, D) floats.
        query: Q rows, pids from 1.
        gallery_emb: (G, D) floats.
        gallery: G rows, pids from -1.
        topk: the k of the reported CMC values.
        exclude_same_camera: False keeps matches from the query's own camera.
        block_bytes: bytes of distances held at one time.

    Raises:
        ValueError: arrays and tables do not fit each other, embeddings are not finite, query or
            gallery is empty, a query is junk or distractor, or no query at all has a match.
    """
    if not topk or min(topk) < 1:
        raise ValueError(f"topk must name ranks from 1, not {topk!r}")
    problem = _problem(query_emb, query, gallery_emb, gallery, exclude_same_camera)
    kept = np.flatnonzero(problem.gallery.pids != -1)
    column = np.cumsum(problem.gallery.pids != -1) - 1  # gallery row -> its place among the kept
    # Squared distances by matrix product lose their digits far from the origin, so both sets are
    # centred on the gallery first, in float64.
    gallery_centred = problem.gallery.emb[kept].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        centre = gallery_centred.mean(axis=0)
        gallery_centred -= centre
        query_centred = problem.query.emb.astype(np.float64) - centre
        gallery_norms = np.einsum("gd,gd->g", gallery_centred, gallery_centred)
        query_norms = np.einsum("qd,qd->q", query_centred, query_centred)
        reach = np.sqrt(query_norms) + np.sqrt(gallery_norms.max())  # (Q,)
        # A bound on twice what rounding can add, here and in the direct sum, whatever the order
        # in which a BLAS adds up: Higham, Accuracy and Stability, section 3.1.
        slack = 4 * (gallery_centred.shape[1] + 8) * np.finfo(np.float64).eps * reach**2
    if not np.isfinite(slack).all():
        raise ValueError("embeddings are so large that their squared distances overflow float64")
    query_centred *= -2

    rows, same_camera, itself = [], 0, 0
    step = max(1, block_bytes // (8 * len(kept)))
    block = np.empty((min(step, len(query)), len(kept)))
    for start in range(0, len(query), step):
        part = query_centred[start : start + step]
        # (B, D) @ (D, G) -> (B, G), |g|^2 - 2 q.g; |q|^2, the same all along a row, is left out.
        near = np.matmul(part, gallery_centred.T, out=block[: len(part)])
        near += gallery_norms
        for i, row in enumerate(near, start):
            split = problem.split(i)
            row[column[split.same_camera]] = np.inf
            row[column[split.itself]] = np.inf
            same_camera += len(split.same_camera)
            itself += len(split.itself)
            rows.append(_scores(_ranks(problem, i, row, slack[i], kept, column[split.matches])))

    per_query = pd.concat([_labels(problem.query, "query"), pd.DataFrame(rows)], axis=1)
    without = np.flatnonzero(per_query["matches"] == 0)
    if len(without) == len(query):
        raise ValueError(_why_no_match(problem, same_camera, itself))
    scores = {name: float(value) for name, value in _values(per_query, topk).mean().items()}
    scores |= {"queries": len(query), "queries_without_match": len(without)}
    protocol = _protocol(problem, len(kept), same_camera, itself, without)
    return Evaluation(scores, per_query, protocol)


def ranked_list(
    query_row: int,
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    *,
    topk: int | None = 10,
    show_excluded: bool = True,
    exclude_same_camera: bool = True,
) -> pd.DataFrame:
    """The gallery as one query sees it, nearest first: the very order that `evaluate` scores.

    Args:
        query_row: row number in ``query``; the other arguments are those of `evaluate`.
        topk: how many ranked images; None for all of them.
        show_excluded: show dropped images too, each where its distance would put it. They do not
            count towards ``topk``, and those beyond the topk-th ranked image are left out.

    Returns:
        ``rank`` (from 1, ``<NA>`` for dropped images), ``gallery`` (row number), ``path`` if
        known, ``pid``, ``camid``, ``distance`` (Euclidean) and ``status``: "match", "wrong",
        and for dropped images "same camera", "junk" or "query itself".

    Raises:
        ValueError: as `evaluate`; or no such query row. A query without match is no error.
    """
    problem = _problem(query_emb, query, gallery_emb, gallery, exclude_same_camera)
    if not 0 <= query_row < len(query):
        raise ValueError(f"query_row is {query_row}, but the query table has {len(query)} rows")
    if topk is not None and topk < 1:
        raise ValueError(f"topk must be 1 or more, or None for all, not {topk}")
    split = problem.split(query_row)
    table = _labels(problem.gallery, "gallery")
    squared = problem.squared_distances(query_row, np.arange(len(gallery)))
    table["distance"] = np.sqrt(squared)
    table["status"] = np.where(problem.gallery.pids == -1, "junk", "wrong").astype(object)
    table.loc[split.matches, "status"] = "match"
    table.loc[split.same_camera, "status"] = "same camera"
    table.loc[split.itself, "status"] = "query itself"
    table = table.iloc[np.argsort(squared, kind="stable")].reset_index(drop=True)
    is_ranked = table["status"].isin(["match", "wrong"])
    rank = is_ranked.cumsum()
    table.insert(0, "rank", rank.astype("Int64").where(is_ranked))
    if topk is not None:  # up to and with the topk-th ranked image
        table = table.iloc[: np.searchsorted(rank, topk) + 1]
    return table if show_excluded else table.dropna(subset="rank").reset_index(drop=True)


def distance_sample(
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    *,
    per_query: int = 10,
    exclude_same_camera: bool = True,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all matches and of a random sample of non-matches, for a histogram.

    Args:
        per_query: how many non-matches to draw for each query, without replacement (fewer where
            the gallery has fewer); the other arguments are those of `evaluate`.

    Returns:
        Two 1-D arrays of Euclidean distances under the rules of `evaluate`, in query order.
    """
    problem = _problem(query_emb, query, gallery_emb, gallery, exclude_same_camera)
    rng = np.random.default_rng(seed)
    matches, others = [], []
    for i, pid in enumerate(problem.query.pids):
        matches.append(problem.squared_distances(i, problem.split(i).matches))
        rows = np.flatnonzero((problem.gallery.pids != pid) & (problem.gallery.pids != -1))
        drawn = rng.choice(rows, min(per_query, len(rows)), replace=False, shuffle=False)
        others.append(problem.squared_distances(i, drawn))
    return np.sqrt(np.concatenate(matches)), np.sqrt(np.concatenate(others))


def confidence_interval(
    per_query: pd.DataFrame,
    *,
    versus: pd.DataFrame | None = None,
    topk: Sequence[int] = TOPK,
    by: str = "query",
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Percentile bootstrap over the queries: how far scores could move with other queries.

    It says nothing of another training seed. Queries of one person are alike, so ``by="pid"``,
    which draws persons instead of queries, is the more honest interval where there are several.

    Args:
        per_query: that of an `Evaluation`; queries without match are left out.
        versus: another run's table over the same queries: the interval is then that of the paired
            difference, ``per_query`` minus ``versus``. If it holds 0, the two may be equal.
        by: the column whose values are drawn, with replacement.
        repeats: how many times to draw.
        level: share of the draws inside the interval.

    Returns:
        A row for each score, columns ``value``, ``low`` and ``high``, fractions.

    Raises:
        ValueError: fewer than two values to draw from, or ``versus`` has other queries.
    """
    if repeats < 1 or not 0 < level < 1:
        raise ValueError(f"repeats must be 1 or more and level in (0, 1): {repeats=}, {level=}")
    values = _values(per_query, topk)
    if versus is not None:
        same = ["query", "pid", "matches"]
        if not np.array_equal(per_query[same].to_numpy(), versus[same].to_numpy()):
            raise ValueError("the two tables are not about the same queries and matches")
        values = values - _values(versus, topk)
    groups = values.groupby(per_query.loc[values.index, by])
    sums, sizes = groups.sum().to_numpy(), groups.size().to_numpy()  # (C, S), (C,)
    if len(sizes) < 2:
        raise ValueError(f"a bootstrap needs two values of {by!r} with matches or more")
    rng = np.random.default_rng(seed)
    means = np.empty((repeats, sums.shape[1]))  # (R, S)
    for mean in means:
        times = np.bincount(rng.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        mean[:] = times @ sums / (times @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"value": values.mean(), "low": low, "high": high})


class _Side(NamedTuple):
    """Query or gallery, checked."""

    emb: np.ndarray  # (N, D) as given
    pids: np.ndarray  # (N,) int64
    camids: np.ndarray  # (N,) int64, all -1 if unknown
    paths: np.ndarray | None  # (N,) str


class _Split(NamedTuple):
    """Gallery rows of a query's identity, ascending; each row stands in one of the three."""

    matches: np.ndarray
    same_camera: np.ndarray
    itself: np.ndarray


class _Problem(NamedTuple):
    query: _Side
    gallery: _Side
    rows_of: dict[int, np.ndarray]  # pid -> gallery rows, ascending
    by_camera: bool  # drop matches of the query's own camera
    cameras: str  # what is known of them, and done, as a sentence

    def split(self, i: int) -> _Split:
        """What the gallery holds of the identity of query ``i``."""
        rows = self.rows_of.get(int(self.query.pids[i]), np.empty(0, np.int64))
        same_camera = np.zeros(len(rows), bool)
        if self.by_camera:
            same_camera = self.gallery.camids[rows] == self.query.camids[i]
        itself = np.zeros(len(rows), bool)
        if self.query.paths is not None and self.gallery.paths is not None and self.query.paths[i]:
            itself = (self.gallery.paths[rows] == self.query.paths[i]) & ~same_camera
        return _Split(rows[~(same_camera | itself)], rows[same_camera], rows[itself])

    def squared_distances(self, i: int, rows: np.ndarray) -> np.ndarray:
        """Query ``i`` to gallery ``rows``, summed directly in float64: (len(rows),).

        The one measure that decides order. A row's value does not depend on its neighbours: each
        step rounds by itself, unlike in a BLAS, whose edge blocks round differently.
        """
        squared = np.empty(len(rows))
        step = max(1, 2**18 // self.gallery.emb.shape[1])  # 2 MB at a time, at home in the cache
        for start in range(0, len(rows), step):
            # (n, D)
            difference = self.gallery.emb[rows[start : start + step]].astype(np.float64)
            difference -= self.query.emb[i]
            squared[start : start + step] = np.square(difference, out=difference).sum(axis=1)
        return squared


def _ranks(
    problem: _Problem, i: int, near: np.ndarray, slack: float, kept: np.ndarray, matches: np.ndarray
) -> np.ndarray:
    """Ranks of the matches of query ``i``, ascending: (N,).

    ``near`` (G,) orders the kept gallery, but for pairs closer than ``slack``; infinite where an
    image is dropped for this query. ``matches`` are ascending places in it. A match that no other
    image comes close to has its rank by counting; otherwise the close ones are measured directly.
    """
    if len(matches) == 0:
        return np.empty(0, np.int64)
    front = near[near <= near[matches].max() + slack]  # the rest ranks behind the last match
    ahead = np.array([np.count_nonzero(front < near[m] - slack) for m in matches])
    up_to = np.array([np.count_nonzero(front <= near[m] + slack) for m in matches])
    if (up_to - ahead == 1).all():
        return np.sort(ahead + 1)
    close = np.zeros(len(near), bool)
    for m in matches:
        close |= np.abs(near - near[m]) <= slack
    rows = np.flatnonzero(close)  # holds the matches; ascending, so that a stable sort keeps ties
    order = np.argsort(problem.squared_distances(i, kept[rows]), kind="stable")
    place = np.empty(len(rows), np.int64)  # from 0, among the close ones
    place[order] = np.arange(len(rows))
    # What is clearly ahead of a match and close to none goes before its place among the close.
    ahead -= np.array([np.count_nonzero(near[rows] < near[m] - slack) for m in matches])
    return np.sort(ahead + place[np.searchsorted(rows, matches)] + 1)


def _scores(ranks: np.ndarray) -> dict[str, float]:
    """One row of the per-query table, from the ranks of the matches."""
    if len(ranks) == 0:
        names = ("AP", "AP_market", "first_rank", "last_rank", "INP")
        return {"matches": 0} | dict.fromkeys(names, np.nan)
    ap, ap_market = average_precision(ranks)
    first, last = float(ranks[0]), float(ranks[-1])
    return {
        "matches": len(ranks),
        "AP": ap,
        "AP_market": ap_market,
        "first_rank": first,
        "last_rank": last,
        "INP": len(ranks) / last,
    }


def _values(per_query: pd.DataFrame, topk: Sequence[int]) -> pd.DataFrame:
    """What each score is the mean of, over the queries that have a match: one denominator."""
    with_match = per_query[per_query["matches"] > 0]
    values = {"mAP": with_match["AP"], "mAP_market": with_match["AP_market"]}
    values |= {f"top{k}": (with_match["first_rank"] <= k).astype(float) for k in topk}
    return pd.DataFrame(values | {"mINP": with_match["INP"]})


def _labels(side: _Side, name: str) -> pd.DataFrame:
    """Row numbers under ``name``, path if known, pid and camid."""
    labels = {name: np.arange(len(side.pids)), "pid": side.pids, "camid": side.camids}
    table = pd.DataFrame(labels)
    if side.paths is not None:
        table.insert(1, "path", side.paths)
    return table


def _problem(
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    exclude_same_camera: bool,
) -> _Problem:
    """Check everything that is given, and settle what is dropped."""
    asked, shown = _side(query_emb, query, "query"), _side(gallery_emb, gallery, "gallery")
    if asked.emb.shape[1] != shown.emb.shape[1]:
        raise ValueError(
            f"query embeddings have {asked.emb.shape[1]} dimensions, gallery embeddings "
            f"{shown.emb.shape[1]}: they must come from the same network"
        )
    nobody = np.flatnonzero(asked.pids <= 0)
    if len(nobody):
        raise ValueError(
            f"{_listed(nobody)} of the query table have a pid of 0 (distractor) or -1 (junk) and "
            "ask for nobody: drop them, and number identities from 1"
        )
    if (shown.pids == -1).all():
        raise ValueError(f"all {len(shown.pids)} gallery images are junk (pid -1)")
    if (asked.camids == -1).all() or (shown.camids == -1).all():
        cameras = "Cameras are unknown, so nothing is dropped for its camera."
    elif exclude_same_camera:
        cameras = "Dropped for their query, being of the same identity and the same camera: {:,}."
    else:
        cameras = "Images of the same identity and the same camera stay in, as asked."
    rows_of = pd.Series(shown.pids).groupby(shown.pids).indices
    return _Problem(asked, shown, rows_of, "{" in cameras, cameras)


def _side(emb: Any, table: pd.DataFrame, name: str) -> _Side:
    """Check the embeddings and the table of ``name``, query or gallery."""
    if hasattr(emb, "detach"):  # a tensor; NumPy knows no bfloat16
        emb = emb.detach().cpu()
        emb = emb.float() if emb.element_size() < 4 else emb
    emb = np.asarray(emb)
    if emb.ndim != 2 or emb.shape[1] == 0 or emb.dtype.kind not in "fiu":
        raise ValueError(f"{name} embeddings must be (N, D) numbers, not {emb.shape} {emb.dtype}")
    if len(emb) != len(table):
        raise ValueError(f"{len(emb)} {name} embeddings beside a {name} table of {len(table)} rows")
    if len(emb) == 0:
        raise ValueError(f"the {name} is empty: there is nothing to evaluate")
    broken = np.flatnonzero(~np.isfinite(emb).all(axis=1))
    if len(broken):
        raise ValueError(f"{name} embeddings hold NaN or infinity in {_listed(broken)}")
    pids, camids = _whole(table, "pid", name), np.full(len(table), -1)
    if (pids < -1).any():
        raise ValueError(f"the {name} table has pids below -1, first {pids[pids < -1][0]}")
    if "camid" in table:
        camids = _whole(table, "camid", name)
    known = camids[pids != -1] >= 0
    if not known.any():
        camids = np.full(len(table), -1)
    elif not known.all():
        raise ValueError(
            f"{(~known).sum()} of {len(known)} images of the {name} table have no camera "
            "(camid below 0): give all cameras, or -1 in every row"
        )
    paths = table["path"].to_numpy(dtype=object) if "path" in table else None
    return _Side(emb, pids, camids, paths)


def _whole(table: pd.DataFrame, column: str, name: str) -> np.ndarray:
    """An int64 column of the table of ``name``."""
    if column not in table:
        raise ValueError(f"the {name} table has no column {column!r}")
    values = table[column].to_numpy()
    if values.dtype.kind not in "iu":
        raise ValueError(f"{column} of the {name} table must be whole numbers, not {values.dtype}")
    return values.astype(np.int64)


def _listed(rows: np.ndarray) -> str:
    """For messages: how many rows, and the first few of them."""
    first = ", ".join(str(row) for row in rows[:5])
    return f"{len(rows):,} row{'s'[: len(rows) > 1]} ({first}{', ...'[: 5 * (len(rows) > 5)]})"


def _protocol(
    problem: _Problem, kept: int, same_camera: int, itself: int, without: np.ndarray
) -> str:
    """What was done, as sentences."""
    total, queries = len(problem.gallery.pids), len(problem.query.pids)
    lines = [
        f"Queries: {queries:,}. Gallery images: {kept:,}, after {total - kept:,} of junk (pid -1) "
        "were dropped.",
        problem.cameras.format(same_camera),
    ]
    if itself:
        lines.append(f"Dropped for their query, being the query image itself (path): {itself:,}.")
    if len(without):
        lines.append(f"Left out of all means, having no match: query {_listed(without)}.")
    return " ".join(lines) + " Equal distances rank in gallery order."


def _why_no_match(problem: _Problem, same_camera: int, itself: int) -> str:
    """The likely cause, where no query has a match."""
    if same_camera or itself:
        return (
            "no query has a match: all gallery images of the queries' identities were dropped, "
            f"{same_camera:,} for the same camera, {itself:,} for being the query image itself. "
            "Pass exclude_same_camera=False, or camid -1 in every row, if cameras do not matter"
        )
    some = [", ".join(map(str, np.unique(side.pids)[:5])) for side in problem[:2]]
    return (
        "no query has a match: the pids of query and gallery share nothing "
        f"(query {some[0]}, ...; gallery {some[1]}, ...). Do both come from one data set?"
    )
