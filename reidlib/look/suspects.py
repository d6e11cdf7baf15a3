"""Suspects: labels that may be wrong.

`label_errors` and `identity_errors` here, and `copies.duplicates`, name suspects with their evidence,
to be looked at by a person; `recall_of_planted` says how far to trust them. All return one form,
`SUSPECT_COLUMNS`.
"""

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage

from reidlib.evaluation.distances import between, nearest, ratio

SUSPECT_COLUMNS = (
    *("kind", "score", "image", "path", "pid", "camid", "other", "other_path", "other_pid"),
    *("other_camid", "suggested_pid", "evidence"),
)

TWO_PEOPLE = "two people in one pid?"
LEAST = 1.5  # the smallest score of a wrong label: its own are half as far again as others
NEIGHBOURS = 50  # how many nearest images are looked at for other identities


def label_errors(
    emb: np.ndarray, table: pd.DataFrame, least: float = LEAST, neighbours: int = NEIGHBOURS
) -> pd.DataFrame:
    """Images that lie with another identity, and far from their own.

    The score is own / other: the distance to the second nearest image of the image's own identity
    over that to the second nearest image of another one, the smallest over all others. Second, since
    the nearest may itself have a wrong label. All cameras count: the other images of a walk past
    one camera are the surest witnesses of a single wrong label. A walk that has the wrong label as
    a whole has its witnesses with it: `identity_errors` looks for those.

    A distractor (pid 0) has no identity of its own; its score is the distance to the second
    nearest identity over that to the nearest, and it must lie about as near to that one as its
    images do to each other: strangers who look like somebody are many. Junk (pid -1) is passed
    over, and so is an identity's only image.

    Args:
        emb: (N, D).
        table: N rows.
        least: the smallest score of a suspect; 1.5: its own are half as far again as others.
        neighbours: how many nearest images are looked at for other identities.

    Returns:
        Suspects, the highest score first, with the columns `SUSPECT_COLUMNS`: `kind` is "wrong
        identity?" or "no distractor?", `other` the nearest image of the suggested identity.

    Raises:
        ValueError: lengths differ.
    """
    emb, pids = _checked(emb, table)
    rows = np.flatnonzero(pids != -1)
    if len(rows) < 3 or (pids > 0).sum() < 2:
        return suspect_table(table, [], [], [], [], [])
    near, far = nearest_images(emb[rows], min(neighbours, len(rows) - 1))
    return _label_errors(emb, table, least, rows, rows[near], far)


def _label_errors(emb, table, least, rows, near, far) -> pd.DataFrame:
    """`label_errors` of some rows (n,), with their nearest rows and distances (n, K)."""
    pids = table["pid"].to_numpy(np.int64)
    who, own_pid = pids[near], pids[rows]
    # a pid's second appearance in a row's list of neighbours, nearest first
    again = np.zeros(who.shape, bool)
    for k in range(1, who.shape[1]):
        again[:, k] = (who[:, :k] == who[:, [k]]).sum(axis=1) == 1
    again &= (who > 0) & (who != own_pid[:, None])
    place = again.argmax(axis=1)  # of the first such identity
    line = np.arange(len(rows))
    found = again[line, place]
    other = np.where(found, far[line, place], np.inf)
    suggested = np.where(found, who[line, place], -1)
    # the second identity to appear twice: for distractors
    again[line, place] = False
    next_place = again.argmax(axis=1)
    # beyond the list, it is at least as far as the list reaches
    next_other = np.where(again[line, next_place], far[line, next_place], far[:, -1])
    within = _second_own(emb, pids)
    own = np.where(own_pid == 0, next_other, within[rows])
    score = np.where(found, ratio(own, other), np.nan)  # NaN: cannot be judged
    usual = pd.Series(within).groupby(pids).median().reindex(suggested).to_numpy()
    score[(own_pid == 0) & ~(0.9 * other <= usual)] = np.nan
    picked = np.flatnonzero(score >= least)
    picked = picked[np.argsort(-score[picked], kind="stable")]
    witness = near[picked, (who[picked] == suggested[picked, None]).argmax(axis=1)]
    votes = (who[picked, :10] == suggested[picked, None]).sum(axis=1)
    kind = np.where(own_pid[picked] == 0, "no distractor?", "wrong identity?")
    evidence = [
        (f"own identity at {a:.3g}, " if p > 0 else f"next identity at {a:.3g}, ")
        + f"identity {s} at {b:.3g}; {v} of its {min(10, who.shape[1])} nearest images are of {s}"
        for a, b, s, v, p in zip(
            own[picked], other[picked], suggested[picked], votes, own_pid[picked], strict=True
        )
    ]
    out = suspect_table(table, kind, score[picked], rows[picked], witness, evidence)
    return out.assign(suggested_pid=pd.array(suggested[picked], "Int64"))


