"""Data sets as tables: Market-1501, folders of identities, CSV lists, and checks of what was read.

One row is one image. Columns: `path` (absolute), `pid` (identity; -1 junk, 0 distractor) and
`camid` (camera; -1 in every row where cameras are unknown). Identities that are names, not
numbers, are numbered 1, 2, … over all splits together, and keep the name in a column `label`.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from reidlib.paths import data_dir

MARKET_FOLDER = "Market-1501-v15.09.15"
MARKET_COUNTS = {"train": 12936, "query": 3368, "gallery": 19732}
# The pattern ends at the first dot: 24 official files end in ".jpg.jpg", and a pattern that ends
# in r"\.jpg$" loses all six queries of identity 1488 and 18 gallery images without a word.
MARKET_NAME = r"^(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_\d+_\d+\."
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SPLIT_FOLDERS = {
    "train": ("bounding_box_train", "train"),
    "query": ("query",),
    "gallery": ("bounding_box_test", "gallery", "test"),
}


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


# ---------------------------------------------------------------------------------------- loading


def load(dataset="market1501", *, pattern=None, image_root=None, seed=0) -> Dataset:
    """Load a data set: the one door, and every argument may be a plain string.

    `dataset` is one of
    - "market1501": the folder `Market-1501-v15.09.15`, or its zip, in the data folder;
    - "synthetic": the embedded data set, drawn into the data folder when it is not there;
    - a folder in Market-1501's layout, its parent, or a zip of it;
    - a folder of identities, split or not, see `folder`;
    - a folder with the lists train.csv, query.csv and gallery.csv (or …_test.csv), or one CSV
      for training only, see `csv_lists`.
    A relative path is looked for in the working directory, then in the data folder.

    `pattern` is a regular expression over file names with the groups `pid` and `camid`, or
    "market1501" for Market-1501's own; see `folder` and `csv_lists`. `image_root` is where the
    relative paths of CSV lists start. `seed` draws the split of a folder that has none.

    Raises FileNotFoundError or ValueError that say what was looked for and what to do.
    """
    pattern, image_root = pattern or None, image_root or None  # "" is how a notebook says None
    if str(dataset) in ("market1501", "synthetic"):
        if pattern or image_root:
            raise ValueError(f"pattern and image_root are for your own data, not for {dataset!r}.")
        return market1501() if str(dataset) == "market1501" else _synthetic()
    path = _existing(dataset)
    kind = path.suffix.lower() if path.is_file() else "folder"
    if kind not in ("folder", ".zip", ".csv"):
        raise ValueError(f"{path} is neither a folder, a .zip nor a .csv list.")
    if kind == ".csv":
        return csv_lists(train=path, image_root=image_root, pattern=pattern)
    if kind == ".zip":
        path = _unpack(path)
    market = _find_market(path)
    lists = {} if market else _find_lists(path)
    if lists:
        return csv_lists(**lists, image_root=image_root, pattern=pattern)
    if image_root:
        raise ValueError(f"image_root goes with CSV lists, and {path} has none.")
    if market and not pattern and _slug(market.name).startswith("market1501"):
        return market1501(market)
    return folder(market or path, pattern=pattern, seed=seed)


def market1501(root=None) -> Dataset:
    """Market-1501, from `root` (the folder, or one above it) or from the data folder.

    Files are named PID_cCsS_FRAME_BOX.jpg. As published: 12,936 training images of 751
    identities, 3,368 queries of 750, and 19,732 gallery images, 3,819 of them junk and 2,798
    distractors. `check` compares with these counts.
    """
    if root is None:
        places = [p for p in data_dir().glob("[!.]*") if _slug(p.name).startswith("market1501")]
        places.sort(key=lambda p: (not p.name.startswith(MARKET_FOLDER), p.name))
        folders = [p for p in places if p.is_dir() and _find_market(p)]
        zips = [p for p in places if p.suffix.lower() == ".zip" and p.is_file()]
        if folders:
            root = folders[0]
        elif zips:
            root = _unpack(zips[0])
        else:
            raise FileNotFoundError(
                f"Market-1501 is not here: looked in {data_dir()} for the folder {MARKET_FOLDER} "
                "(with bounding_box_train in it) and for Market-1501*.zip. Get it from the "
                "Market-1501 project page of its author, Liang Zheng, or from a copy on Kaggle, "
                'and put the folder or the zip there; or use dataset="synthetic".'
            )
    base = _find_market(_existing(root))
    if base is None:
        raise FileNotFoundError(
            f"{root} has no folder bounding_box_train, nor has any folder in it: "
            "give the folder that has bounding_box_train, query and bounding_box_test in it."
        )
    return replace(folder(base, pattern="market1501"), name="market1501")


def folder(root, *, pattern=None, seed=0) -> Dataset:
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
    root = _existing(root)
    found = {
        split: next((root / n for n in names if (root / n).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    if not any(found.values()):
        rows, notes = _read_folder(root, pattern)
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
        raw[split], seen = _read_folder(place, pattern)
        notes += seen
    tables, more = _number(raw)
    return _dataset(root.name, root, tables, notes + more)


def csv_lists(
    train=None, query=None, gallery=None, *, image_root=None, pattern=None, name=None
) -> Dataset:
    """Load CSV lists, as triplet-reid writes them or with a header.

    A row is `pid,path` or `pid,path,camid`; with a header `pid,path[,camid]` columns may stand
    in any order, among others. Paths are absolute or start at `image_root`, which is each list's
    own folder when not given. Without the column, the camera is the group `camid` of `pattern`
    ("market1501" for Market-1501's names); without both it is unknown: never guessed.
    A list not given is an empty table, with a note. `name` is by default the lists' folder's.
    """
    given = {"train": train, "query": query, "gallery": gallery}
    raw = {s: _read_list(source, image_root, pattern) for s, source in given.items() if source}
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
    lists = _existing(next(source for source in given.values() if source)).parent
    root = _existing(image_root) if image_root else lists
    return _dataset(name or lists.name, root, tables, notes)


def image_list(source, *, pattern=None, image_root=None, must_exist=True) -> pd.DataFrame:
    """One table from a folder (all images in it, at any depth) or a CSV list, to embed or search.

    Identities and cameras of a folder come from `pattern` alone; without it both are -1. A list
    with a header needs no `pid`, only `path`: then it is -1.
    Identities that are names raise ValueError: numbered list by list they would not agree. With
    `must_exist=False` a list's images need not be here: it may belong to embeddings from elsewhere.
    """
    path = _existing(source)
    if path.is_file():
        rows = _read_list(path, image_root, pattern, must_exist, labelled=False)
    elif pattern and "pid" in _compiled(pattern).groupindex:
        rows, _ = _read_folder(path, pattern)
    else:
        names, _ = _walk(path)
        cams = _groups(names, pattern, path)["camid"] if pattern else "-1"
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


def ignored_files(source) -> str:
    """Return a sentence on what `image_list` passes over in a folder: no images, or hidden; or ""."""
    path = _existing(source)
    return "".join(_walk(path)[1]) if path.is_dir() else ""


def hold_out(train: pd.DataFrame, identities=100, seed=0):
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
    total = train.loc[train.pid > 0, "pid"].nunique()
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
    held = train.pid.isin(named)
    test = train[held]
    mixed = test.iloc[rng.permutation(len(test))]
    group = mixed.groupby(["pid", "camid"]).pid
    several = group.transform("size") > 1
    picked = (several & (group.cumcount() == 0)).astype(bool)
    # Identities with one image in each camera: one query, and the others stay to be found.
    lone = ~mixed.pid.isin(mixed.pid[picked])
    picked |= lone & ~mixed.pid.duplicated()
    query = test.index.isin(mixed.index[picked])
    return tuple(t.reset_index(drop=True) for t in (train[~held], test[query], test[~query]))


def split_file(name) -> np.ndarray:
    """Read the identities (pids) that a file names, one a line; `#` starts a comment.

    `name` is "market1501", the split of this repository on which settings are chosen (101 of the
    751 training identities), or the path of a file. Raises FileNotFoundError or ValueError.
    """
    path = Path(__file__).parent / "splits" / f"{name}.txt"
    path = path if path.is_file() else _existing(name)
    words = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    try:
        pids = np.array([int(word) for word in words if word])
    except ValueError as error:
        raise ValueError(f"{path} must hold one identity (a number) a line: {error}.") from None
    if len(pids) == 0 or len(set(pids)) < len(pids):
        raise ValueError(f"{path} names no identity, or one of them twice.")
    return pids


def drop_unreadable(dataset: Dataset, report: "DataReport") -> Dataset:
    """Return the data set without the images that `check` could not read, named in the notes."""
    bad = set(report.unreadable)
    tables = {s: t[~t.path.isin(bad)].reset_index(drop=True) for s, t in dataset.splits.items()}
    for split, table in tables.items():
        if not len(table) and len(dataset.splits[split]):
            raise ValueError(f"no image of {split} in {dataset.name} can be read.")
    note = f"{len(bad)} unreadable images left out: {_some(sorted(bad), 10)}."
    return replace(dataset, **tables, notes=(*dataset.notes, *([note] if bad else [])))


# ---------------------------------------------------------------------------------- one image


def read_image(path) -> np.ndarray:
    """Decode one image file to (H, W, 3) uint8 RGB: the only decoder of the library.

    EXIF orientation is applied; grey, palette and CMYK become RGB; alpha is dropped; 16-bit grey
    keeps its upper 8 bits. Raises ValueError with the file and the cause.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} are no photograph; save as 8 bit")
            elif image.mode in ("P", "PA"):
                image = image.convert("RGBA")  # a transparent palette warns on its way to RGB
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except Exception as error:  # Pillow raises a dozen unrelated types on damaged files
        cause = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its own text names the path once more
            cause = "no image format that Pillow knows"
        elif isinstance(error, FileNotFoundError):
            cause = "there is no such file"
        raise ValueError(f"cannot read the image {path}: {cause}") from error
    return pixels


