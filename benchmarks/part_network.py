"""A training step of ResNet-50 and the extraction of embeddings, at 128x64. Size: the batch.

"network alone" runs the same step on a batch that is ready: what is left to ours is loss, input and
optimiser together.
"""

import numpy as np
import torch

from reidlib.embedding import autocast, bfloat16_is_right, embed, pick_device
from reidlib.images import Augmentation
from reidlib.losses import batch_hard
from reidlib.recipes import Recipe
from reidlib.runs import build_model


def cases(size: float) -> dict:
    """Steps and extraction."""
    device = pick_device()
    recipe = Recipe(weights="none", height=128, width=64)
    b = 4 * max(2, round(8 * size))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4 * b, 128, 64, 3), dtype=np.uint8)
    pids = (torch.arange(b) // 4).to(device)
    precision = "bfloat16" if bfloat16_is_right(recipe, device) else "float32"
    augment = Augmentation((128, 64), enlarge=1.125)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def stepper(kind, layout, alone=False):
        model = build_model(recipe, pretrained=False).to(device, memory_format=layout).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-6)
        ready = augment(torch.from_numpy(pixels[:b])).to(device).contiguous(memory_format=layout)

        def step():
            batch = ready
            if not alone:
                batch = augment(torch.from_numpy(pixels[:b]).to(device))
                batch = batch.contiguous(memory_format=layout)
            with autocast(device, kind):
                emb = model(batch)
            loss = emb.float().square().mean() if alone else batch_hard(emb, pids, "soft").loss
            model.zero_grad(set_to_none=True)
            loss.backward()
            if not alone:
                optimiser.step()
            wait()

        return step

    model = build_model(recipe, pretrained=False).to(device).eval()

    def one_by_one():
        for row in range(len(pixels)):
            embed(model, pixels[row : row + 1], recipe, flip=True, show_progress=False)

    last, contiguous = torch.channels_last, torch.contiguous_format
    return {
        f"ours, step, {precision}, channels last": stepper(precision, last),
        "network alone, the same": stepper(precision, last, alone=True),
        "float32, as peers train": stepper("float32", contiguous),
        "ours, extraction with flips": lambda: embed(
            model, pixels, recipe, flip=True, show_progress=False
        ),
        "extraction, one image at a time": one_by_one,
    }
