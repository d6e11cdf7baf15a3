"""Why is the network wrong? Causes that the data can show, and maps of what it looked at.

- **Which queries fail, and what do they share?** `causes`, `base_rates`, `camera_pairs`,
  `confusions`. What they show goes together with failure; that it brings it about is not proven. So
  each kind of evidence is measured on the right queries too, and counts by its lift alone.
- **What did the network look at?** `activation_maps`, `occlusion_maps`.

Whether the labels are to blame is asked in `suspects`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from reidlib.data.augment import Augmentation
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look.suspects import ratio
from reidlib.recipes import Recipe

# --- which queries fail, and what they share

EVIDENCE = {
    "few_matches": "at most half as many matches as the median query",
    "own_camera": "the nearest stranger is seen by the query's own camera",
    "distractor": "the nearest stranger is a distractor, somebody outside the queries' people",
    "same_colours": "the nearest stranger's colours are nearer than those of every true match",
    "hard_cameras": "its matches are in cameras where other people of its camera are hard to find",
    "odd_picture": "even its own camera's pictures of the person are far from it",
}
UPPER = 0.75  # hard and far mean: in the upper quarter of all queries


def causes(retrieval: Retrieval, colours: tuple[Any, Any] | None = None) -> pd.DataFrame:
    """What can be measured about each query's failure, and about each success.

    The evidence is about the query, its matches and its **nearest stranger**, the first wrong image
    of its list. Every query has one, so evidence is defined alike for right and wrong queries.

    Args:
        retrieval: queries and gallery.
        colours: (Q, C) and (G, C) colour histograms, as `embedding.colour_histogram` makes them;
            without them nothing is said of colours.

    Returns:
        One row a query: ``query`` (row number), ``path`` if known, ``pid``, ``camid``, ``matches``,
        ``AP``, ``first_rank``, and
        - ``wrong``: the first match is not at rank 1;
        - ``match``, ``stranger``: gallery rows of the nearest of either (``<NA>``: there is none);
          ``stranger_pid``, ``stranger_camid``;
        - ``strangers_above``, ``distractors_above``, ``own_camera_above``: how many strangers stand
          above the first match, and how many of these are distractors, or of the query's camera;
        - ``colour_ratio``: colour distance to the nearest stranger, over that to the match which is
          nearest in colour (NaN without ``colours``);
        - ``camera_difficulty``: over the pairs of its camera with those of its matches, the mean share
          of matches behind the nearest stranger, other persons' alone (as in `camera_pairs`);
        - ``own_camera_distance``: to the nearest picture of the person by the query's own camera, which
          the protocol leaves out: nothing but the picture itself can make this one far;
        - a column of booleans for each of `EVIDENCE`. Several may be true. What cannot be known is
          false in every row: cameras that are unknown, colours that were not given;
        - ``cause``: of a wrong query, the evidence with the largest lift (see `base_rates`), among
          those whose interval lies above 1; "unexplained" where there is none; "" of a right one,
          and "no match" where the gallery holds none.

    Raises:
        ValueError: no query has a match, or ``colours`` do not fit the tables.
    """
    table = retrieval.evaluate().per_query.drop(columns=["AP_market", "INP"])
    listed = _lists(retrieval, table)
    nearest = {
        status: listed[listed["status"] == status].groupby("query").first().reindex(table["query"])
        for status in ("match", "wrong")
    }
    table["wrong"] = table["first_rank"] > 1
    table["match"] = nearest["match"]["gallery"].astype("Int64").to_numpy()
    for name, column in (("", "gallery"), ("_pid", "pid"), ("_camid", "camid")):
        table[f"stranger{name}"] = nearest["wrong"][column].astype("Int64").to_numpy()
    table = table.join(_above(retrieval, table, listed))
    table["colour_ratio"] = _colour_ratios(listed, table, colours)
    table["camera_difficulty"] = _camera_difficulty(_by_camera(listed, table), len(table))
    table["own_camera_distance"] = _own_camera_distances(retrieval, table)

    some = table["matches"] > 0
    own = table["camid"] == table["stranger_camid"]
    table["few_matches"] = some & (2 * table["matches"] <= table.loc[some, "matches"].median())
    table["own_camera"] = (own & (table["camid"] >= 0)).fillna(False).astype(bool)
    table["distractor"] = (table["stranger_pid"] == 0).fillna(False).astype(bool)
    table["same_colours"] = table["colour_ratio"] < 1
    for name, column in (
        ("hard_cameras", "camera_difficulty"),
        ("odd_picture", "own_camera_distance"),
    ):
        table[name] = table[column] > table[column].quantile(UPPER)  # false where it is not known
    table["cause"] = _causes(table)
    return table


def _lists(retrieval: Retrieval, per_query: pd.DataFrame) -> pd.DataFrame:
    """Lists long enough to hold each query's nearest stranger; all its matches are in them."""
    topk = int(per_query["matches"].max()) + 1
    return retrieval.ranked_lists(topk=topk, show_excluded=False, show_missed=True)


