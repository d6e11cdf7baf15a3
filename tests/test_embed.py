"""Embeddings: batches, views, devices, HDF5 files from here and from elsewhere."""

import os
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from reidlib.data.augment import Augmentation
from reidlib.data.pixels import load_images
from reidlib.model.device import autocast, pick_device, race
from reidlib.model.embed import VIEWS, embed, embed_views
from reidlib.model.stored import read_embeddings, write_embeddings
from reidlib.model.weights import build_model
from reidlib.recipes import make_recipe

RECIPE = make_recipe("demo", backbone="mobilenet_v3_small", hidden=16, dim=8, height=32, width=16)
PIXELS = np.random.default_rng(0).integers(0, 256, (13, 32, 16, 3), dtype=np.uint8)


def quietly(*args, **options):
    return embed(*args, show_progress=False, **options)


def test_the_batch_size_does_not_matter_and_rows_keep_their_order():
    model = build_model(RECIPE).train()
    whole = quietly(model, PIXELS, RECIPE)
    assert whole.shape == (13, 8) and whole.dtype == np.float32
    assert model.training, "put back as it was"
    np.testing.assert_allclose(quietly(model, PIXELS, RECIPE, batch=4), whole, atol=1e-5)
    np.testing.assert_allclose(quietly(model, PIXELS[5:6], RECIPE), whole[5:6], atol=1e-5)
    images = Augmentation((32, 16)).plain(torch.from_numpy(PIXELS))
    with torch.no_grad():
        expected = model.eval()(images).numpy()
    np.testing.assert_allclose(whole, expected, atol=1e-5)


def test_float32_is_whole_on_cuda_too_and_bfloat16_is_near_it():
    seen, before = [], torch.backends.cudnn.allow_tf32
    model, wide = build_model(RECIPE), RECIPE.model_copy(update={"height": 64, "width": 48})
    # `folded` copies the model, and its hooks with it.
    model.head[3].register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    one, two = (quietly(model, PIXELS, wide, precision=p) for p in ("float32", "bfloat16"))
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32 == before
    assert 0 < np.abs(one - two).max() < 0.1 * np.abs(one).max()


# Every kind of block, at any depth.
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small"])
def test_bfloat16_is_right_from_64x48_on(backbone):
    # Where it is wrong, memory never written shows: full of NaN here, so that it is seen.
    recipe = make_recipe("demo", backbone=backbone, width=48)
    model = build_model(recipe).eval().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 64, 48).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        full = model(images)
        for _ in range(3):
            waste = [torch.full((n,), torch.nan) for n in (10_000, 100_000, 1_000_000)]
            del waste
            with autocast(images.device, "bfloat16"):
                low = model(images).float()
            assert ((low - full).norm(dim=1) < 0.1 * full.norm(dim=1)).all()
    with pytest.raises(ValueError, match="64×48 at least, not 32×16"):
        quietly(model, PIXELS, RECIPE, precision="bfloat16")


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="no device 'gpu9'"):
        pick_device("gpu9")


def test_contenders_run_in_turn_and_the_slow_ones_drop_out():
    ran = []
    times = race({name: lambda name=name: ran.append(name) for name in "ab"}, 3, 0)
    assert ran == list("ababab")  # a round to warm up and two that count
    assert {name: len(of_one) for name, of_one in times.items()} == {"a": 2, "b": 2}
    assert len(race({"a": lambda: None}, 3)["a"]) == 3


def test_images_of_many_sizes_are_brought_to_the_recipes(tmp_path):
    from PIL import Image

    for i, size in enumerate([(10, 20), (30, 40), (16, 32)]):
        Image.new("RGB", size, "blue").save(tmp_path / f"{i}.png")
    table = pd.DataFrame({"path": [str(p) for p in tmp_path.glob("*.png")], "pid": 1, "camid": -1})
    pixels, kept = load_images(table, RECIPE, show_progress=False)
    assert pixels.shape == (3, 32, 16, 3) and len(kept) == 3
    pixels, kept = load_images(table, RECIPE, False, training=True)
    assert pixels.shape == (3, 36, 18, 3) and len(kept) == 3  # 32×16 enlarged by 1.125


TABLE = pd.DataFrame({"path": ["a/ü.jpg", "b.jpg"], "pid": [-1, 7], "camid": [1, 2]})


