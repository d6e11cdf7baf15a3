"""All pairs of a query set and a gallery: which show one person, and how far apart they are.

Pairs are those of the retrieval protocol: a query and a gallery image that the ranking of this
query keeps. Junk (pid -1) is in no pair; a distractor (pid 0) is somebody else for every query; two
images of one person by one camera make no pair, strangers by one camera do. Where cameras are
unknown, the tables have the one camera -1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from reidlib.evaluation.distances import between
from reidlib.evaluation.retrieval import MATCH, Retrieval
from reidlib.evaluation.sides import Side


@dataclass(frozen=True, repr=False, eq=False)
class Pairs:
    """Each genuine pair of a query set and a gallery, and what decides of the impostor pairs.

    Tables of pairs have the columns ``query`` and ``gallery`` (row numbers), ``distance``
    (Euclidean, float64), and of each side, as ``query_…`` and ``gallery_…``, ``pid``, ``camid`` and
    ``person`` (position in ``people``). The nearest pair comes first.

    Attributes:
        genuine: the genuine pairs, and ``below`` and ``up_to``: how many of all impostor pairs are
            nearer, and at most as far.
        impostor: the nearest impostor pairs: all with a distance below ``limit``.
        limit: infinity if all impostor pairs were kept.
        keep: as given.
        impostors: how many impostor pairs there are, kept or not.
        cameras: one row a pair of cameras: ``query_camid``, ``gallery_camid``, how many ``genuine``
            and ``impostor`` pairs they make, and ``AUC`` among them (NaN without both).
        people: one row a person: ``pid``, and the number of its ``queries`` and gallery ``images``.
            Each distractor image counts as a person, pid 0, at the end.
    """

    genuine: pd.DataFrame
    impostor: pd.DataFrame
    limit: float
    keep: int
    impostors: int
    cameras: pd.DataFrame
    people: pd.DataFrame

    @property
    def identities(self) -> int:
        """How many people have a number."""
        return int((self.people["pid"] > 0).sum())

    @property
    def distractors(self) -> int:
        """How many images of others the gallery has."""
        return len(self.people) - self.identities

    def __repr__(self) -> str:
        return (
            f"{len(self.genuine):,} genuine and {self.impostors:,} impostor pairs of "
            f"{self.identities:,} people and {self.distractors:,} distractors; the nearest "
            f"{len(self.impostor):,} impostor pairs are kept"
        )


def pair_distances(
    retrieval: Retrieval, *, keep: int = 2_000_000, block_pairs: int = 2**21
) -> Pairs:
    """Measure all pairs of queries and gallery images, and keep what questions need.

    Every impostor pair is counted against every genuine one, and the nearest ``keep`` are kept, so
    ROC, AUC, equal error rate, and thresholds at false-match rates up to ``keep`` by all are exact.
    Distances are summed directly in float64, so equal images tie exactly.

    Args:
        retrieval: queries with a ``pid`` from 1, against their gallery.
        keep: impostor pairs to keep, some 80 bytes each while they are gathered.
        block_pairs: pairs measured at a time, 25 bytes each; the result does not depend on it.

    Raises:
        ValueError: a query is junk or distractor, or there is no genuine or no impostor pair.

    >>> query = pd.DataFrame({"pid": [1, 2], "camid": [1, 1]})
    >>> gallery = pd.DataFrame({"pid": [1, 2, 1], "camid": [2, 2, 1]})
    >>> retrieval = Retrieval([[0.0], [5.0]], query, [[1.0], [2.0], [0.0]], gallery)
    >>> pairs = pair_distances(retrieval)
    >>> pairs.genuine["distance"].tolist(), pairs.impostor["distance"].tolist()
    ([1.0, 3.0], [2.0, 4.0, 5.0])
    """
    if keep < 1 or block_pairs < 1:
        raise ValueError(f"keep and block_pairs must be 1 or more: {keep=}, {block_pairs=}")
    q, g = retrieval.query_side, retrieval.gallery_side
    retrieval.check_identities()
    people, labels = _people(q, g)
    genuine = _sorted(_genuine(retrieval), labels)
    at = genuine["distance"].to_numpy()
    by_cameras = genuine.groupby(["query_camid", "gallery_camid"]).indices
    # Impostor pairs nearer than each genuine one, and at most as far; and counts by cameras.
    nearer, counts = np.zeros((2, len(genuine)), np.int64), []
    near, limit = [], math.inf
    for both, queries, rows in _blocks(q, g, block_pairs):
        # (B, D), (n, D) -> (B, n)
        distances = between(q.emb[queries], g.emb[rows])
        is_impostor = q.pids[queries, None] != g.pids[rows]
        # (B, n) -> (m,)
        strangers = np.sort(distances[is_impostor])
        found = np.stack([np.searchsorted(strangers, at, side) for side in ("left", "right")])
        nearer += found
        here = by_cameras.get(both, [])
        counts.append((*both, len(here), len(strangers), found[:, here].sum() / 2))  # a tie half
        i, j = np.nonzero(is_impostor & (distances < limit))
        pairs = pd.DataFrame({"query": queries[i], "gallery": rows[j]}, dtype=np.int32)
        near.append(pairs.assign(distance=distances[i, j]))
        if sum(map(len, near)) > 2 * keep:
            near, limit = _nearest(near, keep, limit)
    (impostor,), limit = _nearest(near, keep, limit)
    names = ["query_camid", "gallery_camid", "genuine", "impostor", "nearer"]
    cameras = pd.DataFrame(counts, columns=names).groupby(names[:3], as_index=False).sum()
    possible = cameras["genuine"] * cameras["impostor"]
    cameras["AUC"] = 1 - cameras.pop("nearer") / possible.where(possible > 0)
    impostors = int(cameras["impostor"].sum())
    if not impostors:
        raise ValueError(
            "there is no impostor pair: query and gallery show one person alone. Take a larger test, or "
            "train with hold_out, and a threshold is chosen on other people."
        )
    genuine = genuine.assign(below=nearer[0], up_to=nearer[1])
    return Pairs(genuine, _sorted(impostor, labels), limit, keep, impostors, cameras, people)


def _people(query: Side, gallery: Side) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return who there is, and the ``pid``, ``camid`` and ``person`` of each image by side."""
    last = max(query.pids.max(), gallery.pids.max())
    # A number beyond all pids for each distractor image.
    numbers = np.where(gallery.pids == 0, last + 1 + np.arange(len(gallery.pids)), gallery.pids)
    who = pd.Index(np.union1d(query.pids, numbers[numbers > 0]))
    labels = {}
    for name, side, number in (("query", query, query.pids), ("gallery", gallery, numbers)):
        person = who.get_indexer(number)  # of junk -1
        columns = {"pid": side.pids, "camid": side.camids, "person": person}
        labels[name] = pd.DataFrame(columns, dtype=np.int32)
    queries, images = (of_side["person"].value_counts() for of_side in labels.values())
    people = pd.DataFrame({"pid": who.where(who <= last, 0)})
    return people.assign(queries=queries, images=images).fillna(0).astype(np.int64), labels


