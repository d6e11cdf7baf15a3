"""The folder of a run: names, atomic files, checkpoints that survive a kill at any instant."""

import hashlib
import json
import os
import re

import numpy as np
import pytest
import safetensors.torch
import torch

from reidlib import load_model, runs
from reidlib.model.weights import build_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.recipes import Recipe, make_recipe
from reidlib.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = dict(backbone="mobilenet_v3_small", hidden=16, dim=8, height=32, width=16)


def test_every_scoring_leaves_an_entry_in_the_manifest(tmp_path):
    for content in (b"query", b"other"):
        (tmp_path / "embeddings_query.h5").write_bytes(content)
        (tmp_path / "embeddings_gallery.h5").write_bytes(b"gallery")
        runs.note_scored(tmp_path, data="market1501", flip=content == b"other")
        runs.update_json(tmp_path / "manifest.json", status="finished")
    first, second = runs.read_json(tmp_path / "manifest.json")["scored"]
    assert (first["flip"], second["flip"]) == (False, True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["at"])
    for side, content in (("query", b"query"), ("gallery", b"gallery")):
        assert first["embeddings_sha256"][side] == hashlib.sha256(content).hexdigest()
    assert second["embeddings_sha256"]["query"] != first["embeddings_sha256"]["query"]


def test_names():
    recipe = make_recipe("plain", loss="batch_all", margin="soft")
    assert runs.run_name("market1501", recipe) == "market1501_batchall_softplus"
    assert runs.run_name("duke", recipe, "seed2") == "duke_batchall_softplus_seed2"
    for tag in ("a/b", "../up", "a b"):
        with pytest.raises(ValueError, match="letters, digits.* in its tag"):
            runs.run_name("duke", recipe, tag)


def test_an_unknown_run_names_those_there_are():
    with pytest.raises(FileNotFoundError, match="none yet: run 03_train first"):
        runs.find_run("x")
    folder = runs.outputs_dir() / "market1501_batchhard"
    folder.mkdir(parents=True)
    runs.write_json(folder / "config.json", {})
    with pytest.raises(FileNotFoundError, match="Runs there: market1501_batchhard"):
        runs.find_run("market1501_batchhart")
    assert runs.find_run("market1501_batchhard") == runs.find_run(folder) == folder.resolve()
    with pytest.raises(FileNotFoundError, match="its training has not ended"):
        load_model("market1501_batchhard")
    with pytest.raises(FileNotFoundError, match="No trained run"):
        runs.newest_run()


def test_the_newest_run_is_one_trained_here_or_the_example():
    def add(name, age, *files):
        (outputs_dir() / name).mkdir(parents=True)
        for file in ("weights.safetensors", *files):
            (outputs_dir() / name / file).touch()
            os.utime(outputs_dir() / name / file, (age, age))

    add("market1501_batchhard", 900)
    with pytest.raises(FileNotFoundError, match="No trained run"):
        runs.newest_run()
    add(runs.EXAMPLE, 800)
    assert runs.newest_run().name == runs.EXAMPLE
    add("new", 200, "checkpoint.pt")
    add("old", 100, "checkpoint.pt")
    assert runs.newest_run().name == "new"


