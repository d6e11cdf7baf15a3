"""The folder of a run: config, manifest, metrics, history, checkpoints; written atomically.

outputs/<dataset>_<variant>[_<tag>]/
    config.json            the recipe, complete
    manifest.json          versions, device, commit, data fingerprint, seed, times, command
    metrics.json           scores, as fractions
    history.csv            one row a logged step
    checkpoint.pt          model, optimiser, step, sampler and random state; .sha256 beside it
    checkpoint_previous.pt the one before, checkpoint_best.pt the best on held-out identities
    weights.safetensors    the model alone
    events.out.tfevents.*  TensorBoard
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from reidlib.paths import ROOT, outputs_dir
from reidlib.recipes import Recipe, stored_recipe

EXAMPLE = "synthetic_batchhard_softplus_example"  # the committed run on the built-in data


def run_name(dataset: str, recipe: Recipe, tag: str = "") -> str:
    """Return `<dataset>_<variant>[_<tag>]`, with the data set's own name.

    Raises:
        ValueError: the name would not do for a folder on every system.

    >>> run_name("market1501", Recipe(margin="soft"), "seed1")
    'market1501_batchhard_softplus_seed1'
    """
    name = "_".join(part for part in (dataset, recipe.variant, tag) if part)
    if not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise ValueError(
            f"The run would be named {name!r}: use letters, digits, '.', '_' and '-' alone in its tag."
        )
    return name


def find_run(run: str | Path) -> Path:
    """Return the folder of a run, given by its name under `outputs/` or by its path.

    Raises:
        FileNotFoundError: none such.
    """
    for folder in (outputs_dir() / run, Path(run).expanduser()):
        if (folder / "config.json").is_file():
            return folder.resolve()
    names = sorted(path.parent.name for path in outputs_dir().glob("*/config.json"))
    known = ", ".join(names) if names else "none yet: run 03_train first"
    raise FileNotFoundError(
        f"There is no run {str(run)!r} in {outputs_dir()}. Runs there: {known}."
    )


def newest_run() -> Path:
    """Return the folder of the run that was trained last here; before there is any, `EXAMPLE`.

    Released runs do not count: they have no checkpoint, and their times mean nothing.

    Raises:
        FileNotFoundError: no run has ended yet, and the example is not there.
    """
    files = outputs_dir().glob("*/weights.safetensors")
    trained = [file for file in files if (file.parent / "checkpoint.pt").is_file()]
    example = outputs_dir() / EXAMPLE / "weights.safetensors"
    found = trained or ([example] if example.is_file() else [])
    if not found:
        raise FileNotFoundError(f"No trained run in {outputs_dir()} yet: run 03_train first.")
    return max(found, key=lambda file: file.stat().st_mtime).parent.resolve()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, flush it to disk, and rename it to `path`.

    Whoever reads `path` sees the old content or the new, never a part, also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself, too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically; NaN, which JSON lacks, is an error."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON file; raise a ValueError with its name if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def update_json(path: Path, **content) -> None:
    """Add keys to a JSON file, or make it."""
    write_json(path, (read_json(path) if path.exists() else {}) | content)


def note_scored(run: Path, **facts) -> None:
    """Add an entry to `scored` in a run's manifest: when, what of, and the embeddings' SHA-256.

    Whoever chooses settings on a test split scores it more than once, and the manifest tells.
    """
    path = run / "manifest.json"
    before = read_json(path).get("scored", []) if path.exists() else []
    when = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    files = {side: sha256(run / f"embeddings_{side}.h5") for side in ("query", "gallery")}
    update_json(path, scored=[*before, {"at": when, **facts, "embeddings_sha256": files}])


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
    process holds is waited for as many seconds as `timeout`; -1: for ever.

    Raises:
        Busy: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", timeout):
            yield
    except Timeout:
        raise Busy(
            f"Another process is writing {run}. Wait for it, stop it, or give this run another tag."
        ) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
