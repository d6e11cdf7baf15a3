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

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from reidlib.evaluation.distances import as_embeddings, listed
from reidlib.evaluation.metrics import TOPK, Evaluation, per_query_scores, score_values

# What a ranked list says of an image; those after "unknown" are dropped from the ranking.
STATUSES = ("match", "wrong", "unknown", "same camera", "junk", "query itself")
MATCH, WRONG, UNKNOWN, SAME_CAMERA, JUNK, ITSELF = range(len(STATUSES))

UNSURE = 1000  # a query with more images than this near its matches is ranked in float64


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

    Raises:
        ValueError: arrays and tables do not fit each other, embeddings are not finite, or query or
            gallery is empty.
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
        self._asked = checked_side(query_emb, query, "query")
        self._shown = checked_side(gallery_emb, gallery, "gallery")
        on_cuda = isinstance(gallery_emb, Tensor) and gallery_emb.is_cuda
        self._device = gallery_emb.device if on_cuda else None  # None: NumPy
        self._given: np.ndarray | None = None  # (Q, G) distances that came ready
        if self._asked.emb.shape[1] != self._shown.emb.shape[1]:
            raise ValueError(
                f"query embeddings have {self._asked.emb.shape[1]} dimensions, gallery embeddings "
                f"{self._shown.emb.shape[1]}: they must come from the same network"
            )
        self.exclude_same_camera = exclude_same_camera
        known = (self._asked.camids != -1).any() and (self._shown.camids != -1).any()
        self._cameras = exclude_same_camera and bool(known)  # drop matches of the query's camera?
        self._unlabelled = bool((self._shown.pids == -1).all())
        self._rows_of = pd.Series(self._shown.pids).groupby(self._shown.pids).indices

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
        rows = self._checked(gallery_rows, len(self.gallery), "gallery")
        return Retrieval(
            self._shown.emb[rows],
            self.gallery.iloc[rows],
            self._shown.emb,
            self.gallery,
            exclude_same_camera=self.exclude_same_camera,
        )

    def evaluate(
        self,
        topk: Sequence[int] = TOPK,
        *,
        block_bytes: int = 32 * 2**20,
        device: str | torch.device | None = None,
    ) -> Evaluation:
        """Score the ranking.

        Ranks are those of distances summed directly in float64, so equal images tie exactly and
        results do not depend on ``block_bytes`` or the device. Only the rank of each match is looked
        for, by counting what float32 shows to be nearer; pairs that it cannot tell apart are
        measured directly. Beyond the inputs, memory holds a float32 copy of the query embeddings,
        and ``block_bytes`` each of gallery embeddings and of distances (at least a thousand a
        thread). Many ties (binary codes, a dead network) and embeddings that float32 cannot hold are
        right but slower, and take a float64 copy.

        Args:
            topk: the k of the reported CMC values.
            block_bytes: bytes of gallery embeddings, and of distances, held at one time.
            device: where distances are made and counted; None: on CUDA, if the gallery embeddings
                were given there, else NumPy on the CPU, where the rest is measured in any case.

        Raises:
            ValueError: the whole gallery is junk, a query is junk or distractor, or no query at
                all has a match.
        """
        if not topk or min(topk) < 1:
            raise ValueError(f"topk must name ranks from 1, not {topk!r}")
        nobody = np.flatnonzero(self._asked.pids <= 0)
        if len(nobody):
            raise ValueError(
                f"{listed(nobody)} of the query table have a pid of 0 (distractor) or -1 (junk) "
                "and ask for nobody: drop them, and number identities from 1"
            )
        if self._unlabelled:
            raise ValueError(f"all {len(self.gallery)} gallery images are junk (pid -1)")
        kept = np.flatnonzero(self._shown.pids != -1)
        column = np.cumsum(self._shown.pids != -1) - 1  # gallery row -> its place among the kept
        asked, rows, status = self._pairs(np.arange(len(self.query)))
        device = self._device if device is None else torch.device(device)
        ranks = self._match_ranks(kept, asked, column[rows], status, block_bytes, device)
        same_camera, itself = ((status == left_out).sum() for left_out in (SAME_CAMERA, ITSELF))
        labels = _labels(self._asked, "query")
        per_query = pd.concat(
            [labels, per_query_scores(asked[status == MATCH], ranks, len(labels))], axis=1
        )
        without = np.flatnonzero(per_query["matches"] == 0)
        if len(without) == len(self.query):
            raise ValueError(self._why_no_match(same_camera, itself))
        scores = {
            name: float(value) for name, value in score_values(per_query, topk).mean().items()
        }
        scores |= {"queries": len(self.query), "queries_without_match": len(without)}
        protocol = self._protocol(len(kept), same_camera, itself, without)
        return Evaluation(scores, per_query, protocol)

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
        asked = everyone if queries is None else self._checked(queries, len(everyone), "query")
        parts = [self._list(*near, topk, show_missed) for near in self._near(asked)]
        lengths = [len(rows) for rows, *_ in parts]
        rows, rank, key, status = (np.concatenate(column) for column in zip(*parts, strict=True))
        table = pd.DataFrame({"query": np.repeat(asked, lengths), "rank": rank, "gallery": rows})
        table["rank"] = table["rank"].astype("Int64").mask(rank == 0)
        if self._shown.paths is not None:
            table["path"] = self._shown.paths[rows]
        table["pid"], table["camid"] = self._shown.pids[rows], self._shown.camids[rows]
        table["distance"] = key if self._given is not None else np.sqrt(key)
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
        everyone = np.arange(len(self.gallery))
        (i,) = self._checked([query_row], len(self.query), "query")
        if gallery_rows is not None:
            everyone = self._checked(gallery_rows, len(everyone), "gallery")
        key = self._key(i, everyone)
        return key if self._given is not None else np.sqrt(key)

    # --- what a query may see

    def _pairs(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each of ``queries`` with what the gallery holds of its identity; nothing of nobody's.

        Three arrays (P,): place in ``queries``, gallery row, and status: MATCH, SAME_CAMERA or
        ITSELF. Query by query, and rows ascending.
        """
        nobody = np.empty(0, np.int64)
        pids = self._asked.pids[queries].tolist()
        found = [self._rows_of.get(pid, nobody) if pid > 0 else nobody for pid in pids]
        place = np.repeat(np.arange(len(queries)), [len(rows) for rows in found])
        rows, asking = np.concatenate(found), queries[place]
        status = np.full(len(rows), MATCH)
        if self._asked.paths is not None and self._shown.paths is not None:
            paths = self._asked.paths[asking]
            itself = (self._shown.paths[rows] == paths) & paths.astype(bool)
            status[itself.astype(bool)] = ITSELF
        if self._cameras:
            status[self._shown.camids[rows] == self._asked.camids[asking]] = SAME_CAMERA
        return place, rows, status

    def _split(self, i: int) -> "_Split":
        """What the gallery holds of the identity of query ``i``."""
        _, rows, status = self._pairs(np.array([i]))
        return _Split(*(rows[status == one] for one in (MATCH, SAME_CAMERA, ITSELF)))

    # --- how far, and in which order

    def _key(self, i: int | np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What orders gallery ``rows`` for query ``i``, one or one a row, (len(rows),): the distance
        if it was given, else its square, summed directly in float64.

        The one measure that decides order. A row's value does not depend on its neighbours: each
        step rounds by itself, unlike in a BLAS, whose edge blocks round differently.
        """
        if self._given is not None:
            return self._given[i, rows]
        squared = np.empty(len(rows))
        step = max(1, 2**16 // self._shown.emb.shape[1])  # 512 kB at a time, at home in the cache
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            # (n, D)
            difference = self._shown.emb[rows[part]].astype(np.float64)
            difference -= self._asked.emb[i if np.ndim(i) == 0 else i[part]]
            squared[part] = np.square(difference, out=difference).sum(axis=1)
        return squared

    def _match_ranks(
        self,
        kept: np.ndarray,
        asked: np.ndarray,
        columns: np.ndarray,
        status: np.ndarray,
        block_bytes: int,
        device: torch.device | None,
    ) -> np.ndarray:
        """Ranks of all matches of all queries, (M,), from the arrays (P,) of `_pairs`, where
        ``columns`` are places among the gallery rows ``kept``.

        A rank is 1, plus the others before it, plus the matches before it, which are all measured
        directly. The others are counted in float32, and only those within its error measured.
        """
        is_match = status == MATCH
        asking, match = asked[is_match], columns[is_match]  # (M,)
        ranks = np.empty(len(match), np.int64)
        many = np.zeros(len(self.query), bool)  # queries left for later
        threads = min(os.cpu_count() or 1, 8)
        # A tile of the gallery is `width` x D; in each thread stand the distances of `rows` queries
        # to it, of which a row is at home in the cache. So time grows with the gallery, no faster.
        width = min(2**14, max(2**10, block_bytes // (4 * self._shown.emb.shape[1])))
        rows = min(2**8, max(1, block_bytes // (8 * threads * width)))
        blocks = [slice(start, start + rows) for start in range(0, len(self.query), rows)]
        of_block = [slice(*np.searchsorted(asking, [b.start, b.stop])) for b in blocks]
        pairs_of = [slice(*np.searchsorted(asked, [b.start, b.stop])) for b in blocks]
        # Counting is many short calls of NumPy: two threads at it would wait for Python's lock.
        one_at_a_time = Lock()
        key = np.empty(len(match), np.float64 if self._given is None else self._given.dtype)

        def measure(mine: slice) -> None:
            key[mine] = self._key(asking[mine], kept[match[mine]])

        def count(tile: slice, near32: Callable, block: slice, mine: slice, pairs: slice) -> None:
            """Add the others of a tile to the ranks of a block of queries."""
            near, own, slack = near32(block)  # (B, G'), (B,), (B,)
            column = columns[pairs] - tile.start
            inside = (column >= 0) & (column < near.shape[1])
            out = (asked[pairs] - block.start)[inside], column[inside]
            near[out] = np.inf  # of the query's identity: none of the others
            later = many[block]  # a view
            later |= ~np.isfinite(slack)
            now = mine.start + np.flatnonzero(~later[asking[mine] - block.start])
            row = asking[now] - block.start  # (m,)
            at = key[now] - own[row]
            # One step outwards, for the rounding to float32.
            low = np.nextafter(np.float32(at - slack[row]), np.float32(-np.inf))
            high = np.nextafter(np.float32(at + slack[row]), np.float32(np.inf))
            count_before = _count_before if isinstance(near, np.ndarray) else _count_before_torch
            with one_at_a_time:
                before, whose, other = count_before(near, row, low, high)
            later |= np.bincount(whose, minlength=len(near)) > UNSURE
            ours, theirs = ~later[row], ~later[whose]
            now, row, whose, other = now[ours], row[ours], whose[theirs], other[theirs]
            other += tile.start
            # Matches and unsure ones by distance, equal ones in gallery order: (m + U,)
            keys = [
                (match[now], other),
                (key[now], self._key(whose + block.start, kept[other])),
                (row, whose),
            ]
            order = np.lexsort([np.concatenate(both) for both in keys])
            is_match = order < len(row)
            ahead = np.cumsum(~is_match)[is_match]
            order = order[is_match]
            ranks[now] += before[ours]
            ranks[now[order]] += ahead - np.searchsorted(whose, row[order])

        # A thread a block, instead of a matrix product in threads and all the rest in one.
        with (
            threadpool_limits(1, "blas"),
            _exact_products(),
            ThreadPoolExecutor(threads) as pool,
        ):
            list(pool.map(measure, of_block))
            first = np.searchsorted(asking, asking)  # where the matches of the same query begin
            # Stable, and `match` ascends: equal distances rank in gallery order.
            ranks[np.lexsort((key, asking))] = np.arange(len(match)) - first + 1
            for tile, near32 in self._near32(kept, width, pool, device):
                list(pool.map(partial(count, tile, near32), blocks, of_block, pairs_of))
        slow = np.flatnonzero(many)
        if len(slow):
            for i, near, slack in self._near(slow, kept, block_bytes):
                pairs = slice(*np.searchsorted(asked, [i, i + 1]))
                near[columns[pairs][~is_match[pairs]]] = np.inf
                mine = slice(*np.searchsorted(asking, [i, i + 1]))
                ranks[mine] = self._ranks(i, near, slack, kept, match[mine])
        return ranks

    def _near32(
        self,
        kept: np.ndarray,
        width: int,
        pool: ThreadPoolExecutor,
        device: torch.device | None,
    ) -> Iterator[tuple[slice, Callable[[slice], tuple[Any, np.ndarray, np.ndarray]]]]:
        """Yield tiles, some of the gallery rows ``kept``, and for each a function of a slice of
        queries to (near, own, slack): near (B, G') is in float32 their `_key` less the query's
        ``own`` (B,), wrong by less than ``slack`` (B,), which is infinite where float32 does not
        hold a distance. It is an array, or a tensor on a device.
        """
        put = (lambda x: x) if device is None else lambda x: torch.from_numpy(x).to(device)
        unit, tiny = np.finfo(np.float32).eps / 2, np.finfo(np.float32).tiny
        tiles = [slice(i, min(i + width, len(kept))) for i in range(0, len(kept), width)]
        if self._given is not None:

            def cast(tile: slice, part: slice) -> tuple[Any, np.ndarray, np.ndarray]:
                near = self._given[part][:, kept[tile]].astype(np.float64)
                size = np.abs(near).max(axis=1)
                slack = np.where(size < 1e36, 4 * unit * size + tiny, np.inf)
                with np.errstate(over="ignore"):
                    return put(near.astype(np.float32)), np.zeros(len(near)), slack

            yield from ((tile, partial(cast, tile)) for tile in tiles)
            return

        # Far from the origin all digits would be lost, so both sets are centred first.
        with np.errstate(over="ignore", invalid="ignore"):
            centre = self._shown.emb.mean(axis=0, dtype=np.float64)
        asked, own = _centred32(self._asked.emb, np.arange(len(self.query)), centre, pool)
        with np.errstate(over="ignore"):
            asked *= -2
        asked, dim = put(asked), len(centre)
        part = min(dim, 256)  # longer sums leave more to be measured
        for tile in tiles:
            shown, norms = _centred32(self._shown.emb, kept[tile], centre, pool)
            with np.errstate(over="ignore", invalid="ignore"):
                reach = np.sqrt(own) + np.sqrt(norms.max())  # (Q,)
                # A bound on all rounding, whatever the order in which a BLAS adds up `part`
                # products (Higham, Accuracy and Stability, section 3.1): part / 2 for them, as
                # 2 |q| |g| is at most reach^2 / 2; 1/2 for each sum of such sums; and less than 8
                # for coordinates and norms. Below `tiny` a processor may take numbers for 0.
                slack = unit * ((part + -(-dim // part)) / 2 + 8) * reach**2
                slack += 4 * dim * tiny * (1 + reach)
                slack[~(reach < 1e18)] = np.inf
                shown, norms = put(shown), put(norms.astype(np.float32))

            def product(
                queries: slice, shown=shown, norms=norms, slack=slack
            ) -> tuple[Any, np.ndarray, np.ndarray]:
                with np.errstate(over="ignore", invalid="ignore"):
                    # (B, W) @ (W, G') -> (B, G'), |g|^2 - 2 q.g
                    near = asked[queries, :part] @ shown[:, :part].T
                    for start in range(part, dim, part):
                        some = slice(start, start + part)
                        near += asked[queries, some] @ shown[:, some].T
                    near += norms
                return near, own[queries], slack[queries]

            yield tile, product

    def _near(
        self, queries: np.ndarray, kept: np.ndarray | None = None, block_bytes: int = 32 * 2**20
    ) -> Iterator[tuple[int, np.ndarray, float]]:
        """Yield (i, near, slack) for each query: near (len(kept),) orders as `_key` does the gallery
        rows ``kept`` (None: all), but for pairs closer than ``slack``. The caller may write to it.
        """
        if self._given is not None:
            for i in queries:
                row = self._given[i] if kept is None else self._given[i, kept]
                yield i, row.astype(np.float64), 0.0
            return
        # Squared distances by matrix product lose their digits far from the origin, so both sets
        # are centred on the gallery first, in float64.
        shown = self._shown.emb if kept is None else self._shown.emb[kept]
        with np.errstate(over="ignore", invalid="ignore"):
            shown = shown.astype(np.float64)
            centre = shown.mean(axis=0)
            shown -= centre
            asked = self._asked.emb[queries].astype(np.float64) - centre
            shown_norms = np.einsum("gd,gd->g", shown, shown)
            asked_norms = np.einsum("qd,qd->q", asked, asked)
            reach = np.sqrt(asked_norms) + np.sqrt(shown_norms.max())  # (Q,)
            # A bound on twice what rounding can add, here and in the direct sum, whatever the
            # order in which a BLAS adds up: Higham, Accuracy and Stability, section 3.1.
            slack = 4 * (shown.shape[1] + 8) * np.finfo(np.float64).eps * reach**2
        if not np.isfinite(slack).all():
            raise ValueError(
                "embeddings are so large that their squared distances overflow float64"
            )
        asked *= -2
        step = max(1, block_bytes // (8 * len(shown)))
        block = np.empty((min(step, len(asked)), len(shown)))
        for start in range(0, len(asked), step):
            part = asked[start : start + step]
            # (B, D) @ (D, G) -> (B, G), |g|^2 - 2 q.g; |q|^2, the same along a row, is left out.
            near = np.matmul(part, shown.T, out=block[: len(part)])
            near += shown_norms
            yield from zip(queries[start:], near, slack[start:], strict=False)

    def _ranks(
        self, i: int, near: np.ndarray, slack: float, kept: np.ndarray, matches: np.ndarray
    ) -> np.ndarray:
        """Ranks of the matches of query ``i``, in their order: (N,).

        ``near`` (G,) is infinite where an image is dropped for this query. ``matches`` are
        ascending places in it. A match that no other image comes close to has its rank by counting;
        otherwise the close ones are measured directly.
        """
        if len(matches) == 0:
            return np.empty(0, np.int64)
        front = near[near <= near[matches].max() + slack]  # the rest ranks behind the last match
        ahead = np.array([np.count_nonzero(front < near[m] - slack) for m in matches])
        up_to = np.array([np.count_nonzero(front <= near[m] + slack) for m in matches])
        if (up_to - ahead == 1).all():
            return ahead + 1
        close = np.zeros(len(near), bool)
        for m in matches:
            close |= np.abs(near - near[m]) <= slack
        rows = np.flatnonzero(close)  # holds the matches; ascending: a stable sort keeps ties
        order = np.argsort(self._key(i, kept[rows]), kind="stable")
        place = np.empty(len(rows), np.int64)  # from 0, among the close ones
        place[order] = np.arange(len(rows))
        # What is clearly ahead of a match and close to none goes before its place among the close.
        ahead -= np.array([np.count_nonzero(near[rows] < near[m] - slack) for m in matches])
        return ahead + place[np.searchsorted(rows, matches)] + 1

    def _list(
        self, i: int, near: np.ndarray, slack: float, topk: int | None, show_missed: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The list of query ``i``: gallery rows, their ranks (0: dropped), keys and statuses."""
        split = self._split(i)
        nobody = self._unlabelled or self._asked.pids[i] <= 0
        status = np.full(len(near), UNKNOWN if nobody else WRONG)
        if not self._unlabelled:
            status[self._shown.pids == -1] = JUNK
        status[split.matches] = MATCH
        status[split.same_camera] = SAME_CAMERA
        # The image itself is called so even where its camera alone would leave it out.
        alike = np.arange(len(near)) if nobody else np.append(split.same_camera, split.itself)
        if self._asked.paths is not None and self._shown.paths is not None:
            path = self._asked.paths[i]
            status[alike[(self._shown.paths[alike] == path) & bool(path)]] = ITSELF
        far = near.copy()  # of all images; `near` is from here on of the ranked ones
        near[status > UNKNOWN] = np.inf
        rows = np.arange(len(near))
        if topk is not None and topk < len(near):
            last = np.partition(near, topk - 1)[topk - 1]  # of the ranked, or infinite
            rows = np.flatnonzero(far <= last + slack)
        key = self._key(i, rows)
        order = np.argsort(key, kind="stable")
        rows, key = rows[order], key[order]
        ranked = status[rows] <= UNKNOWN
        rank = np.cumsum(ranked)
        end = len(rows) if topk is None else np.searchsorted(rank, topk) + 1
        rows, key, rank = rows[:end], key[:end], np.where(ranked, rank, 0)[:end]
        if show_missed and topk is not None:
            ranks = self._ranks(i, near, slack, np.arange(len(near)), split.matches)
            order = np.argsort(ranks)
            order = order[ranks[order] > topk]
            missed = split.matches[order]
            rows, rank = np.append(rows, missed), np.append(rank, ranks[order])
            key = np.append(key, self._key(i, missed))
        return rows, rank, key, status[rows]

    # --- in words

    def _checked(self, rows: Any, length: int, name: str) -> np.ndarray:
        """Row numbers as an array, all of them there."""
        rows = np.asarray(rows)
        if rows.ndim != 1 or len(rows) == 0 or rows.dtype.kind not in "iu":
            raise ValueError(f"{name} rows must be one or more whole numbers, not {rows!r}")
        wrong = rows[(rows < 0) | (rows >= length)]
        if len(wrong):
            raise ValueError(f"{name}_row is {wrong[0]}, but the {name} table has {length} rows")
        return rows

    def _protocol(self, kept: int, same_camera: int, itself: int, without: np.ndarray) -> str:
        """What was done, as sentences."""
        total, queries = len(self.gallery), len(self.query)
        lines = [
            f"Queries: {queries:,}. Gallery images: {kept:,}, after {total - kept:,} of junk "
            "(pid -1) were dropped."
        ]
        if self._cameras:
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
        some = [", ".join(map(str, np.unique(s.pids)[:5])) for s in (self._asked, self._shown)]
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
    block_bytes: int = 32 * 2**20,
    device: str | torch.device | None = None,
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
    return retrieval.evaluate(topk, block_bytes=block_bytes, device=device)


def ranked_list(
    query_row: int,
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    *,
    exclude_same_camera: bool = True,
    **options,
) -> pd.DataFrame:
    """One ranked list: short for `Retrieval` and its method `ranked_list`."""
    retrieval = Retrieval(
        query_emb, query, gallery_emb, gallery, exclude_same_camera=exclude_same_camera
    )
    return retrieval.ranked_list(query_row, **options)


def distance_sample(
    query_emb: Any,
    query: pd.DataFrame,
    gallery_emb: Any,
    gallery: pd.DataFrame,
    *,
    per_query: int = 10,
    exclude_same_camera: bool = True,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all matches and of a random sample of non-matches, for a histogram.

    Args:
        per_query: how many non-matches to draw for each query, without replacement (fewer where
            the gallery has fewer); the other arguments are those of `evaluate`.

    Returns:
        Two 1-D arrays of Euclidean distances under the rules of `evaluate`, in query order.
    """
    retrieval = Retrieval(
        query_emb, query, gallery_emb, gallery, exclude_same_camera=exclude_same_camera
    )
    pids = retrieval._shown.pids
    rng = np.random.default_rng(seed)
    matches, others = [], []
    for i, pid in enumerate(retrieval._asked.pids):
        matches.append(retrieval._key(i, retrieval._split(i).matches))
        rows = np.flatnonzero((pids != pid) & (pids != -1))
        drawn = rng.choice(rows, min(per_query, len(rows)), replace=False, shuffle=False)
        others.append(retrieval._key(i, drawn))
    return np.sqrt(np.concatenate(matches)), np.sqrt(np.concatenate(others))


class Side(NamedTuple):
    """Query or gallery, checked."""

    emb: np.ndarray  # (N, D) as given
    pids: np.ndarray  # (N,) int64
    camids: np.ndarray  # (N,) int64, all -1 if unknown
    paths: np.ndarray | None  # (N,) str


class _Split(NamedTuple):
    """Gallery rows of a query's identity, ascending; each row stands in one of the three."""

    matches: np.ndarray
    same_camera: np.ndarray
    itself: np.ndarray


def _centred32(
    emb: np.ndarray, rows: np.ndarray, centre: np.ndarray, pool: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:
    """These rows less ``centre``, rounded to float32, (N, D), and their squared norms, (N,)."""
    centred, norms = np.empty((len(rows), emb.shape[1]), np.float32), np.empty(len(rows))
    # In float32, if they come so: the difference of two such numbers is then rounded once.
    dtype = np.float64 if emb.dtype.itemsize > 4 or emb.dtype.kind != "f" else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        centre = centre.astype(dtype)
    step = max(1, 2**18 // emb.shape[1])

    def fill(start: int) -> None:
        part = slice(start, start + step)
        with np.errstate(over="ignore", invalid="ignore"):
            centred[part] = emb[rows[part]].astype(dtype, copy=False) - centre
            exact = centred[part].astype(np.float64)
            norms[part] = np.einsum("nd,nd->n", exact, exact)

    list(pool.map(fill, range(0, len(rows), step)))
    return centred, norms


def _count_before(
    near: np.ndarray, row: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the numbers of a row of ``near`` (B, G) below each ``low`` (m,), less those that lie
    between a ``low`` and its ``high`` of this row; and say which these are.

    ``row`` (m,) says which row of ``near`` each is about, ascending. Returns counts (m,), and rows
    (U,) and columns (U,) of what lies between; of these no more than are needed to see that a row
    has more than `UNSURE`.
    """
    counts, between = np.zeros(len(row), np.int64), [np.empty(0, np.int64)] * len(near)
    cuts = np.searchsorted(row, np.arange(len(near) + 1))
    for i in np.flatnonzero(np.diff(cuts)):
        mine = slice(cuts[i], cuts[i + 1])
        # A pass for each match is quicker than a sort, unless they are many: processors compare
        # sixteen numbers at a time.
        count = _count_by_passes if cuts[i + 1] - cuts[i] <= 40 else _count_by_sort
        counts[mine], columns = count(near[i], low[mine], high[mine])
        between[i] = columns[: UNSURE + 1]
    rows = np.repeat(np.arange(len(near)), [len(columns) for columns in between])
    return counts, rows, np.concatenate(between)


def _count_by_passes(
    near: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`_count_before` for one row (G,): counts (m,) and columns (U,)."""
    front = near <= high.max()  # of a good network few images: the rest ranks behind the last match
    places = np.flatnonzero(front) if np.count_nonzero(front) < len(near) // 4 else slice(None)
    near = near[places]
    below = near < low[:, None]  # (m, G)
    between = near <= high[:, None]
    between ^= below
    columns = np.flatnonzero(np.logical_or.reduce(between, axis=0))
    if len(columns):
        below[:, columns] = False
    counts = np.fromiter(map(np.count_nonzero, below), np.int64, len(low))
    return counts, columns if isinstance(places, slice) else places[columns]


def _count_by_sort(
    near: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same as `_count_by_passes`, but for the order of the columns."""
    order = near.argsort()
    ascending = near[order]
    first, end = ascending.searchsorted(low), ascending.searchsorted(high, "right")
    opened, closed = (np.bincount(x, minlength=len(near) + 1) for x in (first, end))
    between = np.cumsum(opened - closed)[:-1] > 0  # (G,)
    earlier = np.concatenate([[0], np.cumsum(between)])
    return first - earlier[first], order[between]


def _count_before_torch(
    near: Tensor, row: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_count_before` on the device of ``near``, which it may write to."""
    nth = np.arange(len(row)) - np.searchsorted(row, row)  # among the matches of its row
    most = nth.max(initial=-1) + 1
    ends = np.full((2, len(near), most), -np.inf, np.float32)
    ends[:, row, nth] = low, high
    lows, highs = torch.from_numpy(ends).to(near.device)  # (B, most)
    between = torch.zeros_like(near, dtype=torch.bool)
    for k in range(most):  # (B, G) each time, never (B, most, G)
        between |= (near < lows[:, k, None]) ^ (near <= highs[:, k, None])
    near[between] = torch.inf
    counts = np.zeros((len(near), most), np.int64)
    for k in range(most):
        counts[:, k] = (near < lows[:, k, None]).sum(dim=1).cpu()
    rows, columns = between.nonzero(as_tuple=True)
    return counts[row, nth], rows.cpu().numpy(), columns.cpu().numpy()


@contextmanager
def _exact_products() -> Iterator[None]:
    """Make torch multiply float32 matrices in float32, whatever is allowed elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _labels(side: Side, name: str) -> pd.DataFrame:
    """Row numbers under ``name``, path if known, pid and camid."""
    labels = {name: np.arange(len(side.pids)), "pid": side.pids, "camid": side.camids}
    table = pd.DataFrame(labels)
    if side.paths is not None:
        table.insert(1, "path", side.paths)
    return table


def checked_side(emb: Any, table: pd.DataFrame, name: str) -> Side:
    """Return embeddings and table of ``name``, "query" or "gallery", as arrays, checked.

    Args:
        emb: (N, D) numbers, tensor or array.
        table: N rows, pids from -1 and, if known, camids and paths.

    Raises:
        ValueError: they do not fit each other, are empty, embeddings are not finite, pids or camids
            no whole numbers, or cameras known of some images only (junk may lack one).
    """
    emb = as_embeddings(emb, name)
    if len(emb) != len(table):
        raise ValueError(f"{len(emb)} {name} embeddings beside a {name} table of {len(table)} rows")
    if len(emb) == 0:
        raise ValueError(f"the {name} is empty: there is nothing to evaluate")
    pids, camids = _whole(table, "pid", name), np.full(len(table), -1)
    if (pids < -1).any():
        raise ValueError(f"the {name} table has pids below -1, first {pids[pids < -1][0]}")
    if "camid" in table:
        camids = _whole(table, "camid", name)
    known = camids[pids != -1] >= 0
    if not known.any():
        camids = np.full(len(table), -1)
    elif not known.all():
        raise ValueError(
            f"{(~known).sum()} of {len(known)} images of the {name} table have no camera "
            "(camid below 0): give all cameras, or -1 in every row"
        )
    paths = table["path"].to_numpy(dtype=object) if "path" in table else None
    return Side(emb, pids, camids, paths)


def _whole(table: pd.DataFrame, column: str, name: str) -> np.ndarray:
    """An int64 column of the table of ``name``."""
    if column not in table:
        raise ValueError(f"the {name} table has no column {column!r}")
    values = table[column].to_numpy()
    if values.dtype.kind not in "iu":
        raise ValueError(f"{column} of the {name} table must be whole numbers, not {values.dtype}")
    return values.astype(np.int64)
