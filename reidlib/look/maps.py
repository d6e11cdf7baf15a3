"""What did the network look at? Maps of one image: where features are strong, and what hiding changes."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reidlib.data.augment import Augmentation
from reidlib.look.photographs import overlay
from reidlib.recipes import Recipe

ROWS = 8  # the fewest of a map of features
CELLS = (16, 8)  # rows and columns of an occlusion map


@torch.inference_mode()
def activation_maps(model: nn.Module, pixels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Where the backbone's features are strong: the sum of their squares over channels.

    This is F²_sum of "Paying more attention to attention" (Zagoruyko and Komodakis, ICLR 2017,
    arXiv 1612.03928, section 3.1). A strong feature need not matter for the embedding: for what
    makes two images similar see `occlusion_maps`. The map is that of the deepest layer that still
    has `ROWS` rows: the last one of a network with an input of 256×128, an earlier one below
    that, where the last would have four places or two.

    `model` is an `EmbeddingNet`, its backbone a sequence of layers, and `pixels` are (N, H, W, 3)
    uint8, N from 1. Maps are (N, h, w) float32, not normalised, so that images can be compared.
    """
    model, images = _prepared(model, pixels, recipe)
    kept = None
    for features in _layers(model.backbone, images):  # (N, C, h, w)
        if kept is not None and features.shape[2] < ROWS:
            break
        kept = features
    return kept.float().square().sum(dim=1).cpu().numpy()  # (N, C, h, w) -> (N, h, w)


def _layers(backbone: nn.Module, features: Tensor) -> Iterator[Tensor]:
    """Yield the features (N, C, h, w) after each layer."""
    if hasattr(backbone, "forward_intermediates"):  # timm's
        yield from backbone.forward_intermediates(features, intermediates_only=True)
        return
    # MobileNets hold their layers one level deeper.
    for layer in getattr(backbone, "features", backbone):
        features = layer(features)
        yield features


@torch.inference_mode()
def occlusion_maps(
    model: nn.Module, pixels: np.ndarray, targets: np.ndarray, recipe: Recipe
) -> np.ndarray:
    """Which places of an image make it similar to a given other: hide each, and measure.

    A patch of the image's own mean colour, two cells high and wide, moves over the image cell by
    cell. Where the distance to the target grows, the hidden place had made the two similar; where it
    shrinks, it had told them apart. (The sliding patch is that of Zeiler and Fergus, ECCV 2014,
    section 4.2; there the score of a class is measured, here a distance.) What several places show
    together (two shoes), hiding one of them does not reveal.

    Args:
        model: the network, whatever its architecture.
        pixels: (N, H, W, 3) uint8, N from 1.
        targets: (N, T, D), the T embeddings to measure distances to, for each image.

    Returns:
        (N, T, *CELLS) float32: growth of the Euclidean distance, a mean over the four patches that
        hide the cell.
    """
    targets = np.asarray(targets)
    if targets.ndim != 3 or len(targets) != len(pixels):
        raise ValueError(f"targets of {len(pixels)} images must be (N, T, D), not {targets.shape}.")
    model, images = _prepared(model, pixels, recipe)
    aims = torch.from_numpy(targets).to(images.device, torch.float32)  # (N, T, D)
    hidden = _patches(images.shape[2:]).to(images.device)  # (P, h, w), true where hidden
    (rows, columns), maps = CELLS, []
    for image, aim in zip(images, aims, strict=True):
        mean = image.mean(dim=(1, 2), keepdim=True)  # (3, 1, 1)
        covered = torch.where(hidden[:, None], mean, image)  # (P, 3, h, w)
        emb = torch.cat([model(image[None]), model(covered)]).float()
        # (1 + P, 1, D) − (T, D) -> (1 + P, T); the first row is the whole image
        distance = (emb[:, None] - aim).norm(dim=2)
        growth = (distance[1:] - distance[0]).T.unflatten(1, (rows + 1, columns + 1))
        # (T, rows + 1, columns + 1) -> (T, rows, columns): the four patches over each cell
        corners = (growth[:, a : rows + a, b : columns + b] for a in (0, 1) for b in (0, 1))
        maps.append(sum(corners) / 4)
    return torch.stack(maps).cpu().numpy()


