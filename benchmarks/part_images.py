"""Input at 256x128 with crop and flip, 16 batches of 72 x size, and the first decode.

The images are drawn and written as JPEG of Market-1501's size, 128x64, into a temporary folder.
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

from reidlib.images import Augmentation, load_pixels

FOLDER = tempfile.TemporaryDirectory(prefix="reid_bench_")


@cache
def files(n: int) -> list[str]:
    """Paths of n JPEG files, smooth colours and some noise."""
    rng, paths = np.random.default_rng(0), []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((64, 128), Image.Resampling.BICUBIC), np.int16)
        pixels = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(Path(FOLDER.name) / f"{n}_{i:06}.jpg"))
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


class Pillow(torch.utils.data.Dataset):
    """One image at a time, as torchreid and its like do."""

    def __init__(self, paths):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize((288, 144)),
                transforms.RandomCrop((256, 128)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def cases(size: float) -> dict:
    """A pass over the images, from the cache and by a Pillow loader; and the first decode."""
    paths = files(72 * max(1, round(16 * size)))
    os.environ["REID_CACHE"] = FOLDER.name
    table = pd.DataFrame({"path": paths, "pid": 1, "camid": -1})
    pixels, _ = load_pixels(table, show_progress=False)
    augment, rng = Augmentation((256, 128), enlarge=1.125), np.random.default_rng(0)

    def ours():
        for rows in rng.permutation(len(pixels)).reshape(-1, 72):
            augment(torch.from_numpy(pixels[rows]))

    def pillow(workers):
        loader = torch.utils.data.DataLoader(
            Pillow(paths), 72, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )

        def run():
            for _ in loader:
                pass

        return run

    def decode():
        for file in Path(FOLDER.name).glob("*.npy"):
            file.unlink()
        load_pixels(table, show_progress=False)

    def decode_one_by_one():
        for path in paths:
            np.asarray(Image.open(path).convert("RGB"))

    return {
        "ours, 256x128, crop and flip": ours,
        f"Pillow DataLoader, {os.cpu_count()} workers": pillow(os.cpu_count()),
        "Pillow DataLoader, in the process": pillow(0),
        "ours, first decode": decode,
        "Pillow in a loop, decode alone": decode_one_by_one,
    }
