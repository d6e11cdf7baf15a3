"""Triplet losses forward and backward: B = 512 x size images, K = 4, 128-d."""

import torch

from reidlib.training.losses import batch_all, batch_hard

MARGIN = 0.2
SIZES = (1, 2, 4, 8)
GROWS = ("ours", "limit", "pytorch-metric-learning, batch-hard")
MEMORY = True
GOALS = {"masked B x B x B": {"least": 10}}


def masked(emb, pids):
    """Batch-all as an array of B x B x B gaps and a mask."""
    distances = torch.cdist(emb, emb)
    gap = distances[:, :, None] - distances[:, None, :]
    same = pids[:, None] == pids
    positive = same & ~torch.eye(len(pids), dtype=torch.bool)
    mask = positive[:, :, None] & ~same[:, None, :]
    terms = (gap + MARGIN).relu() * mask
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def metric_learning():
    """pytorch-metric-learning's two forms, on plain Euclidean distances; None if absent."""
    try:
        from pytorch_metric_learning.distances import LpDistance
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import BatchHardMiner
    except ImportError:
        return None, None
    plain = LpDistance(normalize_embeddings=False)
    loss, hard = TripletMarginLoss(MARGIN, distance=plain), BatchHardMiner(distance=plain)
    return loss, lambda emb, pids: loss(emb, pids, hard(emb, pids))


def cases(size: float) -> dict:
    """Batch-all and batch-hard, ours and others."""
    generator = torch.Generator().manual_seed(0)
    b = 4 * round(128 * size)

    def step(loss):
        pids = torch.arange(b) // 4
        centres = torch.randn(b // 4 + 1, 128, generator=generator)
        emb = (centres[pids] + torch.randn(b, 128, generator=generator)).requires_grad_()

        def run():
            emb.grad = None
            loss(emb, pids).backward()

        return run

    pml_all, pml_hard = metric_learning()
    return {
        "ours, batch-all": step(lambda e, y: batch_all(e, y, MARGIN).loss),
        "pytorch-metric-learning, batch-all": pml_all and step(pml_all),
        "masked B x B x B": step(masked),
        "ours, batch-hard": step(lambda e, y: batch_hard(e, y, MARGIN).loss),
        "pytorch-metric-learning, batch-hard": pml_hard and step(pml_hard),
    }