class Sides(NamedTuple):
    """Some queries, their nearest strangers and their nearest matches: photographs or embeddings."""

    query: np.ndarray
    stranger: np.ndarray
    match: np.ndarray


class SideMaps(NamedTuple):
    """What `side_maps` measures."""

    features: np.ndarray  # (2, n, h, w): on query and stranger
    # (4, n, *CELLS): what makes the query like the stranger, and like the match, on the query; and
    # what makes the stranger, and the match, like the query
    like: np.ndarray

    def swings(self) -> np.ndarray:
        """Return what the best place of each query, hidden, turns from the stranger to the match, (n,)."""
        return (self.like[0] - self.like[1]).max(axis=(1, 2))


def side_maps(model: nn.Module, pixels: Sides, emb: Sides, recipe: Recipe) -> SideMaps:
    """Measure where features are strong, and which places make query, stranger and match alike.

    `pixels` are (n, H, W, 3) uint8 photographs, n from 1, and `emb` (n, D) their embeddings.
    """
    features = [activation_maps(model, side, recipe) for side in pixels[:2]]
    aims = np.stack([emb.stranger, emb.match], axis=1)  # (n, 2, D)
    on_query = occlusion_maps(model, pixels.query, aims, recipe).swapaxes(0, 1)
    on_others = (occlusion_maps(model, x, emb.query[:, None], recipe)[:, 0] for x in pixels[1:])
    return SideMaps(np.stack(features), np.stack([*on_query, *on_others]))


NINE = ["query", "features", "like stranger", "stranger", "features", "like query"]
NINE += ["like match", "match", "like query"]


def rows_of_nine(pixels: Sides, maps: SideMaps) -> list[np.ndarray]:
    """Return the pictures named in `NINE` for each query, one after another, (H, W, 3) uint8 each.

    Features are drawn from their median up to their 98th percentile over all pictures: a single
    bright corner would leave everything else without colour. All maps of features have one scale, and
    so have the occlusion maps of a row.
    """
    usual, strong = np.quantile(maps.features, [0.5, 0.98])
    features, strong = np.maximum(maps.features - usual, 0), max(strong - usual, 1e-12)
    images = []
    for k, (query, stranger, match) in enumerate(zip(*pixels, strict=True)):
        like = maps.like[:, k]
        most = max(np.abs(like).max(), 1e-12)
        images += [query, overlay(query, features[0, k], strong), overlay(query, like[0], most)]
        images += [stranger, overlay(stranger, features[1, k], strong)]
        images += [overlay(stranger, like[2], most), overlay(query, like[1], most)]
        images += [match, overlay(match, like[3], most)]
    return images


def _prepared(model: nn.Module, pixels: np.ndarray, recipe: Recipe) -> tuple[nn.Module, Tensor]:
    """The network as in evaluation, a copy, and its input (N, 3, h, w) on its device."""
    if len(pixels) == 0:
        raise ValueError("There are no images to make maps of.")
    device = next(model.parameters()).device
    plain = Augmentation((recipe.height, recipe.width), normalise=recipe.normalise).plain
    images = plain(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
    return copy.deepcopy(model).eval(), images


def _patches(size: tuple[int, int]) -> Tensor:
    """Masks (P, h, w), P = (rows + 1)(columns + 1): patch (i, j) hides cells i − 1, i × j − 1, j."""
    sides = []
    for length, n in zip(size, CELLS, strict=True):
        cell = torch.arange(length) * n // length  # (length,) the cell of each pixel
        before = torch.arange(n + 1)[:, None] - cell  # (n + 1, length)
        sides.append((before == 0) | (before == 1))
    masks = sides[0][:, None, :, None] & sides[1][None, :, None, :]
    return masks.flatten(0, 1)
