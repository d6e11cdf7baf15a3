"""ONNX: the file computes what the model computes, alone, and says how to feed it."""

import inspect
import json
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps

from reidlib import runs
from reidlib.__main__ import main
from reidlib.data.augment import Augmentation
from reidlib.data.pixels import load_images, read_image
from reidlib.look.search import picture_table
from reidlib.model.embed import embed
from reidlib.model.weights import build_model, load_model, save_weights
from reidlib.recipes import make_recipe
from reidlib.workbook import export as room
from reidlib.workbook.export import TOLERANCE, export, network_input

pytestmark = pytest.mark.slow


def save_run(folder, **changes):
    """A run whose BatchNorms have seen images, so that embeddings of other images differ."""
    small = {"hidden": 16, "dim": 8, "height": 64, "width": 32, "hold_out": 0}
    recipe = make_recipe("demo", **small | changes)
    model = build_model(recipe).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all that it has seen
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model(torch.randn(32, 3, 64, 32, generator=generator))
    folder.mkdir(parents=True)
    runs.write_json(folder / "config.json", recipe.model_dump())
    save_weights(folder / "weights.safetensors", model, recipe)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("outputs") / "tiny")


@pytest.fixture(scope="module")
def exported(run):
    """A file and its card, exported once."""
    return export(run, run.parent / "onnx")


@pytest.fixture
def photos(tmp_path):
    """Image files: of the input's size, smaller, larger, lying on its side, grey."""
    random = np.random.default_rng(0)
    for i, size in enumerate([(64, 32), (64, 32), (40, 30), (301, 150), (500, 400)]):
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        smooth = Image.fromarray(pixels[:8, :8]).resize(size[::-1])
        exif = Image.Exif()
        exif[274] = 6 if i == 3 else 1
        smooth.convert("L" if i == 4 else "RGB").save(tmp_path / f"{i}.png", exif=exif)
    return sorted(tmp_path.glob("*.png"))


# --- what the file computes

