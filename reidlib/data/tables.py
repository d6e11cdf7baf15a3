"""Data sets as tables: Market-1501, folders of identities, CSV lists.

One row is one image. Columns: `path` (absolute), `pid` (identity; -1 junk, 0 distractor) and
`camid` (camera; -1 in every row where cameras are unknown). Identities that are names, not
numbers, are numbered 1, 2, … over all splits together, and keep the name in a column `label`.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from reidlib.data import corrections, files, layouts, tracks
from reidlib.data.dataset import Dataset, union
from reidlib.data.dataset import fingerprint as fingerprint
from reidlib.data.files import Source
from reidlib.data.synthetic import built_in_data
from reidlib.recipes import DATA_SETS, listed
from reidlib.runs import sha256
from reidlib.words import some


def load(
    dataset: Source = "market1501", *, pattern: str | None = None, image_root: Source | None = None
) -> Dataset:
    r"""Load a data set: the one door, and every argument may be a plain string.

    In Market-1501's layout files are named PID_cCsS_FRAME_BOX.jpg. A folder's split is that of its
    sub-folders train, query and gallery (also bounding_box_train, image_test, TEST and the like);
    of train and test alone, folders or lists, queries are drawn from test. Without them identities
    are split in halves, as in Market-1501, see `hold_out`. A row of a CSV list is `pid,path` or
    `pid,path,camid`, as triplet-reid writes it; with a header columns may stand in any order, among
    others. Three lists go before folders beside them.

    Args:
        dataset: one of
            - `"synthetic"`: the built-in data, drawn into the data folder when it is not there;
            - `"market1501"` or another name of `layouts.LAYOUTS`: its folder, or its zip, in the data
              folder;
            - a folder in one of their layouts, its parent, or a zip of it;
            - a folder of identities, split or not: `train/<identity>/any.jpg`;
            - a folder with the lists train.csv, query.csv and gallery.csv (or …_test.csv), or one
              CSV for training only. Without a list its table is empty, and a note says so.
            - several of these, with commas between them: people and cameras are kept apart.
            - a table of wildlife-datasets: a CSV with the columns path and identity, and split, if it
              is to be divided so;
            A relative path is looked for in the working directory, then in the data folder.
        pattern: a regular expression over file names, such as `r"(?P<pid>[a-z]+)_cam(?P<camid>\d)"`,
            or, where they do not fit, over names with their folders, such as `"cam(?P<camid>\d)/"`;
            or `"market1501"` for Market-1501's names. Its group `pid` is the identity, not the first
            sub-folder; its group `camid` is the camera where no column says it, else -1, unknown.
        image_root: where the relative paths of CSV lists start; None: in each list's own folder.

    A file `corrections.csv` in the data set's folder, as the ranked-list browser saves it, leaves
    images out or gives them to somebody else; a note says how many, see `corrections.correct`.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or something else; says what to do.

    >>> dataset = load("synthetic")
    >>> sorted(dataset.train.columns)
    ['camid', 'path', 'pid']
    """
    # "" is how a notebook says None; papermill turns digits into a number.
    pattern, image_root = str(pattern or "") or None, image_root or None
    name, names = str(dataset), listed(str(dataset))
    if len(names) > 1:
        yours = {"pattern": pattern, "image_root": image_root}
        return union([load(one, **({} if one in DATA_SETS else yours)) for one in names])
    if name in DATA_SETS:
        if pattern or image_root:
            raise ValueError(f"pattern and image_root are for your own data, not for {name!r}.")
        if name == "synthetic":
            return replace(_folder(built_in_data(), None), name=name)
        return _known(*layouts.find(name))
    path = files.existing(dataset)
    if path.is_file() and path.suffix.lower() == ".csv":
        return _lists({"train": path}, image_root, pattern)
    if path.is_file() and path.suffix.lower() == ".zip":
        path = files.unpack(path)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder, a .zip nor a .csv list.")
    if any((path / name).is_file() for name in tracks.BOXES):
        raise ValueError(
            f"{path} is a tracker's sequence: `embed --crops FOLDER` makes a data set of it."
        )
    lists = files.find_lists(path)
    if not lists and (table := layouts.find_table(path)):
        return _lists({"train": table}, image_root, pattern)
    if not lists and not pattern and (known := layouts.recognise(path)):
        return _known(*known)
    market = files.find_below(path, "bounding_box_train") if len(lists) < 3 else None
    if lists:
        others = (p for p in path.iterdir() if p.is_dir() and files.split_of(p.name))
        others = (p for p in others if files.split_of(p.name) not in lists)
        if len(lists) < 3 and (beside := market or next(others, None)):
            raise ValueError(
                f"{path} holds the lists {some(lists.values())} and the folder {beside}: give the one "
                "that is meant, by its own path."
            )
        return _lists(lists, image_root, pattern)
    if image_root:
        raise ValueError(f"image_root goes with CSV lists, and {path} has none.")
    return _folder(market or path, pattern)


def _known(name: str, root: Path) -> Dataset:
    """Load a data set in a layout that is known."""
    notes = []
    raw = layouts.read(name, root, notes)
    return replace(_dataset(root.name, root, raw, notes, layouts.LAYOUTS[name].pattern), name=name)


def _folder(root: Path, pattern: str | None) -> Dataset:
    """Load a folder of images, split or not."""
    notes = []
    places = files.find_splits(root, notes)
    if not pattern and places and places["train"].name.lower() == "bounding_box_train":
        pattern = "market1501"
    raw = {
        split: files.read_folder(place, pattern, notes, labelled=True)
        for split, place in (places or {"all": root}).items()
    }
    return _dataset(root.name, root, raw, notes, pattern)


def _lists(lists: dict[str, Path], image_root: Source | None, pattern: str | None) -> Dataset:
    """Load the CSV lists of some splits, or of all."""
    if ("query" in lists) != ("gallery" in lists) and not files.queries_drawn(lists):
        found = ", ".join(map(str, lists.values()))
        raise ValueError(
            f"query and gallery go together, and there is only {found}. Of lists train and test alone "
            "queries are drawn from test."
        )
    raw = {
        split: files.read_list(path, image_root, pattern, must_exist=True, labelled=True)
        for split, path in lists.items()
    }
    folder, notes = next(iter(lists.values())).parent, []
    if [*raw] == ["train"] and "split" in raw["train"]:
        raw = layouts.by_split(raw["train"], notes)
    return _dataset(folder.name, files.existing(image_root or folder), raw, notes, pattern)


def image_list(
    source: Source,
    *,
    pattern: str | None = None,
    image_root: Source | None = None,
    must_exist: bool = True,
) -> pd.DataFrame:
    """Return one table of a folder (all images in it, at any depth), a CSV list or a tracker's boxes.

    Args:
        source: the folder or the list. With a header a list needs no `pid`: then it is -1. Or a
            sequence in MOTChallenge's form, see `tracks`.
        pattern: says identities and cameras of a folder; without it both are -1.
        image_root: where the relative paths of a list start; None: in its own folder.
        must_exist: False where a list belongs to embeddings from elsewhere, and its images need not
            be here.

    Raises:
        FileNotFoundError: nothing there, or images of a list are missing.
        ValueError: no images; or names of identities, which two lists would number differently.

    >>> folder = load("synthetic").query["path"].iloc[0]
    >>> set(image_list(Path(folder).parent)["pid"])  # file names say nothing without a pattern
    {-1}
    """
    path = files.existing(source)
    if boxes := tracks.boxes_of(path):
        rows = tracks.read_tracks(boxes, [])
    elif path.is_file():
        rows = files.read_list(path, image_root, pattern, must_exist, labelled=False)
    elif image_root:
        raise ValueError(f"image_root goes with CSV lists, and {path} is none.")
    else:
        rows = files.read_folder(path, pattern, [], labelled=False)
    table = _number({"": rows}, [])[""]
    if "label" in table:
        raise ValueError(f"{path} names its identities: number them, so that two lists agree.")
    return table


def ignored_files(source: Source) -> str:
    """Return sentences on what `image_list` passes over: no images, hidden, or no boxes; or ""."""
    path, notes = files.existing(source), []
    if boxes := tracks.boxes_of(path):
        tracks.read_tracks(boxes, notes)
    return "\n".join(notes if boxes or path.is_file() else files.walk(path)[1])


def hold_out(
    train: pd.DataFrame, identities: int | Source = 100, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Take identities out of training for validation: return tables train, query and gallery.

    Only identities that can be matched are taken: with two cameras or more, or two images or more
    where cameras are unknown. Of each, one image a camera becomes a query, from cameras with two
    images or more; where no camera has two, one image alone. So every query has a match in another
    camera.

    Args:
        train: the training table; it is left as it is.
        identities: how many, or a file that names them, see `split_file`.
        seed: draws identities and queries.

    Raises:
        ValueError: `identities` leaves nothing to train on, or too few can be matched.

    >>> train, query, gallery = hold_out(load("synthetic").train, identities=3)
    >>> gallery["pid"].nunique(), set(gallery["pid"]) & set(train["pid"])
    (3, set())
    """
    train = train.reset_index(drop=True)
    rng = np.random.default_rng(seed)
    matchable, total = _matchable(train), train.loc[train["pid"] > 0, "pid"].nunique()
    named = None if isinstance(identities, int) else split_file(identities)
    count = identities if named is None else len(named)
    if named is not None and len(wrong := named[~np.isin(named, matchable)]):
        raise ValueError(
            f"{identities} names {len(wrong)} identities, first {wrong[0]}, without images of two "
            "cameras in the training split: is it the split of another data set?"
        )
    if not 0 < count <= len(matchable) or count >= total:
        raise ValueError(
            f"cannot hold out {count} of {total} identities: {len(matchable)} have images of "
            "two cameras (or two images, with no cameras), and some must stay for training."
        )
    named = rng.choice(matchable, size=count, replace=False) if named is None else named
    held = train["pid"].isin(named)
    return train[~held].reset_index(drop=True), *_draw_queries(train[held], rng)


