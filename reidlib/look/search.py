"""Search among pictures that nobody has labelled: one picture or a folder, against any gallery."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from reidlib.data.files import cut_of
from reidlib.data.pixels import image_sizes, load_images, read_image
from reidlib.data.tables import ignored_files, image_list
from reidlib.evaluation.distances import taken
from reidlib.evaluation.index import Index
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.embed import embed
from reidlib.model.shards import ENDINGS, Shards
from reidlib.model.stored import read_embeddings
from reidlib.recipes import Recipe
from reidlib.words import some


def picture_table(source: str | Path) -> pd.DataFrame:
    """Return the table (path, pid, camid) of one picture, of a folder, a CSV list or a tracker's boxes.

    Folders are read at any depth. Only a list or gt.txt can say who is in a picture; else pid and camid
    are -1.
    """
    path = Path(source).expanduser()
    if not path.exists() or not str(source).strip():
        raise FileNotFoundError(
            f"There is no image {str(source)!r}: give an image, a folder of images or a CSV list."
        )
    if path.is_dir() or path.suffix.lower() in (".csv", ".txt"):
        return image_list(os.path.abspath(path))
    return pd.DataFrame({"path": [os.path.abspath(path)], "pid": [-1], "camid": [-1]})


def read_gallery(source: str | Path) -> pd.DataFrame | tuple[Shards | np.ndarray, pd.DataFrame]:
    """Return what `search` ranks: embeddings, which stay on disk, and their table; else pictures.

    Embeddings are an HDF5 file, or a folder of such files, or of `.npy` beside the list of their images.
    """
    path = Path(source).expanduser()
    files = [path, *(path.iterdir() if path.is_dir() else ())]
    stored = any(file.suffix.lower() in ENDINGS for file in files)
    return read_embeddings(source, in_memory=False) if stored else picture_table(source)


def remarks(sources: Mapping[str, str], tables: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Return sentences on what is passed over in folders, and on pictures of an odd shape.

    `sources` is what was given, by "query" and "gallery", and `tables` what was read from it: those of
    embeddings have no pictures to look at.
    """
    said = []
    for name, table in tables.items():
        if sources.get(name) and isinstance(table, pd.DataFrame):
            said += [ignored_files(sources[name]), _shape_warning(name, table, recipe)]
    return [*dict.fromkeys(filter(None, said))]  # what is ignored in one folder, once


def _shape_warning(name: str, table: pd.DataFrame, recipe: Recipe) -> str:
    """A sentence on pictures whose shape is far from that of a crop of one person, or "".

    Far: less than ¾ of the input's height over width, or more than twice it. For an input of 2:1
    those are pictures with less than 1.5:1, as most whole photographs have, and more than 4:1.
    """
    wanted = recipe.height / recipe.width
    odd = [
        f"{os.path.basename(path)!r} ({size[1]}×{size[0]})"
        for path, size in zip(table["path"], image_sizes(table["path"]), strict=True)
        if size is not None and not 0.75 <= size[0] / size[1] / wanted <= 2
    ]
    return bool(odd) * (
        f"Warning, {name}: {len(odd)} of {len(table)} images not in the shape of a crop of one standing "
        f"person (width×height): {some(odd)}. The network does not look for people: it squeezes the "
        f"whole picture into {recipe.width}×{recipe.height} pixels. Cut the people out first."
    )


