"""Training steps of ResNet-50 at 128x64 and 256x128 and of MobileNetV2 at 128x64, B = 32 x size, and
extraction at 128x64.

"limit" is one matrix product after another, of as many operations as the step, in its precision.
Where the time of a step goes, `step.py` tells.
"""

import pandas as pd
import torch
from part_images import OneByOne, files
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from reidlib.data.augment import Augmentation
from reidlib.data.pixels import load_images
from reidlib.model.depthwise import StridedDepthwise
from reidlib.model.device import autocast, pick_device, resolve_precision
from reidlib.model.embed import embed
from reidlib.model.weights import build_model
from reidlib.recipes import Recipe
from reidlib.training.losses import batch_hard

SIZES = (1 / 4, 1 / 2, 1)
MEMORY = False
GOALS = {}
LAST, PLAIN = torch.channels_last, torch.contiguous_format


def steps(b: int, height: int, device: torch.device, backbone: str = "resnet50") -> dict:
    """Steps of training at one size."""
    recipe = Recipe(backbone=backbone, weights="none", height=height, width=height // 2)
    kind = resolve_precision(recipe, device).precision
    pixels = torch.randint(0, 256, (b, 128, 64, 3), dtype=torch.uint8).to(device)
    pids = (torch.arange(b) // 4).to(device)
    augment = Augmentation((height, height // 2), enlarge=1.125)
    where = f"{height}x{height // 2}"

    def stepper(precision, layout, compiled=False, ours=True):
        model = build_model(recipe, pretrained=False).to(device, memory_format=layout).train()
        for module in model.modules():
            if isinstance(module, StridedDepthwise) and not ours:
                module.__class__ = nn.Conv2d
        run = torch.compile(model) if compiled else model
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-6, fused=ours)

        def step():
            batch = augment(pixels).contiguous(memory_format=layout)
            with autocast(device, precision):
                emb = run(batch)
            result = batch_hard(emb, pids, "soft").loss
            optimiser.zero_grad(set_to_none=True)
            result.backward()
            optimiser.step()

        return step

    if backbone != "resnet50":
        return {
            f"ours, {backbone} at {where}, {kind}, channels last": stepper(kind, LAST),
            "the same without ours in gradient and Adam": stepper(kind, LAST, ours=False),
            f"plain PyTorch, {backbone}, float32": stepper("float32", PLAIN, ours=False),
        }
    ours = stepper(kind, LAST)
    # Once, so that the optimiser has gradients and a state; and counted.
    with FlopCounterMode(display=False) as counter:
        ours()
    n, dtype = 2048, torch.bfloat16 if kind == "bfloat16" else torch.float32
    square = torch.randn(n, n, device=device).to(dtype)
    products = counter.get_total_flops() / (2 * n**3)

    def limit():
        for _ in range(round(products)):
            square @ square
        part = square[: round(n * (products % 1))]
        part @ square

    found = {f"ours, step at {where}, {kind}, channels last": ours}
    found[f"limit: matrix products, {where}"] = limit
    if device.type == "cuda":
        found[f"ours with torch.compile, {where}"] = stepper(kind, LAST, compiled=True)
    found[f"plain PyTorch, float32, {where}"] = stepper("float32", PLAIN, ours=False)
    return found


def cases(size: float) -> dict:
    """Steps at both sizes, and extraction."""
    device = pick_device()
    b = 4 * max(2, round(8 * size))
    found = steps(b, 128, device) | steps(b, 256, device)
    found |= steps(b, 128, device, "mobilenet_v2")

    recipe = Recipe(weights="none", height=128, width=64)
    model = build_model(recipe, pretrained=False).to(device).eval()
    paths = files(4 * b)
    table = pd.DataFrame({"path": paths, "pid": 1, "camid": -1})
    pixels, _ = load_images(table, recipe, show_progress=False)
    images = OneByOne(paths, transforms.Resize((128, 64)))

    def one_by_one():
        with torch.inference_mode():
            for i in range(len(images)):
                image = images[i][None].to(device)
                (model(image) + model(image.flip(3))).cpu()

    def loader():
        with torch.inference_mode():
            for batch in torch.utils.data.DataLoader(images, 128, num_workers=2):
                batch = batch.to(device)
                (model(batch) + model(batch.flip(3))).cpu()

    options = {"flip": True, "show_progress": False}
    return found | {
        "ours, extraction with flips": lambda: embed(model, pixels, recipe, **options),
        "batches of a Pillow loader": loader,
        "an image at a time": one_by_one,
    }
