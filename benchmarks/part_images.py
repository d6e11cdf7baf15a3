"""Input at 256x128 with crop and flip, 16 batches of 72 x size.

The images are the first of Market-1501, if it is there, else drawn as JPEG of its size, 128x64.
"""

import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision import transforms

from reidlib.data.augment import Augmentation
from reidlib.data.pixels import load_images
from reidlib.data.tables import load
from reidlib.recipes import Recipe

SIZES = (1, 2, 4, 8)
WORKERS = os.cpu_count()
MEMORY = False
GOALS = {}
FOLDER = tempfile.TemporaryDirectory(prefix="reid_bench_")
SEED = np.random.default_rng(0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@cache
def market() -> list[str]:
    """Paths of all images of Market-1501; none if it is not there."""
    try:
        found = load("market1501")
    except (FileNotFoundError, ValueError):
        return []
    return [path for table in (found.train, found.query, found.gallery) for path in table["path"]]


@cache
def drawn(i: int) -> str:
    """Path of a JPEG file, smooth colours and some noise."""
    coarse = Image.fromarray(SEED.integers(0, 256, (16, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((64, 128), Image.Resampling.BICUBIC), np.int16)
    pixels = (pixels + SEED.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
    path = str(Path(FOLDER.name) / f"{i:06}.jpg")
    Image.fromarray(pixels).save(path, quality=90)
    return path


def files(n: int) -> list[str]:
    """Paths of n JPEG files."""
    return market()[:n] or [drawn(i) for i in range(n)]


class OneByOne(torch.utils.data.Dataset):
    """An image at a time through torchvision's transforms, as torchreid and its like do."""

    def __init__(self, paths, *transform):
        self.paths = paths
        last = transforms.ToTensor(), transforms.Normalize(MEAN, STD)
        self.transform = transforms.Compose([*transform, *last])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def cases(size: float) -> dict:
    """A pass over the images, from the cache and by a DataLoader."""
    paths = files(72 * max(1, round(16 * size)))
    os.environ["REID_CACHE"] = FOLDER.name

    table = pd.DataFrame({"path": paths, "pid": 1, "camid": -1})
    pixels, _ = load_images(table, Recipe(), show_progress=False)
    augment, rng = Augmentation((256, 128), enlarge=1.125), np.random.default_rng(0)

    def ours():
        for rows in rng.permutation(len(pixels)).reshape(-1, 72):
            augment(torch.from_numpy(pixels[rows]))

    def loader(workers):
        data = OneByOne(
            paths,
            transforms.Resize((288, 144)),
            transforms.RandomCrop((256, 128)),
            transforms.RandomHorizontalFlip(),
        )
        loader = torch.utils.data.DataLoader(
            data, 72, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )

        def run():
            for _ in loader:
                pass

        return run

    return {
        "ours, input from the cache": ours,
        f"torchvision, DataLoader, {WORKERS} workers": loader(WORKERS),
        "torchvision, DataLoader, none": loader(0),
    }
