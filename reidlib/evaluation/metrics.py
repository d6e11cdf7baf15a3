"""From the ranks of matches to scores: AP by both definitions, CMC and mINP."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

TOPK = (1, 2, 5, 10)
# The scores by their keys in metrics.json, and as tables for people head them.
SCORES = {"mAP": "mAP", "mAP_market": "mAP (Market)"}
SCORES |= {f"top{k}": f"top-{k}" for k in TOPK} | {"mINP": "mINP"}


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

    >>> ap, ap_market = average_precision([1, 3])  # (1 + 2/3) / 2, (1 + (2/3 + 1/2) / 2) / 2
    >>> round(ap, 4), round(ap_market, 4)
    (0.8333, 0.7917)
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or ranks.size == 0 or ranks[0] < 1 or (ranks[1:] <= ranks[:-1]).any():
        raise ValueError("ranks must be one or more strictly ascending numbers from 1")
    of_query = per_query_scores(np.zeros(len(ranks), np.int64), ranks, 1)
    return float(of_query["AP"].item()), float(of_query["AP_market"].item())


def per_query_scores(query: np.ndarray, ranks: np.ndarray, queries: int) -> pd.DataFrame:
    """Return the per-query table from the ranks of all matches, (M,), and whose they are, (M,).

    Both are query by query, and ranks ascend. Scores are NaN where a query has no match.
    """
    first = np.searchsorted(query, np.arange(queries + 1))
    found = np.arange(1, len(ranks) + 1) - first[query]  # its number among the query's matches
    precision = found / ranks
    # Just before the match; before rank 1 nothing is shown, and precision counts as 1 there.
    before = np.where(ranks > 1, (found - 1) / np.maximum(ranks - 1, 1), 1.0)
    # (M,) -> (Q,)
    ap, ap_market = (np.bincount(query, x, queries) for x in (precision, (precision + before) / 2))
    matches = np.diff(first)
    have = matches > 0
    first_rank, last_rank = np.full((2, queries), np.nan)
    first_rank[have], last_rank[have] = ranks[first[:-1][have]], ranks[first[1:][have] - 1]
    table = {"matches": matches, "AP": ap, "AP_market": ap_market, "first_rank": first_rank}
    table = pd.DataFrame(table | {"last_rank": last_rank, "INP": matches / last_rank})
    table[["AP", "AP_market"]] = table[["AP", "AP_market"]].div(matches, axis=0)  # 0 / 0 is NaN
    return table


def score_values(per_query: pd.DataFrame, topk: Sequence[int] = TOPK) -> pd.DataFrame:
    """Return what each score is the mean of: a row a query that has a match, a column a score."""
    with_match = per_query[per_query["matches"] > 0]
    values = {"mAP": with_match["AP"], "mAP_market": with_match["AP_market"]}
    values |= {f"top{k}": (with_match["first_rank"] <= k).astype(float) for k in topk}
    return pd.DataFrame(values | {"mINP": with_match["INP"]})
