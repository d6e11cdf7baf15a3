"""Search without labels: any pictures in, the evaluator's ranking out, and what is said on the way."""

import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from reidlib import look, runs
from reidlib.__main__ import main
from reidlib.data.pixels import image_sizes, load_images, read_image
from reidlib.look import photographs
from reidlib.look.photographs import one_line, search_lists
from reidlib.look.search import (
    nearness,
    nearness_in_words,
    picture_table,
    remarks,
    search,
    search_csv,
    uncovered,
    uncovered_in_words,
)
from reidlib.model.embed import embed
from reidlib.model.stored import write_embeddings
from reidlib.model.weights import build_model, save_weights
from reidlib.recipes import make_recipe

RECIPE = make_recipe("demo", hidden=16, dim=8, height=64, width=32, hold_out=0)
AWKWARD = (
    *("with space.png", "quo\"te's.png", "comma, $x_1$.png", "new\nline.png", "UPPER.PNG"),
    *("<script>alert(1)<&.png", "ünïcode 人 🙂.png", "=1+1.png", "100% {}.png"),
)


def crop(seed, size=(64, 32)):
    """A smooth random picture, of which no two are alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size[::-1])


@pytest.fixture(scope="module")
def model():
    made = build_model(RECIPE).train()
    with torch.no_grad():  # BatchNorms that have seen something: else all embeddings are alike
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.momentum = None
        pixels = np.stack([np.asarray(crop(100 + i)) for i in range(32)]).astype(np.float32)
        made(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 64 - 2)
    made.recipe = RECIPE
    return made.eval()


@pytest.fixture
def run(model, tmp_path):
    """The name of a run, for the command line."""
    folder = tmp_path / "outputs" / "tiny"
    folder.mkdir(parents=True)
    runs.write_json(folder / "config.json", RECIPE.model_dump())
    save_weights(folder / "weights.safetensors", model, RECIPE)
    return "tiny"


@pytest.fixture
def photos(tmp_path):
    """A folder as people have them."""
    root = tmp_path / "my photos"
    for folder in ("a", "b c"):
        (root / folder).mkdir(parents=True)
    for i, name in enumerate(AWKWARD):
        crop(i).save(root / name)
    exif = Image.Exif()
    exif[274] = 6  # stored lying, shown upright
    crop(20, (96, 48)).transpose(Image.Transpose.ROTATE_90).save(root / "phone.jpg", exif=exif)
    rgba = crop(21).convert("RGBA")
    rgba.putalpha(128)
    rgba.save(root / "alpha.png")
    crop(22).convert("L").save(root / "grey.jpg")
    crop(23).convert("CMYK").save(root / "cmyk.jpg")
    grey = np.asarray(crop(24).convert("L")).astype(np.uint16) << 8
    Image.fromarray(grey).save(root / "sixteen.png")
    crop(25).save(root / "a" / "same.png")
    crop(26).save(root / "b c" / "same.png")
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture
def shell(run, photos):
    """Search from the command line, all photographs in all of them unless told otherwise."""

    def search_for(*options, query=photos, gallery=photos):
        line = ["search", "--model", run, "--query", query, "--gallery", gallery, *options]
        return main([*map(str, line)])

    return search_for


def quietly(*args, **options):
    return search(*args, **options, show_progress=False)


def embedded(model, table):
    """What a search measures of pictures."""
    return embed(model, load_images(table, RECIPE, False)[0], RECIPE, show_progress=False)


# --- the pictures


def test_a_picture_a_folder_and_a_list(photos, tmp_path, monkeypatch):
    folder = picture_table(photos)
    assert len(folder) == len(AWKWARD) + 7 and (folder[["pid", "camid"]] == -1).all(axis=None)
    monkeypatch.chdir(photos)
    for name in AWKWARD:
        one = picture_table(name)  # absolute, as in the folder: else a query would find itself
        assert one["path"].tolist() == [str(photos / name)] and one["path"][0] in {*folder["path"]}
    (tmp_path / "list.csv").write_text('7,"my photos/comma, $x_1$.png"\n-1,my photos/a/same.png\n')
    table = picture_table(tmp_path / "list.csv")
    assert table["pid"].tolist() == [7, -1]
    assert table["path"].tolist() == [str(photos / "comma, $x_1$.png"), str(photos / "a/same.png")]


def test_sizes_are_those_of_the_decoded_picture(tmp_path):
    """Two photographs of one stored size, one of them lying: they are of two sizes."""
    paths = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        paths.append(str(tmp_path / f"{orientation}.jpg"))
        crop(orientation, (40, 24)).save(paths[-1], exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    sizes = image_sizes([*paths, str(tmp_path / "broken.jpg")])
    assert sizes == [read_image(p).shape[:2] for p in paths] + [None]
    assert set(sizes[:4]) == {(40, 24)} and set(sizes[4:8]) == {(24, 40)}
    table = pd.DataFrame({"path": paths, "pid": -1, "camid": -1})
    pixels, _ = load_images(table, RECIPE, show_progress=False)
    assert pixels.shape == (8, 64, 32, 3)  # the input's size, at once
    assert load_images(table, RECIPE, False, training=True)[0].shape == (8, 72, 36, 3)


@pytest.mark.parametrize(
    ("size", "odd"),
    [((128, 64), 0), ((96, 64), 0), ((95, 64), 1), ((30, 40), 1), ((256, 64), 0), ((257, 64), 1)],
)
def test_pictures_that_are_no_crops_are_named(tmp_path, size, odd):
    crop(0).save(tmp_path / "crop.png")
    crop(1, size).save(tmp_path / "what?.png")
    said = remarks({"query": tmp_path}, {"query": picture_table(tmp_path)}, RECIPE)
    assert len(said) == odd
    if odd:
        assert said[0].startswith("Warning, query: 1 of 2 images")
        assert f"'what?.png' ({size[1]}×{size[0]})" in said[0]


# --- the search


def test_the_order_is_that_of_plain_distances(model, photos):
    gallery = picture_table(photos)
    query = gallery.iloc[[3, 8]].reset_index(drop=True)
    retrieval, found = quietly(model, query, gallery, RECIPE, topk=None)
    emb = embedded(model, gallery).astype(float)
    for row, itself in enumerate((3, 8)):
        asked = embedded(model, query.iloc[[row]]).astype(float)[0]
        distance = np.sqrt(((emb - asked) ** 2).sum(axis=1))
        order = np.argsort(distance, kind="stable")
        mine = found[found["query"] == row].reset_index(drop=True)
        assert mine["path"].tolist() == gallery["path"][order].tolist()
        np.testing.assert_allclose(mine["distance"], distance[order], atol=1e-4)
        assert mine["query_path"].unique() == [query["path"][row]]
        is_itself = mine["gallery"] == itself
        assert (mine["status"] == np.where(is_itself, "query itself", "unknown")).all()
        assert mine["rank"][~is_itself].tolist() == list(range(1, len(gallery)))
        assert mine["rank"][is_itself].isna().all()
        np.testing.assert_allclose(retrieval.distances(row), distance, atol=1e-4)


def test_labels_are_shown_and_change_no_rank(model, photos):
    gallery = picture_table(photos)
    plain = quietly(model, gallery.iloc[:3], gallery, RECIPE)[1]
    # junk, a distractor, the query's own identity on its own camera: all stay in
    labelled = gallery.assign(pid=np.arange(len(gallery)) % 5 - 1, camid=2)
    query = labelled.iloc[:3].assign(pid=[-1, 3, 3])
    found = quietly(model, query, labelled, RECIPE)[1]
    for column in ("query", "rank", "gallery", "path", "distance"):
        assert found[column].equals(plain[column])
    assert found["pid"].tolist() == labelled["pid"][found["gallery"]].tolist()
    assert (found["camid"] == 2).all()
    ranked = found[found["rank"].notna()]
    assert set(ranked[ranked["query"] == 0]["status"]) == {"unknown"}
    rest = ranked[ranked["query"] > 0]
    expected = rest["pid"].map({-1: "unknown", 0: "wrong", 1: "wrong", 2: "wrong", 3: "match"})
    assert rest["status"].tolist() == expected.tolist()
    assert {"unknown", "wrong", "match"} <= set(rest["status"])


def test_flip_reaches_both_sides(model, photos):
    gallery = picture_table(photos)
    mirrored = quietly(model, gallery[:1], gallery, RECIPE, flip=True)[1]
    plain = quietly(model, gallery[:1], gallery, RECIPE)[1]
    assert not np.allclose(mirrored["distance"], plain["distance"])
    itself = mirrored["status"] == "query itself"
    assert mirrored["distance"][itself].item() < 0.05 * mirrored["distance"].median()


def test_embeddings_are_a_gallery_if_this_model_made_them(model, photos):
    table = picture_table(photos)
    emb = embedded(model, table)
    direct = quietly(model, table[:2], table, RECIPE)[1]
    stored = quietly(model, table[:2], (emb, table), RECIPE)[1]
    pd.testing.assert_frame_equal(stored, direct, atol=1e-4)
    with pytest.raises(ValueError, match="embeddings of 5 numbers, this model gives 8"):
        quietly(model, table[:2], (emb[:, :5], table), RECIPE)
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    for wrong in (emb[::-1], unit, np.full_like(emb, 3)):
        with pytest.raises(ValueError, match="not made by this model"):
            quietly(model, table[:2], (wrong, table), RECIPE)
    elsewhere = table.assign(path=[f"far/away/{i}.jpg" for i in range(len(table))])
    found = quietly(model, table[:2], (emb, elsewhere), RECIPE)[1]  # nothing to compare with
    assert (found["status"] == "unknown").all() and found["rank"].notna().all()
    with pytest.raises(ValueError, match="gallery is empty"):
        quietly(model, table[:2], (emb[:0], table[:0]), RECIPE)
    with pytest.raises(ValueError, match="nothing but the query itself"):
        quietly(model, table[:1], table[:1], RECIPE)


def test_a_broken_file_is_named_or_skipped(model, photos):
    (photos / "broken one.jpg").write_bytes(b"no picture")
    table = picture_table(photos)
    with pytest.raises(ValueError, match=r"1 of 17 images cannot be read(.|\n)*broken one\.jpg"):
        quietly(model, table[:1], table, RECIPE)
    skipping = RECIPE.model_copy(update={"unreadable": "skip"})
    retrieval, found = quietly(model, table, table, skipping, topk=None)
    good = table[~table["path"].str.contains("broken one")]["path"].tolist()
    assert retrieval.query["path"].tolist() == retrieval.gallery["path"].tolist() == good
    itself = found[found["status"] == "query itself"]
    assert itself["path"].tolist() == itself["query_path"].tolist() == good


def test_csv_holds_every_name(model, photos):
    table = picture_table(photos)
    found = quietly(model, table, table, RECIPE, topk=3)[1]
    read = pd.read_csv(io.StringIO(search_csv(found)))
    assert list(read.columns) == ["query", "rank", "distance", "path", "status"]
    assert read["path"].tolist() == found["path"].tolist()
    assert set(read["query"]) == set(table["path"])
    assert read["rank"].fillna(0).tolist() == found["rank"].fillna(0).tolist()
    known = search_csv(found.assign(pid=4)).splitlines()[0]
    assert known == "query,rank,distance,path,status,pid"


# --- figures


@pytest.mark.slow
def test_a_picture_of_the_lists(model, photos):
    crop(60, (3000, 2000)).save(photos / "a" / "huge.png")
    names = [photos / AWKWARD[2], photos / AWKWARD[3], photos / "a" / "huge.png"]
    query = pd.concat([picture_table(name) for name in names], ignore_index=True)
    found = quietly(model, query, picture_table(photos), RECIPE, topk=4)[1]
    figure = search_lists(found.assign(status=found["status"].replace("unknown", "match")))
    figure.canvas.draw()  # would raise on a name that is read as a formula
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert sum(t == "query" for t in texts) == 3
    assert r"my photos/comma, \$x_1\$.png" in texts and "my photos/new\ufffdline.png" in texts
    assert max(np.prod(i.get_array().shape[:2]) for i in figure.axes[0].images) < 2e6
    for rank in "1234":
        assert sum(t == rank for t in texts) == 3, "ranked, neither right nor wrong"
    assert sum("query\nitself" in t for t in texts) == 3
    assert not any("AP" in t for t in texts)
    assert one_line("x" * 200).count("x") < 90 and len(one_line("x" * 200)) <= 81


# --- what distances say


def test_distances_without_labels(model, photos):
    table = picture_table(photos)
    retrieval, found = quietly(model, table[:3], table, RECIPE, topk=None)
    first, second, others = nearness(retrieval, found, queries=2)
    assert len(first) == len(second) == 2 and len(others) == 2 * (len(table) - 2)
    ranked = found[found["rank"].notna()].groupby("query")["distance"]
    assert {*first} <= {*ranked.nth(0)} and {*second} <= {*ranked.nth(1)} and (first > 0).all()
    assert f"{np.median(others):.2f} for all others" in nearness_in_words(first, second, others)
    assert "nothing to compare" in nearness_in_words(first, second[:0], others)


def test_labels_are_uncovered_afterwards(model, photos):
    table = picture_table(photos)
    table["pid"] = 1 + np.arange(len(table)) % 3
    known = table.assign(camid=1)
    _, found = quietly(model, table[:3], table, RECIPE)
    told = uncovered(found, known)
    pid = known.set_index("path")["pid"]
    top = found[found["rank"] == 1]
    same = [pid[a] == pid[b] for a, b in zip(top["query_path"], top["path"], strict=True)]
    assert told["same person"].tolist() == told["same camera"].tolist() == same
    everyone = told.assign(**{"same person": True, "same camera": True})
    assert "3 of 3 first images" in uncovered_in_words(everyone)
    assert "looks better than the scores" in uncovered_in_words(everyone)
    assert ", 0 of them from" in uncovered_in_words(told.assign(**{"same camera": False}))


# --- the command


def test_search_of_one_picture_prints_csv_alone(shell, photos, capsys):
    query = photos / AWKWARD[3]
    assert shell("--top", 3, query=query) == 0
    out, err = capsys.readouterr()
    table = pd.read_csv(io.StringIO(out))
    assert table["rank"].tolist()[1:] == [1, 2, 3] and np.isnan(table["rank"][0])
    assert table["status"][0] == "query itself" and table["path"][0] == str(query)
    assert "Warning" not in err


@pytest.mark.slow
def test_search_of_a_folder_writes_files(shell, photos, tmp_path, capsys):
    crop(50, (60, 80)).save(photos / "scene.png")
    (photos / "broken.png").write_bytes(b"")
    new = tmp_path / "new"
    files = ["--out", new / "o.csv", "--picture", new / "o.png", "--html", new / "o.html"]
    assert shell(*files, "--flip") == 1
    out, err = capsys.readouterr()
    assert out == "" and "broken.png" in err and not [*new.rglob("*")]
    assert shell(*files, "--flip", "--unreadable", "skip", "--top", 2) == 0
    out, err = capsys.readouterr()
    assert out == "" and "Unreadable, left out of the query: " in err and "broken.png" in err
    assert "Warning, query: 1 of 18 images" in err and "'scene.png' (80×60)" in err
    table = pd.read_csv(new / "o.csv")
    assert len(table) == 17 * 3 and table["rank"].max() == 2
    assert Image.open(new / "o.png").size[0] > 500
    page = (new / "o.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "UPPER.PNG" in page
    assert "17 of 17 ranked lists" in err


def test_a_picture_that_fails_does_not_cost_the_page(shell, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(photographs, "ranked_lists", lambda _: int("no picture"))
    files = [tmp_path / name for name in ("o.csv", "o.html", "o.jpg")]
    assert shell("--out", files[0], "--picture", files[2], "--html", files[1]) == 1
    assert "no picture" in capsys.readouterr().err
    assert [file.exists() for file in files] == [True, True, False]


def test_what_a_search_passes_over_is_said(shell, photos, capsys):
    for name in ("notes.txt", ".hidden.png"):
        (photos / name).write_text("no picture")
    assert shell(query=photos / "a") == 0
    out, err = capsys.readouterr()
    assert err.count("no images: .hidden.png, notes.txt.") == 1
    assert "hidden" not in out and "notes" not in out


def test_search_in_embeddings(shell, model, photos, tmp_path, capsys):
    table = picture_table(photos)
    emb = embedded(model, table)
    sides = {"query": photos / "a", "gallery": tmp_path / "g.h5"}
    write_embeddings(tmp_path / "g.h5", emb, table.assign(pid=5, camid=1))
    assert shell("--top", 1, **sides) == 0
    rows = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(rows.columns[-2:]) == ["pid", "camid"] and set(rows["pid"]) == {5}
    pytest.importorskip("faiss")
    for _ in range(2):  # the first time it is made
        assert shell("--top", 1, "--index", tmp_path / "g.flat", **sides) == 0
        assert pd.read_csv(io.StringIO(capsys.readouterr().out)).equals(rows)
    write_embeddings(tmp_path / "g.h5", emb[1:], table[1:])
    assert shell("--index", tmp_path / "g.flat", **sides) == 1
    assert "index of other embeddings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("query", "gallery", "options", "message"),
    [
        ("no.jpg", ".", [], "no image 'no.jpg'"),
        ("", ".", [], "no image ''"),
        (" ", ".", [], "no image ' '"),
        (".", "nowhere", [], "no image 'nowhere'"),
        (".", ".", ["--picture", "x.gif"], "must end in .jpg or .png"),
        (".", ".", ["--out", "."], "is no file"),
        (".", ".", ["--out", "/dev/null"], "is no file"),
        ("empty", ".", [], "holds no images"),
        (".", "g.h5", [], "no embedding file g.h5"),
        ("text.jpg", "a", [], "text.jpg: no image format that Pillow knows"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    shell, photos, capsys, monkeypatch, query, gallery, options, message
):
    monkeypatch.delenv("REID_DEBUG", raising=False)
    monkeypatch.chdir(photos)
    (photos / "empty").mkdir()
    Path("text.jpg").write_text("no picture")
    assert shell(*options, query=query, gallery=gallery) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


def test_nothing_but_the_command_draws(shell, photos, monkeypatch):
    """Without --picture and --html neither matplotlib nor widgets are needed."""
    for name in ("figures", "photographs", "browser"):
        monkeypatch.setitem(sys.modules, f"reidlib.look.{name}", None)
        monkeypatch.delattr(look, name, raising=False)
    assert shell(query=photos / "a") == 0