def test_files_keep_everything(tmp_path):
    emb = np.random.default_rng(0).random((2, 5), np.float32)
    write_embeddings(tmp_path / "deep" / "e.h5", emb, TABLE)
    found, table = read_embeddings(tmp_path / "deep" / "e.h5")
    np.testing.assert_array_equal(found, emb)
    pd.testing.assert_frame_equal(table[TABLE.columns], TABLE, check_dtype=False)
    with h5py.File(tmp_path / "deep" / "e.h5") as file:
        assert {*file} == {"emb", "pid", "camid", "path"}
        assert file["emb"].dtype == np.float32 and file["pid"].dtype == np.int64
        assert h5py.check_string_dtype(file["path"].dtype).encoding == "utf-8"
    with pytest.raises(ValueError, match="3 embeddings do not belong to a table of 2"):
        write_embeddings(tmp_path / "x.h5", np.zeros((3, 5)), TABLE)


EMB = {"emb": np.ones((2, 3), np.float16)}


# fmt: off
OTHERS = [
    (EMB, "0002,x/1.jpg\n-1,ü.jpg\n", ["1.jpg", "ü.jpg"]),
    (EMB | {"pid": [2, -1]}, "", ["", ""]),
    (EMB | {"pid": [2, -1], "path": np.array([b"a", b"bc"])}, "", ["a", "bc"]),
    (EMB, "0002,x/1.jpg\n", "has 2 embeddings, the list of images 1 rows"),
    (EMB, "", "does not say who is in its images.*CSV"),
    (EMB | {"pid": [1, 2, 3]}, "", "different lengths: .*2.*3"),
    ({"features": np.ones((2, 3))}, "", "no dataset 'emb'"),
    ({"emb": np.ones(3)}, "", r"must be \(N, D\) floats"),
    ({"emb": np.ones((2, 3), int), "pid": [1, 2]}, "", r"must be \(N, D\) floats"),
]
# fmt: on


@pytest.mark.parametrize(("content", "csv", "expected"), OTHERS)
def test_files_of_other_toolkits(tmp_path, content, csv, expected):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for key, value in content.items():
            file[key] = value
    (tmp_path / "list.csv").write_text(csv)
    files = [tmp_path / "x.h5"] + [tmp_path / "list.csv"] * bool(csv)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_embeddings(*files)
    else:
        emb, table = read_embeddings(*files)
        np.testing.assert_array_equal(emb, content["emb"])
        assert [Path(path).name for path in table["path"]] == expected
        assert table["pid"].tolist() == [2, -1] and (table["camid"] == -1).all()


def test_broken_and_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no embedding file"):
        read_embeddings(tmp_path / "no.h5")
    (tmp_path / "x.h5").write_text("text")
    with pytest.raises(ValueError, match="x.h5 cannot be read as HDF5"):
        read_embeddings(tmp_path / "x.h5")


def virtual(secret):
    """A virtual dataset whose numbers lie in another file."""
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource(secret, "emb", (2, 3))
    return layout


def instead(*made, **options):
    """Puts another dataset there."""
    return lambda file, key, _: file.create_dataset(key, *made, **options)


# What a dataset is replaced by, given the file, its name, and another file.
# fmt: off
STRANGE = {
    "other signs": ("emb", lambda file, *_: file["emb"].write_direct(-file["emb"][()])),
    "other people": ("pid", lambda file, *_: file["pid"].write_direct(file["pid"][()] + 1)),
    "other names": ("path", lambda file, *_: file["path"].__setitem__(0, b"other.jpg")),
    "group": ("pid", lambda file, key, _: file.create_group(key)),
    "scalar": ("pid", instead(data=7)),
    "text": ("pid", instead(data=[b"x", b"y"])),
    "below": ("pid", instead(data=[-2, 1])),
    "complex": ("camid", instead(data=[1j, 2.0])),
    "bomb": ("emb", instead((2, 10**8), "f4", compression="gzip")),
    "parts": ("pid", instead(data=[1.5, 2.0])),
    "NaN": ("camid", instead(data=[np.nan, 2.0])),
    "columns": ("camid", instead(data=np.ones((2, 2), int))),
    "short": ("camid", instead(data=[1])),
    "numbers": ("path", instead(data=[1, 2])),
    "empty": ("path", instead(data=h5py.Empty("f4"))),
    "dead link": ("pid", lambda file, key, _: file.__setitem__(key, h5py.SoftLink("/nowhere"))),
    "link": ("emb", lambda file, key, far: file.__setitem__(key, h5py.ExternalLink(far, key))),
    "storage": ("path", lambda file, key, far: file.create_dataset(key, (2,), "S9", external=[(far, 0, 18)])),
    "virtual": ("emb", lambda file, key, far: file.create_virtual_dataset(key, virtual(far))),
}
# fmt: on


