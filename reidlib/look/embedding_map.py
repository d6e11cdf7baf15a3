"""A map of embeddings as one HTML page: choose a dot, see its photograph and its neighbours.

The page needs nothing beside itself: no network, no server, no library. Photographs and data are
inside, and a content security policy forbids it to load anything.
"""

import html
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from reidlib.look.pages import HELPERS, fill, script_json, short_names, thumbnail

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def linked_map(
    points: np.ndarray,
    table: pd.DataFrame,
    pixels: np.ndarray,
    neighbours: np.ndarray,
    distances: np.ndarray,
    *,
    title: str = "Map of the embedding space",
    lists: Collection[str] = (),
) -> str:
    """Return a page that links a map of embeddings with its images.

    A dot is chosen with the mouse, with a finger, or with the keyboard (Tab to the map; arrows to
    the next dot in that direction; Home and End). Then its photograph, identity and camera are shown,
    with its nearest neighbours by distance between embeddings: lines on the map, and a list to go on
    from. Same identity: ✓, full line, blue; another one: ✗, dashed, orange. The page starts at the query
    of lowest AP, zooms, colours dots by what is known of them, and makes a list of what a lasso is
    drawn around.

    Args:
        points: (N, 2), t-SNE's or PCA's.
        table: N rows: `path`, `pid`, `camid`, `split`; and where they are known `AP` (NaN: no query)
            and `key`, as the ranked-list browser names images ("q12", "g7").
        pixels: (N, H, W, 3) uint8; kept in the page as thumbnails, 96 pixels high.
        neighbours: (N, K) row numbers, nearest first. With t-SNE, dots that lie side by side need not
            be neighbours: that is what these are for.
        distances: (N, K), to them.
        lists: keys of the images that have a list in a `ranked_lists.html` beside the page.

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
    table = pd.DataFrame({"key": "", "AP": np.nan, **table})
    for i, (row, name) in enumerate(zip(table.itertuples(), short_names(table), strict=True)):
        who = {0: "distractor", -1: "unknown person"}.get(row.pid, f"identity {row.pid}")
        camera = f"camera {row.camid}" if row.camid >= 0 else ""
        dot = dict(zip("xy", places[i].round(1).tolist(), strict=True))
        dot |= {"pid": row.pid, "camera": camera, "split": row.split, "file": name, "key": row.key}
        dot |= {"ap": None if np.isnan(row.AP) else row.AP, "near": neighbours[i].tolist()}
        dot["text"] = ", ".join(filter(None, [who, camera, row.split]))
        dot["list"] = f"ranked_lists.html#{row.key}" if row.key in lists else ""
        dot["photo"] = "data:image/webp;base64," + thumbnail(pixels[i], 96, 80)
        dots.append(dot | {"far": [float(f"{far:.3g}") for far in distances[i]]})
    return fill(PAGE, title=html.escape(title), data=script_json(dots), helpers=HELPERS)
