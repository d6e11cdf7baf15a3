"""Search among pictures that nobody has labelled: one picture or a folder, against any gallery."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from reidlib.data.pixels import image_sizes, load_images, read_image
from reidlib.data.tables import image_list
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.embed import embed
from reidlib.recipes import Recipe


def picture_table(source: str | Path) -> pd.DataFrame:
    """Return the table (path, pid, camid) of one picture, of a folder or of a CSV list.

    Folders are read at any depth; who is in a picture is unknown (pid and camid -1) but for the lists.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a folder without images, or a list that cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists() or not str(source).strip():
        raise FileNotFoundError(
            f"There is no image {str(source)!r}: give an image, a folder of images or a CSV list."
        )
    if path.is_dir() or path.suffix.lower() == ".csv":
        return image_list(os.path.abspath(path))
    return pd.DataFrame({"path": [os.path.abspath(path)], "pid": [-1], "camid": [-1]})


def shape_warning(table: pd.DataFrame, recipe: Recipe) -> str:
    """Return a sentence on pictures whose shape is far from that of a crop of one person, or "".

    Far: less than ¾ of the input's height over width, or more than twice it. For an input of 2:1
    those are pictures with less than 1.5:1, as most whole photographs have, and more than 4:1.
    """
    sizes = image_sizes(table["path"])
    wanted = recipe.height / recipe.width
    odd = [
        f"{os.path.basename(path)!r} ({size[1]}×{size[0]})"
        for path, size in zip(table["path"], sizes, strict=True)
        if size is not None and not 0.75 <= size[0] / size[1] / wanted <= 2
    ]
    if not odd:
        return ""
    named = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
    return (
        f"{len(odd)} of {len(table)} images not in the shape of a crop of one standing person (width×"
        f"height): {named}. The network looks for nobody in a scene, it squeezes all of it into "
        f"{recipe.width}×{recipe.height} pixels: cut the people out first."
    )


def search(
    model: nn.Module,
    query: pd.DataFrame,
    gallery: pd.DataFrame | tuple[np.ndarray, pd.DataFrame],
    recipe: Recipe,
    *,
    topk: int | None = 10,
    flip: bool = False,
    show_progress: bool = True,
) -> tuple[Retrieval, pd.DataFrame]:
    """Rank a gallery for pictures of somebody; nobody need be known.

    The ranking is that of `Retrieval` without labels: by Euclidean distance, and nothing is left
    out of it but the query itself, by its path. Labels that the tables have do not change it.

    Args:
        model: the network.
        query: `path`, `pid` and `camid`, as `picture_table` gives them.
        gallery: the same, or its embeddings (G, D) and their table, as `read_embeddings` gives them.
        recipe: the model's; its `unreadable` says what to do with broken images.
        topk: ranked images of each list; None for all.
        flip: embed mirrored images too; embeddings that are given must be made so, too.
        show_progress: draw bars.

    Returns:
        retrieval: over the images that could be read.
        found: its `ranked_lists`, with `query_path`; `pid` and `camid` of the gallery image as far as
            the table knows them; `status` "match" or "wrong" where both sides are known, else
            "unknown", and "query itself" for a row without rank.

    Raises:
        ValueError: unreadable images (named), unless they are to be skipped; embeddings that this
            model did not make; a gallery of nothing but the query.
    """
    query_pixels, query = load_images(query, recipe, show_progress)
    query_emb = embed(model, query_pixels, recipe, flip, show_progress=show_progress)
    if isinstance(gallery, tuple):
        gallery_emb, gallery = gallery
        _check_origin(gallery_emb, gallery, model, recipe, flip)
    else:
        gallery_pixels, gallery = load_images(gallery, recipe, show_progress)
        gallery_emb = embed(model, gallery_pixels, recipe, flip, show_progress=show_progress)
    unlabelled = [table.assign(pid=-1, camid=-1) for table in (query, gallery)]
    retrieval = Retrieval(query_emb, unlabelled[0], gallery_emb, unlabelled[1])
    found = retrieval.ranked_lists(topk=topk)
    if found["rank"].isna().all():
        raise ValueError(
            "The gallery holds nothing but the query itself: there is nothing to rank."
        )
    found.insert(1, "query_path", query["path"].to_numpy()[found["query"]])
    asked = query["pid"].to_numpy()[found["query"]]
    found["pid"], found["camid"] = (
        gallery[column].to_numpy()[found["gallery"]] for column in ("pid", "camid")
    )
    known = (asked > 0) & (found["pid"] >= 0) & found["rank"].notna()
    found.loc[known, "status"] = np.where(found["pid"] == asked, "match", "wrong")[known]
    return retrieval, found


def search_csv(found: pd.DataFrame) -> str:
    """Return what `search` found as CSV: query, rank, distance, path, status, and who, if known.

    `rank` is empty for the query itself. Names with commas, quotes or line breaks are quoted. Bytes
    of a name that are no UTF-8 are written as `\\udcXX`, so that the file is text for any program.
    """
    table = found.drop(columns=["query", "gallery"]).rename(columns={"query_path": "query"})
    known = [column for column in ("pid", "camid") if (table[column] != -1).any()]
    table = table[["query", "rank", "distance", "path", "status", *known]]
    text = table.to_csv(index=False, float_format="%.6f", lineterminator="\n")
    return text.encode("utf-8", "backslashreplace").decode()


