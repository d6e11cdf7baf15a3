"""The scores of a released run by other people's code: torchvision's network, torchreid's evaluation.

    make recompute RUN=market1501_batchhard_softplus

Nothing of reidlib touches an image, the network or a rank: the weights go into torchvision's
MobileNetV2 as their model card says, and the scores stand beside those in `metrics.json`.
`--resize pillow` resizes pictures of 8 bits, as torchvision's transforms do by default: each pixel
is rounded to a whole level, which the card's float32 resize does not.
"""

import argparse
import re
import warnings
from pathlib import Path

import numpy as np
import peers
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torchvision import models, transforms
from torchvision.transforms import functional

from reidlib.paths import data_dir
from reidlib.progress import progress
from reidlib.recipes import Recipe
from reidlib.runs import find_run, read_json, read_recipe

BATCH = 64


def network(folder: Path, recipe: Recipe) -> nn.Module:
    """(B, 3, h, w) to (B, D), of torchvision's and PyTorch's own modules."""
    state = safetensors.torch.load_file(folder / "weights.safetensors")
    mobilenet = models.mobilenet_v2(weights=None)
    if recipe.last_stride == 1:
        mobilenet.features[14].conv[1][0].stride = (1, 1)
    parts = nn.ModuleDict({"backbone": nn.ModuleDict({"features": mobilenet.features})})
    if "norm.weight" in state:
        parts["norm"] = nn.BatchNorm1d(1280)
    if "head.0.weight" in state:
        hidden, dim = len(state["head.0.weight"]), len(state["head.3.weight"])
        linear = nn.Linear(1280, hidden), nn.Linear(hidden, dim)
        parts["head"] = nn.Sequential(linear[0], nn.BatchNorm1d(hidden), nn.ReLU(), linear[1])
    parts.load_state_dict(state)
    after = [parts[name] for name in ("norm", "head") if name in parts]
    return nn.Sequential(mobilenet.features, Pooling(recipe.pooling_power), *after)


class Pooling(nn.Module):
    """(B, C, h, w) to (B, C): the mean of x^p over the map, to the 1/p. PyTorch has only p = 1."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        """Pool."""
        return x.clamp(min=1e-6).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


def side(net: nn.Module, folder: Path, resize: str, size: list[int]) -> tuple[np.ndarray, ...]:
    """Embeddings (N, D), pids (N,) and camids (N,) of a folder of Market-1501, without junk."""
    files, pids, camids = [], [], []
    for file in sorted(folder.glob("*.jpg")):
        pid, camid = map(int, re.match(r"(-?\d+)_c(\d)", file.name).groups())
        if pid != -1:
            files, pids, camids = [*files, file], [*pids, pid], [*camids, camid]
    to_tensor = transforms.ToTensor()
    embs = []
    for start in progress(range(0, len(files), BATCH), desc=folder.name, unit="batch"):
        images = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
        if resize == "pillow":
            images = [functional.resize(image, size) for image in images]
        batch = torch.stack([to_tensor(image) for image in images])  # (B, 3, H, W) in [0, 1]
        batch = functional.resize(batch, size, antialias=True)  # as it is where it has that size
        batch = functional.normalize(batch, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.inference_mode():
            embs.append(net(batch).numpy())  # (B, D)
    return np.concatenate(embs), np.array(pids), np.array(camids)


def main() -> None:
    """Print both rows of scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a released run on Market-1501 with weights of MobileNetV2")
    parser.add_argument("--resize", choices=("float", "pillow"), default="float")
    args = parser.parse_args()
    folder = find_run(args.run)
    recipe, metrics = read_recipe(folder), read_json(folder / "metrics.json")
    rank = peers.torchreid("metrics/rank.py")
    root = data_dir() / "Market-1501-v15.09.15"
    if recipe.backbone != "mobilenet_v2" or recipe.normalise != "imagenet":
        parser.error(f"{folder.name} is not MobileNetV2 with ImageNet's normalisation.")
    if not (folder / "weights.safetensors").is_file():
        parser.error(f"{folder.name} was released without weights.")
    if rank is None:
        parser.error(f"There is no torchreid in {peers.FOLDER}: start this as `make recompute`.")
    if not root.is_dir():
        parser.error(f"There is no {root}: see the README on Market-1501.")
    net, size = network(folder, recipe).eval(), [recipe.height, recipe.width]
    query = side(net, root / "query", args.resize, size)
    gallery = side(net, root / "bounding_box_test", args.resize, size)
    distances = torch.cdist(*(torch.from_numpy(emb).double() for emb, *_ in (query, gallery)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without its Cython it is slow, and as right
        cmc, mean_ap = rank.evaluate_rank(
            *(distances.numpy(), query[1], gallery[1], query[2], gallery[2]),
            max_rank=10,
            use_cython=False,
        )
    theirs = {"mAP": mean_ap, "top1": cmc[0], "top5": cmc[4], "top10": cmc[9]}
    print(
        f"{folder.name}, {args.resize} resize, {len(query[0])} queries, {len(gallery[0])} gallery"
    )
    for name, value in theirs.items():
        print(f"{name:6} torchreid {100 * float(value):6.2f}   stated {100 * metrics[name]:6.2f}")


if __name__ == "__main__":
    main()
