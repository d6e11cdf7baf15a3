"""Why is the network wrong? Which queries fail, and what do they share?

All of this is correlation: what wrong queries share need not be why they are wrong. So each kind of
evidence is measured on the right queries too, and only its lift counts. `maps` shows what the
network looked at; `suspects` looks for labels that may be wrong.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from reidlib.evaluation.distances import ratio
from reidlib.evaluation.intervals import percentiles, times_drawn
from reidlib.evaluation.retrieval import Retrieval

EVIDENCE = {
    "few_matches": "at most half as many matches as the median query",
    "own_camera": "the nearest stranger is seen by the query's own camera",
    "distractor": "the nearest stranger is a distractor, somebody outside the queries' people",
    "same_colours": "the nearest stranger's colours are nearer than those of every true match",
    "hard_cameras": "its matches are in cameras where other people of its camera are hard to find",
    "odd_picture": "even its own camera's pictures of the person are far from it",
}
UPPER = 0.75  # hard and far mean: in the upper quarter of all queries


def causes(retrieval: Retrieval, colours: tuple[Any, Any] | None = None) -> pd.DataFrame:
    """What can be measured about each query's failure, and about each success.

    The evidence is about the query, its matches and its **nearest stranger**, the first wrong image
    of its list. Every query has one, so evidence is defined alike for right and wrong queries.

    Args:
        retrieval: queries and gallery.
        colours: (Q, C) and (G, C) colour histograms, as `baselines.colour_histogram` makes them;
            without them nothing is said of colours.

    Returns:
        One row a query: `query` (row number), `path` if known, `pid`, `camid`, `matches`,
        `AP`, `first_rank`, and
        - `wrong`: the first match is not at rank 1;
        - `match`, `stranger`: gallery rows of the nearest of either (`<NA>`: there is none);
          `stranger_pid`, `stranger_camid`;
        - `strangers_above`, `distractors_above`, `own_camera_above`: how many strangers stand
          above the first match, and how many of these are distractors, or of the query's camera;
        - `colour_ratio`: colour distance to the nearest stranger, over that to the match which is
          nearest in colour (NaN without `colours`);
        - `camera_difficulty`: over the pairs of its camera with those of its matches, the mean share
          of matches behind the nearest stranger, other people' alone (as in `camera_pairs`);
        - `own_camera_distance`: to the nearest picture of the person by the query's own camera, which
          the protocol leaves out: nothing but the picture itself can make this one far;
        - a column of booleans for each of `EVIDENCE`. Several may be true. What cannot be known is
          false in every row: cameras that are unknown, colours that were not given;
        - `cause`: of a wrong query, the evidence with the largest lift (see `base_rates`), among
          those whose interval lies above 1; "unexplained" where there is none; "" of a right one,
          and "no match" where the gallery holds none.

    Raises:
        ValueError: no query has a match, or `colours` do not fit the tables.
    """
    table = retrieval.evaluate().per_query.drop(columns=["AP_market", "INP"])
    listed = _lists(retrieval, table)
    nearest = {
        status: listed[listed["status"] == status].groupby("query").first().reindex(table["query"])
        for status in ("match", "wrong")
    }
    table["wrong"] = table["first_rank"] > 1
    table["match"] = nearest["match"]["gallery"].astype("Int64").to_numpy()
    for name, column in (("", "gallery"), ("_pid", "pid"), ("_camid", "camid")):
        table[f"stranger{name}"] = nearest["wrong"][column].astype("Int64").to_numpy()
    table = table.join(_above(retrieval, table))
    table["colour_ratio"] = _colour_ratios(listed, table, colours)
    table["camera_difficulty"] = _camera_difficulty(_by_camera(listed, table), len(table))
    table["own_camera_distance"] = _own_camera_distances(retrieval, table)

    some = table["matches"] > 0
    own = table["camid"] == table["stranger_camid"]
    table["few_matches"] = some & (2 * table["matches"] <= table.loc[some, "matches"].median())
    table["own_camera"] = (own & (table["camid"] >= 0)).fillna(False).astype(bool)
    table["distractor"] = (table["stranger_pid"] == 0).fillna(False).astype(bool)
    table["same_colours"] = table["colour_ratio"] < 1
    for name, column in (
        ("hard_cameras", "camera_difficulty"),
        ("odd_picture", "own_camera_distance"),
    ):
        table[name] = table[column] > table[column].quantile(UPPER)  # false where it is not known
    table["cause"] = name_causes(table)
    return table


def _lists(retrieval: Retrieval, per_query: pd.DataFrame) -> pd.DataFrame:
    """Lists long enough to hold each query's nearest stranger; all its matches are in them."""
    topk = int(per_query["matches"].max()) + 1
    return retrieval.ranked_lists(topk=topk, show_excluded=False, show_missed=True)


