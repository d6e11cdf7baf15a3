"""From embeddings to scores: ranks, AP by both definitions, CMC, mINP, and what stands behind them.

The protocol is that of Market-1501, single query. Gallery images with pid -1 are junk and dropped;
pid 0 are distractors and stay as negatives. For each query, gallery images of its identity from
its own camera are dropped, for they are nearly the same picture; so is the query image itself
where the gallery holds it (the same path), which matters when no camera is known. Queries with no
match left are counted, named and left out of every mean. Equal distances rank in gallery order.

Tables are pandas tables with the columns ``pid`` and, if known, ``camid`` and ``path``; a row
number is a position in the table, whatever its index. A ``camid`` of -1 in every row, or no such
column, says that cameras are unknown. Embeddings are (N, D) NumPy arrays or tensors beside them.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reidlib.evaluation.distances import listed, product_with, squared, taken
from reidlib.evaluation.metrics import TOPK, Evaluation, per_query_scores, score_values
from reidlib.evaluation.ranks import match_ranks
from reidlib.evaluation.sides import checked_rows, checked_sides

# What a ranked list says of an image; those after "unknown" are dropped from the ranking.
STATUSES = ("match", "wrong", "unknown", "same camera", "junk", "query itself")
MATCH, WRONG, UNKNOWN, SAME_CAMERA, JUNK, ITSELF = range(len(STATUSES))

TILE = 2**16  # gallery images that ranked lists look at at one time
NOTHING = (np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))


class Retrieval:
    """One set of queries against one gallery: the one ranking that is scored and drawn.

    Args:
        query_emb: (Q, D) floats.
        query: Q rows, pids from 1; a pid of 0 or -1 can be listed, not scored.
        gallery_emb: (G, D) floats, in memory or on disk (`Shards`, or a dataset of h5py).
        gallery: G rows, pids from -1; -1 in all rows says that nobody is known there.
        exclude_same_camera: False keeps matches from the query's own camera.

    Attributes:
        query, gallery: the tables, as given.
        query_side, gallery_side: embeddings and columns of the tables as arrays, checked.

    Raises:
        ValueError: arrays and tables do not fit each other, embeddings are not finite, query or
            gallery is empty, or cameras are known on one side alone.

    >>> query, gallery = pd.DataFrame({"pid": [1]}), pd.DataFrame({"pid": [2, 1]})
    >>> retrieval = Retrieval([[0.0]], query, [[1.0], [2.0]], gallery)
    >>> retrieval.ranked_lists(topk=2)["pid"].tolist()
    [2, 1]
    """

    def __init__(
        self,
        query_emb: Any,
        query: pd.DataFrame,
        gallery_emb: Any,
        gallery: pd.DataFrame,
        *,
        exclude_same_camera: bool = True,
    ):
        self.query, self.gallery = query, gallery
        self.query_side, self.gallery_side = checked_sides(query_emb, query, gallery_emb, gallery)
        self.exclude_same_camera = exclude_same_camera
        sides = (self.query_side, self.gallery_side)
        known = [(side.camids != -1).any() for side in sides]
        asked = all((side.pids > 0).any() for side in sides)  # else nobody can be a match
        if exclude_same_camera and asked and known[0] != known[1]:
            raise ValueError(
                f"Cameras are known in the {'query' if known[0] else 'gallery'} table alone, so matches by "
                "the query's own camera cannot be left out. Give both their camids (--pattern reads them "
                "from names of files), or keep such matches: exclude_same_camera=False."
            )
        self._by_camera = exclude_same_camera and all(known)  # drop matches of the query's camera?
        self._unlabelled = bool((self.gallery_side.pids == -1).all())
        self._given: np.ndarray | None = None  # (Q, G) distances that came ready
        self._partial_file: Path | None = None

    @classmethod
    def from_distances(
        cls, distances: Any, query: pd.DataFrame, gallery: pd.DataFrame, **options
    ) -> "Retrieval":
        """Rank by (Q, G) distances that came ready, as from re-ranking; the options are those above.

        Raises:
            ValueError: they do not fit the tables, or are not finite.
        """
        distances, shape = np.asarray(distances), (len(query), len(gallery))
        if distances.shape != shape or distances.dtype.kind not in "fiu":
            what = f"{distances.shape} {distances.dtype}"
            raise ValueError(f"distances must be numbers, {shape} for these tables, not {what}")
        if len(broken := np.flatnonzero(~np.isfinite(distances).all(axis=1))):
            raise ValueError(f"distances hold NaN or infinity in {listed(broken)}")
        # Embeddings of one number, never looked at, for the checks of the tables.
        made = cls(np.zeros((shape[0], 1)), query, np.zeros((shape[1], 1)), gallery, **options)
        made._given = distances
        return made

    def ask(self, gallery_rows: Sequence[int] | np.ndarray) -> "Retrieval":
        """Return the retrieval that has these gallery images as its queries.

        Raises:
            ValueError: no such rows; or this one was made from distances, which do not say how
                far gallery images are from each other.
        """
        if self._given is not None:
            raise ValueError("distances alone do not say how far gallery images are apart")
        rows = checked_rows(gallery_rows, len(self.gallery), "gallery")
        emb, table = self.gallery_side.emb, self.gallery
        options = {"exclude_same_camera": self.exclude_same_camera}
        return Retrieval(taken(emb, rows), table.iloc[rows], emb, table, **options)

    def evaluate(
        self, topk: Sequence[int] = TOPK, partial_file: str | Path | None = None
    ) -> Evaluation:
        """Score the ranking, which is made once.

        Ranks are those of distances summed directly in float64, so equal images tie exactly and
        results do not depend on blocks or threads: `ranks` says how.

        Args:
            topk: the k of the reported CMC values.
            partial_file: keeps what is counted so far, every few seconds. An evaluation that was
                killed goes on from there, to the same scores; when it is done, the file goes.

        Raises:
            ValueError: the whole gallery is junk, a query is junk or distractor, or no query at
                all has a match.
        """
        if not topk or min(topk) < 1:
            raise ValueError(f"topk must name ranks from 1, not {topk!r}")
        self.check_identities()
        self._partial_file = partial_file and Path(partial_file)
        asking, _, ranks = self.ranked_matches
        labels = {"query": np.arange(len(self.query))} | self.query_side.columns()
        per_query = pd.DataFrame(labels).join(per_query_scores(asking, ranks, len(self.query)))
        without = np.flatnonzero(per_query["matches"] == 0)
        protocol = self._protocol(without)
        if len(without) == len(self.query):
            cause = "Query and gallery share no pid: do both come from one data set?"
            if len(self.pairs[0]):
                cause = "If cameras do not matter, pass exclude_same_camera=False, or camid -1 in every row."
            raise ValueError(f"no query has a match. {protocol} {cause}")
        scores = score_values(per_query, topk).mean().to_dict()
        scores |= {"queries": len(self.query), "queries_without_match": len(without)}
        if self._partial_file:
            self._partial_file.unlink(missing_ok=True)
        return Evaluation(scores, per_query, protocol)

    def ranked_lists(
        self,
        queries: Sequence[int] | np.ndarray | None = None,
        *,
        topk: int | None = 10,
        show_excluded: bool = True,
        show_missed: bool = False,
        index: Any = None,
    ) -> pd.DataFrame:
        """The gallery as each query sees it, nearest first: the very order that is scored.

        Args:
            queries: row numbers; None for all.
            topk: how many ranked images of each; None for all of them.
            show_excluded: show dropped images too, each where its distance would put it. They do
                not count towards ``topk``; those beyond the topk-th ranked image are left out.
            show_missed: show the matches that rank beyond ``topk`` too, after all others: with
                them, the list holds all that its AP is made of.
            index: an `Index` of the gallery: lists are made of what it finds, ordered exactly. It is
                asked for more until ``topk`` are left after images are dropped, or it finds no more.

        Returns:
            One table, list after list: ``query`` (row number), ``rank`` (from 1, ``<NA>`` for
            dropped images), ``gallery`` (row number), ``path`` if known, ``pid``, ``camid``,
            ``distance`` and ``status``: "match", "wrong"; "unknown" where the query is nobody
            (pid 0 or -1) or nobody is known in the gallery; and for dropped images "same camera",
            "junk" or "query itself".

        Raises:
            ValueError: no such query row, ``topk`` below 1, or an index of another gallery's size.
        """
        if topk is not None and topk < 1:
            raise ValueError(f"topk must be 1 or more, or None for all, not {topk}")
        queries = checked_rows(queries, len(self.query), "query")
        once, most = np.unique(queries), topk or len(self.gallery)
        found = self._exact(once, most) if index is None else self._through(index, once, most)
        parts = [self._ranked(i, found[i], most, show_missed) for i in queries]
        rows, rank, key, status = (np.concatenate(column) for column in zip(*parts, strict=True))
        table = pd.DataFrame(
            {"query": np.repeat(queries, [len(part[0]) for part in parts])}
            | {"rank": pd.Series(rank, dtype="Int64").mask(rank == 0), "gallery": rows}
            | self.gallery_side.columns(rows)
            | {"distance": self._as_distance(key), "status": np.array(STATUSES, object)[status]}
        )
        table.attrs["all_matches"] = show_missed or topk is None  # for who states an AP of it
        return table if show_excluded else table.dropna(subset="rank").reset_index(drop=True)

    def ranked_list(self, query_row: int, **options) -> pd.DataFrame:
        """One list of `ranked_lists`, with its options, without the column ``query``."""
        return self.ranked_lists([query_row], **options).drop(columns="query")

    def distances(self, query_row: int, gallery_rows: Sequence[int] | None = None) -> np.ndarray:
        """Distances of a query to gallery images (None: all), (n,): Euclidean, or as given.

        Raises:
            ValueError: no such rows.
        """
        (i,) = checked_rows([query_row], len(self.query), "query")
        rows = checked_rows(gallery_rows, len(self.gallery), "gallery")
        return self._as_distance(self._measure(i, rows))

    def distance_sample(self, per_query: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Distances of all matches and of a random sample of non-matches, for a histogram.

        Args:
            per_query: how many non-matches to draw for each query, without replacement (fewer
                where the gallery has fewer), with this ``seed``.

        Returns:
            Two 1-D arrays of distances under the rules of `evaluate`, in query order.
        """
        query, rows, status = self.pairs
        matches = self._measure(query[status == MATCH], rows[status == MATCH])
        rng = np.random.default_rng(seed)
        pids, others = self.gallery_side.pids, []
        for i, pid in enumerate(self.query_side.pids):
            rows = np.flatnonzero((pids != pid) & (pids != -1))
            drawn = rng.choice(rows, min(per_query, len(rows)), replace=False, shuffle=False)
            others.append(self._measure(i, drawn))
        return self._as_distance(matches), self._as_distance(np.concatenate(others))

    # --- what a query may see

    def check_identities(self) -> None:
        """Raise a ValueError if a query is nobody (pid 0 or -1), or the whole gallery junk."""
        if len(nobody := np.flatnonzero(self.query_side.pids <= 0)):
            raise ValueError(
                f"{listed(nobody)} of the query table have a pid of 0 (distractor) or -1 (junk) "
                "and ask for nobody: drop them, and number identities from 1"
            )
        if self._unlabelled:
            raise ValueError(f"all {len(self.gallery)} gallery images are junk (pid -1)")

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each query with the gallery images of its identity (none if it has no identity).

        Three arrays (P,): query, gallery row, and status, MATCH, SAME_CAMERA or ITSELF. Query by
        query, and rows ascending.
        """
        asked, shown, nobody = self.query_side, self.gallery_side, np.empty(0, np.int64)
        rows_of = pd.Series(shown.pids).groupby(shown.pids).indices
        found = [rows_of.get(pid, nobody) if pid > 0 else nobody for pid in asked.pids.tolist()]
        query = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
        rows = np.concatenate(found)
        status = np.where(self._is_itself(query, rows), ITSELF, MATCH)
        if self._by_camera:
            status[shown.camids[rows] == asked.camids[query]] = SAME_CAMERA
        return query, rows, status

    def _is_itself(self, query: int | np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether gallery images are the query's, one or one a row, by their paths, (n,)."""
        asked, shown = self.query_side.paths, self.gallery_side.paths
        if asked is None or shown is None:
            return np.zeros(len(rows), bool)
        path = np.asarray(asked[query], object)
        return ((shown[rows] == path) & path.astype(bool)).astype(bool)

    def _statuses(self, i: int, rows: np.ndarray) -> np.ndarray:
        """What gallery images, ascending, are to query ``i``, (n,)."""
        nobody = self._unlabelled or self.query_side.pids[i] <= 0
        junk = (self.gallery_side.pids[rows] == -1) & (not self._unlabelled)
        status = np.where(junk, JUNK, UNKNOWN if nobody else WRONG)
        query, theirs, of_identity = self.pairs
        mine = slice(*np.searchsorted(query, [i, i + 1])) if len(rows) else slice(0)
        at = np.searchsorted(rows, theirs[mine]).clip(max=len(rows) - 1)
        here = rows[at] == theirs[mine]
        status[at[here]] = of_identity[mine][here]
        # The image itself is called so even where its camera alone would leave it out.
        these = np.arange(len(rows)) if nobody else at[here]
        status[these[self._is_itself(i, rows[these])]] = ITSELF
        return status

    # --- how far, and in which order

    def _measure(self, query: int | np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What orders gallery ``rows`` for a query, one or one a row, (n,): the distance if it was
        given, else its square.
        """
        if self._given is not None:
            return self._given[query, rows]
        return squared(self.query_side.emb, query, self.gallery_side.emb, rows)

    def _as_distance(self, measured: np.ndarray) -> np.ndarray:
        return measured if self._given is not None else np.sqrt(measured)

    def _tile(self, rows: np.ndarray, dtype: type) -> tuple[Callable, Callable]:
        """Gallery rows, read once: `distances.product_with` them, as a function of query rows, and
        `_measure` of their places; distances that were given are rounded to float64 alone.
        """
        if self._given is None:
            asked, shown = self.query_side.emb, taken(self.gallery_side.emb, rows)
            product = product_with(shown, dtype)
            return lambda queries: product(asked[queries]), lambda i, n: squared(asked, i, shown, n)

        def rounded(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            near = self._given[np.ix_(queries, rows)].astype(np.float64)
            return near, 4 * np.finfo(np.float64).eps * np.abs(near).max(axis=1)

        return rounded, lambda i, n: self._measure(i, rows[n])

    @cached_property
    def ranked_matches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, gallery row and rank of all matches, (M,) each, query by query, nearest first."""
        query, rows, status = self.pairs
        is_match, kept = status == MATCH, np.flatnonzero(self.gallery_side.pids != -1)
        how = self._measure, self._tile, self.gallery_side.emb.shape[1], self._partial_file
        found = match_ranks(query, rows, is_match, kept, *how)
        return query[is_match], *found

    def _exact(self, queries: np.ndarray, topk: int) -> dict[int, tuple]:
        """The lists of some queries, as `_joined` has them, from the gallery tile by tile."""
        lists, total = dict.fromkeys(queries, NOTHING), len(self.gallery)
        step = max(1, 2**22 // min(total, TILE))  # 32 MB of distances at one time
        for first in range(0, total, TILE):
            rows = np.arange(first, min(first + TILE, total))
            product, _ = self._tile(rows, np.float64)
            for some in (queries[n : n + step] for n in range(0, len(queries), step)):
                for i, near, slack in zip(some, *product(some), strict=True):
                    far = near > self._last(lists[i], i, rows, near, topk) + slack
                    lists[i] = self._joined(lists[i], i, rows[~far], topk)
        return lists

    def _last(self, so_far: tuple, i: int, rows: np.ndarray, near: np.ndarray, topk: int) -> float:
        """How far the topk-th ranked of a list is, or of a tile, at ``near`` (n,); infinity: neither."""
        _, measured, status = so_far
        if (status <= UNKNOWN).sum() == topk:
            return measured[-1]
        if len(rows) <= topk:
            return np.inf
        ranked = np.where(self._statuses(i, rows) <= UNKNOWN, near, np.inf)
        return np.partition(ranked, topk - 1)[topk - 1]

    def _through(self, index: Any, queries: np.ndarray, topk: int) -> dict[int, tuple]:
        """As `_exact`, of what an index finds."""
        if self._given is not None or (len(index), index.dim) != self.gallery_side.emb.shape:
            raise ValueError(
                f"The index holds {len(index):,} × {index.dim} numbers, and is not of this gallery."
            )
        lists, left, fetch = {}, queries, topk
        while len(left):
            fetch = min(fetch, len(index))
            found, _ = index.search(self.query_side.emb[left], fetch)
            for i, rows in zip(left, found, strict=True):
                lists[i] = self._joined(NOTHING, i, np.sort(rows[rows >= 0]), topk)
            # What was dropped leaves a list short; one that has all that there is cannot grow.
            short = [(lists[i][2] <= UNKNOWN).sum() < topk for i in left]
            more = (found >= 0).all(axis=1) & (fetch < len(index))
            left, fetch = left[short & more], 2 * fetch
        return lists

    def _joined(self, so_far: tuple, i: int, rows: np.ndarray, topk: int) -> tuple:
        """The list of query ``i``, joined by gallery ``rows``, ascending and behind those before: rows,
        their measures and statuses, (n,) each, nearest first, up to the topk-th that is ranked.
        """
        more = rows, self._measure(i, rows), self._statuses(i, rows)
        rows, measured, status = map(np.append, so_far, more)
        order = np.argsort(measured, kind="stable")  # equal ones keep gallery order
        end = np.searchsorted(np.cumsum(status[order] <= UNKNOWN), topk) + 1
        return tuple(column[order[:end]] for column in (rows, measured, status))

    def _ranked(self, i: int, found: tuple, topk: int, show_missed: bool) -> tuple:
        """The list of query ``i`` with ranks (0: dropped): rows, ranks, measures and statuses."""
        rows, measured, status = found
        ranked = status <= UNKNOWN
        rank = np.where(ranked, np.cumsum(ranked), 0)
        if show_missed:
            asking, matches, at = self.ranked_matches
            missed = (asking == i) & (at > topk)
            rows, rank = np.append(rows, matches[missed]), np.append(rank, at[missed])
            measured = np.append(measured, self._measure(i, matches[missed]))
            status = np.append(status, np.full(missed.sum(), MATCH))
        return rows, rank, measured, status

    def _protocol(self, without: np.ndarray) -> str:
        """What was done, as sentences; ``without`` are the queries that have no match."""
        total, junk = len(self.gallery), int((self.gallery_side.pids == -1).sum())
        status = self.pairs[2]
        same, itself = (int((status == dropped).sum()) for dropped in (SAME_CAMERA, ITSELF))
        said = f"Queries: {len(self.query):,}. Gallery images: {total - junk:,}, after {junk:,} of "
        said += "junk (pid -1) were dropped. "
        if self._by_camera:
            said += f"Dropped for their query, being of the same identity and the same camera: {same:,}. "
        elif self.exclude_same_camera:
            said += "Cameras are unknown, so nothing is dropped for its camera. "
        else:
            said += "Images of the same identity and the same camera stay in, as asked. "
        if itself:
            said += f"Dropped for their query, being the query image itself (path): {itself:,}. "
        if len(without):
            said += f"Left out of all means, having no match: query {listed(without)}. "
        return said + "Equal distances rank in gallery order."


def evaluate(
    query_emb: Any, query: pd.DataFrame, gallery_emb: Any, gallery: pd.DataFrame, **options: Any
) -> Evaluation:
    """Rank the gallery for every query by Euclidean distance, and score the ranks.

    Short for `Retrieval` and its method `evaluate`, whose arguments and errors it has: ``topk``,
    ``partial_file`` and ``exclude_same_camera`` among them.

    >>> query, gallery = pd.DataFrame({"pid": [1]}), pd.DataFrame({"pid": [2, 1]})
    >>> evaluate([[0.0]], query, [[1.0], [2.0]], gallery).scores["mAP"]  # the match is at rank 2
    0.5
    """
    scoring = {key: options.pop(key) for key in ("topk", "partial_file") if key in options}
    return Retrieval(query_emb, query, gallery_emb, gallery, **options).evaluate(**scoring)
