"""Data sets as tables: Market-1501, folders of identities, CSV lists, and checks of what was read.

One row is one image. Columns: `path` (absolute), `pid` (identity; -1 junk, 0 distractor) and
`camid` (camera; -1 in every row where cameras are unknown). Identities that are names, not
numbers, are numbered 1, 2, … over all splits together, and keep the name in a column `label`.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from reidlib.data.files import (
    MARKET_NAME,
    SPLIT_FOLDERS,
    compiled,
    existing,
    find_lists,
    find_market,
    groups_of,
    read_folder,
    read_list,
    unpack,
    walk,
)
from reidlib.paths import data_dir
from reidlib.words import some

MARKET_FOLDER = "Market-1501-v15.09.15"
MARKET_COUNTS = {"train": 12936, "query": 3368, "gallery": 19732}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three tables of images, and plain sentences on what was seen and passed over.

    The gallery keeps junk (pid -1) and distractors (pid 0): the evaluation drops junk itself.
    """

    name: str
    root: Path
    train: pd.DataFrame
    query: pd.DataFrame
    gallery: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        """The tables by name: train, query, gallery."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}


# --- loading


def load(
    dataset: str | Path = "market1501",
    *,
    pattern: str | None = None,
    image_root: str | Path | None = None,
) -> Dataset:
    """Load a data set: the one door, and every argument may be a plain string.

    `dataset` is one of
    - "market1501": the folder `Market-1501-v15.09.15`, or its zip, in the data folder;
    - "synthetic": the built-in data set, drawn into the data folder when it is not there;
    - a folder in Market-1501's layout, its parent, or a zip of it;
    - a folder of identities, split or not, see `folder`;
    - a folder with the lists train.csv, query.csv and gallery.csv (or …_test.csv), or one CSV
      for training only, see `csv_lists`.
    A relative path is looked for in the working directory, then in the data folder.

    `pattern` is a regular expression over file names with the groups `pid` and `camid`, or
    "market1501" for Market-1501's own; see `folder` and `csv_lists`. `image_root` is where the
    relative paths of CSV lists start.

    Raises FileNotFoundError or ValueError that say what was looked for and what to do.
    """
    pattern, image_root = pattern or None, image_root or None  # "" is how a notebook says None
    if str(dataset) in ("market1501", "synthetic"):
        if pattern or image_root:
            raise ValueError(f"pattern and image_root are for your own data, not for {dataset!r}.")
        return market1501() if str(dataset) == "market1501" else _synthetic()
    path = existing(dataset)
    kind = path.suffix.lower() if path.is_file() else "folder"
    if kind not in ("folder", ".zip", ".csv"):
        raise ValueError(f"{path} is neither a folder, a .zip nor a .csv list.")
    if kind == ".csv":
        return csv_lists(train=path, image_root=image_root, pattern=pattern)
    if kind == ".zip":
        path = unpack(path)
    market = find_market(path)
    lists = {} if market else find_lists(path)
    if lists:
        return csv_lists(**lists, image_root=image_root, pattern=pattern)
    if image_root:
        raise ValueError(f"image_root goes with CSV lists, and {path} has none.")
    if market and not pattern and _slug(market.name).startswith("market1501"):
        return market1501(market)
    return folder(market or path, pattern=pattern)


def market1501(root: str | Path | None = None) -> Dataset:
    """Market-1501, from `root` (the folder, or one above it) or from the data folder.

    Files are named PID_cCsS_FRAME_BOX.jpg. As published: 12,936 training images of 751
    identities, 3,368 queries of 750, and 19,732 gallery images, 3,819 of them junk and 2,798
    distractors. `check` compares with these counts.
    """
    if root is None:
        places = [p for p in data_dir().glob("[!.]*") if _slug(p.name).startswith("market1501")]
        places.sort(key=lambda p: (not p.name.startswith(MARKET_FOLDER), p.name))
        folders = [p for p in places if p.is_dir() and find_market(p)]
        zips = [p for p in places if p.suffix.lower() == ".zip" and p.is_file()]
        if folders:
            root = folders[0]
        elif zips:
            root = unpack(zips[0])
        else:
            raise FileNotFoundError(
                f"Market-1501 is not here: looked in {data_dir()} for the folder {MARKET_FOLDER} "
                "(with bounding_box_train in it) and for Market-1501*.zip. Get it from the "
                "Market-1501 project page of its author, Liang Zheng, or from a copy on Kaggle, "
                'and put the folder or the zip there; or use dataset="synthetic".'
            )
    base = find_market(existing(root))
    if base is None:
        raise FileNotFoundError(
            f"{root} has no folder bounding_box_train, nor has any folder in it: "
            "give the folder that has bounding_box_train, query and bounding_box_test in it."
        )
    return replace(folder(base, pattern="market1501"), name="market1501")


def folder(root: str | Path, *, pattern: str | None = None, seed: int = 0) -> Dataset:
    """Load a folder of images.

    Split: sub-folders train, query and gallery (also bounding_box_train, bounding_box_test and
    test). Without them identities are split with `seed`: half for testing, as in Market-1501,
    chosen among those that can be matched, and of each tested identity one query a camera (one
    query where cameras are unknown); see `hold_out`.

    Identity: the file name, if `pattern` has a group `pid`; else the first sub-folder
    (`train/<identity>/any.jpg`). Camera: the group `camid` of the pattern, else unknown (-1).
    Folders in Market-1501's layout use Market-1501's names when no pattern is given.

    A flat folder: `folder("photos", pattern=r"(?P<pid>[a-z]+)_cam(?P<camid>\\d)")`.
    """
    root = existing(root)
    found = {
        split: next((root / n for n in names if (root / n).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    if not any(found.values()):
        rows, notes = read_folder(root, pattern)
        tables, more = _number({"all": rows})
        note = f"No split is given: identities were split in halves with seed {seed}."
        return _dataset(root.name, root, _split(tables["all"], seed), [*notes, *more, note])
    missing = [split for split, place in found.items() if place is None]
    if missing:
        wanted = ", ".join(f"{s} ({' or '.join(SPLIT_FOLDERS[s])})" for s in missing)
        raise FileNotFoundError(
            f"{root} lacks a folder for {wanted}: unpack it again, or give the right folder."
        )
    if pattern is None and found["train"].name == "bounding_box_train":
        pattern = "market1501"
    raw, notes = {}, []
    for split, place in found.items():
        raw[split], seen = read_folder(place, pattern)
        notes += seen
    tables, more = _number(raw)
    return _dataset(root.name, root, tables, notes + more)


def csv_lists(
    train: str | Path | None = None,
    query: str | Path | None = None,
    gallery: str | Path | None = None,
    *,
    image_root: str | Path | None = None,
    pattern: str | None = None,
) -> Dataset:
    """Load CSV lists, as triplet-reid writes them or with a header.

    A row is `pid,path` or `pid,path,camid`; with a header `pid,path[,camid]` columns may stand
    in any order, among others. Paths are absolute or start at `image_root`, which is each list's
    own folder when not given. Without the column, the camera is the group `camid` of `pattern`
    ("market1501" for Market-1501's names); without both it is unknown: never guessed.
    A list not given is an empty table, with a note. The name is that of the lists' folder.
    """
    given = {"train": train, "query": query, "gallery": gallery}
    raw = {s: read_list(source, image_root, pattern) for s, source in given.items() if source}
    if not raw:
        raise ValueError("no list given: give train=, or query= and gallery=.")
    if ("query" in raw) != ("gallery" in raw):
        raise ValueError("query and gallery go together: give both lists or neither.")
    tables, notes = _number(raw)
    absent = [split for split in given if split not in raw]
    if absent:
        able = "train, not test" if "train" in raw else "test, not train"
        notes.append(f"No list for {' and '.join(absent)} was given: this data set can {able}.")
        tables |= {split: next(iter(tables.values())).iloc[:0] for split in absent}
    lists = existing(next(source for source in given.values() if source)).parent
    root = existing(image_root) if image_root else lists
    return _dataset(lists.name, root, tables, notes)


def image_list(
    source: str | Path,
    *,
    pattern: str | None = None,
    image_root: str | Path | None = None,
    must_exist: bool = True,
) -> pd.DataFrame:
    """One table from a folder (all images in it, at any depth) or a CSV list, to embed or search.

    Identities and cameras of a folder come from `pattern` alone; without it both are -1. A list
    with a header needs no `pid`, only `path`: then it is -1.
    Identities that are names raise ValueError: numbered list by list they would not agree. With
    `must_exist=False` a list's images need not be here: it may belong to embeddings from elsewhere.
    """
    path = existing(source)
    if path.is_file():
        rows = read_list(path, image_root, pattern, must_exist, labelled=False)
    elif pattern and "pid" in compiled(pattern).groupindex:
        rows, _ = read_folder(path, pattern)
    else:
        names, _ = walk(path)
        cams = groups_of(names, pattern, path)["camid"] if pattern else "-1"
        rows = pd.DataFrame({"path": [str(path / n) for n in names], "pid": "-1", "camid": cams})
    if not len(rows):
        raise ValueError(f"{path} holds no images.")
    tables, _ = _number({"": rows})
    if "label" in tables[""]:
        raise ValueError(
            f"{path} has identities that are names; a list read alone cannot number them so that "
            "another list agrees. Use numbers, or load the lists together with csv_lists."
        )
    return tables[""]


def ignored_files(source: str | Path) -> str:
    """Return a sentence on what `image_list` passes over in a folder: no images, or hidden; or ""."""
    path = existing(source)
    return "".join(walk(path)[1]) if path.is_dir() else ""


def hold_out(
    train: pd.DataFrame, identities: int | str | Path = 100, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Take identities out of training for validation: (train, query, gallery).

    Settings chosen on the result never see the test split. `identities` is how many, drawn with
    `seed`, or a file that names them, see `split_file`. Only identities that can be matched
    are taken: with two cameras or more, or two images or more where cameras are unknown. Of each,
    one image a camera becomes a query, drawn with `seed`, from cameras with two images or more;
    where no camera has two, one image alone. So every query has a match in another camera.

    Raises ValueError when `identities` leaves nothing to train on, or too few can be matched.
    """
    train = train.reset_index(drop=True)
    matchable = _matchable(train)
    total = train.loc[train["pid"] > 0, "pid"].nunique()
    named = None if isinstance(identities, int) else split_file(identities)
    count = identities if named is None else len(named)
    if named is not None and not np.isin(named, matchable).all():
        wrong = named[~np.isin(named, matchable)]
        raise ValueError(
            f"{identities} names {len(wrong)} identities, first {wrong[0]}, that are not in the "
            "training split with images of two cameras: is it the split of another data set?"
        )
    if not 0 < count <= len(matchable) or count >= total:
        raise ValueError(
            f"cannot hold out {count} of {total} identities: {len(matchable)} have images of "
            "two cameras (or two images, with no cameras), and some must stay for training."
        )
    rng = np.random.default_rng(seed)
    if named is None:
        named = rng.choice(matchable, size=count, replace=False)
    held = train["pid"].isin(named)
    test = train[held]
    mixed = test.iloc[rng.permutation(len(test))]
    group = mixed.groupby(["pid", "camid"])["pid"]
    several = group.transform("size") > 1
    picked = (several & (group.cumcount() == 0)).astype(bool)
    # Identities with one image in each camera: one query, and the others stay to be found.
    lone = ~mixed["pid"].isin(mixed["pid"][picked])
    picked |= lone & ~mixed["pid"].duplicated()
    query = test.index.isin(mixed.index[picked])
    return tuple(t.reset_index(drop=True) for t in (train[~held], test[query], test[~query]))


def split_file(name: str | Path) -> np.ndarray:
    """Read the identities (pids) that a file names, one a line; `#` starts a comment.

    `name` is "market1501", the split of this repository on which settings are chosen (101 of the
    751 training identities), or the path of a file. Raises FileNotFoundError or ValueError.
    """
    path = Path(__file__).parent / "splits" / f"{name}.txt"
    path = path if path.is_file() else existing(name)
    words = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    try:
        pids = np.array([int(word) for word in words if word])
    except ValueError as error:
        raise ValueError(f"{path} must hold one identity (a number) a line: {error}.") from None
    if len(pids) == 0 or len(set(pids)) < len(pids):
        raise ValueError(f"{path} names no identity, or one of them twice.")
    return pids


# --- one image


def fingerprint(data: Dataset | pd.DataFrame, *, mtime: bool = False) -> str:
    """SHA-256 (hex) of relative path, size in bytes, pid and camid of each row, in order.

    `data` is a Dataset (all splits, paths relative to its root) or a table (relative to the
    folder that its images share). Cheap: no file is read. The same data on another machine has
    the same fingerprint; with `mtime` the time of change counts too, so that a cache on this
    machine sees an edit that keeps the size.
    """
    if isinstance(data, Dataset):
        parts = [(split, table, str(data.root)) for split, table in data.splits.items()]
    else:
        shared = os.path.commonpath([os.path.dirname(p) for p in data["path"]]) if len(data) else ""
        parts = [("", data, shared)]
    digest = hashlib.sha256()
    for split, table, root in parts:
        for path, pid, camid in zip(table["path"], table["pid"], table["camid"], strict=True):
            info = os.stat(path)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            row = (split, name, info.st_size, int(pid), int(camid))
            digest.update(repr(row + ((info.st_mtime_ns,) if mtime else ())).encode() + b"\n")
    return digest.hexdigest()


# --- checking


# --- reading the disk


def _synthetic() -> Dataset:
    """Draw the built-in data if it is missing; any size drawn there before is taken as it is."""
    from reidlib.data.synthetic import VERSION, draw_dataset

    root = data_dir() / "synthetic"
    if not root.exists():
        draw_dataset(root)
    marker = root / "dataset.json"
    if not marker.is_file() or json.loads(marker.read_text()).get("version") != VERSION:
        raise ValueError(
            f"{root} was not drawn by this version of reidlib: remove that folder, and it is drawn "
            "again."
        )
    return replace(folder(root), name="synthetic")


# --- tables


def _number(raw: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Turn text to int64 with one map for all splits: numbers stay, names count from 1, sorted."""
    notes, maps = [], {}
    for column, word in (("pid", "identities"), ("camid", "cameras")):
        texts = sorted(set().union(*(rows[column] for rows in raw.values())))
        kept = [t for t in texts if re.fullmatch(r"-?\d{1,18}", t)]
        if len(kept) == len(texts):
            maps[column] = {t: int(t) for t in texts}
        else:  # names: only "-1" and "0000" keep their meaning
            special = {t: int(t) for t in kept if int(t) in ((-1, 0) if column == "pid" else (-1,))}
            named = [t for t in texts if t not in special]
            maps[column] = special | {t: i for i, t in enumerate(named, 1)}
            shown = some([f"{t} = {maps[column][t]}" for t in named])
            notes.append(f"The {word} are names and were numbered: {shown}.")
        below = [t for t, number in maps[column].items() if number < -1]
        if below:
            raise ValueError(f"{word} below -1 have no meaning: {some(below)}.")
    tables = {}
    for split, rows in raw.items():
        table = pd.DataFrame({"path": rows["path"]})
        for column in ("pid", "camid"):
            table[column] = rows[column].map(maps[column]).astype("int64")
        if notes and "identities" in notes[0]:
            table["label"] = rows["pid"]
        tables[split] = table.reset_index(drop=True)
    return tables, notes


def _dataset(name: str, root: Path, tables: dict[str, pd.DataFrame], notes: list[str]) -> Dataset:
    """Return a Dataset, once cameras are known for all images or for none."""
    for where, splits in (("training", ["train"]), ("query and gallery", ["query", "gallery"])):
        known = pd.concat([tables[split] for split in splits])["camid"] >= 0
        if known.any() and not known.all():
            raise ValueError(
                f"{name}: {known.sum()} of {len(known)} images in {where} have a "
                "camera; same-camera exclusion needs all or none."
            )
    if (pd.concat(tables.values())["camid"] == -1).all():
        notes.append("No camera is known: camid is -1 everywhere.")
        if all(
            re.match(MARKET_NAME, os.path.basename(p)) for t in tables.values() for p in t["path"]
        ):
            notes.append(
                'The file names look like Market-1501\'s: pattern="market1501" would '
                "read the cameras from them."
            )
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-") or "data"  # it names folders of runs
    return Dataset(safe, root, **tables, notes=tuple(notes))


def _split(table: pd.DataFrame, seed: int) -> dict[str, pd.DataFrame]:
    """Half of the identities for training, half for testing; pid -1 and 0 go to the gallery."""
    people = table[table["pid"] > 0]
    identities = min(people["pid"].nunique() // 2, len(_matchable(people)))
    if not identities:
        raise ValueError(
            "too few identities to split: two are needed, and one of them with "
            "images of two cameras (or two images, with no cameras)."
        )
    train, query, gallery = hold_out(people.reset_index(drop=True), identities, seed)
    rest = table[table["pid"] <= 0]
    gallery = pd.concat([gallery, rest], ignore_index=True)
    return {"train": train, "query": query, "gallery": gallery}


def _matchable(table: pd.DataFrame) -> np.ndarray:
    """Return identities (sorted) that a query of theirs can be matched for."""
    people = table[table["pid"] > 0].groupby("pid")
    counts = people["camid"].nunique() if (table["camid"] >= 0).all() else people.size()
    return counts.index[counts > 1].to_numpy()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