def _above(retrieval: Retrieval, table: pd.DataFrame, listed: pd.DataFrame) -> pd.DataFrame:
    """Count the strangers above each query's first match; zero for a query without match."""
    reach = int(table["matches"].max()) + 1  # of `_lists`
    wrong = table[table["wrong"]]
    short, long = (
        wrong["query"][far] for far in (wrong["first_rank"] <= reach, wrong["first_rank"] > reach)
    )
    parts = [listed[listed["query"].isin(short)]]
    for start in range(0, len(long), 100):  # a hundred long lists at once
        group = long.iloc[start : start + 100]
        longest = int(table["first_rank"][group].max())
        parts.append(retrieval.ranked_lists(group.to_numpy(), topk=longest, show_excluded=False))
    above = pd.concat(parts, ignore_index=True)
    above = above[above["rank"] < above["query"].map(table["first_rank"])]
    counted = {
        "strangers_above": above,
        "distractors_above": above[above["pid"] == 0],
        "own_camera_above": above[
            (above["camid"] == above["query"].map(table["camid"])) & (above["camid"] >= 0)
        ],
    }
    index = table["query"]
    return pd.DataFrame(
        {
            name: rows["query"].value_counts().reindex(index, fill_value=0).to_numpy()
            for name, rows in counted.items()
        }
    )


def _colour_ratios(listed, table, colours) -> np.ndarray:
    """Colour distance to the nearest stranger over that to the nearest match in colour, (Q,)."""
    if colours is None:
        return np.full(len(table), np.nan)
    of_query, of_gallery = (np.asarray(c) for c in colours)
    reach = int(listed["gallery"].max())
    if len(of_query) != len(table) or len(of_gallery) <= reach:
        raise ValueError(
            f"{len(of_query)} and {len(of_gallery)} colour histograms do not fit the tables of "
            f"{len(table)} queries and of the gallery"
        )

    def distance(queries, rows):
        difference = of_query[queries] - of_gallery[rows]
        return np.sqrt(np.square(difference, dtype=np.float64).sum(axis=1))

    matches = listed[listed["status"] == "match"]
    near = pd.Series(distance(matches["query"], matches["gallery"]), index=matches["query"])
    near = near.groupby(level=0).min().reindex(table["query"]).to_numpy()
    out = np.full(len(table), np.nan)
    known = table["stranger"].notna() & (table["matches"] > 0)
    queries = np.flatnonzero(known)
    far = distance(queries, table["stranger"][known].to_numpy(np.int64))
    out[queries] = ratio(far, near[queries])
    return out


def _camera_difficulty(pairs: pd.DataFrame, queries: int) -> np.ndarray:
    """Mean over a query's matches of how hard their pair of cameras is for other persons, (Q,).

    Without the person's own queries: else a failure would be evidence of itself.
    """
    cameras, person = ["camid", "match_camid"], ["camid", "match_camid", "pid"]
    total = pairs.groupby(cameras)["behind"].transform("sum")
    own = pairs.groupby(person)["behind"].transform("sum")
    of_others = pairs.groupby(cameras)["behind"].transform("size") - pairs.groupby(person)[
        "behind"
    ].transform("size")
    difficulty = (total - own) / of_others.where(of_others > 0)
    return difficulty.groupby(pairs["query"]).mean().reindex(range(queries)).to_numpy()


def _own_camera_distances(retrieval: Retrieval, table: pd.DataFrame) -> np.ndarray:
    """Distance to the nearest image of the query's person and camera, but itself, (Q,); or NaN."""
    out = np.full(len(table), np.nan)
    if "camid" not in retrieval.gallery or not retrieval.exclude_same_camera:
        return out
    groups = retrieval.gallery.reset_index(drop=True).groupby(["pid", "camid"]).indices
    paths = retrieval.gallery["path"].to_numpy() if "path" in retrieval.gallery else None
    for i, pid, camid in zip(table["query"], table["pid"], table["camid"], strict=True):
        rows = groups.get((pid, camid), []) if camid >= 0 else []
        if paths is not None and "path" in table:
            rows = [row for row in rows if paths[row] != table["path"][i]]
        if len(rows):
            out[i] = retrieval.distances(i, rows).min()
    return out


