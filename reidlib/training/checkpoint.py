"""Checkpoints: all that a training needs to go on, written so that a kill at any instant leaves one."""

import hashlib
import io
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
from reidlib.model.weights import read_tensors
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
    average: torch.nn.Module | None = None
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
    return sidecar.read_text(errors="replace").split()[::2] if sidecar.is_file() else []


def _whole(path: Path) -> str:
    """Return the digest of a checkpoint that is there and as it was written; "" of any other."""
    digest = sha256(path) if path.is_file() else ""
    return digest if digest in _digests(path) else ""


def _held(path: Path) -> str:
    """Return the digest of the checkpoint that stands at `path`, "" if none does.

    Where a kill has fallen between two renames, two are listed, and the file says which it is.
    """
    known = _digests(path) if path.exists() else []
    return known[0] if len(known) == 1 else _whole(path)


def _put_in_place(path: Path, write: Callable[[Path], None], digest: str, size: int = 0) -> None:
    """Put a file with a known digest at `path`, so that its sidecar fits at every instant.

    A file and its digest are two renames. Between them a kill may fall, so the sidecar first lists
    the new digest and the old one, then the file changes, then the sidecar keeps the new alone.
    """
    sidecar, line, old = Path(f"{path}.sha256"), f"{digest}  {path.name}\n", _held(path)
    write_text(sidecar, line + (f"{old}  {path.name}\n" if old else ""))
    write_atomically(path, write, size)
    write_text(sidecar, line)


def save_checkpoint(path: Path, state: dict, keep_previous: bool = True) -> None:
    """Write a checkpoint and its SHA-256 atomically; the one it replaces stays as `…_previous.pt`.

    Raises:
        OSError: among others, a full disk: says how much room is needed.
    """
    # In memory first: of a disk that fills up meanwhile, torch's own writer says nothing of use.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content, old = buffer.getbuffer(), _held(path)
    digest = hashlib.sha256(content).hexdigest()
    if keep_previous and old:
        _put_in_place(_previous(path), partial(_link_or_copy, path), old)
    _put_in_place(path, lambda fresh: fresh.write_bytes(content), digest, len(content))


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
        FileNotFoundError: no such checkpoint; as below, names the one before it, or the last one.
        ValueError: truncated, altered, or without its `.sha256`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}. {_offer(path)}")
    if not _digests(path):
        problem = f"has no {path.name}.sha256 beside it to compare with"
    elif not _whole(path):
        problem = "is truncated or altered: its SHA-256 is not the one written beside it"
    else:
        try:
            return read_tensors(path)
        except ValueError as error:
            problem = f"cannot be read: {error}"
    raise ValueError(f"{path} {problem}. {_offer(path)}")


def _offer(path: Path) -> str:
    """Say what to go on from where a checkpoint is not to be had."""
    last = path.with_name("checkpoint.pt")
    for other, resume in ((last, "auto"), (_previous(last), "previous")):
        if other != path and _whole(other):
            return f'Go on from {other.name}, which is whole, with resume="{resume}".'
    return (
        "No other is whole: put back a copy of it, give another tag, or "
        'train the run anew with resume="restart".'
    )
