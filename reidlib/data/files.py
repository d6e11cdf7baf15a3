"""What lies on the disk: folders, zips and CSV lists of images, read to rows of text."""

import csv
import math
import os
import re
import secrets
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from PIL import Image

from reidlib.paths import data_dir, temporary
from reidlib.recipes import DATA_SETS
from reidlib.runs import text_sha256
from reidlib.words import did_you_mean, some

Source = str | Path
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# Those of IMAGE_SUFFIXES, and GIF; others may run programs, or have no size.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF")
SPLIT_FOLDERS = {
    "train": ("bounding_box_train", "train"),
    "query": ("query",),
    "gallery": ("bounding_box_test", "gallery", "test"),
}
SPLIT_WORDS = {"train": "train", "query": "query|querie|probe", "gallery": "gallery|test"}
_UNPACKED = ".unpacked"  # in an unpacked folder: the digest of the zip's contents
_OUTSIDE = re.compile(
    r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)"
)  # names that would leave that folder
# The pattern ends at the first dot: 24 official files end in ".jpg.jpg", and a pattern that ends
# in r"\.jpg$" loses all six queries of identity 1488 and 18 gallery images without a word.
MARKET_NAME = r"^(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_\d+_\d+\."
# A part of a picture, as the W3C's Media Fragments name it: "frame.jpg#xywh=10,20,64,128".
_CUT = re.compile(r"#xywh=(\d+),(\d+),(\d+),(\d+)$")


def existing(source: Source) -> Path:
    """Return the path as given, else under the data folder; FileNotFoundError names both."""
    given = Path(_utf8([str(source)], "given")[0]).expanduser()
    for path in (Path(os.path.abspath(given)), data_dir() / given):
        if str(source).strip() and path.exists():
            return path
    raise FileNotFoundError(
        f"there is no {str(source)!r} in {os.getcwd()} or {data_dir()}: give the path of a folder, a "
        f".zip or a .csv, or one of the names {', '.join(DATA_SETS)}{did_you_mean(str(source), DATA_SETS)}"
    )


def cut_of(path: Source) -> tuple[str, tuple[int, ...] | None]:
    """Return the file of a picture, and what is cut out of it: left, top, width, height; None: all.

    >>> cut_of("frame.jpg#xywh=10,20,64,128"), cut_of("whole.jpg")
    (('frame.jpg', (10, 20, 64, 128)), ('whole.jpg', None))
    """
    found = _CUT.search(str(path))
    if not found or os.path.exists(path):
        return str(path), None
    return str(path)[: found.start()], tuple(map(int, found.groups()))


def cut(path: str, left: float, top: float, width: float, height: float) -> str:
    """Return the name of a part of a picture, see `cut_of`: whole pixels, from its edge on.

    >>> cut("frame.jpg", -4.5, 20, 64, 128)
    'frame.jpg#xywh=0,20,60,128'
    """
    x, y = max(0, math.floor(left)), max(0, math.floor(top))
    right, bottom = max(x, math.ceil(left + width)), max(y, math.ceil(top + height))
    return f"{path}#xywh={x},{y},{right - x},{bottom - y}"


