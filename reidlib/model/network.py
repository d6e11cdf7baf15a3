"""The embedding network: a backbone of torchvision or timm, global average pooling, TriNet's head.

TriNet (arXiv 1703.07737, section 4.3) is the network as its defaults make it.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision import models

from reidlib.extras import need, timm_entry
from reidlib.model.depthwise import quicken_depthwise


def _resnet8() -> nn.Module:
    """Return three stages of one block: small enough to learn from random weights in a minute."""
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    del model.layer4
    return model


def _resnet50_fastreid() -> nn.Module:
    """Return the ResNet-50 of fast-reid, whose first pooling has no border."""
    model = models.resnet50()
    model.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    return model


def _mobilenet_v2_torchreid() -> nn.Module:
    """Return torchreid's MobileNetV2 x1.0, whose first block begins with a 1×1 convolution, too."""
    model = models.mobilenet_v2()
    layer = [nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
    model.features[1].conv.insert(0, nn.Sequential(*layer))
    return model


# To add a backbone, add a line: what comes after its pooling is cut off, the number of its channels
# and its last stride are found, and its ImageNet weights are torchvision's of that name.
BACKBONES = {
    "resnet8": _resnet8,
    "resnet18": models.resnet18,
    "resnet34": models.resnet34,
    "resnet50": models.resnet50,
    "resnet101": models.resnet101,
    "resnet50_fastreid": _resnet50_fastreid,
    "mobilenet_v2": models.mobilenet_v2,
    "mobilenet_v2_torchreid": _mobilenet_v2_torchreid,
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
            self.backbone, channels = timm_network(backbone, size)
        if last_stride == 1:
            _unstride_last_block(self.backbone, backbone)
        quicken_depthwise(self.backbone)
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
        features = self.backbone(images)  # (B, C, h, w), or (B, C) of timm's
        if features.dim() == 4:
            features = features.mean(dim=(2, 3))  # (B, C, h, w) -> (B, C)
        return self.head(features)  # (B, C) -> (B, D)


def _unstride_last_block(backbone: nn.Module, name: str) -> None:
    """Set the last stride of 2 to 1, in the shortcut beside it too."""
    strided = {
        place: module
        for place, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d | nn.AvgPool2d) and module.stride in (2, (2, 2))
    }
    if not strided:
        raise ValueError(f"{name} has no last stride: set last_stride = 2.")
    last_block = [*strided][-1].split(".")[:2]  # layer4.0, features.14 or timm's stages.3
    for place, module in strided.items():
        if place.split(".")[:2] == last_block:
            module.stride = (1, 1)
            if isinstance(module, nn.AvgPool2d):
                module.kernel_size = 1  # the pooling was there for the stride
            elif (
                module.kernel_size[0] == 2
            ):  # ConvNeXt's: else the map would lose a row and a column
                module.dilation, module.padding = (2, 2), (1, 1)


def timm_network(
    name: str, size: tuple[int, int] | None = None, pretrained: bool = False
) -> tuple[nn.Module, int]:
    """Return timm's network `timm:NAME` without its classifier, and how many numbers it gives.

    Its output is (B, C), pooled in its own way. `size` is (height, width) of its input: a ViT is made
    for it, and its pretrained table of positions is brought to it.

    Raises: as `EmbeddingNet`, and what timm raises where pretrained weights cannot be had.
    """
    entry, timm = timm_entry(name), need("timm", name)
    h, w = size or entry.input_size[1:]
    options = {"img_size": (h, w)} if entry.fixed_input_size else {}
    options |= {"num_classes": 0, "pretrained": pretrained}
    patch, cause = (32, 32), ""
    try:
        network = timm.create_model(name.removeprefix("timm:"), **options)
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))
        with torch.no_grad():
            channels = network.eval()(torch.zeros(1, 3, h, w)).shape[1]
        if h % patch[0] == w % patch[1] == 0:  # else pixels at the border would be lost
            return network.train(), channels
        cause = "its patches do not fill them"
    except (AssertionError, RuntimeError, TypeError) as error:
        if pretrained:
            raise
        cause = str(error).split("\n")[0]
    a, b = (32 if n == 1 else n for n in patch)
    near = f"{max(1, round(h / a)) * a}×{max(1, round(w / b)) * b}"
    raise ValueError(
        f"{name} cannot take images of {h}×{w} ({cause}). Let height and width be multiples of {a} and "
        f"{b}, such as {near}."
    )
