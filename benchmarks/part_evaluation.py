"""Scores of the full Market-1501 test: 3,368 queries, 15,913 gallery images and 3,819 of junk.

Embeddings are drawn: people as clusters, as wide as gives an mAP of 40 % at 128-d. Size: the gallery.
The peers' times have the matrix of distances in them, which they ask for.
"""

import numpy as np
import pandas as pd
import peers

from reidlib.evaluation.retrieval import evaluate

SIZES = (1, 2, 4, 8, 10)
MEMORY = True
GOALS = {
    "ours": {"seconds": 0.5, "MB": 100},
    "fast-reid, Cython": {"least": 6},
    "limit: matrix product": {"least": 1 / 4},
    "ours, 2048-d": {"MB": 100},
    "limit: matrix product, 2048-d": {"least": 1 / 2},
}


def drawn(size: float, dim: int = 128, seed: int = 0):
    """Query and gallery embeddings and tables."""
    rng = np.random.default_rng(seed)
    share = min(size, 1)
    queries, gallery = round(3368 * share), round(19732 * size)
    people = max(2, round(750 * share))
    centres = rng.normal(size=(people + 1, dim)).astype(np.float32)
    known = round(13115 * share)  # the others are distractors (pid 0), a fifth of all is junk
    pids = rng.integers(1, people + 1, known)
    others = rng.choice([-1, 0], gallery - known, p=[0.58, 0.42])
    shown = rng.permutation(np.concatenate([pids, others]))
    asked = rng.integers(1, people + 1, queries)
    embs = []
    for who in (asked, shown):
        emb = 1.3 * rng.normal(size=(len(who), dim)).astype(np.float32)
        emb[who > 0] += centres[who[who > 0]]
        embs.append(emb)
    tables = [pd.DataFrame({"pid": p, "camid": rng.integers(0, 6, len(p))}) for p in (asked, shown)]
    return embs[0], tables[0], embs[1], tables[1]


def peer(module, function: str):
    """The evaluation of torchreid or fast-reid on a matrix of distances; None if it is not there."""
    if module is None:
        return None

    def run(query_emb, query, gallery_emb, gallery):
        kept = gallery["pid"].to_numpy() != -1
        shown = gallery_emb[kept]
        distances = (query_emb**2).sum(axis=1)[:, None] + (shown**2).sum(axis=1)
        distances -= 2 * query_emb @ shown.T
        who = [query["pid"], gallery["pid"][kept], query["camid"], gallery["camid"][kept]]
        return getattr(module, function)(distances, *map(np.array, who), 50)

    return run


def cases(size: float) -> dict:
    """Ours, the matrix product alone, and the peers."""
    args, wide = drawn(size), drawn(min(size, 1), 2048)
    few = [part[: len(part) // 8] for part in args[:2]] + [*args[2:]]

    def product(query_emb, _, gallery_emb, gallery):
        shown = gallery_emb[gallery["pid"].to_numpy() != -1]
        return lambda: query_emb @ shown.T

    cython = peer(peers.fastreid_cython(), "evaluate_cy")
    loop = peer(peers.torchreid("metrics/rank.py"), "eval_market1501")
    found = {
        "ours": lambda: evaluate(*args),
        "limit: matrix product": product(*args),
        "fast-reid, Cython": cython and (lambda: cython(*args)),
    }
    if size <= 1:
        found |= {
            "ours, an eighth of the queries": lambda: evaluate(*few),
            "torchreid, Python loop": loop and (lambda: loop(*few)),
            "ours, 2048-d": lambda: evaluate(*wide),
            "limit: matrix product, 2048-d": product(*wide),
        }
    return found