def open_image(path: str | Path) -> Image.Image:
    """Open an image; refuse what would never end, as a named pipe does, and what is not there."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no regular file")
    return Image.open(path, formats=_FORMATS)


def find_below(root: Path, name: str) -> Path | None:
    """Return the folder with this one in it, in any capitals, `root` or up to two levels below; or None."""
    pattern = re.sub("[a-z]", lambda c: f"[{c[0]}{c[0].upper()}]", name)
    for level in ("", "*/", "*/*/"):
        hits = sorted(p.parent for p in root.glob(level + pattern) if p.is_dir())
        hits = [p for p in hits if not _hidden(*p.relative_to(root).parts)]
        if len(hits) > 1:
            raise ValueError(f"{root} holds several data sets, give one: {some(hits)}.")
        if hits:
            return Path(os.path.abspath(hits[0]))
    return None


def split_of(name: str) -> str | None:
    """Return the split that a folder or a list is named after, in any spelling, or None.

    >>> [split_of(name) for name in ("image_train", "TestSet", "Queries", "Ernest")]
    ['train', 'gallery', 'query', None]
    """
    words = re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()
    for split, word in SPLIT_WORDS.items():
        if re.search(rf"(?<![a-z])({word})(ing|set|s|data|images?)?(?![a-z])", words):
            return split
    return None


def find_splits(root: Path, notes: list[str]) -> dict[str, Path]:
    """Return the folders of train, query and gallery: none, all, or `train` and `test` alone.

    `notes` get a sentence on other folders beside them. Raises FileNotFoundError where one is
    missing, and ValueError where nobody can say which of several it is.
    """
    places = [p for p in sorted(root.iterdir()) if p.is_dir() and not _hidden(p.name)]
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        likely = [p for p in places if split_of(p.name) == split]
        named = [p for name in names for p in likely if p.name.lower() == name]
        if not named and len(likely) > 1:
            raise ValueError(f"{some(likely)} may all be for {split}: name one of them {split}.")
        if likely:
            found[split] = (named or likely)[0]
    missing = [f"{s} ({' or '.join(SPLIT_FOLDERS[s])})" for s in SPLIT_FOLDERS if s not in found]
    if missing and found and not queries_drawn(found):
        raise FileNotFoundError(
            f"{root} lacks a folder for {', '.join(missing)}: give the right one, or unpack it again; "
            f"{next(iter(found.values()))} by itself is split in halves."
        )
    if found and (others := [p.name for p in places if p not in found.values()]):
        notes.append(f"In {root.name}/ not read, no part of the split: {some(others)}.")
    return found


def queries_drawn(found: dict[str, Path]) -> bool:
    """Whether queries can be drawn: from a test beside train; a "gallery" has had some, which are lost."""
    test = {*found} == {"train", "gallery"} and found["gallery"].stem.lower()
    return bool(test) and test != "bounding_box_test" and "gallery" not in test


def find_lists(root: Path) -> dict[str, Path]:
    """Return the CSV lists of images in a folder by split; several for one are a ValueError."""
    lists = [p for p in sorted(root.iterdir()) if p.suffix.lower() == ".csv" and p.is_file()]
    lists = [p for p in lists if split_of(p.stem) and _names_images(p)]
    found = {split: [p for p in lists if split_of(p.stem) == split] for split in SPLIT_FOLDERS}
    for split, paths in found.items():
        if len(paths) > 1:
            raise ValueError(
                f"{some(paths)} are all lists for {split}: give each data set a folder of its own."
            )
    return {split: paths[0] for split, paths in found.items() if paths}


def _names_images(path: Path) -> bool:
    """Whether a CSV lists images (or is none, which `read_list` says); else it holds notes."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return not head.strip() or bool(re.search(rb"(?i)\0|path|\.(jpe?g|png|bmp|webp|tiff?)\b", head))


def unpack(archive: Path) -> Path:
    """Unpack a zip beside itself, once, and return the folder.

    If the zip is another one since then, it is unpacked anew, and the old folder stays beside it as
    `NAME.replaced-TIME`. A folder that was not unpacked here is taken as it is.

    ValueError: a member would leave the folder, there is no room, the zip is broken, or it unpacks
    to more than 20 times its size and 100 MB, as no pictures do; then nothing is written.
    """
    target = archive.with_suffix("")
    marker = target / _UNPACKED
    if target.is_dir() and not marker.is_file():
        return target
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            digest = text_sha256(repr([(m.filename, m.file_size, m.CRC) for m in members]))
            if marker.is_file() and marker.read_text() == digest:
                return target
            for m in members:
                if _OUTSIDE.match(m.filename) or stat.S_ISLNK(m.external_attr >> 16):
                    raise ValueError(f"{archive} is refused: {m.filename} would leave the folder.")
            size, free = sum(m.file_size for m in members), shutil.disk_usage(archive.parent).free
            bound = 20 * archive.stat().st_size + 10**8
            if size > min(bound, free):
                raise ValueError(
                    f"{archive} is refused: it unpacks to {size / 1e6:,.0f} MB, where {free / 1e6:,.0f} "
                    f"are free, and pictures in a zip of its size have {bound / 1e6:,.0f} at most. Make "
                    "room, or unpack it yourself."
                )
            with whole_folder(target) as part:
                opened.extractall(part)
                (part / _UNPACKED).write_text(digest)
                if target.is_dir():
                    target.rename(f"{target}.replaced-{time.strftime('%Y%m%dT%H%M%S')}")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot unpack {archive}: {error}. Download it again, or unpack it yourself."
        ) from error
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `target` at the end, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(target, f".{{name}}.{secrets.token_hex(4)}.{{mine}}.tmp")
    part.mkdir()
    try:
        yield part
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- folders and lists: rows of path, pid and camid, all text


