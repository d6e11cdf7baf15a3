"""The same photograph twice: images that may be copies of each other."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from reidlib.look.suspects import suspect_table

# What a pair of copies does, the worst first.
HARMS = ("two identities", "train and test", "two cameras", "query and gallery", "none")


def duplicates(
    pixels: np.ndarray | Sequence[np.ndarray], table: pd.DataFrame, least: float = 0.97
) -> pd.DataFrame:
    """Pairs of rows that show one photograph: the same pixels, the same picture, or its mirror image.

    Two pictures are one photograph where grey thumbnails of 32×16 correlate by `least` or more,
    whatever their brightness and contrast. Among 2,500 training images of Market-1501 and as many of
    the built-in data, no two different pictures reach 0.96 (one of them mirrored: 0.90), and no JPEG
    copy, down to quality 15 or half the size, falls below 0.975. Another crop of the same frame is
    found where it is nearly the same; so is what stands still before a fixed camera.

    Args:
        pixels: (N, H, W, 3) uint8; or several such arrays, of the splits one after another, which
            may differ in size.
        table: N rows; a column `split` (train, query, gallery), if it has one, is looked at.

    Returns:
        A row for each pair, the worst first, with the columns `suspects.SUSPECT_COLUMNS` (`score` is the
        correlation, `image` the later row) and `harm`: "two identities", "train and test",
        "two cameras" (of one identity), "query and gallery" (cameras unknown; where they are known,
        the protocol leaves such a match out), or "none".
        Of more than two images with the same pixels each is paired with the first.

    Raises:
        ValueError: lengths differ.
    """
    parts = [pixels] if isinstance(pixels, np.ndarray) else list(pixels)
    if (n := sum(map(len, parts))) != len(table):
        raise ValueError(f"{n} images do not fit a table of {len(table)} rows.")
    pairs = _same_pixels(image for part in parts for image in part)
    first = np.setdiff1d(np.arange(n), [later for later, *_ in pairs])
    pairs += _same_picture(parts, first, least)
    image, other, kind, score = zip(*pairs, strict=True) if pairs else ((),) * 4
    out = suspect_table(table, kind, score, image, other, ["" for _ in kind])
    split = table["split"].to_numpy() if "split" in table else np.full(len(table), "")
    sides = np.stack([split[out["image"]], split[out["other"]]]) if len(out) else np.empty((2, 0))
    nobody = (out["pid"] == -1) | (out["other_pid"] == -1)
    out["harm"] = np.select(
        [
            (out["pid"] != out["other_pid"]) & ~nobody,
            ((sides == "train").sum(axis=0) == 1),
            (out["camid"] != out["other_camid"]) & ~nobody,
            (sides[0] != sides[1]) & (out["camid"] == -1) & ~nobody,
        ],
        HARMS[:-1],
        HARMS[-1],
    )
    places = [f" ({a} and {b})" if a != b else "" for a, b in sides.T]
    out["evidence"] = [
        f"{k}{place}, correlation {s:.3f}"
        for k, place, s in zip(out["kind"], places, out["score"], strict=True)
    ]
    out["harm"] = pd.Categorical(out["harm"], HARMS)
    out = out.sort_values(["harm", "score"], ascending=[True, False], kind="stable")
    return out.astype({"harm": object}).reset_index(drop=True)


def _same_pixels(images: Iterable[np.ndarray]) -> list[tuple[int, int, str, float]]:
    """Pair each image with the first that has the same pixels, if there is one before it."""
    first, pairs = {}, []
    for row, image in enumerate(images):
        digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
        if first.setdefault(digest, row) != row:
            pairs.append((row, first[digest], "same pixels", 1.0))
    return pairs


def _same_picture(parts, rows, least) -> list[tuple[int, int, str, float]]:
    """Pair images whose thumbnails agree, upright or mirrored: a coarse look, then a finer one."""
    if len(rows) < 2:
        return []
    coarse, fine = (
        np.concatenate([_thumbnails(part, size) for part in parts])[rows]
        for size in ((16, 8), (32, 16))
    )
    pairs = []
    for kind, side in (("same picture", slice(None)), ("mirrored", slice(None, None, -1))):
        flat = coarse[:, :, side].reshape(len(rows), -1)
        upright = coarse.reshape(len(rows), -1)
        for start in range(0, len(rows), 1024):
            # (B, 128) @ (128, N) -> (B, N); a thumbnail loses detail, so the coarse look is laxer
            near = flat[start : start + 1024] @ upright[start:].T >= least - 0.03
            found = np.argwhere(near) + start
            for a, b in found[found[:, 0] < found[:, 1]]:
                score = float((fine[a][:, side] * fine[b]).sum())
                if score >= least:
                    pairs.append((int(rows[b]), int(rows[a]), kind, min(score, 1.0)))
    # a picture that is its own mirror image is named once
    return list({pair[:2]: pair for pair in reversed(pairs)}.values())


def _thumbnails(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Grey thumbnails (N, h, w), each of mean 0 and norm 1; zero where a picture is flat."""
    out = np.empty((len(pixels), *size), np.float32)
    for start in range(0, len(pixels), 1024):
        block = torch.from_numpy(np.ascontiguousarray(pixels[start : start + 1024]))
        grey = block.float().mean(dim=3)  # (B, H, W, 3) -> (B, H, W)
        out[start : start + 1024] = nn.functional.adaptive_avg_pool2d(grey[:, None], size)[:, 0]
    out -= out.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt(np.square(out).sum(axis=(1, 2), keepdims=True))
    return np.where(norm > 1e-3 * np.sqrt(size[0] * size[1]), out / np.maximum(norm, 1e-9), 0)


def duplicates_in_words(copies: pd.DataFrame, images: int) -> str:
    """Say how many copies `duplicates` found among so many images, and how many do harm."""
    harmful = int((copies["harm"] != "none").sum())
    return (
        f"{len(copies):,} pairs of copies among {images:,} images, {harmful:,} of them harmful. The rest, if "
        "any, are of one identity and camera, or of nobody: what stands still before a camera is seen twice."
    )
