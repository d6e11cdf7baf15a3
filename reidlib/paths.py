"""Where `data/` and `outputs/` are.

They are found from the place of this package, never from the working directory, because JupyterLab
starts a kernel in the notebook's folder and papermill in the shell's. `REID_DATA`, `REID_OUTPUTS`
and `REID_CACHE` put them elsewhere.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _place(variable: str, default: Path) -> Path:
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
