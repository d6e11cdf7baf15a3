"""Causes against slow loops; maps against networks whose attention is known; suspects that were planted."""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import complaints, problem
from reidlib.data.augment import Augmentation
from reidlib.data.pixels import read_image
from reidlib.data.tables import load
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look import photographs, suspects, why
from reidlib.look.copies import duplicates, duplicates_in_words
from reidlib.look.embedding_map import linked_map
from reidlib.look.maps import NINE, Sides, activation_maps, occlusion_maps, rows_of_nine, side_maps
from reidlib.model.weights import build_model
from reidlib.recipes import make_recipe

# --- which queries fail, and what they share


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_causes_are_those_of_a_slow_loop(seed):
    query_emb, query, gallery_emb, gallery = problem(seed)
    retrieval = Retrieval(query_emb, query, gallery_emb, gallery)
    rng = np.random.default_rng(seed)
    colours = rng.random((len(query), 5)), rng.random((len(gallery), 5))
    table = why.causes(retrieval, colours)
    lists = [retrieval.ranked_list(q, topk=None) for q in range(len(query))]
    ranked = [found.dropna(subset="rank") for found in lists]
    matches = np.array([(found["status"] == "match").sum() for found in ranked])
    median = np.median(matches[matches > 0])
    hard = []  # (query, its person, camera, match's camera, behind the nearest stranger?)
    for q, found in enumerate(ranked):
        first = found.loc[found["status"] == "wrong", "rank"].min()
        for row in found[found["status"] == "match"].itertuples():
            hard.append((q, query["pid"][q], query["camid"][q], row.camid, row.rank > first))
    assert table["wrong"].any() and not table["wrong"].all()
    for q, found in enumerate(ranked):
        row, camid = table.iloc[q], query["camid"][q]
        strangers, own = found[found["status"] == "wrong"], found[found["status"] == "match"]
        stranger = strangers.iloc[0]
        assert row["stranger"] == stranger["gallery"] and row["stranger_pid"] == stranger["pid"]
        assert row["own_camera"] == (stranger["camid"] == camid)
        assert row["distractor"] == (stranger["pid"] == 0)
        if len(own) == 0:
            assert row["cause"] == "no match" and not row["wrong"]
            assert pd.isna(row["match"]) and row["strangers_above"] == 0
            continue
        assert row["match"] == own.iloc[0]["gallery"]
        assert row["wrong"] == (own.iloc[0]["rank"] > 1)
        above = strangers[strangers["rank"] < own["rank"].min()]
        assert row["strangers_above"] == len(above) == row["first_rank"] - 1
        assert row["distractors_above"] == (above["pid"] == 0).sum()
        assert row["own_camera_above"] == (above["camid"] == camid).sum()
        near = [np.linalg.norm(colours[0][q] - colours[1][g]) for g in own["gallery"]]
        far = np.linalg.norm(colours[0][q] - colours[1][stranger["gallery"]])
        assert row["colour_ratio"] == pytest.approx(far / min(near))
        assert row["same_colours"] == (far < min(near))
        assert row["few_matches"] == (len(own) <= median / 2)
        others = [
            np.mean([b for _, p, c, m, b in hard if (c, m) == (camid, camera) and p != row["pid"]])
            for camera in own["camid"]
            if any((c, m) == (camid, camera) and p != row["pid"] for _, p, c, m, _ in hard)
        ]
        expected = np.mean(others) if others else np.nan
        assert row["camera_difficulty"] == pytest.approx(expected, nan_ok=True)
        walk = lists[q][lists[q]["status"] == "same camera"]
        walk = walk[walk["path"] != query["path"][q]]["distance"]
        expected = walk.min() if len(walk) else np.nan
        assert row["own_camera_distance"] == pytest.approx(expected, nan_ok=True)
    upper = {"hard_cameras": "camera_difficulty", "odd_picture": "own_camera_distance"}
    for name, column in upper.items():
        limit = np.nanquantile(table[column], 0.75)
        assert (table[name] == (table[column] > limit)).all()


def test_long_lists_are_counted_as_short_ones():
    """The first match of the one query stands far behind the longest list that is asked for."""
    gallery = pd.DataFrame({"pid": [1, *[0] * 30, *[2] * 30], "camid": [2, *[1] * 10, *[2] * 50]})
    query = pd.DataFrame({"pid": [1], "camid": [1]})
    retrieval = Retrieval(np.zeros((1, 1)), query, 61.0 - np.arange(61)[:, None], gallery)
    row = why.causes(retrieval).iloc[0]
    above = ["strangers_above", "distractors_above", "own_camera_above"]
    assert row[above].tolist() == [60, 30, 10]
    assert row["first_rank"] == 61 and row["wrong"] and not row["same_colours"]


def test_causes_without_cameras_and_of_perfect_lists():
    query_emb, query, gallery_emb, gallery = problem(0)
    for tables in (
        [table.drop(columns="camid") for table in (query, gallery)],
        [table.assign(camid=-1) for table in (query, gallery)],
    ):
        retrieval = Retrieval(query_emb, tables[0], gallery_emb, tables[1])
        table = why.causes(retrieval)
        for name in ("own_camera", "hard_cameras", "odd_picture", "same_colours"):
            assert not table[name].any()
        assert (table["own_camera_above"] == 0).all() and table["wrong"].any()
        assert len(why.camera_pairs(retrieval)) == 0
    # nobody but the query's own person in the gallery
    alone = pd.DataFrame({"pid": [1, 1], "camid": [1, 2]})
    retrieval = Retrieval(np.zeros((2, 1)), alone, np.zeros((2, 1)), alone)
    table = why.causes(retrieval)
    assert table["stranger"].isna().all() and (table["cause"] == "").all()
    assert why.base_rates(table)[["lift", "low", "high"]].isna().all(axis=None)
    assert len(why.confusions(retrieval)) == 0
    assert (why.camera_pairs(retrieval)["behind"] == 0).all()
    with pytest.raises(ValueError, match="colour histograms do not fit"):
        why.causes(retrieval, (np.zeros((1, 3)), np.zeros((2, 3))))


