"""Baselines: what a score must beat before training has earned it."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from reidlib.evaluation.intervals import difference
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


def without_camera(
    query_emb: np.ndarray, query: pd.DataFrame, gallery_emb: np.ndarray, gallery: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray]:
    """Return both sides' embeddings, (Q, D) and (G, D), minus the mean of their camera over both.

    What all images of a camera share, its light and its walls, is gone. With one camera, or none
    known, no distance changes.

    >>> one = np.array([[1.0, 2.0]]), pd.DataFrame({"camid": [3]})
    >>> without_camera(*one, *one)
    (array([[0., 0.]]), array([[0., 0.]]))
    """
    emb = np.concatenate([query_emb, gallery_emb])  # (Q, D), (G, D) -> (Q + G, D)
    cameras = np.concatenate([query["camid"], gallery["camid"]])
    emb = emb - pd.DataFrame(emb).groupby(cameras).transform("mean").to_numpy()
    return emb[: len(query)], emb[len(query) :]


def score_baselines(run: Any, **options: Any) -> tuple[dict[str, Evaluation], list[str]]:
    """Score what a run is compared with, on its own queries.

    Args:
        run: what `scoring.open_run` returned.
        options: of `embed`.

    Returns:
        Evaluations by name, and a sentence on each that could not be had: `untrained`, the network as
        it was before the first step, or `pretrained`, where it had weights of elsewhere: with them
        alone, without the random head; and `colours_without_camera`.
    """
    found, notes, sides = {}, [], (run.query_pixels, run.gallery_pixels)
    try:
        network = build_model(run.recipe).to(run.device)
    except (FileNotFoundError, RuntimeError) as error:
        # A released run, whose starting weights are not here.
        notes.append(f"The network without training is left out. {error}")
    else:
        name = "untrained" if run.recipe.weights == "none" else "pretrained"
        norms = [part for part in network.head.modules() if isinstance(part, nn.BatchNorm1d)]
        if name == "pretrained" and not any(norm.running_mean.any() for norm in norms):
            network.head = nn.Identity()  # as random as it was made: it would spoil the features
        emb = [embed(network, pixels, run.recipe, **options) for pixels in sides]
        found[name] = run.ranked(*emb).evaluate()
    query, gallery = map(colour_histogram, sides)
    emb = without_camera(query, run.query, gallery, run.gallery)
    return found | {"colours_without_camera": run.ranked(*emb).evaluate()}, notes


def gain_in_words(mAP: float, baselines: Mapping[str, Evaluation]) -> str:
    """Say what training added to the baselines: `mAP` is the trained network's, a fraction."""
    others = {name: found.scores["mAP"] for name, found in baselines.items()}
    if not others:
        return "No baselines were scored, so nothing says what training added."
    before = f", before it {others['untrained']:.1%}" if "untrained" in others else ""
    if "pretrained" in others:
        before = f"; the features that it started from have {others['pretrained']:.1%}"
    best = max(others, key=others.get)
    said = (
        f"After training the mAP is {mAP:.1%}{before}. Colours, each camera's mean taken off, reach "
        f"{others['colours_without_camera']:.1%} and were never trained: they know nothing of cut, pattern "
        "or bag. "
    )
    if mAP > others[best]:
        return f"{said}The network has learnt what lies between its curve and the next one."
    name = best.replace("_", " ").capitalize()
    return (
        f"{said}**{name} does at least as well as this network: its training does not show here.**"
    )


def lead_in_words(per_query: pd.DataFrame, others: Mapping[str, Evaluation]) -> str:
    """Say how far a network, by its `per_query`, is before the best of others, and how sure that is."""
    best = max(others, key=lambda name: others[name].scores["mAP"])
    name = best.replace("_", " ")
    if per_query.dropna(subset="AP")["pid"].nunique() < 2:
        return f"Queries of one person cannot say whether the network is better than {name}."
    found = difference([per_query], [others[best].per_query])
    gap, low, high = (100 * value for value in found[:3])
    said = (
        f"On the same queries the network is {abs(gap):.1f} points of mAP {'below' if gap < 0 else 'above'} "
        f"the best of the others, {name} (difference {gap:.1f}, with other people {low:.1f} to {high:.1f})."
    )
    if low > 0:
        return f"{said} **That is more than luck: the training has paid.**"
    if high < 0:
        return f"{said} **What never learnt from these pictures is better.**"
    return f"{said} **That may be luck: with other people it could be the other way round.**"
