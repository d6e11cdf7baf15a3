"""Files of a run, read: what stands in them is of the kind that was written, or the file is refused.

Of the JSON files, the classes here have what is read again. All of it may be missing, for runs under
way and older ones; other keys are nobody's concern.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reidlib.recipes import Share

if TYPE_CHECKING:
    import pandas as pd

_Count = Field(default=0, ge=0, le=10**15)


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Scores(_Record):
    mAP: Share = 0
    mAP_market: Share = 0
    top1: Share = 0
    top2: Share = 0
    top5: Share = 0
    top10: Share = 0
    mINP: Share = 0
    queries: int = _Count
    queries_without_match: int = _Count


class _HeldOut(_Record):
    last: dict[str, Share] = {}
    per_query_sha256: str = ""


class _Metrics(_Scores):
    evaluated_on: str = ""
    test_data: str = ""
    weights_sha256: str = ""
    per_query_sha256: str = ""
    protocol: str = ""
    warning: str = ""
    flip: bool = False
    intervals: dict[str, list[Share]] = {}
    baselines: dict[str, _Scores] = {}
    with_flips: _Scores = _Scores()
    held_out: _HeldOut = _HeldOut()


class _Finding(_Record):
    name: str
    says: str
    evidence: str
    try_first: str


class _Manifest(_Record):
    status: str = ""
    step: int = _Count
    steps: int = _Count
    train_images: int = _Count
    train_identities: int = _Count
    train_data: str = ""
    weights_sha256: str = ""
    reproduce: str = ""
    wall_seconds: float = Field(default=0, ge=0)
    health: list[_Finding] = []
    went_on_after: list[int] = []
    scored: list[dict] = []


_RECORDS = {"manifest.json": _Manifest, "metrics.json": _Metrics}  # by the name of the file


class _Content(dict):
    """An object of a JSON file: a key that is not there names the file."""

    def __init__(self, file: Path, content: dict):
        super().__init__(content)
        self._file = file

    def __missing__(self, key: str):
        raise ValueError(f"{self._file} has no {key!r}. {_advice(self._file)}")


def _advice(file: Path) -> str:
    """Say what to do about a broken file of a run."""
    scored = file.name in ("metrics.json", "per_query.csv")
    again = "score the run again" if scored else "train the run again under another tag"
    return f"Restore it from a copy, or move it away and {again}."


def read_json(path: Path) -> dict:
    """Read the object in a JSON file; a ValueError names a file that holds anything else.

    So does whoever asks for a key that it lacks: no reader has to look for it first.

    Raises:
        FileNotFoundError: no such file; a pipe, on which one would wait for ever, is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    refused = {"parse_constant": lambda name: int(name)}  # NaN, which `write_json` refuses, too
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_hook=partial(_Content, path), **refused)
        _RECORDS.get(path.name, _Record).model_validate(content)
    except (ValueError, RecursionError) as error:
        cause = f"is not valid JSON ({error})"
        if isinstance(error, ValidationError):
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"])) or "the whole"
            cause = f"is not as it was written ({where}: {wrong['msg']})"
        raise ValueError(f"{path} {cause}. {_advice(path)}") from error
    return content


def read_table(path: Path, numbers: Iterable[str]) -> "pd.DataFrame":
    """Read a CSV table with these columns of numbers; a ValueError names a file that holds none."""
    import pandas as pd  # takes a second, and --help does without

    try:
        table = pd.read_csv(path)
        other = [n for n in numbers if n not in table or table[n].dtype.kind not in "iuf"]
    except ValueError as error:  # pandas' own errors, and bytes that are no text, are such
        raise ValueError(f"{path} is no CSV table ({error}). {_advice(path)}") from error
    if other:
        raise ValueError(f"{path} has no numbers in a column {other[0]!r}. {_advice(path)}")
    return table