def rates_table(n=400, seed=0):
    """Wrong queries wear a hat four times as often as right ones; beards say nothing."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.4
    return pd.DataFrame(
        {
            **{"pid": np.arange(n) // 2 + 1, "matches": 1, "wrong": wrong, "AP": 1 - 0.5 * wrong},
            "hat": rng.random(n) < np.where(wrong, 0.6, 0.15),
            "beard": rng.random(n) < 0.3,
            "both": rng.random(n) < np.where(wrong, 0.3, 0.15),
        }
    )


def test_base_rates():
    table = rates_table()
    found = why.base_rates(table, ["hat", "beard"])
    wrong, hat = table["wrong"], table["hat"]
    row = found.loc["hat"]
    assert row["wrong"] == (wrong & hat).sum() and row["right"] == (~wrong & hat).sum()
    assert row["share_wrong"] == hat[wrong].mean() and row["share_right"] == hat[~wrong].mean()
    a, b, n, m = row["wrong"], row["right"], wrong.sum(), (~wrong).sum()
    assert row["lift"] == pytest.approx((a + 0.5) / (n + 1) * (m + 1) / (b + 0.5), rel=1e-12)
    assert row["mAP_with"] == pytest.approx(table["AP"][hat].mean())
    assert row["mAP_without"] == pytest.approx(table["AP"][~hat].mean())
    assert 1.5 < row["low"] < row["lift"] < row["high"]
    assert found.loc["beard", "low"] < 1 < found.loc["beard", "high"]
    # the interval is of persons: with every query twice, it stays; of queries, it would shrink
    twice = why.base_rates(pd.concat([table, table]), ["hat"]).loc["hat"]
    assert twice["high"] - twice["low"] == pytest.approx(row["high"] - row["low"], rel=0.1)
    # queries without match are neither wrong nor right
    blank = table.assign(matches=0, hat=True, wrong=False)
    again = why.base_rates(pd.concat([table, blank]), ["hat"]).loc["hat"]
    assert again["right"] == row["right"]


def test_a_wrong_query_goes_to_the_evidence_with_the_largest_proven_lift(monkeypatch):
    table = rates_table()
    monkeypatch.setattr(why, "EVIDENCE", dict.fromkeys(("both", "hat", "beard"), ""))
    cause = pd.Series(why.name_causes(table))
    wrong = table["wrong"]
    assert (cause[wrong & table["hat"]] == "hat").all()
    assert (cause[wrong & ~table["hat"] & table["both"]] == "both").all()
    assert (cause[wrong & ~table["hat"] & ~table["both"]] == "unexplained").all()
    assert (cause[~wrong] == "").all()


def test_camera_pairs_and_confusions_are_those_of_a_slow_loop():
    retrieval = Retrieval(*problem(3))
    query = retrieval.query
    pairs, mixed = {}, {}
    for q in range(len(query)):
        found = retrieval.ranked_list(q, topk=None, show_excluded=False)
        matches, wrong = (found[found["status"] == status] for status in ("match", "wrong"))
        for row in matches.itertuples():
            behind = row.rank > wrong["rank"].min()
            pairs.setdefault((query["camid"][q], row.camid), []).append(behind)
        for row in found.head(len(matches)).itertuples():
            if row.status == "wrong" and row.pid > 0:
                key = tuple(sorted((query["pid"][q], row.pid)))
                mixed.setdefault(key, []).append((row.distance, q, row.gallery))
    found = why.camera_pairs(retrieval).set_index(["camid", "match_camid"])
    assert {*found.index} == {*pairs}
    for key, behind in pairs.items():
        assert found.loc[key].tolist() == [len(behind), np.mean(behind)]
    found = why.confusions(retrieval)
    assert len(found) == len(mixed) > 5 and found["intrusions"].is_monotonic_decreasing
    for row in found.itertuples():
        hits = sorted(mixed[row.pid, row.other_pid])
        assert row.intrusions == len(hits) and row.queries == len({q for _, q, _ in hits})
        assert (row.distance, row.query, row.gallery) == hits[0]
        assert row.mutual == (len({query["pid"][q] for _, q, _ in hits}) == 2)


# --- what the network looked at

RECIPE = make_recipe("demo", height=64, width=32, normalise="unit")


class Corner(nn.Module):
    """Sees the red of one corner alone: rows 0 to 15, columns 16 to 31."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return self.scale * images[:, :1, :16, 16:].mean(dim=(2, 3))


