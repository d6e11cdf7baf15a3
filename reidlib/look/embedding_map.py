"""A map of embeddings as one HTML page: choose a dot, see its photograph and its neighbours.

The page needs nothing beside itself: no network, no server, no library. Photographs and data are
inside, and a content security policy forbids it to load anything.
"""

import html
from pathlib import Path

import numpy as np
import pandas as pd

from reidlib.look.pages import fill, script_json, thumbnail

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def linked_map(
    points: np.ndarray,
    table: pd.DataFrame,
    pixels: np.ndarray,
    neighbours: np.ndarray,
    distances: np.ndarray,
    *,
    title: str = "Map of the embedding space",
    height: int = 96,
) -> str:
    """Return a page that links a map of embeddings with its images.

    A dot is chosen with the mouse, with a finger, or with the keyboard (Tab to the map; arrows to
    the next dot in that direction; Home and End, first and last). Then its photograph, identity
    and camera are shown, with its nearest neighbours by distance between embeddings: on the map, with
    lines to them, and as a list to go on from. Same identity: ✓, full line, blue; another one: ✗,
    dashed, orange. All images of the chosen identity are larger dots. A search finds identities and
    file names, and dots can be coloured by camera and by split.

    Args:
        points: (N, 2), t-SNE's or PCA's.
        table: N rows: `path`, `pid`, `camid`; `split`, if there, is shown.
        pixels: (N, H, W, 3) uint8; kept in the page as thumbnails.
        neighbours: (N, K) row numbers, nearest first. With t-SNE, dots that lie side by side need not
            be neighbours: that is what these are for.
        distances: (N, K), to them.
        title: of the page.
        height: of a thumbnail, in pixels; larger ones are scaled down.

    Returns:
        A complete HTML document; about 2 kB an image.

    Raises:
        ValueError: no points, points that are not finite, or shapes that do not fit.
    """
    points, neighbours = np.asarray(points, float), np.asarray(neighbours)
    n = len(table)
    if n == 0 or points.shape != (n, 2) or len(pixels) != n or not np.isfinite(points).all():
        raise ValueError(
            f"A map of {n} images needs as many photographs, and finite points of shape ({n}, 2); "
            f"there are {len(pixels)} and {points.shape}."
        )
    if neighbours.ndim != 2 or len(neighbours) != n or np.shape(distances) != neighbours.shape:
        raise ValueError(
            f"{neighbours.shape} neighbours and {np.shape(distances)} distances: not (N, K)."
        )
    if neighbours.size and not (neighbours.min() >= 0 and neighbours.max() < n):
        raise ValueError(f"neighbours must be row numbers from 0 to {n - 1}.")
    low, spread = points.min(axis=0), np.ptp(points, axis=0)
    placed = (points - low) / np.where(spread > 0, spread, 1)
    splits = table["split"] if "split" in table else [""] * n
    dots = [
        {
            "x": round(20 + 960 * float(x), 1),
            "y": round(20 + 660 * float(1 - y), 1),  # upwards, as figures have it
            **_labels(int(pid), int(camid), str(split)),
            "file": str(path).replace("\\", "/").rsplit("/", 1)[-1],
            "photo": "data:image/webp;base64," + thumbnail(image, height, 80),
            "near": [int(row) for row in near],
            "far": [float(f"{d:.3g}") for d in far],
        }
        for (x, y), pid, camid, split, path, image, near, far in zip(
            *(placed, table["pid"], table["camid"], splits, table["path"], pixels),
            *(neighbours, np.asarray(distances)),
            strict=True,
        )
    ]
    return fill(PAGE, title=html.escape(title), data=script_json(dots))


def _labels(pid: int, camid: int, split: str) -> dict[str, int | str]:
    """Return what the page says of an image: who it shows, seen by which camera, of which split."""
    who = f"identity {pid}" if pid > 0 else "distractor" if pid == 0 else "unknown person"
    camera = f"camera {camid}" if camid >= 0 else ""
    text = ", ".join(filter(None, [who, camera, split]))
    return {"pid": pid, "camera": camera, "split": split, "text": text}
