"""Same person or not: distances of pairs, ROC, thresholds, and how sure you can be of them.

Retrieval (`evaluation`) asks who of a gallery is nearest; verification asks of two images whether
they show one person, and answers yes where their distance is at most a threshold. A *genuine* pair
shows one person, an *impostor* pair two. FMR, the false-match rate, is the share of impostor pairs
that are accepted; TMR, the true-match rate (also TAR, or recall), the share of genuine pairs.

`pairs` says which pairs there are.

Pairs of one person are alike, and so are all pairs of two people, so 50 million pairs of 750
people are far fewer independent facts. Intervals here are drawn over people: a person drawn twice
counts twice, a genuine pair counts as often as its person, and an impostor pair as often as the
product of both. That is the subsets bootstrap (Bolle, Ratha and Pankanti, CVIU 93, 2004) for
genuine, and the pigeonhole bootstrap (Owen, Annals of Applied Statistics 1, 2007) for impostor
pairs. They say nothing of other cameras or another training seed.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from reidlib.evaluation.intervals import times_drawn
from reidlib.evaluation.pairs import Pairs

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)


def roc(pairs: Pairs) -> pd.DataFrame:
    """The ROC curve, exact: ``threshold``, ``FMR`` and ``TMR`` at each of its corners.

    A pair is accepted where its distance is at most the threshold. Straight lines between the rows
    are the whole curve: all other thresholds lie on them. A slanted one is a tie of genuine and
    impostor pairs.

    >>> from reidlib.evaluation.pairs import pair_distances
    >>> query, gallery = (pd.DataFrame({"pid": p}) for p in ([1], [1, 1, 2]))
    >>> roc(pair_distances([[0.0]], query, [[1.0], [3.0], [2.0]], gallery))
       threshold  FMR  TMR
    0       -inf  0.0  0.0
    1        1.0  0.0  0.5
    2        3.0  1.0  0.5
    3        3.0  1.0  1.0
    """
    distance = pairs.genuine["distance"].to_numpy()
    last = np.append(distance[1:] != distance[:-1], True)  # of equal ones
    at, up_to = distance[last], pairs.genuine["up_to"].to_numpy()[last]
    below = pairs.genuine["below"].to_numpy()[last]
    accepted = np.flatnonzero(last) + 1
    # Two corners at each genuine distance: just below it, and at it. (n,), (n,) -> (2n,)
    corners = {
        "threshold": np.stack([np.nextafter(at, -np.inf), at], axis=1),
        "FMR": np.stack([below, up_to], axis=1) / pairs.impostors,
        "TMR": np.stack([np.append(0, accepted[:-1]), accepted], axis=1) / len(distance),
    }
    table = pd.DataFrame({name: column.ravel() for name, column in corners.items()})
    ends = [
        {"threshold": -np.inf, "FMR": 0.0, "TMR": 0.0},
        {"threshold": np.inf, "FMR": 1.0, "TMR": 1.0},
    ]
    table = pd.concat([pd.DataFrame(ends[:1]), table, pd.DataFrame(ends[1:])])
    return table.drop_duplicates(["FMR", "TMR"]).reset_index(drop=True)


def auc(pairs: Pairs) -> float:
    """Area under the ROC: how often a genuine pair is nearer than an impostor one, a tie half."""
    nearer = (pairs.genuine["below"] + pairs.genuine["up_to"]).mean() / 2
    return float(1 - nearer / pairs.impostors)


def equal_error_rate(pairs: Pairs) -> float:
    """The rate at which FMR and 1 - TMR are equal, on the straight lines of the ROC."""
    curve = roc(pairs)
    fmr, gap = curve["FMR"].to_numpy(), (curve["FMR"] + curve["TMR"]).to_numpy() - 1
    i = int(np.argmax(gap >= 0))  # never the first row, where the gap is -1
    share = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(fmr[i - 1] + share * (fmr[i] - fmr[i - 1]))


def true_match_rate(
    pairs: Pairs,
    at: Sequence[float] = FMRS,
    *,
    draws: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The threshold at each of some false-match rates, and the true-match rate there.

    The threshold is the largest with an FMR of at most the given one. A rate below 1 / (number of
    impostor pairs) cannot be measured: no pair could be accepted, and its row is NaN. By the rule of
    30 (Doddington et al., Speech Communication 31, 2000) a rate with 30 false matches behind it is
    known to within 30 per cent of itself, at 90 per cent confidence. That assumes independent pairs,
    so it holds at best.

    Args:
        pairs: from `pair_distances`.
        at: false-match rates, in (0, 1].
        draws: of persons, for intervals (the module's docstring says how); 0 for none.
        level: share of the draws inside an interval.
        seed: of the draws.

    Returns:
        A row for each rate, which is the index ``FMR``: ``threshold``, ``TMR``; ``false_matches``,
        how many impostor pairs are accepted there, and ``people_pairs``, of how many different
        pairs of people they are. With draws also ``threshold_low``, ``threshold_high``,
        ``TMR_low`` and ``TMR_high``; each draw chooses its threshold anew.

    Raises:
        ValueError: a rate beyond (0, 1]; one so high that more impostor pairs must be kept; or
            draws from fewer than two people.
    """
    at = np.asarray(at, dtype=float)
    if at.ndim != 1 or len(at) == 0 or not ((at > 0) & (at <= 1)).all():
        raise ValueError(f"false-match rates must be in (0, 1], not {at}")
    distance = pairs.genuine["distance"].to_numpy()
    kept = pairs.impostor["distance"].to_numpy()
    allowed = np.floor(at * pairs.impostors * (1 + 1e-12)).astype(np.int64)  # 0.29 * 100 < 29
    rows = []
    for fmr, n in zip(at, allowed, strict=True):
        if n == 0:
            rows.append((np.nan, np.nan, 0, 0))
            continue
        if n < len(kept):
            refused = kept[n]
        elif n <= pairs.keep or math.isinf(pairs.limit):
            refused = pairs.limit  # the next distance, exactly: see `_nearest`
        else:
            raise ValueError(_keep_more(fmr, pairs))
        accepted = pairs.impostor.iloc[: np.searchsorted(kept, refused, "left")]
        codes = _people_pair(pairs, accepted)
        threshold = np.nextafter(refused, -np.inf) if np.isfinite(refused) else np.inf
        true = np.searchsorted(distance, threshold, "right") / len(distance)
        rows.append((threshold, true, len(accepted), len(np.unique(codes))))
    names = ["threshold", "TMR", "false_matches", "people_pairs"]
    table = pd.DataFrame(rows, columns=names, index=pd.Index(at, name="FMR"))
    if draws:
        drawn = np.full((draws, 2, len(at)), np.nan)  # (R, threshold or TMR, F)
        usable = np.flatnonzero(allowed > 0)
        for values, weights in zip(drawn, _draws(pairs, draws, seed), strict=True):
            if len(usable):
                values[:, usable] = _operate(pairs, weights, at[usable])
        for i, name in enumerate(("threshold", "TMR")):
            table[f"{name}_low"], table[f"{name}_high"] = _interval(drawn[:, i], level)
    return table


