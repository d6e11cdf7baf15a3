"""Checkpoints: all that a training needs to go on, written so that a kill at any instant leaves one."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from reidlib.data.augment import Augmentation
from reidlib.data.sampler import PKSampler
from reidlib.model.network import EmbeddingNet
from reidlib.runs import sha256, write_atomically, write_text

PARTS = ("model", "optimiser", "sampler")
VALUES = ("step", "best", "seconds", "history", "facts")


@dataclass(eq=False)
class State:
    """All that a training step changes. With torch's random state, it decides every step to come."""

    model: EmbeddingNet
    optimiser: torch.optim.Optimizer
    sampler: PKSampler
    augmentation: Augmentation
    step: int = 0  # the last one that is done
    best: dict | None = None  # step, mAP and top1 of the best held-out score; None before the first
    seconds: float = 0.0  # that training has taken, in all processes that worked at it
    history: list[dict[str, float]] = field(default_factory=list)  # a row for each logged step
    facts: dict = field(default_factory=dict)  # that only the beginning shows, for `health`

    def state_dict(self) -> dict:
        """Return what `save_checkpoint` writes: tensors and plain values alone."""
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        values = {name: getattr(self, name) for name in VALUES}
        augmentation, others = self.augmentation.generator.get_state(), torch.get_rng_state()
        return parts | values | {"augmentation": augmentation, "torch_random": others}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned; torch's random state is set, too."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.augmentation.generator.set_state(state["augmentation"])
        torch.set_rng_state(state["torch_random"])
        for name in VALUES:
            setattr(self, name, state.get(name, {}))  # old checkpoints have no facts


def _digests(path: Path) -> list[str]:
    """Return the digests in the file beside `path`, whose lines are those of `sha256sum`."""
    sidecar = Path(f"{path}.sha256")
    return sidecar.read_text().split()[::2] if sidecar.exists() else []


def _put_in_place(path: Path, write: Callable[[Path], None], digest: str) -> None:
    """Put a file with a known digest at `path`, so that its sidecar fits at every instant.

    A file and its digest are two renames. Between them a kill may fall, so the sidecar first lists
    the new digest and the old one, then the file changes, then the sidecar keeps the new alone.
    """
    sidecar, line = Path(f"{path}.sha256"), f"{digest}  {path.name}\n"
    old = f"{_digests(path)[0]}  {path.name}\n" if path.exists() and _digests(path) else ""
    write_text(sidecar, line + old)
    write_atomically(path, write)
    write_text(sidecar, line)


def save_checkpoint(path: Path, state: dict, keep_previous: bool = True) -> None:
    """Write a checkpoint and its SHA-256 atomically; the one it replaces stays as `…_previous.pt`."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        torch.save(state, fresh)
        digest, old = sha256(fresh), _digests(path)
        if keep_previous and path.exists() and len(old) == 1:
            _put_in_place(_previous(path), partial(_link_or_copy, path), old[0])
        _put_in_place(path, partial(os.replace, fresh), digest)
    finally:
        fresh.unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}_previous.pt")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint, tensors and plain values alone, after comparing its SHA-256.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: truncated, altered, or without its `.sha256`; names the one before it.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    if not (known := _digests(path)):
        problem = f"has no {path.name}.sha256 beside it to compare with"
    elif sha256(path) not in known:
        problem = "is truncated or altered: its SHA-256 is not the one written beside it"
    else:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds
            problem = "cannot be read: " + str(error).split("\n")[0]
    offer = "There is none before it: train again under another tag, or delete the run's folder."
    if _previous(path).exists():
        offer = f'Go on from the one before it, {_previous(path).name}, with resume="previous".'
    raise ValueError(f"{path} {problem}. {offer}")
