"""Where `data/` and `outputs/` are.

They are found from the place of this package, never from the working directory, because JupyterLab
starts a kernel in the notebook's folder and papermill in the shell's. `REID_DATA`, `REID_OUTPUTS`
and `REID_CACHE` put them elsewhere.
"""

import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from psutil import pid_exists

ROOT = Path(__file__).resolve().parent.parent


def check_place() -> None:
    """Refuse to work for another copy of this repository, which has code, data and outputs of its own.

    An environment that was copied with its folder still imports the library of the original. It is
    told by the working directory; outside any copy, by the place of the environment.

    Raises:
        RuntimeError: names both folders, and how to mend it.
    """
    around = []
    with suppress(FileNotFoundError):  # the working directory was removed
        around = [Path.cwd(), *Path.cwd().parents]
    if "PYTHONPATH" not in os.environ:  # a choice of its own
        around.append(Path(sys.prefix).parent)
    here = next((place for place in around if (place / "reidlib/paths.py").is_file()), ROOT)
    if not here.samefile(ROOT):
        raise RuntimeError(
            f"This is {here}, but Python runs the library of {ROOT}: was the folder copied or moved with "
            f"its environment? In {here}, `make clean` and `make setup` give it one of its own."
        )


def _place(variable: str, default: Path) -> Path:
    check_place()
    return Path(os.environ.get(variable) or default).expanduser().resolve()


def data_dir() -> Path:
    """Return the folder of the data sets: `$REID_DATA`, or `data/` of the repository."""
    return _place("REID_DATA", ROOT / "data")


def outputs_dir() -> Path:
    """Return the folder of the runs: `$REID_OUTPUTS`, or `outputs/` of the repository."""
    return _place("REID_OUTPUTS", ROOT / "outputs")


def cache_dir() -> Path:
    """Return the folder of decoded images: `$REID_CACHE`, or `.cache` in the data folder."""
    return _place("REID_CACHE", data_dir() / ".cache")


def temporary(path: Path, form: str = ".{name}.{mine}.tmp") -> Path:
    """Return a name beside `path` for what is being made, and sweep that folder.

    The name has the machine and the process: another machine may be writing on the same disk.
    """
    sweep(path.parent)
    mine = f"{platform.node()}-{os.getpid()}"
    return path.with_name(form.format(name=path.name, stem=path.stem, mine=mine))


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-made in a folder, of this or an older version."""
    process = rf"(?:{re.escape(platform.node())}-)?(\d+)"
    ours = re.compile(rf"\..+\.{process}\.tmp|.+\.running-{process}\.ipynb")
    for left in folder.iterdir():
        made = ours.fullmatch(left.name)
        if made and not pid_exists(int(made[1] or made[2])):  # `os.kill` would end it on Windows
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(True)
