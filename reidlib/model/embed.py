"""Images to embeddings: batches, flips and crops, and files on disk."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from reidlib.data.augment import Augmentation
from reidlib.data.tables import image_list
from reidlib.model.device import autocast, bfloat16_problem
from reidlib.progress import progress
from reidlib.recipes import Recipe
from reidlib.runs import write_atomically

VIEWS = ("plain", "mirrored", "crops", "mirrored crops")


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

    A ValueError if there is no image or no such view, or if bfloat16 is wrong there.
    """
    if len(pixels) == 0:
        raise ValueError("There are no images to embed.")
    if not views or not set(views) <= set(VIEWS):
        raise ValueError(f"views = {views!r}: choose some of {', '.join(VIEWS)}.")
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
    return {view: torch.cat(of_view).numpy() for view, of_view in parts.items()}


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


def write_embeddings(
    path: str | Path, emb: np.ndarray | Tensor, table: pd.DataFrame, about: Mapping | None = None
) -> None:
    """Write embeddings and what they belong to as HDF5, atomically.

    Four datasets: `emb` (N, D) float32, `pid` and `camid` (N) int64, `path` (N) UTF-8 strings. What
    `about` says of them (weights, flips, precision) becomes attributes of the file.

    >>> from tempfile import TemporaryDirectory
    >>> table = pd.DataFrame({"path": ["a.jpg"], "pid": [1], "camid": [1]})
    >>> with TemporaryDirectory() as folder:
    ...     write_embeddings(f"{folder}/here.h5", np.eye(1, 128), table)
    """
    emb = np.asarray(emb, dtype=np.float32)
    if len(emb) != len(table):
        raise ValueError(f"{len(emb)} embeddings do not belong to a table of {len(table)} rows.")

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w") as file:
            file.attrs.update(about or {})
            file["emb"] = emb
            file["pid"] = table["pid"].to_numpy(np.int64)
            file["camid"] = table["camid"].to_numpy(np.int64)
            file.create_dataset("path", data=table["path"].tolist(), dtype=h5py.string_dtype())

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def read_about(path: str | Path) -> dict[str, str]:
    """Return what a file of embeddings says of itself: nothing, if it comes from elsewhere."""
    try:
        with h5py.File(path, "r") as file:
            return dict(file.attrs)
    except OSError:
        return {}


def read_embeddings(
    path: str | Path, csv: str | Path | None = None
) -> tuple[np.ndarray, pd.DataFrame]:
    """Read an HDF5 file of embeddings, from here or from another toolkit.

    Args:
        path: a file with `emb` (N, D), and `pid`, `camid` and `path`.
        csv: for a file with `emb` alone, as triplet-reid writes it, the list of its images
            (`pid,path[,camid]`).

    Returns:
        Embeddings (N, D) as stored, and their table, with "" and −1 where the file does not say.

    Raises:
        FileNotFoundError, ValueError: no such file, not HDF5, no `emb`, no identities, or lengths
            that differ.

    >>> from tempfile import TemporaryDirectory
    >>> table = pd.DataFrame({"path": ["a.jpg"], "pid": [1], "camid": [1]})
    >>> with TemporaryDirectory() as folder:
    ...     write_embeddings(f"{folder}/here.h5", np.eye(1, 128), table)
    ...     read_embeddings(f"{folder}/here.h5")[1]
        path  pid  camid
    0  a.jpg    1      1
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no embedding file {path}.")
    try:
        with h5py.File(path, "r") as file:
            content = {key: file[key][()] for key in ("emb", "pid", "camid", "path") if key in file}
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5: {error}.") from error
    if "emb" not in content:
        raise ValueError(f"{path} has no dataset 'emb' with the embeddings.")
    emb = content["emb"]
    if emb.ndim != 2 or emb.dtype.kind != "f":
        raise ValueError(f"'emb' in {path} must be (N, D) floats, not {emb.shape} {emb.dtype}.")
    if csv is not None:
        table = image_list(csv, must_exist=False)
    elif "pid" in content:
        paths = content.get("path", [b""] * len(content["pid"]))
        table = pd.DataFrame({"path": [name.decode() for name in paths], "pid": content["pid"]})
        table = table.assign(camid=content.get("camid", -1)).astype({"pid": int, "camid": int})
    else:
        raise ValueError(f"{path} does not say who is in its images: give their list as CSV.")
    if len(table) != len(emb):
        raise ValueError(f"{path} has {len(emb)} embeddings, the list of images {len(table)} rows.")
    return emb, table


def folded(model: nn.Module) -> nn.Module:
    """Return a copy for inference in which each convolution has taken in the BatchNorm after it.

    γ (W∗x − μ) / √(σ² + ε) + β is itself a convolution with a bias. The BatchNorm of a convolution is
    taken to be the module that is registered after it, as in every backbone here.
    """
    model = copy.deepcopy(model).eval()
    leaves = [(name, m) for name, m in model.named_modules() if not [*m.children()]]
    for (name, convolution), (norm_name, norm) in pairwise(leaves):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(name, fuse_conv_bn_eval(convolution, norm))
            model.set_submodule(norm_name, nn.Identity())
    return model