def walk(place: Path) -> tuple[list[str], list[str]]:
    """Return image names relative to `place`, sorted, and a note (none or one) on all else there.

    Links are followed, and each real folder or picture is taken once, under its own name if it has
    one here. Raises ValueError: names that are no UTF-8.
    """
    images, strays, links, seen = [], [], [], set()

    def visit(path: str, real: str) -> None:
        """Note a picture, or what is in a folder, unless it was seen; links are kept for later."""
        name, folder = path[len(str(place)) + 1 :].replace(os.sep, "/"), os.path.isdir(path)
        if real in seen or _hidden(name.split("/")[-1]) or not (folder or _is_image(name)):
            strays.append(name + "/" * folder)
            return
        seen.add(real)
        if not folder:
            images.append(name)
            return
        for entry in os.scandir(path):
            if entry.is_symlink():
                links.append(entry.path)
            else:
                visit(entry.path, os.path.join(real, entry.name))

    visit(str(place), os.path.realpath(place))
    links.sort()  # the same of two each time
    for path in links:  # and those that are met on the way
        visit(path, os.path.realpath(path))
    strays = [_shown(stray) for stray in sorted(strays) if stray != _UNPACKED]
    note = f"In {place.name}/ ignored, hidden, linked twice or no images: {some(strays)}."
    return _utf8(sorted(images), f"in {place}"), [note] if strays else []


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _shown(name: str) -> str:
    """A name of a file, with what is no UTF-8 in it escaped."""
    return name.encode(errors="backslashreplace").decode()


def _utf8(names: list[str], where: str) -> list[str]:
    """Return names of files; a ValueError where some are no UTF-8, which no table could hold."""
    if bad := [_shown(name) for name in names if _shown(name) != name]:
        raise ValueError(f"{len(bad)} names {where} are no UTF-8: {some(bad)}. Rename them.")
    return names


def read_folder(
    place: Path,
    pattern: str | None,
    notes: list[str],
    labelled: bool,
    listed: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return the rows of one folder; `notes` get sentences on what is passed over.

    Where the `pattern` over file names does not say the pid, it is -1, or, if `labelled`, the first
    sub-folder. If images are `listed`, by names relative to it, it is those alone. Raises
    FileNotFoundError: listed images are missing; ValueError: no images, or names that say no identity.
    """
    names, strays = walk(place)
    notes += [stray for stray in strays if stray not in notes]
    if listed is not None:
        there = {*names}
        if lost := [name for name in listed if name not in there]:
            raise FileNotFoundError(
                f"{place} lacks {len(lost):,} of the {len(listed):,} images of its list: {some(lost)}. "
                "Unpack the original again."
            )
        names = [*listed]
    if not names:
        raise ValueError(f"{place} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    folders = {folder for name in names for folder in Path(name).parents}
    if labelled and (inner := sorted(str(f) for f in folders if split_of(f.name))):
        raise ValueError(
            f"{place} was taken for a folder of people, and holds {some(inner)}: give the folder that "
            "has train, query and gallery in it, or rename what is a person."
        )
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
    else it is -1 without it. Of a table of wildlife-datasets, whose pid is `identity` and may be "",
    `split` comes too, and a `bbox` is cut out. Raises FileNotFoundError if an image `must_exist` and
    does not, and ValueError: no rows, or a line that cannot be read.
    """
    base = existing(image_root) if image_root else source.parent
    rows, wild = _read_csv(source, labelled)
    if "pid" not in rows:
        rows["pid"] = "-1"
    rows["path"] = rows["path"].str.replace("\\", "/")  # Windows wrote the list
    if "camid" not in rows:
        rows["camid"] = _groups_of([*rows["path"]], pattern, source).get("camid", "-1")
    rows["path"] = [os.path.abspath(base / p) for p in rows["path"]]
    if wild and "bbox" in rows:  # there may be several animals in an image
        boxes = [re.findall(r"-?[\d.]+", text) for text in rows["bbox"]]
        cuts = zip(rows["path"], boxes, strict=True)
        rows["path"] = [cut(p, *map(float, box)) if len(box) == 4 else p for p, box in cuts]
    for column in ("pid", "camid"):  # pandas writes 7.0 where a column has a blank
        rows[column] = rows[column].str.replace(r"^(-?\d+)\.0*$", r"\1", regex=True)
    two = rows["path"][rows.groupby("path")["pid"].transform("nunique") > 1]
    if len(two):
        raise ValueError(f"{source} gives images to several identities: {some(two.unique())}.")
    lost = [p for p in rows["path"] if must_exist and not os.path.isfile(cut_of(p)[0])]
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} of {len(rows)} images in {source} do not exist: {some(lost, 3)}. Is "
            f"image_root right? It is {base}."
        )
    if wild and labelled:
        whole = split_of(source.stem) or "all"
        rows["split"] = rows.get("split", rows.get("original_split", whole))
    return rows[["path", "pid", "camid", *["split"] * (wild and labelled)]]