def fingerprint(data, *, mtime=False) -> str:
    """SHA-256 (hex) of relative path, size in bytes, pid and camid of each row, in order.

    `data` is a Dataset (all splits, paths relative to its root) or a table (relative to the
    folder that its images share). Cheap: no file is read. The same data on another machine has
    the same fingerprint; with `mtime` the time of change counts too, so that a cache on this
    machine sees an edit that keeps the size.
    """
    if isinstance(data, Dataset):
        parts = [(split, table, str(data.root)) for split, table in data.splits.items()]
    else:
        shared = os.path.commonpath([os.path.dirname(p) for p in data.path]) if len(data) else ""
        parts = [("", data, shared)]
    digest = hashlib.sha256()
    for split, table, root in parts:
        for path, pid, camid in zip(table.path, table.pid, table.camid, strict=True):
            info = os.stat(path)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            row = (split, name, info.st_size, int(pid), int(camid))
            digest.update(repr(row + ((info.st_mtime_ns,) if mtime else ())).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- checking


@dataclass(frozen=True, eq=False)
class DataReport:
    """What `check` found. `print` it; `ok` is False when there is an error.

    counts: one row a split; images, identities (pid > 0), cameras, junk, distractors.
    problems: severity ("error", "warning", "note"), problem, advice; errors first.
    unreadable: path -> cause.
    """

    name: str
    root: Path
    counts: pd.DataFrame
    problems: pd.DataFrame
    unreadable: dict[str, str]
    decoded: bool

    @property
    def ok(self) -> bool:
        """True when no problem is an error."""
        return not (self.problems.severity == "error").any()

    def __str__(self) -> str:
        """For a terminal: counts, then one line a problem, then the verdict."""
        lines = [f"{self.name}: {self.root}", "", self.counts.to_string(), ""]
        total = int(self.counts.images.sum())
        if self.decoded:
            lines.append(f"{total - len(self.unreadable):,} of {total:,} images decoded.")
        for row in self.problems.itertuples():
            lines.append(f"{row.severity + ':':<9}{row.problem} {row.advice}".rstrip())
        tally = self.problems.severity.value_counts()
        counted = [f"{s}s: {tally.get(s, 0)}" for s in ("error", "warning", "note")]
        return "\n".join([*lines, f"{'OK' if self.ok else 'NOT OK'} ({', '.join(counted)})."])


def check(dataset: Dataset, k=4, *, decode=True, progress=None) -> DataReport:
    """Look for what would spoil training or scores; every finding says what to do.

    `k` is the K of PK batches. `decode` reads every image (Market-1501: under a minute).
    `progress` wraps the loop as `tqdm` does: `progress(iterable, total=n)`.
    """
    found = []

    def say(severity, problem, advice=""):
        found.append((severity, problem, advice))

    train, query, gallery = dataset.train, dataset.query, dataset.gallery
    test = pd.concat([query, gallery], ignore_index=True)
    if dataset.name == "market1501":
        _check_market_counts(dataset, say)

    paths = list(pd.concat([train, test]).path.unique())
    unreadable = _unreadable(paths, progress) if decode else {}
    if unreadable:
        named = _some([f"{p} ({c})" for p, c in unreadable.items()], 10)
        say(
            "error",
            f"{len(unreadable)} images cannot be read: {named}.",
            "Replace them, or go on without them: drop_unreadable(dataset, report).",
        )

    for split, table in dataset.splits.items():
        twice = table.path[table.path.duplicated()]
        if len(twice):
            say(
                "warning",
                f"{len(twice)} images are listed twice in {split}: {_some(twice)}.",
                "Keep one row an image.",
            )
        if split != "gallery" and (table.pid == -1).any():
            say(
                "error",
                f"{(table.pid == -1).sum()} images in {split} have pid -1, junk.",
                "Junk belongs in the gallery alone: move or remove them.",
            )
        if split != "gallery" and (table.pid == 0).any():
            say(
                "warning",
                f"{(table.pid == 0).sum()} images in {split} have pid 0, distractor.",
                "If 0 is a person, number identities from 1.",
            )

    sizes = train.pid[train.pid > 0].value_counts().sort_index()
    single, few = sizes.index[sizes == 1], sizes.index[(sizes > 1) & (sizes < k)]
    if len(single):
        say(
            "warning",
            f"{len(single)} training identities have one image: {_some(single)}.",
            "They give no positive pair but the image with itself; add images or remove them.",
        )
    if len(few):
        say(
            "note",
            f"{len(few)} training identities have fewer than K = {k} images: {_some(few)}.",
            "PK batches repeat their images.",
        )
    if len(train) and len(sizes) < 2:
        say("error", f"training has {len(sizes)} identities.", "Triplets need two or more.")

    both = sorted(set(train.pid[train.pid > 0]) & set(test.pid[test.pid > 0]))
    if both:
        say(
            "error",
            f"{len(both)} identities are in training and in test: {_some(both)}.",
            "Scores would be too good; give each person to one side.",
        )
    if len(query):
        _check_matches(query, gallery, say)
    for note in dataset.notes:
        say("note", note)
    found.sort(key=lambda row: ("error", "warning", "note").index(row[0]))
    problems = pd.DataFrame(found, columns=["severity", "problem", "advice"])
    return DataReport(dataset.name, dataset.root, _counts(dataset), problems, unreadable, decode)


def _counts(dataset):
    rows = {}
    for split, table in dataset.splits.items():
        rows[split] = {
            "images": len(table),
            "identities": table.pid[table.pid > 0].nunique(),
            "cameras": table.camid[table.camid >= 0].nunique(),
            "junk": int((table.pid == -1).sum()),
            "distractors": int((table.pid == 0).sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _check_market_counts(dataset, say):
    lost = "files that end in .jpg.jpg are lost: unpack the original archive again."
    causes = {
        ("query", 3362): f"6 {lost}",
        ("gallery", 19714): f"18 {lost}",
        ("gallery", 15913): "The junk images are left out; scores stay the same.",
    }
    for split, table in dataset.splits.items():
        if len(table) != MARKET_COUNTS[split]:
            say(
                "warning",
                f"{split} has {len(table):,} images, Market-1501 has "
                f"{MARKET_COUNTS[split]:,}: scores do not compare with published ones.",
                causes.get((split, len(table)), "Unpack the original archive again."),
            )


def _check_matches(query, gallery, say):
    cameras = (query.camid >= 0).all()
    shown = set(query.path) & set(gallery.path)
    if shown and not cameras:
        say(
            "error",
            f"{len(shown)} queries are in the gallery too and will find themselves: "
            f"{_some(sorted(shown))}.",
            "Take them out of the gallery, or give cameras.",
        )
    if not cameras:
        say(
            "warning",
            "Without cameras nothing is excluded by camera: a query may find the next "
            "frame of the same shot.",
            "Give cameras by a camid column or a pattern.",
        )
    # A match is a gallery image of the same identity that another camera took.
    matches = query.pid.map(gallery.pid.value_counts()).fillna(0)
    if cameras:
        same = gallery.groupby(["pid", "camid"]).size().rename("same").reset_index()
        matches = matches - query.merge(same, how="left", on=["pid", "camid"]).same.fillna(0)
    lost = query[(matches == 0) & (query.pid > 0)]
    if len(lost):
        where = "in another camera" if cameras else "in the gallery"
        say(
            "error" if len(lost) == len(query) else "warning",
            f"{len(lost)} of {len(query)} queries have no match {where}; identities: "
            f"{_some(sorted(lost.pid.unique()))}.",
            "They are left out of the means.",
        )


def _unreadable(paths, progress):
    def cause(path):
        try:
            read_image(path)
        except ValueError as error:
            return str(error).split(f"{path}: ", 1)[-1]
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        causes = pool.map(cause, paths)
        causes = list(progress(causes, total=len(paths)) if progress else causes)
    return {path: why for path, why in zip(paths, causes, strict=True) if why}


# ------------------------------------------------------------------------------- reading the disk


def _existing(source):
    """The path as given, else under the data folder."""
    given = Path(source).expanduser()
    for path in (Path(os.path.abspath(given)), data_dir() / given):
        if str(source).strip() and path.exists():
            return path
    raise FileNotFoundError(
        f"there is no {str(source)!r}: looked in {os.getcwd()} and in {data_dir()}. "
        'Give a folder, a .zip, a .csv, or one of the names "market1501" and "synthetic".'
    )


def _synthetic():
    """Draw the embedded data if it is missing; any size drawn there before is taken as it is."""
    from reidlib.synthetic import VERSION, draw_dataset

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


def _find_market(root):
    """The folder with bounding_box_train in it: `root` or one or two levels below; else None."""
    for level in ("", "*/", "*/*/"):
        hits = sorted(p.parent for p in root.glob(level + "bounding_box_train") if p.is_dir())
        hits = [p for p in hits if not _hidden(p.relative_to(root).parts)]
        if len(hits) > 1:
            raise ValueError(f"{root} holds several data sets, give one: {_some(hits)}.")
        if hits:
            return Path(os.path.abspath(hits[0]))
    return None


def _find_lists(root):
    """The CSV lists in a folder by split; empty where there are none."""
    lists = {}
    for path in sorted(root.glob("*.csv")):
        words = re.split(r"[^a-z]+", path.stem.lower())
        for split, names in SPLIT_FOLDERS.items():
            if set(words) & set(names):
                if split in lists:
                    raise ValueError(
                        f"{lists[split]} and {path.name} are both lists for {split}: "
                        "put one data set's lists in a folder of their own."
                    )
                lists[split] = path
    return lists


def _unpack(archive):
    """Unpack a zip beside itself, once; nothing is written unless every member is safe."""
    target = archive.with_suffix("")
    if target.is_dir():
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
                outside = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name)
                if outside or ".." in re.split(r"[\\/]", name):
                    raise ValueError(f"{archive} is refused: {name!r} would leave the folder.")
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise ValueError(f"{archive} is refused: {name!r} is a link, not a file.")
            part.mkdir()
            opened.extractall(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same files
                raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot unpack {archive}: {error}. Download it again, or unpack it yourself."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _walk(place):
    """Image names relative to `place`, sorted, and a note (none or one) on all else there."""
    images, strays = [], []
    for base, dirs, files in os.walk(place, followlinks=True):
        strays += [d + "/" for d in dirs if _hidden([d])]
        dirs[:] = [d for d in dirs if not _hidden([d])]
        for name in files:
            image = Path(name).suffix.lower() in IMAGE_SUFFIXES and not _hidden([name])
            relative = os.path.relpath(os.path.join(base, name), place).replace(os.sep, "/")
            (images if image else strays).append(relative)
    note = f"In {place.name}/ ignored, hidden or no images: {_some(sorted(strays))}."
    return sorted(images), [note] if strays else []


def _read_folder(place, pattern):
    """Rows (path, pid, camid as text) of one split, and notes."""
    names, notes = _walk(place)
    if not names:
        raise ValueError(f"{place} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    groups = _groups(names, pattern, place) if pattern else {}
    if "pid" not in groups:
        loose = [n for n in names if "/" not in n]
        if len(loose) == len(names):
            raise ValueError(
                f"{place} has images but no sub-folder for each identity. Sort them into "
                r'sub-folders, or give pattern, e.g. r"^(?P<pid>\d+)_c(?P<camid>\d+)".'
            )
        if loose:
            notes.append(f"In {place.name}/ ignored, in no identity's folder: {_some(loose)}.")
        names = [n for n in names if "/" in n]
        groups = _groups(names, pattern, place) if pattern else {}
        groups["pid"] = [n.split("/")[0] for n in names]
    paths, camid = [str(place / n) for n in names], groups.get("camid", "-1")
    return pd.DataFrame({"path": paths, "pid": groups["pid"], "camid": camid}), notes


def _read_list(source, image_root, pattern, must_exist=True, labelled=True):
    """Rows (path, pid, camid as text) of one CSV list; a header may leave `pid` out if not labelled."""
    source = _existing(source)
    base = _existing(image_root) if image_root else source.parent
    with open(source, newline="", encoding="utf-8-sig") as file:
        lines = [[cell.strip() for cell in row] for row in csv.reader(file)]
    lines = [(number, row) for number, row in enumerate(lines, 1) if any(row)]
    columns = ["pid", "path", "camid"]
    header = [cell.lower() for cell in lines[0][1]] if lines else []
    if {"path", *(["pid"] if labelled else [])} <= set(header):
        columns, lines = header, lines[1:]
    if not lines:
        raise ValueError(f"{source} lists no images.")
    wanted = columns if columns is header else columns[: max(2, len(lines[0][1]))]
    for number, row in lines:
        cells = dict(zip(wanted, row, strict=False))
        if len(row) != len(wanted) or "" in (cells.get(c) for c in ("pid", "path", "camid")):
            raise ValueError(
                f"{source}, line {number}: expected {','.join(wanted)}, got {','.join(row)!r}."
            )
    rows = pd.DataFrame([row for _, row in lines], columns=wanted)
    if "pid" not in rows:
        rows["pid"] = "-1"
    if "camid" not in rows:
        names = list(rows.path)
        rows["camid"] = _groups(names, pattern, source)["camid"] if pattern else "-1"
    rows["path"] = [os.path.abspath(base / p) for p in rows.path]
    lost = [p for p in rows.path if must_exist and not os.path.isfile(p)]
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} of {len(rows)} images in {source} do not exist: "
            f"{_some(lost, 3)}. Is image_root right? It is {base}."
        )
    return rows[["path", "pid", "camid"]]


def _compiled(pattern):
    try:
        regex = re.compile(MARKET_NAME if pattern == "market1501" else pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}.") from error
    if not {"pid", "camid"} & set(regex.groupindex):
        raise ValueError(f"pattern {pattern!r} has neither a group (?P<pid>…) nor (?P<camid>…).")
    return regex


def _groups(names, pattern, place):
    """What the pattern's groups catch in each file name: group -> list of text."""
    regex = _compiled(pattern)
    caught = [regex.search(name.rsplit("/", 1)[-1]) for name in names]
    wrong = [
        n for n, m in zip(names, caught, strict=True) if not m or None in m.groupdict().values()
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(names)} image names in {place} do not fit "
            f"{regex.pattern}: {_some(wrong)}. Rename or remove them, or give "
            "another pattern."
        )
    return {"camid": ["-1"] * len(names)} | {
        group: [m[group] for m in caught] for group in regex.groupindex
    }


# ---------------------------------------------------------------------------------------- tables


def _number(raw):
    """Text to int64 with one map for all splits: numbers stay, names count from 1, sorted."""
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
            shown = _some([f"{t} = {maps[column][t]}" for t in named])
            notes.append(f"The {word} are names and were numbered: {shown}.")
        below = [t for t, number in maps[column].items() if number < -1]
        if below:
            raise ValueError(f"{word} below -1 have no meaning: {_some(below)}.")
    tables = {}
    for split, rows in raw.items():
        table = pd.DataFrame({"path": rows.path})
        for column in ("pid", "camid"):
            table[column] = rows[column].map(maps[column]).astype("int64")
        if notes and "identities" in notes[0]:
            table["label"] = rows.pid
        tables[split] = table.reset_index(drop=True)
    return tables, notes


def _dataset(name, root, tables, notes):
    """A Dataset, once cameras are known for all images or for none."""
    for where, splits in (("training", ["train"]), ("query and gallery", ["query", "gallery"])):
        known = pd.concat([tables[split] for split in splits]).camid >= 0
        if known.any() and not known.all():
            raise ValueError(
                f"{name}: {known.sum()} of {len(known)} images in {where} have a "
                "camera; same-camera exclusion needs all or none."
            )
    if (pd.concat(tables.values()).camid == -1).all():
        notes.append("No camera is known: camid is -1 everywhere.")
        if all(re.match(MARKET_NAME, os.path.basename(p)) for t in tables.values() for p in t.path):
            notes.append(
                'The file names look like Market-1501\'s: pattern="market1501" would '
                "read the cameras from them."
            )
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-") or "data"  # it names folders of runs
    return Dataset(safe, root, **tables, notes=tuple(notes))


def _split(table, seed):
    """Half of the identities for training, half for testing; pid -1 and 0 go to the gallery."""
    people = table[table.pid > 0]
    identities = min(people.pid.nunique() // 2, len(_matchable(people)))
    if not identities:
        raise ValueError(
            "too few identities to split: two are needed, and one of them with "
            "images of two cameras (or two images, with no cameras)."
        )
    train, query, gallery = hold_out(people.reset_index(drop=True), identities, seed)
    rest = table[table.pid <= 0]
    gallery = pd.concat([gallery, rest], ignore_index=True)
    return {"train": train, "query": query, "gallery": gallery}


def _matchable(table):
    """Identities (sorted) that a query of theirs can be matched for."""
    people = table[table.pid > 0].groupby("pid")
    counts = people.camid.nunique() if (table.camid >= 0).all() else people.size()
    return counts.index[counts > 1].to_numpy()


def _hidden(parts):
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _slug(name):
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _some(items, n=5):
    """`a, b, c and 4 more`."""
    items = [str(item) for item in items]
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