def _draw_queries(
    test: pd.DataFrame, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables query and gallery of a test, see `hold_out`; who cannot be matched comes last."""
    able = test["pid"].isin(_matchable(test))
    mixed = test[able].iloc[rng.permutation(able.sum())]
    group = mixed.groupby(["pid", "camid"])["pid"]
    picked = (group.transform("size") > 1) & (group.cumcount() == 0)
    # Identities with one image in each camera: one query, and the others stay to be found.
    picked |= ~mixed["pid"].isin(mixed["pid"][picked]) & ~mixed["pid"].duplicated()
    asked = test.index.isin(mixed.index[picked])
    gallery = pd.concat([test[able & ~asked], test[~able]], ignore_index=True)
    return test[asked].reset_index(drop=True), gallery


def _matchable(table: pd.DataFrame) -> np.ndarray:
    """Return the identities (sorted) whose images can be matched with one another."""
    people = table[table["pid"] > 0].groupby("pid")
    counts = people["camid"].nunique() if (table["camid"] >= 0).all() else people.size()
    return counts.index[counts > 1].to_numpy()


def split_file(name: Source) -> np.ndarray:
    """Read the identities (pids) that a file names, one a line; `#` starts a comment.

    The name is the path of a file or `"market1501"`, the split of this repository on which settings
    are chosen (101 of the 751 training identities). Raises ValueError, FileNotFoundError.
    """
    path = Path(__file__).parent / "splits" / f"{name}.txt"
    path = path if path.is_file() else files.existing(name)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        words = [line.split("#")[0].strip() for line in text.splitlines()]
        pids = np.array([int(word) for word in words if word])
    except ValueError as error:
        raise ValueError(f"{path} must hold one identity (a number) a line: {error}.") from None
    if len(pids) == 0 or len(set(pids)) < len(pids):
        raise ValueError(f"{path} names no identity, or one of them twice.")
    return pids


def _number(
    raw: dict[str, pd.DataFrame], notes: list[str], from_0: bool = False
) -> dict[str, pd.DataFrame]:
    """Turn text to int64 with one map for all splits: numbers stay, names count from 1, sorted.

    They may begin at 0, if `from_0`: where a 0 is not in the gallery alone, as distractors are, and
    there is no junk, it is a person, and all numbers move up by one.
    """
    rows, digits = pd.concat(raw), 18 if "" in raw else 15  # a page's numbers have no more
    not_gallery = (rows.index.get_level_values(0) != "gallery") | ("query" not in raw)
    for column, word, special in (("pid", "identities", (-1, 0)), ("camid", "cameras", (-1,))):
        texts = sorted(rows[column].unique())
        numbers = {t: int(t) for t in texts if re.fullmatch(rf"-?\d{{1,{digits}}}", t)}
        before = rows[column].map(numbers)
        renumbered = len(numbers) < len(texts)
        if renumbered:  # names: only "-1" and "0000" keep their meaning
            numbers = {t: number for t, number in numbers.items() if number in special}
            named = {t: i for i, t in enumerate((t for t in texts if t not in numbers), 1)}
            shown = some([f"{t} = {i}" for t, i in named.items()])
            notes.append(f"The {word} are names and were numbered: {shown}.")
            numbers |= named
        elif from_0 and column == "pid" and before.ne(-1).all() and before[not_gallery].eq(0).any():
            renumbered = True
            notes.append("Identities begin at 0: 0 is a person, and all are numbered one higher.")
            numbers = {t: number + 1 for t, number in numbers.items()}
        if renumbered and column == "pid":
            rows["label"] = rows["pid"]
        if below := [t for t, number in numbers.items() if number < -1]:
            raise ValueError(f"{word} below -1 have no meaning: {some(below)}.")
        rows[column] = rows[column].map(numbers).astype("int64")
    return {split: rows.loc[split].reset_index(drop=True) for split in raw}


def _halves(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Half of the identities for training, half for testing; pid -1 and 0 go to the gallery."""
    people = table[table["pid"] > 0]
    identities = min(people["pid"].nunique() // 2, len(_matchable(people)))
    if not identities:
        raise ValueError("too few identities to split, or none with images of two cameras.")
    train, query, gallery = hold_out(people, identities)
    gallery = pd.concat([gallery, table[table["pid"] <= 0]], ignore_index=True)
    return {"train": train, "query": query, "gallery": gallery}


def _share_paths(query: pd.DataFrame, gallery: pd.DataFrame) -> int:
    """Give copies of a query in the gallery its path, so that they are no match; return how many queries.

    A copy is a file with the same bytes, of the same identity.
    """

    def key(pid: int, path: str) -> tuple[int, int]:
        return pid, os.path.getsize(path) if os.path.isfile(path) else 0

    sides, first = (gallery, query), {}
    sizes = [{*map(key, table["pid"], table["path"])} for table in sides]
    likely = {pair for pair in set.intersection(*sizes) if pair[1]}
    for table in sides:
        table["path"] = [
            first.setdefault((pid, sha256(Path(path))), path) if key(pid, path) in likely else path
            for pid, path in zip(table["pid"], table["path"], strict=True)
        ]
    return int(query["path"].isin(gallery["path"]).sum())


def _dataset(
    name: str, root: Path, raw: dict[str, pd.DataFrame], notes: list[str], pattern: str | None
) -> Dataset:
    """Return a Dataset of three tables, with cameras known for all images or for none."""
    tables = _number(raw, notes, from_0=pattern != "market1501")
    if "all" in tables:
        tables = _halves(tables["all"])
        notes.append("No split is given: identities were split in halves with seed 0.")
    if "gallery" in tables and "query" not in tables:
        drawn = _draw_queries(tables["gallery"], np.random.default_rng(0))
        tables |= dict(zip(("query", "gallery"), drawn, strict=True))
        notes.append(f"No queries are given: {len(drawn[0])} were drawn from the test with seed 0.")
    absent = [split for split in files.SPLIT_FOLDERS if split not in tables]
    if absent:
        able = "train, not test" if "train" in tables else "test, not train"
        notes.append(f"No list for {' and '.join(absent)} was given: this data set can {able}.")
        tables |= {split: next(iter(tables.values())).iloc[:0].copy() for split in absent}
    tables = corrections.correct(root, tables, notes)
    for where, splits in (("training", ["train"]), ("query and gallery", ["query", "gallery"])):
        known = pd.concat([tables[split] for split in splits])["camid"] >= 0
        if known.any() and not known.all():
            raise ValueError(
                f"{name}: {known.sum()} of {len(known)} images in {where} have a camera: give all one."
            )
    blind = (tables["query"]["camid"] == -1).all()
    if blind and (n := _share_paths(tables["query"], tables["gallery"])):
        notes.append(f"{n} queries are copies of gallery images, which are left out for them.")
    everything = pd.concat(tables.values())
    if (everything["camid"] == -1).all():
        notes.append("No camera is known: camid is -1 everywhere.")
        if all(re.match(files.MARKET_NAME, os.path.basename(p)) for p in everything["path"]):
            notes.append('pattern="market1501" would read the cameras from the file names.')
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-") or "data"  # it names folders of runs
    return Dataset(safe, root, **tables, notes=tuple(notes))
