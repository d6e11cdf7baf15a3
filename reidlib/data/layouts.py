"""Data sets by the names that people use, as `layouts.toml` says that they lie, and tables of animals."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from reidlib.data import files
from reidlib.paths import data_dir
from reidlib.words import some


class Layout(SimpleNamespace):
    """A data set as it is downloaded; `layouts.toml` says what each of its facts means."""

    @property
    def mark(self) -> str:
        """What it is known by beside its name: the folder of its training images."""
        return f"{self.below}/{self.folders['train']}".lstrip("/")

    def is_called(self, place: Path) -> bool:
        """Whether a folder or a zip has its name, however that is spelt."""
        stem = place.name.lower().removesuffix(".zip")
        return bool(re.fullmatch(self.called, re.sub(r"[^a-z0-9]", "", stem)))

    def fits(self, place: Path) -> bool:
        """Whether a folder has its name, or its first list."""
        first = self.lists.get("train", "").split("+")[0]
        return self.is_called(place) or (bool(first) and (place / first).is_file())

    def lacking(self, place: Path) -> str:
        """Say that a folder has its name, and not what it begins with."""
        there = some(sorted(p.name for p in place.iterdir() if p.is_dir()), 8)
        return (
            f"{place} is called like {self.title}, and has no folder {self.mark} in it or up to two levels "
            f"below, but {there or 'none at all'}."
        )


def _layouts() -> dict[str, Layout]:
    """Read the table, where one may be `like` another that stands before it."""
    facts = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    for name, own in facts.items():
        facts[name] = facts[own.pop("like", "default")] | own
    return {name: Layout(**own) for name, own in facts.items() if name != "default"}


LAYOUTS = _layouts()


def find(name: str) -> tuple[str, Path]:
    """Return the name and the folder of a data set in the data folder, unpacked where there is a zip.

    The name is `msmt17_v2` where `msmt17` is there as that alone. A FileNotFoundError says what is there.
    """
    layout, said = LAYOUTS[name], []
    fits = {name.split("+")[0].removesuffix("_v1"), *["msmt17_v2"] * (name == "msmt17")}
    places = [p for p in data_dir().glob("[!.]*") if layout.is_called(p)]
    places.sort(key=lambda p: (p.is_file(), not p.name.startswith(layout.folder), p.name))
    for place in places:
        archive = place if place.is_file() else place.with_name(f"{place.name}.zip")
        if archive.suffix.lower() == ".zip" and archive.is_file():
            place = files.unpack(archive)
        there = _known_below(place) if place.is_dir() else {}
        for known, root in there.items():
            if known in fits:
                return (name if "+" in name else known), root
            said.append(f"{root} is {LAYOUTS[known].title}: ask for {known}.")
        said += [layout.lacking(place)] * (place.is_dir() and not there)
    get = " ".join([*said, layout.get[0].upper() + layout.get[1:]]) if said else layout.get
    raise FileNotFoundError(
        f"{layout.title} is not in {data_dir()}: {get}, and put the folder {layout.folder} (with "
        f"{layout.mark} in it) or its zip there; or give the path of another folder, or "
        'dataset="synthetic".'
    )


def recognise(place: Path) -> tuple[str, Path] | None:
    """Return the name and the folder of the known data set in a folder that somebody gave, or None.

    Raises ValueError: there are several; FileNotFoundError: it has the name of one, and not its layout.
    """
    known = _known_below(place)
    if len(known) > 1:
        raise ValueError(f"{place} holds several data sets, give one: {some(known.values())}.")
    likely = [o for name, o in LAYOUTS.items() if "market" not in name and o.is_called(place)]
    if likely and not known:
        raise FileNotFoundError(
            f"{likely[0].lacking(place)} Unpack the original again. If these are other pictures, rename "
            "the folder, or give a pattern."
        )
    return next(iter(known.items()), None)


def _known_below(place: Path) -> dict[str, Path]:
    """Return the known data sets in a folder, itself or up to two levels below, by their names."""
    found = {}
    for name, layout in LAYOUTS.items():
        within = layout.below == place.name.lower()  # cuhk03-np/detected itself
        top = place.parent if layout.lists or within else place
        near = [place, top, *(p for p in place.iterdir() if p.is_dir())]
        if "+" in name or not any(map(layout.fits, near)):
            continue
        root = files.find_below(top if within else place, layout.mark)
        above = [p for p in (root, *root.parents) if p.is_relative_to(top)] if root else []
        if root not in found.values() and any(map(layout.fits, above)):
            found[name] = root
    return found


def read(name: str, root: Path, notes: list[str]) -> dict[str, pd.DataFrame]:
    """Return the rows of each split, all text; `notes` get what is to be said.

    Raises FileNotFoundError: a folder, a list or an image of a list is missing.
    """
    layout, raw = LAYOUTS[name], {}
    for split, folders in layout.folders.items():
        lists, parts = layout.lists.get(split), []
        listed = lists and [x for f in lists.split("+") for x in _lines(root, f, layout)]
        for folder in folders.split("+"):
            place, nobody = _inside(root, folder, layout), folder == "images"
            pattern = r"_c(?P<camid>\d+)" if nobody else layout.pattern
            rows = files.read_folder(place, pattern, notes, labelled=not nobody, listed=listed)
            parts.append(rows.assign(pid="0") if nobody else rows)
        raw[split] = pd.concat(parts, ignore_index=True)
        if layout.apart:
            raw[split]["pid"] = f"{'train' if split == 'train' else 'test'} " + raw[split]["pid"]
    notes += [layout.said] * bool(layout.said)
    return raw


def _inside(root: Path, name: str, layout: Layout) -> Path:
    """Return a file or folder of a data set, in any capitals; a FileNotFoundError says what is there."""
    there = {p.name.lower(): p for p in root.iterdir()}
    if name not in there:
        names = some(sorted(p.name for p in there.values()), 8)
        raise FileNotFoundError(
            f"{layout.title} in {root} lacks {name}: there is {names}. Give it its name back, or unpack the "
            "original again."
        )
    return there[name]


def _lines(root: Path, file: str, layout: Layout) -> list[str]:
    """Return the images that a list names: the first word of each line."""
    place = _inside(root, file, layout)
    lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
    images = [line.split()[0].replace("\\", "/") for line in lines if line.strip()]
    if not images:
        raise ValueError(f"{place} names no image: unpack the original again.")
    return images


def cause_of(name: str, split: str, found: int) -> str:
    """Say why a split may have another number of images than it should, and what to do."""
    for other in LAYOUTS.values():
        if other.images[split] == found:
            return f"{other.title} has so many: is it that?"
    return LAYOUTS[name].causes.get(str(found), "Unpack the original archive again.")


def find_table(folder: Path) -> Path | None:
    """Return the table of wildlife-datasets in a folder: the CSV with the columns identity and path."""
    found = []
    for place in sorted(folder.glob("*.csv")):
        with open(place, "rb") as file:
            header = file.readline(4096).decode("utf-8-sig", "replace").lower()
        found += [place] * ({"identity", "path"} <= {*re.split(r'[",\s]+', header)})
    if len(found) > 1:
        raise ValueError(f"{folder} holds several tables, give one: {some(found)}.")
    return next(iter(found), None)


def by_split(rows: pd.DataFrame, notes: list[str]) -> dict[str, pd.DataFrame]:
    """Divide the rows of a table of wildlife-datasets as its column split says.

    Animals that nobody knows stay in the gallery, as junk. Raises ValueError: the column divides
    nothing.
    """
    if n := sum(files.cut_of(path)[1] is not None for path in rows["path"]):
        notes.append(f"{n:,} images are cut to their bbox.")
    unknown = rows["pid"].str.lower().isin(["", "unknown", "nan", "none"])
    rows.loc[unknown, "pid"] = "-1"
    words = rows["split"].str.lower()
    meant = {word: files.split_of(word) for word in words.unique()} | {"all": "all"}
    meant["database"] = "gallery" if ((words == "query") & ~unknown).any() else "train"
    split = words.map(meant)
    left = split.isna() | (unknown & ~split.isin(["gallery", "all"]))
    if left.any():
        of = some(sorted(map(repr, words[left].unique())))
        notes.append(f"{left.sum():,} rows are left out, of split {of}: unused, or nobody known.")
    raw = {s: part[["path", "pid", "camid"]] for s, part in rows[~left].groupby(split[~left])}
    if not raw or ("query" in raw and "gallery" not in raw):
        raise ValueError(
            f"the column split says {some(sorted(words.unique()))}: it must say train, test, or query and "
            "gallery (or database), and the animals must be known."
        )
    return raw
