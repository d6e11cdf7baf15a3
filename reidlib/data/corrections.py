"""Corrections of a data set: images to leave out or to give to somebody else, in a file beside it.

The ranked-list browser saves such a file. The tables that come of it have a fingerprint of their own,
so a run, its embeddings and its scores say that they are of the corrected data.
"""

import os
import re
from pathlib import Path

import pandas as pd

NAME = "corrections.csv"  # in the data set's folder


def correct(
    root: Path, tables: dict[str, pd.DataFrame], notes: list[str]
) -> dict[str, pd.DataFrame]:
    """Return the tables of a data set as `corrections.csv` in its folder has them; `notes` say how many.

    A row has a `path`, whole or from any folder above the image, and an `action`: `drop`, `relabel`
    with the new `pid` (as the tables number them), or nothing. Further columns are for people.

    Raises:
        ValueError: another action, no pid, a path of no image or of several, no such columns.
    """
    file, counts = root / NAME, {"drop": 0, "relabel": 0}
    if not file.is_file():
        return tables
    try:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)[["path", "action", "pid"]]
    except (KeyError, ValueError) as error:  # pandas' own, and bytes that are no text, are such
        raise ValueError(f"{file} is no CSV with path, action, pid: {error}") from None
    known = {f"/{one}".replace(os.sep, "/"): one for one in pd.concat(tables.values())["path"]}
    for path, action, pid in rows[rows["action"] != ""].to_numpy():
        end = "/" + path.replace(os.sep, "/").lstrip("/")
        hits = [one for whole, one in known.items() if whole.endswith(end)]
        able = action == "drop" or (action == "relabel" and re.fullmatch(r"-1|\d{1,9}", pid))
        if len(hits) != 1 or not able:
            raise ValueError(
                f"{file}: cannot {action} {path!r} to pid {pid!r}. The data set has {len(hits)} such images, "
                "and must have one; the action is drop, or relabel with a whole number as pid: that of this "
                "data set by itself, not of several."
            )
        counts[action] += 1
        for split, table in tables.items():
            here = table["path"] == hits[0]
            if action == "relabel":
                tables[split] = table.assign(pid=table["pid"].mask(here, int(pid)))
            else:
                tables[split] = table[~here].reset_index(drop=True)
    notes.append(f"{NAME}: {counts['drop']} images left out, {counts['relabel']} relabelled.")
    return tables