def test_occlusion_finds_the_one_place_that_counts():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 64, 32, 3), dtype=np.uint8)
    pixels[:, :16, 16:, 0] = 255  # red, which the mean colour is not
    model = Corner().train()
    targets = np.array([[[1.0], [0.0]], [[1.0], [0.0]]])  # (2, 2, 1): what is red, what is not
    maps = occlusion_maps(model, pixels, targets, RECIPE)
    assert maps.shape == (2, 2, 16, 8) and model.training
    # the corner is cells 0 to 3 × 4 to 7; a patch hides two cells, so one more row and column show it
    assert (maps[:, 0, :4, 4:] > 0).all() and (maps[:, 1, :4, 4:] < 0).all()
    assert np.abs(maps[:, :, 5:]).max() < 1e-6 and np.abs(maps[:, :, :, :3]).max() < 1e-6
    # the slow loop
    image = torch.tensor(pixels[0]).permute(2, 0, 1) / 255
    expected = np.zeros((17, 9))  # by the patch
    for i, j in np.ndindex(17, 9):
        hidden = image.clone()
        rows, columns = (slice(max(4 * k - 4, 0), 4 * k + 4) for k in (i, j))
        hidden[:, rows, columns] = image.mean(dim=(1, 2))[:, None, None]
        whole, part = (float(1 - model(x[None]).detach()) for x in (image, hidden))
        expected[i, j] = abs(part) - abs(whole)
    expected = sum(expected[a : a + 16, b : b + 8] for a in (0, 1) for b in (0, 1)) / 4
    np.testing.assert_allclose(maps[0, 0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="must be"):
        occlusion_maps(model, pixels, targets[0], RECIPE)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small"])
def test_activation_maps_are_those_of_the_deepest_layer_that_is_fine_enough(backbone):
    recipe = make_recipe("demo", backbone=backbone)
    model = build_model(recipe).train()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 32, 3), dtype=np.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = activation_maps(model, pixels, recipe)
    assert maps.shape == (3, 8, 4) and model.training
    after = model.state_dict()  # of BatchNorm too
    assert all(torch.equal(after[name], value) for name, value in before.items())
    plain = Augmentation((64, 32), normalise=recipe.normalise).plain
    features, layers = plain(torch.from_numpy(pixels)), model.eval().backbone
    shapes = []
    with torch.no_grad():
        for layer in getattr(layers, "features", layers):
            features = layer(features)
            shapes.append(features.shape[2])
            if features.shape[2] == 8:
                expected = (features**2).sum(1)
    np.testing.assert_allclose(maps, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert shapes[-1] == 2, "the last map has two rows: too few to see anything"
    with pytest.raises(ValueError, match="no images"):
        activation_maps(model, pixels[:0], recipe)


class Small(nn.Module):
    """Two layers, and their mean over places."""

    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1)
        self.backbone = nn.Sequential(*layers)

    def forward(self, images):
        return self.backbone(images).mean(dim=(2, 3))


