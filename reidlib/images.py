"""Images as tensors: decoded once into a memory-mapped cache, augmented in batches.

A re-ID data set is small and is read many times: Market-1501's 36,036 images are 0.9 GB of raw
pixels. So they are decoded once, to uint8, into a file that every later run maps into memory, and
resize, crop, flip, erasing and normalisation are tensor operations on whole batches, on the device.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn.functional import interpolate

from reidlib.datasets import fingerprint, read_image
from reidlib.networks import IMAGENET_MEAN, IMAGENET_STD
from reidlib.paths import cache_dir
from reidlib.progress import progress

_FORMAT = 1  # of the cache files; a new one makes old files be ignored


def load_pixels(
    table: pd.DataFrame,
    size: tuple[int, int] | None = None,
    unreadable: str = "fail",
    show_progress: bool = True,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return all pixels of a table, decoded once and memory-mapped from then on.

    The cache file is keyed by the data's fingerprint (paths, sizes and times of change of the
    files), the size and what to do with unreadable images: a changed file is decoded again.

    Args:
        table: `path` and what else; one row an image.
        size: (height, width) to which images are resized as they are decoded (bilinear, with
            antialiasing); None keeps their own, which must then be the same for all.
        unreadable: `"fail"`, or `"skip"` to leave broken images out.
        show_progress: draw a bar while decoding.

    Returns:
        pixels: (N, H, W, 3) uint8, memory-mapped; what is written to it never reaches the file.
        table: the rows that the pixels belong to, with a fresh index: shorter than the one given
            only where unreadable images were skipped.

    Raises:
        ValueError: no rows; unreadable images (named); images of different sizes without `size`.
        OSError: the cache folder cannot be written; says how to move it.
    """
    if len(table) == 0:
        raise ValueError("There are no images to load: the table has no rows.")
    key = {"data": fingerprint(table, mtime=True), "size": size, "skip": unreadable == "skip"}
    key = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:24]
    file, kept_file = cache_dir() / f"{key}.npy", cache_dir() / f"{key}.kept.npy"
    cached = _read_cache(file, kept_file)
    if cached is None:
        _decode_all(table, size, unreadable, file, kept_file, show_progress)
        cached = _read_cache(file, kept_file)
    pixels, kept = cached
    return pixels, table.iloc[kept].reset_index(drop=True)


