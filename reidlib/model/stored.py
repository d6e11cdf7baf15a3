"""Embeddings as files: HDF5 with what they belong to, and how those of other toolkits are read."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from torch import Tensor

from reidlib.data.tables import image_list
from reidlib.model.shards import Shards, Stored, in_blocks, npy, shard_files
from reidlib.runs import write_atomically


def write_embeddings(
    path: str | Path, emb: np.ndarray | Tensor, table: pd.DataFrame, about: Mapping | None = None
) -> None:
    """Write embeddings and what they belong to as HDF5, atomically.

    Four datasets: `emb` (N, D) float32, `pid` and `camid` (N) int64, `path` (N) UTF-8 strings. What
    `about` says of them (weights, flips, precision) becomes attributes of the file, and so does the
    SHA-256 of all four, which `read_embeddings` compares.

    >>> from tempfile import TemporaryDirectory
    >>> table = pd.DataFrame({"path": ["a.jpg"], "pid": [1], "camid": [1]})
    >>> with TemporaryDirectory() as folder:
    ...     write_embeddings(f"{folder}/here.h5", np.eye(1, 128), table)
    """
    emb = np.asarray(emb, dtype=np.float32)
    if len(emb) != len(table):
        raise ValueError(f"{len(emb)} embeddings do not belong to a table of {len(table)} rows.")
    content = {"emb": emb} | {key: table[key].to_numpy(np.int64) for key in ("pid", "camid")}
    # Bytes, so that names which are no UTF-8 can be written, too.
    content["path"] = np.array([*map(os.fsencode, table["path"])], object)

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w") as file:
            file.attrs.update({**(about or {}), "content_sha256": _sha256(content)})
            for key, values in content.items():
                kind = h5py.string_dtype() if key == "path" else values.dtype
                file.create_dataset(key, data=values, dtype=kind)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def _sha256(content: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of a file's datasets: their numbers and names, however they are stored."""
    digest = hashlib.sha256()
    for block in in_blocks(content["emb"]):
        digest.update(block)
    for key in ("pid", "camid"):
        digest.update(np.ascontiguousarray(content[key]))
    digest.update(b"\0".join(content["path"]))
    return digest.hexdigest()


def read_embeddings(
    path: str | Path, csv: str | Path | None = None, *, in_memory: bool = True
) -> tuple[np.ndarray | Shards, pd.DataFrame]:
    """Read embeddings from HDF5 or `.npy`, from here or from another toolkit.

    Args:
        path: an HDF5 file with `emb` (N, D), and `pid`, `camid` and `path`; a `.npy` file of (N, D); or
            a folder of one or the other kind, shards that follow one another by their numbers.
        csv: for embeddings alone, as triplet-reid writes them, the list of all their images
            (`pid,path[,camid]`). For a folder the one list in it, if this is None.
        in_memory: False leaves the embeddings on disk, as `Shards`. Compressed ones come into memory.

    Returns:
        Embeddings (N, D) as stored, and their table, with "" and −1 where the file does not say. What
        the file says of them (all files, where there are several) is in the table's `attrs`.

    Raises:
        FileNotFoundError, ValueError: no such file, not HDF5, no `emb`, no identities, or lengths
            that differ; datasets of another kind or that lie outside of the file; numbers that are
            not those that were written; shards that are missing, cut off, or of different origin.

    >>> from tempfile import TemporaryDirectory
    >>> table = pd.DataFrame({"path": ["a.jpg"], "pid": [1], "camid": [1]})
    >>> with TemporaryDirectory() as folder:
    ...     write_embeddings(f"{folder}/here.h5", np.eye(1, 128), table)
    ...     read_embeddings(f"{folder}/here.h5")[1]
        path  pid  camid
    0  a.jpg    1      1
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no embedding file {path}.")
    files = shard_files(path) if path.is_dir() else [path]
    if files[0].suffix.lower() == ".npy":
        emb, content, about = Shards(map(npy, files)), {}, {}
        emb = emb[:] if in_memory else emb
    else:
        content, about = _joined(files, in_memory)
        emb = content["emb"]
    if csv is None and path.is_dir() and len(lists := [*path.glob("*.csv")]) == 1:
        csv = lists[0]
    if emb.ndim != 2 or emb.dtype.kind != "f":
        raise ValueError(f"'emb' in {path} must be (N, D) floats, not {emb.shape} {emb.dtype}.")
    if csv is not None:
        table = image_list(csv, must_exist=False)
    elif "pid" in content:
        names = [*map(os.fsdecode, content.get("path", [b""] * len(emb)))]
        numbers = {key: content.get(key, -1) for key in ("pid", "camid")}
        table = pd.DataFrame({"path": names} | numbers)
    else:
        raise ValueError(f"{path} does not say who is in its images: give their list as CSV.")
    if len(table) != len(emb):
        raise ValueError(f"{path} has {len(emb)} embeddings, the list of images {len(table)} rows.")
    table.attrs = about
    return emb, table


def _joined(files: list[Path], in_memory: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read HDF5 files as one: their datasets, end to end, and what all of them say of themselves."""
    contents, abouts = zip(*(_read_hdf5(file, in_memory) for file in files), strict=True)
    if len(files) == 1:
        return contents[0], abouts[0]
    abouts = [{k: v for k, v in about.items() if k != "content_sha256"} for about in abouts]
    for file, other, said in zip(files, contents, abouts, strict=True):
        if {*other} != {*contents[0]} or said != abouts[0]:
            raise ValueError(f"{file} and {files[0]} are of different origin: no one gallery.")
    embs = [each.pop("emb") for each in contents]
    content = {key: np.concatenate([each[key] for each in contents]) for key in contents[0]}
    stored = all(isinstance(emb, Shards) for emb in embs)
    parts = [part for emb in embs for part in emb.parts] if stored else ()
    content["emb"] = Shards(parts) if stored else np.concatenate([emb[:] for emb in embs])
    return content, abouts[0]


