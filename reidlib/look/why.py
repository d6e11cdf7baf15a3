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
from reidlib.evaluation.intervals import ENDS, times_drawn
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
    `colours` are (Q, C) and (G, C), as `baselines.colour_histogram` makes them; None: not looked at.

    Returns:
        One row a query: `query` (row number), `path` if known, `pid`, `camid`, `matches`, `AP`,
        `first_rank`, `last_rank`, and
        - `wrong`: the first match is not at rank 1;
        - `match`, `stranger`: gallery rows of the nearest of either (NaN: there is none);
          `stranger_pid`, `stranger_camid`;
        - `strangers_above`, `distractors_above`, `own_camera_above`: how many strangers stand
          above the first match, and how many of these are distractors, or of the query's camera;
        - `colour_ratio`: colour distance to the nearest stranger, over that to the match which is
          nearest in colour (NaN without `colours`);
        - `camera_difficulty`: over the pairs of its camera with those of its matches, the mean of
          `camera_pairs`, of other people alone: else a failure would be evidence of itself;
        - `own_camera_distance`: to the nearest picture of the person by the query's own camera, which
          the protocol leaves out: nothing but the picture itself can make this one far;
        - a column of booleans for each of `EVIDENCE`, false where it cannot be known;
        - `cause`: see `name_causes`.

    Raises:
        ValueError: no query has a match, or `colours` do not fit the tables.
    """
    table = retrieval.evaluate().per_query.drop(columns=["AP_market", "INP"])
    listed = _lists(retrieval)
    nearest = listed.drop_duplicates(["query", "status"]).set_index("query")
    match, stranger = (nearest[nearest["status"] == status] for status in ("match", "wrong"))
    # columns of other tables fall into place by the number of the query
    table["wrong"] = table["first_rank"] > 1
    table["match"] = match["gallery"]
    table["stranger"] = stranger["gallery"]
    table["stranger_pid"], table["stranger_camid"] = stranger["pid"], stranger["camid"]
    table = table.join(_above(retrieval, table))
    table["colour_ratio"] = (
        np.nan if colours is None else _colour_ratios(retrieval, listed, colours)
    )
    table["camera_difficulty"] = _camera_difficulty(_camera_matches(listed))
    table["own_camera_distance"] = _own_camera_distances(retrieval, table)

    some = table["matches"] > 0
    table["few_matches"] = some & (2 * table["matches"] <= table.loc[some, "matches"].median())
    table["own_camera"] = (table["camid"] == table["stranger_camid"]) & (table["camid"] >= 0)
    table["distractor"] = table["stranger_pid"] == 0
    table["same_colours"] = table["colour_ratio"] < 1
    upper = {"hard_cameras": "camera_difficulty", "odd_picture": "own_camera_distance"}
    for name, column in upper.items():
        table[name] = table[column] > table[column].quantile(UPPER)  # false where it is not known
    table["cause"] = name_causes(table)
    return table


def _lists(retrieval: Retrieval) -> pd.DataFrame:
    """Each query's matches, and its strangers down to the nearest at least, with `query_pid`,
    `query_camid` and `query_matches` of who asked."""
    table = retrieval.evaluate().per_query
    topk = int(table["matches"].max()) + 1
    listed = retrieval.ranked_lists(topk=topk, show_excluded=False, show_missed=True)
    return listed.join(table[["pid", "camid", "matches"]].add_prefix("query_"), on="query")


def _above(retrieval: Retrieval, table: pd.DataFrame) -> pd.DataFrame:
    """Count the strangers above each query's first match; zero for a query without match."""
    kinds = ["strangers_above", "distractors_above", "own_camera_above"]
    counts = pd.DataFrame(0, table.index, kinds)
    wrong = table[table["wrong"]].sort_values("first_rank")
    for _, part in wrong.groupby(np.arange(len(wrong)) // 100):  # their lists may be long
        longest = int(part["first_rank"].max())
        above = retrieval.ranked_lists(part["query"], topk=longest, show_excluded=False)
        above = above[above["rank"] < above["query"].map(part["first_rank"])]
        own = (above["camid"] == above["query"].map(part["camid"])) & (above["camid"] >= 0)
        shown = (True, above["pid"] == 0, own)
        above = above.assign(**dict(zip(kinds, shown, strict=True)))
        counts.loc[part.index] = above.groupby("query")[kinds].sum()
    return counts


def _colour_ratios(retrieval: Retrieval, listed: pd.DataFrame, colours: tuple) -> pd.Series:
    """Colour distance to the nearest stranger over that to the nearest match in colour, by query."""
    sizes, rows = [*map(len, colours)], [len(retrieval.query), len(retrieval.gallery)]
    if sizes != rows:
        raise ValueError(f"{sizes} colour histograms do not fit query and gallery of {rows} images")
    of_query, of_gallery = map(np.asarray, colours)
    is_match = listed["status"] == "match"
    shown = listed[is_match | ~listed.duplicated(["query", "status"])]
    apart = of_query[shown["query"]] - of_gallery[shown["gallery"]]  # (n, C)
    shown = shown.assign(apart=np.sqrt(np.square(apart, dtype=np.float64).sum(axis=1)))
    least = shown.groupby(["query", "status"])["apart"].min().unstack()
    least = least.reindex(columns=["match", "wrong"])  # somebody may have neither
    return pd.Series(ratio(least["wrong"], least["match"]), least.index)


def _camera_difficulty(pairs: pd.DataFrame) -> pd.Series:
    """Mean over a query's matches of how hard their pair of cameras is for other people, by query."""
    everyone = pairs.groupby(["query_camid", "camid"])["behind"]
    person = pairs.groupby(["query_camid", "camid", "query_pid"])["behind"]
    behind = everyone.transform("sum") - person.transform("sum")
    share = behind / (everyone.transform("size") - person.transform("size"))  # NaN: nobody else
    return share.groupby(pairs["query"]).mean()


def _own_camera_distances(retrieval: Retrieval, table: pd.DataFrame) -> pd.Series:
    """Distance to the nearest image of the query's person and camera, but itself, by query."""
    rows = retrieval.gallery.filter(["path", "pid", "camid"])
    if "camid" not in rows or not retrieval.exclude_same_camera:
        return pd.Series(dtype=float)
    rows = rows.assign(gallery=np.arange(len(rows)))
    own = table[table["camid"] >= 0].merge(rows, on=["pid", "camid"], suffixes=("", "_found"))
    if "path_found" in own:
        own = own[own["path"] != own["path_found"]]
    own = own.groupby("query")["gallery"]
    return pd.Series({i: retrieval.distances(i, rows).min() for i, rows in own}, dtype=float)


def name_causes(table: pd.DataFrame) -> np.ndarray:
    """Return each query's cause, (Q,), from the other columns of what `causes` returns.

    A wrong query's is what it shows of the evidence whose interval lies above 1, by the largest lift
    (see `base_rates`), else "unexplained". A right one's is "", and "no match" where there is none.
    """
    out = np.where(table["wrong"], "unexplained", "").astype(object)
    out[table["matches"] == 0] = "no match"
    rates = base_rates(table, [*EVIDENCE])
    proven = rates[rates["low"] > 1].sort_values("lift")
    for name in proven.index:  # the largest lift last, so that it has the last word
        out[table["wrong"] & table[name]] = name
    return out


def base_rates(
    table: pd.DataFrame, evidence: Sequence[str] = (*EVIDENCE,), *, seed: int = 0
) -> pd.DataFrame:
    """How often the evidence stands at wrong queries, and how often at right ones.

    The lift is the first share over the second, with half a query added to either side of either
    count, so that it is finite: ((a + ½) / (n + 1)) / ((b + ½) / (m + 1)) for a of n wrong and b of
    m right queries. Its interval is the percentile bootstrap over people, whose queries are alike.
    A lift above 1 is a correlation: the evidence also takes the blame for whatever comes with it.

    Args:
        table: what `causes` returned; you may add other columns of booleans as `evidence`.

    Returns:
        A row for each kind of evidence: `wrong`, `right` (queries that show it), `share_wrong` and
        `share_right` (of all such queries), `lift`, `low` and `high` (NaN without wrong queries,
        right ones, or a second person), `mAP_with` and `mAP_without` (of all queries).

    >>> table = pd.DataFrame({"pid": [1, 2, 3, 4], "matches": 1, "wrong": [True, True, False, False],
    ...                       "AP": [0.5, 0.2, 1, 1], "hat": [True, True, True, False]})
    >>> base_rates(table, ["hat"])[["wrong", "right", "lift"]].round(3)
         wrong  right   lift
    hat      2      1  1.667
    """
    table = table[table["matches"] > 0]
    shown = table[[*evidence]].to_numpy(bool)  # (Q, E)
    everyone = np.column_stack([np.ones(len(table), bool), shown])  # (Q, 1 + E)
    sides = np.column_stack([table["wrong"], ~table["wrong"]])  # (Q, 2)
    flat = pd.DataFrame((everyone[:, :, None] & sides[:, None]).reshape(len(table), -1))
    # (people, 2 (1 + E)): how many queries each person has
    by_person = flat.groupby(table["pid"].to_numpy(), sort=False).sum().to_numpy()

    def lifts(counts: np.ndarray) -> np.ndarray:
        """(R, 2 (1 + E)) counts to (R, E) lifts."""
        counts = counts.reshape(len(counts), -1, 2)
        shares = (counts[:, 1:] + 0.5) / (counts[:, :1] + 1)
        return shares[..., 0] / shares[..., 1]

    totals = by_person.sum(axis=0)
    lift, ends = np.full((1, len(evidence)), np.nan), np.full((2, len(evidence)), np.nan)
    if totals[:2].min() > 0 and len(by_person) > 1:
        lift = lifts(totals[None])
        drawn = np.stack([*times_drawn(len(by_person), seed=seed)])  # (R, people)
        ends = np.quantile(lifts(drawn @ by_person), ENDS, axis=0)
    out = pd.DataFrame(totals[2:].reshape(-1, 2), [*evidence], ["wrong", "right"])
    out[["share_wrong", "share_right"]] = out / totals[:2]
    out["lift"], out["low"], out["high"] = *lift, *ends
    out["mAP_with"] = [table["AP"][some].mean() for some in shown.T]
    out["mAP_without"] = [table["AP"][~some].mean() for some in shown.T]
    return out


def camera_pairs(retrieval: Retrieval) -> pd.DataFrame:
    """How hard it is to find a person of one camera in another: a row for each pair of cameras.

    `camid` (the query's), `match_camid`, `matches` (how many, over all queries) and `behind`: the
    share of them that stand behind the query's nearest stranger. Empty where cameras are unknown.
    """
    pairs = _camera_matches(_lists(retrieval)).groupby(["query_camid", "camid"])["behind"]
    found = pairs.agg(matches="size", behind="mean")
    return found.rename_axis(["camid", "match_camid"]).reset_index()


def _camera_matches(listed: pd.DataFrame) -> pd.DataFrame:
    """The matches of known cameras, with `behind`: 1.0 behind the query's nearest stranger."""
    behind = (listed["status"] == "wrong").groupby(listed["query"]).cummax().astype(float)
    known = (listed["camid"] >= 0) & (listed["query_camid"] >= 0)
    return listed.assign(behind=behind)[known & (listed["status"] == "match")]


def confusions(retrieval: Retrieval) -> pd.DataFrame:
    """Which identities are taken for each other: strangers among the first N of a query's list.

    N is the number of the query's matches: in a perfect list no stranger stands there. Distractors,
    who are not one identity, are left out. A row for each pair of identities, most confused first:
    `pid` < `other_pid`, `intrusions` (wrong images of either in lists of the other), `queries` (lists
    that have some), `mutual` (both ways), and `query`, `gallery`, `distance` of the nearest of them.
    """
    listed = _lists(retrieval)
    within = listed["rank"] <= listed["query_matches"]
    wrong = listed[within & (listed["status"] == "wrong") & (listed["pid"] > 0)]
    both = np.sort(wrong[["query_pid", "pid"]], axis=1)
    wrong = wrong.assign(pid=both[:, 0], other_pid=both[:, 1])
    groups = wrong.sort_values("distance", kind="stable").groupby(["pid", "other_pid"])
    counts = {"intrusions": ("query", "size"), "queries": ("query", "nunique")}
    counts |= {"mutual": ("query_pid", "nunique")}
    first = {column: (column, "first") for column in ("query", "gallery", "distance")}
    out = groups.agg(**counts, **first).reset_index()
    out["mutual"] = out["mutual"] == 2
    order = ["intrusions", "distance", "pid", "other_pid"]
    return out.sort_values(order, ascending=[False, True, True, True], ignore_index=True)


# --- in words


def plain(name: str) -> str:
    """Return the name of a column, or of a cause, as people read it."""
    return name.replace("_", " ")


def lifts_in_words(rates: pd.DataFrame, causes: pd.DataFrame) -> str:
    """Say which of the evidence that some query shows is more frequent among wrong ones."""
    scorable = causes[causes["matches"] > 0]
    wrong = scorable[scorable["wrong"]]
    proven = rates[rates["low"] > 1].sort_values("lift", ascending=False)
    if not 0 < len(wrong) < len(scorable):
        return "All queries are wrong, or none is: there is nothing to compare evidence with."
    if not len(proven):
        return (
            f"No evidence is surely more frequent among the {len(wrong):,} wrong queries than among the "
            f"{len(scorable) - len(wrong):,} right ones: they have other reasons, or the queries are too few."
        )
    first = proven.iloc[0]
    return (
        f"Wrong queries show {len(proven)} of {len(rates)} kinds of evidence surely more often than right "
        f"ones. The strongest is **{plain(first.name)}** ({EVIDENCE.get(first.name, first.name)}): "
        f"{first['share_wrong']:.0%} of the wrong queries show it and {first['share_right']:.0%} of the "
        f"right ones, a lift of {first['lift']:.1f} ({first['low']:.1f} to {first['high']:.1f}). "
        f"{(wrong['cause'] == 'unexplained').sum():,} of {len(wrong):,} wrong queries stay unexplained."
    )


def cameras_in_words(by_camera: pd.DataFrame) -> str:
    """Say between which cameras it is hardest and easiest, given what `camera_pairs` returned."""
    if len(by_camera) < 2:
        return "Cameras are unknown, or there is one pair alone, so they cannot be compared."
    hard, easy = by_camera.loc[by_camera["behind"].agg(["idxmax", "idxmin"])].itertuples()
    if hard.behind == easy.behind:
        return f"In every pair of cameras {hard.behind:.0%} of the matches stand behind a stranger."
    return (
        f"From camera {hard.camid} to camera {hard.match_camid}, {hard.behind:.0%} of {hard.matches:,} "
        f"matches stand behind a stranger; from {easy.camid} to {easy.match_camid}, {easy.behind:.0%} "
        f"of {easy.matches:,}."
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
    """Say if one hidden place would have changed an answer, of how many `wrong` ones: `gaps` (n,) say
    how much nearer the stranger is than the match, `SideMaps.swings` what a place is worth of that."""
    if not wrong:
        return "No query is wrong, so these are the least sure ones."
    return (
        f"In {(swings > gaps).sum() or 'none'} of the {len(gaps)} worst queries one small place, hidden, is "
        "worth more than the whole gap between stranger and match. Where none is, the mistake is spread "
        "over the picture."
    )