def _read_csv(source: Path, labelled: bool) -> tuple[pd.DataFrame, bool]:
    """Return the cells of a list, checked, and whether it is a table of wildlife-datasets."""
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source} is no CSV in UTF-8 ({error}): save it as one.") from error
    lines = [(number, row) for number, row in enumerate(lines, 1) if any(row)]
    columns = [cell.lower() for cell in lines[0][1]] if lines else []
    wild = "pid" not in columns and {"identity", "path"} <= {*columns}
    columns = ["pid" if wild and c == "identity" else c for c in columns]
    headed = {"path", *["pid"] * labelled} <= set(columns)
    lines = lines[headed:]
    columns = columns if headed else ["pid", "path", "camid"][: max(2, len(columns))]
    if not lines:
        raise ValueError(f"{source} lists no images.")
    pictured = [any(map(_is_image, row)) for _, row in (lines[0], lines[-1])]
    # The first line is a header of other names, or has one of ours twice.
    other = not headed and pictured == [False, True]
    other |= any(columns.count(name) > 1 for name in ("pid", "path", "camid"))
    for number, row in lines:
        cells = dict(zip(columns, row, strict=False))
        needed = ("path", "camid") if wild else ("pid", "path", "camid")
        empty = "" in map(cells.get, needed)
        if len(row) != len(columns) or empty or other:
            raise ValueError(
                f"{source}, line {number}: expected {','.join(columns)}, got {','.join(row)!r}. A "
                "header names its columns pid, path and camid, each once."
            )
    return pd.DataFrame([row for _, row in lines], columns=columns), wild


def _groups_of(names: list[str], pattern: str | None, place: Path) -> dict[str, list[str]]:
    """Return what the pattern's groups pid and camid catch in each name: group -> texts.

    A name that does not fit by itself is looked at with its folders.
    """
    if not pattern:
        return {}
    try:
        regex = re.compile(MARKET_NAME if pattern == "market1501" else pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}.") from error
    wanted = {"pid", "camid"} & set(regex.groupindex)
    if not wanted:
        raise ValueError(f"pattern {pattern!r} has neither a group (?P<pid>…) nor (?P<camid>…).")
    caught = {n: regex.search(n.rsplit("/", 1)[-1]) or regex.search(n) for n in names}
    wrong = [n for n in names if not caught[n] or None in caught[n].groupdict().values()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(names)} image names in {place} do not fit {regex.pattern}: "
            f"{some(wrong)}. Rename or remove them, or give another pattern."
        )
    return {group: [caught[name][group] for name in names] for group in wanted}


def _hidden(*names: str) -> bool:
    return any(name.startswith(".") or name == "__MACOSX" for name in names)
