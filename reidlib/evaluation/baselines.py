"""Baselines: what a score must beat before training has earned it."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from reidlib.evaluation.metrics import Evaluation
from reidlib.model.embed import embed
from reidlib.model.weights import build_model


def colour_histogram(pixels: np.ndarray) -> np.ndarray:
    """Return the baseline that needs no network: colour histograms of six horizontal stripes.

    Only the middle half of the width counts, where the person stands: with the margins, images of
    one camera find each other by their background. Each channel of each stripe has a histogram of
    its own, its bins the shares of the stripe's pixels. Their square roots make Euclidean distance
    the Hellinger distance.

    Returns:
        (N, 6 stripes · 3 channels · 8 bins) float32.

    >>> colour_histogram(np.zeros((2, 128, 64, 3), np.uint8)).shape
    (2, 144)
    """
    n, height, width = pixels.shape[:3]
    edges = np.linspace(0, height, 7).astype(int)
    out = np.empty((n, 6, 3, 8), np.float32)
    # (N, H, W, 3) -> (N, H, W / 2, 3)
    for row, image in enumerate(pixels[:, :, width // 4 : width - width // 4]):
        for stripe, (top, bottom) in enumerate(pairwise(edges)):
            # (h, W / 2, 3) -> (3, 8)
            bins = image[top:bottom] // 32 + 8 * np.arange(3)
            counts = np.bincount(bins.ravel(), minlength=24).reshape(3, 8)
            out[row, stripe] = counts / counts[0].sum()
    return np.sqrt(out).reshape(n, -1)


def score_baselines(run: Any, **options: Any) -> tuple[dict[str, Evaluation], list[str]]:
    """Score what a run is compared with, on its own queries.

    Args:
        run: what `scoring.open_run` returned.
        options: of `embed`.

    Returns:
        Evaluations by name: `untrained`, the network as it was before the first step, and
        `colour_histogram`; and a sentence on each that could not be had.
    """
    emb, notes, sides = {}, [], (run.query_pixels, run.gallery_pixels)
    try:
        untrained = build_model(run.recipe).to(run.device)
    except (FileNotFoundError, RuntimeError) as error:
        # A released run, whose starting weights are not here.
        notes.append(f"The untrained network is left out. {error}")
    else:
        emb["untrained"] = [embed(untrained, pixels, run.recipe, **options) for pixels in sides]
    emb["colour_histogram"] = [colour_histogram(pixels) for pixels in sides]
    return {name: run.ranked(*both).evaluate() for name, both in emb.items()}, notes


def gain_in_words(mAP: float, baselines: Mapping[str, Evaluation]) -> str:
    """Say what training added to the baselines: `mAP` is the trained network's, a fraction."""
    others = {name: found.scores["mAP"] for name, found in baselines.items()}
    if not others:
        return "No baselines were scored, so nothing says what training added."
    before = f", from {others['untrained']:.1%}" if "untrained" in others else ""
    said = (
        f"Training brought the mAP to {mAP:.1%}{before}. Colour alone reaches "
        f"{others['colour_histogram']:.1%}: it knows nothing of cut, pattern or bag, and every camera "
        "sees colours in another light. "
    )
    if mAP > max(others.values()):
        return said + "What lies between the trained curve and the others, the network has learnt."
    return (
        said + "**A baseline does as well as this network: it has learnt nothing that helps here.**"
    )
