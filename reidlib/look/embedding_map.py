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
) -> str:
    """Return a page that links a map of embeddings with its images.

    A dot is chosen with the mouse, with a finger, or with the keyboard (Tab to the map; arrows to
    the next dot in that direction; Home and End). Then its photograph, identity and camera are shown,
    with its nearest neighbours by distance between embeddings: lines on the map, and a list to go on
    from. Same identity: ✓, full line, blue; another one: ✗, dashed, orange.

    Args:
        points: (N, 2), t-SNE's or PCA's.
        table: N rows: `path`, `pid`, `camid`, `split`.
        pixels: (N, H, W, 3) uint8; kept in the page as thumbnails, 96 pixels high.
        neighbours: (N, K) row numbers, nearest first. With t-SNE, dots that lie side by side need not
            be neighbours: that is what these are for.
        distances: (N, K), to them.

    Returns:
        A complete HTML document; about 2 kB an image.
    """
    points, neighbours, distances = map(np.asarray, (points, neighbours, distances))
    n, near = len(table), neighbours.shape
    if not n == len(pixels) == near[0] > 0 or points.shape != (n, 2) or distances.shape != near:
        raise ValueError(
            f"A map of {n} images needs as many photographs (there are {len(pixels)}), points ({n}, 2), "
            f"not {points.shape}, and neighbours and distances (N, K), not {near}, {distances.shape}."
        )
    if not np.isfinite(points).all() or not np.isin(neighbours, np.arange(n)).all():
        raise ValueError(f"Points must be finite, and neighbours row numbers from 0 to {n - 1}.")
    low, spread = points.min(axis=0), np.ptp(points, axis=0)
    placed = (points - low) / np.where(spread > 0, spread, 1)
    placed[:, 1] = 1 - placed[:, 1]  # upwards, as figures have it
    places = 20 + placed * (960, 660)
    dots = []
    for i, row in enumerate(table.itertuples()):
        who = (
            f"identity {row.pid}" if row.pid > 0 else "unknown person" if row.pid else "distractor"
        )
        camera = f"camera {row.camid}" if row.camid >= 0 else ""
        dot = dict(zip("xy", places[i].round(1).tolist(), strict=True))
        dot |= {"pid": row.pid, "camera": camera, "split": row.split}
        dot["text"] = ", ".join(filter(None, [who, camera, row.split]))
        dot["file"] = str(row.path).replace("\\", "/").rsplit("/", 1)[-1]
        dot["photo"] = "data:image/webp;base64," + thumbnail(pixels[i], 96, 80)
        dot["near"] = neighbours[i].tolist()
        dot["far"] = [float(f"{far:.3g}") for far in distances[i]]
        dots.append(dot)
    return fill(PAGE, title=html.escape(title), data=script_json(dots))
