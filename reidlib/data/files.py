"""What lies on the disk: folders, zips and CSV lists of images, read to rows of text."""

import csv
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from reidlib.paths import data_dir
from reidlib.words import some

Source = str | Path
MARKET_FOLDER = "Market-1501-v15.09.15"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SPLIT_FOLDERS = {
    "train": ("bounding_box_train", "train"),
    "query": ("query",),
    "gallery": ("bounding_box_test", "gallery", "test"),
}
# The pattern ends at the first dot: 24 official files end in ".jpg.jpg", and a pattern that ends
# in r"\.jpg$" loses all six queries of identity 1488 and 18 gallery images without a word.
MARKET_NAME = r"^(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_\d+_\d+\."


def existing(source: Source) -> Path:
    """Return the path as given, else under the data folder; FileNotFoundError names both."""
    given = Path(source).expanduser()
    for path in (Path(os.path.abspath(given)), data_dir() / given):
        if str(source).strip() and path.exists():
            return path
    raise FileNotFoundError(
        f"there is no {str(source)!r} in {os.getcwd()} or {data_dir()}: give a folder, a .zip, "
        'a .csv, or one of the names "market1501" and "synthetic".'
    )


def is_market1501(path: Path) -> bool:
    """Say whether a folder or a zip is named like Market-1501, however that is spelt."""
    return re.sub(r"[^a-z0-9]", "", path.name.lower()).startswith("market1501")


def find_market1501() -> Path:
    """Return the folder of Market-1501 in the data folder, unpacked where there is only its zip."""
    places = [p for p in data_dir().glob("[!.]*") if is_market1501(p)]
    places.sort(key=lambda p: (p.is_file(), not p.name.startswith(MARKET_FOLDER), p.name))
    for place in places:
        if place.suffix.lower() == ".zip" and place.is_file():
            place = unpack(place)
        if place.is_dir() and (found := find_market(place)):
            return found
    raise FileNotFoundError(
        f"Market-1501 is not in {data_dir()}: get it from the project page of its author, Liang "
        f"Zheng, or from Kaggle, and put the folder {MARKET_FOLDER} (with bounding_box_train in it) "
        'or its zip there; or use dataset="synthetic".'
    )


def find_market(root: Path) -> Path | None:
    """Return the folder with bounding_box_train in it, `root` or up to two levels below; or None."""
    for level in ("", "*/", "*/*/"):
        hits = sorted(p.parent for p in root.glob(level + "bounding_box_train") if p.is_dir())
        hits = [p for p in hits if not _hidden(p.relative_to(root).parts)]
        if len(hits) > 1:
            raise ValueError(f"{root} holds several data sets, give one: {some(hits)}.")
        if hits:
            return Path(os.path.abspath(hits[0]))
    return None


def find_splits(root: Path) -> dict[str, Path]:
    """Return the folders of train, query and gallery; none, or all: else FileNotFoundError."""
    found = {
        split: [root / name for name in names if (root / name).is_dir()]
        for split, names in SPLIT_FOLDERS.items()
    }
    missing = [
        f"{s} ({' or '.join(SPLIT_FOLDERS[s])})" for s, places in found.items() if not places
    ]
    if missing and any(found.values()):
        raise FileNotFoundError(
            f"{root} lacks a folder for {', '.join(missing)}: give the right one, or unpack it again."
        )
    return {} if missing else {split: places[0] for split, places in found.items()}


def find_lists(root: Path) -> dict[str, Path]:
    """Return the CSV lists in a folder by split; several for one split are a ValueError."""
    words = {path: {*re.split("[^a-z]+", path.stem.lower())} for path in sorted(root.glob("*.csv"))}
    found = {
        split: [path for path in words if words[path] & {*names}]
        for split, names in SPLIT_FOLDERS.items()
    }
    for split, paths in found.items():
        if len(paths) > 1:
            raise ValueError(
                f"{some(paths)} are all lists for {split}: give each data set a folder of its own."
            )
    return {split: paths[0] for split, paths in found.items() if paths}


def unpack(archive: Path) -> Path:
    """Unpack a zip beside itself, once, and return the folder.

    ValueError: a member would leave the folder, or the zip is broken; then nothing is written.
    """
    target = archive.with_suffix("")
    if target.is_dir():
        return target
    outside = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)")
    try:
        with zipfile.ZipFile(archive) as opened, whole_folder(target) as part:
            for name, kind in [(m.filename, m.external_attr >> 16) for m in opened.infolist()]:
                if outside.match(name) or stat.S_ISLNK(kind):
                    raise ValueError(f"{archive} is refused: {name} would leave the folder.")
            opened.extractall(part)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot unpack {archive}: {error}. Download it again, or unpack it yourself."
        ) from error
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `target` at the end, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        part = Path(temporary, "part")
        part.mkdir()
        yield part
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same files
                raise


# --- folders and lists: rows of path, pid and camid, all text


