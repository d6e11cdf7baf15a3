"""Is one row of a table better than another, or only luckier?

Two kinds of luck decide a score: which people are asked for, and which seed the network was trained
from. `difference` accounts for both; `holm` accounts for looking at many differences at once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from reidlib.evaluation.metrics import score_values

TABLES = Sequence[pd.DataFrame]  # per-query tables of one row, one for each seed
ENDS = (1 - 0.95) / 2, (1 + 0.95) / 2  # between which 95 % of some draws lie


class Spread(NamedTuple):
    """How far a score moves from seed to seed; see `seed_spread`."""

    deviation: float  # standard deviation over seeds, a fraction; NaN where it cannot be known
    freedom: int  # its degrees of freedom: seeds, less one for each row


class Difference(NamedTuple):
    """The difference of two rows' mAP, first minus second, all as fractions."""

    value: float
    low: float  # the ends of the 95 % interval
    high: float
    p: float  # two-sided, of "the two are equal"
    people: float  # standard error from which people are asked for
    seeds: float  # standard error from which seeds were trained; NaN if it is left out


def _check_same_queries(*tables: pd.DataFrame) -> None:
    first, *rest = (table[["query", "pid", "matches"]].to_numpy() for table in tables)
    if not all(np.array_equal(first, other) for other in rest):
        raise ValueError("the tables are not about the same queries and matches.")


def seed_spread(rows: Mapping[str, TABLES]) -> Spread:
    """Return the standard deviation of the mAP over seeds, pooled over all rows with several.

    Two or three seeds of one row say little about its spread; rows of one recipe on one data set
    may be taken to have the same, which gives Σ (seeds − 1) degrees of freedom. A row that
    collapsed has another spread: leave it out.
    """
    scores = [[t["AP"].mean() for t in tables] for tables in rows.values()]
    freedom = sum(len(values) - 1 for values in scores)
    squares = sum(np.var(values) * len(values) for values in scores)
    return Spread(math.sqrt(squares / freedom) if freedom else math.nan, freedom)


def difference(first: TABLES, second: TABLES, *, spread: Spread | None = None) -> Difference:
    """Compare the mAP of two rows on the same queries: first minus second, interval and paired test.

    Each query's AP is averaged over a row's seeds, and the two rows are subtracted query by
    query. With dᵢ that difference, n queries and S_g = Σ (dᵢ − d̄) over the queries of person g of G,
    the variance from *people* is G/(G−1) · Σ S_g² / n²: queries of one person are alike, so persons
    and not queries count (cluster-robust variance; Cameron and Miller 2015, section II). The
    variance from *seeds* is s²/seeds of the first + s²/seeds of the second, s from `spread`. Both
    add up; the test is Student's t with the degrees of freedom of Satterthwaite (1946).

    Args:
        first, second: a row's per-query tables (`Evaluation.per_query`), one for each seed.
        spread: of `seed_spread`. None leaves the seeds out: the answer is then about these very
            networks asked about other people, and says nothing of training them again.

    Raises:
        ValueError: no table, tables of different queries, or fewer than two people.
    """
    if not first or not second:
        raise ValueError("each row needs the per-query table of one seed at least.")
    _check_same_queries(*first, *second)
    # (seeds, Q) -> (Q,)
    ours, theirs = (np.mean([t["AP"].dropna() for t in row], axis=0) for row in (first, second))
    gaps = ours - theirs
    value = float(gaps.mean())
    # (Q,) -> (G,)
    pids = first[0].dropna(subset="AP")["pid"].to_numpy()
    sums = pd.Series(gaps - value).groupby(pids).sum().to_numpy()
    people = len(sums)
    if people < 2:
        raise ValueError("a comparison needs queries of two people at least.")
    parts = [(people / (people - 1) * float(sums @ sums) / len(gaps) ** 2, people - 1)]
    seeds = math.nan
    if spread is not None and spread.freedom:
        seeds = spread.deviation * math.sqrt(1 / len(first) + 1 / len(second))
        parts.append((seeds**2, spread.freedom))
    variance = sum(v for v, _ in parts)
    if variance == 0:  # the two rows agree on every query
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, 0.0, seeds)
    error, freedom = math.sqrt(variance), variance**2 / sum(v**2 / f for v, f in parts)
    reach = stats.t.ppf(0.975, freedom) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Difference(value, value - reach, value + reach, p, math.sqrt(parts[0][0]), seeds)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return Holm's adjusted p-values (Holm 1979): compare each with the level wanted of all.

    Of those below 0.05, the chance that even one is luck is at most 5 %, however many were looked
    at and however they depend on each other. NaN, a comparison that was not made, stays.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")  # NaN last
    left = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.minimum(left * p[order], 1))
    return adjusted


def times_drawn(
    groups: int | Sequence[int], repeats: int = 1000, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield how often each group is drawn in each repeat of a bootstrap: (G,) whole numbers.

    Args:
        groups: how many there are, G, of which G are drawn with replacement; or the numbers of
            several kinds, each drawn by itself: then G is their sum.

    >>> [int(times.sum()) for times in times_drawn(5, repeats=2)]
    [5, 5]
    """
    rng = np.random.default_rng(seed)
    kinds = [groups] if np.ndim(groups) == 0 else [n for n in groups if n]
    for _ in range(repeats):
        drawn = [np.bincount(rng.integers(n, size=n), minlength=n) for n in kinds]
        yield np.concatenate(drawn)


def confidence_interval(
    per_query: pd.DataFrame,
    *,
    versus: pd.DataFrame | None = None,
    by: str = "query",
    repeats: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Percentile bootstrap, 95 %, over the queries: how far scores could move with other queries.

    It says nothing of another training seed. Queries of one person are alike, so ``by="pid"``,
    which draws persons instead of queries, is the more honest interval where there are several.

    Args:
        per_query: that of an `Evaluation`; queries without match are left out.
        versus: another run's table over the same queries: the interval is then that of the paired
            difference, ``per_query`` minus ``versus``. If it holds 0, the two may be equal.
        by: the column whose values are drawn, with replacement, `repeats` times.

    Returns:
        A row for each score, columns ``value``, ``low`` and ``high``, fractions; the ends are NaN where
        there are fewer than two values to draw from.

    Raises:
        ValueError: ``versus`` has other queries, or repeats below 1.

    >>> from reidlib.evaluation.retrieval import evaluate
    >>> query, gallery = pd.DataFrame({"pid": [1, 2]}), pd.DataFrame({"pid": [1, 2]})
    >>> found = evaluate([[0.0], [1.0]], query, [[0.0], [1.0]], gallery)
    >>> confidence_interval(found.per_query).loc["mAP"].tolist()
    [1.0, 1.0, 1.0]
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, not {repeats}")
    values = score_values(per_query)
    if versus is not None:
        _check_same_queries(per_query, versus)
        values = values - score_values(versus)
    groups = values.groupby(per_query.loc[values.index, by])
    sums, sizes = groups.sum().to_numpy(), groups.size().to_numpy()  # (C, S), (C,)
    if len(sizes) < 2:
        return pd.DataFrame({"value": values.mean(), "low": np.nan, "high": np.nan})
    # (C,) @ (C, S) -> (S,), R times
    means = [times @ sums / (times @ sizes) for times in times_drawn(len(sizes), repeats, seed)]
    low, high = np.quantile(means, ENDS, axis=0)
    return pd.DataFrame({"value": values.mean(), "low": low, "high": high})
