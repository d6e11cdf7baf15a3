"""All pairs of a query set and a gallery: which show one person, and how far apart they are.

Pairs are those of the retrieval protocol: a query and a gallery image that the ranking of this
query keeps. Junk (pid -1) is in no pair; a distractor (pid 0) is somebody else for every query; two
images of one person by one camera, or one image twice (the same path), make no pair. Strangers by
one camera do make an impostor pair. A `camid` of -1 in every row, or no such column, says that
cameras are unknown: no pair is left out for its camera, and the tables have the one camera -1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from reidlib.evaluation.distances import between, check_same_network
from reidlib.evaluation.sides import Side, checked_side


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
        keep: as given.
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
            f"{len(self.genuine):,} genuine and {self.impostors:,} impostor pairs of "
            f"{identified:,} people and {strangers:,} distractors; the nearest "
            f"{len(self.impostor):,} impostor pairs are kept"
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
        >>> query = pd.DataFrame({"pid": [1, 2], "camid": [1, 1]})
        >>> gallery = pd.DataFrame({"pid": [1, 2, 1], "camid": [2, 2, 1]})
        >>> pairs = pair_distances([[0.0], [5.0]], query, [[1.0], [2.0], [0.0]], gallery)
        >>> pairs.genuine["distance"].tolist(), pairs.impostor["distance"].tolist()
        ([1.0, 3.0], [2.0, 4.0, 5.0])
    """
    if keep < 1 or block_pairs < 1:
        raise ValueError(f"keep and block_pairs must be 1 or more: {keep=}, {block_pairs=}")
    q, g = _sides(query_emb, query, gallery_emb, gallery)
    known = (q.camids >= 0).any() and (g.camids >= 0).any()
    genuine = _genuine(q, g, bool(exclude_same_camera and known))
    impostor = _Impostors(genuine, keep)
    for cameras, part, rows in _blocks(q, g, block_pairs):
        # (B, D), (n, D) -> (B, n)
        distances = between(q.emb[part], g.emb[rows])
        is_impostor = q.pids[part, None] != g.pids[rows]
        impostor.add(cameras, part, rows, distances, is_impostor)
    cameras = impostor.by_cameras()
    nearest = _table(q, g, *impostor.nearest())
    people, query_person, gallery_person = _people(q.pids, g.pids)
    return Pairs(
        genuine=genuine.assign(below=impostor.below, up_to=impostor.up_to),
        impostor=nearest,
        limit=impostor.limit,
        keep=keep,
        impostors=int(cameras["impostor"].sum()),
        cameras=cameras,
        people=people,
        query_person=query_person,
        gallery_person=gallery_person,
    )


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
    queried = np.unique(q_pids)
    if len(queried) < 2:
        raise ValueError(f"queries of {len(queried)} people cannot be split by person")
    rng = np.random.default_rng(seed)
    # People with queries and people without are split apart, so that both halves have of both.
    others = np.setdiff1d(g_pids[g_pids > 0], queried)
    first = [rng.permutation(pids)[: len(pids) // 2] for pids in (queried, others)]
    in_first = np.isin(g_pids, np.concatenate(first))
    strangers = np.flatnonzero(g_pids == 0)
    in_first[rng.permutation(strangers)[: len(strangers) // 2]] = True
    q_in_first = np.isin(q_pids, first[0])
    return [
        (np.flatnonzero(q_in_first == half), np.flatnonzero((in_first == half) & (g_pids != -1)))
        for half in (True, False)
    ]


# --- measuring


def _sides(
    query_emb: Any, query: pd.DataFrame, gallery_emb: Any, gallery: pd.DataFrame
) -> tuple[Side, Side]:
    """Return both sides, checked."""
    q = checked_side(query_emb, query, "query")
    g = checked_side(gallery_emb, gallery, "gallery")
    check_same_network(q.emb, g.emb)
    nobody = (q.pids <= 0).sum()
    if nobody:
        raise ValueError(
            f"{nobody} rows of the query table have a pid of 0 (distractor) or -1 (junk) and show "
            "nobody known: drop them, and number identities from 1"
        )
    if (g.pids == -1).all():
        raise ValueError(f"all {len(gallery)} gallery images are junk (pid -1)")
    return q, g


def _genuine(query: Side, gallery: Side, by_camera: bool) -> pd.DataFrame:
    """Return all genuine pairs, nearest first; `by_camera`: not those of one camera."""
    # pid -> rows, ascending
    queries, images = (pd.Series(pids).groupby(pids).indices for pids in (query.pids, gallery.pids))
    found = []
    for pid, part in queries.items():
        rows = images.get(pid, np.empty(0, np.int64))
        is_pair = np.ones((len(part), len(rows)), bool)
        if by_camera:
            is_pair &= query.camids[part, None] != gallery.camids[rows]
        if query.paths is not None and gallery.paths is not None:
            paths = query.paths[part, None]
            is_pair &= (paths != gallery.paths[rows]) | (paths == "")
        i, j = np.nonzero(is_pair)
        found.append((part[i], rows[j], between(query.emb[part], gallery.emb[rows])[i, j]))
    q_rows, g_rows, distance = (np.concatenate(part) for part in zip(*found, strict=True))
    if len(distance) == 0:
        raise ValueError(
            "there is no genuine pair: no query has a gallery image of the same person"
            + (" by another camera" if by_camera else "")
            + ". Do both tables come from one data set?"
        )
    table = _table(query, gallery, q_rows, g_rows, distance)
    return table.rename(columns={"query_pid": "pid"}).drop(columns="gallery_pid")


def _blocks(
    query: Side, gallery: Side, block_pairs: int
) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Yield cameras of queries and gallery, and rows of both: each block of one camera a side."""
    for q_cam in np.unique(query.camids):
        for g_cam in np.unique(gallery.camids[gallery.pids != -1]):
            queries = np.flatnonzero(query.camids == q_cam)
            rows = np.flatnonzero((gallery.camids == g_cam) & (gallery.pids != -1))
            step = max(1, block_pairs // len(rows))
            for start in range(0, len(queries), step):
                yield (q_cam, g_cam), queries[start : start + step], rows


class _Impostors:
    """Counts impostor pairs against the genuine ones as blocks come, and keeps the nearest."""

    def __init__(self, genuine: pd.DataFrame, keep: int):
        self.distance, self.keep, self.limit = genuine["distance"].to_numpy(), keep, math.inf
        self.below, self.up_to = np.zeros((2, len(genuine)), np.int64)
        self._genuine = genuine.groupby(["query_camid", "gallery_camid"]).indices
        self._cameras: dict[tuple[int, int], list[float]] = {}
        self._near: list[tuple] = []

    def add(
        self,
        cameras: tuple[int, int],
        part: np.ndarray,
        rows: np.ndarray,
        distances: np.ndarray,
        is_impostor: np.ndarray,
    ) -> None:
        """Take distances (B, n) of queries ``part`` and gallery ``rows`` of two cameras."""
        # (B, n) -> (m,)
        strangers = np.sort(distances[is_impostor])
        below, up_to = (np.searchsorted(strangers, self.distance, s) for s in ("left", "right"))
        self.below += below
        self.up_to += up_to
        here = self._genuine.get(cameras, [])
        both = self._cameras.setdefault(cameras, [len(here), 0, 0.0])
        both[1] += len(strangers)
        both[2] += (below[here] + up_to[here]).sum() / 2  # those nearer, a tie half
        i, j = np.nonzero(is_impostor & (distances < self.limit))
        near = (part[i].astype(np.int32), rows[j].astype(np.int32), distances[i, j])
        self._near.append(near)
        if sum(len(distance) for *_, distance in self._near) > 2 * self.keep:
            self._near, self.limit = _nearest(self._near, self.keep, self.limit)

    def nearest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what was kept: query rows, gallery rows and distances."""
        (near,), self.limit = _nearest(self._near, self.keep, self.limit)
        return near

    def by_cameras(self) -> pd.DataFrame:
        """Return one row a pair of cameras, see `Pairs`."""
        names = ["query_camid", "gallery_camid", "genuine", "impostor", "nearer"]
        table = pd.DataFrame([(*at, *n) for at, n in self._cameras.items()], columns=names)
        both = table["genuine"] * table["impostor"]
        table["AUC"] = 1 - table.pop("nearer") / both.where(both > 0)
        if (table["impostor"] == 0).all():
            raise ValueError("there is no impostor pair: query and gallery show one person alone")
        return table


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


def _table(
    query: Side, gallery: Side, q_rows: np.ndarray, g_rows: np.ndarray, distance: np.ndarray
) -> pd.DataFrame:
    """Pairs by row numbers, nearest first, with people and cameras."""
    order = np.lexsort((g_rows, q_rows, distance))
    q_rows, g_rows = q_rows[order], g_rows[order]
    columns = {"query": q_rows, "gallery": g_rows}
    columns |= {"query_pid": query.pids[q_rows], "gallery_pid": gallery.pids[g_rows]}
    columns |= {"query_camid": query.camids[q_rows], "gallery_camid": gallery.camids[g_rows]}
    columns = {name: column.astype(np.int32) for name, column in columns.items()}
    return pd.DataFrame(columns | {"distance": distance[order]})


def _people(q_pids: np.ndarray, g_pids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return who there is, and who is on each image of either side, see `Pairs`."""
    known = np.unique(np.concatenate([q_pids, g_pids[g_pids > 0]]))
    person = np.full(len(g_pids), -1)
    person[g_pids > 0] = np.searchsorted(known, g_pids[g_pids > 0])
    strangers = np.flatnonzero(g_pids == 0)
    person[strangers] = len(known) + np.arange(len(strangers))
    people = np.concatenate([known, np.zeros(len(strangers), np.int64)])
    return people, np.searchsorted(known, q_pids), person
