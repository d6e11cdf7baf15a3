"""What is wrong with a data set, named, with what to do about it."""

import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from reidlib.data.layouts import LAYOUTS, cause_of
from reidlib.data.pixels import read_image
from reidlib.data.tables import Dataset
from reidlib.words import some

# All that may be wrong: severity, problem, and what to do.
PROBLEMS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, eq=False)
class DataReport:
    """What `check` found. `print` it; `ok` is False when there is an error.

    Attributes:
        counts: one row a split; images, identities (pid > 0), cameras, junk, distractors.
        problems: severity ("error", "warning", "note"), problem, advice; errors first.
        unreadable: path -> cause.
        decoded: whether the images themselves were read.
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
        return not (self.problems["severity"] == "error").any()

    def __str__(self) -> str:
        """For a terminal: counts, then one line a problem, then the verdict."""
        lines = [f"{self.name}: {self.root}", "", self.counts.to_string(), ""]
        total = int(self.counts["images"].sum())
        if self.decoded:
            lines.append(f"{total - len(self.unreadable):,} of {total:,} images decoded.")
        for row in self.problems.itertuples():
            lines.append(f"{row.severity + ':':<9}{row.problem} {row.advice}".rstrip())
        tally = self.problems["severity"].value_counts()
        counted = [f"{s}s: {tally.get(s, 0)}" for s in ("error", "warning", "note")]
        return "\n".join([*lines, f"{'OK' if self.ok else 'NOT OK'} ({', '.join(counted)})."])


def check(
    dataset: Dataset, k: int = 4, *, decode: bool = True, progress: Callable | None = None
) -> DataReport:
    """Look for what would spoil training or scores; every finding says what to do.

    Args:
        dataset: what to check.
        k: the K of PK batches.
        decode: read every image (Market-1501: under a minute).
        progress: wraps the loop as `tqdm` does: `progress(iterable, total=n)`.

    >>> from reidlib.data.tables import load
    >>> check(load("synthetic"), decode=False).ok
    True
    """
    paths = list(pd.concat(dataset.splits.values())["path"].unique())
    unreadable = _unreadable(paths, progress) if decode else {}
    found = []
    for name, them, words in _concerned(dataset, k, unreadable):
        words |= {"n": len(them), "them": some(dict.fromkeys(them), words.get("most", 5))}
        if len(them):
            found.append([text.format(**words) for text in PROBLEMS[name].values()])
    found.sort(key=lambda row: ("error", "warning", "note").index(row[0]))
    problems = pd.DataFrame(found, columns=["severity", "problem", "advice"])
    counts = {
        split: {
            "images": len(table),
            "identities": table["pid"][table["pid"] > 0].nunique(),
            "cameras": table["camid"][table["camid"] >= 0].nunique(),
            "junk": (table["pid"] == -1).sum(),
            "distractors": (table["pid"] == 0).sum(),
        }
        for split, table in dataset.splits.items()
    }
    counts = pd.DataFrame.from_dict(counts, orient="index")
    return DataReport(dataset.name, dataset.root, counts, problems, unreadable, decode)


def _both_sides(dataset: Dataset) -> list[int]:
    """Return the people who are in training and in test at once."""
    test = {*dataset.query["pid"], *dataset.gallery["pid"]} - {-1, 0}
    return sorted({*dataset.train["pid"]} & test)


def on_both_sides(dataset: Dataset) -> str:
    """Say beside a score, and before a training, who is in training and in test at once, or ""."""
    them = _both_sides(dataset)
    _, *said = PROBLEMS["both sides"].values()
    return " ".join(said).format(n=len(them), them=some(them)) if them else ""


def drop_unreadable(dataset: Dataset, report: DataReport) -> Dataset:
    """Return the data set without the images that `check` could not read, named in the notes.

    ValueError: no image of a split can be read.
    """
    bad = set(report.unreadable)
    tables = {s: t[~t["path"].isin(bad)].reset_index(drop=True) for s, t in dataset.splits.items()}
    for split, table in tables.items():
        if not len(table) and len(dataset.splits[split]):
            raise ValueError(f"no image of {split} in {dataset.name} can be read.")
    note = f"{len(bad)} unreadable images left out: {some(sorted(bad), 10)}."
    return replace(dataset, **tables, notes=(*dataset.notes, *([note] if bad else [])))


def _unreadable(paths: list[str], progress: Callable | None) -> dict[str, str]:
    """Decode every image: path -> cause, of those that cannot be read."""

    def cause(path: str) -> str | None:
        try:
            read_image(path)
        except ValueError as error:
            return str(error).split(f"{path}: ", 1)[-1]
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        causes = pool.map(cause, paths)
        causes = list(progress(causes, total=len(paths)) if progress else causes)
    return {path: why for path, why in zip(paths, causes, strict=True) if why}


def _concerned(
    dataset: Dataset, k: int, unreadable: dict[str, str]
) -> Iterator[tuple[str, Sequence, dict]]:
    """Yield the name of each of `PROBLEMS`, whom it concerns (nobody: all is well), and its words."""
    train, query, gallery = dataset.splits.values()
    for name, part in dataset.parts.items():
        for split, table in part.splits.items() if name in LAYOUTS else ():
            cause, wanted = cause_of(name, split, len(table)), LAYOUTS[name].images[split]
            words = dict(split=split, found=len(table), wanted=wanted, cause=cause)
            wrong = [split] * (len(table) != wanted)
            yield "counts", wrong, words | {"title": LAYOUTS[name].title}
    broken = [f"{path} ({cause})" for path, cause in unreadable.items()]
    yield "unreadable", broken, {"most": 10}
    for split, table in dataset.splits.items():
        yield "twice", table["path"][table["path"].duplicated()], {"split": split}
        if split != "gallery":
            yield "junk", table[table["pid"] == -1], {"split": split}
            yield "distractors", table[table["pid"] == 0], {"split": split}

    sizes = train["pid"][train["pid"] > 0].value_counts().sort_index()
    yield "single", sizes.index[sizes == 1], {}
    yield "few", sizes.index[(sizes > 1) & (sizes < k)], {"k": k}
    yield "alone", train if len(sizes) < 2 else [], {}
    yield "both sides", _both_sides(dataset), {}

    cameras = (query["camid"] >= 0).all()  # also where there is no query
    if not cameras:
        yield "found again", sorted({*query["path"]} & {*gallery["path"]}), {}
        yield "no cameras", ["query", "gallery"], {}
    # A match is a gallery image of the same identity that another camera took.
    matches = query["pid"].map(gallery["pid"].value_counts()).fillna(0)
    if cameras:
        same = gallery.groupby(["pid", "camid"]).size().rename("same").reset_index()
        own = query.merge(same, how="left", on=["pid", "camid"])["same"].fillna(0)
        matches = matches - own.to_numpy()
    lost = query["pid"][(matches == 0) & (query["pid"] > 0)].sort_values()
    words = {"where": "in another camera" if cameras else "in the gallery", "queries": len(query)}
    words["severity"] = "error" if len(lost) == len(query) else "warning"
    yield "no match", lost, words
    yield from (("remark", [note], {}) for note in dataset.notes)