def nearest_images(emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each, and their Euclidean distances: (N, k) each, nearest first.

    Raises:
        ValueError: fewer than k other images, or embeddings that are not (N, D) numbers.

    >>> nearest_images(np.array([[0.0], [1.0], [5.0]]), 1)[0].tolist()
    [[1], [0], [1]]
    """
    emb = np.asarray(emb, dtype=np.float64)
    if emb.ndim != 2 or not 1 <= k < len(emb):
        raise ValueError(f"There are no {k} other images for each row of embeddings {emb.shape}.")
    rows, squared = nearest(emb, emb, k + 1)  # (N, k + 1)
    itself = rows == np.arange(len(emb))[:, None]
    itself[~itself.any(axis=1), -1] = True  # behind k copies: any of them may go
    return rows[~itself].reshape(-1, k), np.sqrt(squared[~itself]).reshape(-1, k)


def _second_own(emb: np.ndarray, pids: np.ndarray) -> np.ndarray:
    """Distance to the second nearest other image of the own identity (N,); to the only one where
    there is one, NaN where there is none."""
    out = np.full(len(emb), np.nan)
    for pid, rows in pd.Series(pids).groupby(pids).indices.items():
        if pid > 0 and len(rows) > 1:
            far = np.sort(between(emb[rows], emb[rows]), axis=1)  # column 0 is itself
            out[rows] = far[:, min(2, len(rows) - 1)]
    return out


def identity_errors(
    emb: np.ndarray,
    table: pd.DataFrame,
    least_two: float = 1.5,
    least_one: float = 0.95,
) -> pd.DataFrame:
    """Identities that look like two people, and pairs of identities that look like one.

    **Two people in one pid?** The images of an identity are cut in two (average linkage), two images
    or more on either side. The score is the distance between the centres of both parts over the
    distance from a part to the nearest centre of another identity (the geometric mean of both
    parts'). Above 1 the parts are farther from each other than from strangers. A whole walk
    past one camera under a wrong pid shows up here, as a part of its own.

    **One person in two pids?** Two identities, each the other's nearest. The score is the larger
    spread of the two over the distance between them, both root mean squares of distances between
    images: near 1, images of the two are as near to each other as images of one.

    Returns:
        Suspects with the columns `SUSPECT_COLUMNS`, each kind with its highest score first. `image`
        and `other` are the images in the middle of the two parts or identities; of two parts
        `image` is of the smaller one, `suggested_pid` the identity nearest to it.

    Raises:
        ValueError: lengths differ.
    """
    emb, pids = _checked(emb, table)
    groups = {pid: rows for pid, rows in pd.Series(pids).groupby(pids).indices.items() if pid > 0}
    if len(groups) < 3:  # with nobody else to compare with, nothing can be said
        return suspect_table(table, [], [], [], [], [])
    ids = np.array([*groups])
    centres = np.stack([emb[rows].mean(axis=0) for rows in groups.values()])
    variance = np.array(
        [
            np.square(emb[rows] - centre).sum(axis=1).mean()
            for rows, centre in zip(groups.values(), centres, strict=True)
        ]
    )
    two = _two_people(emb, groups, ids, centres, table, least_two)
    one = _one_person(emb, groups, ids, centres, variance, table, least_one)
    return pd.concat([two, one], ignore_index=True)


def _two_people(emb, groups, ids, centres, table, least) -> pd.DataFrame:
    found = []
    for k, (pid, rows) in enumerate(groups.items()):
        if len(rows) < 4:
            continue
        part = fcluster(linkage(emb[rows], "average"), 2, "maxclust") == 1
        if not 2 <= part.sum() <= len(rows) - 2:
            continue
        small, large = sorted((rows[part], rows[~part]), key=len)
        middles = np.stack([emb[small].mean(axis=0), emb[large].mean(axis=0)])
        far = between(middles, centres)  # (2, identities)
        far[:, k] = np.inf
        apart = np.linalg.norm(middles[0] - middles[1])
        score = float(ratio(apart, np.sqrt(far.min(axis=1).prod())))
        if score >= least:
            next_to = ids[far[0].argmin()]
            evidence = (
                f"{len(small)} images{_seen_by(table, small)} lie {apart:.3g} from the other "
                f"{len(large)}{_seen_by(table, large)} of identity {pid}, and {far[0].min():.3g} "
                f"from identity {next_to}"
            )
            at = [_middle(emb, side) for side in (small, large)]
            found.append((TWO_PEOPLE, score, *at, evidence, next_to))
    return _found(table, found)


def _one_person(emb, groups, ids, centres, variance, table, least) -> pd.DataFrame:
    sizes = np.array([len(rows) for rows in groups.values()])
    # root mean squares of distances between images of two identities, and within one
    apart = np.sqrt(between(centres, centres) ** 2 + variance[:, None] + variance)
    spread = np.sqrt(2 * variance * sizes / np.maximum(sizes - 1, 1))
    np.fill_diagonal(apart, np.inf)
    partner = apart.argmin(axis=1)
    found = []
    for a, b in enumerate(partner):
        if a < b and partner[b] == a:
            wide = max(spread[a], spread[b])
            score = float(ratio(wide, apart[a, b]))
            if score >= least:
                next_nearest = np.sort(np.concatenate([apart[a], apart[b]]))[2]
                evidence = (
                    f"images of identities {ids[a]} and {ids[b]} are {apart[a, b]:.3g} apart, those "
                    f"of one of them {wide:.3g}, those of the next identity {next_nearest:.3g}"
                )
                # the second identity would be called by the name of the first
                at = [_middle(emb, groups[ids[i]]) for i in (b, a)]
                found.append(("one person in two pids?", score, *at, evidence, ids[a]))
    return _found(table, found)


def _found(table, found) -> pd.DataFrame:
    found = sorted(found, key=lambda f: -f[1])
    kind, score, image, other, evidence, suggested = (
        zip(*found, strict=True) if found else ((),) * 6
    )
    out = suspect_table(table, kind, score, image, other, evidence)
    return out.assign(suggested_pid=pd.array(list(suggested), "Int64"))


def _middle(emb: np.ndarray, rows: np.ndarray) -> int:
    """The row nearest to the centre of all."""
    return int(rows[np.square(emb[rows] - emb[rows].mean(axis=0)).sum(axis=1).argmin()])


def _seen_by(table: pd.DataFrame, rows: np.ndarray) -> str:
    """The cameras of some rows, in brackets; nothing where they are unknown."""
    cameras = np.unique(table["camid"].to_numpy()[rows]) if "camid" in table else [-1]
    if cameras[0] < 0:
        return ""
    return f" (camera{'s'[: len(cameras) > 1]} {', '.join(map(str, cameras))})"


def _checked(emb: np.ndarray, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    emb = np.asarray(emb, dtype=np.float64)
    if emb.ndim != 2 or len(emb) != len(table):
        raise ValueError(f"embeddings {emb.shape} do not fit a table of {len(table)} rows.")
    if not np.isfinite(emb).all():
        raise ValueError("embeddings hold NaN or infinity.")
    return emb, table["pid"].to_numpy(np.int64)


def suspect_table(table, kind, score, image, other, evidence) -> pd.DataFrame:
    """The one form of all suspects: `SUSPECT_COLUMNS`."""
    out = pd.DataFrame({"kind": np.array(kind, object), "score": np.array(score, float)})
    for name, rows in (("", image), ("other_", other)):
        rows = np.array(rows, np.int64)
        out[name.rstrip("_") or "image"] = rows
        for column in ("path", "pid", "camid"):
            blank = pd.Series("" if column == "path" else -1, index=table.index)
            out[name + column] = table.get(column, blank).to_numpy()[rows]
    out["suggested_pid"] = pd.array([pd.NA] * len(out), "Int64")
    out["evidence"] = np.array(evidence, object)
    return out[list(SUSPECT_COLUMNS)]


def recall_of_planted(
    emb: np.ndarray, table: pd.DataFrame, planted: int = 20, repeats: int = 5, seed: int = 0
) -> dict[str, float]:
    """Give some images another identity at random, and count how many `label_errors` names.

    The embeddings stay as they are: for images that the network was not trained on, which is what
    this is for, a wrong label changes none of them. The planted errors are random; those of people
    who label mix up people that look alike, and are harder to see.

    Args:
        planted: how many at a time.
        repeats: how many times, each with other images.

    Returns:
        `planted` (in all), `recall` (share of them that is named), `right_pid` (share of
        those named where the suggested identity is the true one) and `others` (how many other
        images are named, in the mean of the repeats: false alarms, and errors that were there).

    Raises:
        ValueError: fewer than two identities, or fewer images than are to be planted.
    """
    pids = table["pid"].to_numpy()
    people, ids = np.flatnonzero(pids > 0), np.unique(pids[pids > 0])
    if len(ids) < 2 or len(people) < planted or planted < 1:
        raise ValueError(
            f"{planted} wrong labels cannot be planted in {len(people)} images of {len(ids)} people."
        )
    emb, _ = _checked(emb, table)
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(pids != -1)
    near, far = nearest_images(emb[kept], min(NEIGHBOURS, len(kept) - 1))
    named, right, others = 0, 0, 0
    for _ in range(repeats):
        rows = rng.choice(people, planted, replace=False)
        wrong = pids.copy()
        # another place in the list of identities than the true one
        shift = rng.integers(1, len(ids), planted)
        wrong[rows] = ids[(np.searchsorted(ids, pids[rows]) + shift) % len(ids)]
        found = _label_errors(emb, table.assign(pid=wrong), LEAST, kept, kept[near], far)
        hits = found[found["image"].isin(rows)]
        named += len(hits)
        right += int((hits["suggested_pid"].to_numpy() == pids[hits["image"]]).sum())
        others += len(found) - len(hits)
    return {
        "planted": planted * repeats,
        "recall": named / (planted * repeats),
        "right_pid": right / named if named else float("nan"),
        "others": others / repeats,
    }


# --- to look at, and to weigh


def in_fours(found: pd.DataFrame, emb: np.ndarray, table: pd.DataFrame) -> np.ndarray:
    """Return the rows of the images that each suspect is judged beside.

    Args:
        found: suspects with the columns `SUSPECT_COLUMNS`.
        emb, table: what they were found in.

    Returns:
        (n, 4): the suspect, a typical image of its label (the one in the middle of all others), the
        image it is compared with, and a typical one of the identity it may be; -1 where there is none.
    """

    def typical(pid: int, but: list[int]) -> int:
        rows = np.setdiff1d(np.flatnonzero(table["pid"] == pid), but)
        return _middle(emb, rows) if pid > 0 and len(rows) else -1

    fours = []
    for row in found.itertuples():
        pair = [row.image, row.other]
        suggested = -1 if pd.isna(row.suggested_pid) else row.suggested_pid
        fours.append([row.image, typical(row.pid, pair), row.other, typical(suggested, pair)])
    return np.array(fours, np.int64).reshape(-1, 4)


def short_label(pid: int, camid: int) -> str:
    """Return what the data say of an image, as a title over it.

    >>> short_label(7, 2), short_label(0, -1)
    ('id 7 c2', 'distractor')
    """
    who = f"id {pid}" if pid > 0 else "junk" if pid else "distractor"
    return f"{who} c{camid}" if camid >= 0 else who


def touched(
    causes: pd.DataFrame, gallery: pd.DataFrame, found: pd.DataFrame, table: pd.DataFrame
) -> np.ndarray:
    """Return which queries are suspects, or have a suspect as their nearest stranger: (Q,) booleans.

    Of an identity that may be two people every image is suspect, not only the two that are named.

    Args:
        causes: what `why.causes` returned, with paths.
        gallery: its gallery.
        found: suspects with the columns `SUSPECT_COLUMNS`.
        table: what they were found in.
    """
    two = found.loc[found["kind"] == TWO_PEOPLE, "pid"]
    named = {*found["path"], *found["other_path"], *table.loc[table["pid"].isin(two), "path"]}
    strangers = gallery["path"].reset_index(drop=True).reindex(causes["stranger"].astype(float))
    return (causes["path"].isin(named) | strangers.isin(named).to_numpy()).to_numpy()


# --- in words


def trust_in_words(trial: dict[str, float], named: int) -> str:
    """Say how far to trust `label_errors`: what `recall_of_planted` returned, and how many it names."""
    right = f", {trial['right_pid']:.0%} of these with the true identity" if trial["recall"] else ""
    return (
        f"Of {trial['planted']:.0f} wrong labels planted at random, {trial['recall']:.0%} were "
        f"found{right}. How many other images were named each time: {trial['others']:.0f}. In the "
        f"data as they are: {named}. Each of those has a wrong label, or is hard for the network."
    )


def blame_in_words(rates: pd.Series, wrong: int, scorable: int) -> str:
    """Say whether suspect data goes together with failure.

    Args:
        rates: the row of `why.base_rates` for the evidence "the query or its stranger is a suspect".
        wrong, scorable: how many queries are wrong, of how many that have a match.
    """
    if not 0 < wrong < scorable:
        return "All queries are wrong, or none is: there is nothing to compare suspects with."
    said = (
        f"In {rates['wrong']:.0f} of {wrong:,} wrong queries ({rates['share_wrong']:.0%}) the query or its "
        f"nearest stranger is a suspect, and in {rates['share_right']:.0%} of the right ones. "
    )
    if rates["low"] > 1:
        return said + (
            "Some of these failures may be the fault of the data. Not all are: a picture that is hard "
            "for the network looks like a wrong label. The others are the network's, or hard for anybody."
        )
    return said + "That is not surely more often: these suspects do not explain the failures."
