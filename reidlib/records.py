"""Files of a run, read: what stands in them is of the kind that was written, or the file is refused.

Of the JSON files, the records here have what is read again. All of it may be missing, for runs under
way and older ones; other keys are nobody's concern.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from reidlib.recipes import Share

if TYPE_CHECKING:
    import pandas as pd

_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, le=10**15)]


def _record(needed: bool = False, **kinds: Any) -> type[BaseModel]:
    """Return a model of an object with values of these kinds, if they are there or `needed`."""
    default = ... if needed else None
    kinds = {name: (kind, default) for name, kind in kinds.items()}
    return create_model("Record", __config__=_CONFIG, **kinds)


_SCORES = dict.fromkeys(("mAP", "mAP_market", "top1", "top2", "top5", "top10", "mINP"), Share)
_SCORES |= {"queries": _Count, "queries_without_match": _Count}
_SAID = ("evaluated_on", "test_data", "weights_sha256", "per_query_sha256", "protocol", "warning")
_METRICS = _record(
    **(_SCORES | dict.fromkeys(_SAID, str)),
    flip=bool,
    intervals=dict[str, list[Share]],
    baselines=dict[str, _record(**_SCORES)],
    with_flips=_record(**_SCORES),
    held_out=_record(last=dict[str, Share], per_query_sha256=str),
)
_MANIFEST = _record(
    **dict.fromkeys(("status", "train_data", "weights_sha256", "reproduce"), str),
    **dict.fromkeys(("step", "steps", "train_images", "train_identities"), _Count),
    wall_seconds=Annotated[float, Field(ge=0)],
    health=list[_record(True, name=str, says=str, evidence=str, try_first=str)],
    went_on_after=list[int],
    scored=list[dict],
)
_RECORDS = {"manifest.json": _MANIFEST, "metrics.json": _METRICS}  # by the name of the file


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


def read_json(path: Path, absent: dict | None = None) -> dict:
    """Read the object in a JSON file; a ValueError names a file that holds anything else.

    So does whoever asks for a key that it lacks: no reader has to look for it first. `absent` is given
    back where there is nothing of that name.

    Raises:
        FileNotFoundError: no such file; a pipe, on which one would wait for ever, is none.
    """
    if absent is not None and not path.exists():
        return absent
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    refused = {"parse_constant": lambda name: int(name)}  # NaN, which `write_json` refuses, too
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_hook=partial(_Content, path), **refused)
        _RECORDS.get(path.name, _record()).model_validate(content)
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