def walk(place: Path) -> tuple[list[str], list[str]]:
    """Return image names relative to `place`, sorted, and a note (none or one) on all else there."""
    images, strays = [], []
    for base, dirs, files in os.walk(place, followlinks=True):
        strays += [d + "/" for d in dirs if _hidden([d])]
        dirs[:] = [d for d in dirs if not _hidden([d])]
        for name in files:
            image = Path(name).suffix.lower() in IMAGE_SUFFIXES and not _hidden([name])
            relative = os.path.relpath(os.path.join(base, name), place).replace(os.sep, "/")
            (images if image else strays).append(relative)
    note = f"In {place.name}/ ignored, hidden or no images: {some(sorted(strays))}."
    return sorted(images), [note] if strays else []


def read_folder(place: Path, pattern: str | None, notes: list[str], labelled: bool) -> pd.DataFrame:
    """Return the rows of one folder; `notes` get sentences on what is passed over.

    Where the `pattern` over file names does not say the pid, it is -1, or, if `labelled`, the first
    sub-folder. Raises ValueError: no images, or names that say no identity.
    """
    names, strays = walk(place)
    notes += strays
    if not names:
        raise ValueError(f"{place} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    groups = _groups_of(names, pattern, place)
    rows = pd.DataFrame({"path": names, "pid": "-1", "camid": "-1"} | groups)
    if labelled and "pid" not in groups:
        rows["pid"] = [n.split("/")[0] for n in names]
        loose = rows["pid"] == rows["path"]
        if loose.all():
            raise ValueError(
                f"{place} has no sub-folder for each identity: sort the images into sub-folders, or "
                r'give pattern, e.g. r"^(?P<pid>\d+)_c(?P<camid>\d+)".'
            )
        if loose.any():
            named = some(rows["path"][loose])
            notes.append(f"In {place.name}/ ignored, in no identity's folder: {named}.")
        rows = rows[~loose]
    return rows.assign(path=[str(place / name) for name in rows["path"]])


def read_list(
    source: Path, image_root: Source | None, pattern: str | None, must_exist: bool, labelled: bool
) -> pd.DataFrame:
    """Return the rows of one CSV list.

    Relative paths start at `image_root` (None: in the list's own folder). The `pattern` over file
    names says the camera where no column does. If `labelled`, a header must name the column `pid`;
    else it is -1 without it. Raises FileNotFoundError if an image `must_exist` and does not, and
    ValueError: no rows, or a line that cannot be read.
    """
    base = existing(image_root) if image_root else source.parent
    with open(source, newline="", encoding="utf-8-sig") as file:
        lines = [[cell.strip() for cell in row] for row in csv.reader(file)]
    lines = [(number, row) for number, row in enumerate(lines, 1) if any(row)]
    columns = [cell.lower() for cell in lines[0][1]] if lines else []
    if {"path", *["pid"] * labelled} <= set(columns):
        lines = lines[1:]
    else:  # no header
        columns = ["pid", "path", "camid"][: max(2, len(columns))]
    if not lines:
        raise ValueError(f"{source} lists no images.")
    for number, row in lines:
        cells = dict(zip(columns, row, strict=False))
        if len(row) != len(columns) or "" in (cells.get(c) for c in ("pid", "path", "camid")):
            raise ValueError(
                f"{source}, line {number}: expected {','.join(columns)}, got {','.join(row)!r}."
            )
    rows = pd.DataFrame([row for _, row in lines], columns=columns)
    if "pid" not in rows:
        rows["pid"] = "-1"
    if "camid" not in rows:
        rows["camid"] = _groups_of([*rows["path"]], pattern, source).get("camid", "-1")
    rows["path"] = [os.path.abspath(base / p) for p in rows["path"]]
    lost = [p for p in rows["path"] if must_exist and not os.path.isfile(p)]
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} of {len(rows)} images in {source} do not exist: {some(lost, 3)}. Is "
            f"image_root right? It is {base}."
        )
    return rows[["path", "pid", "camid"]]


def _groups_of(names: list[str], pattern: str | None, place: Path) -> dict[str, list[str]]:
    """Return what the pattern's groups pid and camid catch in each file name: group -> texts."""
    if not pattern:
        return {}
    try:
        regex = re.compile(MARKET_NAME if pattern == "market1501" else pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}.") from error
    wanted = {"pid", "camid"} & set(regex.groupindex)
    if not wanted:
        raise ValueError(f"pattern {pattern!r} has neither a group (?P<pid>…) nor (?P<camid>…).")
    caught = {name: regex.search(name.rsplit("/", 1)[-1]) for name in names}
    wrong = [n for n in names if not caught[n] or None in caught[n].groupdict().values()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(names)} image names in {place} do not fit {regex.pattern}: "
            f"{some(wrong)}. Rename or remove them, or give another pattern."
        )
    return {group: [caught[name][group] for name in names] for group in wanted}


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
