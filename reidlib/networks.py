"""The embedding network: a torchvision backbone, global average pooling, TriNet's head.

TriNet (arXiv 1703.07737, section 4.3): ResNet-50 > global average pooling > Linear 1024 > BatchNorm
> ReLU > Linear 128.
"""

import copy
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    """Images to embeddings: backbone > global average pooling > head.

    Args:
        backbone: a name in `BACKBONES`.
        weights: of the backbone: `"imagenet"` (torchvision's download), the path of a file
            (`.safetensors`, or `.pt`/`.pth` with a plain state dict), or None for random ones.
        dim: length of an embedding.
        hidden: width of the head's hidden layer.
        last_stride: 2 as torchvision builds it, or 1 for a feature map of twice the height and
            width ("Bag of Tricks", arXiv 1903.07071, section 3.4). The weights fit both.
        head: True for Linear > BatchNorm > ReLU > Linear; False gives the pooled features.

    Attributes:
        dim: length of an embedding: `dim`, or the backbone's channels where there is no head.

    Raises:
        ValueError: unknown backbone, bad sizes, or a file of weights that does not fit.
        FileNotFoundError: no such file of weights.
        RuntimeError: torchvision's weights could not be downloaded.

    >>> net = EmbeddingNet("mobilenet_v3_small").eval()
    >>> net(torch.zeros(2, 3, 64, 32)).shape
    torch.Size([2, 128])
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        weights: str | Path | None = None,
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
        if weights is not None:
            load_backbone_weights(self.backbone, backbone, weights)
        if last_stride == 1:
            _unstride_last_block(self.backbone)
        for module in self.backbone.modules():
            if _is_strided_depthwise(module):
                module.__class__ = StridedDepthwise
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


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride, with a gradient that is quick on the CPU.

    PyTorch's own is so slow there in bfloat16 that the few of MobileNetV2 took nearly half of its training
    step (`make bench` has both). The values are the same, and so are the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ⌈H/stride⌉, ⌈W/stride⌉) of (B, C, H, W)."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or self.bias is not None:
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):  # which looks for the names of PyTorch's own functions
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return _StridedDepthwise.apply(x, weight, self.stride, self.padding)


class _StridedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        for_x = None
        if ctx.needs_input_grad[0]:
            # The gradient at the places that the stride left out is 0; with those, the stride is 1,
            # and the gradient of x is a forward convolution with the kernel turned round.
            spread = torch.zeros_like(x)
            spread[:, :, :: ctx.stride[0], :: ctx.stride[1]] = gradient
            turned = weight.flip(2, 3)
            for_x = nn.functional.conv2d(spread, turned, None, 1, ctx.padding, groups=len(weight))
        # PyTorch's gradient of the weight is quick.
        options = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), len(weight))
        for_weight = torch.ops.aten.convolution_backward(
            gradient, x, weight, *options, (False, ctx.needs_input_grad[1], False)
        )[1]
        return for_x, for_weight, None, None


def _is_strided_depthwise(module: nn.Module) -> bool:
    """Tell whether `StridedDepthwise` computes what the module does."""
    return (
        type(module) is nn.Conv2d
        and max(module.stride) > 1
        and module.groups == module.in_channels == module.out_channels
        and module.bias is None
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and module.kernel_size == tuple(2 * p + 1 for p in module.padding)
    )


def folded(model: nn.Module) -> nn.Module:
    """Return a copy for inference in which each convolution has taken in the BatchNorm after it.

    γ (W∗x − μ) / √(σ² + ε) + β is itself a convolution with a bias, so one pass over the image is
    saved. The BatchNorm of a convolution is taken to be the module that is registered after it, as in
    every backbone here.
    """
    model = copy.deepcopy(model).eval()
    leaves = [(name, m) for name, m in model.named_modules() if not [*m.children()]]
    for (name, convolution), (norm_name, norm) in pairwise(leaves):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(name, fuse_conv_bn_eval(convolution, norm))
            model.set_submodule(norm_name, nn.Identity())
    return model


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


def load_backbone_weights(backbone: nn.Module, name: str, weights: str | Path) -> None:
    """Load `"imagenet"` weights or a file of weights into a backbone, every key or none.

    A classifier in the file is passed over. Nothing is unpickled beyond tensors.

    Raises:
        ValueError: keys missing, unknown, or of another shape; a file that cannot be read.
        FileNotFoundError: no such file.
        RuntimeError: the download failed.
    """
    state = _imagenet_weights(name) if weights == "imagenet" else read_weights(weights)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
    own = backbone.state_dict()
    # Files older than PyTorch 0.4.1 lack BatchNorm's counter, which nothing here reads.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    broken = [k for k in own if k in state and not state[k].isfinite().all()]
    for keys, what in (
        (missing, "lacks"),
        (unknown, "has unknown"),
        (shapes, "has other shapes in"),
        (broken, "has NaN or infinity in"),
    ):
        if keys:
            raise ValueError(
                f"The weights {str(weights)!r} do not fit {name}: the file {what} {len(keys)} of its "
                f"{len(own)} keys: {_some(keys)}. It must be a state dict of torchvision's {name}."
            )
    backbone.load_state_dict(state, strict=False)


def _some(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's ImageNet weights, or take them from its cache."""
    _, source, _ = BACKBONES[name]
    if source is None:
        raise ValueError(f'There are no ImageNet weights of {name}: choose weights="none".')
    try:
        return source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"The ImageNet weights of {name} could not be had from {source.url} ({error}). "
            f"Download that file on a machine that can, and give its path: weights=PATH. "
            f'Or train from random weights: weights="none".'
        ) from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file, or with `weights_only=True` from any other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of weights, or a truncated one.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'There is no file of weights at {path}. Give a path, "imagenet", or "none".'
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen kinds
        cause = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as a file of weights: {cause}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (a dictionary of tensors by name).")
    return state
