"""The folder of a run: config, manifest, metrics, history, checkpoints; written atomically.

outputs/<dataset>_<variant>[_<tag>]/
    config.json            the recipe, complete
    manifest.json          versions, device, commit, data fingerprint, seed, times, command, and the
                           SHA-256 of weights.safetensors
    metrics.json           scores, as fractions
    history.csv            one row a logged step
    checkpoint.pt          model, optimiser, step, sampler and random state; .sha256 beside it
    checkpoint_previous.pt the one before, checkpoint_best.pt the best on held-out identities
    weights.safetensors    the model alone
    events.out.tfevents.*  TensorBoard

outputs/<name>~before1/    a run that is being replaced, whole, until its successor has a checkpoint
"""

import errno
import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from reidlib.paths import ROOT, outputs_dir, sweep, temporary
from reidlib.recipes import Recipe, stored_recipe
from reidlib.records import read_json

EXAMPLE = "synthetic_batchhard_softplus_example"  # the committed run on the built-in data
COMPARED = "trained_for_comparison"  # in a manifest: a row that `workbook.compare` trained
_READY = ".ready"  # in a run: files on their way to their places


def run_name(dataset: str, recipe: Recipe, tag: str = "") -> str:
    """Return `<dataset>_<variant>[_<tag>]`, with the data set's own name.

    Raises:
        ValueError: the name would not do for a folder on every system.

    >>> run_name("market1501", Recipe(margin="soft"), "seed1")
    'market1501_batchhard_softplus_seed1'
    """
    # str: a tag of digits may come as a number
    name = "_".join(part for part in (dataset, recipe.variant, str(tag)) if part)
    if not all(c.isalnum() or c in "._-+" for c in name) or name.startswith("."):
        raise ValueError(
            f"The run would be named {name!r}: use letters, digits, '.', '_', '-' and '+' alone in its tag."
        )
    return name


def find_run(run: str | Path) -> Path:
    """Return the folder of a run, given by its name under `outputs/` or by its path.

    Raises:
        FileNotFoundError: none such.
    """
    for folder in (outputs_dir() / run, Path(run).expanduser()):
        if (folder / "config.json").is_file():
            settle(folder)
            return folder.resolve()
    names = sorted(path.parent.name for path in outputs_dir().glob("*/config.json"))
    known = ", ".join(names) if names else "none yet: run 03_train first"
    raise FileNotFoundError(
        f"There is no run {str(run)!r} in {outputs_dir()}. Runs there: {known}."
    )


