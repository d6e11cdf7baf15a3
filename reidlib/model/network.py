"""The embedding network: a torchvision backbone, global average pooling, TriNet's head.

TriNet (arXiv 1703.07737, section 4.3): ResNet-50 > global average pooling > Linear 1024 > BatchNorm
> ReLU > Linear 128.
"""

from collections import OrderedDict

import torchvision
from torch import Tensor, nn

from reidlib.model.depthwise import quicken_depthwise


def _resnet(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a ResNet without its pooling and classifier, and its channels."""
    return nn.Sequential(OrderedDict(list(model.named_children())[:-2])), model.fc.in_features


def _resnet8(weights: None = None) -> nn.Module:
    """Return torchvision's ResNet with one basic block a stage."""
    blocks = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(blocks, [1, 1, 1, 1])


def _three_stages(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a ResNet's stem and first three stages, and their channels."""
    backbone, _ = _resnet(model)
    return backbone[:-1], model.layer4[0].conv1.in_channels


def _mobilenet(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a MobileNet's features, and their channels."""
    return nn.Sequential(OrderedDict(features=model.features)), model.features[-1].out_channels


# name: (torchvision's constructor, its ImageNet weights or None, what cuts the classifier off).
# To add a backbone, add a line; last_stride finds the last stride of 2 by itself.
# resnet8, three stages of one block, is small enough to learn from random weights in a minute.
_models = torchvision.models
BACKBONES = {
    "resnet8": (_resnet8, None, _three_stages),
    "resnet18": (_models.resnet18, _models.ResNet18_Weights.IMAGENET1K_V1, _resnet),
    "resnet34": (_models.resnet34, _models.ResNet34_Weights.IMAGENET1K_V1, _resnet),
    "resnet50": (_models.resnet50, _models.ResNet50_Weights.IMAGENET1K_V1, _resnet),
    "resnet101": (_models.resnet101, _models.ResNet101_Weights.IMAGENET1K_V1, _resnet),
    "mobilenet_v2": (_models.mobilenet_v2, _models.MobileNet_V2_Weights.IMAGENET1K_V1, _mobilenet),
    "mobilenet_v3_small": (
        _models.mobilenet_v3_small,
        _models.MobileNet_V3_Small_Weights.IMAGENET1K_V1,
        _mobilenet,
    ),
}


class EmbeddingNet(nn.Module):
    """Images to embeddings: backbone > global average pooling > head. Its weights are random.

    `weights.build_model` makes one with pretrained weights, `weights.load_model` a trained one.

    Args:
        backbone: a name in `BACKBONES`.
        dim: length of an embedding.
        hidden: width of the head's hidden layer.
        last_stride: 2 as torchvision builds it, or 1 for a feature map of twice the height and
            width ("Bag of Tricks", arXiv 1903.07071, section 3.4). The weights fit both.
        head: True for Linear > BatchNorm > ReLU > Linear; False gives the pooled features.

    Attributes:
        dim: length of an embedding: `dim`, or the backbone's channels where there is no head.

    Raises:
        ValueError: unknown backbone, or bad sizes.

    >>> import torch
    >>> net = EmbeddingNet("mobilenet_v3_small").eval()
    >>> net(torch.zeros(2, 3, 64, 32)).shape
    torch.Size([2, 128])
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        dim: int = 128,
        hidden: int = 1024,
        last_stride: int = 2,
        head: bool = True,
    ):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(
                f"Unknown backbone {backbone!r}: choose one of {', '.join(BACKBONES)}."
            )
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride must be 1 or 2, got {last_stride}.")
        if min(dim, hidden) < 1:
            raise ValueError(f"dim and hidden must be at least 1, got {dim} and {hidden}.")
        constructor, _, cut = BACKBONES[backbone]
        self.backbone, channels = cut(constructor(weights=None))
        if last_stride == 1:
            _unstride_last_block(self.backbone)
        quicken_depthwise(self.backbone)
        self.dim = dim if head else channels
        self.head = (
            nn.Sequential(
                nn.Linear(channels, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, dim),
            )
            if head
            else nn.Identity()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, D) of normalised images (B, 3, H, W)."""
        features = self.backbone(images)  # (B, C, h, w)
        return self.head(features.mean(dim=(2, 3)))  # (B, C) -> (B, D)


def _unstride_last_block(backbone: nn.Module) -> None:
    """Set the last stride of 2 to 1, in the shortcut beside it too."""
    strided = [
        (name.split(".")[:2], module)  # a block is layer4.0 or features.14
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    ]
    last_block = strided[-1][0]
    for block, module in strided:
        if block == last_block:
            module.stride = (1, 1)
