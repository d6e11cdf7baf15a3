"""Embeddings that stay on disk, in one file or in many, and are read a slice at a time."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reidlib.words import some

ENDINGS = (".npy", ".h5", ".hdf5")


class Stored(NamedTuple):
    """Where a file holds (N, D) numbers, row after row."""

    path: Path
    offset: int  # bytes before the first
    shape: tuple[int, ...]
    dtype: np.dtype


class Shards:
    """Embeddings (N, D) in files, one after another, read when a slice of them is asked for.

    `Retrieval` and `search` take them like an array. They are read, not mapped: a map's pages would
    count as memory of this process.

    Args:
        parts: where they lie, in this order.

    Attributes:
        shape, dtype, ndim: as of an array.

    Raises:
        ValueError: no parts; of different dimensions or types; or no (N, D) floats.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/0.npy", np.eye(2)), np.save(f"{folder}/1.npy", np.ones((1, 2)))
    ...     Shards(map(npy, shard_files(folder)))[1:]
    (None, None)
    array([[0., 1.],
           [1., 1.]])
    """

    ndim = 2

    def __init__(self, parts: Iterable[Stored]):
        self.parts = [*parts]
        for part in self.parts:
            if len(part.shape) != 2 or part.dtype.kind != "f":
                what = f"{part.shape} {part.dtype}"
                raise ValueError(f"embeddings in {part.path} must be (N, D) floats, not {what}")
        first = self.parts[0]
        for part in self.parts:
            if (part.shape[1], part.dtype) != (first.shape[1], first.dtype):
                raise ValueError(
                    f"{part.path} has embeddings of {part.shape[1]} numbers, {part.dtype}, {first.path} "
                    f"of {first.shape[1]}, {first.dtype}: shards must come from the same network."
                )
        self.dtype = first.dtype
        self.starts = np.cumsum([0, *(part.shape[0] for part in self.parts)])
        self.shape = (int(self.starts[-1]), first.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read the rows of a slice without a step, (n, D)."""
        start, stop, _ = rows.indices(len(self))
        dim, read = self.shape[1], [np.empty(0, self.dtype)]
        for part, origin in zip(self.parts, self.starts.tolist(), strict=False):
            first, last = max(start - origin, 0), min(stop - origin, part.shape[0])
            if first < last:
                offset = part.offset + first * dim * self.dtype.itemsize
                read.append(np.fromfile(part.path, self.dtype, (last - first) * dim, offset=offset))
                if len(read[-1]) != (last - first) * dim:
                    raise ValueError(f"{part.path} has become shorter since it was opened.")
        return np.concatenate(read).reshape(-1, dim)


def npy(path: str | Path) -> Stored:
    """Return where a `.npy` file holds its numbers.

    Raises:
        ValueError: it is none, or cut off.
    """
    try:
        mapped = np.load(path, mmap_mode="r")
        if not mapped.flags.c_contiguous:
            raise ValueError("its numbers do not lie row after row")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as .npy, or is cut off: {error}.") from error
    return Stored(Path(path), mapped.offset, mapped.shape, mapped.dtype)


def shard_files(folder: str | Path) -> list[Path]:
    """Return the files of embeddings in a folder, by the numbers in their names.

    Names that end in `-2-of-4` say how many there are, so that a missing last one is noticed.

    Raises:
        ValueError: none, of two kinds, or one is missing, as far as their names say.
    """
    files = [path for path in Path(folder).iterdir() if path.suffix.lower() in ENDINGS]
    if len({path.suffix for path in files}) != 1:
        raise ValueError(f"{folder} must hold embeddings as .npy or as .h5, and files of one kind.")
    names = [re.fullmatch(r"(.*?)([-_]of[-_](\d+))?", path.stem) for path in files]
    numbers = {p: [*map(int, re.findall(r"\d+", n[1]))] for p, n in zip(files, names, strict=True)}
    files.sort(key=lambda path: (numbers[path], path.name))
    last = [number[-1] for number in numbers.values() if number]
    missing = sorted({*range(min(last), max(last))} - {*last}) if len(last) == len(files) else []
    if missing:
        raise ValueError(f"{folder} lacks shards: there is none of number {some(missing)}.")
    said = {int(name[3]) for name in names if name[3]}
    if said - {len(files)}:
        raise ValueError(
            f"{folder} has {len(files)} shards, of {some(sorted(said))} by their names."
        )
    return files


def in_blocks(emb: np.ndarray | Shards) -> Iterator[np.ndarray]:
    """Yield embeddings some MB at a time, each block (n, D) in one piece."""
    step = max(1, 2**22 // max(1, emb[:1].size))
    for start in range(0, len(emb), step):
        yield np.ascontiguousarray(emb[start : start + step])
