"""A data set: three tables, of one data set or of several as one, and the fingerprint of its images."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from reidlib.data.files import cut_of
from reidlib.data.layouts import LAYOUTS
from reidlib.runs import text_sha256
from reidlib.words import some


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three tables of images, and plain sentences on what was seen and passed over.

    The gallery keeps junk (pid -1) and distractors (pid 0): the evaluation drops junk itself.

    >>> from reidlib.data.tables import load
    >>> dataset = load("synthetic")
    >>> set(dataset.query["pid"]) <= set(dataset.gallery["pid"])
    True
    >>> set(dataset.query["pid"]) & set(dataset.train["pid"])
    set()
    """

    name: str
    root: Path
    train: pd.DataFrame
    query: pd.DataFrame
    gallery: pd.DataFrame
    notes: tuple[str, ...] = ()
    roots: dict[str, Path] = field(default_factory=dict)  # of each, where there are several

    @property
    def parts(self) -> dict[str, "Dataset"]:
        """The data sets that it was put together from, by name, as their rows are here; or itself."""
        parts = {}
        for name, root in self.roots.items():
            own = {s: t[t["dataset"] == name] for s, t in self.splits.items()}
            parts[name] = replace(self, name=name, root=root, roots={}, **own)
        return parts or {self.name: self}

    @property
    def test(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The tables query and gallery; a ValueError where the data set has no test."""
        if not len(self.query) or not len(self.gallery):
            raise ValueError(
                f"The data set {self.name} ({self.root}) has no test: {len(self.query)} queries and "
                f"{len(self.gallery)} gallery images. It can train; name another to be tested on."
            )
        return self.query, self.gallery

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        """The tables by name: train, query, gallery."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}


def union(datasets: list[Dataset]) -> Dataset:
    """Return several data sets as one: each person and each camera has a number of its own.

    Those of the first stay, and the next begin where they end. A column `dataset` says whose a row is.
    Raises ValueError: two have one name or the same people, or cameras are known of some alone.
    """
    names = [data.name for data in datasets]
    people = {LAYOUTS[name].same or name if name in LAYOUTS else name for name in names}
    if len(people) < len(names):
        raise ValueError(f"{some(names)}: two have one name, or the same people. Take one of them.")
    whole = [pd.concat(data.splits.values()) for data in datasets]
    blind = [name for name, t in zip(names, whole, strict=True) if (t["camid"] < 0).any()]
    if 0 < len(blind) < len(names):
        raise ValueError(f"{some(blind)}: no cameras, and others have them. Give all, or none.")
    tables, notes, pid, camid = {"train": [], "query": [], "gallery": []}, [], 0, 0
    for data, everything in zip(datasets, whole, strict=True):
        for split, rows in data.splits.items():
            moved = {"pid": rows["pid"] + pid * (rows["pid"] > 0), "dataset": data.name}
            moved["camid"] = rows["camid"] + camid * (rows["camid"] >= 0)
            tables[split].append(rows.assign(**moved))
        counts = ", ".join(f"{len(rows):,} {split}" for split, rows in data.splits.items())
        moved = f"numbers of people are {pid} higher here, those of cameras {camid}"
        said = [f"{counts}; {moved}." if pid else f"{counts}.", *data.notes]
        notes += [f"{data.name}: {text}" for text in said]
        pid += max(0, int(everything["pid"].max()))
        camid += int(everything["camid"].max()) + 1
    joined = {split: pd.concat(parts, ignore_index=True) for split, parts in tables.items()}
    roots = {data.name: data.root for data in datasets}
    root = Path(os.path.commonpath([*roots.values()]))
    return Dataset("+".join(names), root, **joined, notes=tuple(notes), roots=roots)


def fingerprint(data: Dataset | pd.DataFrame, *, mtime: bool = False) -> str:
    """Return the SHA-256 (hex) of relative path, size in bytes, pid and camid of each row, in order.

    No file is read. The same data on another machine has the same fingerprint.

    Paths are relative to a Dataset's root, or to the folder that a table's images share. With
    `mtime` the time of change counts too, so that a cache here sees an edit that keeps the size.
    """
    if isinstance(data, Dataset):
        several = [*data.parts.values()]
        parts = [(split, table, data.root) for split, table in data.splits.items()]
    else:
        groups = data.groupby("dataset", sort=False) if "dataset" in data else ()
        several = [table.drop(columns="dataset") for _, table in groups]
        shared = os.path.commonpath([*map(os.path.dirname, data["path"])]) if len(data) else ""
        parts = [("", data, shared)]
    if len(several) > 1:  # how they lie to one another says nothing
        return text_sha256("".join(fingerprint(one, mtime=mtime) for one in several))
    digest = hashlib.sha256()
    for split, table, root in parts:
        for path, pid, camid in zip(table["path"], table["pid"], table["camid"], strict=True):
            file = cut_of(path)[0]
            info = os.stat(file) if os.path.exists(file) else None  # a dead link is read later on
            name = os.path.relpath(path, root).replace(os.sep, "/")
            row = (split, name, info and info.st_size, int(pid), int(camid))
            row += (info and info.st_mtime_ns,) if mtime else ()
            digest.update(f"{row!r}\n".encode())
    return digest.hexdigest()
