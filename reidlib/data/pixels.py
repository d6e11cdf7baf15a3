"""Images as arrays: decoded once, to uint8, into a file that every later run maps into memory.

A re-ID data set is small and is read many times: Market-1501's 36,036 images are 0.9 GB of raw
pixels.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from reidlib.data.dataset import fingerprint
from reidlib.data.files import cut_of, open_image
from reidlib.paths import cache_dir
from reidlib.progress import progress
from reidlib.recipes import Recipe
from reidlib.runs import text_sha256, write_atomically, write_json

Size = tuple[int, int]  # height, width
# The texts of these errors name the path once more.
_CAUSES = {UnidentifiedImageError: "no image format that Pillow knows"}
_CAUSES |= {FileNotFoundError: "there is no such file"}
_FORMAT = 2  # of the cache files; a new one makes old files be ignored


def load_images(
    table: pd.DataFrame, recipe: Recipe, show_progress: bool = True, *, training: bool = False
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the pixels (N, H, W, 3) uint8 of images, and the rows of the table they belong to.

    Images that all have one size keep it, unless they are huge. Others are resized as they are decoded
    (bilinear, with antialiasing). They are decoded once, and memory-mapped from then on: the cache file
    is keyed by the data's fingerprint (paths, sizes and times of change of the files), the size and
    what to do with unreadable images, so a changed file is decoded again. What is written to the pixels
    never reaches the file.

    Args:
        table: `path` and what else; one row an image.
        recipe: says the size, and with `unreadable = "skip"` that broken images and their rows are
            left out.
        show_progress: draw a bar while decoding.
        training: images are to be cropped at random. Then they are resized to what the recipe crops
            from, not to the network's input: a crop need not enlarge them and blur them twice.

    Raises:
        ValueError: no rows, or unreadable images (named).
        OSError: the cache folder cannot be written; says how to move it.

    >>> from reidlib.data.tables import load
    >>> from reidlib.recipes import make_recipe
    >>> pixels, table = load_images(load("synthetic").query, make_recipe("demo"), show_progress=False)
    >>> len(pixels) == len(table), pixels.dtype
    (True, dtype('uint8'))
    """
    if len(table) == 0:
        raise ValueError("There are no images to load: the table has no rows.")
    enlarge = recipe.enlarge if training else 1
    size = (round(recipe.height * enlarge), round(recipe.width * enlarge))
    # Uncompressed and in their own size, a thousand phone photographs would fill 36 GB.
    most = math.inf if training else 16 * recipe.height * recipe.width
    paths, skip = table["path"].tolist(), recipe.unreadable == "skip"
    key = [_FORMAT, fingerprint(table, mtime=True), skip]
    own, resized = (
        cache_dir() / f"{text_sha256(json.dumps([*key, *more]))[:24]}.pixels"
        for more in ([], [training, *size])
    )
    try:
        cached = _mapped(own, most) or _mapped(resized, math.inf)
        if not cached:
            sizes = {*image_sizes(paths)} - {None}
            if not sizes:
                read_image(paths[0])  # raises: not one of them can be read
            keep = len(sizes) == 1 and max(map(math.prod, sizes)) <= most
            file, shape = (own, sizes.pop()) if keep else (resized, size)
            cached = _decode_all(file, paths, shape, skip, show_progress)
    except OSError as error:
        raise OSError(
            f"Decoded images are kept in {cache_dir()}, which cannot be written "
            f"({error.strerror or error}). Set REID_CACHE to a folder that can."
        ) from error
    pixels, left_out = cached
    kept = np.delete(np.arange(len(table)), left_out)
    return pixels, table.iloc[kept].reset_index(drop=True)


def read_image(path: str | Path) -> np.ndarray:
    """Decode one image file to (H, W, 3) uint8 RGB: the only decoder of the library.

    A part of an image, as `files.cut_of` knows it, is cut out of it. EXIF orientation is applied; grey,
    palette and CMYK become RGB; alpha is dropped; 16-bit grey keeps the upper 8 of as many bits (8, 10,
    12, 14 or 16) as the image needs, for many sensors have 12. A ValueError names a file that cannot be
    read, and the cause.
    """
    file, box = cut_of(path)
    whole = _decoded(file, os.stat(file).st_mtime_ns if os.path.exists(file) else 0)
    left, top, width, height = box or (0, 0, whole.shape[1], whole.shape[0])
    part = whole[top : top + height, left : left + width].copy()
    if not part.size:
        raise ValueError(f"cannot read the image {path}: the box lies outside of it")
    return part