def _check_origin(
    emb: np.ndarray, table: pd.DataFrame, model: nn.Module, recipe: Recipe, flip: bool
) -> None:
    """Refuse embeddings of another model: some of their images, if they are here, embedded again.

    Another resize or precision moves an embedding by a few hundredths of the distance between two
    images, mirroring by a fifth, another model by about one.
    """
    if not len(emb):
        raise ValueError("There are no embeddings in the gallery.")
    here = [row for row, path in enumerate(table["path"]) if path and os.path.isfile(path)]
    again = {}
    for row in here[:: max(1, len(here) // 8)][:8]:
        try:
            image = read_image(table["path"].iloc[row])
        except ValueError:
            continue
        again[row] = embed(model, image[None], recipe, flip, show_progress=False)[0]
    dim = model.dim
    if emb.shape[1] != dim:
        raise ValueError(
            f"The gallery has embeddings of {emb.shape[1]} numbers, this model gives {dim}: embed "
            "the gallery with this model."
        )
    if not again:
        return
    stored = emb[[*again]].astype(np.float64)
    moved = np.median(np.linalg.norm(stored - np.stack([*again.values()]), axis=1))
    apart = np.linalg.norm(stored[:, None] - stored, axis=2)  # (n, n)
    apart = np.median(apart[apart > 0]) if (apart > 0).any() else np.linalg.norm(stored[0])
    if not moved <= 0.25 * apart + 1e-4:
        raise ValueError(
            f"The gallery's embeddings were not made by this model from the images at their paths: "
            f"{len(again)} of them, embedded again, lie {moved:.3g} away, and images are {apart:.3g} "
            "apart. Embed the gallery with this model."
        )


def domain_shift(
    emb: np.ndarray,
    reference_emb: np.ndarray,
    reference_pid: Sequence[int] | np.ndarray,
    *,
    pid: Sequence[int] | np.ndarray | None = None,
    sample: int = 500,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Tell how far pictures lie from images like those that a model knows.

    A person whom the model never met has only strangers around. So the measure is the distance to
    the nearest stranger: if the pictures were like the reference images, and of other people, both
    results would be alike. Where pictures lie further out, the model has left what it knows. Where
    they do not, it may have left it all the same: what a network does not know it may also map into
    the midst of all others. So this is a weak test, and noise passes it; look at `spread`, too.

    Args:
        emb: (N, D) the pictures' embeddings.
        reference_emb: (G, D) of labelled images, such as a run's own gallery.
        reference_pid: (G,) who they are; junk (-1) is left out.
        pid: (N,) who is in the pictures, if some of them are in the reference, too: their own images
            there are passed over.
        sample: how many reference images to measure.
        seed: of that sample.

    Returns:
        (N,) distances of the pictures to their nearest reference image, and (sample,) distances of
        reference images to their nearest one of another identity.

    Raises:
        ValueError: fewer than two identities in the reference, or embeddings of other lengths.
    """
    reference_emb, known = np.asarray(reference_emb), np.asarray(reference_pid)
    if emb.shape[1] != reference_emb.shape[1]:
        raise ValueError(
            f"Embeddings of {emb.shape[1]} and of {reference_emb.shape[1]} numbers do not compare."
        )
    reference_emb, known = reference_emb[known != -1], known[known != -1]
    people = np.flatnonzero(known > 0)
    if len(np.unique(known[people])) < 2:
        raise ValueError("The reference needs labelled images of two identities or more.")
    random = np.random.default_rng(seed)
    drawn = random.choice(people, min(sample, len(people)), replace=False)

    there = torch.from_numpy(reference_emb.astype(np.float64))

    def nearest(emb: np.ndarray, own: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(emb), 64):
            rows = slice(start, start + 64)
            here = torch.from_numpy(emb[rows].astype(np.float64))
            # (64, G), summed directly: the dot-product form loses digits near 0
            distances = torch.cdist(
                here, there, compute_mode="donot_use_mm_for_euclid_dist"
            ).numpy()
            distances[own[rows, None] == known] = np.inf
            found.append(distances.min(axis=1))
        return np.concatenate(found)

    own = np.full(len(emb), -1) if pid is None else np.asarray(pid)
    return nearest(emb, own), nearest(reference_emb[drawn], known[drawn])


def spread(emb: np.ndarray, sample: int = 500, seed: int = 0) -> float:
    """Return the median distance between two of the pictures, of a random sample of them.

    Compared with the spread of the images that a model knows, it tells how well the model can tell
    pictures apart. Strange pictures crowd together; but so do pictures of few people.

    Raises:
        ValueError: fewer than two pictures.

    >>> spread(np.array([[0.0, 0.0], [3.0, 4.0]]))
    5.0
    """
    if len(emb) < 2:
        raise ValueError("Spread takes two pictures or more.")
    rows = np.random.default_rng(seed).permutation(len(emb))[:sample]
    some = torch.from_numpy(emb[rows].astype(np.float64))
    # pdist, too, sums directly
    return float(torch.nn.functional.pdist(some).median())
