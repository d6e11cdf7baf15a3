"""What comes from elsewhere: timm's networks, two of other toolkits, and files of weights, read as ours.

Most names of layers are torchvision's everywhere; DataParallel, fast-reid and the runs of this library put
a word before them.
"""

import sys
import warnings
from contextlib import suppress

import torch
from torch import Tensor, nn
from torchvision import models

from reidlib.extras import need, timm_entry


def resnet50_fastreid() -> nn.Module:
    """Return the ResNet-50 of fast-reid, whose first pooling has no border."""
    model = models.resnet50()
    model.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    return model


def mobilenet_v2_torchreid() -> nn.Module:
    """Return torchreid's MobileNetV2 x1.0, whose first block begins with a 1×1 convolution, too."""
    model = models.mobilenet_v2()
    layer = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)
    model.features[1].conv.insert(0, nn.Sequential(*layer))
    return model


def timm_network(name: str, size: tuple[int, int] | None = None) -> tuple[nn.Module, int]:
    """Return timm's network `timm:NAME` without its classifier, and how many numbers it gives.

    Its output is (B, C), pooled in its own way. `size` is (height, width) of its input: a ViT is made
    for it. Raises as `EmbeddingNet` does.
    """
    entry = timm_entry(name)
    h, w = size or entry.input_size[1:]
    options = {"img_size": (h, w)} if entry.fixed_input_size else {}
    unit = (32, 32)
    with suppress(AssertionError, RuntimeError, TypeError), torch.no_grad():
        network = need("timm", name).create_model(name[5:], num_classes=0, **options)
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        unit = patch or unit
        # Else pixels at the border would be lost.
        if not patch or h % patch[0] == w % patch[1] == 0:
            channels = network.eval()(torch.zeros(1, 3, h, w)).shape[1]
            return network.train(), channels
    near = "×".join(str(max(1, round(n / u)) * u) for n, u in zip((h, w), unit, strict=True))
    raise ValueError(
        f"{name} cannot take images of {h}×{w}. Let height and width be multiples of {unit[0]} and "
        f"{unit[1]}, such as {near}."
    )


def of_backbone(state: dict[str, Tensor], name: str, network: nn.Module) -> dict[str, Tensor]:
    """Return what a file of weights holds of a backbone, under our names; its classifier is passed over."""
    inside = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    of_fastreid = inside and any(key.startswith("heads.") for key in state)
    if of_fastreid and name.startswith("resnet") and not name.endswith("_fastreid"):
        warnings.warn(
            "fast-reid's ResNets pool first without a border, so these weights see pictures a little "
            'shifted here. backbone = "resnet50_fastreid" computes just what fast-reid does.',
            stacklevel=2,
        )
    of_timm, classifier = name.startswith("timm:"), ("fc", "classifier")
    if of_timm:
        parts = timm_entry(name).classifier or ()
        classifier = (parts,) if isinstance(parts, str) else parts
    left_out = tuple(f"{part}." for part in classifier)
    state = {k: v for k, v in (inside or state).items() if not k.startswith(left_out)}
    if of_timm:  # it knows the names of a model's authors, and other sizes of input
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        with suppress(Exception):  # of another network: which keys do not fit is told afterwards
            return convert(state, network) if convert else state
    return _renamed(state, network) if name.startswith("mobilenet_v2") else state


def _renamed(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Give the layers of torchreid's or fast-reid's MobileNetV2 our names, or return what came.

    Both hold the same layers in the same order: every number must agree in its last name and its shape.
    """

    def last_names(these: dict[str, Tensor]) -> list:
        return [(key.rpartition(".")[2], value.shape) for key, value in these.items()]

    own = network.state_dict()
    same = last_names(own) == last_names(state)
    return dict(zip(own, state.values(), strict=True)) if same else state