def test_maps_of_queries_beside_strangers_and_matches():
    rng = np.random.default_rng(0)
    model, recipe = Small(), RECIPE
    pixels = Sides(*rng.integers(0, 256, (3, 2, 64, 32, 3), dtype=np.uint8))
    emb = Sides(*rng.normal(size=(3, 2, 8)))
    maps = side_maps(model, pixels, emb, recipe)
    pairs = [("query", "stranger"), ("query", "match"), ("stranger", "query"), ("match", "query")]
    for found, (of, to) in zip(maps.like, pairs, strict=True):
        aims = getattr(emb, to)[:, None]
        wanted = occlusion_maps(model, getattr(pixels, of), aims, recipe)[:, 0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    for found, of in zip(maps.features, pixels[:2], strict=True):
        np.testing.assert_allclose(found, activation_maps(model, of, recipe), rtol=1e-4)
    best = [(a - b).max() for a, b in zip(maps.like[0], maps.like[1], strict=True)]
    assert maps.swings().tolist() == best
    images = rows_of_nine(pixels, maps)
    assert len(images) == 2 * len(NINE) and {image.shape for image in images} == {(64, 32, 3)}
    for k, name in enumerate(NINE):
        if name in pixels._fields:
            assert np.array_equal(images[9 + k], getattr(pixels, name)[1])
    # one scale in a row: the strongest place of its occlusion maps is in full colour, once
    most = np.abs(maps.like[:, 1]).max()
    for k, i in {2: 0, 5: 2, 6: 1, 8: 3}.items():
        of = getattr(pixels, pairs[i][0])[1]
        wanted = photographs.overlay(of, maps.like[i, 1], most)
        assert np.array_equal(images[9 + k], wanted), NINE[k]
    flat = maps._replace(features=0 * maps.features, like=0 * maps.like)
    assert len(rows_of_nine(pixels, flat)) == 18, "nothing to show is no error"


def test_overlay():
    image = np.full((4, 4, 3), (90, 120, 150), np.uint8)  # grey 120
    values = np.array([[1.0, 0], [-1, 4]])  # more than most is drawn as most
    drawn = photographs.overlay(image, values, most=1.0)
    assert drawn.dtype == np.uint8 and drawn.shape == (4, 4, 3)
    orange, blue = (0.8 * np.array(c) + 0.2 * 120 for c in ((213, 94, 0), (0, 114, 178)))
    np.testing.assert_allclose(drawn[[0, 3, 3], [0, 0, 3]], [orange, blue, orange], atol=1)
    assert (photographs.overlay(image, np.zeros((2, 2)), 1.0) == 120).all()
    with pytest.raises(ValueError, match="above zero"):
        photographs.overlay(image, values, most=0.0)


# --- copies of photographs


def reencoded(image, quality=30):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_planted_copies_are_found_and_nothing_else(data_root):
    """Files copied inside a drawn data set: under another identity, split and camera, altered or not."""
    data = load(data_root / "synthetic")
    train, query, gallery = data.train, data.query, data.gallery
    tables = [t.assign(split=s) for s, t in data.splits.items()]
    pixels = [np.stack([read_image(p) for p in t["path"]]) for t in tables]
    everything = pd.concat(tables, ignore_index=True)
    assert len(duplicates(pixels, everything)) == 0
    first = {"train": 0, "query": len(train), "gallery": len(train) + len(query)}

    def row(split, i):
        return first[split] + i, pixels[["train", "query", "gallery"].index(split)][i]

    people = np.flatnonzero(gallery["pid"] > 0)
    planted, extra = {}, []

    def plant(side, i, harm, kind, alter=lambda image: image, **labels):
        source, image = row(side, i)
        planted[len(everything) + len(extra)] = (source, harm, kind)
        labels = everything.iloc[source].to_dict() | {"path": f"new{len(extra)}.jpg"} | labels
        extra.append((labels, alter(image)))

    junk = int(np.flatnonzero(gallery["pid"] == -1)[0])
    darker = lambda image: (image * 0.6).astype(np.uint8)
    mirrored = lambda image: image[:, ::-1]
    plant("train", 0, "two identities", "same pixels", pid=999)
    plant("train", 5, "train and test", "same pixels", split="gallery")
    plant("gallery", people[3], "two identities", "same picture", reencoded, pid=999)
    plant("gallery", people[9], "two identities", "mirrored", mirrored, pid=999)
    plant("query", 2, "none", "same picture", reencoded, split="gallery")
    plant("gallery", people[12], "two cameras", "same picture", darker, camid=9)
    plant("query", 4, "query and gallery", "same pixels", split="gallery", camid=-1)
    everything.loc[row("query", 4)[0], "camid"] = -1
    plant("gallery", junk, "none", "same picture", reencoded, pid=5)
    labels, images = zip(*extra, strict=True)
    table = pd.concat([everything, pd.DataFrame(labels)], ignore_index=True)
    found = duplicates([*pixels, np.stack(images)], table)
    assert list(found.columns) == [*suspects.SUSPECT_COLUMNS, "harm"]
    by_image = found.set_index("image")
    assert {*by_image.index} == {*planted} and by_image.index.is_unique
    for image, expected in planted.items():
        columns = ["other", "harm", "kind", "path"]
        assert tuple(by_image.loc[image, columns]) == (*expected, table["path"][image])
    assert (found["harm"].head(3) == "two identities").all() and found["harm"].iloc[-1] == "none"
    evidence = by_image.loc[len(everything) + 1, "evidence"]
    assert evidence == "same pixels (gallery and train), correlation 1.000"


def test_copies_of_flat_pictures_and_of_several_sizes():
    rng = np.random.default_rng(0)
    black = np.zeros((3, 64, 32, 3), np.uint8)
    small = rng.integers(0, 256, (2, 32, 16, 3), dtype=np.uint8)
    grey = np.full((1, 64, 32, 3), 7, np.uint8)
    large = np.stack([small[0].repeat(4, 0).repeat(4, 1)])
    table = pd.DataFrame({"path": "", "pid": np.arange(1, 8), "camid": -1, "split": "train"})
    found = duplicates([black, small, grey, large], table)
    # flat pictures are copies only where the pixels are the same; of three, each goes with the first
    assert sorted(zip(found["other"], found["image"], strict=True)) == [(0, 1), (0, 2), (3, 6)]
    assert (found["harm"] == "two identities").all()
    smooth = small.repeat(4, 1).repeat(4, 2)
    symmetric = np.concatenate([smooth, smooth[:, :, ::-1]], axis=2)[:1]
    symmetric = np.concatenate([symmetric, reencoded(symmetric[0], 95)[None]])
    found = duplicates([symmetric], table.head(2))
    assert found["kind"].tolist() == ["same picture"], "its own mirror image is one pair, not two"
    assert len(duplicates([black[:1]], table.head(1))) == 0
    assert len(duplicates([black[:0]], table.head(0))) == 0
    with pytest.raises(ValueError, match="do not fit"):
        duplicates([black], table)


# --- wrong labels


def good_embeddings(seed=0, people=40, cameras=3, images=3, noise=0.35, distractors=30):
    """Identity centre, a shift of each camera and walk, and noise: what a good network makes."""
    rng = np.random.default_rng(seed)
    seen = itertools.product(range(1, people + 1), range(1, cameras + 1), range(images))
    rows = [(pid, camid) for pid, camid, _ in seen]
    rows += [(0, 1 + i % cameras) for i in range(distractors)]
    table = pd.DataFrame(rows, columns=["pid", "camid"])
    table["path"] = [f"{i}.jpg" for i in range(len(table))]
    pids, camids = table["pid"].to_numpy(), table["camid"].to_numpy()
    centres = rng.normal(size=(people + 1 + distractors, 16))
    who = np.where(pids > 0, pids, people + 1 + np.arange(len(pids)) - people * cameras * images)
    walks = 0.5 * rng.normal(size=(len(centres), cameras + 1, 16))
    emb = centres[who] + noise * walks[who, camids] + noise * rng.normal(size=(len(pids), 16))
    return emb, table


def judged(found, planted):
    """Precision and recall of rows named."""
    named = {*found["image"]}
    return len(named & planted) / max(len(named), 1), len(named & planted) / len(planted)


def test_images_with_swapped_labels_are_found_and_nothing_else():
    for seed in range(4):
        emb, table = good_embeddings(seed)
        assert len(suspects.label_errors(emb, table)) == 0
        rng = np.random.default_rng(seed)
        pids = table["pid"].to_numpy().copy()
        rows = rng.permutation(np.flatnonzero(pids > 0))[:20]
        true = pids.copy()
        pids[rows] = pids[np.roll(rows, 1)]
        rows = rows[pids[rows] != true[rows]]
        found = suspects.label_errors(emb, table.assign(pid=pids))
        assert judged(found, {*rows}) == (1, 1)
        assert (found["kind"] == "wrong identity?").all() and found["score"].min() > 1.5
        assert (found["suggested_pid"].to_numpy() == true[found["image"]]).all()
        assert (pids[found["other"]] == found["suggested_pid"].to_numpy()).all()
        assert found["score"].is_monotonic_decreasing
        # a person of the data among the distractors
        pids = true.copy()
        rows = rng.permutation(np.flatnonzero(pids > 0))[:10]
        pids[rows] = 0
        found = suspects.label_errors(emb, table.assign(pid=pids))
        precision, recall = judged(found, {*rows})
        assert precision == 1 and recall >= 0.6  # a person far out may pass for a stranger
        assert (found["kind"] == "no distractor?").all()
        assert (found["suggested_pid"].to_numpy() == true[found["image"]]).all()


def test_label_scores_are_those_of_a_slow_loop(monkeypatch):
    emb, table = good_embeddings(5, people=8, noise=1.5, distractors=5)
    table.loc[[0, 20], "pid"] = -1
    pids = table["pid"].to_numpy()
    monkeypatch.setattr(suspects, "LEAST", 0.0)
    near = suspects.nearest_images(emb[pids != -1], len(emb) - 3)
    found = suspects.label_errors(emb, table, near)
    found = found[found["kind"] == "wrong identity?"].set_index("image")
    assert {*found.index} == {*np.flatnonzero(pids > 0)}
    for i in np.flatnonzero(pids > 0):
        apart = np.linalg.norm(emb - emb[i], axis=1)
        others = np.arange(len(emb)) != i
        far = {pid: sorted(apart[(pids == pid) & others]) for pid in range(1, 9)}
        own = far.pop(pids[i])[1]
        suggested = min(far, key=lambda pid: far[pid][1])
        assert found.loc[i, "score"] == pytest.approx(own / far[suggested][1], rel=1e-9)
        assert found.loc[i, "suggested_pid"] == suggested
        assert apart[found.loc[i, "other"]] == far[suggested][0]


def test_label_errors_of_little_data(monkeypatch):
    emb, table = good_embeddings(people=3)
    little = [(emb[:n], table.head(n)) for n in (0, 1, 2, 9)]  # one person alone at most
    for few, some in (*little, (emb, table.assign(pid=-1))):
        for function in (suspects.label_errors, suspects.identity_errors):
            assert len(function(few, some)) == 0
    # the only image of an identity has no other to be far from
    alone = table.assign(pid=np.where(np.arange(len(table)) == 0, 77, table["pid"]))
    monkeypatch.setattr(suspects, "LEAST", 0.0)
    assert 0 not in suspects.label_errors(emb, alone)["image"].to_numpy()
    # copies at distance 0 of everything
    same = suspects.label_errors(np.zeros_like(emb), table)
    assert np.isfinite(same["score"]).all() and (same["score"] == 1).all()
    for function in (suspects.label_errors, suspects.identity_errors):
        with pytest.raises(ValueError, match="do not fit"):
            function(emb[:-1], table)
        with pytest.raises(ValueError, match="NaN"):
            function(emb * np.nan, table)


def test_split_and_merged_identities_and_whole_walks_are_found(monkeypatch):
    for seed in range(4):
        emb, table = good_embeddings(seed)
        assert len(suspects.identity_errors(emb, table)) == 0
        pids = table["pid"].to_numpy()
        rng = np.random.default_rng(seed)
        # one identity in two pids, cut at random
        rows = rng.permutation(np.flatnonzero(pids == 7))[:4]
        split = np.where(np.isin(np.arange(len(pids)), rows), 99, pids)
        found = suspects.identity_errors(emb, table.assign(pid=split))
        assert found["kind"].tolist() == ["one person in two pids?"]
        row = found.iloc[0]
        assert (row["pid"], row["other_pid"], row["suggested_pid"]) == (99, 7, 7)
        assert split[row["image"]] == 99 and split[row["other"]] == 7
        # two identities under one pid
        merged = np.where(pids == 11, 3, pids)
        with monkeypatch.context() as patch:
            patch.setattr(suspects, "LEAST_TWO", 1.2)
            found = suspects.identity_errors(emb, table.assign(pid=merged))
        assert found["kind"].tolist() == ["two people in one pid?"]
        row = found.iloc[0]
        assert row["pid"] == row["other_pid"] == 3
        assert {pids[row["image"]], pids[row["other"]]} == {3, 11}
        # a walk of one person past one camera under another's pid
        camids = table["camid"].to_numpy()
        walk = np.where((pids == 5) & (camids == 2), 20, pids)
        found = suspects.identity_errors(emb, table.assign(pid=walk))
        assert found["kind"].tolist() == ["two people in one pid?"]
        row = found.iloc[0]
        assert (row["pid"], row["suggested_pid"]) == (20, 5)
        assert pids[row["image"]] == 5 and camids[row["image"]] == 2 and pids[row["other"]] == 20
        assert "3 images (camera 2)" in row["evidence"] and "(cameras 1, 2, 3)" in row["evidence"]
        blind = suspects.identity_errors(emb, table.assign(pid=walk, camid=-1))
        assert "camera" not in blind["evidence"][0]


def test_each_suspect_stands_beside_typical_images():
    emb, table = good_embeddings(people=6, distractors=3)
    pids = table["pid"].to_numpy()
    wrong = np.where(np.arange(len(pids)) == 4, 3, pids)  # an image of 1 is called 3
    wrong[20] = 0  # one of 3 is called a distractor
    labelled = table.assign(pid=wrong)
    found = suspects.label_errors(emb, labelled)
    fours = dict(zip(found["image"], suspects.in_fours(found, emb, labelled), strict=True))
    assert {*fours} == {4, 20}

    def middle(pid, but):
        rows = [i for i in np.flatnonzero(wrong == pid) if i not in but]
        centre = np.mean(emb[rows], axis=0)
        return min(rows, key=lambda i: np.linalg.norm(emb[i] - centre))

    other = found.set_index("image")["other"]
    assert fours[4].tolist() == [4, middle(3, [4]), other[4], middle(1, [4, other[4]])]
    assert fours[20].tolist() == [20, -1, other[20], middle(3, [20, other[20]])]
    nothing = found.assign(suggested_pid=pd.array([pd.NA] * len(found), "Int64"))
    assert (suspects.in_fours(nothing, emb, labelled)[:, 3] == -1).all()
    assert suspects.in_fours(found[:0], emb, labelled).shape == (0, 4)


def test_queries_are_touched_by_suspects_of_theirs_and_of_their_strangers():
    gallery = pd.DataFrame({"path": ["a", "b", "c"], "pid": [1, 2, 3]})
    causes = pd.DataFrame({"path": ["q0", "q1", "q2", "q3"], "pid": [1, 2, 5, 4]})
    causes["stranger"] = pd.array([1, 2, pd.NA, 0], "Int64")
    table = pd.concat([causes[["path", "pid"]], gallery], ignore_index=True)
    # b is the stranger of q0
    found = {"kind": "mirrored", "pid": 2, "other_pid": 4, "path": "b", "other_path": "q3"}
    found = pd.DataFrame([found])
    assert suspects.touched(causes, gallery, found, table).tolist() == [True, False, False, True]
    # one that may be two people: all its images, named or not
    two = found.assign(kind="two people in one pid?", path="x", other_path="x", pid=5, other_pid=5)
    assert suspects.touched(causes, gallery, two, table).tolist() == [False, False, True, False]
    # two that may be one: all images of both; q3 is of 4
    one = two.assign(kind="one person in two pids?", other_pid=4)
    assert suspects.touched(causes, gallery, one, table).tolist() == [False, False, True, True]
    assert not suspects.touched(causes, gallery, one.assign(kind="no distractor?"), table).any()


def test_recall_of_planted():
    emb, table = good_embeddings()
    found = suspects.recall_of_planted(emb, table, planted=10)
    assert found == {"planted": 50, "recall": 1.0, "right_pid": 1.0, "others": 0.0}
    assert found == suspects.recall_of_planted(emb, table, planted=10)
    noise = np.random.default_rng(0).normal(size=emb.shape)
    assert suspects.recall_of_planted(noise, table, planted=10)["recall"] < 0.5
    with pytest.raises(ValueError, match="do not fit"):
        suspects.recall_of_planted(emb, table, planted=1000)
    with pytest.raises(ValueError, match="people: 1"):
        suspects.recall_of_planted(emb[:9], table.head(9), planted=1)


def test_nearest_images_far_from_the_origin():
    emb = np.random.default_rng(0).normal(size=(50, 4)) + 1e6
    near, far = suspects.nearest_images(emb, 5)
    for i in range(50):
        distance = np.linalg.norm(emb - emb[i], axis=1)
        distance[i] = np.inf
        assert near[i].tolist() == np.argsort(distance)[:5].tolist()
        np.testing.assert_allclose(far[i], np.sort(distance)[:5], rtol=1e-6)
    with pytest.raises(ValueError, match="no 50 other"):
        suspects.nearest_images(emb, 50)


# --- the linked map

EVIL = '<img src=x onerror="document.title=1">&\'.jpg'
BREAK = "</script><script>document.title='taken'</script>"


def map_page(lists=(), **options):
    """Six images: two identities of two, a distractor, an unknown one; dots in two rows of three."""
    points = np.array([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1.0]])
    table = pd.DataFrame({"pid": [4, 4, 9, 9, 0, -1], "camid": [1, 2, 1, 2, 3, -1]})
    table["path"] = [f"/far/{i}.jpg" for i in range(5)] + [f"/far/{EVIL}"]
    table["split"] = [""] * 5 + [BREAK]
    near = np.array([[1, 2], [0, 2], [3, 1], [2, 0], [5, 3], [4, 0]])
    pixels = np.random.default_rng(0).integers(0, 256, (6, 200, 100, 3), dtype=np.uint8)
    given = {"points": points, "table": table, "pixels": pixels, "neighbours": near}
    given |= {"distances": near / 3.0} | options
    return linked_map(*given.values(), title="<b>Map</b>", lists=lists)