def _above(retrieval: Retrieval, table: pd.DataFrame) -> pd.DataFrame:
    """Count the strangers above each query's first match; zero for a query without match."""
    wrong = table[table["wrong"]].sort_values("first_rank")
    parts = [pd.DataFrame(columns=["query", "rank", "pid", "camid"])]
    for start in range(0, len(wrong), 100):  # a hundred at once: their lists may be long
        part = wrong.iloc[start : start + 100]
        longest = int(part["first_rank"].max())
        parts.append(retrieval.ranked_lists(part["query"], topk=longest, show_excluded=False))
    above = pd.concat(parts[1:] or parts, ignore_index=True)
    above = above[above["rank"] < above["query"].map(table["first_rank"])]
    own = (above["camid"] == above["query"].map(table["camid"])) & (above["camid"] >= 0)
    kinds = {
        "strangers_above": True,
        "distractors_above": above["pid"] == 0,
        "own_camera_above": own,
    }
    counts = above.assign(**kinds).groupby("query")[[*kinds]].sum()
    return counts.reindex(table["query"], fill_value=0).astype(int).reset_index(drop=True)


def _colour_ratios(listed, table, colours) -> np.ndarray:
    """Colour distance to the nearest stranger over that to the nearest match in colour, (Q,)."""
    if colours is None:
        return np.full(len(table), np.nan)
    of_query, of_gallery = (np.asarray(c) for c in colours)
    reach = int(listed["gallery"].max())
    if len(of_query) != len(table) or len(of_gallery) <= reach:
        raise ValueError(
            f"{len(of_query)} and {len(of_gallery)} colour histograms do not fit the tables of "
            f"{len(table)} queries and of the gallery"
        )

    def distance(queries, rows):
        difference = of_query[queries] - of_gallery[rows]
        return np.sqrt(np.square(difference, dtype=np.float64).sum(axis=1))

    matches = listed[listed["status"] == "match"]
    near = pd.Series(distance(matches["query"], matches["gallery"]), index=matches["query"])
    near = near.groupby(level=0).min().reindex(table["query"]).to_numpy()
    out = np.full(len(table), np.nan)
    known = table["stranger"].notna() & (table["matches"] > 0)
    queries = np.flatnonzero(known)
    far = distance(queries, table["stranger"][known].to_numpy(np.int64))
    out[queries] = ratio(far, near[queries])
    return out


def _camera_difficulty(pairs: pd.DataFrame, queries: int) -> np.ndarray:
    """Mean over a query's matches of how hard their pair of cameras is for other people, (Q,).

    Without the person's own queries: else a failure would be evidence of itself.
    """
    cameras, person = ["camid", "match_camid"], ["camid", "match_camid", "pid"]
    total = pairs.groupby(cameras)["behind"].transform("sum")
    own = pairs.groupby(person)["behind"].transform("sum")
    of_others = pairs.groupby(cameras)["behind"].transform("size") - pairs.groupby(person)[
        "behind"
    ].transform("size")
    difficulty = (total - own) / of_others.where(of_others > 0)
    return difficulty.groupby(pairs["query"]).mean().reindex(range(queries)).to_numpy()


