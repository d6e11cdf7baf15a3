"""Augmentation: the same few operations on a whole batch, on whatever device it lies."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from reidlib.extras import NORMALISATIONS


class Augmentation:
    """Turns batches of uint8 pixels into batches of network input, at random for training.

    In this order: resize to `enlarge` times the input, random crop to the input, random flip,
    normalisation, random erasing. Resized pixels are rounded to whole numbers, as Pillow's are. The
    random numbers come from a `generator` on the CPU, so that a seed gives the same crops on every
    device.

    Args:
        size: (height, width) of the network's input, in pixels.
        enlarge: images are resized to this times `size` before the crop; 1 leaves no room to crop.
        flip: flip each image with probability ½.
        erasing: probability that a rectangle of an image is erased (arXiv 1708.04896: an area of 2 to
            40 % of the image, aspect ratio 0.3 to 3.33, filled with the mean colour).
        normalise: one of `NORMALISATIONS`: `"imagenet"` (mean and deviation), `"unit"` (pixels in
            [0, 1]), …
        seed: of the generator.

    `augmentation(pixels)` takes (B, H, W, 3) uint8 on any device and returns (B, 3, h, w) float32
    there; `augmentation.plain(pixels)` resizes and normalises only, as evaluation does. Of a batch
    that several processes share, `augmentation(pixels, own, of)` takes the images at the places `own`
    of all the `of` images, and does with them what it would do in the whole batch.

    >>> augment = Augmentation((32, 16), enlarge=1.125)
    >>> augment(torch.zeros(5, 128, 64, 3, dtype=torch.uint8)).shape
    torch.Size([5, 3, 32, 16])
    """

    def __init__(
        self,
        size: tuple[int, int],
        enlarge: float = 1.0,
        flip: bool = True,
        erasing: float = 0.0,
        normalise: str = "imagenet",
        seed: int = 0,
        colour: float = 0.0,
        grey: float = 0.0,
    ):
        self.colour, self.grey = colour, grey
        self.size = tuple(size)
        self.enlarged = (round(size[0] * enlarge), round(size[1] * enlarge))
        self.flip, self.erasing, self.normalise = flip, erasing, normalise
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, pixels: Tensor, own: Tensor | None = None, of: int = 0) -> Tensor:
        """Return (B, 3, h, w) with random crop, flip and erasing."""

        def uniform() -> Tensor:
            """Draw (B,) numbers in [0, 1)."""
            drawn = torch.rand(of or len(pixels), generator=self.generator)
            return drawn if own is None else drawn[own]

        images = self._resized_crop_and_flip(pixels, uniform)
        images = self._coloured(images, uniform) if self.colour else images
        images = self._greyed(images, uniform) if self.grey else images
        images = self._normalised(images.permute(0, 3, 1, 2))
        return self._erased(images, uniform) if self.erasing else images

    def plain(self, pixels: Tensor) -> Tensor:
        """Return (B, 3, h, w) resized and normalised, with nothing random."""
        return self._normalised(_resized(pixels, self.size))

    def _resized_crop_and_flip(self, pixels: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """(B, H, W, 3) uint8 to (B, h, w, 3) float32 in [0, 255].

        The enlarged image has whole numbers, as Pillow's has: in uint8 the CPU makes it ten times as
        fast. Images are mirrored while they are small, and their crops with them.
        """
        h, w = self.size
        room_y, room_x = self.enlarged[0] - h, self.enlarged[1] - w
        # Always drawn, so that switching one kind off does not change the others.
        top = (uniform() * (room_y + 1)).long()
        left = (uniform() * (room_x + 1)).long()
        flipped = (uniform() < 0.5) & self.flip
        left = torch.where(flipped, room_x - left, left)
        mirror = flipped.to(pixels.device)[:, None, None, None]
        pixels = torch.where(mirror, pixels.flip(2), pixels)
        if pixels.shape[1:3] != self.enlarged:
            images = pixels.permute(0, 3, 1, 2)  # (B, 3, H, W), channels last in memory
            if pixels.device.type == "cpu":
                images = interpolate(images, self.enlarged, mode="bilinear", antialias=True)
            else:  # only the CPU has it in uint8
                images = _resized(pixels, self.enlarged).round()
            pixels = images.permute(0, 2, 3, 1)  # (B, H', W', 3)
        corners = zip(pixels, top.tolist(), left.tolist(), strict=True)
        # (B, H', W', 3) -> (B, h, w, 3)
        return torch.stack([image[y : y + h, x : x + w] for image, y, x in corners]).float()

    def _normalised(self, images: Tensor) -> Tensor:
        """Of (B, 3, h, w) in [0, 255], written over."""
        if self.normalise == "unit":
            return images.div_(255)
        # A row of the image as one, channels last: a vector as short as three numbers is slow.
        width = images.shape[3]
        constants = torch.tensor(NORMALISATIONS[self.normalise], device=images.device)
        mean, std = constants.repeat(1, width)
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, h, w 3)
        rows = rows.div_(255).sub_(mean).div_(std)
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)

    def _coloured(self, images: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """(B, h, w, 3) in [0, 255]: brightness, saturation and contrast times 0.8 to 1.2."""
        chosen = uniform() < self.colour
        bright, saturated, contrast = (
            torch.where(chosen, 0.8 + 0.4 * uniform(), 1.0).to(images.device)[:, None, None, None]
            for _ in range(3)
        )
        images = images * bright
        grey = images.mean(dim=3, keepdim=True)
        images = grey + (images - grey) * saturated
        mean = grey.mean(dim=(1, 2), keepdim=True)
        return (mean + (images - mean) * contrast).clamp(0, 255)

    def _greyed(self, images: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """(B, h, w, 3): a rectangle of some images loses its colours (arXiv 2101.08533)."""
        mask = self._rectangles(uniform, self.grey)[..., None].to(images.device)
        grey = images.mean(dim=3, keepdim=True).expand_as(images)
        return torch.where(mask, grey, images)

    def _erased(self, images: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
        """Fill one rectangle of some images with the data's mean colour."""
        mask = self._rectangles(uniform, self.erasing)[:, None]
        fill = 0.5 if self.normalise == "unit" else 0.0
        return images.masked_fill(mask.to(images.device), fill)

    def _rectangles(self, uniform: Callable[[], Tensor], share: float) -> Tensor:
        """(B, h, w): true in one rectangle of a share of the images."""
        h, w = self.size
        chosen = uniform() < share
        area = (0.02 + 0.38 * uniform()) * h * w
        log_aspect = (2 * uniform() - 1) * np.log(1 / 0.3)
        inside = []  # true inside the rectangle: (B, h) and (B, w)
        for whole, side in ((h, area * log_aspect.exp()), (w, area / log_aspect.exp())):
            # One that would not fit is cut at the image's size, where the paper draws again.
            side = side.sqrt().round().clamp(1, whole)[:, None]
            start = (uniform()[:, None] * (whole - side + 1)).floor()
            at = torch.arange(whole)
            inside.append((at >= start) & (at < start + side))
        return chosen[:, None, None] & inside[0][:, :, None] & inside[1][:, None]


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, h, w) float32 in [0, 255], bilinear with antialiasing."""
    images = pixels.permute(0, 3, 1, 2).float()  # (B, 3, H, W), channels last in memory
    if images.shape[2:] == size:
        return images
    return interpolate(images, size=size, mode="bilinear", antialias=True)
