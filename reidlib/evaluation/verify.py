"""Same person or not: distances of pairs, ROC, thresholds, and how sure one may be of them.

Retrieval (`evaluation`) asks who of a gallery is nearest; verification asks of two images whether
they show one person, and answers yes where their distance is at most a threshold. A *genuine* pair
shows one person, an *impostor* pair two. FMR, the false-match rate, is the share of impostor pairs
that are accepted; TMR, the true-match rate (also TAR, or recall), the share of genuine pairs.

Pairs are those of the retrieval protocol: a query and a gallery image that the ranking of this
query keeps. Junk (pid -1) is in no pair; a distractor (pid 0) is somebody else for every query; two
images of one person by one camera, or one image twice (the same path), make no pair. Strangers by
one camera do make an impostor pair. A ``camid`` of -1 in every row, or no such column, says that
cameras are unknown: no pair is left out for its camera, and the tables have the one camera -1.

Pairs of one person are alike, and so are all pairs of two persons, so 50 million pairs of 750
persons are far fewer independent facts. Intervals here are drawn over persons: a person drawn twice
counts twice, a genuine pair counts as often as its person, and an impostor pair as often as the
product of both. That is the subsets bootstrap (Bolle, Ratha and Pankanti, CVIU 93, 2004) for
genuine, and the pigeonhole bootstrap (Owen, Annals of Applied Statistics 1, 2007) for impostor
pairs. They say nothing of other cameras or another training seed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

FMRS = (1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True, repr=False, eq=False)
class Pairs:
    """All pairs of a query set and a gallery: each genuine one, and what decides of the others.

    Attributes:
        genuine: one row a genuine pair, nearest first: ``query`` and ``gallery`` (row numbers),
            ``pid``, ``query_camid``, ``gallery_camid``, ``distance`` (Euclidean, float64), and
            ``below`` and ``up_to``: how many of all impostor pairs are nearer, and at most as far.
        impostor: the nearest impostor pairs, nearest first: ``query``, ``gallery``, ``query_pid``,
            ``gallery_pid``, ``query_camid``, ``gallery_camid``, ``distance``. All those with a
            distance below ``limit`` are here.
        limit: infinity if all impostor pairs were kept.
        keep: as asked for.
        impostors: how many impostor pairs there are, kept or not.
        cameras: one row a pair of cameras: ``query_camid``, ``gallery_camid``, how many ``genuine``
            and ``impostor`` pairs they make, and ``AUC`` among them (NaN without both).
        people: (H,) pid of each person; each distractor image counts as a person, pid 0, at the end.
        query_person: (Q,) position in ``people``.
        gallery_person: (G,) the same; -1 for junk.
    """

    genuine: pd.DataFrame
    impostor: pd.DataFrame
    limit: float
    keep: int
    impostors: int
    cameras: pd.DataFrame
    people: np.ndarray
    query_person: np.ndarray
    gallery_person: np.ndarray

    def __repr__(self) -> str:
        """How many pairs, of how many people."""
        identified, strangers = (self.people > 0).sum(), (self.people == 0).sum()
        return (
            f"{len(self.genuine):,} genuine and {self.impostors:,} impostor pairs of {identified:,} "
            f"people and {strangers:,} distractors; the nearest {len(self.impostor):,} impostor "
            "pairs are kept"
        )


def pair_distances(
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    *,
    exclude_same_camera: bool = True,
    keep: int = 2_000_000,
    block_pairs: int = 2**21,
) -> Pairs:
    """Measure all pairs of queries and gallery images, and keep what questions need.

    Every impostor pair is counted against every genuine one, so ROC, AUC and equal error rate are
    exact; the nearest ``keep`` are kept as pairs, so thresholds at false-match rates up to ``keep``
    by all, and their intervals, are exact too. Distances are summed directly in float64, so equal
    images tie exactly, and a tie falls on one side for genuine and impostor alike.

    Args:
        query_emb: (Q, D) floats.
        query: Q rows with ``pid`` from 1, and ``camid`` and ``path`` if known.
        gallery_emb: (G, D) floats.
        gallery: G rows, pids from -1.
        exclude_same_camera: False makes pairs of one person by one camera, too.
        keep: impostor pairs to keep, some 80 bytes each while they are gathered.
        block_pairs: pairs measured at a time, 25 bytes each; the result does not depend on it.

    Raises:
        ValueError: arrays and tables do not fit each other, embeddings are not finite, a query is
            junk or distractor, or there is no genuine or no impostor pair at all.

    Example:
        >>> asked = pd.DataFrame({"pid": [1, 2], "camid": [1, 1]})
        >>> shown = pd.DataFrame({"pid": [1, 2, 1], "camid": [2, 2, 1]})
        >>> pairs = pair_distances([[0.0], [5.0]], asked, [[1.0], [2.0], [0.0]], shown)
        >>> pairs.genuine["distance"].tolist(), pairs.impostor["distance"].tolist()
        ([1.0, 3.0], [2.0, 4.0, 5.0])
    """
    if keep < 1 or block_pairs < 1:
        raise ValueError(f"keep and block_pairs must be 1 or more: {keep=}, {block_pairs=}")
    q_emb, q_pids, q_cams, q_paths = _side(query_emb, query, "query")
    g_emb, g_pids, g_cams, g_paths = _side(gallery_emb, gallery, "gallery")
    if q_emb.shape[1] != g_emb.shape[1]:
        raise ValueError(
            f"query embeddings have {q_emb.shape[1]} dimensions, gallery embeddings "
            f"{g_emb.shape[1]}: they must come from the same network"
        )
    if (q_pids <= 0).any():
        raise ValueError(
            f"{(q_pids <= 0).sum()} rows of the query table have a pid of 0 (distractor) or -1 "
            "(junk) and show nobody known: drop them, and number identities from 1"
        )
    by_camera = exclude_same_camera and (q_cams >= 0).any() and (g_cams >= 0).any()

    # --- genuine pairs, person by person
    rows_of = pd.Series(g_pids).groupby(g_pids).indices  # pid -> gallery rows, ascending
    found = []
    for pid, asking in pd.Series(q_pids).groupby(q_pids).indices.items():
        rows = rows_of.get(pid, np.empty(0, np.int64))
        is_pair = np.ones((len(asking), len(rows)), bool)
        if by_camera:
            is_pair &= q_cams[asking, None] != g_cams[rows]
        if q_paths is not None and g_paths is not None:
            is_pair &= (q_paths[asking, None] != g_paths[rows]) | (q_paths[asking, None] == "")
        i, j = np.nonzero(is_pair)
        found.append((asking[i], rows[j], _distances(q_emb[asking], g_emb[rows])[i, j]))
    q_rows, g_rows, distance = (np.concatenate(part) for part in zip(*found, strict=True))
    if len(distance) == 0:
        raise ValueError(
            "there is no genuine pair: no query has a gallery image of the same person"
            + (" by another camera" if by_camera else "")
            + ". Do both tables come from one data set?"
        )
    order = np.lexsort((g_rows, q_rows, distance))
    genuine = _table(q_rows[order], g_rows[order], distance[order], q_pids, g_pids, q_cams, g_cams)
    genuine = genuine.rename(columns={"query_pid": "pid"}).drop(columns="gallery_pid")
    genuine_distance = genuine["distance"].to_numpy()

    # --- impostor pairs, by pairs of cameras, in blocks
    below, up_to = np.zeros((2, len(genuine)), np.int64)
    near, limit, cameras = [], math.inf, []
    for q_cam in np.unique(q_cams):
        for g_cam in np.unique(g_cams[g_pids != -1]):
            asking = np.flatnonzero(q_cams == q_cam)
            rows = np.flatnonzero((g_cams == g_cam) & (g_pids != -1))
            here = (genuine["query_camid"] == q_cam) & (genuine["gallery_camid"] == g_cam)
            here = np.flatnonzero(here)
            count, nearer = 0, 0.0  # impostor pairs; those nearer than a genuine one, a tie half
            step = max(1, block_pairs // len(rows))
            for start in range(0, len(asking), step):
                part = asking[start : start + step]
                # (B, D), (n, D) -> (B, n)
                block = _distances(q_emb[part], g_emb[rows])
                is_impostor = q_pids[part, None] != g_pids[rows]
                # (B, n) -> (m,)
                strangers = np.sort(block[is_impostor])
                left, right = (
                    np.searchsorted(strangers, genuine_distance, side) for side in ("left", "right")
                )
                below += left
                up_to += right
                count += len(strangers)
                nearer += (left[here] + right[here]).sum() / 2
                i, j = np.nonzero(is_impostor & (block < limit))
                near.append((part[i].astype(np.int32), rows[j].astype(np.int32), block[i, j]))
                if sum(len(n[2]) for n in near) > 2 * keep:
                    near, limit = _nearest(near, keep, limit)
            both = len(here) * count
            auc = 1 - nearer / both if both else np.nan
            cameras.append((q_cam, g_cam, len(here), count, auc))
    names = ["query_camid", "gallery_camid", "genuine", "impostor", "AUC"]
    cameras = pd.DataFrame(cameras, columns=names)
    if (cameras["impostor"] == 0).all():
        raise ValueError("there is no impostor pair: query and gallery show one person alone")
    ((q_rows, g_rows, distance),), limit = _nearest(near, keep, limit)
    order = np.lexsort((g_rows, q_rows, distance))
    impostor = _table(q_rows[order], g_rows[order], distance[order], q_pids, g_pids, q_cams, g_cams)

    # --- who is who, for the bootstrap
    known = np.unique(np.concatenate([q_pids, g_pids[g_pids > 0]]))
    person = np.full(len(g_pids), -1)
    person[g_pids > 0] = np.searchsorted(known, g_pids[g_pids > 0])
    strangers = np.flatnonzero(g_pids == 0)
    person[strangers] = len(known) + np.arange(len(strangers))
    return Pairs(
        genuine=genuine.assign(below=below, up_to=up_to),
        impostor=impostor,
        limit=limit,
        keep=keep,
        impostors=int(cameras["impostor"].sum()),
        cameras=cameras,
        people=np.concatenate([known, np.zeros(len(strangers), np.int64)]),
        query_person=np.searchsorted(known, q_pids),
        gallery_person=person,
    )


def roc(pairs: Pairs) -> pd.DataFrame:
    """The ROC curve, exact: ``threshold``, ``FMR`` and ``TMR`` at each of its corners.

    A pair is accepted where its distance is at most the threshold. Straight lines between the rows
    are the whole curve: all other thresholds lie on them. A slanted one is a tie of genuine and
    impostor pairs.

    >>> asked, shown = (pd.DataFrame({"pid": p}) for p in ([1], [1, 1, 2]))
    >>> roc(pair_distances([[0.0]], asked, [[1.0], [3.0], [2.0]], shown))
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

    The threshold is the largest with an FMR of at most the one asked for. A rate f below one by all
    impostor pairs cannot be measured, for no pair may be accepted then: its row is NaN. By the rule
    of 30 (Doddington et al., Speech Communication 31, 2000) a rate is known to within 30 per cent
    of itself, at 90 per cent confidence, where 30 false matches are behind it; and that is for
    independent pairs.

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


