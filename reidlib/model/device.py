"""Which device, in which precision, and how long something takes there."""

import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from reidlib.recipes import Recipe


def device_name(device: torch.device) -> str:
    """Return the name of the processor or graphics card, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"(?m)^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def pick_device(name: str = "auto") -> torch.device:
    """Return the device, or raise a ValueError; `"auto"` takes CUDA, Apple's MPS, or the CPU."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("mps" if torch.backends.mps.is_available() else found)
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        cause = str(error).split("\n")[0]
        raise ValueError(f"There is no device {name!r} ({cause}). Use 'auto' or 'cpu'.") from None


def check_memory(recipe: Recipe) -> None:
    """Raise a ValueError if the images of one batch alone are more than this machine's memory."""
    with suppress(AttributeError):  # Windows does not say
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # (P·K, 3, H, W) float32, before and after the augmentation
        needed = 24 * recipe.p * recipe.k * recipe.height * recipe.width
        if needed > there:
            raise ValueError(
                f"A batch of p = {recipe.p:,} times k = {recipe.k:,} images of {recipe.height}×"
                f"{recipe.width} needs {needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f} GB "
                "of memory: lower p or k, or the size."
            )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context that runs a network in bfloat16, or changes nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def bfloat16_problem(recipe: Recipe, device: torch.device) -> str:
    """Return why bfloat16 would be wrong for the recipe's input on a device; "" where it is right.

    On the CPU, bfloat16 convolutions of stride 2 on maps one or two pixels wide are wrong (seen in
    torch 2.14): their gradient, and on processors with AMX their result too, comes from memory that
    was never written, now and then a NaN. Maps three pixels wide, width / 16, are right.
    """
    if device.type != "cpu" or (recipe.height >= 64 and recipe.width >= 48):
        return ""
    size = f"{recipe.height}×{recipe.width}"
    return f'On the CPU bfloat16 needs 64×48 at least, not {size}: use precision = "float32".'


def resolve_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """Replace precision "auto" by what the device is fast at, and right.

    bfloat16 on CUDA from Ampere on, and on CPUs with instructions for it; others emulate it slowly. A
    ValueError if bfloat16 is asked for on a CPU with an input too small for it.
    """
    problem = bfloat16_problem(recipe, device)
    if recipe.precision == "bfloat16" and problem:
        raise ValueError(problem)
    if recipe.precision != "auto":
        return recipe
    # Where nothing is known, float32 is the safe answer.
    chosen = "bfloat16" if fast_at_bfloat16(device) and not problem else "float32"
    return recipe.model_copy(update={"precision": chosen})


def fast_at_bfloat16(device: torch.device) -> bool | None:
    """Return whether the device has instructions for bfloat16; None where PyTorch does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Public from torch 2.14 on; the two names are those of x86 processors.
    can = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return can["avx512_bf16"] or can["amx_bf16"] if "avx512_bf16" in can else None


# --- how long it takes


def wait() -> None:
    """Wait for the graphics card, which works on while Python goes on."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def race(
    contenders: Mapping[str, Callable[[], object]], rounds: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Time some functions in turn, round after round, after a round to warm up.

    In turn, so that other work on the machine meets all of them: compare them within a round. Who
    has run for `seconds` in all drops out, but not before its second round. Returns, by name, the
    seconds of each round that counts.
    """
    times = {name: [] for name in contenders}
    for this in range(rounds + 1):
        for name, run in contenders.items():
            if this <= 2 or sum(times[name]) < seconds:
                start = perf_counter()
                run()
                wait()
                times[name].append(perf_counter() - start)
    return {name: of_one[1:] for name, of_one in times.items()}


def beside(one: Sequence[float], other: Sequence[float], name: str) -> str:
    """Say how long a contender of `race` takes beside another, whose `name` is given, round by round.

    >>> beside([2.0, 3.0, 4.5], [1.0, 1.0, 1.5], "b"), beside([1.0, 2.0], [1.1, 1.9], "b")
    ('3.0 times as long as b (2.0 to 3.0)', 'about as long as b (0.9 to 1.1 times)')
    """
    ratios = np.divide(one, other)
    low, high = ratios.min(), ratios.max()
    if low <= 1 <= high:
        return f"about as long as {name} ({low:,.1f} to {high:,.1f} times)"
    return f"{np.median(ratios):,.1f} times as long as {name} ({low:,.1f} to {high:,.1f})"
