"""From embeddings to scores: ranks, AP by both definitions, CMC, mINP, and what stands behind them.

The protocol is that of Market-1501, single query. Gallery images with pid -1 are junk and dropped;
pid 0 are distractors and stay as negatives. For each query, gallery images of its identity from
its own camera are dropped, for they are nearly the same picture; so is the query image itself
where the gallery holds it (the same path), which matters when no camera is known. Queries with no
match left are counted, named and left out of every mean. Equal distances rank in gallery order.

`Retrieval` is one set of queries against one gallery under this protocol: what it scores and what
it lists come from the same ranking. `evaluate` is its short form.

Tables are pandas tables with the columns ``pid`` and, if known, ``camid`` and ``path``; a row
number is a position in the table, whatever its index. A ``camid`` of -1 in every row, or no such
column, says that cameras are unknown. Embeddings are (N, D) NumPy arrays or tensors beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from reidlib.evaluation.distances import check_same_network, listed, product_with, squared
from reidlib.evaluation.metrics import TOPK, Evaluation, per_query_scores, score_values
from reidlib.evaluation.ranks import match_ranks
from reidlib.evaluation.sides import checked_rows, checked_side

# What a ranked list says of an image; those after "unknown" are dropped from the ranking.
STATUSES = ("match", "wrong", "unknown", "same camera", "junk", "query itself")
MATCH, WRONG, UNKNOWN, SAME_CAMERA, JUNK, ITSELF = range(len(STATUSES))


class Retrieval:
    """One set of queries against one gallery: the one ranking that is scored and drawn.

    Args:
        query_emb: (Q, D) floats.
        query: Q rows, pids from 1; a pid of 0 or -1 can be listed, not scored.
        gallery_emb: (G, D) floats.
        gallery: G rows, pids from -1; -1 in all rows says that nobody is known there.
        exclude_same_camera: False keeps matches from the query's own camera.

    Attributes:
        query, gallery: the tables, as given.
        query_side, gallery_side: embeddings and columns of the tables as arrays, checked.

    Raises:
        ValueError: arrays and tables do not fit each other, embeddings are not finite, or query or
            gallery is empty.

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
        self.query_side = checked_side(query_emb, query, "query")
        self.gallery_side = checked_side(gallery_emb, gallery, "gallery")
        check_same_network(self.query_side.emb, self.gallery_side.emb)
        self.exclude_same_camera = exclude_same_camera
        known = [(side.camids != -1).any() for side in (self.query_side, self.gallery_side)]
        self._by_camera = exclude_same_camera and all(known)  # drop matches of the query's camera?
        self._unlabelled = bool((self.gallery_side.pids == -1).all())
        self._rows_of = pd.Series(self.gallery_side.pids).groupby(self.gallery_side.pids).indices
        self._given: np.ndarray | None = None  # (Q, G) distances that came ready
        self._evaluation: Evaluation | None = None

    @classmethod
    def from_distances(
        cls,
        distances: Any,
        query: pd.DataFrame,
        gallery: pd.DataFrame,
        *,
        exclude_same_camera: bool = True,
    ) -> "Retrieval":
        """Rank by (Q, G) distances that came ready, as from re-ranking.

        Raises:
            ValueError: they do not fit the tables, or are not finite.
        """
        distances = np.asarray(distances)
        if distances.shape != (len(query), len(gallery)) or distances.dtype.kind not in "fiu":
            raise ValueError(
                f"distances must be numbers, ({len(query)}, {len(gallery)}) for these tables, not "
                f"{distances.shape} {distances.dtype}"
            )
        broken = np.flatnonzero(~np.isfinite(distances).all(axis=1))
        if len(broken):
            raise ValueError(f"distances hold NaN or infinity in {listed(broken)}")
        # Embeddings of one number, never looked at, for the checks of the tables.
        blank = [np.zeros((len(table), 1)) for table in (query, gallery)]
        made = cls(blank[0], query, blank[1], gallery, exclude_same_camera=exclude_same_camera)
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
        return Retrieval(
            self.gallery_side.emb[rows],
            self.gallery.iloc[rows],
            self.gallery_side.emb,
            self.gallery,
            exclude_same_camera=self.exclude_same_camera,
        )

    def evaluate(self, topk: Sequence[int] = TOPK) -> Evaluation:
        """Score the ranking; with the usual `topk` once only, and every taker gets the same object.

        Ranks are those of distances summed directly in float64, so equal images tie exactly and
        results do not depend on blocks or threads: `ranks` says how.

        Args:
            topk: the k of the reported CMC values.

        Raises:
            ValueError: the whole gallery is junk, a query is junk or distractor, or no query at
                all has a match.
        """
        if not topk or min(topk) < 1:
            raise ValueError(f"topk must name ranks from 1, not {topk!r}")
        usual = tuple(topk) == TOPK
        if usual and self._evaluation is not None:
            return self._evaluation
        nobody = np.flatnonzero(self.query_side.pids <= 0)
        if len(nobody):
            raise ValueError(
                f"{listed(nobody)} of the query table have a pid of 0 (distractor) or -1 (junk) "
                "and ask for nobody: drop them, and number identities from 1"
            )
        if self._unlabelled:
            raise ValueError(f"all {len(self.gallery)} gallery images are junk (pid -1)")
        asking, rows, status = self._pairs(np.arange(len(self.query)))
        dropped = [int((status == reason).sum()) for reason in (SAME_CAMERA, ITSELF)]
        is_match = status == MATCH
        _, ranks = self._match_ranks(asking, rows, is_match)
        per_query = per_query_scores(asking[is_match], ranks, len(self.query))
        per_query = pd.concat([self.query_side.labels("query"), per_query], axis=1)
        without = np.flatnonzero(per_query["matches"] == 0)
        if len(without) == len(self.query):
            raise ValueError(self._why_no_match(*dropped))
        means = score_values(per_query, topk).mean()
        scores = {name: float(value) for name, value in means.items()}
        scores |= {"queries": len(self.query), "queries_without_match": len(without)}
        evaluation = Evaluation(scores, per_query, self._protocol(*dropped, without))
        if usual:
            self._evaluation = evaluation
        return evaluation

    def ranked_lists(
        self,
        queries: Sequence[int] | np.ndarray | None = None,
        *,
        topk: int | None = 10,
        show_excluded: bool = True,
        show_missed: bool = False,
    ) -> pd.DataFrame:
        """The gallery as each query sees it, nearest first: the very order that is scored.

        Args:
            queries: row numbers; None for all.
            topk: how many ranked images of each; None for all of them.
            show_excluded: show dropped images too, each where its distance would put it. They do
                not count towards ``topk``; those beyond the topk-th ranked image are left out.
            show_missed: show the matches that rank beyond ``topk`` too, after all others: then the
                list holds all that its AP is made of.

        Returns:
            One table, list after list: ``query`` (row number), ``rank`` (from 1, ``<NA>`` for
            dropped images), ``gallery`` (row number), ``path`` if known, ``pid``, ``camid``,
            ``distance`` and ``status``: "match", "wrong"; "unknown" where the query is nobody
            (pid 0 or -1) or nobody is known in the gallery; and for dropped images "same camera",
            "junk" or "query itself".

        Raises:
            ValueError: no such query row, or ``topk`` below 1.
        """
        if topk is not None and topk < 1:
            raise ValueError(f"topk must be 1 or more, or None for all, not {topk}")
        everyone = np.arange(len(self.query))
        queries = everyone if queries is None else checked_rows(queries, len(everyone), "query")
        missed = self._missed(np.unique(queries), topk) if show_missed and topk is not None else {}
        parts = [self._list(*near, topk, missed.get(near[0])) for near in self._near(queries)]
        lengths = [len(rows) for rows, *_ in parts]
        rows, rank, key, status = (np.concatenate(column) for column in zip(*parts, strict=True))
        table = pd.DataFrame({"query": np.repeat(queries, lengths), "rank": rank, "gallery": rows})
        table["rank"] = table["rank"].astype("Int64").mask(rank == 0)
        if self.gallery_side.paths is not None:
            table["path"] = self.gallery_side.paths[rows]
        table["pid"] = self.gallery_side.pids[rows]
        table["camid"] = self.gallery_side.camids[rows]
        table["distance"] = self._as_distance(key)
        table.attrs["all_matches"] = show_missed or topk is None  # for who states an AP of it
        table["status"] = np.array(STATUSES, dtype=object)[status]
        return table if show_excluded else table.dropna(subset="rank").reset_index(drop=True)

    def ranked_list(self, query_row: int, **options) -> pd.DataFrame:
        """One list of `ranked_lists`, with its options, without the column ``query``."""
        return self.ranked_lists([query_row], **options).drop(columns="query")

    def distances(self, query_row: int, gallery_rows: Sequence[int] | None = None) -> np.ndarray:
        """Distances of a query to gallery images (None: all), (n,): Euclidean, or as given.

        Raises:
            ValueError: no such rows.
        """
        rows = np.arange(len(self.gallery))
        (i,) = checked_rows([query_row], len(self.query), "query")
        if gallery_rows is not None:
            rows = checked_rows(gallery_rows, len(rows), "gallery")
        return self._as_distance(self._measure(i, rows))

    def distance_sample(self, per_query: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Distances of all matches and of a random sample of non-matches, for a histogram.

        Args:
            per_query: how many non-matches to draw for each query, without replacement (fewer
                where the gallery has fewer).
            seed: of the draws.

        Returns:
            Two 1-D arrays of distances under the rules of `evaluate`, in query order.
        """
        query, rows, status = self._pairs(np.arange(len(self.query)))
        matches = self._measure(query[status == MATCH], rows[status == MATCH])
        rng = np.random.default_rng(seed)
        pids, others = self.gallery_side.pids, []
        for i, pid in enumerate(self.query_side.pids):
            rows = np.flatnonzero((pids != pid) & (pids != -1))
            drawn = rng.choice(rows, min(per_query, len(rows)), replace=False, shuffle=False)
            others.append(self._measure(i, drawn))
        return self._as_distance(matches), self._as_distance(np.concatenate(others))

    # --- what a query may see

    def _pairs(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each query, the gallery images of the same identity (none if it has no identity).

        Three arrays (P,): query, gallery row, and status, MATCH, SAME_CAMERA or ITSELF. Query by
        query, and rows ascending.
        """
        nobody = np.empty(0, np.int64)
        pids = self.query_side.pids[queries].tolist()
        found = [self._rows_of.get(pid, nobody) if pid > 0 else nobody for pid in pids]
        query, rows = np.repeat(queries, [len(rows) for rows in found]), np.concatenate(found)
        status = np.full(len(rows), MATCH)
        if self.query_side.paths is not None and self.gallery_side.paths is not None:
            paths = self.query_side.paths[query]
            itself = (self.gallery_side.paths[rows] == paths) & paths.astype(bool)
            status[itself.astype(bool)] = ITSELF
        if self._by_camera:
            status[self.gallery_side.camids[rows] == self.query_side.camids[query]] = SAME_CAMERA
        return query, rows, status

    def _statuses(self, i: int) -> np.ndarray:
        """What each gallery image is to query ``i``, (G,)."""
        nobody = self._unlabelled or self.query_side.pids[i] <= 0
        status = np.full(len(self.gallery), UNKNOWN if nobody else WRONG)
        if not self._unlabelled:
            status[self.gallery_side.pids == -1] = JUNK
        _, rows, of_identity = self._pairs(np.array([i]))
        status[rows] = of_identity
        # The image itself is called so even where its camera alone would leave it out.
        if self.query_side.paths is not None and self.gallery_side.paths is not None:
            rows = np.arange(len(status)) if nobody else rows
            path = self.query_side.paths[i]
            status[rows[(self.gallery_side.paths[rows] == path) & bool(path)]] = ITSELF
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

    def _product_with(self, rows: np.ndarray, dtype: type) -> Callable:
        """`distances.product_with` these gallery rows, as a function of query rows; what was given is
        rounded to ``dtype``.
        """
        if self._given is None:
            product = product_with(self.gallery_side.emb[rows], dtype)
            return lambda queries: product(self.query_side.emb[queries])

        def rounded(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            with np.errstate(over="ignore"):
                near = self._given[np.ix_(queries, rows)].astype(dtype)
            largest = np.abs(near).max(axis=1).astype(np.float64)
            return near, 4 * np.finfo(dtype).eps * largest + np.finfo(dtype).tiny

        return rounded

    def _match_ranks(
        self, query: np.ndarray, rows: np.ndarray, is_match: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gallery rows and ranks of the matches, (M,), query by query, nearest first."""
        kept = np.flatnonzero(self.gallery_side.pids != -1)
        dim = self.gallery_side.emb.shape[1]
        return match_ranks(query, rows, is_match, kept, self._measure, self._product_with, dim)

    def _missed(self, queries: np.ndarray, topk: int) -> dict[int, np.ndarray]:
        """By query, gallery rows and ranks (2, m) of the matches that rank beyond ``topk``."""
        query, rows, status = self._pairs(queries)
        found = np.stack(self._match_ranks(query, rows, status == MATCH))  # (2, M)
        cuts = np.searchsorted(query[status == MATCH], queries[1:])
        by_query = np.split(found, cuts, axis=1)
        return {i: x[:, x[1] > topk] for i, x in zip(queries.tolist(), by_query, strict=True)}

    def _near(self, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray, float]]:
        """Yield (i, near, slack) for each query: near (G,) orders as `_measure` does, but for pairs
        closer than ``slack``.
        """
        product = self._product_with(np.arange(len(self.gallery)), np.float64)
        step = max(1, 2**22 // len(self.gallery))  # 32 MB of distances at one time
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            yield from zip(part.tolist(), *product(part), strict=True)

    def _list(
        self, i: int, near: np.ndarray, slack: float, topk: int | None, missed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The list of query ``i``: gallery rows, their ranks (0: dropped), measures and statuses."""
        status = self._statuses(i)
        rows = np.arange(len(near))
        if topk is not None and topk < len(near):
            ranked = np.where(status > UNKNOWN, np.inf, near)
            last = np.partition(ranked, topk - 1)[topk - 1]  # infinite where fewer are ranked
            rows = np.flatnonzero(near <= last + slack)
        measured = self._measure(i, rows)
        order = np.argsort(measured, kind="stable")
        rows, measured = rows[order], measured[order]
        ranked = status[rows] <= UNKNOWN
        rank = np.cumsum(ranked)
        end = len(rows) if topk is None else np.searchsorted(rank, topk) + 1
        rows, rank, measured = rows[:end], np.where(ranked, rank, 0)[:end], measured[:end]
        if missed is not None:
            rows, rank = np.append(rows, missed[0]), np.append(rank, missed[1])
            measured = np.append(measured, self._measure(i, missed[0]))
        return rows, rank, measured, status[rows]

    # --- in words

    def _protocol(self, same_camera: int, itself: int, without: np.ndarray) -> str:
        """What was done, as sentences."""
        total, queries = len(self.gallery), len(self.query)
        kept = int((self.gallery_side.pids != -1).sum())
        lines = [
            f"Queries: {queries:,}. Gallery images: {kept:,}, after {total - kept:,} of junk "
            "(pid -1) were dropped."
        ]
        if self._by_camera:
            lines.append(
                "Dropped for their query, being of the same identity and the same camera: "
                f"{same_camera:,}."
            )
        elif self.exclude_same_camera:
            lines.append("Cameras are unknown, so nothing is dropped for its camera.")
        else:
            lines.append("Images of the same identity and the same camera stay in, as asked.")
        if itself:
            lines.append(
                f"Dropped for their query, being the query image itself (path): {itself:,}."
            )
        if len(without):
            lines.append(f"Left out of all means, having no match: query {listed(without)}.")
        return " ".join(lines) + " Equal distances rank in gallery order."

    def _why_no_match(self, same_camera: int, itself: int) -> str:
        """The likely cause, where no query has a match."""
        if same_camera or itself:
            return (
                "no query has a match: all gallery images of the queries' identities were dropped, "
                f"{same_camera:,} for the same camera, {itself:,} for being the query image "
                "itself. Pass exclude_same_camera=False, or camid -1 in every row, if cameras do "
                "not matter"
            )
        some = [
            ", ".join(map(str, np.unique(s.pids)[:5])) for s in (self.query_side, self.gallery_side)
        ]
        return (
            "no query has a match: the pids of query and gallery share nothing "
            f"(query {some[0]}, ...; gallery {some[1]}, ...). Do both come from one data set?"
        )


def evaluate(
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    *,
    topk: Sequence[int] = TOPK,
    exclude_same_camera: bool = True,
) -> Evaluation:
    """Rank the gallery for every query by Euclidean distance, and score the ranks.

    Short for `Retrieval` and its method `evaluate`, whose arguments and errors it has.

    >>> query, gallery = pd.DataFrame({"pid": [1]}), pd.DataFrame({"pid": [2, 1]})
    >>> evaluate([[0.0]], query, [[1.0], [2.0]], gallery).scores["mAP"]  # the match is at rank 2
    0.5
    """
    retrieval = Retrieval(
        query_emb, query, gallery_emb, gallery, exclude_same_camera=exclude_same_camera
    )
    return retrieval.evaluate(topk)
