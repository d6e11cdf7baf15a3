"""Images as arrays: decoded once, to uint8, into a file that every later run maps into memory.

A re-ID data set is small and is read many times: Market-1501's 36,036 images are 0.9 GB of raw
pixels. `load_images` is for images to embed, `load_training_images` for images to crop. Both keep
the size that all images share, and else decode them to a size that suits the recipe.
"""

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from reidlib.data.dataset import fingerprint
from reidlib.data.files import cut_of, open_image
from reidlib.paths import cache_dir
from reidlib.progress import progress
from reidlib.recipes import Recipe
from reidlib.runs import write_atomically

Size = tuple[int, int]  # height, width
# The texts of these errors name the path once more.
_CAUSES = {UnidentifiedImageError: "no image format that Pillow knows"}
_CAUSES |= {FileNotFoundError: "there is no such file"}
_FORMAT = 1  # of the cache files; a new one makes old files be ignored


def load_images(
    table: pd.DataFrame, recipe: Recipe, show_progress: bool = True
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the pixels (N, H, W, 3) of images to embed, and the rows of the table they belong to.

    Images that all have one size keep it, unless they are huge. Others are resized, as they are
    decoded, to the network's input. Raises what `load_pixels` raises.

    >>> from reidlib.data.tables import load
    >>> from reidlib.recipes import make_recipe
    >>> pixels, table = load_images(load("synthetic").query, make_recipe("demo"), show_progress=False)
    >>> len(pixels) == len(table), pixels.dtype
    (True, dtype('uint8'))
    """
    size = (recipe.height, recipe.width)
    # Uncompressed and in their own size, a thousand phone photographs would fill 36 GB.
    largest = 16 * recipe.height * recipe.width
    return load_pixels(table, size, largest, recipe.unreadable, show_progress)


def load_training_images(
    table: pd.DataFrame, recipe: Recipe, show_progress: bool = True
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the pixels (N, H, W, 3) of images to crop at random, and the rows they belong to.

    As `load_images`, but images of several sizes are resized to what the recipe crops from: larger
    than the network's input, so that the crop need not enlarge them and blur them twice.
    """
    size = (round(recipe.height * recipe.enlarge), round(recipe.width * recipe.enlarge))
    return load_pixels(table, size, None, recipe.unreadable, show_progress)


def load_pixels(
    table: pd.DataFrame, otherwise: Size, largest: int | None, unreadable: str, show_progress: bool
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return all pixels of a table, decoded once and memory-mapped from then on, and its rows.

    The cache file is keyed by the data's fingerprint (paths, sizes and times of change of the
    files), the size and what to do with unreadable images: a changed file is decoded again. What
    is written to the pixels, (N, H, W, 3) uint8, never reaches the file.

    Args:
        table: `path` and what else; one row an image.
        otherwise: (height, width) to which images are resized as they are decoded (bilinear, with
            antialiasing), where they do not all have one size.
        largest: pixels of an image that may keep its size; None: any.
        unreadable: `"fail"`, or `"skip"` to leave broken images and their rows out.
        show_progress: draw a bar while decoding.

    Raises:
        ValueError: no rows, or unreadable images (named).
        OSError: the cache folder cannot be written; says how to move it.
    """
    if len(table) == 0:
        raise ValueError("There are no images to load: the table has no rows.")
    data, paths, skip = fingerprint(table, mtime=True), table["path"].tolist(), unreadable == "skip"
    try:
        pixels, kept = _cached(data, paths, otherwise, largest, skip, show_progress)
    except OSError as error:
        raise OSError(
            f"Decoded images are kept in {cache_dir()}, which cannot be written "
            f"({error.strerror or error}). Set REID_CACHE to a folder that can."
        ) from error
    return pixels, table.iloc[kept].reset_index(drop=True)


def read_image(path: str | Path) -> np.ndarray:
    """Decode one image file to (H, W, 3) uint8 RGB: the only decoder of the library.

    A part of an image, as `files.cut_of` knows it, is cut out of it. EXIF orientation is applied; grey,
    palette and CMYK become RGB; alpha is dropped; 16-bit grey keeps the upper 8 of as many bits (8, 10,
    12, 14 or 16) as the image needs, for many sensors have 12. A ValueError names a file that cannot be
    read, and the cause.
    """
    file, box = cut_of(path)
    if not box:
        return _decoded(path)
    left, top, width, height = box
    whole = _frame(file, os.path.getmtime(file) if os.path.exists(file) else 0)
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
def _frame(file: str, changed: float) -> np.ndarray:
    return _decoded(file)


def _decoded(path: str | Path) -> np.ndarray:
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
        except Exception:  # Pillow raises a dozen unrelated types; `load_pixels` names the file
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(header, paths))


def _cached(
    data: str, paths: list[str], otherwise: Size, largest: int | None, skip: bool, show: bool
) -> list[np.ndarray]:
    """Return the mapped pixels and the rows that they belong to, made where they are not there."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    sizes_file = folder / f"{data[:24]}.sizes.npy"  # so that a second start reads no header
    found = {None}
    if not (known := _mapped(sizes_file)):
        found = set(image_sizes(paths))
        known = [np.array(sorted(found - {None}), np.int64).reshape(-1, 2)]
    (sizes,) = known  # each (height, width) that there is: (n, 2)
    if not len(sizes):
        read_image(paths[0])  # raises: not one of them can be read
    huge = largest is not None and (sizes.prod(axis=1) > largest).any()
    size = otherwise if len(sizes) > 1 or huge else None  # None: their own
    key = {"data": data, "size": size, "skip": skip}
    key = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:24]
    files = folder / f"{key}.npy", folder / f"{key}.kept.npy"
    if not (cached := _mapped(*files)):
        shape = size or tuple(sizes[0].tolist())
        # Two runs started together decode the same images: each file is whole, or not there.
        decode = partial(_decode_all, paths, shape, skip, show, files[1])
        write_atomically(files[0], decode, size=3 * len(paths) * shape[0] * shape[1])
        cached = _mapped(*files)
    if None not in found:  # what cannot be read today may be there tomorrow
        write_atomically(sizes_file, partial(_save, sizes))
    return cached


