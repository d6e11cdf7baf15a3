"""k-reciprocal re-ranking (k1 = 20, k2 = 6, lambda = 0.3) of 3,368 + 15,913 images x size.

The dense original needs some 10 GB at full size, so it runs there only with --full, and always on a
fifth of queries and gallery, beside ours on the same fifth.
"""

import numpy as np
import peers
from part_evaluation import drawn

from reidlib.evaluation.rerank import k_reciprocal, normalise, query_expansion

SIZES = (1 / 8, 1 / 4, 1 / 2, 1)
MEMORY = True
GOALS = {"ours, k-reciprocal": {"seconds": 10, "MB": 1000}}


def dense():
    """The authors' own Python code, as torchreid has it, with the distances that it asks for."""
    module = peers.torchreid("utils/rerank.py")
    if module is None:
        return None

    def distances(a, b):
        squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
        return np.sqrt(squared.clip(min=0))

    def run(query, gallery):
        pairs = (query, gallery), (query, query), (gallery, gallery)
        return module.re_ranking(*(distances(*pair) for pair in pairs))

    return run


def plain_expansion(query, gallery, n=5):
    """Average query expansion by an argsort of all similarities."""
    query, gallery = normalise(query), normalise(gallery)
    near = np.argsort(-query @ gallery.T, axis=1)[:, :n]
    return normalise(query + gallery[near].sum(axis=1))


def cases(size: float, full: bool = False) -> dict:
    """Ours at this size; ours and the dense original on a fifth; query expansion."""

    def embs(size):
        query, _, gallery, table = drawn(size)
        return query, gallery[table["pid"].to_numpy() != -1]

    whole, fifth, original = embs(size), embs(0.2 * min(size, 1)), dense()
    found = {"ours, k-reciprocal": lambda: k_reciprocal(*whole)}
    if full:
        found["torchreid, dense"] = original and (lambda: original(*whole))
    return found | {
        "ours, k-reciprocal, a fifth": lambda: k_reciprocal(*fifth),
        "torchreid, dense, a fifth": original and (lambda: original(*fifth)),
        "ours, query expansion": lambda: query_expansion(*whole, n=5, alpha=0),
        "an argsort of all": lambda: plain_expansion(*whole),
    }
