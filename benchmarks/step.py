"""Where the time of a training step goes, in the training loop itself.

    python benchmarks/step.py [--backbone resnet50] [--height 128] [--p 8] [--steps 30]

Trains on the built-in data from random weights, four images of each person, and times the parts of the
loop as it runs, so that they add up to the step. Parts timed alone do not: alone, a part finds its
memory and its caches warm. Medians over the steps, without the first five.
"""

import argparse
import os
from collections import defaultdict
from contextlib import ExitStack
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from unittest.mock import patch

import torch
from run import machine

import reidlib
from reidlib.data.augment import Augmentation
from reidlib.model.device import wait
from reidlib.training import distributed, loop
from reidlib.training.journal import Journal

PARTS = {
    "input": (Augmentation, "__call__"),
    "network, forward": (loop, "in_chunks"),
    "loss": (distributed, "across"),
    "network and loss, backward": (torch.Tensor, "backward"),
    "optimiser": (torch.optim.Adam, "step"),
    "journal": (Journal, "after_step"),
}


def timed(function, times: list[float]):
    """The function, which notes how long it takes."""

    def run(*args, **options):
        wait()
        started = perf_counter()
        result = function(*args, **options)
        wait()
        times.append(perf_counter() - started)
        return result

    return run


def main() -> None:
    """Train, and print a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--height", type=int, default=128, help="twice the width")
    parser.add_argument("--p", type=int, default=8, help="people in a batch, four images each")
    parser.add_argument("--steps", type=int, default=30)
    options = vars(parser.parse_args())
    options |= {"width": options["height"] // 2, "log_every": 10**6, "checkpoint_every": 10**6}
    recipe = reidlib.make_recipe(dataset="synthetic", weights="none", **options)
    times, ends = defaultdict(list), []
    with TemporaryDirectory() as folder, ExitStack() as patched:
        patched.enter_context(patch.dict(os.environ, REID_OUTPUTS=folder))
        for name, (owner, attribute) in PARTS.items():
            function = timed(getattr(owner, attribute), times[name])
            patched.enter_context(patch.object(owner, attribute, function))
        bar = patched.enter_context(
            patch.object(loop, "progress")
        ).return_value.__enter__.return_value
        bar.update.side_effect = lambda: ends.append(perf_counter())
        reidlib.train(recipe)
    # The loop calls `update` once a step; the last step writes the checkpoint.
    step = median(b - a for a, b in zip(ends[4:-2], ends[5:-1], strict=True))
    rows = {name: median(of_one[5:-1]) for name, of_one in times.items()}
    rows["all else"] = step - sum(rows.values())
    what = f"{recipe.backbone}, {recipe.height}×{recipe.width}, B = {4 * recipe.p}"
    print(f"{what}: a step takes {1000 * step:.0f} ms. {machine()}")
    for name, seconds in rows.items():
        print(f"| {name} | {1000 * seconds:.1f} ms | {seconds / step:.1%} |")


if __name__ == "__main__":
    main()