def _mapped(*files: Path) -> list[np.ndarray] | None:
    """Map cache files into memory; None where one is missing, cut short or altered, to be made again."""
    arrays = []
    try:
        for path in files:
            # Copy on write: torch wants memory that it could write to.
            arrays.append(np.load(path, mmap_mode="c"))
            with open(path, "rb") as file:
                file.seek(arrays[-1].offset + arrays[-1].nbytes)
                if file.read() != _checksums(arrays[-1]):
                    return None
    except (OSError, ValueError, EOFError):
        return None
    return arrays


def _checksums(array: np.ndarray) -> bytes:
    """Return what stands behind an array in its file: the CRC-32 of each 16 MB.

    A flipped bit or a zeroed page is seen. Market-1501's 0.9 GB take half a second.
    """
    flat = array.reshape(-1).view(np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib counts outside Python's lock
        sums = pool.map(zlib.crc32, np.split(flat, range(1 << 24, len(flat), 1 << 24)))
        return np.fromiter(sums, "<u4").tobytes()


def _save(array: np.ndarray, file: Path) -> None:
    with open(file, "wb") as opened:  # to a path NumPy would append its suffix
        np.save(opened, array)
        opened.write(_checksums(array))


def _decode_all(
    paths: list[str], shape: Size, skip: bool, show: bool, kept_file: Path, file: Path
) -> None:
    """Decode every image to a shape, and write the pixels and the rows that they belong to."""
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (len(paths), *shape, 3))
    with open(file, "rb+") as opened:  # a disk that is full later would end the process
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except (AttributeError, OSError) as error:  # macOS and some disks cannot
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise

    def decode(row: int) -> str | None:
        """Put one image in its place; return what is wrong with it, if anything."""
        try:
            image = read_image(paths[row])
        except ValueError as error:
            return str(error)
        if image.shape != pixels.shape[1:]:
            image = Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR)
        pixels[row] = image
        return None

    # Pillow lets other threads run while it decodes. Where an image takes a fraction of a
    # millisecond, as Market-1501's do, they only wait for each other.
    bytes_each = [os.path.getsize(path) for path in paths[:100] if os.path.isfile(path)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        over = pool.map if np.median(bytes_each or [0]) > 50_000 else map
        words = {"desc": "decode images", "unit": "img", "show": show}
        problems = [*progress(over(decode, range(len(paths))), total=len(paths), **words)]
    broken = [problem for problem in problems if problem]
    if broken and (not skip or len(broken) == len(paths)):
        shown = "\n".join(broken[:10]) + ("\n…" if len(broken) > 10 else "")
        raise ValueError(
            f"{len(broken)} of {len(paths)} images cannot be read:\n{shown}\n"
            f'Replace them, or leave them out with unreadable="skip".'
        )
    kept = np.array([row for row, problem in enumerate(problems) if not problem])
    if broken:
        _save(pixels[kept], file)
    else:
        pixels.flush()
        with open(file, "ab") as opened:
            opened.write(_checksums(pixels))
    write_atomically(kept_file, partial(_save, kept))