def _causes(table: pd.DataFrame) -> np.ndarray:
    """Name each query's cause: see `causes`."""
    out = np.where(table["wrong"], "unexplained", "").astype(object)
    out[table["matches"] == 0] = "no match"
    rates = base_rates(table)
    proven = rates[rates["low"] > 1].sort_values("lift")
    for name in proven.index:  # the largest lift last, so that it has the last word
        out[table["wrong"] & table[name]] = name
    return out


def base_rates(
    table: pd.DataFrame,
    evidence: Sequence[str] = tuple(EVIDENCE),
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How often the evidence stands at wrong queries, and how often at right ones.

    The lift is the first share over the second, with half a query added to either side of either
    count, so that it is finite: ((a + ½) / (n + 1)) / ((b + ½) / (m + 1)) for a of n wrong and b of
    m right queries. Its interval is the percentile bootstrap over persons, whose queries are alike.
    A lift above 1 is an association: what else goes with the evidence, goes into it.

    Args:
        table: what `causes` returned; other columns of booleans may be added to it.
        evidence: names of such columns.

    Returns:
        A row for each kind of evidence: ``wrong``, ``right`` (queries that show it), ``share_wrong``
        and ``share_right`` (of all wrong, of all right queries), ``lift``, ``low`` and ``high``
        (NaN where there are no wrong queries, no right ones, or one person alone), ``mAP_with``
        and ``mAP_without`` (mean AP of the queries with and without it, right and wrong).

    >>> table = pd.DataFrame({"pid": [1, 2, 3, 4], "matches": 1, "wrong": [True, True, False, False],
    ...                       "AP": [0.5, 0.2, 1, 1], "hat": [True, True, True, False]})
    >>> base_rates(table, ["hat"])[["wrong", "right", "lift"]].round(3)
         wrong  right   lift
    hat      2      1  1.667
    """
    table = table[table["matches"] > 0]
    wrong = table["wrong"].to_numpy(bool)
    shown = table[list(evidence)].to_numpy(bool)  # (Q, E)
    # (Q, 2 + 2E): is it wrong, is it right, and does it show the evidence, being wrong or right
    columns = [wrong[:, None], ~wrong[:, None], shown & wrong[:, None], shown & ~wrong[:, None]]
    counts = np.concatenate(columns, axis=1).astype(float)
    persons = pd.factorize(table["pid"])[0]
    by_person = np.zeros((persons.max() + 1, counts.shape[1]))
    np.add.at(by_person, persons, counts)

    def lifts(totals: np.ndarray) -> np.ndarray:
        """(..., 2 + 2E) counts to (..., E) lifts."""
        n, m, a, b = np.split(totals, [1, 2, 2 + len(evidence)], axis=-1)
        return ((a + 0.5) / (n + 1)) / ((b + 0.5) / (m + 1))

    totals = by_person.sum(axis=0)
    lift = np.full((3, len(evidence)), np.nan)
    if totals[:2].min() > 0 and len(by_person) > 1:
        times = np.random.default_rng(seed).multinomial(
            len(by_person), np.full(len(by_person), 1 / len(by_person)), size=repeats
        )
        drawn = lifts(times @ by_person)  # (R, persons) @ (persons, 2 + 2E) -> (R, E)
        lift[0] = lifts(totals)
        lift[1:] = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    a, b = totals[2 : 2 + len(evidence)], totals[2 + len(evidence) :]
    with np.errstate(invalid="ignore"):
        shares = a / totals[0], b / totals[1]
    ap = table["AP"]
    return pd.DataFrame(
        {
            "wrong": a.astype(int),
            "right": b.astype(int),
            "share_wrong": shares[0],
            "share_right": shares[1],
            "lift": lift[0],
            "low": lift[1],
            "high": lift[2],
            "mAP_with": [ap[s].mean() for s in shown.T],
            "mAP_without": [ap[~s].mean() for s in shown.T],
        },
        index=list(evidence),
    )


def camera_pairs(retrieval: Retrieval) -> pd.DataFrame:
    """How hard it is to find a person of one camera in another: a row for each pair of cameras.

    Returns:
        ``camid`` (the query's), ``match_camid``, ``matches`` (how many, over all queries) and
        ``behind``: the share of them that stand behind the query's nearest stranger. Empty where
        cameras are unknown.

    Raises:
        ValueError: no query has a match.
    """
    table = retrieval.evaluate().per_query
    pairs = _by_camera(_lists(retrieval, table), table).groupby(
        ["camid", "match_camid"], as_index=False
    )
    return pairs["behind"].agg(matches="size", behind="mean")


def _by_camera(listed: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """One row a match of known cameras: ``query``, ``pid``, ``camid``, ``match_camid``, ``behind``
    (1.0 where it stands behind the query's nearest stranger)."""
    first_wrong = listed[listed["status"] == "wrong"].groupby("query")["rank"].min()
    matches = listed[(listed["status"] == "match") & (listed["camid"] >= 0)]
    # without any stranger, nothing stands behind one
    behind = (matches["rank"] > matches["query"].map(first_wrong)).fillna(False)
    columns = {"query": matches["query"], "pid": matches["pid"], "match_camid": matches["camid"]}
    pairs = pd.DataFrame(columns | {"behind": behind.astype(float)}).reset_index(drop=True)
    pairs["camid"] = table["camid"].to_numpy()[pairs["query"]]
    return pairs[pairs["camid"] >= 0]


def confusions(retrieval: Retrieval) -> pd.DataFrame:
    """Which identities are taken for each other: strangers among the first N of a query's list.

    N is the number of the query's matches: in a perfect list no stranger stands there. Distractors,
    who are not one identity, are left out.

    Returns:
        A row for each pair of identities, most confused first: ``pid`` < ``other_pid``,
        ``intrusions`` (wrong images of either in lists of the other), ``queries`` (lists that have
        some), ``mutual`` (both ways), and the nearest of them: ``query``, ``gallery`` (row numbers)
        and ``distance``.

    Raises:
        ValueError: no query has a match.
    """
    table = retrieval.evaluate().per_query
    listed = _lists(retrieval, table)
    within = listed["rank"] <= listed["query"].map(table["matches"])
    wrong = listed[within & (listed["status"] == "wrong") & (listed["pid"] > 0)]
    asked = table["pid"].to_numpy()[wrong["query"]]
    found = wrong["pid"].to_numpy()
    wrong = wrong.assign(pid=np.minimum(asked, found), other_pid=np.maximum(asked, found), by=asked)
    groups = wrong.sort_values("distance", kind="stable").groupby(["pid", "other_pid"])
    out = groups.agg(
        intrusions=("query", "size"),
        queries=("query", "nunique"),
        mutual=("by", lambda asks: asks.nunique() == 2),
        query=("query", "first"),
        gallery=("gallery", "first"),
        distance=("distance", "first"),
    ).reset_index()
    order = ["intrusions", "distance", "pid", "other_pid"]
    out = out.sort_values(order, ascending=[False, True, True, True], kind="stable")
    return out.astype({"mutual": bool}).reset_index(drop=True)


# --- what the network looked at


@torch.inference_mode()
def activation_maps(
    model: nn.Module, pixels: np.ndarray, recipe: Recipe, rows: int = 8
) -> np.ndarray:
    """Where the backbone's features are strong: the sum of their squares over channels.

    This is F²_sum of "Paying more attention to attention" (Zagoruyko and Komodakis, ICLR 2017,
    arXiv 1612.03928, section 3.1). A strong feature need not matter for the embedding: for what
    makes two images similar see `occlusion_maps`. The map is that of the deepest layer that still
    has ``rows`` rows: the last one of a network with an input of 256×128, an earlier one below
    that, where the last would have four places or two.

    Args:
        model: an `EmbeddingNet`; its backbone is a sequence of layers.
        pixels: (N, H, W, 3) uint8.
        recipe: says the size and the normalisation of the input.
        rows: the fewest rows of a map.

    Returns:
        (N, h, w) float32, as they come: not normalised, so that images can be compared.

    Raises:
        ValueError: no images, or no layer has so many rows.
    """
    if len(pixels) == 0:
        raise ValueError("There are no images to make maps of.")
    was_training = model.training
    model.eval()
    features = _inputs(model, pixels, recipe)
    kept = None
    # MobileNets hold their layers one level deeper.
    for layer in getattr(model.backbone, "features", model.backbone):
        features = layer(features)  # (N, C, h, w)
        if features.shape[2] < rows:
            break
        kept = features
    model.train(was_training)
    if kept is None:
        raise ValueError(f"No layer has a map of {rows} rows or more: give fewer.")
    return kept.float().square().sum(dim=1).cpu().numpy()  # (N, C, h, w) -> (N, h, w)


@torch.inference_mode()
def occlusion_maps(
    model: nn.Module,
    pixels: np.ndarray,
    targets: np.ndarray,
    recipe: Recipe,
    cells: tuple[int, int] = (16, 8),
    batch: int = 256,
) -> np.ndarray:
    """Which places of an image make it similar to a given other: hide each, and measure.

    A patch of the image's own mean colour, two cells high and wide, moves over the image cell by
    cell. Where the distance to the target grows, the hidden place had made the two similar; where it
    shrinks, it had told them apart. (The sliding patch is that of Zeiler and Fergus, ECCV 2014,
    section 4.2; there the score of a class is measured, here a distance.) It is an experiment on the
    network as it is, whatever its architecture, and the unit is that of the distance. What
    several places show together (two shoes), hiding one of them does not reveal.

    Args:
        model: the network.
        pixels: (N, H, W, 3) uint8.
        targets: (N, T, D), for each image the embeddings to which distances are measured.
        recipe: says the size and the normalisation of the input.
        cells: rows and columns of the map.
        batch: images at a time.

    Returns:
        (N, T, rows, columns) float32: growth of the Euclidean distance, a mean over the four
        patches that hide the cell.

    Raises:
        ValueError: shapes that do not fit, or more cells than the input has pixels.
    """
    targets = np.asarray(targets)
    if len(pixels) == 0 or targets.ndim != 3 or len(targets) != len(pixels):
        raise ValueError(
            f"{len(pixels)} images need targets of shape ({len(pixels)}, T, D), not {targets.shape}."
        )
    if not (1 <= cells[0] <= recipe.height and 1 <= cells[1] <= recipe.width):
        raise ValueError(
            f"cells must be 1 to {recipe.height} rows and 1 to {recipe.width} columns."
        )
    was_training = model.training
    model.eval()
    images = _inputs(model, pixels, recipe)
    aims = torch.from_numpy(targets).to(images.device, torch.float32)  # (N, T, D)
    hidden = _patches(images.shape[2:], cells).to(images.device)  # (P, h, w), true where hidden
    maps = []
    for image, aim in zip(images, aims, strict=True):
        mean = image.mean(dim=(1, 2), keepdim=True)  # (3, 1, 1)
        emb = [model(image[None]).float()]
        for part in hidden.split(batch):
            emb.append(model(torch.where(part[:, None], mean, image)).float())  # (B, 3, h, w)
        # (1 + P, 1, D) − (T, D) -> (1 + P, T); the first row is the whole image
        distance = (torch.cat(emb)[:, None] - aim).norm(dim=2)
        growth = (distance[1:] - distance[0]).T.unflatten(1, (cells[0] + 1, cells[1] + 1))
        # (T, rows + 1, columns + 1) -> (T, rows, columns): the four patches over each cell
        corners = (growth[:, a : cells[0] + a, b : cells[1] + b] for a in (0, 1) for b in (0, 1))
        maps.append(sum(corners) / 4)
    model.train(was_training)
    return torch.stack(maps).cpu().numpy()


def _inputs(model: nn.Module, pixels: np.ndarray, recipe: Recipe) -> Tensor:
    """Return (N, 3, h, w) input of the network, on its device."""
    device = next(model.parameters()).device
    plain = Augmentation((recipe.height, recipe.width), normalise=recipe.normalise).plain
    return plain(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))


def _patches(size: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Masks (P, h, w), P = (rows + 1)(columns + 1): patch (i, j) hides cells i − 1, i × j − 1, j."""
    sides = []
    for length, n in zip(size, cells, strict=True):
        cell = torch.arange(length) * n // length  # (length,) the cell of each pixel
        at = torch.arange(n + 1)[:, None]  # (n + 1, 1)
        sides.append((cell == at - 1) | (cell == at))  # (n + 1, length)
    masks = sides[0][:, None, :, None] & sides[1][None, :, None, :]
    return masks.flatten(0, 1)
