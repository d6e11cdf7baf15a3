"""PK batches: P identities, K images of each (arXiv 1703.07737, section 2)."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike


class PKSampler:
    """Draw PK batches of row numbers from the identities of a table.

    K images of an identity are K different ones where it has as many. An identity with fewer
    repeats them evenly: none is shown twice before all were shown once. Where an epoch does not fill
    the last batch, it is filled up with further identities drawn at random.

    Args:
        pids: identity of each row, (N,) integers. Rows with a negative pid (junk) are refused.
        p: identities in a batch.
        k: images of each.
        epoch: `"identities"`, TriNet's, shows every identity once, with K of its images. `"images"`
            shows every image at least once: n images of an identity make ceil(n / K) groups of K,
            and no batch holds an identity twice.
        seed: of the sampler's own random generator.

    Iterating yields one epoch of int64 arrays (P·K,), the K rows of an identity side by side; the
    next iteration goes on with the generator. `state_dict` taken between two batches, loaded into a
    sampler made with the same arguments, goes on with the very batch that would have come next.

    Raises:
        ValueError: no rows, junk rows, fewer than P identities, P or K below 1, unknown epoch.

    >>> sampler = PKSampler([7, 7, 7, 8, 8, 9], p=3, k=2)
    >>> len(sampler), sorted(set(next(iter(sampler))[:6].tolist()) & {3, 4, 5})
    (1, [3, 4, 5])
    """

    def __init__(
        self, pids: ArrayLike, p: int = 18, k: int = 4, epoch: str = "identities", seed: int = 0
    ):
        pids = np.asarray(pids)
        if pids.ndim != 1 or len(pids) == 0:
            raise ValueError(f"The sampler needs a list of identities, got shape {pids.shape}.")
        if p < 1 or k < 1:
            raise ValueError(f"P and K must be at least 1, got P = {p}, K = {k}.")
        if epoch not in ("identities", "images"):
            raise ValueError(f"Unknown epoch {epoch!r}: choose 'identities' or 'images'.")
        if (pids < 0).any():
            raise ValueError(
                f"{(pids < 0).sum()} rows are junk (pid below 0): take them out first."
            )
        self.p, self.k = p, k
        order = np.argsort(pids, kind="stable")
        starts = np.flatnonzero(np.diff(pids[order])) + 1
        self._rows = np.split(order, starts)  # of each identity, in order of pid: int64 arrays
        # Of each identity, the groups of K rows that it gives to an epoch.
        sizes, found = np.array([*map(len, self._rows)]), len(self._rows)
        self._counts = -(-sizes // k) if epoch == "images" else np.ones_like(sizes)
        if found < p:
            advice = "lower P, or hold out fewer identities"
            if found < 2:
                advice = "without a second identity there is no negative, and nothing to learn"
            raise ValueError(f"A batch needs P = {p} identities, the data has {found}: {advice}.")
        self._random = np.random.default_rng(seed)
        self._batches: list[np.ndarray] = []  # what is left of the epoch under way
        self._started = False
        import os
        self.group, self.centres = int(os.environ.get("GS", 1)), None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        # An identity may stand in a batch once, so the one with most groups may set the length.
        return int(max(-(-self._counts.sum() // self.p), self._counts.max()))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the batches of one epoch, or what is left of an interrupted one after a restore."""
        if not self._started:
            self._batches = self._draw_epoch()
        self._started = True
        while self._batches:
            batch = self._batches.pop(0)
            # The last batch ends the epoch at once, so that a state saved now starts the next one.
            self._started = bool(self._batches)
            yield batch

    def state_dict(self) -> dict:
        """Return all that decides the batches to come: the generator and the rest of the epoch."""
        return {
            "random": self._random.bit_generator.state,
            "batches": [batch.tolist() for batch in self._batches],
            "started": self._started,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state that `state_dict` returned."""
        self._random.bit_generator.state = state["random"]
        self._batches = [np.array(batch, dtype=np.int64) for batch in state["batches"]]
        self._started = state["started"]

    def _draw_epoch(self) -> list[np.ndarray]:
        """Deal the identities' groups of K rows into batches of P different identities.

        This is the idea, as a loop, for an epoch that shows every identity once:

            identities = random.permutation(np.unique(pids))
            for start in range(0, len(identities) - p + 1, p):
                batch = []
                for pid in identities[start : start + p]:
                    rows = np.flatnonzero(pids == pid)
                    batch.extend(np.resize(random.permutation(rows), k))
                yield np.array(batch)

        Two things come on top. Identities may have several groups to give (`epoch = "images"`), and
        never two in one batch. The last batch is filled up, where the loop drops it.
        """
        left, batches = self._counts.copy(), []
        near = None
        if self.group > 1 and self.centres is not None and np.isfinite(self.centres).all():
            c = self.centres.astype(np.float64)
            d = (c**2).sum(1)[:, None] + (c**2).sum(1) - 2 * c @ c.T
            np.fill_diagonal(d, np.inf)
            near = np.argsort(d, axis=1)[:, :-1]
        groups = [self._groups(rows, n) for rows, n in zip(self._rows, left, strict=True)]
        for remaining in range(len(self), 0, -1):
            # An identity with as many groups left as there are batches must be in this one; the
            # others are drawn with a chance in proportion to their groups left.
            chance = self._random.random(len(left)) ** (1 / np.maximum(left, 1))
            chance = np.where(left >= remaining, 2 + chance, np.where(left > 0, 1 + chance, chance))
            order = np.argsort(-chance, kind="stable")
            chosen = order[: self.p] if near is None else self._beside(order, near, left, remaining)
            rows = [(groups[i] or self._groups(self._rows[i], 1)).pop() for i in chosen]
            left[chosen] -= 1
            batches.append(self._random.permutation(np.stack(rows)).flatten())
        return batches

    def _beside(self, order, near, left, remaining):
        chosen = []
        for i in order.tolist():
            if len(chosen) == self.p:
                break
            if i in chosen:
                continue
            chosen.append(i)
            must = np.setdiff1d(np.flatnonzero(left >= remaining), chosen)
            free = self.p - len(chosen) - len(must)
            twins = [j for j in near[i].tolist() if left[j] > 0 and j not in chosen]
            chosen += twins[: max(0, min(self.group - 1, free))]
        return np.array(chosen)

    def _groups(self, rows: np.ndarray, n: int) -> list[np.ndarray]:
        """Return n groups of K rows of one identity that show its rows as evenly as can be."""
        if len(rows) < self.k:  # repeat evenly: whole rounds, then a part of one
            rounds = -(-self.k // len(rows))
            return [
                np.concatenate([self._random.permutation(rows) for _ in range(rounds)])[: self.k]
                for _ in range(n)
            ]
        shuffled = self._random.permutation(rows)
        groups = [shuffled[i * self.k : (i + 1) * self.k] for i in range(n)]
        missing = self.k - len(groups[-1])
        if missing:  # fill the last group with rows of the others, none twice
            extra = self._random.choice(np.setdiff1d(rows, groups[-1]), missing, replace=False)
            groups[-1] = np.concatenate([groups[-1], extra])
        return groups