@pytest.mark.skipif(os.name != "posix", reason="there are no file permissions like these")
def test_weights_may_be_read_by_others_as_any_file(tmp_path):
    model = build_model(make_recipe("demo"))
    save_weights(tmp_path / "weights.safetensors", model, make_recipe("demo"))
    (tmp_path / "any").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("weights.safetensors", "any")]
    assert modes[0] == modes[1]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        runs.write_json(path, {"a": float("nan")})

    def half(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.write_atomically(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    runs.update_json(path, b=2)
    assert runs.read_json(path) == {"a": 1, "b": 2}
    path.write_text("{")
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        runs.read_json(path)


class Killed(BaseException):
    pass


def test_a_checkpoint_survives_a_kill_between_any_two_renames(tmp_path, monkeypatch):
    """Whatever was done when the power went, the last or the new checkpoint loads."""
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint_previous.pt"
    replace, renames, last = os.replace, 0, None

    def counted(*args):
        nonlocal renames
        if renames == last:
            raise Killed
        renames += 1
        return replace(*args)

    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    monkeypatch.setattr(os, "replace", counted)
    save_checkpoint(path, {"step": 3})
    assert (load_checkpoint(path)["step"], load_checkpoint(previous)["step"]) == (3, 2)
    whole = renames
    assert whole >= 6
    for killed_at in range(whole):
        step = 10 * (killed_at + 1)
        save_checkpoint(path, {"step": step})
        renames, last = 0, killed_at
        with pytest.raises(Killed):
            save_checkpoint(path, {"step": step + 1})
        last = None
        assert load_checkpoint(path)["step"] in (step, step + 1)
        assert load_checkpoint(previous)["step"] <= step
        save_checkpoint(path, {"step": step + 2})
        assert load_checkpoint(path)["step"] == step + 2
    assert {p.suffix for p in tmp_path.iterdir()} == {".pt", ".sha256"}


def test_the_sidecar_is_what_sha256sum_reads(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    said = (tmp_path / "checkpoint.pt.sha256").read_text()
    assert said == f"{runs.sha256(path)}  checkpoint.pt\n"


def test_a_checkpoint_without_its_sidecar_or_with_code_inside_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 1})
    (tmp_path / "checkpoint.pt.sha256").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint\.pt\.sha256 beside it.*none before it"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": runs.lock})  # a function would be called by an unpickler
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)


def test_weights_travel_alone(tmp_path):
    recipe = make_recipe("demo", **SMALL)
    model = build_model(recipe)
    path = tmp_path / "model.safetensors"
    save_weights(path, model, recipe)
    loaded = load_model(path)
    assert loaded.recipe == recipe and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_model(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a model of this library.*weights=PATH"):
        load_model(path)


def test_the_seed_decides_the_first_weights_and_leaves_the_callers_numbers_alone():
    recipe = make_recipe("demo", **SMALL)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = build_model(recipe), build_model(recipe)
    other = build_model(recipe.model_copy(update={"seed": 1}))
    assert torch.equal(torch.rand(1), expected)
    a, b, c = (m.head[0].weight for m in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_weights_are_found_in_the_data_folder(data_root):
    recipe = make_recipe("demo", **SMALL)
    source = build_model(recipe)
    (data_root / "weights").mkdir(exist_ok=True)
    torch.save(source.backbone.state_dict(), data_root / "weights" / "w.pth")
    model = build_model(make_recipe("demo", **SMALL, weights="weights/w.pth", seed=9))
    a, b = (next(m.backbone.parameters()) for m in (source, model))
    assert torch.equal(a, b)
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        build_model(make_recipe("demo", **SMALL, weights="weights/v.pth"))


def test_a_broken_config_is_named(tmp_path):
    runs.write_json(tmp_path / "config.json", {"lr": "fast"})
    with pytest.raises(ValueError, match="config.json does not hold a recipe"):
        runs.read_recipe(tmp_path)
    runs.write_json(tmp_path / "config.json", Recipe().model_dump())
    assert runs.read_recipe(tmp_path) == Recipe()


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["/x/reidlib/__main__.py", "train", "--tag", "a b"],
            "python -m reidlib train --tag 'a b'",
        ),
        (["/x/bin/mine.py"], "mine.py"),
        (["/x/ipykernel_launcher.py", "-f", "/tmp/k.json"], "(in a notebook)"),
    ],
)
def test_the_manifest_tells_the_command_and_no_path_of_the_program(argv, command, monkeypatch):
    monkeypatch.setattr(runs.sys, "argv", argv)
    assert runs.environment()["command"] == command


def test_a_package_that_is_not_there_has_no_version_and_stops_nothing(monkeypatch):
    """As papermill, which a server that only trains can do without."""
    monkeypatch.setattr(runs, "PACKAGES", ("numpy", "no-such-package"))
    assert runs.environment()["packages"] == {"numpy": np.__version__, "no-such-package": None}
