"""k-reciprocal re-ranking (k1 = 20, k2 = 6, lambda = 0.3) of 3,368 + 15,913 images x size.

The dense original needs some 10 GB at full size, so it runs on a fifth of queries and gallery, beside
ours on the same fifth.
"""

import numpy as np
from part_evaluation import drawn

from reidlib.reranking import k_reciprocal, query_expansion


def dense(query, gallery, k1=20, k2=6, lam=0.3):
    """The published algorithm on whole matrices, after its authors' Python code."""
    x = np.concatenate([query, gallery])
    norms = (x**2).sum(axis=1)
    d = (norms[:, None] + norms - 2 * x @ x.T).clip(min=0)
    d = (d / d.max(axis=0)).T
    rank = np.argsort(d, axis=1)
    v = np.zeros_like(d)

    def reciprocal(i, k):
        forward = rank[i, : k + 1]
        return forward[(rank[forward, : k + 1] == i).any(axis=1)]

    for i in range(len(x)):
        near = reciprocal(i, k1)
        expanded = near
        for c in near:
            others = reciprocal(c, round(k1 / 2))
            if len(np.intersect1d(others, near)) > 2 / 3 * len(others):
                expanded = np.append(expanded, others)
        expanded = np.unique(expanded)
        weight = np.exp(-d[i, expanded])
        v[i, expanded] = weight / weight.sum()
    v = np.stack([v[rank[i, :k2]].mean(axis=0) for i in range(len(x))])
    having = [np.flatnonzero(column) for column in v.T]
    jaccard = np.empty((len(query), len(x)), np.float32)
    for i in range(len(query)):
        shared = np.zeros(len(x), np.float32)
        for j in np.flatnonzero(v[i]):
            shared[having[j]] += np.minimum(v[i, j], v[having[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    return ((1 - lam) * jaccard + lam * d[: len(query)])[:, len(query) :]


def cases(size: float) -> dict:
    """Ours at this size; ours and the dense original on a fifth; query expansion."""

    def embs(size):
        query, _, gallery, table = drawn(size)
        return query, gallery[table["pid"].to_numpy() != -1]

    whole, fifth = embs(size), embs(0.2 * min(size, 1))
    return {
        "ours, k-reciprocal": lambda: k_reciprocal(*whole),
        "ours, query expansion": lambda: query_expansion(*whole),
        "ours, k-reciprocal, a fifth": lambda: k_reciprocal(*fifth),
        "dense original, a fifth": lambda: dense(*fifth),
    }