OTHER = {"backbone": "mobilenet_v3_small", "head": False, "normalise": "unit", "last_stride": 1}
OTHER |= {"pooling_power": 3.0, "norm": True}


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_convnext", "timm:test_vit"])
def test_a_network_of_timm_as_trackers_call_it(name, tmp_path):
    """BoxMOT and OpenCV's samples: BGR crops resized to RGB, normalised outside, names not known."""
    pytest.importorskip("timm")
    run = save_run(tmp_path / "run", backbone=name)
    path, card = export(run, tmp_path / "normalised.onnx", normalised=True)
    assert not card["preprocessing"]["normalisation"]["inside_the_graph"]
    mean, std = (np.float32(card["preprocessing"]["normalisation"][k]) for k in ("mean", "std"))
    crops = np.random.default_rng(3).integers(0, 256, (5, 64, 32, 3), dtype=np.uint8)
    batch = ((crops / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    asked = [session.get_outputs()[0].name], {session.get_inputs()[0].name: batch}
    model = load_model(run)
    expected = embed(model, crops, model.recipe, show_progress=False)
    assert expected.std(axis=0).max() > 100 * card["parity"]["tolerance"]
    np.testing.assert_allclose(session.run(*asked)[0], expected, atol=card["parity"]["tolerance"])


@pytest.mark.parametrize("changes", [{}, OTHER], ids=["as usual", "other"])
def test_the_file_computes_what_the_model_computes(changes, run, exported, tmp_path):
    run = save_run(tmp_path / "other", **changes) if changes else run
    path, card = export(run, run / "model.onnx") if changes else exported
    model, allowed = load_model(run), card["parity"]["tolerance"]
    assert card["parity"]["max_abs_difference"] <= allowed
    pixels = np.random.default_rng(5).integers(0, 256, (7, 64, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        plain = Augmentation((64, 32), normalise=model.recipe.normalise).plain
        expected = model(plain(torch.from_numpy(pixels))).numpy()
    assert TOLERANCE == 1e-4 and allowed <= max(1e-4, 1e-5 * 4 * np.abs(expected).max())
    assert expected.std(axis=0).max() > 100 * allowed, "else equal embeddings would pass"
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 3, 7):  # not the batch of 2 that it was made with
        (found,) = session.run(["embeddings"], {"images": images[:size]})
        assert found.shape == (size, model.dim) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:size], atol=allowed, rtol=0)


def test_files_to_embeddings_with_numpy_and_pillow_alone(exported, photos, tmp_path):
    """The example of the docstring, in a process that can import neither torch nor reidlib."""
    path, card = exported
    example = textwrap.dedent(room.__doc__.split("copied from this file:\n\n")[1])
    example = example.replace("\nwith open", f"\n{inspect.getsource(network_input)}\nwith open", 1)
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    (tmp_path / "model.onnx.json").write_text(json.dumps(card))
    code = "import sys\nsys.modules['torch'] = sys.modules['reidlib'] = None\n"
    code += f"paths = {[str(p) for p in photos]!r}\n{example}\nnp.save('emb.npy', emb)\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    found = np.load(tmp_path / "emb.npy")

    model = load_model(path.parent.parent / "tiny")
    for photo, emb in zip(photos, found, strict=True):
        expected = embed(model, read_image(photo)[None], model.recipe, show_progress=False)[0]
        np.testing.assert_allclose(emb, expected, atol=1e-4, err_msg=photo.name)
    # A folder of many sizes, as `embed` and `search` read it, is resized in 8 bits: near, not equal.
    pixels, _ = load_images(picture_table(tmp_path), model.recipe, show_progress=False)
    folder = embed(model, pixels, model.recipe, show_progress=False)
    np.testing.assert_allclose(found[:2], folder[:2], atol=1e-4)  # those of the input's size
    moved, apart = np.linalg.norm(found - folder, axis=1), np.linalg.norm(found[0] - found[4])
    assert 0 < moved[2:].max() < 0.1 * apart


@pytest.mark.parametrize("size", [(64, 32), (40, 30), (301, 150), (65, 33), (1, 1)])
def test_network_input_is_the_librarys_resize(size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = Augmentation((64, 32), normalise="unit").plain(torch.from_numpy(image)[None])
    found = network_input(image, 64, 32)
    assert found.shape == (3, 64, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, 255 * expected[0].numpy(), atol=1e-3)
    rounded = ImageOps.exif_transpose(Image.fromarray(image)).resize((32, 64), Image.BILINEAR)
    assert np.abs(found - np.moveaxis(np.asarray(rounded), 2, 0)).max() < 1.1  # the 8-bit way


# --- what the file and the JSON say


def test_the_card(exported, run):
    path, card = exported
    assert path == run.parent / "onnx" / "tiny.onnx"
    assert json.loads((path.parent / "tiny.onnx.json").read_text()) == card
    assert card["sha256"] == runs.sha256(path)
    assert card["input"]["shape"] == ["batch", 3, 64, 32] and card["input"]["range"] == [0, 255]
    assert card["output"]["shape"] == ["batch", 8]
    assert card["preprocessing"]["normalisation"]["mean"] == [0.485, 0.456, 0.406]
    assert card["model"]["run"] == "tiny" and card["model"]["trained_on"] == "synthetic"
    assert card["model"]["weights_sha256"] == runs.sha256(run / "weights.safetensors")
    proto = onnx.load(path)
    inside = json.loads(proto.metadata_props[0].value)
    assert inside == {k: v for k, v in card.items() if k not in ("parity", "sha256")}
    (given,), (made,) = proto.graph.input, proto.graph.output
    assert (given.name, made.name) == (card["input"]["name"], card["output"]["name"])
    for value, shape in ((given, card["input"]["shape"]), (made, card["output"]["shape"])):
        assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == shape
    assert [o.version for o in proto.opset_import if not o.domain] == [card["made_with"]["opset"]]
    assert b"network.py" not in path.read_bytes(), "stack traces show paths of this machine"
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiny.onnx", "tiny.onnx.json"]


@pytest.fixture
def ready(exported, monkeypatch):
    """Spare the exporter's seconds: the graph is the one of `exported`."""
    monkeypatch.setattr(room, "_graph", lambda *_: exported[0].read_bytes())


def test_a_file_of_weights_alone_is_enough(run, ready, tmp_path):
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes((run / "weights.safetensors").read_bytes())
    one = [np.random.default_rng(2).integers(0, 256, (64, 32, 3), dtype=np.uint8)]
    path, card = export(weights, tmp_path / "new" / "folder", one)
    assert path == tmp_path / "new" / "folder" / "mine.onnx"
    assert card["parity"]["checked_on"] == "1 pictures that were given"


# --- what fails


@pytest.mark.parametrize("what", ["weights", "normalisation", "nan"])
def test_a_file_that_differs_is_never_written(run, ready, tmp_path, monkeypatch, what):
    def other(path):
        model = load_model(path)
        with torch.no_grad():
            if what == "normalisation":
                model.recipe = model.recipe.model_copy(update={"normalise": "unit"})
            else:
                model.head[3].bias[0] += torch.nan if what == "nan" else 1e-3
        return model

    monkeypatch.setattr(room, "load_model", other)
    (old := tmp_path / "old.onnx").write_text("good")
    for out in (tmp_path / "new.onnx", old):
        with pytest.raises((RuntimeError, ValueError), match="does not compute|NaN or infinity"):
            export(run, out)
    assert [*tmp_path.iterdir()] == [old] and old.read_text() == "good"


@pytest.mark.parametrize(
    ("model", "out", "pictures", "error", "message"),
    [
        ("tiny", "file", None, ValueError, "cannot be written"),
        ("tiny", "folder.onnx", None, ValueError, "cannot be written"),
        ("tiny", "x.onnx", [], ValueError, "no pictures"),
        ("nobody", "x.onnx", None, FileNotFoundError, "no run"),
        ("empty", "x.onnx", None, FileNotFoundError, r"no weights\.safetensors"),
    ],
)
def test_what_is_missing_is_named(run, ready, tmp_path, model, out, pictures, error, message):
    (tmp_path / "file").touch()
    for name in ("folder.onnx", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    place = {"tiny": run, "empty": tmp_path / "empty"}.get(model, model)
    with pytest.raises(error, match=message):
        export(place, tmp_path / out, pictures)


def test_packages_that_are_missing_are_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("REID_DEBUG", raising=False)
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["export", "--model", str(run), "--out", str(tmp_path / "x.onnx")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("pip install onnxscript onnxruntime\n")
    assert len(err.splitlines()) == 1


def test_the_command_prints_the_file_alone(run, tmp_path, photos):
    """In a process of its own: the exporter and its libraries like to talk."""
    line = [sys.executable, "-m", "reidlib", "export", "--model", str(run), "--out", "x.onnx"]
    options = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path, "timeout": 120}
    done = subprocess.run([*line, "--images", str(tmp_path)], **options)
    assert done.stdout == "x.onnx\n"
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "5 pictures that were given agree" in done.stderr and "x.onnx.json" in done.stderr