def camera_pairs(pairs: Pairs, threshold: float) -> pd.DataFrame:
    """What one threshold gives between each camera of a query and each of the gallery.

    Returns:
        ``pairs.cameras`` (who asks, who answers, pairs, AUC) with ``TMR`` and ``FMR`` at the
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


def halves(query: pd.DataFrame, gallery: pd.DataFrame, *, seed: int = 0) -> list[tuple]:
    """Two halves of a query set and its gallery that share no person.

    For a threshold where no identities were held out: chosen on one half, it can be tried on the
    other. Distractors are split by image; junk is in neither.

    Returns:
        For each half the row numbers of its queries and of its gallery images, ascending.

    Raises:
        ValueError: queries of fewer than two people.
    """
    q_pids, g_pids = query["pid"].to_numpy(), gallery["pid"].to_numpy()
    asked = np.unique(q_pids)
    if len(asked) < 2:
        raise ValueError(f"queries of {len(asked)} people cannot be split by person")
    rng = np.random.default_rng(seed)
    # People with queries and people without are split apart, so that both halves have of both.
    others = np.setdiff1d(g_pids[g_pids > 0], asked)
    first = [rng.permutation(pids)[: len(pids) // 2] for pids in (asked, others)]
    in_first = np.isin(g_pids, np.concatenate(first))
    strangers = np.flatnonzero(g_pids == 0)
    in_first[rng.permutation(strangers)[: len(strangers) // 2]] = True
    asks_first = np.isin(q_pids, first[0])
    return [
        (np.flatnonzero(asks_first == half), np.flatnonzero((in_first == half) & (g_pids != -1)))
        for half in (True, False)
    ]


# --- measuring


def _side(emb: Any, table: pd.DataFrame, name: str) -> tuple:
    """Check one side: (N, D) float64 tensor, (N,) pids, (N,) camids, (N,) paths or None."""
    if isinstance(emb, torch.Tensor):
        emb = emb.detach().cpu()
    else:
        emb = torch.from_numpy(np.array(emb, dtype=np.float64))
    emb = emb.to(torch.float64)
    if emb.ndim != 2 or len(emb) != len(table) or emb.numel() == 0:
        raise ValueError(
            f"{name} embeddings must be (N, D), a row for each of the {len(table)} of the {name} "
            f"table, and not empty; they are {tuple(emb.shape)}"
        )
    if not emb.isfinite().all():
        raise ValueError(f"{name} embeddings hold NaN or infinity")
    columns = []
    for column in ("pid", "camid"):
        if column not in table and column == "pid":
            raise ValueError(f"the {name} table has no column 'pid'")
        values = table[column].to_numpy() if column in table else np.full(len(table), -1)
        if values.dtype.kind not in "iu":
            raise ValueError(f"{column} of the {name} table must be whole numbers")
        columns.append(values.astype(np.int64))
    pids, camids = columns
    if (pids < -1).any() or (pids == -1).all():
        raise ValueError(f"pids of the {name} table must be -1 or more, and not junk (-1) alone")
    known = camids[pids != -1] >= 0
    if not known.any():
        camids = np.full(len(table), -1)
    elif not known.all():
        raise ValueError(
            f"{(~known).sum()} of {len(known)} images of the {name} table have no camera "
            "(camid below 0): give all cameras, or -1 in every row"
        )
    paths = table["path"].to_numpy(dtype=object) if "path" in table else None
    return emb, pids, camids, paths


def _distances(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Euclidean distances (B, n) of (B, D) and (n, D), summed directly.

    The faster way by a matrix product rounds an image by its place in a block, and equal images
    would not tie.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def _nearest(parts: list[tuple], keep: int, limit: float) -> tuple[list[tuple], float]:
    """The nearest ``keep`` of (query, gallery, distance) parts, as one part, and the limit.

    Only what is nearer than the limit stays, and the limit is the next distance there is: with c
    pairs kept, the (c+1)th to the (keep+1)th distance of all are equal to it. So a crowd of ties at
    the limit takes no memory.
    """
    query, gallery, distance = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(distance) > keep:
        limit = float(np.partition(distance, keep)[keep])
        near = distance < limit
        query, gallery, distance = query[near], gallery[near], distance[near]
    return [(query, gallery, distance)], limit


def _table(q_rows, g_rows, distance, q_pids, g_pids, q_cams, g_cams) -> pd.DataFrame:
    """Pairs by row numbers, with people and cameras."""
    columns = {"query": q_rows, "gallery": g_rows}
    columns |= {"query_pid": q_pids[q_rows], "gallery_pid": g_pids[g_rows]}
    columns |= {"query_camid": q_cams[q_rows], "gallery_camid": g_cams[g_rows]}
    columns = {name: column.astype(np.int32) for name, column in columns.items()}
    return pd.DataFrame(columns | {"distance": distance})


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
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        times = [np.bincount(rng.integers(n, size=n), minlength=n) for n in sizes if n]
        yield np.concatenate(times).astype(float)


def _impostor_weight(pairs: Pairs, weights: np.ndarray) -> float:
    """The weight of all impostor pairs, kept or not: that of all pairs less those within people."""
    queries = np.bincount(pairs.query_person, minlength=len(weights))
    shown = pairs.gallery_person[pairs.gallery_person >= 0]
    images = np.bincount(shown, minlength=len(weights))
    asks, answers = weights * queries, weights * images
    return float(asks.sum() * answers.sum() - asks @ answers)


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
