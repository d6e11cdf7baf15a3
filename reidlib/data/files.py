"""What lies on the disk: folders, zips and CSV lists of images, read to rows of text."""

import csv
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from reidlib.paths import data_dir
from reidlib.words import some

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


def existing(source: str | Path) -> Path:
    """Return the path as given, else under the data folder.

    Raises:
        FileNotFoundError: it is in neither place; names both.
    """
    given = Path(source).expanduser()
    for path in (Path(os.path.abspath(given)), data_dir() / given):
        if str(source).strip() and path.exists():
            return path
    raise FileNotFoundError(
        f"there is no {str(source)!r}: looked in {os.getcwd()} and in {data_dir()}. "
        'Give a folder, a .zip, a .csv, or one of the names "market1501" and "synthetic".'
    )


# --- where the images are


def is_market1501(path: Path) -> bool:
    """Say whether a folder or a zip is named like Market-1501, however that is spelt."""
    return re.sub(r"[^a-z0-9]", "", path.name.lower()).startswith("market1501")


def find_market1501() -> Path:
    """Return the folder of Market-1501 in the data folder, unpacked where there is only its zip.

    Raises:
        FileNotFoundError: there is neither; says where to get it.
    """
    places = [p for p in data_dir().glob("[!.]*") if is_market1501(p)]
    places.sort(key=lambda p: (not p.name.startswith(MARKET_FOLDER), p.name))
    for place in places:
        if place.is_dir() and find_market(place):
            return place
    for place in places:
        if place.suffix.lower() == ".zip" and place.is_file():
            return unpack(place)
    raise FileNotFoundError(
        f"Market-1501 is not here: looked in {data_dir()} for the folder {MARKET_FOLDER} "
        "(with bounding_box_train in it) and for Market-1501*.zip. Get it from the "
        "Market-1501 project page of its author, Liang Zheng, or from a copy on Kaggle, "
        'and put the folder or the zip there; or use dataset="synthetic".'
    )


def find_market(root: Path) -> Path | None:
    """Return the folder with bounding_box_train in it: `root` or up to two levels below; or None.

    Raises:
        ValueError: there are several.
    """
    for level in ("", "*/", "*/*/"):
        hits = sorted(p.parent for p in root.glob(level + "bounding_box_train") if p.is_dir())
        hits = [p for p in hits if not _hidden(p.relative_to(root).parts)]
        if len(hits) > 1:
            raise ValueError(f"{root} holds several data sets, give one: {some(hits)}.")
        if hits:
            return Path(os.path.abspath(hits[0]))
    return None


def find_splits(root: Path) -> dict[str, Path]:
    """Return the folders of train, query and gallery; empty where a folder has none of them.

    Raises:
        FileNotFoundError: it has some of them.
    """
    found = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    missing = [split for split, place in found.items() if place is None]
    if missing and len(missing) < len(found):
        wanted = ", ".join(f"{s} ({' or '.join(SPLIT_FOLDERS[s])})" for s in missing)
        raise FileNotFoundError(
            f"{root} lacks a folder for {wanted}: unpack it again, or give the right folder."
        )
    return {} if missing else found


def find_lists(root: Path) -> dict[str, Path]:
    """Return the CSV lists in a folder by split; empty where there are none.

    Raises:
        ValueError: there are several for one split.
    """
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


def unpack(archive: Path) -> Path:
    """Unpack a zip beside itself, once, and return the folder.

    Raises:
        ValueError: a member would leave the folder, or the zip is broken; then nothing is written.
    """
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


# --- folders and lists


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


def read_folder(
    place: Path, pattern: str | None, labelled: bool = True
) -> tuple[pd.DataFrame, list[str]]:
    """Return rows (path, pid, camid as text) of one split, and notes.

    Args:
        place: the folder.
        pattern: over file names, or None.
        labelled: where the pattern does not say the pid, the sub-folder does; else it is -1.
    """
    names, notes = walk(place)
    if not names:
        raise ValueError(f"{place} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    groups = _groups_of(names, pattern, place)
    if "pid" not in groups and labelled:
        loose = [n for n in names if "/" not in n]
        if len(loose) == len(names):
            raise ValueError(
                f"{place} has images but no sub-folder for each identity. Sort them into "
                r'sub-folders, or give pattern, e.g. r"^(?P<pid>\d+)_c(?P<camid>\d+)".'
            )
        if loose:
            notes.append(f"In {place.name}/ ignored, in no identity's folder: {some(loose)}.")
        names = [n for n in names if "/" in n]
        groups = _groups_of(names, pattern, place)
        groups["pid"] = [n.split("/")[0] for n in names]
    paths = [str(place / name) for name in names]
    return pd.DataFrame({"path": paths, "pid": "-1", "camid": "-1"} | groups), notes


def read_list(
    source: str | Path,
    image_root: str | Path | None,
    pattern: str | None,
    must_exist: bool = True,
    labelled: bool = True,
) -> pd.DataFrame:
    """Return rows (path, pid, camid as text) of one CSV list.

    Args:
        source: the list.
        image_root: where relative paths start; None: in the list's own folder.
        pattern: over file names, or None; says the camera where no column does.
        must_exist: the images must be there.
        labelled: a header must name the column `pid`; else it is -1 without it.
    """
    source = existing(source)
    base = existing(image_root) if image_root else source.parent
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
        rows["camid"] = _groups_of([*rows["path"]], pattern, source).get("camid", "-1")
    rows["path"] = [os.path.abspath(base / p) for p in rows["path"]]
    lost = [p for p in rows["path"] if must_exist and not os.path.isfile(p)]
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} of {len(rows)} images in {source} do not exist: "
            f"{some(lost, 3)}. Is image_root right? It is {base}."
        )
    return rows[["path", "pid", "camid"]]


def _groups_of(names: list[str], pattern: str | None, place: Path) -> dict[str, list[str]]:
    """Return what the pattern's groups catch in each file name: group -> list of text."""
    if not pattern:
        return {}
    try:
        regex = re.compile(MARKET_NAME if pattern == "market1501" else pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}.") from error
    wanted = {"pid", "camid"} & set(regex.groupindex)
    if not wanted:
        raise ValueError(f"pattern {pattern!r} has neither a group (?P<pid>…) nor (?P<camid>…).")
    caught = [regex.search(name.rsplit("/", 1)[-1]) for name in names]
    wrong = [
        n for n, m in zip(names, caught, strict=True) if not m or None in m.groupdict().values()
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(names)} image names in {place} do not fit "
            f"{regex.pattern}: {some(wrong)}. Rename or remove them, or give "
            "another pattern."
        )
    return {group: [m[group] for m in caught] for group in wanted}


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
