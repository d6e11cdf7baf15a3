"""Baselines: what a score must beat before training has earned it."""

import numpy as np


def colour_histogram(pixels: np.ndarray, stripes: int = 6, bins: int = 8) -> np.ndarray:
    """Return the baseline that needs no network: colour histograms of horizontal stripes.

    Only the middle half of the width counts, where the person stands: with the margins, images of
    one camera find each other by their background. Each channel of each stripe has a histogram of
    its own, its bins the shares of the stripe's pixels. Their square roots make Euclidean distance
    the Hellinger distance.

    Returns:
        (N, stripes · 3 · bins) float32.

    >>> colour_histogram(np.zeros((2, 128, 64, 3), np.uint8)).shape
    (2, 144)
    """
    n, height, width = pixels.shape[:3]
    pixels = pixels[:, :, width // 4 : width - width // 4]
    edges = np.linspace(0, height, stripes + 1).astype(int)
    out = np.empty((n, stripes, 3, bins), np.float32)
    for row, image in enumerate(pixels):
        binned = image // (256 // bins)
        for s, (top, bottom) in enumerate(zip(edges, edges[1:], strict=False)):
            for c in range(3):
                counts = np.bincount(binned[top:bottom, :, c].ravel(), minlength=bins)
                out[row, s, c] = counts[:bins] / counts.sum()
    return np.sqrt(out).reshape(n, -1)