def newest_run() -> Path:
    """Return the folder of the run that was trained last here; before there is any, `EXAMPLE`.

    Released runs do not count: they have no checkpoint, and their times mean nothing. Nor do rows that
    a comparison trained, some of them to fail: their manifests say what they are.

    Raises:
        FileNotFoundError: no run has ended yet, and the example is not there.
        ValueError: a manifest of a newer run is broken.
    """
    files = [f for f in in_runs("weights.safetensors") if f.with_name("checkpoint.pt").is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        if not read_json(file.with_name("manifest.json"), {}).get(COMPARED):
            return file.parent.resolve()
    if (outputs_dir() / EXAMPLE / "weights.safetensors").is_file():
        return (outputs_dir() / EXAMPLE).resolve()
    rows = "; rows of a comparison you can open by name" if files else ""
    raise FileNotFoundError(f"No trained run in {outputs_dir()} yet: run 03_train first{rows}.")


def in_runs(name: str) -> list[Path]:
    """Return this file of all runs under `outputs/` that have it, but of those that are set aside."""
    return [file for file in sorted(outputs_dir().glob(f"*/{name}")) if "~" not in file.parent.name]


def asides(run: Path) -> list[Path]:
    """Return where the runs are that `set_aside` moved out of the way of this one."""
    return sorted(run.parent.glob(f"{run.name}~before*"))  # no run's own name has a "~"


def set_aside(run: Path) -> Path:
    """Move a run out of the way of another of its name, and return where it is.

    It is a rename of the whole folder, so a kill leaves the run whole, here or there.
    """
    places = (run.with_name(f"{run.name}~before{n}") for n in itertools.count(1))
    return run.rename(next(place for place in places if not place.exists()))


def write_atomically(path: Path, write: Callable[[Path], None], size: int = 0) -> None:
    """Let `write` make a file beside `path`, flush it to disk, and rename it to `path`.

    Whoever reads `path` sees the old content or the new, never a part, also after a power cut.

    Raises:
        OSError: among others, that the disk is full: says where, and how many bytes are needed, if
            that is known, as `size`.
        ValueError: a folder, a device or a pipe is there, which the file would replace.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is there, and is no file: give another name.")
    fresh = temporary(path)
    try:
        write(fresh)
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fresh.unlink(missing_ok=True)
        needed = f"it needs {size / 1e6:,.1f} MB, and " if size else ""
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OSError(
            f"The disk is full: no room for {path} ({needed}{free:,.1f} MB are free). What was there "
            "before is as it was. Make room, then do the same again."
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself, too; Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically; NaN, which JSON lacks, is an error."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def update_json(path: Path, **content) -> None:
    """Add keys to a JSON file, or make it."""
    write_json(path, read_json(path, {}) | content)


@contextmanager
def together(folder: Path) -> Iterator[Path]:
    """Give an empty folder for files that belong together: at the end all come into `folder`, or none.

    They count from one rename on. Who is killed after it leaves the rest to `settle`, and who is
    killed before it, or finds the disk full, leaves what was there. Hold the run's lock meanwhile.
    """
    settle(folder)
    fresh = folder / ".unfinished"
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
    fresh.mkdir()
    try:
        yield fresh
        fresh.rename(folder / _READY)
    except OSError as error:
        raise OSError(f"{folder} could not be written, and is as it was: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    settle(folder)


def settle(folder: Path) -> None:
    """Put the files in place that `together` had ready when its process was killed."""
    ready = folder / _READY
    for path in [*sorted(ready.rglob("*"), reverse=True), ready]:  # a folder after what is in it
        if path.is_file():
            target = folder / path.relative_to(ready)
            target.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # another process was first
                os.replace(path, target)
        else:
            with suppress(OSError):  # not there, or there is something in it again
                path.rmdir()


def read_recipe(run: Path) -> Recipe:
    """Return a run's recipe; raise a ValueError if it is broken or of a version that differs."""
    try:
        return stored_recipe(read_json(run / "config.json"))
    except ValueError as error:
        raise ValueError(f"{run / 'config.json'} does not hold a recipe: {error}") from error


class Busy(RuntimeError):
    """Another process is writing a run."""


@contextmanager
def lock(run: Path, timeout: float = 0):
    """Hold a run's folder against every other process that writes runs.

    The lock is the operating system's: it ends with the process, however that ends. One that another
    process holds is waited for as many seconds as `timeout`; -1: for ever. Whoever gets it removes
    what killed processes left half-written.

    Raises:
        Busy: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", timeout):
            sweep(run)
            for left in run.glob(".release-*"):  # `release` holds the lock that is held here
                shutil.rmtree(left, ignore_errors=True)
            yield
    except Timeout:
        raise Busy(
            f"Another process is writing {run}. Wait for it, stop it, or give this run another tag."
        ) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text as UTF-8: the same whatever ends lines in its file."""
    return hashlib.sha256(text.encode()).hexdigest()


PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pillow", "safetensors", "h5py", "papermill")


def environment() -> dict:
    """Return what the manifest says of the machine and the software."""
    return {
        "command": _command(sys.argv),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
    }


def _command(argv: list[str]) -> str:
    """Return what was typed, as far as it can be known, without the path of the program."""
    program = Path(argv[0])
    if "ipykernel" in argv[0]:
        return "(in a notebook)"
    ours = program.name == "__main__.py" and program.parent.name == "reidlib"
    return " ".join(["python -m reidlib" if ours else program.name, shlex.join(argv[1:])]).strip()


def _version(name: str) -> str | None:
    """Return the version of a package; None where it is not installed, as papermill on a server."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this repository, with `+changes` where the tree differs from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(command, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
