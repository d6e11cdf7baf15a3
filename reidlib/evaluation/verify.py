"""Same person or not: distances of pairs, ROC, thresholds, and how sure you can be of them.

Two images are taken for one person where their distance is at most a threshold. A *genuine* pair
shows one person, an *impostor* pair two; `pairs` says which there are. FMR, the false-match rate, is
the share of impostor pairs that are accepted; TMR, the true-match rate (also TAR, or recall), the
share of genuine pairs.

Pairs of one person are alike, and so are all pairs of two people, so 50 million pairs of 750
people are far fewer independent facts. So intervals hold 95 % of some draws of people: a genuine pair
counts as often as its person was drawn, an impostor pair as often as the product of both. That is
the subsets bootstrap (Bolle, Ratha and Pankanti, CVIU 93, 2004) for genuine, and the pigeonhole
bootstrap (Owen, Annals of Applied Statistics 1, 2007) for impostor pairs. They say nothing of other
cameras or another training seed.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from reidlib.evaluation.intervals import ENDS, times_drawn
from reidlib.evaluation.pairs import Pairs

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)
ROUNDED = 1 + 1e-12  # for counts of pairs: 0.29 * 100 < 29


def roc(pairs: Pairs) -> pd.DataFrame:
    """The ROC curve, exact: ``threshold``, ``FMR`` and ``TMR`` at each of its corners.

    Straight lines between the rows are the whole curve: all other thresholds lie on them. A slanted
    one is a tie of genuine and impostor pairs.
    """
    # Two corners at each genuine distance: just below it, and at it. (n,), (n,) -> (2n,)
    last = pairs.genuine.drop_duplicates("distance", keep="last")  # of equal ones
    at, accepted = last["distance"].to_numpy(), last.index.to_numpy() + 1
    threshold = np.stack([np.nextafter(at, -np.inf), at], axis=1).ravel()
    fmr = last[["below", "up_to"]].to_numpy().ravel() / pairs.impostors
    tmr = np.repeat(np.append(0, accepted), 2)[1:-1] / len(pairs.genuine)
    corners = {"threshold": [-np.inf, *threshold, np.inf], "FMR": [0, *fmr, 1], "TMR": [0, *tmr, 1]}
    return pd.DataFrame(corners).drop_duplicates(["FMR", "TMR"], ignore_index=True)


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
    pairs: Pairs, at: Sequence[float] = FMRS, *, draws: int = 0, seed: int = 0
) -> pd.DataFrame:
    """The threshold at each of some false-match rates, and the true-match rate there.

    The threshold is the largest with an FMR of at most the given one, in (0, 1]. A rate below
    1 / (number of impostor pairs) cannot be measured: no pair could be accepted, and its row is NaN.
    By the rule of 30 (Doddington et al., Speech Communication 31, 2000) a rate with 30 false matches
    behind it is known to within 30 per cent of itself, at 90 per cent confidence, if pairs are
    independent: so at best.

    Returns:
        A row for each rate, which is the index ``FMR``: ``threshold``, ``TMR``; ``false_matches``,
        how many impostor pairs are accepted there, and ``people_pairs``, of how many different
        pairs of people they are. With draws also ``threshold_low``, ``threshold_high``,
        ``TMR_low`` and ``TMR_high``; each draw chooses its threshold anew.

    Raises:
        ValueError: a rate so high that more impostor pairs must be kept, or draws from one person.
    """
    at = np.asarray(at, dtype=float)
    if at.ndim != 1 or len(at) == 0 or not ((at > 0) & (at <= 1)).all():
        raise ValueError(f"false-match rates must be in (0, 1], not {at}")
    names, measurable = ["threshold", "TMR"], at * pairs.impostors * ROUNDED >= 1
    point = _operate(pairs, np.ones(len(pairs.people)), at)
    table = pd.DataFrame(point.T, columns=names, index=pd.Index(at, name="FMR"))
    accepted = np.searchsorted(pairs.impostor["distance"].to_numpy(), point[0], "right")
    accepted[~measurable] = 0
    two = pairs.impostor[["query_person", "gallery_person"]][: accepted.max()]
    is_new = ~pd.DataFrame(np.sort(two, axis=1)).duplicated()
    table["false_matches"] = accepted
    table["people_pairs"] = np.append(0, np.cumsum(is_new))[accepted]
    table.loc[~measurable, names] = np.nan
    if draws:
        # (R, threshold or TMR, F)
        drawn = np.array([_operate(pairs, weights, at) for weights in _draws(pairs, draws, seed)])
        drawn[..., ~measurable] = np.nan
        for i, name in enumerate(names):
            table[f"{name}_low"], table[f"{name}_high"] = _interval(drawn[:, i])
    return table


def roc_band(pairs: Pairs, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The ROC at some false-match rates, with intervals: `true_match_rate` as far as it can be known.

    The rates lie evenly on a log axis and start at one false match; those of `FMRS` are among them.
    They end at half of the impostor pairs that were kept, because some draws need more than a rate.
    """
    most = min(1.0, 0.5 * len(pairs.impostor) / pairs.impostors)
    rates = {*np.geomspace(1 / pairs.impostors, most, 25), *(f for f in FMRS if f <= most)}
    return true_match_rate(pairs, sorted(rates), draws=draws, seed=seed).dropna()


