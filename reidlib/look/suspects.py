"""Suspects: labels that may be wrong.

`label_errors` and `identity_errors` here, and `copies.duplicates`, name suspects with their evidence,
to be looked at by a person; `recall_of_planted` says how far to trust them. All return one form,
`SUSPECT_COLUMNS`.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage

from reidlib.evaluation.distances import between, nearest, ratio

SUSPECT_COLUMNS = ["kind", "score", "image", "path", "pid", "camid"]
SUSPECT_COLUMNS += ["other", "other_path", "other_pid", "other_camid", "suggested_pid", "evidence"]

TWO_PEOPLE, ONE_PERSON = "two people in one pid?", "one person in two pids?"
LEAST = 1.5  # the smallest score of a wrong label: its own are half as far again as others
LEAST_TWO, LEAST_ONE = 1.5, 0.95  # the smallest of two people in one pid, and of one in two
NEIGHBOURS = 50  # how many nearest images are looked at for other identities


def label_errors(emb: np.ndarray, table: pd.DataFrame, near: tuple | None = None) -> pd.DataFrame:
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
        table: N rows: `path`, `pid`, `camid`.
        near: what `nearest_images` says of all rows but junk, if it was asked before.

    Returns:
        A `suspect_table` of scores from `LEAST`, the highest first: `kind` is "wrong identity?" or
        "no distractor?", `other` the nearest image of the suggested identity.

    Raises:
        ValueError: lengths differ, or embeddings are not finite.
    """
    emb, pids = _checked(emb, table)
    rows = np.flatnonzero(pids != -1)
    if len(rows) < 3 or (pids > 0).sum() < 2:
        return suspect_table(table, [])
    near, far = near or nearest_images(emb[rows], min(NEIGHBOURS, len(rows) - 1))
    label, who = pids[rows], pids[rows[near]]  # (n,), (n, K)
    line = np.arange(len(rows))
    # true where a pid appears for the second time among a row's neighbours, nearest first
    seen = pd.DataFrame({"row": line.repeat(who.shape[1]), "pid": who.ravel()})
    again = seen.groupby(["row", "pid"]).cumcount().to_numpy().reshape(who.shape) == 1
    again &= (who > 0) & (who != label[:, None])
    place = again.argmax(axis=1)  # of the first such identity
    found, suggested, other = again[line, place], who[line, place], far[line, place]
    again[line, place] = False
    place = again.argmax(axis=1)  # of the second, for distractors; at least the end of the list
    next_other = np.where(again[line, place], far[line, place], far[:, -1])
    within = _second_own(emb, pids)
    own = np.where(label == 0, next_other, within[rows])
    usual = pd.Series(within).groupby(pids).median().reindex(suggested).to_numpy()
    judged = found & ((label != 0) | (0.9 * other <= usual))
    score = np.where(judged, ratio(own, other), np.nan)
    records = []
    for i in np.flatnonzero(score >= LEAST):
        alike = who[i] == suggested[i]
        votes = alike[:10]
        evidence = (
            f"{'own' if label[i] else 'next'} identity at {own[i]:.3g}, identity {suggested[i]} at "
            f"{other[i]:.3g}; {votes.sum()} of its {len(votes)} nearest images are of {suggested[i]}"
        )
        kind = "wrong identity?" if label[i] else "no distractor?"
        pair = rows[i], rows[near[i, alike.argmax()]]
        records.append((kind, score[i], *pair, evidence, suggested[i]))
    return suspect_table(table, records)


