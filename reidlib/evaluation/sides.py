"""Query and gallery: embeddings and the columns of their table as arrays, checked against each other."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reidlib.evaluation.distances import as_embeddings


class Side(NamedTuple):
    """Query or gallery, checked."""

    emb: np.ndarray  # (N, D) as given
    pids: np.ndarray  # (N,) int64
    camids: np.ndarray  # (N,) int64, all -1 if unknown
    paths: np.ndarray | None  # (N,) str

    def labels(self, name: str) -> pd.DataFrame:
        """Return row numbers under ``name``, path if known, pid and camid."""
        labels = {name: np.arange(len(self.pids)), "path": self.paths}
        labels |= {"pid": self.pids, "camid": self.camids}
        return pd.DataFrame({key: column for key, column in labels.items() if column is not None})


def checked_side(emb: Any, table: pd.DataFrame, name: str) -> Side:
    """Return embeddings and table of ``name``, "query" or "gallery", as arrays, checked.

    Args:
        emb: (N, D) numbers, tensor or array.
        table: N rows, pids from -1 and, if known, camids and paths.

    Raises:
        ValueError: they do not fit each other, are empty, embeddings are not finite, pids or camids
            no whole numbers, or cameras known of some images only (junk may lack one).
    """
    emb = as_embeddings(emb, name)
    if len(emb) != len(table):
        raise ValueError(f"{len(emb)} {name} embeddings beside a {name} table of {len(table)} rows")
    pids, camids = _whole(table, "pid", name), np.full(len(table), -1)
    if (pids < -1).any():
        raise ValueError(f"the {name} table has pids below -1, first {pids[pids < -1][0]}")
    if "camid" in table:
        camids = _whole(table, "camid", name)
    known = camids[pids != -1] >= 0
    if not known.any():
        camids = np.full(len(table), -1)
    elif not known.all():
        raise ValueError(
            f"{(~known).sum()} of {len(known)} images of the {name} table have no camera "
            "(camid below 0): give all cameras, or -1 in every row"
        )
    paths = table["path"].to_numpy(dtype=object) if "path" in table else None
    return Side(emb, pids, camids, paths)


def _whole(table: pd.DataFrame, column: str, name: str) -> np.ndarray:
    """An int64 column of the table of ``name``."""
    if column not in table:
        raise ValueError(f"the {name} table has no column {column!r}")
    values = table[column].to_numpy()
    if values.dtype.kind not in "iu":
        raise ValueError(f"{column} of the {name} table must be whole numbers, not {values.dtype}")
    return values.astype(np.int64)


def checked_rows(rows: Any, length: int, name: str) -> np.ndarray:
    """Return row numbers of the table of ``name`` as an array, (n,), or raise a ValueError."""
    rows = np.asarray(rows)
    if rows.ndim != 1 or len(rows) == 0 or rows.dtype.kind not in "iu":
        raise ValueError(f"{name} rows must be one or more whole numbers, not {rows!r}")
    wrong = rows[(rows < 0) | (rows >= length)]
    if len(wrong):
        raise ValueError(f"{name}_row is {wrong[0]}, but the {name} table has {length} rows")
    return rows