def _genuine(retrieval: Retrieval) -> pd.DataFrame:
    """Return all genuine pairs."""
    q, g = retrieval.query_side.emb, retrieval.gallery_side.emb
    queries, rows, status = retrieval.pairs
    pairs = pd.DataFrame({"query": queries, "gallery": rows}, dtype=np.int32)[status == MATCH]
    if pairs.empty:
        raise ValueError(
            "there is no genuine pair: no query has a gallery image of the same person, by another "
            "camera if cameras are known. Do both tables come from one data set?"
        )
    by_query = pairs.groupby("query")["gallery"]
    return pairs.assign(distance=np.concatenate([between(q[[i]], g[j])[0] for i, j in by_query]))


def _blocks(query: Side, gallery: Side, block_pairs: int) -> Iterator[tuple]:
    """Yield cameras of queries and gallery, and rows of both: each block of one camera a side."""
    images = np.flatnonzero(gallery.pids != -1)
    camids = gallery.camids[images]
    for both in product(np.unique(query.camids), np.unique(camids)):
        queries, rows = np.flatnonzero(query.camids == both[0]), images[camids == both[1]]
        step = max(1, block_pairs // len(rows))
        for start in range(0, len(queries), step):
            yield both, queries[start : start + step], rows


def _nearest(parts: list, keep: int, limit: float) -> tuple[list, float]:
    """The nearest ``keep`` of some tables of pairs, in one, and the limit.

    Only what is nearer than the limit stays, so a crowd of ties takes no memory: with c pairs kept,
    the (c+1)th to the (keep+1)th distance of all are equal to the limit.
    """
    pairs = pd.concat(parts)
    if len(pairs) > keep:
        limit = float(np.partition(pairs["distance"].to_numpy(), keep)[keep])
        pairs = pairs[pairs["distance"] < limit]
    return [pairs], limit


def _sorted(pairs: pd.DataFrame, labels: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Pairs nearest first, with the labels of their images."""
    order = np.lexsort([pairs[name] for name in ("gallery", "query", "distance")])
    pairs = pairs.iloc[order].reset_index(drop=True)
    for name, of_side in labels.items():
        pairs = pairs.join(of_side.add_prefix(f"{name}_"), on=name)
    return pairs


def halves(retrieval: Retrieval, *, seed: int = 0) -> list[Retrieval]:
    """Two halves of a query set and its gallery that share no person.

    Distractors are split by image; junk is in neither. A ValueError if queries show one person alone.
    """
    q, g = retrieval.query_side, retrieval.gallery_side
    queried = np.unique(q.pids)
    if len(queried) < 2:
        raise ValueError("all queries show one person: they cannot be split by person")
    # People with queries and people without are split apart, so that both halves have of both.
    others, strangers = np.setdiff1d(g.pids[g.pids > 0], queried), np.flatnonzero(g.pids == 0)
    rng = np.random.default_rng(seed)
    first = [rng.permutation(kind)[: len(kind) // 2] for kind in (queried, others, strangers)]
    q_first, g_first = np.isin(q.pids, first[0]), np.isin(g.pids, np.concatenate(first[:2]))
    g_first[first[2]] = True
    options = {"exclude_same_camera": retrieval.exclude_same_camera}
    parts = []
    for asked, shown in ((q_first, g_first), (~q_first, ~g_first & (g.pids != -1))):
        # A row number is a place, and an index of the whole would say another.
        query = retrieval.query[asked].reset_index(drop=True)
        gallery = retrieval.gallery[shown].reset_index(drop=True)
        parts.append(Retrieval(q.emb[asked], query, g.emb[shown], gallery, **options))
    return parts