def test_linked_map_holds_all_and_loads_nothing():
    page = map_page()
    assert "<b>Map" not in page and page.count("</script>") == 2
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", page)
    dots = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    texts = ["identity 9, camera 2", "distractor, camera 3", f"unknown person, {BREAK}"]
    assert [dot["text"] for dot in dots[3:]] == texts
    assert dots[5]["file"] == EVIL and dots[0]["file"] == "0.jpg"
    assert dots[0]["near"] == [1, 2] and dots[0]["far"] == [0.333, 0.667]
    assert dots[0]["x"] < dots[2]["x"] and dots[0]["y"] > dots[3]["y"], "upwards, as in figures"
    assert {(dot["key"], dot["ap"], dot["list"]) for dot in dots} == {("", None, "")}
    assert len(page) < 60_000, "photographs are thumbnails"
    one = linked_map(
        np.zeros((1, 2)), pd.DataFrame({"path": [""], "pid": [1], "camid": [1], "split": ["query"]}),
        np.zeros((1, 8, 4, 3), np.uint8), np.zeros((1, 0), int), np.zeros((1, 0)),
    )  # fmt: skip
    assert "identity 1, camera 1, query" in one
    for options, message in (
        ({"points": np.zeros((5, 2))}, "as many photographs"),
        ({"distances": np.zeros((6, 1))}, r"neighbours and distances \(N, K\)"),
        ({"points": np.full((6, 2), np.nan)}, "finite"),
        ({"neighbours": np.full((6, 2), 6)}, "0 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            map_page(**options)


class Map:
    """A map in a browser."""

    def __init__(self, chromium, page, tmp_path):
        self.driver, place = chromium, Path(tmp_path, "map.html")
        place.write_text(page, encoding="utf-8")
        self.address = place.as_uri()
        chromium.get(self.address)

    def every(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def dot(self, i):
        return self.one(f'circle[data-row="{i}"]')

    def kind(self, i):
        return self.dot(i).get_attribute("class") or ""

    def press(self, *keys):
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)


def test_linked_map_zooms_makes_lists_and_leads_to_ranked_lists(chromium, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    known = {"key": ["q0", "g1", "q1", "g3", "g4", "g5"], "AP": [0.9, None, 0.3] + [None] * 3}
    table = pd.DataFrame({"path": [f"/far/{i}.jpg" for i in range(6)], "pid": [4, 4, 9, 9, 0, -1]})
    table = table.assign(camid=1, split="").assign(**known)
    page = Map(chromium, map_page(table=table, lists={"q0", "g1"}), tmp_path)
    every, one, dot, press = page.every, page.one, page.dot, page.press
    chosen = lambda: one('circle[aria-pressed="true"]').get_attribute("data-row")
    box = lambda: [float(part) for part in one("#map").get_dom_attribute("viewBox").split()]
    # it starts at the worst query, coloured by AP
    assert chosen() == "2" and "AP 30.0 %" in one("#side").text and not every("#side a")
    legend = [entry.text for entry in every("#key > span")]
    assert legend == ["● 20 to 40 %", "● 80 to 100 %", "● no query"]
    # a click 9 pixels beside a dot hits it; it leads to its ranked list, and a link comes back to it
    size = dot(0).rect
    aside = ActionChains(chromium).move_to_element_with_offset(dot(0), 9 + size["width"] // 3, 0)
    aside.click().perform()
    assert chosen() == "0" and chromium.current_url.endswith("#q0")
    assert one("#side a").get_attribute("href").endswith("ranked_lists.html#q0")
    chromium.get(page.address + "#g1")
    chromium.refresh()
    assert chosen() == "1"
    # zoom and pan; dots keep their size on the screen, and the one that is chosen stays in view
    dot(1).click()
    press("+", "+", "+")
    assert box()[2] < 300 and abs(dot(1).rect["width"] - size["width"]) < 10
    x = box()[0]
    ActionChains(chromium).drag_and_drop_by_offset(one("#map"), 80, 0).perform()
    assert box()[0] < x
    press(Keys.END)
    assert chosen() == "5" and box()[0] < 980 < box()[0] + box()[2]
    press("0")
    assert box() == [0, 0, 1000, 700]
    # the space bar, or a lasso, makes a list
    press(" ")
    assert one("#list h2").text == "Listed images: 1"
    one("#lasso").click()
    lasso, box_of = ActionChains(chromium).move_to_element(one("#map")), one("#map").rect
    for n, (a, b) in enumerate([(-0.495, -0.49), (-0.3, -0.49), (-0.3, 0.49), (-0.495, 0.49)]):
        corner = int(a * box_of["width"]), int(b * box_of["height"])
        lasso.move_to_element_with_offset(one("#map"), *corner)
        if n == 0:
            lasso.click_and_hold()
    lasso.release().perform()
    left = [i for i in range(6) if "listed" in page.kind(i)]
    assert left == [0, 3, 5] and len(every("#list li")) == 3
    one("#by option[value=identity]").click()
    assert len(every("#key > span")) == 3
    assert complaints(chromium) == []


def test_linked_map_in_a_browser(chromium, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = Map(chromium, map_page(), tmp_path)
    assert chromium.title == "<b>Map</b>", "a file's name must not run as a script"
    every, one, dot, kind = page.every, page.one, page.dot, page.kind
    active = lambda name: chromium.switch_to.active_element.get_attribute(name)

    def side(*said):
        return all(words in one("#side").text for words in said)

    # the first dot is chosen from the start
    assert dot(0).get_attribute("aria-pressed") == "true" and side("identity 4, camera 1")
    photo = one("#side figure img")
    assert photo.get_attribute("alt") == "Photograph: identity 4, camera 1"
    assert chromium.execute_script("return arguments[0].naturalHeight", photo) == 96
    assert side("1 of its 2 nearest are of the same identity")
    assert side("✓ identity 4, camera 2, at 0.333", "✗ identity 9, camera 1, at 0.667")
    assert [kind(i) for i in range(1, 6)] == ["same near", "near other", "", "", ""]
    assert [line.get_attribute("class") for line in every("line")] == ["same", "other"]
    # a mouse over a dot shows it, a click keeps it
    ActionChains(chromium).move_to_element(dot(4)).perform()
    assert side("distractor, camera 3")
    dot(5).click()
    ActionChains(chromium).move_to_element(dot(1)).perform()
    assert side(f"unknown person, {BREAK}", EVIL) and chromium.title == "<b>Map</b>"
    assert side("0 of its 2"), "two unknown people are not one identity"
    # a neighbour in the list leads to its dot
    every("#side button")[1].click()
    assert side("identity 4, camera 1")
    # the keyboard alone: Tab comes to the chosen dot, arrows go on from there
    assert active("data-row") == "0" and active("aria-label")
    walk = {"ARROW_RIGHT": [1, 2, 2], "ARROW_UP": [5], "ARROW_LEFT": [4], "ARROW_DOWN": [1]}
    walk |= {"END": [5], "HOME": [0]}
    for key, expected in ((key, dot) for key, dots in walk.items() for dot in dots):
        page.press(getattr(Keys, key))
        assert active("data-row") == str(expected) and active("tabindex") == "0"
    assert len(every('circle[tabindex="0"]')) == 1, "one stop for Tab, not hundreds"
    # search: an identity, else a part of a file's name; the first that fits is chosen
    for typed, fitting, words in (
        ("9", [2, 3], "identity 9, camera 1"),
        ("3.JPG", [3], "identity 9, camera 2"),
        ("no such file", [], "nearest are of the same identity"),
    ):
        one("#find").clear()
        one("#find").send_keys(typed)
        assert [i for i in range(6) if "found" in kind(i)] == fitting and side(words)
        assert one("#found").text == f"{len(fitting)} found"
    # colours: by camera, and back
    dot(0).click()
    fill = lambda i: dot(i).value_of_css_property("fill")
    plain = fill(5)
    one("#by option[value=camera]").click()
    legend = [entry.text for entry in every("#key > span")]
    assert legend == ["● camera 1", "● camera 2", "● camera 3", "● unknown"]
    assert len({fill(3), fill(4), fill(5), plain}) == 4
    one("#by option[value='']").click()
    assert fill(5) == plain and not every("#key > span")
    assert complaints(chromium) == []


# --- in words


def causes_of(wrong, right):
    """A table as `causes` returns it, of some wrong and right queries; hats are worn by the wrong."""
    total = wrong + right
    is_wrong = np.arange(total) < wrong
    columns = {"pid": np.arange(1, total + 1), "matches": 1, "wrong": is_wrong, "AP": 0.5}
    columns |= {"hat": is_wrong, "cause": np.where(is_wrong, "unexplained", "")}
    return pd.DataFrame(columns)


def test_lifts_in_words():
    bare = causes_of(5, 9).assign(hat=False)
    for table, wanted in (
        (causes_of(20, 20), "**hat** (hat): 100% of the wrong"),
        (bare, "No evidence"),
        (causes_of(9, 0), "nothing to compare"),
    ):
        said = why.lifts_in_words(why.base_rates(table, ["hat"]), table)
        assert wanted in said and ("stay unexplained" in said) == ("**hat**" in said)


def test_cameras_and_confusions_in_words():
    pairs = pd.DataFrame({"camid": [1, 2], "match_camid": [2, 1], "behind": [0.5, 0.25]})
    pairs["matches"] = 4
    assert "From camera 1 to camera 2, 50% of 4 matches" in why.cameras_in_words(pairs)
    assert "cannot be compared" in why.cameras_in_words(pairs[:1])
    row = {"pid": 3, "other_pid": 7, "intrusions": 5, "queries": 2, "mutual": True}
    said = why.confusions_in_words(pd.DataFrame([row, row | {"intrusions": 1}]))
    assert "Identities 3 and 7" in said and "both ways" in said and "from 1 of 2 pairs" in said
    assert "No list has" in why.confusions_in_words(pd.DataFrame([row])[:0])


def test_places_and_suspects_in_words():
    for swings, wrong, wanted in (
        ([0, 2], 5, "In 1 of the 2"),
        ([0, 0], 5, "In none of the 2"),
        ([2, 2], 0, "No query is wrong"),
    ):
        said = why.places_in_words(np.array([1, 1]), np.array(swings), wrong)
        assert said.startswith(wanted)
    copies = pd.DataFrame({"harm": ["none", "two identities"]})
    said = duplicates_in_words(copies, 1000)
    assert said.startswith("2 pairs of copies among 1,000 images, 1 of")
    trial = {"planted": 20, "recall": 0.5, "right_pid": 0.9, "others": 3}
    assert "50% were found, 90% of these" in suspects.trust_in_words(trial, 4)
    assert "the true identity" not in suspects.trust_in_words(trial | {"recall": 0.0}, 4)
    rates = pd.Series({"wrong": 3, "share_wrong": 0.3, "share_right": 0.1, "low": 1.5})
    assert "The data may be at fault" in suspects.blame_in_words(rates, 10, 20)
    for low in (1.0, np.nan):
        assert "may be chance" in suspects.blame_in_words(rates.replace(1.5, low), 10, 20)
        fewer = rates.replace(1.5, low).replace(0.1, 0.4)
        assert "do not explain" in suspects.blame_in_words(fewer, 10, 20)
    assert "nothing to compare" in suspects.blame_in_words(rates, 20, 20)