def _own_camera_distances(retrieval: Retrieval, table: pd.DataFrame) -> np.ndarray:
    """Distance to the nearest image of the query's person and camera, but itself, (Q,); or NaN."""
    out = np.full(len(table), np.nan)
    if "camid" not in retrieval.gallery or not retrieval.exclude_same_camera:
        return out
    groups = retrieval.gallery.reset_index(drop=True).groupby(["pid", "camid"]).indices
    paths = retrieval.gallery["path"].to_numpy() if "path" in retrieval.gallery else None
    for i, pid, camid in zip(table["query"], table["pid"], table["camid"], strict=True):
        rows = groups.get((pid, camid), []) if camid >= 0 else []
        if paths is not None and "path" in table:
            rows = [row for row in rows if paths[row] != table["path"][i]]
        if len(rows):
            out[i] = retrieval.distances(i, rows).min()
    return out


def name_causes(table: pd.DataFrame) -> np.ndarray:
    """Return each query's cause, (Q,), from the other columns of what `causes` returns."""
    out = np.where(table["wrong"], "unexplained", "").astype(object)
    out[table["matches"] == 0] = "no match"
    rates = base_rates(table)
    proven = rates[rates["low"] > 1].sort_values("lift")
    for name in proven.index:  # the largest lift last, so that it has the last word
        out[table["wrong"] & table[name]] = name
    return out


