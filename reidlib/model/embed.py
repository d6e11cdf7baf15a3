"""Images to embeddings: batches, flips and crops."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from reidlib.data.augment import Augmentation
from reidlib.model.device import autocast, bfloat16_problem
from reidlib.progress import progress
from reidlib.recipes import Recipe

VIEWS = ("plain", "mirrored", "crops", "mirrored crops")
PRECISIONS = ("float32", "bfloat16")


def embed(
    model: nn.Module, pixels: np.ndarray, recipe: Recipe, flip: bool = False, **options
) -> np.ndarray:
    """Return the embeddings (N, D) float32 of uint8 pixels (N, H, W, 3).

    Args:
        model: the network; used as in evaluation mode, and left as it is.
        pixels: what `load_images` returned.
        recipe: says the size and the normalisation of the input.
        flip: embed the mirrored image too and take the mean of both.
        options: `batch`, `precision` and `show_progress`; they and the errors are `embed_views`'s.

    >>> from reidlib.model.weights import build_model
    >>> from reidlib.recipes import make_recipe
    >>> recipe = make_recipe("demo")
    >>> pixels = np.zeros((2, recipe.height, recipe.width, 3), np.uint8)
    >>> embed(build_model(recipe), pixels, recipe, show_progress=False).shape
    (2, 128)
    """
    views = embed_views(model, pixels, recipe, VIEWS[:2] if flip else VIEWS[:1], **options)
    return sum(views.values()) / len(views)


@torch.inference_mode()
def embed_views(
    model: nn.Module,
    pixels: np.ndarray,
    recipe: Recipe,
    views: Sequence[str] = VIEWS,
    batch: int | None = None,
    precision: str = "float32",
    show_progress: bool = True,
) -> dict[str, np.ndarray]:
    """Return the embeddings (N, D) float32 of each view, for test-time augmentation.

    `"plain"` is the whole image, `"mirrored"` its mirror image. `"crops"` is the mean over five: the
    image enlarged as in training (`recipe.enlarge`), its four corners and its centre cut out;
    `"mirrored crops"` the same of the mirror images. The paper's augmentation (arXiv 1703.07737,
    section 4.3) is the mean of these last two. Where `enlarge` is 1, crops are the plain image.

    Args:
        views: some of `VIEWS`.
        batch: images at a time; by default 16 on the CPU, whose caches hold what a layer makes of
            them (twice as fast as 128 at 256×128), and 128 elsewhere.
        precision: `"float32"` gives the same scores on every machine, for TensorFloat32 is switched
            off; `"bfloat16"` is faster and moves them by some hundredths of a point.

    A ValueError if there is no image, no such view or precision, or if bfloat16 is wrong there; and if
    the network gives NaN or infinity.
    """
    if len(pixels) == 0:
        raise ValueError("There are no images to embed.")
    if not views or not set(views) <= set(VIEWS):
        raise ValueError(f"views = {views!r}: choose some of {', '.join(VIEWS)}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision = {precision!r}: choose {' or '.join(PRECISIONS)}.")
    device = next(model.parameters()).device
    if precision == "bfloat16" and (problem := bfloat16_problem(recipe, device)):
        raise ValueError(problem)
    batch = batch or (16 if device.type == "cpu" else 128)
    model = folded(model).to(memory_format=torch.channels_last)
    # On CUDA, float32 convolutions would be rounded to TensorFloat32's ten bits.
    flags = {key: getattr(cudnn, key) for key in ("enabled", "benchmark", "deterministic")}
    parts = {view: [] for view in views}
    with progress(total=len(pixels), desc="embed", unit="img", show=show_progress) as bar:
        for start in range(0, len(pixels), batch):
            block = torch.from_numpy(np.ascontiguousarray(pixels[start : start + batch])).to(device)
            for view, of_view in parts.items():
                images = _inputs(block, recipe, view)
                with autocast(device, precision), cudnn.flags(**flags, allow_tf32=False):
                    emb = sum(model(x).float() for x in images) / len(images)  # (B, D)
                of_view.append(emb.cpu())
            bar.update(len(block))
    views = {view: torch.cat(of_view).numpy() for view, of_view in parts.items()}
    if not all(np.isfinite(emb).all() for emb in views.values()):
        raise ValueError(
            "The network gives NaN or infinity for some of these images: its weights are damaged, or "
            "its training diverged. Take weights from before that."
        )
    return views


def _inputs(pixels: Tensor, recipe: Recipe, view: str) -> list[Tensor]:
    """(B, H, W, 3) to what a view shows the network: one (B, 3, h, w), or five for crops."""
    h, w = recipe.height, recipe.width
    enlarge = recipe.enlarge if "crops" in view else 1
    size = (round(h * enlarge), round(w * enlarge))
    images = Augmentation(size, normalise=recipe.normalise).plain(pixels)
    y, x = size[0] - h, size[1] - w  # room to crop
    places = [(0, 0), (0, x), (y, 0), (y, x), (y // 2, x // 2)] if y or x else [(0, 0)]
    cut = [images[:, :, y : y + h, x : x + w] for y, x in places]
    if "mirrored" in view:
        cut = [images.flip(3) for images in cut]
    return [images.contiguous(memory_format=torch.channels_last) for images in cut]


def folded(model: nn.Module) -> nn.Module:
    """Return a copy for inference in which each convolution has taken in the BatchNorm after it.

    γ (W∗x − μ) / √(σ² + ε) + β is itself a convolution with a bias. The BatchNorm of a convolution is
    taken to be the module that is registered after it, as in every backbone here. Networks of timm, where
    it may be another, or hold an activation, stay as they are.
    """
    model = copy.deepcopy(model).eval()
    if hasattr(getattr(model, "backbone", None), "pretrained_cfg"):
        return model
    leaves = [(name, m) for name, m in model.named_modules() if not [*m.children()]]
    for (name, convolution), (norm_name, norm) in pairwise(leaves):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(name, fuse_conv_bn_eval(convolution, norm))
            model.set_submodule(norm_name, nn.Identity())
    return model
