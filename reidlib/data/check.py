"""What is wrong with a data set, named, with what to do about it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pandas as pd

from reidlib.data.pixels import read_image
from reidlib.data.tables import Dataset
from reidlib.words import some


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


MARKET_COUNTS = {"train": 12936, "query": 3368, "gallery": 19732}

# (severity, problem, advice on what to do)
Findings = Iterator[tuple[str, str, str]]


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
    found = [
        *_market_counts(dataset),
        *_broken(unreadable),
        *chain.from_iterable(_split(name, table) for name, table in dataset.splits.items()),
        *_training(dataset.train, k),
        *_both_sides(dataset),
        *_matches(dataset.query, dataset.gallery),
        *(("note", note, "") for note in dataset.notes),
    ]
    found.sort(key=lambda row: ("error", "warning", "note").index(row[0]))
    problems = pd.DataFrame(found, columns=["severity", "problem", "advice"])
    return DataReport(dataset.name, dataset.root, _counts(dataset), problems, unreadable, decode)


def drop_unreadable(dataset: Dataset, report: DataReport) -> Dataset:
    """Return the data set without the images that `check` could not read, named in the notes.

    Raises:
        ValueError: no image of a split can be read.
    """
    bad = set(report.unreadable)
    tables = {s: t[~t["path"].isin(bad)].reset_index(drop=True) for s, t in dataset.splits.items()}
    for split, table in tables.items():
        if not len(table) and len(dataset.splits[split]):
            raise ValueError(f"no image of {split} in {dataset.name} can be read.")
    note = f"{len(bad)} unreadable images left out: {some(sorted(bad), 10)}."
    return replace(dataset, **tables, notes=(*dataset.notes, *([note] if bad else [])))


def _counts(dataset: Dataset) -> pd.DataFrame:
    rows = {}
    for split, table in dataset.splits.items():
        rows[split] = {
            "images": len(table),
            "identities": table["pid"][table["pid"] > 0].nunique(),
            "cameras": table["camid"][table["camid"] >= 0].nunique(),
            "junk": int((table["pid"] == -1).sum()),
            "distractors": int((table["pid"] == 0).sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


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


# --- what may be wrong


def _market_counts(dataset: Dataset) -> Findings:
    """Splits whose size is not Market-1501's, and the likely cause."""
    lost = "files that end in .jpg.jpg are lost: unpack the original archive again."
    causes = {
        ("query", 3362): f"6 {lost}",
        ("gallery", 19714): f"18 {lost}",
        ("gallery", 15913): "The junk images are left out; scores stay the same.",
    }
    for split, table in dataset.splits.items():
        if dataset.name == "market1501" and len(table) != MARKET_COUNTS[split]:
            yield (
                "warning",
                f"{split} has {len(table):,} images, Market-1501 has "
                f"{MARKET_COUNTS[split]:,}: scores do not compare with published ones.",
                causes.get((split, len(table)), "Unpack the original archive again."),
            )


def _broken(unreadable: dict[str, str]) -> Findings:
    if unreadable:
        named = some([f"{path} ({cause})" for path, cause in unreadable.items()], 10)
        yield (
            "error",
            f"{len(unreadable)} images cannot be read: {named}.",
            "Replace them, or go on without them: drop_unreadable(dataset, report).",
        )


def _split(split: str, table: pd.DataFrame) -> Findings:
    """Images listed twice, and junk and distractors where they do not belong."""
    twice = table["path"][table["path"].duplicated()]
    if len(twice):
        yield (
            "warning",
            f"{len(twice)} images are listed twice in {split}: {some(twice)}.",
            "Keep one row an image.",
        )
    junk, distractors = ((table["pid"] == pid).sum() for pid in (-1, 0))
    if split != "gallery" and junk:
        yield (
            "error",
            f"{junk} images in {split} have pid -1, junk.",
            "Junk belongs in the gallery alone: move or remove them.",
        )
    if split != "gallery" and distractors:
        yield (
            "warning",
            f"{distractors} images in {split} have pid 0, distractor.",
            "If 0 is a person, number identities from 1.",
        )


def _training(train: pd.DataFrame, k: int) -> Findings:
    """Identities too few, or with too few images."""
    sizes = train["pid"][train["pid"] > 0].value_counts().sort_index()
    single, few = sizes.index[sizes == 1], sizes.index[(sizes > 1) & (sizes < k)]
    if len(single):
        yield (
            "warning",
            f"{len(single)} training identities have one image: {some(single)}.",
            "They give no positive pair but the image with itself; add images or remove them.",
        )
    if len(few):
        yield (
            "note",
            f"{len(few)} training identities have fewer than K = {k} images: {some(few)}.",
            "PK batches repeat their images.",
        )
    if len(train) and len(sizes) < 2:
        yield ("error", f"training has {len(sizes)} identities.", "Triplets need two or more.")


def _both_sides(dataset: Dataset) -> Findings:
    """Identities that are trained on and tested."""
    test = {*dataset.query["pid"], *dataset.gallery["pid"]} - {-1, 0}
    both = {*dataset.train["pid"]} & test
    if both:
        yield (
            "error",
            f"{len(both)} identities are in training and in test: {some(sorted(both))}.",
            "Scores would be too good; give each person to one side.",
        )


def _matches(query: pd.DataFrame, gallery: pd.DataFrame) -> Findings:
    """Queries that would find themselves, or nobody."""
    if not len(query):
        return
    cameras = (query["camid"] >= 0).all()
    both = set(query["path"]) & set(gallery["path"])
    if both and not cameras:
        yield (
            "error",
            f"{len(both)} queries are in the gallery too and will find themselves: "
            f"{some(sorted(both))}.",
            "Take them out of the gallery, or give cameras.",
        )
    if not cameras:
        yield (
            "warning",
            "Without cameras nothing is excluded by camera: a query may find the next "
            "frame of the same shot.",
            "Give cameras by a camid column or a pattern.",
        )
    # A match is a gallery image of the same identity that another camera took.
    matches = query["pid"].map(gallery["pid"].value_counts()).fillna(0)
    if cameras:
        same = gallery.groupby(["pid", "camid"]).size().rename("same").reset_index()
        matches = matches - query.merge(same, how="left", on=["pid", "camid"])["same"].fillna(0)
    lost = query[(matches == 0) & (query["pid"] > 0)]
    if len(lost):
        where = "in another camera" if cameras else "in the gallery"
        yield (
            "error" if len(lost) == len(query) else "warning",
            f"{len(lost)} of {len(query)} queries have no match {where}; identities: "
            f"{some(sorted(lost['pid'].unique()))}.",
            "They are left out of the means.",
        )
