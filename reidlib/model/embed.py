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
    model: nn.Module,
    pixels: np.ndarray,
    recipe: Recipe,
    flip: bool = False,
    batch: int | None = None,
    precision: str = "float32",
    show_progress: bool = True,
) -> np.ndarray:
    """Return the embeddings (N, D) float32 of uint8 pixels (N, H, W, 3).

    Args:
        model: the network; used as in evaluation mode, and left as it is.
        pixels: what `load_images` returned.
        recipe: says the size and the normalisation of the input.
        flip: embed the mirrored image too and take the mean of both.
        batch: images at a time; by default 16 on the CPU, whose caches hold what a layer makes of
            them (twice as fast as 128 at 256×128), and 128 elsewhere.
        precision: `"float32"`, the default, gives the same scores on every machine, on CUDA too:
            its TensorFloat32 is switched off. `"bfloat16"` is faster and moves them by some
            hundredths of a point.
        show_progress: draw a bar.

    Raises:
        ValueError: no images.

    >>> from reidlib.model.weights import build_model
    >>> from reidlib.recipes import make_recipe
    >>> recipe = make_recipe("demo")
    >>> pixels = np.zeros((2, recipe.height, recipe.width, 3), np.uint8)
    >>> embed(build_model(recipe), pixels, recipe, show_progress=False).shape
    (2, 128)
    """
    names = ("plain", "mirrored") if flip else ("plain",)
    views = embed_views(model, pixels, recipe, names, batch, precision, show_progress)
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
    section 4.3) is the mean of these last two. Crops cost five times a plain view, unless
    `enlarge` is 1: then they are the plain image, and embedded once.

    Args:
        views: some of `VIEWS`, each computed once; the other arguments are those of `embed`.

    Raises:
        ValueError: no images, no such view, or bfloat16 where it is wrong.
    """
    if len(pixels) == 0:
        raise ValueError("There are no images to embed.")
    if not views or not set(views) <= set(VIEWS):
        raise ValueError(f"views = {views!r}: choose some of {', '.join(VIEWS)}.")
    size = (recipe.height, recipe.width)
    enlarged = (round(recipe.height * recipe.enlarge), round(recipe.width * recipe.enlarge))
    # A view, its mirror image, and the size from which it is cut out.
    kinds = [("plain", "mirrored", size), ("crops", "mirrored crops", enlarged)]
    device = next(model.parameters()).device
    if precision == "bfloat16" and (problem := bfloat16_problem(recipe, device)):
        raise ValueError(problem)
    batch = batch or (16 if device.type == "cpu" else 128)
    model = folded(model).to(memory_format=torch.channels_last)
    # On CUDA, float32 convolutions would be rounded to TensorFloat32's ten bits.
    flags = {key: getattr(cudnn, key) for key in ("enabled", "benchmark", "deterministic")}
    flags["allow_tf32"] = False
    parts = {view: [] for view in views}
    bar = progress(total=len(pixels), desc="embed", unit="img", show=show_progress)
    for start in range(0, len(pixels), batch):
        block = torch.from_numpy(np.ascontiguousarray(pixels[start : start + batch])).to(device)
        for straight, mirrored, resized in kinds:
            if not {straight, mirrored} & parts.keys():
                continue
            augmentation = Augmentation(resized, normalise=recipe.normalise)
            # One (B, 3, h, w), or five.
            cut = _five_crops(augmentation.plain(block), size)
            cut = [images.contiguous(memory_format=torch.channels_last) for images in cut]
            with autocast(device, precision), cudnn.flags(**flags):
                for view in {straight, mirrored} & parts.keys():
                    sides = [images.flip(3) for images in cut] if view == mirrored else cut
                    emb = sum(model(images).float() for images in sides) / len(sides)  # (B, D)
                    parts[view].append(emb.cpu())
        bar.update(len(block))
    bar.close()
    return {view: torch.cat(of_view).numpy() for view, of_view in parts.items()}


def _five_crops(images: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """(B, 3, H, W) to four corners and the centre, each (B, 3, h, w); itself, if of that size."""
    (h, w), (room_y, room_x) = size, (images.shape[2] - size[0], images.shape[3] - size[1])
    if room_y == room_x == 0:
        return [images]
    corners = [(y, x) for y in (0, room_y) for x in (0, room_x)]
    places = [*corners, (room_y // 2, room_x // 2)]
    return [images[:, :, y : y + h, x : x + w] for y, x in places]


def write_embeddings(
    path: str | Path,
    emb: np.ndarray | Tensor,
    table: pd.DataFrame,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write embeddings and what they belong to as HDF5, atomically.

    Four datasets: `emb` (N, D) float32, `pid` and `camid` (N) int64, `path` (N) UTF-8 strings. What
    `about` says of them (weights, flips, precision) becomes attributes of the file.

    >>> from tempfile import TemporaryDirectory
    >>> table = pd.DataFrame({"path": ["a.jpg", "b.jpg"], "pid": [1, 2], "camid": [1, 1]})
    >>> with TemporaryDirectory() as folder:
    ...     write_embeddings(f"{folder}/here.h5", np.eye(2, 128), table)
    ...     emb, same = read_embeddings(f"{folder}/here.h5")
    >>> emb.shape, same["pid"].tolist()
    ((2, 128), [1, 2])
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
        path: a file with `emb` (N, D), and `pid`, `camid` and `path`; or with `emb` alone, as
            triplet-reid writes it.
        csv: for a file with `emb` alone, the list of images it belongs to (`pid,path[,camid]`).

    Returns:
        emb: (N, D) floating point, as stored.
        table: `path`, `pid`, `camid` (−1 where the file does not say).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5, no `emb`, no identities, or lengths that differ.

    >>> from tempfile import TemporaryDirectory
    >>> table = pd.DataFrame({"path": ["a.jpg", "b.jpg"], "pid": [1, 2], "camid": [1, 1]})
    >>> with TemporaryDirectory() as folder:
    ...     write_embeddings(f"{folder}/here.h5", np.eye(2, 128), table)
    ...     emb, same = read_embeddings(f"{folder}/here.h5")
    >>> emb.shape, same["pid"].tolist()
    ((2, 128), [1, 2])
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
    if emb.ndim != 2 or not np.issubdtype(emb.dtype, np.floating):
        raise ValueError(
            f"'emb' in {path} must be (N, D) floating point, not {emb.shape} {emb.dtype}."
        )
    if csv is not None:
        table = image_list(csv, must_exist=False)
    elif "pid" in content:
        n = len(content["pid"])
        paths = [
            p.decode() if isinstance(p, bytes) else str(p) for p in content.get("path", [""] * n)
        ]
        table = pd.DataFrame(
            {"path": paths, "pid": content["pid"], "camid": content.get("camid", np.full(n, -1))}
        ).astype({"pid": np.int64, "camid": np.int64})
    else:
        raise ValueError(
            f"{path} does not say who is in its images: give the list it belongs to as CSV."
        )
    if len(table) != len(emb):
        raise ValueError(
            f"{path} holds {len(emb)} embeddings, the list of its images {len(table)} rows."
        )
    return emb, table


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
