"""Corrections of a data set: images to leave out or to give to somebody else, in a file beside it.

The ranked-list browser saves such a file. The tables that come of it have a fingerprint of their own,
so a run, its embeddings and its scores say that they are of the corrected data.
"""

import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
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
    file, done = root / NAME, {"drop": {}, "relabel": {}}
    if not file.is_file():
        return tables
    try:
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)[["path", "action", "pid"]]
    except (KeyError, ValueError) as error:  # pandas' own, and bytes that are no text, are such
        raise ValueError(f"{file} is no CSV with path, action, pid: {error}") from None
    named = defaultdict(list)
    for one in {*pd.concat(tables.values())["path"]}:
        named[os.path.basename(one)].append(one)
    for path, action, pid in rows[rows["action"] != ""].to_numpy():
        end = "/" + path.replace(os.sep, "/").lstrip("/")
        likely = named[end.rsplit("/", 1)[1]]
        hits = [one for one in likely if f"/{one}".replace(os.sep, "/").endswith(end)]
        able = action == "drop" or (action == "relabel" and re.fullmatch(r"-1|\d{1,9}", pid))
        if len(hits) != 1 or not able:
            raise ValueError(
                f"{file}: cannot {action} {path!r} to pid {pid!r}. The data set has {len(hits)} such images, "
                "and must have one; the action is drop, or relabel with a whole number as pid: that of this "
                "data set by itself, not of several."
            )
        done[action][hits[0]] = pid
    left_out, pids = done.values()
    for split, table in tables.items():
        kept = table[~table["path"].isin([*left_out])]
        new = [pids.get(path, pid) for path, pid in zip(kept["path"], kept["pid"], strict=True)]
        tables[split] = kept.assign(pid=np.array(new, np.int64)).reset_index(drop=True)
    notes.append(f"{NAME}: {len(left_out)} images left out, {len(pids)} relabelled.")
    return tables
