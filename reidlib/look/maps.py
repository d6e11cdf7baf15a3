"""What did the network look at? Maps of one image: where features are strong, and what hiding changes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reidlib.data.augment import Augmentation
from reidlib.look.photographs import overlay
from reidlib.recipes import Recipe


@torch.inference_mode()
def activation_maps(
    model: nn.Module, pixels: np.ndarray, recipe: Recipe, rows: int = 8
) -> np.ndarray:
    """Where the backbone's features are strong: the sum of their squares over channels.

    This is F²_sum of "Paying more attention to attention" (Zagoruyko and Komodakis, ICLR 2017,
    arXiv 1612.03928, section 3.1). A strong feature need not matter for the embedding: for what
    makes two images similar see `occlusion_maps`. The map is that of the deepest layer that still
    has ``rows`` rows: the last one of a network with an input of 256×128, an earlier one below
    that, where the last would have four places or two.

    Args:
        model: an `EmbeddingNet`; its backbone is a sequence of layers.
        pixels: (N, H, W, 3) uint8.
        recipe: says the size and the normalisation of the input.
        rows: the fewest rows of a map.

    Returns:
        (N, h, w) float32, as they come: not normalised, so that images can be compared.

    Raises:
        ValueError: no images, or no layer has so many rows.
    """
    if len(pixels) == 0:
        raise ValueError("There are no images to make maps of.")
    was_training = model.training
    model.eval()
    features = network_input(model, pixels, recipe)
    kept = None
    # MobileNets hold their layers one level deeper.
    for layer in getattr(model.backbone, "features", model.backbone):
        features = layer(features)  # (N, C, h, w)
        if features.shape[2] < rows:
            break
        kept = features
    model.train(was_training)
    if kept is None:
        raise ValueError(f"No layer has a map of {rows} rows or more: give fewer.")
    return kept.float().square().sum(dim=1).cpu().numpy()  # (N, C, h, w) -> (N, h, w)


@torch.inference_mode()
def occlusion_maps(
    model: nn.Module,
    pixels: np.ndarray,
    targets: np.ndarray,
    recipe: Recipe,
    cells: tuple[int, int] = (16, 8),
    batch: int = 256,
) -> np.ndarray:
    """Which places of an image make it similar to a given other: hide each, and measure.

    A patch of the image's own mean colour, two cells high and wide, moves over the image cell by
    cell. Where the distance to the target grows, the hidden place had made the two similar; where it
    shrinks, it had told them apart. (The sliding patch is that of Zeiler and Fergus, ECCV 2014,
    section 4.2; there the score of a class is measured, here a distance.) It is an experiment on the
    network as it is, whatever its architecture, and the unit is that of the distance. What
    several places show together (two shoes), hiding one of them does not reveal.

    Args:
        model: the network.
        pixels: (N, H, W, 3) uint8.
        targets: (N, T, D), the T embeddings to measure distances to, for each image.
        recipe: says the size and the normalisation of the input.
        cells: rows and columns of the map.
        batch: images at a time.

    Returns:
        (N, T, rows, columns) float32: growth of the Euclidean distance, a mean over the four
        patches that hide the cell.

    Raises:
        ValueError: shapes that do not fit, or more cells than the input has pixels.
    """
    targets = np.asarray(targets)
    if len(pixels) == 0 or targets.ndim != 3 or len(targets) != len(pixels):
        raise ValueError(
            f"{len(pixels)} images need targets of shape ({len(pixels)}, T, D), not {targets.shape}."
        )
    if not (1 <= cells[0] <= recipe.height and 1 <= cells[1] <= recipe.width):
        raise ValueError(
            f"cells must be 1 to {recipe.height} rows and 1 to {recipe.width} columns."
        )
    was_training = model.training
    model.eval()
    images = network_input(model, pixels, recipe)
    aims = torch.from_numpy(targets).to(images.device, torch.float32)  # (N, T, D)
    hidden = _patches(images.shape[2:], cells).to(images.device)  # (P, h, w), true where hidden
    maps = []
    for image, aim in zip(images, aims, strict=True):
        mean = image.mean(dim=(1, 2), keepdim=True)  # (3, 1, 1)
        emb = [model(image[None]).float()]
        for part in hidden.split(batch):
            emb.append(model(torch.where(part[:, None], mean, image)).float())  # (B, 3, h, w)
        # (1 + P, 1, D) − (T, D) -> (1 + P, T); the first row is the whole image
        distance = (torch.cat(emb)[:, None] - aim).norm(dim=2)
        growth = (distance[1:] - distance[0]).T.unflatten(1, (cells[0] + 1, cells[1] + 1))
        # (T, rows + 1, columns + 1) -> (T, rows, columns): the four patches over each cell
        corners = (growth[:, a : cells[0] + a, b : cells[1] + b] for a in (0, 1) for b in (0, 1))
        maps.append(sum(corners) / 4)
    model.train(was_training)
    return torch.stack(maps).cpu().numpy()


class Sides(NamedTuple):
    """Some queries, each with its nearest stranger and its nearest match."""

    query: np.ndarray
    """(n, H, W, 3) uint8 photographs, or (n, D) embeddings"""
    stranger: np.ndarray
    """the same"""
    match: np.ndarray
    """the same"""


class SideMaps(NamedTuple):
    """What `side_maps` measures, each (n, h, w) float32."""

    query_features: np.ndarray
    stranger_features: np.ndarray
    like_stranger: np.ndarray
    """on the query: what makes it like the stranger"""
    like_match: np.ndarray
    """on the query: what makes it like the match"""
    stranger_like_query: np.ndarray
    match_like_query: np.ndarray

    def swings(self) -> np.ndarray:
        """Return what the best place of each query, hidden, turns from the stranger to the match, (n,)."""
        return (self.like_stranger - self.like_match).max(axis=(1, 2))


def side_maps(model: nn.Module, pixels: Sides, emb: Sides, recipe: Recipe) -> SideMaps:
    """Measure where features are strong, and which places make query, stranger and match alike.

    Args:
        model: the network.
        pixels: photographs, n from 1.
        emb: their embeddings.
        recipe: says the size and the normalisation of the input.
    """
    features = (activation_maps(model, side, recipe) for side in pixels[:2])
    aims = np.stack([emb.stranger, emb.match], axis=1)  # (n, 2, D)
    on_query = occlusion_maps(model, pixels.query, aims, recipe)
    on_others = (
        occlusion_maps(model, side, emb.query[:, None], recipe)[:, 0] for side in pixels[1:]
    )
    return SideMaps(*features, on_query[:, 0], on_query[:, 1], *on_others)


NINE = (
    *("query", "features", "like stranger", "stranger", "features", "like query"),
    *("like match", "match", "like query"),
)


def rows_of_nine(pixels: Sides, maps: SideMaps) -> list[np.ndarray]:
    """Return the pictures named in `NINE` for each query, one after another, (H, W, 3) uint8 each.

    Features are drawn from their median up to their 98th percentile over all pictures: a single
    bright corner would leave everything else without colour. All maps of features have one scale, and
    so have the occlusion maps of a row.
    """
    both = np.stack([maps.query_features, maps.stranger_features])
    usual, strong = np.quantile(both, [0.5, 0.98])
    both, strong = np.maximum(both - usual, 0), max(strong - usual, 1e-12)
    images = []
    for k, (query, stranger, match) in enumerate(zip(*pixels, strict=True)):
        like = [maps_of[k] for maps_of in maps[2:]]
        most = max(np.abs(like).max(), 1e-12)
        images += [query, overlay(query, both[0, k], strong), overlay(query, like[0], most)]
        images += [
            stranger,
            overlay(stranger, both[1, k], strong),
            overlay(stranger, like[2], most),
        ]
        images += [overlay(query, like[1], most), match, overlay(match, like[3], most)]
    return images


def network_input(model: nn.Module, pixels: np.ndarray, recipe: Recipe) -> Tensor:
    """Return (N, 3, h, w) input of the network, on its device."""
    device = next(model.parameters()).device
    plain = Augmentation((recipe.height, recipe.width), normalise=recipe.normalise).plain
    return plain(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))


def _patches(size: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Masks (P, h, w), P = (rows + 1)(columns + 1): patch (i, j) hides cells i − 1, i × j − 1, j."""
    sides = []
    for length, n in zip(size, cells, strict=True):
        cell = torch.arange(length) * n // length  # (length,) the cell of each pixel
        at = torch.arange(n + 1)[:, None]  # (n + 1, 1)
        sides.append((cell == at - 1) | (cell == at))  # (n + 1, length)
    masks = sides[0][:, None, :, None] & sides[1][None, :, None, :]
    return masks.flatten(0, 1)