def nearest_images(emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other images of each, and their Euclidean distances: (N, k) each, nearest first.

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
    """Distance to the second nearest other image of the own identity (N,), or to the only one; or NaN."""
    out = np.full(len(emb), np.nan)
    for rows in _people(pids).values():
        if len(rows) > 1:
            far = np.sort(between(emb[rows], emb[rows]), axis=1)  # column 0 is itself
            out[rows] = far[:, min(2, len(rows) - 1)]
    return out


def identity_errors(emb: np.ndarray, table: pd.DataFrame) -> pd.DataFrame:
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
        A `suspect_table`, each kind with its highest score first. `image` and `other` are the images
        in the middle of the two parts or identities; of two parts `image` is of the smaller one,
        `suggested_pid` the identity nearest to it.
    """
    emb, pids = _checked(emb, table)
    groups = _people(pids)
    if len(groups) < 3:  # with nobody else to compare with, nothing can be said
        return suspect_table(table, [])
    centres = np.stack([emb[rows].mean(axis=0) for rows in groups.values()])
    two = suspect_table(table, _two_people(emb, groups, centres, table))
    one = suspect_table(table, _one_person(emb, groups, centres))
    return pd.concat([two, one], ignore_index=True)


def _two_people(emb, groups, centres, table) -> Iterator[tuple]:
    ids = [*groups]
    for k, (pid, rows) in enumerate(groups.items()):
        if len(rows) < 4:
            continue
        part = fcluster(linkage(emb[rows], "average"), 2, "maxclust") == 1
        small, large = sorted((rows[part], rows[~part]), key=len)
        if len(small) < 2:
            continue
        middles = np.stack([emb[side].mean(axis=0) for side in (small, large)])
        far = between(middles, centres)  # (2, identities)
        far[:, k] = np.inf
        apart = np.linalg.norm(middles[0] - middles[1])
        score = ratio(apart, np.sqrt(far.min(axis=1).prod()))
        if score >= LEAST_TWO:
            suggested = ids[far[0].argmin()]
            evidence = (
                f"{len(small)} images{_seen_by(table, small)} lie {apart:.3g} from the other "
                f"{len(large)}{_seen_by(table, large)} of identity {pid}, and {far[0].min():.3g} "
                f"from identity {suggested}"
            )
            at = _middle(emb, small), _middle(emb, large)
            yield TWO_PEOPLE, score, *at, evidence, suggested


def _one_person(emb, groups, centres) -> Iterator[tuple]:
    ids, rows = [*groups], [*groups.values()]
    square = [np.square(emb[r] - c).sum(axis=1).mean() for r, c in zip(rows, centres, strict=True)]
    variance, sizes = np.array(square), np.array([*map(len, rows)])
    # root mean squares of distances between images of two identities, and within one
    apart = np.sqrt(between(centres, centres) ** 2 + variance[:, None] + variance)
    spread = np.sqrt(2 * variance * sizes / np.maximum(sizes - 1, 1))
    np.fill_diagonal(apart, np.inf)
    partner = apart.argmin(axis=1)
    for a, b in enumerate(partner):
        wide = max(spread[a], spread[b])
        score = ratio(wide, apart[a, b])
        if a < b and partner[b] == a and score >= LEAST_ONE:
            next_nearest = np.sort(np.concatenate([apart[a], apart[b]]))[2]
            evidence = (
                f"images of identities {ids[a]} and {ids[b]} are {apart[a, b]:.3g} apart, those "
                f"of one of them {wide:.3g}, those of the next identity {next_nearest:.3g}"
            )
            # the second identity would be called by the name of the first
            at = _middle(emb, rows[b]), _middle(emb, rows[a])
            yield ONE_PERSON, score, *at, evidence, ids[a]


def _people(pids: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of each identity, by pid in ascending order."""
    groups = pd.Series(pids).groupby(pids).indices
    return {pid: rows for pid, rows in groups.items() if pid > 0}


def _middle(emb: np.ndarray, rows: np.ndarray) -> int:
    """The row nearest to the centre of all."""
    return int(rows[np.square(emb[rows] - emb[rows].mean(axis=0)).sum(axis=1).argmin()])


def _seen_by(table: pd.DataFrame, rows: np.ndarray) -> str:
    """The cameras of some rows, in brackets; nothing where they are unknown."""
    cameras = np.unique(table["camid"].to_numpy()[rows])
    if cameras[0] < 0:
        return ""
    return f" (camera{'s'[: len(cameras) > 1]} {', '.join(map(str, cameras))})"


def _checked(emb: np.ndarray, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings in float64 and pids, if they fit each other."""
    emb = np.asarray(emb, dtype=np.float64)
    if emb.ndim != 2 or len(emb) != len(table):
        raise ValueError(f"embeddings {emb.shape} do not fit a table of {len(table)} rows.")
    if not np.isfinite(emb).all():
        raise ValueError("embeddings hold NaN or infinity.")
    return emb, table["pid"].to_numpy(np.int64)


def suspect_table(table: pd.DataFrame, found: Iterable[tuple]) -> pd.DataFrame:
    """Return the one form of all suspects in a table, `SUSPECT_COLUMNS`, the highest score first.

    `found` has of each kind, score, the rows of image and other, evidence, and suggested pid.
    """
    columns = ["kind", "score", "image", "other", "evidence", "suggested_pid"]
    types = {"score": float, "image": int, "other": int, "suggested_pid": "Int64"}
    out = pd.DataFrame(found, columns=columns).astype(types)
    for column in ("path", "pid", "camid"):
        labels = table[column].to_numpy()
        out[column], out[f"other_{column}"] = labels[out["image"]], labels[out["other"]]
    out = out.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    return out[SUSPECT_COLUMNS]


def recall_of_planted(
    emb: np.ndarray, table: pd.DataFrame, planted: int = 20, seed: int = 0
) -> dict[str, float]:
    """Give some images another identity at random, and count how many `label_errors` names: five times.

    The embeddings stay as they are: for images that the network was not trained on, which is what
    this is for, a wrong label changes none of them. The planted errors are random; those of people
    who label mix up people that look alike, and are harder to see.

    Returns:
        `planted` (in all), `recall` (share of them that is named), `right_pid` (share of these with
        the true identity suggested) and `others` (how many other images are named each time: false
        alarms, and errors that were there).

    Raises:
        ValueError: one identity, or fewer images than labels to plant.
    """
    emb, pids = _checked(emb, table)
    people, ids = np.flatnonzero(pids > 0), np.unique(pids[pids > 0])
    if len(ids) < 2 or len(people) < planted or planted < 1:
        raise ValueError(
            f"{planted} wrong labels do not fit {len(people)} images (people: {len(ids)})."
        )
    rng = np.random.default_rng(seed)
    kept = emb[pids != -1]
    near = nearest_images(kept, min(NEIGHBOURS, len(kept) - 1))
    tries = []
    for _ in range(5):
        rows = rng.choice(people, planted, replace=False)
        wrong = pids.copy()
        # another place in the list of identities than the true one
        shift = rng.integers(1, len(ids), planted)
        wrong[rows] = ids[(np.searchsorted(ids, pids[rows]) + shift) % len(ids)]
        found = label_errors(emb, table.assign(pid=wrong), near=near)
        tries.append(found.assign(planted=found["image"].isin(rows)))
    found = pd.concat(tries)
    named = found[found["planted"].astype(bool)]
    right = int((named["suggested_pid"] == pids[named["image"]]).sum())
    return {
        "planted": planted * len(tries),
        "recall": len(named) / (planted * len(tries)),
        "right_pid": right / len(named) if len(named) else float("nan"),
        "others": (len(found) - len(named)) / len(tries),
    }


# --- to look at, and to weigh


def in_fours(found: pd.DataFrame, emb: np.ndarray, table: pd.DataFrame) -> np.ndarray:
    """Return the rows of the images that each suspect, found in `emb` and `table`, is judged beside.

    (n, 4): the suspect, a typical image of its label (the one in the middle of all others), the image
    it is compared with, and a typical one of the identity it may be; -1 where there is none.
    """

    def typical(pid: int, row: tuple) -> int:
        rows = np.setdiff1d(np.flatnonzero(table["pid"] == pid), [row.image, row.other])
        return _middle(emb, rows) if pid > 0 and len(rows) else -1

    fours = np.empty((len(found), 4), np.int64)
    for k, row in enumerate(found.fillna({"suggested_pid": -1}).itertuples()):
        fours[k] = row.image, typical(row.pid, row), row.other, typical(row.suggested_pid, row)
    return fours


def short_label(pid: int, camid: int) -> str:
    """Return what the data say of an image, as a title over it.

    >>> short_label(7, 2), short_label(0, -1)
    ('id 7 c2', 'distractor')
    """
    who = {0: "distractor", -1: "junk"}.get(pid, f"id {pid}")
    return f"{who} c{camid}" if camid >= 0 else who


def touched(
    causes: pd.DataFrame, gallery: pd.DataFrame, found: pd.DataFrame, table: pd.DataFrame
) -> np.ndarray:
    """Return which queries are suspects, or have a suspect as their nearest stranger: (Q,) booleans.

    Of identities that may be two people, or one, every image is suspect, not only those in the middle.
    `causes` is what `why.causes` said of the gallery, and `table` what the suspects were found in.
    """
    whole = found.loc[found["kind"].isin([TWO_PEOPLE, ONE_PERSON]), ["pid", "other_pid"]].stack()
    named = {*found["path"], *found["other_path"], *table.loc[table["pid"].isin(whole), "path"]}
    strangers = gallery["path"].reset_index(drop=True).reindex(causes["stranger"].astype(float))
    return (causes["path"].isin(named) | strangers.isin(named).to_numpy()).to_numpy()


# --- in words


def trust_in_words(trial: dict[str, float], named: int) -> str:
    """Say how far to trust `label_errors`: what `recall_of_planted` returned, and how many it names."""
    right = f", {trial['right_pid']:.0%} of these with the true identity" if trial["recall"] else ""
    return (
        f"Of {trial['planted']:.0f} wrong labels planted at random, {trial['recall']:.0%} were "
        f"found{right}; each time it named {trial['others']:.0f} more. In the data as they are it "
        f"names {named or 'no'} images"
        + (", each with a wrong label, or hard for the network." if named else ".")
    )


def blame_in_words(rates: pd.Series, wrong: int, scorable: int) -> str:
    """Say whether suspect data goes together with failure.

    `rates` is the row of `why.base_rates` for the evidence that `touched` gives; `wrong` queries of
    the `scorable` ones are wrong.
    """
    if not 0 < wrong < scorable:
        return "All queries are wrong, or none is: there is nothing to compare suspects with."
    verdict = "That is not more often: these suspects do not explain the failures."
    if rates["low"] > 1:
        verdict = (
            "The data may be at fault; but pictures that are hard for the network look so, too."
        )
    elif rates["share_wrong"] > rates["share_right"]:
        verdict = "With so few people that may be chance: look at these suspects before you decide."
    return (
        f"In {rates['wrong']:.0f} of {wrong:,} wrong queries ({rates['share_wrong']:.0%}) the query or its "
        f"nearest stranger is a suspect, and in {rates['share_right']:.0%} of the right ones. {verdict}"
    )
