"""The same photograph twice: images that may be copies of each other."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from reidlib.evaluation.leaks import thumbnails
from reidlib.look.suspects import suspect_table

# What a pair of copies does, the worst first.
HARMS = ("two identities", "train and test", "two cameras", "query and gallery", "none")
# The least correlation of grey thumbnails of one photograph, 32×16, whatever their brightness and
# contrast. Among 2,500 training images of Market-1501 and as many of the built-in data, no two
# different pictures reach 0.96 (one of them mirrored: 0.90), and no JPEG copy, down to quality 15 or
# half the size, falls below 0.975.
LEAST = 0.97


def duplicates(pixels: Sequence[np.ndarray], table: pd.DataFrame) -> pd.DataFrame:
    """Pairs of rows that show one photograph: the same pixels, the same picture, or its mirror image.

    Another crop of the same frame is found where it is nearly the same; so is what stands still
    before a fixed camera.

    Args:
        pixels: (n, H, W, 3) uint8 arrays of the splits, one after another, which may differ in size.
        table: a row an image: `path`, `pid`, `camid`, `split` (train, query, gallery).

    Returns:
        A row for each pair, the worst first, with the columns `suspects.SUSPECT_COLUMNS` (`score` is the
        correlation, `image` the later row) and `harm`: "two identities", "train and test",
        "two cameras" (of one identity), "query and gallery" (cameras unknown; where they are known,
        the protocol leaves such a match out), or "none".
        Of more than two images with the same pixels each is paired with the first.

    Raises:
        ValueError: lengths differ.
    """
    if (n := sum(map(len, pixels))) != len(table):
        raise ValueError(f"{n} images do not fit a table of {len(table)} rows.")
    images = (np.ascontiguousarray(image) for part in pixels for image in part)
    digests = [hashlib.blake2b(image, digest_size=16).hexdigest() for image in images]
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    pairs = [("same pixels", 1.0, i, j) for i, j in enumerate(first[which]) if i != j]
    # a picture that is its own mirror image is found twice, and named once
    pictures = {pair[2:]: pair for pair in reversed([*_same_picture(pixels, np.sort(first))])}
    pairs += pictures.values()
    out = suspect_table(table, [(*pair, "", pd.NA) for pair in pairs])
    split = table["split"].to_numpy()
    a, b = split[out["image"]], split[out["other"]]
    somebody = (out["pid"] != -1) & (out["other_pid"] != -1)
    harmful = (
        (out["pid"] != out["other_pid"]) & somebody,
        (a == "train") != (b == "train"),
        (out["camid"] != out["other_camid"]) & somebody,
        (a != b) & (out["camid"] == -1) & somebody,
    )
    out["harm"] = np.select(harmful, HARMS[:-1], HARMS[-1])
    out["evidence"] = [
        f"{row.kind}{f' ({i} and {j})' * (i != j)}, correlation {row.score:.3f}"
        for row, i, j in zip(out.itertuples(), a, b, strict=True)
    ]
    worst_first = out["harm"].map(HARMS.index).argsort(kind="stable")
    return out.iloc[worst_first].reset_index(drop=True)


def _same_picture(pixels, rows: np.ndarray) -> Iterator[tuple[str, float, int, int]]:
    """Pair images whose thumbnails agree, upright or mirrored: a coarse look, then a finer one."""
    coarse, fine = (
        np.concatenate([_thumbnails(part, size) for part in pixels])[rows]
        for size in ((16, 8), (32, 16))
    )
    upright = coarse.reshape(len(rows), 128)
    for kind, side in (("same picture", slice(None)), ("mirrored", slice(None, None, -1))):
        flat = coarse[:, :, side].reshape(len(rows), 128)
        for start in range(0, len(rows), 1024):
            # (B, 128) @ (128, N) -> (B, N); a thumbnail loses detail, so the coarse look is laxer
            near = flat[start : start + 1024] @ upright[start:].T >= LEAST - 0.03
            found = np.argwhere(near) + start
            for a, b in found[found[:, 0] < found[:, 1]]:
                score = float((fine[a][:, side] * fine[b]).sum())
                if score >= LEAST:
                    yield kind, min(score, 1.0), int(rows[b]), int(rows[a])


def _thumbnails(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Grey thumbnails (N, h, w), each of mean 0 and norm 1; zero where a picture is flat."""
    out = thumbnails(pixels, size, grey=True)[:, 0]
    out -= out.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt(np.square(out).sum(axis=(1, 2), keepdims=True))
    return np.where(norm > 1e-3 * np.sqrt(size[0] * size[1]), out / np.maximum(norm, 1e-9), 0)


def duplicates_in_words(copies: pd.DataFrame, images: int) -> str:
    """Say how many copies `duplicates` found among so many images, and how many do harm."""
    harmful = int((copies["harm"] != "none").sum())
    return f"{len(copies):,} pairs of copies among {images:,} images, {harmful:,} of them harmful."
