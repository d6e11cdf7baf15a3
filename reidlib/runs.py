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
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout

from reidlib.networks import EmbeddingNet
from reidlib.paths import ROOT, data_dir, outputs_dir
from reidlib.recipes import Recipe

EXAMPLE = "synthetic_batchhard_softplus_example"  # the committed run on the embedded data


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
        FileNotFoundError: no such run; names those that there are.
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
    """Return the folder of the run under `outputs/` whose training ended last on this machine.

    Released runs came with the repository: they have no checkpoint, and their times mean nothing.
    Where nothing was trained yet, the newest run is `EXAMPLE`, which came with it for that.

    Raises:
        FileNotFoundError: no run has ended yet, and the example is not there.
    """
    finished = [
        path
        for path in outputs_dir().glob("*/weights.safetensors")
        if (path.parent / "checkpoint.pt").is_file()
    ]
    if finished:
        return max(finished, key=lambda path: path.stat().st_mtime).parent.resolve()
    if (outputs_dir() / EXAMPLE / "weights.safetensors").is_file():
        return (outputs_dir() / EXAMPLE).resolve()
    raise FileNotFoundError(f"No trained run in {outputs_dir()} yet: run 03_train first.")


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
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON; names the file.
    """
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
    """Return the recipe that a run was made with.

    Raises:
        ValueError: config.json is broken, or from a version whose settings differ.
    """
    try:
        return Recipe(**read_json(run / "config.json"))
    except ValueError as error:
        raise ValueError(f"{run / 'config.json'} does not hold a recipe: {error}") from error


@contextmanager
def lock(run: Path):
    """Hold a run's folder against every other process that writes runs.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        RuntimeError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(
            f"Another process is writing {run}. Wait for it, stop it, or give this run another tag."
        ) from None


# --- checkpoints


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# --- weights that others can load


def build_model(recipe: Recipe, pretrained: bool = True) -> EmbeddingNet:
    """Return a recipe's network as it is before the first step: its seed decides random weights.

    A relative path of weights is looked for in the working directory, then in the data folder. The
    caller's random state is left as it was.
    """
    weights = None if recipe.weights == "none" or not pretrained else recipe.weights
    if weights not in (None, "imagenet") and not Path(weights).expanduser().is_file():
        in_data = data_dir() / weights
        weights = in_data if in_data.is_file() else weights
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return EmbeddingNet(
            recipe.backbone, weights, recipe.dim, recipe.hidden, recipe.last_stride, recipe.head
        )


def save_weights(path: Path, model: torch.nn.Module, recipe: Recipe, *, half: bool = False) -> None:
    """Write a model alone, with its recipe in the file, so that one file is enough to load it.

    `half`: matrices and filters as float16. The rest is little, and a small variance of a BatchNorm
    would be lost.
    """
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.dim() > 1 else v for k, v in state.items()}
    # One entry: the order of several is not fixed, and equal models shall make equal files.
    metadata = {"reidlib_recipe": recipe.model_dump_json()}
    # Not safetensors' save_file: what it makes only its owner may read.
    content = safetensors.torch.save(state, metadata)
    write_atomically(path, lambda file: file.write_bytes(content))


def load_model(run: str | Path, device: str | torch.device = "cpu") -> EmbeddingNet:
    """Return a trained network, ready to embed, from a run or from a `weights.safetensors` alone.

    Args:
        run: a run's name, its folder, or a file that `save_weights` wrote.
        device: where to put it.

    Returns:
        the network in evaluation mode; its `recipe` attribute says what input it expects.

    Raises:
        FileNotFoundError: no such run, or a run without weights.
        ValueError: the file is broken or is not one of ours.
    """
    path = Path(run).expanduser()
    if not (path.suffix == ".safetensors" and path.is_file()):
        path = find_run(run) / "weights.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no weights.safetensors: its training has not ended."
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            recipe = Recipe.model_validate_json((file.metadata() or {})["reidlib_recipe"])
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except KeyError as error:
        raise ValueError(
            f"{path} has no recipe inside, so it is not a model of this library. "
            f"Backbone weights from elsewhere go into training: weights=PATH."
        ) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    model = build_model(recipe, pretrained=False)
    model.load_state_dict(
        {k: v.long() if k.endswith("num_batches_tracked") else v for k, v in state.items()}
    )
    model.recipe = recipe
    return model.eval().to(device)


# --- manifest

PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pillow", "safetensors", "h5py", "papermill")


def environment(device: torch.device) -> dict:
    """Return what the manifest says of the machine and the software."""
    return {
        "command": _command(sys.argv),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
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
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this repository, with `+changes` where the tree differs from it."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
