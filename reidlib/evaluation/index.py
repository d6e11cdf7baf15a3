"""An index over a gallery's embeddings: a search that looks at a part of them, and its price.

FAISS does the work: the optional extra `index`. Exact ranking stays the default and the truth.
"""

import math
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from reidlib.evaluation.metrics import per_query_scores, score_values
from reidlib.evaluation.retrieval import Retrieval
from reidlib.extras import need
from reidlib.model.shards import in_blocks
from reidlib.runs import write_atomically

# As FAISS names them: all of them; a graph; lists of 8-bit codes, a quarter as many as numbers. "np":
# without sorting codes for polysemous search, which takes minutes and is not used here.
KINDS = {"flat": "Flat", "hnsw": "HNSW32", "ivfpq": "IVF{lists},PQ{codes}np"}


class Index:
    """Embeddings in a FAISS index, numbered from 0 as they were added.

    Args:
        dim: numbers in an embedding.
        kind: one of `KINDS`. `"flat"` looks at all; `"hnsw"` follows a graph, at 128 candidates;
            `"ivfpq"` looks at a 32nd of 4 √size lists, 16 at least, and at codes instead of numbers.
        size: how many embeddings there will be, about.

    Attributes:
        kind, dim: as given.
        checksum: of what was added, CRC-32.

    Raises:
        ValueError: no such kind.
        RuntimeError: FAISS is not installed.

    >>> index = Index.of(np.eye(3, dtype=np.float32), "flat")
    >>> len(index), index.search(np.eye(3)[1:2], k=1)[0].tolist()
    (3, [[1]])
    """

    def __init__(self, dim: int, kind: str = "hnsw", size: int = 0):
        if kind not in KINDS:
            raise ValueError(f"There is no index of kind {kind!r}: choose {', '.join(KINDS)}.")
        self._faiss = need("faiss", "An index", extra="index")
        self.kind, self.dim, self.checksum = kind, dim, 0
        lists = 2 ** round(math.log2(4 * math.sqrt(max(size, 1))))
        codes = next(n for n in range(max(1, dim // 4), 0, -1) if dim % n == 0)
        self._index = self._faiss.index_factory(dim, KINDS[kind].format(lists=lists, codes=codes))
        if kind == "hnsw":
            self._index.hnsw.efSearch = 128
        if kind == "ivfpq":
            self._index.nprobe = max(16, lists // 32)
            # 64 images a code train as well as FAISS's 256, in a sixth of the time. Fewer, of a small
            # gallery, are as many as there are, and no reason for a warning.
            codes, places = self._index.pq.cp, self._index.cp
            codes.niter, codes.max_points_per_centroid = 10, 64
            codes.min_points_per_centroid = places.min_points_per_centroid = 1

    @classmethod
    def of(cls, emb: Any, kind: str = "hnsw") -> "Index":
        """Return an index of embeddings (N, D), in memory or `Shards`.

        Raises a ValueError where they are too few to train it.
        """
        index = cls(emb.shape[1], kind, len(emb))
        if not index._index.is_trained:
            wanted = 64 * index._index.nlist
            if len(emb) < max(256, index._index.nlist):
                raise ValueError(
                    f"{len(emb)} embeddings are too few for an index of kind {kind!r}."
                )
            step = max(1, len(emb) // wanted)
            # Copies: a view would hold its block, and all of them the gallery.
            some = (block[::step].astype(np.float32) for block in in_blocks(emb))
            index._index.train(np.concatenate(list(some)))
        for block in in_blocks(emb):
            index.add(block)
        return index

    def add(self, emb: np.ndarray) -> None:
        """Add embeddings (n, D); a ValueError if they are of another dimension."""
        emb = self._fitting(emb)
        self._index.add(emb)
        self.checksum = zlib.crc32(emb, self.checksum)

    def search(self, emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (Q, k) found near each of (Q, D), and squared distances as it measures them.

        Nearest first; a row is −1 where it finds no more.
        """
        apart, rows = self._index.search(self._fitting(emb), k)
        return rows, apart

    def __len__(self) -> int:
        return self._index.ntotal

    def _fitting(self, emb: np.ndarray) -> np.ndarray:
        if np.ndim(emb) != 2 or np.shape(emb)[1] != self.dim:
            raise ValueError(f"an index of {self.dim} numbers does not fit {np.shape(emb)}")
        return np.ascontiguousarray(emb, np.float32)

    def save(self, path: str | Path) -> None:
        """Write it, with a checksum of what was added, atomically."""
        content = {"index": self._faiss.serialize_index(self._index), "kind": self.kind}

        def write(fresh: Path) -> None:
            with open(fresh, "wb") as file:
                np.savez(file, checksum=self.checksum, **content)

        write_atomically(Path(path), write)

    @classmethod
    def load(cls, path: str | Path, emb: Any) -> "Index":
        """Read an index, which must be of these embeddings.

        Raises:
            ValueError: it cannot be read, or is of other embeddings.
        """
        try:
            with np.load(path) as file:
                kind, checksum, content = str(file["kind"]), int(file["checksum"]), file["index"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read as an index: {error}. Make it again."
            ) from error
        index = cls(emb.shape[1], kind, len(emb))
        index._index, index.checksum = index._faiss.deserialize_index(content), checksum
        theirs = 0
        for block in in_blocks(emb):
            theirs = zlib.crc32(np.ascontiguousarray(block, np.float32), theirs)
        if theirs != checksum:
            shape = f"{len(index):,} × {index._index.d}"
            raise ValueError(
                f"{path} is an index of other embeddings ({shape}, these are {len(emb):,} × "
                f"{emb.shape[1]}): make it again."
            )
        return index

    @classmethod
    def kept(cls, path: str | Path, emb: Any) -> "Index":
        """Return the index of these embeddings in a file; its ending says of what kind to make one.

        The errors are those of `load` and `of`.
        """
        path = Path(path).expanduser()
        if path.exists():
            return cls.load(path, emb)
        index = cls.of(emb, path.suffix[1:])
        index.save(path)
        return index


def price(retrieval: Retrieval, index: Index, k: int = 100) -> dict[str, float]:
    """Return what a search through an index loses, as fractions.

    A list through an index ends at its k-th image, so matches that rank beyond k count as not found:
    their precision is 0, and the AP stays a mean over all N matches. That costs something even where
    no image is missed, so it is told apart: `mAP at k` is the exact ranking's, cut off at k.

    Args:
        retrieval: the exact ranking; its gallery is what was added to the index.
        k: ranked images of a list.

    Returns:
        `recall` (share of the exact k nearest that it finds), `mAP` and `top-1` of the whole exact
        ranking, `mAP at k`, `mAP with index` and `top-1 with index`.
    """
    asking, rows, ranks = retrieval.ranked_matches
    pair, options = ["query", "gallery"], {"topk": k, "show_excluded": False}
    exact, found = (retrieval.ranked_lists(index=way, **options) for way in (None, index))
    matches = pd.DataFrame({"query": asking, "gallery": rows})
    through = matches.merge(found, "left", pair)["rank"].astype(float).fillna(np.inf)

    def scores(ranks: np.ndarray) -> pd.Series:
        order = np.lexsort((ranks, asking))
        per_query = per_query_scores(asking, ranks[order], len(retrieval.query))
        return score_values(per_query, (1,)).mean()

    whole, cut = scores(ranks), scores(np.where(ranks <= k, ranks, np.inf))
    lost = scores(through.to_numpy())
    return {
        "recall": len(exact.merge(found, on=pair)) / len(exact),
        "mAP": whole["mAP"],
        "top-1": whole["top1"],
        "mAP at k": cut["mAP"],
        "mAP with index": lost["mAP"],
        "top-1 with index": lost["top1"],
    }
