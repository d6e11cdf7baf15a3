"""Checkpoints: all that a training needs to go on, written so that a kill at any instant leaves one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from reidlib.runs import sha256, write_atomically, write_text


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _known_digests(path: Path) -> list[str]:
    sidecar = _sidecar(path)
    lines = sidecar.read_text().splitlines() if sidecar.exists() else []
    return [line.split()[0] for line in lines if line.strip()]


def _put_in_place(path: Path, write: Callable[[Path], None], digest: str) -> None:
    """Put a file with a known digest at `path`, so that its sidecar fits at every instant.

    A file and its digest are two renames. Between them a kill may fall, so the sidecar first lists
    the new digest and the old one, then the file changes, then the sidecar keeps the new alone.
    """

    def note(digests: list[str]) -> None:
        write_text(_sidecar(path), "".join(f"{d}  {path.name}\n" for d in digests))

    note([digest, *(_known_digests(path)[:1] if path.exists() else [])])
    write_atomically(path, write)
    note([digest])


def save_checkpoint(path: Path, state: dict, keep_previous: bool = True) -> None:
    """Write a checkpoint and its SHA-256 atomically; the one it replaces stays as `…_previous.pt`."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        torch.save(state, fresh)
        digest = sha256(fresh)
        if keep_previous and path.exists() and len(_known_digests(path)) == 1:
            old_digest = _known_digests(path)[0]
            previous = path.with_name(f"{path.stem}_previous.pt")
            _put_in_place(previous, lambda temporary: _link_or_copy(path, temporary), old_digest)
        _put_in_place(path, lambda temporary: os.replace(fresh, temporary), digest)
    finally:
        fresh.unlink(missing_ok=True)


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
    problem = ""
    if not _known_digests(path):
        problem = f"has no {_sidecar(path).name} beside it to compare with"
    elif sha256(path) not in _known_digests(path):
        problem = "is truncated or altered: its SHA-256 is not the one written beside it"
    if not problem:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds
            problem = "cannot be read: " + str(error).split("\n")[0]
    previous = path.with_name(f"{path.stem}_previous.pt")
    offer = (
        f'The one before it is there: resume from {previous.name} with resume="previous".'
        if previous.exists() and previous != path
        else "There is none before it: train again under another tag, or delete the run's folder."
    )
    raise ValueError(f"{path} {problem}. {offer}")