def roc_band(
    pairs: Pairs, points: int = 25, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """The ROC at some false-match rates, with intervals: `true_match_rate` as far as it can be known.

    The rates lie evenly on a log axis and start at one false match; those of `FMRS` are among them.
    They end at half of the impostor pairs that were kept, because some draws need more than a rate.

    Args:
        pairs: from `pair_distances`.
        points: how many rates, beside those of `FMRS`.
        draws, level, seed: see `true_match_rate`.

    Raises:
        ValueError: a draw needs more impostor pairs than were kept, or there are fewer than two people.
    """
    most = min(1.0, 0.5 * len(pairs.impostor) / pairs.impostors)
    rates = {*np.geomspace(1 / pairs.impostors, most, points), *(f for f in FMRS if f <= most)}
    return true_match_rate(pairs, sorted(rates), draws=draws, level=level, seed=seed).dropna()


def at_threshold(
    pairs: Pairs, threshold: float, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """What a threshold that was chosen elsewhere gives on these pairs.

    Where no pair at all is accepted, or every one, the draws cannot vary; the interval then reaches
    3/n from there, n the number of pairs: the rule of three, for independent pairs, so at best.

    Args:
        pairs: from `pair_distances`.
        threshold: pairs with at most this distance are accepted.
        draws: of persons, for the intervals (the module's docstring says how).
        level: share of the draws inside an interval.
        seed: of the draws.

    Returns:
        Rows ``FMR`` and ``TMR``, columns ``value``, ``low``, ``high``, ``accepted`` and ``pairs``.

    Raises:
        ValueError: the threshold lies beyond the impostor pairs that were kept, or is NaN; draws
            from fewer than two people.
    """
    false, true = _accepted(pairs, threshold)
    values = np.empty((draws, 2))
    counts = ((len(false), pairs.impostors), (len(true), len(pairs.genuine)))
    one, other = _people_of(pairs, false)
    alike = pairs.query_person[true["query"]]
    everybody = pairs.query_person[pairs.genuine["query"]]
    for row, weights in zip(values, _draws(pairs, draws, seed), strict=True):
        false, total = weights[one] @ weights[other], _impostor_weight(pairs, weights)
        row[0] = false / total if total else np.nan
        true, total = weights[alike].sum(), weights[everybody].sum()
        row[1] = true / total if total else np.nan
    low, high = _interval(values, level)
    rows = []
    for i, (accepted, n) in enumerate(counts):
        if accepted == 0:
            high[i] = max(high[i], min(1.0, 3 / n))
        if accepted == n:
            low[i] = min(low[i], max(0.0, 1 - 3 / n))
        rows.append((accepted / n, low[i], high[i], accepted, n))
    columns = ["value", "low", "high", "accepted", "pairs"]
    return pd.DataFrame(rows, columns=columns, index=["FMR", "TMR"])


def camera_rates(pairs: Pairs, threshold: float) -> pd.DataFrame:
    """What one threshold gives between each camera of a query and each of the gallery.

    Returns:
        ``pairs.cameras`` (both cameras, how many pairs, AUC) with ``TMR`` and ``FMR`` at the
        threshold; NaN where there is no such pair, as for TMR within one camera.

    Raises:
        ValueError: as `at_threshold`.
    """
    names = ["query_camid", "gallery_camid"]
    table = pairs.cameras.copy()
    index = pd.MultiIndex.from_frame(table[names])
    for rate, accepted, n in zip(
        ("FMR", "TMR"), _accepted(pairs, threshold), ("impostor", "genuine"), strict=True
    ):
        counts = accepted.groupby(names).size().reindex(index, fill_value=0).to_numpy()
        table[rate] = counts / table[n].where(table[n] > 0)
    return table


def match_probability(prior: float, tmr: float, fmr: float) -> float:
    """How likely an accepted pair shows one person, by Bayes' rule.

    Args:
        prior: share of genuine pairs among all that are compared.
        tmr: true-match rate at the threshold.
        fmr: false-match rate there.

    Returns:
        prior TMR / (prior TMR + (1 - prior) FMR); NaN where nothing is ever accepted.

    >>> round(match_probability(prior=0.001, tmr=0.8, fmr=0.001), 3)  # one match among 1,000
    0.445
    """
    if not (0 <= prior <= 1 and 0 <= tmr <= 1 and 0 <= fmr <= 1):
        raise ValueError(f"prior and rates must be in [0, 1]: {prior=}, {tmr=}, {fmr=}")
    true, false = prior * tmr, (1 - prior) * fmr
    return true / (true + false) if true + false else math.nan


# --- thresholds, and draws of persons


def _keep_more(fmr: float, pairs: Pairs) -> str:
    return (
        f"a false-match rate of {fmr:g} of {pairs.impostors:,} impostor pairs needs more of them "
        f"than the {pairs.keep:,} that were kept: give pair_distances a larger keep"
    )


def _accepted(pairs: Pairs, threshold: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Impostor and genuine pairs with at most that distance."""
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN: none could be chosen at that false-match rate")
    if threshold >= pairs.limit < math.inf:
        raise ValueError(
            f"the threshold {threshold:g} accepts more impostor pairs than the {pairs.keep:,} that "
            "were kept: give pair_distances a larger keep"
        )
    return tuple(
        table.iloc[: np.searchsorted(table["distance"].to_numpy(), threshold, "right")]
        for table in (pairs.impostor, pairs.genuine)
    )


def _people_of(pairs: Pairs, impostor: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ``people`` of both sides of impostor pairs."""
    return pairs.query_person[impostor["query"]], pairs.gallery_person[impostor["gallery"]]


def _people_pair(pairs: Pairs, impostor: pd.DataFrame) -> np.ndarray:
    """A number for each impostor pair, the same for the same two people."""
    one, other = _people_of(pairs, impostor)
    return np.minimum(one, other) * len(pairs.people) + np.maximum(one, other)


def _draws(pairs: Pairs, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each person is drawn, (H,) floats; identities and distractors apart."""
    sizes = [int((pairs.people > 0).sum()), int((pairs.people == 0).sum())]
    if draws < 1 or sizes[0] < 2:
        raise ValueError(
            f"an interval needs 1 draw or more from two people or more: {draws=}, people={sizes[0]}"
        )
    return (times.astype(float) for times in times_drawn(sizes, draws, seed))


def _impostor_weight(pairs: Pairs, weights: np.ndarray) -> float:
    """The weight of all impostor pairs, kept or not: that of all pairs less those within people."""
    queries = np.bincount(pairs.query_person, minlength=len(weights))
    known = pairs.gallery_person[pairs.gallery_person >= 0]
    images = np.bincount(known, minlength=len(weights))
    queries, images = weights * queries, weights * images
    return float(queries.sum() * images.sum() - queries @ images)


def _operate(pairs: Pairs, weights: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and true-match rates (F,) at false-match rates, each person weighted."""
    total = _impostor_weight(pairs, weights)
    if total == 0:  # one person alone was drawn
        return np.full((2, len(at)), np.nan)
    allowed = at * total * (1 + 1e-12)
    distance = pairs.impostor["distance"].to_numpy()
    # Mostly the front of the list is enough; else all of it.
    for n in (int(3 * at.max() * pairs.impostors) + 1000, len(distance)):
        one, other = _people_of(pairs, pairs.impostor.iloc[:n])
        # (n,) weight of what is accepted up to each pair
        summed = np.cumsum(weights[one] * weights[other])
        if len(summed) and summed[-1] > allowed.max():
            break
    first = np.searchsorted(summed, allowed, "right")  # the first pair that is too much
    refused = np.append(distance[:n], pairs.limit)[first]
    if (first == len(summed)).any() and math.isfinite(pairs.limit):
        raise ValueError(_keep_more(at.max(), pairs))
    true = weights[pairs.query_person[pairs.genuine["query"]]]
    summed = np.append(0, np.cumsum(true))
    accepted = summed[np.searchsorted(pairs.genuine["distance"].to_numpy(), refused, "left")]
    thresholds = np.where(np.isfinite(refused), np.nextafter(refused, -np.inf), np.inf)
    return thresholds, accepted / summed[-1] if summed[-1] else np.full(len(at), np.nan)


def _interval(drawn: np.ndarray, level: float) -> np.ndarray:
    """Low and high (2, F) of draws (R, F); NaN where nothing could be drawn."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    ends = np.full((2, drawn.shape[1]), np.nan)
    for i, values in enumerate(drawn.T):
        values = values[~np.isnan(values)]
        if len(values):  # one of the draws, not between two: a threshold may be infinite
            around = [(1 - level) / 2, (1 + level) / 2]
            ends[:, i] = np.quantile(values, around, method="nearest")
    return ends
