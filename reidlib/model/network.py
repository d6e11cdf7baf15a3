"""The embedding network: a backbone of torchvision or timm, global average pooling, TriNet's head.

TriNet (arXiv 1703.07737, section 4.3) is the network as its defaults make it.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision import models

from reidlib.model import elsewhere
from reidlib.model.depthwise import quicken_depthwise


def _resnet8() -> nn.Module:
    """Return three stages of one block: small enough to learn from random weights in a minute."""
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    del model.layer4
    return model


# To add a backbone, add a line: what comes after its pooling is cut off, the number of its channels
# and its last stride are found, and its ImageNet weights are torchvision's of that name.
BACKBONES = {
    "resnet8": _resnet8,
    "resnet18": models.resnet18,
    "resnet34": models.resnet34,
    "resnet50": models.resnet50,
    "resnet101": models.resnet101,
    "resnet50_fastreid": elsewhere.resnet50_fastreid,
    "mobilenet_v2": models.mobilenet_v2,
    "mobilenet_v2_torchreid": elsewhere.mobilenet_v2_torchreid,
    "mobilenet_v3_small": models.mobilenet_v3_small,
}


class EmbeddingNet(nn.Module):
    """Images to embeddings: backbone > global average pooling > head, with random weights.

    Args:
        backbone: a name in `BACKBONES`, or `timm:NAME`, which pools as it does in timm.
        dim: length of an embedding.
        hidden: width of the head's hidden layer.
        last_stride: 2 as torchvision builds it, or 1 for a feature map of twice the height and
            width ("Bag of Tricks", arXiv 1903.07071, section 3.4). The weights fit both.
        head: True for Linear > BatchNorm > ReLU > Linear; False gives the pooled features, and
            `dim` becomes the number of the backbone's channels.
        pooling_power: p of the pooling, (mean of x^p)^(1/p) over the map, x ≥ 0: 1 is the mean, 3 the
            usual value of GeM ("Fine-tuning CNN Image Retrieval", arXiv 1711.02512, equation 3).
        norm: BatchNorm of the pooled features ("Bag of Tricks", section 3.5, has it before a classifier).
        size: (height, width) of the images; some of timm's networks are made for one size.

    Raises:
        ValueError: unknown backbone, bad sizes, or a backbone that cannot take images of that size or
            has no last stride.
        RuntimeError: timm is not installed.

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
        size: tuple[int, int] | None = None,
        pooling_power: float = 1.0,
        norm: bool = False,
    ):
        super().__init__()
        if backbone not in BACKBONES and not backbone.startswith("timm:"):
            known = f"{', '.join(BACKBONES)} or timm:NAME"
            raise ValueError(f"Unknown backbone {backbone!r}: choose {known}.")
        if last_stride not in (1, 2) or min(dim, hidden) < 1:
            sizes = f"{last_stride=}, {dim=}, {hidden=}"
            raise ValueError(f"last_stride must be 1 or 2, dim and hidden at least 1, not {sizes}.")
        if backbone in BACKBONES:
            children = BACKBONES[backbone]().named_children()
            cut = ("avgpool", "fc", "classifier")
            self.backbone = nn.Sequential(OrderedDict(c for c in children if c[0] not in cut))
            norms = [m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
            channels = norms[-1].num_features
        else:
            self.backbone, channels = elsewhere.timm_network(backbone, size)
            if pooling_power != 1:
                raise ValueError(f"{backbone} pools as it does in timm: set pooling_power = 1.")
        if last_stride == 1:
            _unstride_last_block(self.backbone, backbone)
        quicken_depthwise(self.backbone)
        self.pooling_power = pooling_power
        self.norm = nn.BatchNorm1d(channels) if norm else nn.Identity()
        self.dim, self.head = channels, nn.Identity()
        if head:
            self.dim = dim
            self.head = nn.Sequential(
                nn.Linear(channels, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, dim),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings (B, D) of normalised images (B, 3, H, W)."""
        return self.head(self.norm(self.pooled(images)))  # (B, C) -> (B, D)

    def pooled(self, images: Tensor) -> Tensor:
        """Return the pooled features (B, C) of normalised images (B, 3, H, W)."""
        features = self.backbone(images)  # (B, C, h, w), or (B, C) of timm's
        if features.dim() == 2:
            return features
        if (p := self.pooling_power) == 1:
            return features.mean(dim=(2, 3))  # (B, C, h, w) -> (B, C)
        # In float32 at least: powers of half precision have few digits left. Above 0, where the slope
        # of the root is finite.
        lifted = features.to(torch.promote_types(features.dtype, torch.float32))
        powers = lifted.clamp(min=1e-6) ** p
        return powers.mean(dim=(2, 3)) ** (1 / p)  # (B, C, h, w) -> (B, C)


def _unstride_last_block(backbone: nn.Module, name: str) -> None:
    """Set the last stride of 2 to 1, in the shortcut beside it too."""
    kinds, modules = nn.Conv2d | nn.AvgPool2d, dict(backbone.named_modules())
    strided = [k for k, m in modules.items() if isinstance(m, kinds) and m.stride in (2, (2, 2))]
    if not strided:
        raise ValueError(f"{name} has no last stride: set last_stride = 2.")
    last_block = strided[-1].split(".")[:2]  # layer4.0, features.14 or timm's stages.3
    for module in (modules[key] for key in strided if key.split(".")[:2] == last_block):
        module.stride = (1, 1)
        if isinstance(module, nn.AvgPool2d):
            module.kernel_size = 1  # it was there for the stride
        elif module.kernel_size == (2, 2):  # ConvNeXt's; else the map would lose a row and a column
            module.dilation, module.padding = (2, 2), (1, 1)