def _read_hdf5(
    path: Path, in_memory: bool
) -> tuple[dict[str, np.ndarray | Shards], dict[str, str]]:
    """Read the datasets of embeddings and the attributes: the only reader of HDF5 in the library.

    A file may name parts of others on this machine as its own: only what lies in itself is read.
    """
    content = {}
    try:
        with h5py.File(path, "r") as file:
            for key in [key for key in ("emb", "pid", "camid", "path") if key in {*file}]:
                here = isinstance(file.get(key, getlink=True), h5py.HardLink)
                stored = file[key] if here else None
                if not isinstance(stored, h5py.Dataset) or stored.external or stored.is_virtual:
                    raise ValueError(f"{key!r} is no dataset that lies in this file")
                if stored.nbytes > 20 * path.stat().st_size + 10**8:
                    raise ValueError(f"{key!r} is of {stored.nbytes:,} bytes, as no embeddings are")
                at = stored.id.get_offset()  # None if compressed or empty
                if key == "emb" and not in_memory and at is not None:
                    content[key] = Shards([Stored(path, at, stored.shape, stored.dtype)])
                else:
                    content[key] = _checked(key, stored[()])
            about = {key: value for key, value in file.attrs.items() if isinstance(value, str)}
        if "emb" not in content:
            raise ValueError("it has no dataset 'emb' with the embeddings")
        sizes = {key: len(values) if values.ndim else 1 for key, values in content.items()}
        if len({*sizes.values()}) > 1:
            raise ValueError(f"its datasets have different lengths: {sizes}")
        written = about.get("content_sha256")
        if written is not None and written != _sha256(content):
            raise ValueError("its numbers are not those that were written (their SHA-256 differs)")
    except Exception as error:  # h5py raises a dozen kinds
        cause = str(error) or type(error).__name__
        advice = "Make it again: score the run, or python -m reidlib embed."
        raise ValueError(f"{path} cannot be read as HDF5 embeddings: {cause}. {advice}") from error
    return content, about


def _checked(key: str, values: np.ndarray) -> np.ndarray:
    """Return what a dataset should hold: (N,) whole numbers as int64, or (N,) names as bytes."""
    values = np.asarray(values)
    if key != "emb" and values.ndim != 1:
        raise ValueError(f"{key!r} must have one value an image, not {values.shape}")
    if key == "path" and not all(isinstance(name, bytes) for name in values):
        raise ValueError("'path' must hold names")
    if key in ("emb", "path"):
        return values
    kind = values.dtype.kind
    with np.errstate(invalid="ignore"):  # NaN becomes some number, and is not equal to it
        whole = values.astype(np.int64) if kind in "biufOS" else np.full(len(values), -2)
    if (whole < -1).any() or (kind not in "OS" and (whole != values).any()):
        raise ValueError(f"{key!r} must hold whole numbers from -1, not {values.dtype}")
    return whole