def _read_cache(file: Path, kept_file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Map a cache file into memory; None where it is missing or cut short, to be made again."""
    try:
        # Copy on write: torch wants memory that it could write to.
        return np.load(file, mmap_mode="c"), np.load(kept_file)
    except (OSError, ValueError, EOFError):
        return None


def _decode_all(table, size, unreadable, file: Path, kept_file: Path, show_progress) -> None:
    """Decode every image and write the cache file, complete or not at all."""
    paths = table["path"].tolist()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        kept_temporary = temporary.with_name(f"{temporary.name}.kept.npy")
        temporary.touch()
    except OSError as error:
        raise OSError(
            f"Decoded images are kept in {file.parent}, which cannot be written ({error.strerror}). "
            f"Set REID_CACHE to a folder that can."
        ) from error
    shape = (*(size or _first_size(paths)), 3)
    pixels = np.lib.format.open_memmap(
        temporary, mode="w+", dtype=np.uint8, shape=(len(paths), *shape)
    )

    def decode(row: int) -> str | None:
        """Put one image in its place; return what is wrong with it, if anything."""
        try:
            image = read_image(paths[row])
        except ValueError as error:
            return str(error)
        if size is not None and image.shape != shape:
            resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
            image = np.asarray(resized)
        if image.shape != shape:
            raise ValueError(
                f"Images differ in size: {paths[row]} has {image.shape[0]}×{image.shape[1]} pixels, "
                f"the first one {shape[0]}×{shape[1]}. Give size=(height, width)."
            )
        pixels[row] = image
        return None

    # Pillow lets other threads run while it decodes. Where an image takes a fraction of a
    # millisecond, as Market-1501's do, they only wait for each other.
    there = [os.path.getsize(path) for path in paths[:100] if os.path.isfile(path)]
    worth_it = there and np.median(there) > 50_000
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = (pool.map if worth_it else map)(decode, range(len(paths)))
            bar = progress(
                results, total=len(paths), desc="decode images", unit="img", show=show_progress
            )
            broken = {row: problem for row, problem in enumerate(bar) if problem}
        if broken and (unreadable != "skip" or len(broken) == len(paths)):
            shown = "\n".join([*broken.values()][:10]) + ("\n…" if len(broken) > 10 else "")
            raise ValueError(
                f"{len(broken)} of {len(paths)} images cannot be read:\n{shown}\n"
                f'Replace them, or leave them out with unreadable="skip".'
            )
        kept = np.setdiff1d(np.arange(len(paths)), [*broken])
        if broken:
            np.save(temporary, pixels[kept])
            temporary.with_name(temporary.name + ".npy").replace(temporary)
        else:
            pixels.flush()
        # Two runs started together decode the same images: each file is there whole, or not at all.
        np.save(kept_temporary, kept)
        os.replace(kept_temporary, kept_file)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
        kept_temporary.unlink(missing_ok=True)


def _first_size(paths: list[str]) -> tuple[int, int]:
    """Return (height, width) of the first image that can be read."""
    errors = []
    for path in paths:
        try:
            return read_image(path).shape[:2]
        except ValueError as error:
            errors.append(str(error))
    if len(paths) > 1:
        raise ValueError(f"None of the {len(paths)} images can be read. The first: {errors[0]}")
    raise ValueError(errors[0])


def image_sizes(paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """Return (height, width) of image files as `read_image` gives them; None for unreadable ones.

    Read from the files' headers, without decoding.
    """

    def header(path: str) -> tuple[int, int] | None:
        try:
            with Image.open(path) as image:
                # EXIF orientations 5 to 8 lie on their side: decoding turns them upright.
                lying = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return image.size if lying else image.size[::-1]
        except Exception:  # Pillow raises a dozen unrelated types; `load_pixels` names the file
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(header, paths))


def common_size(
    table: pd.DataFrame, otherwise: tuple[int, int], largest: int | None = None
) -> tuple[int, int] | None:
    """Return None where all images have one size, of up to `largest` pixels if that is given; else
    the size to decode them to.
    """
    sizes = set(image_sizes(table["path"])) - {None}
    huge = largest is not None and any(height * width > largest for height, width in sizes)
    return None if len(sizes) <= 1 and not huge else otherwise


class Augmentation:
    """Batches of uint8 pixels to batches of network input, at random for training.

    In this order: resize to `enlarge` times the input, random crop to the input, random flip,
    normalisation, random erasing. Resized pixels are rounded to whole numbers, as Pillow's and so
    torchvision's are. The random numbers come from a generator of its own on the CPU, so that the
    same seed gives the same crops on every device; `generator` is its state to save.

    Args:
        size: (height, width) of the network's input, in pixels.
        enlarge: images are resized to this times `size` before the crop; 1 leaves no room to crop.
        flip: flip each image with probability ½.
        erasing: probability that a rectangle of an image is erased (arXiv 1708.04896: an area of 2 to
            40 % of the image, aspect ratio 0.3 to 3.33, filled with the mean colour).
        normalise: `"imagenet"` (mean and deviation) or `"unit"` (pixels in [0, 1]).
        seed: of the generator.

    `augmentation(pixels)` takes (B, H, W, 3) uint8 on any device and returns (B, 3, h, w) float32
    there; `augmentation.plain(pixels)` resizes and normalises only, as evaluation does.

    >>> augment = Augmentation((32, 16), enlarge=1.125)
    >>> augment(torch.zeros(5, 128, 64, 3, dtype=torch.uint8)).shape
    torch.Size([5, 3, 32, 16])
    """

    def __init__(
        self,
        size: tuple[int, int],
        enlarge: float = 1.0,
        flip: bool = True,
        erasing: float = 0.0,
        normalise: str = "imagenet",
        seed: int = 0,
    ):
        self.size = tuple(size)
        self.enlarged = (round(size[0] * enlarge), round(size[1] * enlarge))
        self.flip, self.erasing, self.normalise = flip, erasing, normalise
        self.generator = torch.Generator().manual_seed(seed)

    def plain(self, pixels: Tensor) -> Tensor:
        """Return (B, 3, h, w) resized and normalised, with nothing random."""
        return self._normalised(_resized(pixels, self.size))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (B, 3, h, w) with random crop, flip and erasing."""
        images = self._normalised(self._resized_crop_and_flip(pixels).permute(0, 3, 1, 2))
        return self._erased(images) if self.erasing else images

    def _uniform(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator)

    def _resized_crop_and_flip(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, h, w, 3) float32 in [0, 255].

        The enlarged image has whole numbers, as Pillow's has: in uint8 the CPU makes it ten times as
        fast. Images are mirrored while they are small, and their crops with them.
        """
        b, (h, w) = len(pixels), self.size
        room_y, room_x = self.enlarged[0] - h, self.enlarged[1] - w
        # Always drawn, so that switching one kind off does not change the others.
        top = (self._uniform(b) * (room_y + 1)).long()
        left = (self._uniform(b) * (room_x + 1)).long()
        flipped = (self._uniform(b) < 0.5) & self.flip
        left = torch.where(flipped, room_x - left, left).tolist()
        mirror = flipped.to(pixels.device)[:, None, None, None]
        pixels = torch.where(mirror, pixels.flip(2), pixels)
        if pixels.shape[1:3] != self.enlarged:
            images = pixels.permute(0, 3, 1, 2)  # (B, 3, H, W), channels last in memory
            if pixels.device.type == "cpu":
                images = interpolate(images, self.enlarged, mode="bilinear", antialias=True)
            else:  # only the CPU has it in uint8
                images = _resized(pixels, self.enlarged).round()
            pixels = images.permute(0, 2, 3, 1)  # (B, H', W', 3)
        out = torch.empty((b, h, w, 3), dtype=pixels.dtype, device=pixels.device)
        # On the CPU by NumPy: torch would wake its threads for each of these small copies.
        views = (x.numpy() if x.device.type == "cpu" else x for x in (out, pixels))
        for image, whole, y, x in zip(*views, top.tolist(), left, strict=True):
            image[:] = whole[y : y + h, x : x + w]
        return out.float()

    def _normalised(self, images: Tensor) -> Tensor:
        """Of (B, 3, h, w) in [0, 255], written over."""
        if self.normalise == "unit":
            return images.div_(255)
        # A row of the image as one, channels last: a vector as short as three numbers is slow.
        width = images.shape[3]
        mean, std = (
            torch.tensor(x, device=images.device).repeat(width)
            for x in (IMAGENET_MEAN, IMAGENET_STD)
        )
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, h, w 3)
        rows = rows.div_(255).sub_(mean).div_(std)
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)

    def _erased(self, images: Tensor) -> Tensor:
        """Fill one rectangle of some images with the data's mean colour."""
        b, (h, w) = len(images), self.size
        chosen = self._uniform(b) < self.erasing
        area = (0.02 + 0.38 * self._uniform(b)) * h * w
        log_aspect = (2 * self._uniform(b) - 1) * np.log(1 / 0.3)
        # A rectangle that would not fit is cut at the image's size, where the paper draws again.
        height = (area * log_aspect.exp()).sqrt().round().clamp(1, h)
        width = (area / log_aspect.exp()).sqrt().round().clamp(1, w)
        top = (self._uniform(b) * (h - height + 1)).floor()
        left = (self._uniform(b) * (w - width + 1)).floor()
        y, x = torch.arange(h), torch.arange(w)
        inside_y = (y >= top[:, None]) & (y < (top + height)[:, None])  # (B, h)
        inside_x = (x >= left[:, None]) & (x < (left + width)[:, None])  # (B, w)
        # (B, 1, h, w): true where a pixel is erased
        mask = (inside_y[:, None, :, None] & inside_x[:, None, None, :]) & chosen[
            :, None, None, None
        ]
        fill = 0.0 if self.normalise == "imagenet" else 0.5
        return images.masked_fill(mask.to(images.device), fill)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, h, w) float32 in [0, 255], bilinear with antialiasing."""
    images = pixels.permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels last in memory
    if images.shape[2:] == size:
        return images
    return interpolate(images, size=size, mode="bilinear", antialias=True)