@pytest.mark.parametrize("what", STRANGE)
def test_files_that_are_altered_or_hold_something_else_are_refused(tmp_path, what):
    """Nor is anything read that lies in another file of this machine."""
    write_embeddings(tmp_path / "x.h5", np.ones((2, 3)), TABLE)
    write_embeddings(tmp_path / "secret.h5", np.ones((2, 3)), TABLE)
    key, strange = STRANGE[what]
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        if not what.startswith("other"):
            del file[key]
        strange(file, key, str(tmp_path / "secret.h5"))
    with pytest.raises(ValueError, match="x.h5 cannot be read as HDF5 .*: .* Make it again"):
        read_embeddings(tmp_path / "x.h5")


def test_names_that_are_no_utf8_and_broken_networks(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    write_embeddings(tmp_path / "x.h5", np.ones((2, 3)), TABLE.assign(path=[name, "b.jpg"]))
    assert read_embeddings(tmp_path / "x.h5")[1]["path"].tolist() == [name, "b.jpg"]
    model = build_model(RECIPE)
    with torch.no_grad():
        model.head[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity.*damaged"):
        quietly(model, PIXELS, RECIPE)
    with pytest.raises(ValueError, match="precision = 'fp16': choose float32 or bfloat16"):
        quietly(model, PIXELS, RECIPE, precision="fp16")


# --- views of an image, for test-time augmentation


@torch.no_grad()
def crops_by_hand(model, pixels, mirrored):
    """Five crops one at a time: resize, normalise, cut, flip, embed."""
    large = Augmentation((36, 18)).plain(torch.from_numpy(pixels))  # 32×16 enlarged by 1.125
    total = 0
    for top, left in [(0, 0), (0, 2), (4, 0), (4, 2), (2, 1)]:
        crop = large[:, :, top : top + 32, left : left + 16]
        total = total + model.eval()(crop.flip(3) if mirrored else crop)
    return (total / 5).numpy()


def test_views_are_the_image_its_mirror_and_five_crops_of_both():
    layers = torch.nn.Conv2d(3, 6, 5, stride=3), torch.nn.ReLU(), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6 * 10 * 4, 8)).train()
    pixels = np.random.default_rng(1).integers(0, 256, (7, 40, 20, 3), dtype=np.uint8)
    views = embed_views(model, pixels, RECIPE, batch=3, show_progress=False)
    assert model.training and tuple(views) == VIEWS
    assert all(v.shape == (7, 8) and v.dtype == np.float32 for v in views.values())
    expected = {
        "plain": quietly(model, pixels, RECIPE),
        "mirrored": quietly(model, np.ascontiguousarray(pixels[:, :, ::-1]), RECIPE),
        "crops": crops_by_hand(model, pixels, mirrored=False),
        "mirrored crops": crops_by_hand(model, pixels, mirrored=True),
    }
    scale = np.abs(expected["plain"] - expected["crops"]).max()
    assert scale > 0.01
    for name, view in views.items():
        np.testing.assert_allclose(view, expected[name], atol=1e-3 * scale, err_msg=name)
    flip = quietly(model, pixels, RECIPE, flip=True, batch=3)
    np.testing.assert_array_equal(flip, (views["plain"] + views["mirrored"]) / 2)


def halves(seen):
    """A network that embeds the left and the right half, and notes how many images it is shown."""
    layers = torch.nn.Conv2d(3, 1, 1), torch.nn.AdaptiveAvgPool2d((1, 2)), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers)
    model.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))  # of copies, too
    return model


PASSES = [(["plain"], 1.125, 1), (["mirrored", "plain"], 1.125, 2), (["mirrored crops"], 1.125, 5)]
PASSES += [(VIEWS, 1.125, 12), (VIEWS, 1.0, 4)]


@pytest.mark.parametrize(("names", "enlarge", "passes"), PASSES)
def test_no_view_is_computed_that_was_not_asked_for(names, enlarge, passes):
    seen, recipe = [], RECIPE.model_copy(update={"enlarge": enlarge})
    views = embed_views(halves(seen), PIXELS, recipe, names, batch=5, show_progress=False)
    assert tuple(views) == tuple(names) and sum(seen) == 13 * passes
    for one, other in (("plain", "mirrored"), ("crops", "mirrored crops")):
        if {one, other} <= {*names}:
            np.testing.assert_allclose(views[one], views[other][:, ::-1], atol=1e-5)
    if enlarge == 1:  # no room to crop
        np.testing.assert_array_equal(views["crops"], views["plain"])


WRONG = [(PIXELS, [], "choose some of plain, mirrored, crops, mirrored crops")]
WRONG += [(PIXELS, ["plain", "flip"], "choose some of plain"), (PIXELS[:0], VIEWS, "no images")]


@pytest.mark.parametrize(("images", "names", "message"), WRONG)
def test_views_that_there_are_not(images, names, message):
    with pytest.raises(ValueError, match=message):
        embed_views(halves([]), images, RECIPE, names, show_progress=False)