def at_threshold(
    pairs: Pairs, threshold: float, *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """What a threshold that was chosen elsewhere gives on these pairs.

    Where no pair at all is accepted, or every one, the draws cannot vary; the interval then reaches
    3/n from there, n the number of pairs: the rule of three, for independent pairs, so at best.

    Returns:
        Rows ``FMR`` and ``TMR``, columns ``value``, ``low``, ``high``, ``accepted`` and ``pairs``.

    Raises:
        ValueError: the threshold lies beyond the impostor pairs that were kept, or is NaN.
    """
    false, true = _accepted(pairs, threshold)
    everybody = pairs.genuine["query_person"]
    accepted, total = [], []
    for weights in _draws(pairs, draws, seed):
        false_weight = weights[false["query_person"]] @ weights[false["gallery_person"]]
        accepted.append((false_weight, weights[true["query_person"]].sum()))
        total.append((_impostor_weight(pairs, weights), weights[everybody].sum()))
    with np.errstate(invalid="ignore"):  # 0 / 0, where a draw has no such pair
        low, high = _interval(np.divide(accepted, total))
    accepted, n = np.array([[len(false), len(true)], [pairs.impostors, len(pairs.genuine)]])
    high = np.where(accepted == 0, np.maximum(high, np.minimum(1, 3 / n)), high)
    low = np.where(accepted == n, np.minimum(low, np.maximum(0, 1 - 3 / n)), low)
    columns = {"value": accepted / n, "low": low, "high": high, "accepted": accepted, "pairs": n}
    return pd.DataFrame(columns, index=["FMR", "TMR"])


def camera_rates(pairs: Pairs, threshold: float) -> pd.DataFrame:
    """Return ``pairs.cameras`` with ``FMR`` and ``TMR`` at a threshold; the error is `at_threshold`'s.

    NaN where there is no such pair, as for TMR within one camera.
    """
    table = pairs.cameras.set_index(["query_camid", "gallery_camid"])
    false, true = _accepted(pairs, threshold)
    for rate, accepted, of in (("FMR", false, "impostor"), ("TMR", true, "genuine")):
        counts = accepted.groupby(table.index.names).size().reindex(table.index, fill_value=0)
        table[rate] = counts / table[of].where(table[of] > 0)
    return table.reset_index()


def match_probability(prior: float, tmr: float, fmr: float) -> float:
    """How likely an accepted pair shows one person, where ``prior`` is the share of genuine pairs.

    Bayes' rule: prior TMR / (prior TMR + (1 - prior) FMR); NaN where nothing is ever accepted.

    >>> round(match_probability(prior=0.001, tmr=0.8, fmr=0.001), 3)  # one match among 1,000
    0.445
    """
    if not (0 <= prior <= 1 and 0 <= tmr <= 1 and 0 <= fmr <= 1):
        raise ValueError(f"prior and rates must be in [0, 1]: {prior=}, {tmr=}, {fmr=}")
    true, false = prior * tmr, (1 - prior) * fmr
    return true / (true + false) if true + false else math.nan


# --- thresholds, and draws of persons


def _accepted(pairs: Pairs, threshold: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Impostor and genuine pairs with at most that distance."""
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN: none could be chosen at that false-match rate")
    if threshold >= pairs.limit < math.inf:
        raise ValueError(
            f"the threshold {threshold:g} accepts more impostor pairs than the {pairs.keep:,} that "
            "were kept: give pair_distances a larger keep"
        )
    return tuple(table[table["distance"] <= threshold] for table in (pairs.impostor, pairs.genuine))


def _draws(pairs: Pairs, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each person is drawn, (H,) floats; identities and distractors apart."""
    people = pairs.identities
    if draws < 1 or people < 2:
        raise ValueError(f"an interval needs a draw from two people or more: {draws=}, {people=}")
    drawn = times_drawn([people, pairs.distractors], draws, seed)
    return (times.astype(float) for times in drawn)


def _impostor_weight(pairs: Pairs, weights: np.ndarray) -> float:
    """The weight of all impostor pairs, kept or not: that of all pairs less those within people."""
    queries, images = (weights * pairs.people[column] for column in ("queries", "images"))
    return float(queries.sum() * images.sum() - queries @ images)


def _operate(pairs: Pairs, weights: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Thresholds and true-match rates (2, F) at false-match rates, each person weighted."""
    total = _impostor_weight(pairs, weights)
    if total == 0:  # one person alone was drawn
        return np.full((2, len(at)), np.nan)
    allowed = at * total * ROUNDED
    distance = pairs.impostor["distance"].to_numpy()
    # Mostly the front of the list is enough; else all of it.
    for n in (int(3 * at.max() * pairs.impostors) + 1000, len(distance)):
        front = pairs.impostor[:n]
        weight = weights[front["query_person"]] * weights[front["gallery_person"]]
        # (n + 1,) what the first 0, 1, ..., n pairs weigh
        summed = np.cumsum(np.append(0, weight))
        if summed[-1] > allowed.max():
            break
    # The pairs after those that were kept, up to the keep-th, are all at the limit: see `_nearest`.
    known = summed[-1] + (pairs.keep + 1 - len(distance)) * weights.min() ** 2
    if allowed.max() >= known and math.isfinite(pairs.limit):
        raise ValueError(
            f"a false-match rate of {at.max():g} of {pairs.impostors:,} impostor pairs needs more of "
            f"them than the {pairs.keep:,} that were kept: give pair_distances a larger keep"
        )
    # The first pair that is too much.
    refused = np.append(distance[:n], pairs.limit)[np.searchsorted(summed, allowed, "right") - 1]
    summed = np.cumsum(np.append(0, weights[pairs.genuine["query_person"]]))
    accepted = summed[np.searchsorted(pairs.genuine["distance"].to_numpy(), refused, "left")]
    threshold = np.where(np.isfinite(refused), np.nextafter(refused, -np.inf), np.inf)
    with np.errstate(invalid="ignore"):  # 0 / 0, where nobody who was drawn has a genuine pair
        return np.stack([threshold, accepted / summed[-1]])


def _interval(drawn: np.ndarray) -> np.ndarray:
    """Low and high (2, F) of 95 % of the draws (R, F); NaN where nothing could be drawn."""
    columns = [values[~np.isnan(values)] for values in drawn.T]
    # One of the draws, not between two: a threshold may be infinite.
    ends = [np.quantile(c, ENDS, method="nearest") if len(c) else [np.nan] * 2 for c in columns]
    return np.transpose(ends)
