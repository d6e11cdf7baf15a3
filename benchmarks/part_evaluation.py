"""Scores of the full Market-1501 test: 3,368 queries, 15,913 gallery images and 3,819 of junk.

Embeddings are drawn: people as clusters, as wide as gives an mAP of 40 % at 128-d. Size: the gallery.
"""

import numpy as np
import pandas as pd

from reidlib.evaluation import evaluate


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


def argsort_loop(query_emb, query, gallery_emb, gallery):
    """What most toolkits do in Python: a whole matrix, its argsort, and a loop over the queries."""
    kept = gallery["pid"].to_numpy() != -1
    shown = gallery_emb[kept]
    g_pids, g_camids = (gallery[c].to_numpy()[kept] for c in ("pid", "camid"))
    distances = (shown**2).sum(axis=1) - 2 * query_emb @ shown.T
    order = np.argsort(distances, axis=1)
    matches = (g_pids[order] == query["pid"].to_numpy()[:, None]).astype(np.int32)
    aps = []
    for i, (pid, camid) in enumerate(query[["pid", "camid"]].itertuples(index=False)):
        keep = (g_pids[order[i]] != pid) | (g_camids[order[i]] != camid)
        found = matches[i][keep]
        if found.any():
            precision = [x / (j + 1.0) for j, x in enumerate(found.cumsum())]
            aps.append((np.asarray(precision) * found).sum() / found.sum())
    return np.mean(aps)


def cython(module: str):
    """The compiled evaluation of torchreid or fast-reid, on a matrix of distances; None if absent."""
    try:
        evaluate_cy = __import__(module, fromlist=["evaluate_cy"]).evaluate_cy
    except (ImportError, AttributeError):
        return None

    def run(query_emb, query, gallery_emb, gallery):
        kept = gallery["pid"].to_numpy() != -1
        shown = gallery_emb[kept]
        distances = (shown**2).sum(axis=1) - 2 * query_emb @ shown.T
        who = [query["pid"], gallery["pid"][kept], query["camid"], gallery["camid"][kept]]
        return evaluate_cy(distances, *(np.ascontiguousarray(w) for w in who), 50)

    return run


def cases(size: float) -> dict:
    """Ours, the matrix product alone, and the peers."""
    args, wide = drawn(size), drawn(min(size, 1), 2048)
    peers = {
        "torchreid, Cython": cython("torchreid.metrics.rank_cylib.rank_cy"),
        "fast-reid, Cython": cython("fastreid.evaluation.rank_cylib.rank_cy"),
        "argsort and a Python loop": argsort_loop,
    }

    def product(query_emb, _, gallery_emb, gallery):
        shown = gallery_emb[gallery["pid"].to_numpy() != -1]
        return lambda: query_emb @ shown.T

    found = {"ours, 128-d": lambda: evaluate(*args), "limit: matrix product": product(*args)}
    found |= {name: run and (lambda run=run: run(*args)) for name, run in peers.items()}
    if size <= 1:
        found |= {
            "ours, 2048-d": lambda: evaluate(*wide),
            "limit: matrix product, 2048-d": product(*wide),
        }
    return found
