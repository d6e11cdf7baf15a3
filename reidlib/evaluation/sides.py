"""Query and gallery: embeddings and the columns of their table as arrays, checked against each other."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reidlib.evaluation.distances import both_sides


class Side(NamedTuple):
    """Query or gallery, checked."""

    emb: np.ndarray  # (N, D) as given
    pids: np.ndarray  # (N,) int64
    camids: np.ndarray  # (N,) int64, all -1 if unknown
    paths: np.ndarray | None  # (N,) str

    def columns(self, rows: Any = slice(None)) -> dict[str, np.ndarray]:
        """Return path if known, pid and camid of some rows."""
        columns = {"path": self.paths, "pid": self.pids, "camid": self.camids}
        return {name: column[rows] for name, column in columns.items() if column is not None}


def checked_sides(
    query_emb: Any, query: pd.DataFrame, gallery_emb: Any, gallery: pd.DataFrame
) -> tuple[Side, Side]:
    """Return query and gallery as arrays, checked.

    Args:
        query_emb, gallery_emb: (Q, D) and (G, D) numbers, tensors or arrays.
        query, gallery: Q and G rows, pids from -1 and, if known, camids and paths.

    Raises:
        ValueError: they do not fit each other, are empty, embeddings are not finite, pids or camids
            no whole numbers, or cameras known of some images only (junk may lack one).
    """
    embs = both_sides(query_emb, gallery_emb)
    return _side(embs[0], query, "query"), _side(embs[1], gallery, "gallery")


def _side(emb: np.ndarray, table: pd.DataFrame, name: str) -> Side:
    if len(emb) != len(table):
        raise ValueError(f"{len(emb)} {name} embeddings beside a {name} table of {len(table)} rows")
    table = table if "camid" in table else table.assign(camid=-1)
    for column in ("pid", "camid"):
        if column not in table or table[column].dtype.kind not in "iu":
            raise ValueError(f"the {name} table needs a column {column!r} of whole numbers")
    pids, camids = (table[column].to_numpy(np.int64) for column in ("pid", "camid"))
    if (pids < -1).any():
        raise ValueError(f"the {name} table has pids below -1, first {pids[pids < -1][0]}")
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


def checked_rows(rows: Any, length: int, name: str) -> np.ndarray:
    """Return row numbers of the table of ``name``, None for all, as an array (n,), or a ValueError."""
    rows = np.arange(length) if rows is None else np.asarray(rows)
    if rows.ndim != 1 or len(rows) == 0 or rows.dtype.kind not in "iu":
        raise ValueError(f"{name} rows must be one or more whole numbers, not {rows!r}")
    wrong = rows[(rows < 0) | (rows >= length)]
    if len(wrong):
        raise ValueError(f"{name}_row is {wrong[0]}, but the {name} table has {length} rows")
    return rows
