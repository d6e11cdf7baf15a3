"""What other toolkits call the layers of the backbones here: their files of weights, read as ours.

Most names are torchvision's everywhere; DataParallel, fast-reid and the runs of this library put a word
before them. MobileNetV2's layers have names of their own in torchreid and in fast-reid.
"""

import sys
import warnings
from contextlib import suppress

from torch import Tensor, nn

from reidlib.extras import timm_entry

_LAYERS = ("0.0", "0.1", "1.0", "1.1", "2", "3")  # of a block, as torchvision numbers them
_TORCHREID = ("conv1.conv", "conv1.bn", "dwconv2.conv", "dwconv2.bn", "conv3.0", "conv3.1")
_STAGES = [(2, 1, 1), (3, 2, 2), (4, 3, 4), (5, 4, 7), (6, 3, 11), (7, 3, 14), (8, 1, 17)]

# By a key that only that toolkit's MobileNetV2 has: the beginnings of its keys, and of ours.
RENAMED = {
    "conv9.bn.weight": {
        f"conv{stage}.{i}.{theirs}": f"features.{first + i}.conv.{ours}"
        for stage, blocks, first in _STAGES
        for i in range(blocks)
        for theirs, ours in zip(_TORCHREID, _LAYERS, strict=True)
    }
    | {"conv1.conv": "features.0.0", "conv1.bn": "features.0.1"}
    | {"conv9.conv": "features.18.0", "conv9.bn": "features.18.1"},
    "conv.1.weight": {
        f"features.{block}.conv.{theirs}": f"features.{block}.conv.{ours}"
        for block in range(1, 18)
        for theirs, ours in zip("013467", _LAYERS, strict=True)
    }
    | {"features.1.conv.3": "features.1.conv.1", "features.1.conv.4": "features.1.conv.2"}
    | {"conv.0": "features.18.0", "conv.1": "features.18.1"},
}


def of_backbone(state: dict[str, Tensor], name: str, network: nn.Module) -> dict[str, Tensor]:
    """Return what a file of weights holds of a backbone, under our names; its classifier is passed over.

    A ValueError for torchreid's MobileNetV2, which has one layer more than torchvision's.
    """
    inside = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    of_fastreid = inside and any(k.startswith("heads.") for k in state)
    if of_fastreid and name.startswith("resnet") and not name.endswith("_fastreid"):
        warnings.warn(
            "fast-reid's ResNets pool first without a border, so these weights see pictures a little "
            'shifted here. backbone = "resnet50_fastreid" computes just what fast-reid does.',
            stacklevel=2,
        )
    state, classifier = inside or state, ("fc", "classifier")
    if name.startswith("timm:"):
        classifier = timm_entry(name).classifier or ()
        classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    left_out = tuple(f"{part}." for part in classifier)
    state = {k: v for k, v in state.items() if not k.startswith(left_out)}
    if name.startswith(
        "timm:"
    ):  # it knows the names of a model's authors, and other sizes of input
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        with suppress(Exception):  # of another network: which keys do not fit is told afterwards
            return convert(state, network) if convert else state
    if name == "mobilenet_v2" and "conv9.bn.weight" in state:
        raise ValueError(
            "These are weights of torchreid's MobileNetV2, which has one layer more: "
            'backbone = "mobilenet_v2_torchreid".'
        )
    names = next((table for known_by, table in RENAMED.items() if known_by in state), {})
    split = [(*key.rpartition("."), value) for key, value in state.items()]
    return {names.get(layer, layer) + dot + leaf: value for layer, dot, leaf, value in split}