def left_out(tables: Mapping[str, Any], kept: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return a sentence for each table whose unreadable pictures are not in what was kept of it."""
    said = []
    for name, table in tables.items():
        pictures = table["path"] if isinstance(table, pd.DataFrame) else []
        if lost := sorted({*pictures} - {*kept[name]["path"]}):
            said.append(f"Unreadable, left out of the {name}: {', '.join(map(repr, lost))}.")
    return said


def search(
    model: nn.Module,
    query: pd.DataFrame,
    gallery: pd.DataFrame | tuple[np.ndarray, pd.DataFrame],
    recipe: Recipe,
    *,
    topk: int | None = 10,
    flip: bool = False,
    index: str | Path | None = None,
    show_progress: bool = True,
) -> tuple[Retrieval, pd.DataFrame]:
    """Rank a gallery for pictures of somebody, without labels.

    The gallery is ranked by Euclidean distance, as `Retrieval` does it without labels. Only the query
    itself is left out, known by its path. Labels in the tables are shown and change no rank.

    Args:
        model: the network.
        query: `path`, `pid` and `camid`, as `picture_table` gives them.
        gallery: the same, or its embeddings (G, D) and their table, as `read_embeddings` gives them.
        recipe: the model's; its `unreadable` says what to do with broken images.
        topk: ranked images of each list; None for all.
        flip: embed mirrored images too; embeddings that are given must be made so, too.
        index: a file such as `gallery.hnsw`: lists are made of what this `Index` finds, which is made
            and written there if it is not there. None looks at the whole gallery.

    Returns:
        The retrieval, over the images that could be read, and its `ranked_lists`, with `query_path`,
        `pid` and `camid` of the gallery image as its table knows them, and the status "match" or
        "wrong" where both sides are known, else "unknown", or "query itself", without a rank.

    Raises:
        ValueError: unreadable images (named), unless they are to be skipped; embeddings that this
            model did not make; a gallery of nothing but the query; an index of another gallery.

    >>> from reidlib.data.tables import load
    >>> from reidlib.model.weights import build_model
    >>> from reidlib.recipes import make_recipe
    >>> recipe, dataset = make_recipe("demo"), load("synthetic")
    >>> retrieval, found = search(
    ...     build_model(recipe), dataset.query[:1], dataset.gallery, recipe, topk=3, show_progress=False
    ... )
    >>> found["rank"].tolist()
    [1, 2, 3]
    """

    def embedded(table: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
        pixels, table = load_images(table, recipe, show_progress)
        return embed(model, pixels, recipe, flip, show_progress=show_progress), table

    query_emb, query = embedded(query)
    if isinstance(gallery, tuple):
        _check_origin(*gallery, model, recipe, flip)
    gallery_emb, gallery = gallery if isinstance(gallery, tuple) else embedded(gallery)
    unlabelled = [table.assign(pid=-1, camid=-1) for table in (query, gallery)]
    retrieval = Retrieval(query_emb, unlabelled[0], gallery_emb, unlabelled[1])
    through = Index.kept(index, gallery_emb) if index else None
    found = retrieval.ranked_lists(topk=topk, index=through)
    if found["rank"].isna().all():
        raise ValueError("The gallery holds nothing but the query itself: nothing is left to rank.")
    found.insert(1, "query_path", query["path"].to_numpy()[found["query"]])
    for column in ("pid", "camid"):
        found[column] = gallery[column].to_numpy()[found["gallery"]]
    queried = query["pid"].to_numpy()[found["query"]]
    known = (queried > 0) & (found["pid"] >= 0) & found["rank"].notna()
    found.loc[known, "status"] = np.where(found["pid"] == queried, "match", "wrong")[known]
    return retrieval, found


def _check_origin(
    emb: np.ndarray, table: pd.DataFrame, model: nn.Module, recipe: Recipe, flip: bool
) -> None:
    """Refuse embeddings of another model: some of their images, if they are here, embedded again.

    Another resize or precision moves an embedding by a few hundredths of the distance between two
    images, mirroring by a fifth, another model by about one.
    """
    if emb.shape[1] != model.dim:
        raise ValueError(
            f"The gallery has embeddings of {emb.shape[1]} numbers, this model gives {model.dim}: "
            "embed the gallery with this model."
        )
    here = [
        row for row, path in enumerate(table["path"]) if path and os.path.isfile(cut_of(path)[0])
    ]
    again = {}
    for row in here[:: max(1, len(here) // 8)][:8]:
        with contextlib.suppress(ValueError):  # an image that cannot be read
            image = read_image(table["path"].iloc[row])
            again[row] = embed(model, image[None], recipe, flip, show_progress=False)[0]
    if not again:
        return
    stored = taken(emb, np.array([*again])).astype(np.float64)
    moved = np.median(np.linalg.norm(stored - np.stack([*again.values()]), axis=1))
    apart = np.linalg.norm(stored[:, None] - stored, axis=2)  # (n, n)
    apart = np.median(apart[apart > 0]) if (apart > 0).any() else np.linalg.norm(stored[0])
    if not moved <= 0.25 * apart + 1e-4:
        raise ValueError(
            "The gallery's embeddings were not made by this model from the images at their paths: "
            f"{len(again)} of them, embedded again, lie {moved:.3g} away, and images are "
            f"{apart:.3g} apart. Embed the gallery with this model."
        )


def search_csv(found: pd.DataFrame) -> str:
    """Return what `search` found as CSV: query, rank, distance, path, status, and who, if known.

    `rank` is empty for the query itself. Names with commas, quotes or line breaks are quoted. Bytes
    of a name that are no UTF-8 are written as `\\udcXX`, so that the file is text for any program.
    """
    table = found.drop(columns="query").rename(columns={"query_path": "query"})
    known = [column for column in ("pid", "camid") if (table[column] != -1).any()]
    table = table[["query", "rank", "distance", "path", "status", *known]]
    text = table.to_csv(index=False, float_format="%.6f", lineterminator="\n")
    return text.encode("utf-8", "backslashreplace").decode()


def nearness(
    retrieval: Retrieval, found: pd.DataFrame, queries: int = 50, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what can be read of distances without labels, in what `search` returned.

    Distances at rank 1, (n,), at rank 2, (m,), and of all images but the first, of all queries
    together: of so many, drawn with `seed`. The query itself, if the gallery holds it, is in none.
    """
    itself = found[found["status"] == "query itself"].groupby("query")["gallery"].agg(list)
    drawn = np.random.default_rng(seed).permutation(len(retrieval.query))[:queries]
    lists = [
        np.sort(np.delete(retrieval.distances(row), itself.get(row, []))) for row in np.sort(drawn)
    ]
    first, second = (np.concatenate([x[k : k + 1] for x in lists]) for k in (0, 1))
    return first, second, np.concatenate([x[1:] for x in lists])


def nearness_in_words(first: np.ndarray, second: np.ndarray, others: np.ndarray) -> str:
    """Say what `nearness` returned."""
    if not len(second):
        return "The gallery has one image for each query, so there is nothing to compare it with."
    return (
        f"At rank 1 the distance is {np.median(first):.2f} in the median of {len(first)} queries, at rank 2 "
        f"{np.median(second):.2f}, and {np.median(others):.2f} for all others of the gallery. "
        "A first image that is hardly nearer than the second was picked from many that look alike. "
        "One that stands alone is either the person, or a near copy of the same picture."
    )


def uncovered(found: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each query's first image, told by labels that the search did not see.

    `known` has `path`, `pid` and `camid` of all pictures. The row has `query` and `rank 1` (file
    names), `distance`, `same person` and `same camera` (booleans).
    """
    truth = known.drop_duplicates("path").set_index("path")
    top = found[found["rank"] == 1].reset_index(drop=True)
    query, first = (truth.loc[top[side]].reset_index() for side in ("query_path", "path"))
    camera = (query["camid"] == first["camid"]) & (query["camid"] >= 0)
    table = pd.DataFrame({"query": top["query_path"], "rank 1": top["path"]}).map(os.path.basename)
    table["distance"], table["same person"] = top["distance"], query["pid"] == first["pid"]
    return table.assign(**{"same camera": table["same person"] & camera})


def uncovered_in_words(table: pd.DataFrame) -> str:
    """Say what `uncovered` returned."""
    right, camera = table["same person"].sum(), table["same camera"].sum()
    return (
        f"{right} of {len(table)} first images show the same person, {camera} of them from the query's own "
        "camera. The evaluation leaves such images out: they are nearly the same picture. A search without "
        "labels cannot, so with them **it looks better than the scores of 04_evaluate, and is not**."
    )