def save_images(table: pd.DataFrame, folder: Path) -> None:
    """Write the images of a table as JPEG, a sub-folder for each identity, as `load` takes them."""
    for row, (path, pid) in enumerate(zip(table["path"], table["pid"], strict=True)):
        place = folder / str(pid)
        place.mkdir(parents=True, exist_ok=True)
        stem = Path(cut_of(path)[0]).stem
        Image.fromarray(read_image(path)).save(place / f"{stem}_{row:06d}.jpg", quality=95)


@lru_cache(maxsize=2)  # the many boxes of a frame follow one another
def _decoded(path: str, changed: int) -> np.ndarray:
    try:
        with open_image(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
                grey = np.asarray(image)
                spare = max(0, int(grey.max()).bit_length() - 7) // 2 * 2  # even: 9 bits are of 10
                image = Image.fromarray((grey >> spare).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} are no photograph; save as 8 bit")
            elif image.mode in ("P", "PA"):
                image = image.convert("RGBA")  # a transparent palette warns on its way to RGB
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except Exception as error:  # Pillow raises a dozen unrelated types on damaged files
        cause = _CAUSES.get(type(error)) or str(error) or type(error).__name__
        raise ValueError(f"cannot read the image {path}: {cause}") from error
    return pixels


def image_sizes(paths: Sequence[str]) -> list[Size | None]:
    """Return what sizes `read_image` will give, by the files' headers; None for unreadable ones."""

    def header(path: str) -> Size | None:
        file, box = cut_of(path)
        try:
            with open_image(file) as image:
                # EXIF orientations 5 to 8 lie on their side: decoding turns them upright.
                lying = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                down, across = image.size if lying else image.size[::-1]
                left, top, width, height = box or (0, 0, across, down)
                return max(0, min(height, down - top)), max(0, min(width, across - left))
        except Exception:  # Pillow raises a dozen unrelated types; `load_images` names the file
            return None

    return [*map(header, paths)]


def _mapped(file: Path, most: float) -> tuple[np.ndarray, list[int]] | None:
    """Map a cache file into memory: its pixels, and which rows of its table it lacks.

    None where it is missing, cut short or altered, to be made again, or where images have more than
    `most` pixels.
    """
    try:
        said = json.loads(file.with_suffix(".json").read_text())
        if math.prod(said["shape"][1:3]) > most:
            return None
        # Copy on write: torch wants memory that it could write to.
        pixels = np.memmap(file, np.uint8, "c", shape=tuple(said["shape"]))
        right = said["sha256"] == _digest(pixels, said["left_out"])
        return (pixels, said["left_out"]) if right else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(pixels: np.ndarray, left_out: list[int]) -> str:
    """Return a SHA-256 of what a cache file holds: a flipped bit or a zeroed page is seen."""
    digest = hashlib.sha256(repr((pixels.shape, left_out)).encode())
    digest.update(pixels)
    return digest.hexdigest()


def _decode_all(
    file: Path, paths: list[str], size: Size, skip: bool, show: bool
) -> tuple[np.ndarray, list[int]]:
    """Decode every image to a size, write the cache file, and return what `_mapped` would."""
    broken = {}  # row: what is wrong with it

    def decoded(path: str) -> Image.Image | ValueError:
        try:
            image = Image.fromarray(read_image(path))
            return image.resize(size[::-1], Image.Resampling.BILINEAR)
        except ValueError as error:
            return error

    def write(fresh: Path) -> None:
        words = {"total": len(paths), "desc": "decode images", "unit": "img", "show": show}
        with ThreadPool() as pool, open(fresh, "wb") as opened:
            for row, image in enumerate(progress(pool.imap(decoded, paths), **words)):
                if isinstance(image, ValueError):
                    broken[row] = str(image)
                else:
                    opened.write(image.tobytes())
        if broken and (not skip or len(broken) == len(paths)):
            shown = [*broken.values()][:10] + ["…"] * (len(broken) > 10)
            raise ValueError(
                f"{len(broken)} of {len(paths)} images cannot be read:\n" + "\n".join(shown) + "\n"
                'Replace them, or leave them out with unreadable="skip".'
            )

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, write, 3 * len(paths) * math.prod(size))
    shape = (len(paths) - len(broken), *size, 3)
    pixels, left_out = np.memmap(file, np.uint8, "c", shape=shape), [*broken]
    said = {"shape": shape, "left_out": left_out, "sha256": _digest(pixels, left_out)}
    write_json(file.with_suffix(".json"), said)
    return pixels, left_out
