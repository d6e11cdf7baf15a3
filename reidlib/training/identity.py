"""An ID loss beside the triplets, as most of the field has it: what triplets alone are compared with.

"Bag of Tricks" (arXiv 1903.07071, section 3.5) calls this BNNeck: the triplet loss sees the pooled
features f, and a classifier of the training identities sees BatchNorm(f), which is the embedding
afterwards. The paper of this workbook has no such loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reidlib.model.network import EmbeddingNet
from reidlib.training.losses import TripletLoss

SMOOTHING = 0.1  # of the labels: 1 − ε for the right identity, ε shared by all


class WithClassifier(nn.Module):
    """A network for training alone: features and the logits of identities, in one tensor.

    Args:
        model: an `EmbeddingNet` with `norm` and without head.
        identities: how many.
    """

    def __init__(self, model: EmbeddingNet, identities: int):
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(model.dim, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, D + identities) of images (B, 3, H, W)."""
        features = self.model.pooled(images)  # (B, 3, H, W) -> (B, D)
        logits = self.classifier(self.model.norm(features))  # (B, D) -> (B, identities)
        return torch.cat([features, logits], dim=1)


def with_id_loss(
    loss: Callable[..., TripletLoss], identities: Tensor, weight: float
) -> Callable[..., TripletLoss]:
    """Return a loss of what `WithClassifier` gives: a triplet loss + weight · cross-entropy.

    Args:
        loss: of embeddings (B, D) and pids (B,).
        identities: (C,) pids of the training people, sorted; the order of the logits.
        weight: of the mean cross-entropy over images, its labels smoothed.
    """

    def both(outputs: Tensor, pids: Tensor) -> TripletLoss:
        # (B, D + C) -> (B, D), (B, C)
        emb, logits = outputs.tensor_split([outputs.shape[1] - len(identities)], dim=1)
        result, labels = loss(emb, pids), torch.searchsorted(identities, pids)
        of_identity = cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        return result._replace(loss=result.loss + weight * of_identity)

    return both
