"""Images as arrays: decoded once, to uint8, into a file that every later run maps into memory.

A re-ID data set is small and is read many times: Market-1501's 36,036 images are 0.9 GB of raw
pixels. `load_images` is for images to embed, `load_training_images` for images to crop. Both keep
the size that all images share, and else decode them to a size that suits the recipe.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from reidlib.data.tables import fingerprint
from reidlib.paths import cache_dir
from reidlib.progress import progress
from reidlib.recipes import Recipe

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
    # Uncompressed and in their own size, a thousand phone photographs would fill 36 GB.
    largest = 16 * recipe.height * recipe.width
    return _load(table, (recipe.height, recipe.width), largest, recipe, show_progress)


def load_training_images(
    table: pd.DataFrame, recipe: Recipe, show_progress: bool = True
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the pixels (N, H, W, 3) of images to crop at random, and the rows they belong to.

    As `load_images`, but images of several sizes are resized to what the recipe crops from: larger
    than the network's input, so that the crop need not enlarge them and blur them twice.
    """
    enlarged = (round(recipe.height * recipe.enlarge), round(recipe.width * recipe.enlarge))
    return _load(table, enlarged, None, recipe, show_progress)


def _load(
    table: pd.DataFrame,
    otherwise: tuple[int, int],
    largest: int | None,
    recipe: Recipe,
    show_progress: bool,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Load images in the size that all of them have, or in `otherwise` where that will not do."""
    data = fingerprint(table, mtime=True) if len(table) else ""
    size = common_size(table, otherwise, largest, data)
    return load_pixels(table, size, recipe.unreadable, show_progress, data)


def load_pixels(
    table: pd.DataFrame,
    size: tuple[int, int] | None = None,
    unreadable: str = "fail",
    show_progress: bool = True,
    data: str = "",
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
        data: `fingerprint(table, mtime=True)`, where it is known already.

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
    data = data or fingerprint(table, mtime=True)
    key = {"data": data, "size": size, "skip": unreadable == "skip"}
    key = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()[:24]
    file, kept_file = cache_dir() / f"{key}.npy", cache_dir() / f"{key}.kept.npy"
    if not (cached := _read_cache(file, kept_file)):
        _decode_all(table["path"].tolist(), size, unreadable, file, kept_file, show_progress)
        cached = _read_cache(file, kept_file)
    pixels, kept = cached
    return pixels, table.iloc[kept].reset_index(drop=True)


# --- one image


def read_image(path: str | Path) -> np.ndarray:
    """Decode one image file to (H, W, 3) uint8 RGB: the only decoder of the library.

    EXIF orientation is applied; grey, palette and CMYK become RGB; alpha is dropped; 16-bit grey
    keeps its upper 8 bits.

    Raises:
        ValueError: it cannot be read; names the file and the cause.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} are no photograph; save as 8 bit")
            elif image.mode in ("P", "PA"):
                image = image.convert("RGBA")  # a transparent palette warns on its way to RGB
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except Exception as error:  # Pillow raises a dozen unrelated types on damaged files
        cause = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its own text names the path once more
            cause = "no image format that Pillow knows"
        elif isinstance(error, FileNotFoundError):
            cause = "there is no such file"
        raise ValueError(f"cannot read the image {path}: {cause}") from error
    return pixels


# --- the size of many


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
    table: pd.DataFrame, otherwise: tuple[int, int], largest: int | None = None, data: str = ""
) -> tuple[int, int] | None:
    """Return the size to decode images to: None, their own, where all have one, else `otherwise`.

    Args:
        table: one row an image.
        otherwise: (height, width) for images of several sizes.
        largest: pixels of an image that may keep its size.
        data: `fingerprint(table, mtime=True)`: the sizes are kept under it, beside the pixels, so
            that no header is read at a second start.
    """
    file = cache_dir() / f"{data[:24]}.sizes.npy"
    cached = _read_cache(file) if data else None
    if cached:
        (sizes,) = cached
    else:
        found = set(image_sizes(table["path"]))
        sizes = np.array(sorted(found - {None}), np.int64).reshape(-1, 2)  # (height, width) each
        if data and None not in found:  # what cannot be read today may be there tomorrow
            with _beside(file) as (temporary,):
                np.save(temporary, sizes)
                os.replace(temporary, file)
    huge = largest is not None and bool((sizes.prod(axis=1) > largest).any())
    return None if len(sizes) <= 1 and not huge else otherwise


# --- the cache


def _read_cache(*files: Path) -> list[np.ndarray] | None:
    """Map cache files into memory; None where one is missing or cut short, to be made again."""
    try:
        # Copy on write: torch wants memory that it could write to.
        return [np.load(file, mmap_mode="c") for file in files]
    except (OSError, ValueError, EOFError):
        return None


@contextmanager
def _beside(*files: Path) -> Iterator[list[Path]]:
    """Give a temporary file for each of these, to be put in its place; none is left behind.

    Raises:
        OSError: the cache folder cannot be written.
    """
    temporary = [file.with_name(f"{file.name}.{os.getpid()}.tmp.npy") for file in files]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        temporary[0].touch()
    except OSError as error:
        raise OSError(
            f"Decoded images are kept in {files[0].parent}, which cannot be written "
            f"({error.strerror}). Set REID_CACHE to a folder that can."
        ) from error
    try:
        yield temporary
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def _decode_all(
    paths: list[str],
    size: tuple[int, int] | None,
    unreadable: str,
    file: Path,
    kept_file: Path,
    show_progress: bool,
) -> None:
    """Decode every image and write the cache file, complete or not at all."""
    with _beside(file, kept_file) as (temporary, kept_temporary):
        shape = (len(paths), *(size or _first_size(paths)), 3)
        pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        decode = partial(_decode, paths, size, pixels)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = (pool.map if _worth_threads(paths) else map)(decode, range(len(paths)))
            words = {"desc": "decode images", "unit": "img", "show": show_progress}
            bar = progress(results, total=len(paths), **words)
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
        else:
            pixels.flush()
        # Two runs started together decode the same images: each file is there whole, or not at all.
        np.save(kept_temporary, kept)
        os.replace(kept_temporary, kept_file)
        os.replace(temporary, file)


def _decode(
    paths: list[str], size: tuple[int, int] | None, pixels: np.ndarray, row: int
) -> str | None:
    """Put one image in its place; return what is wrong with it, if anything."""
    shape = pixels.shape[1:]
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


def _worth_threads(paths: list[str]) -> bool:
    """Pillow lets other threads run while it decodes. Where an image takes a fraction of a
    millisecond, as Market-1501's do, they only wait for each other.
    """
    there = [os.path.getsize(path) for path in paths[:100] if os.path.isfile(path)]
    return bool(there) and float(np.median(there)) > 50_000


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