def base_rates(
    table: pd.DataFrame,
    evidence: Sequence[str] = tuple(EVIDENCE),
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How often the evidence stands at wrong queries, and how often at right ones.

    The lift is the first share over the second, with half a query added to either side of either
    count, so that it is finite: ((a + ½) / (n + 1)) / ((b + ½) / (m + 1)) for a of n wrong and b of
    m right queries. Its interval is the percentile bootstrap over people, whose queries are alike.
    A lift above 1 is a correlation: the evidence also takes the blame for whatever comes with it.

    Args:
        table: what `causes` returned; other columns of booleans may be added to it.
        evidence: names of such columns.

    Returns:
        A row for each kind of evidence: `wrong`, `right` (queries that show it), `share_wrong`
        and `share_right` (of all wrong, of all right queries), `lift`, `low` and `high`
        (NaN where there are no wrong queries, no right ones, or one person alone), `mAP_with`
        and `mAP_without` (mean AP of the queries with and without it, right and wrong).

    >>> table = pd.DataFrame({"pid": [1, 2, 3, 4], "matches": 1, "wrong": [True, True, False, False],
    ...                       "AP": [0.5, 0.2, 1, 1], "hat": [True, True, True, False]})
    >>> base_rates(table, ["hat"])[["wrong", "right", "lift"]].round(3)
         wrong  right   lift
    hat      2      1  1.667
    """
    table = table[table["matches"] > 0]
    wrong = table["wrong"].to_numpy(bool)
    shown = table[list(evidence)].to_numpy(bool)  # (Q, E)
    # (Q, 2 + 2E): is it wrong, is it right, and does it show the evidence, being wrong or right
    columns = [wrong[:, None], ~wrong[:, None], shown & wrong[:, None], shown & ~wrong[:, None]]
    counts = np.concatenate(columns, axis=1).astype(float)
    persons = pd.factorize(table["pid"])[0]
    by_person = np.zeros((persons.max() + 1, counts.shape[1]))
    np.add.at(by_person, persons, counts)

    def lifts(totals: np.ndarray) -> np.ndarray:
        """(..., 2 + 2E) counts to (..., E) lifts."""
        n, m, a, b = np.split(totals, [1, 2, 2 + len(evidence)], axis=-1)
        return ((a + 0.5) / (n + 1)) / ((b + 0.5) / (m + 1))

    totals = by_person.sum(axis=0)
    lift = np.full((3, len(evidence)), np.nan)
    if totals[:2].min() > 0 and len(by_person) > 1:
        # (people,) @ (people, 2 + 2E) -> (2 + 2E,), in each of R draws
        drawn = [times @ by_person for times in times_drawn(len(by_person), repeats, seed)]
        lift[0] = lifts(totals)
        lift[1:] = percentiles(lifts(np.stack(drawn)), level)
    a, b = totals[2 : 2 + len(evidence)], totals[2 + len(evidence) :]
    with np.errstate(invalid="ignore"):
        shares = a / totals[0], b / totals[1]
    ap = table["AP"]
    return pd.DataFrame(
        {
            "wrong": a.astype(int),
            "right": b.astype(int),
            "share_wrong": shares[0],
            "share_right": shares[1],
            "lift": lift[0],
            "low": lift[1],
            "high": lift[2],
            "mAP_with": [ap[s].mean() for s in shown.T],
            "mAP_without": [ap[~s].mean() for s in shown.T],
        },
        index=list(evidence),
    )


def camera_pairs(retrieval: Retrieval) -> pd.DataFrame:
    """How hard it is to find a person of one camera in another: a row for each pair of cameras.

    Returns:
        `camid` (the query's), `match_camid`, `matches` (how many, over all queries) and
        `behind`: the share of them that stand behind the query's nearest stranger. Empty where
        cameras are unknown.

    Raises:
        ValueError: no query has a match.
    """
    table = retrieval.evaluate().per_query
    pairs = _by_camera(_lists(retrieval, table), table).groupby(
        ["camid", "match_camid"], as_index=False
    )
    return pairs["behind"].agg(matches="size", behind="mean")


def _by_camera(listed: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """One row a match of known cameras: `query`, `pid`, `camid`, `match_camid`, `behind`
    (1.0 where it stands behind the query's nearest stranger)."""
    first_wrong = listed[listed["status"] == "wrong"].groupby("query")["rank"].min()
    matches = listed[(listed["status"] == "match") & (listed["camid"] >= 0)]
    # without any stranger, nothing stands behind one
    behind = (matches["rank"] > matches["query"].map(first_wrong)).fillna(False)
    columns = {"query": matches["query"], "pid": matches["pid"], "match_camid": matches["camid"]}
    pairs = pd.DataFrame(columns | {"behind": behind.astype(float)}).reset_index(drop=True)
    pairs["camid"] = table["camid"].to_numpy()[pairs["query"]]
    return pairs[pairs["camid"] >= 0]


def confusions(retrieval: Retrieval) -> pd.DataFrame:
    """Which identities are taken for each other: strangers among the first N of a query's list.

    N is the number of the query's matches: in a perfect list no stranger stands there. Distractors,
    who are not one identity, are left out.

    Returns:
        A row for each pair of identities, most confused first: `pid` < `other_pid`,
        `intrusions` (wrong images of either in lists of the other), `queries` (lists that have
        some), `mutual` (both ways), and the nearest of them: `query`, `gallery` (row numbers)
        and `distance`.

    Raises:
        ValueError: no query has a match.
    """
    table = retrieval.evaluate().per_query
    listed = _lists(retrieval, table)
    within = listed["rank"] <= listed["query"].map(table["matches"])
    wrong = listed[within & (listed["status"] == "wrong") & (listed["pid"] > 0)]
    queried = table["pid"].to_numpy()[wrong["query"]]
    found = wrong["pid"].to_numpy()
    wrong = wrong.assign(pid=np.minimum(queried, found), other_pid=np.maximum(queried, found))
    wrong["by"] = queried
    groups = wrong.sort_values("distance", kind="stable").groupby(["pid", "other_pid"])
    out = groups.agg(
        intrusions=("query", "size"),
        queries=("query", "nunique"),
        mutual=("by", lambda by: by.nunique() == 2),
        query=("query", "first"),
        gallery=("gallery", "first"),
        distance=("distance", "first"),
    ).reset_index()
    order = ["intrusions", "distance", "pid", "other_pid"]
    out = out.sort_values(order, ascending=[False, True, True, True], kind="stable")
    return out.astype({"mutual": bool}).reset_index(drop=True)


# --- in words


def lifts_in_words(rates: pd.DataFrame, causes: pd.DataFrame) -> str:
    """Say which evidence wrong queries show more often than right ones.

    Args:
        rates: from `base_rates`, of evidence that some query shows.
        causes: what `causes` returned.
    """
    scorable = causes[causes["matches"] > 0]
    wrong = scorable[scorable["wrong"]]
    proven = rates[rates["low"] > 1].sort_values("lift", ascending=False)
    if not len(proven):
        return (
            f"No evidence is surely more frequent among the {len(wrong):,} wrong queries than among the "
            f"{len(scorable) - len(wrong):,} right ones: every interval reaches 1, or none could be drawn. "
            "Either these are not the reasons, or there are too few queries to tell."
        )
    name, first = proven.index[0], proven.iloc[0]
    return (
        f"Wrong queries show {len(proven)} of {len(rates)} kinds of evidence more often than right "
        f"ones. The strongest is **{name}** ({EVIDENCE.get(name, name)}): "
        f"{first['share_wrong']:.0%} of the wrong queries show it and {first['share_right']:.0%} "
        f"of the right ones, a lift of {first['lift']:.1f} [{first['low']:.1f}, "
        f"{first['high']:.1f}]. {(wrong['cause'] == 'unexplained').sum():,} of {len(wrong):,} "
        "wrong queries show no such evidence and stay unexplained."
    )


def cameras_in_words(by_camera: pd.DataFrame) -> str:
    """Say between which cameras it is hardest and easiest, given what `camera_pairs` returned."""
    if len(by_camera) < 2:
        return "Cameras are unknown, or there is one pair alone, so they cannot be compared."
    hard, easy = (
        by_camera.loc[i] for i in (by_camera["behind"].idxmax(), by_camera["behind"].idxmin())
    )
    return (
        f"From camera {hard['camid']:.0f} to camera {hard['match_camid']:.0f}, {hard['behind']:.0%} of "
        f"{hard['matches']:.0f} matches stand behind a stranger; from {easy['camid']:.0f} to "
        f"{easy['match_camid']:.0f}, {easy['behind']:.0%} of {easy['matches']:.0f}."
    )


def confusions_in_words(confused: pd.DataFrame) -> str:
    """Say who is mixed up most, given what `confusions` returned."""
    if not len(confused):
        return "No list has a stranger where a match should stand."
    row, counts = confused.iloc[0], confused["intrusions"]
    half = 1 + int((counts.cumsum() < counts.sum() / 2).sum())
    return (
        f"Identities {row['pid']} and {row['other_pid']} are mixed up most: {row['intrusions']} "
        f"intrusions in {row['queries']} lists, {'both ways' if row['mutual'] else 'one way'}. "
        f"Half of all {counts.sum():,} intrusions come from {half:,} of {len(confused):,} pairs."
    )


def places_in_words(gaps: np.ndarray, swings: np.ndarray, wrong: int) -> str:
    """Say whether one hidden place would have changed an answer.

    Args:
        gaps: (n,) how much nearer the stranger is than the match.
        swings: (n,) what the best place, hidden, is worth of that gap.
        wrong: how many queries are wrong at all.
    """
    decided = int((swings > gaps).sum())
    if not wrong:
        return "No query is wrong, so these are the least sure ones."
    if decided == 0:
        return (
            f"In none of these {len(gaps)} queries is one small place, hidden, worth the whole gap between "
            "stranger and match: the mistake is spread over the picture, and no single detail is to blame."
        )
    return (
        f"In {decided} of these {len(gaps)} queries one small place, hidden, is worth more than "
        "the whole gap between stranger and match. Where none is, the mistake is spread over the "
        "picture."
    )
