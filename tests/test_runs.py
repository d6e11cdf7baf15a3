"""The folder of a run: names, atomic files, checkpoints that survive a kill at any instant."""

import hashlib
import json
import os
import re

import pytest
import torch

from reidlib import load_model, runs
from reidlib.model.weights import build_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.recipes import Recipe, make_recipe
from reidlib.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = dict(backbone="mobilenet_v3_small", hidden=16, dim=8, height=32, width=16)


def test_every_scoring_leaves_an_entry_in_the_manifest(tmp_path):
    for side in ("query", "gallery"):
        (tmp_path / f"embeddings_{side}.h5").write_bytes(side.encode())
    runs.note_scored(tmp_path, data="market1501", flip=False)
    runs.update_json(tmp_path / "manifest.json", status="finished")
    (tmp_path / "embeddings_query.h5").write_bytes(b"other")
    runs.note_scored(tmp_path, data="market1501", flip=True)
    first, second = runs.read_json(tmp_path / "manifest.json")["scored"]
    assert (first["flip"], second["flip"]) == (False, True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["at"])
    sha = hashlib.sha256(b"query").hexdigest()
    assert first["embeddings_sha256"]["query"] == sha != second["embeddings_sha256"]["query"]
    assert first["embeddings_sha256"]["gallery"] == second["embeddings_sha256"]["gallery"]


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


def test_the_newest_run_is_one_trained_here_or_the_example(places):
    def add(name, age, trained_here=True):
        folder = outputs_dir() / name
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").touch()
        os.utime(folder / "weights.safetensors", (age, age))
        if trained_here:
            (folder / "checkpoint.pt").touch()

    add("market1501_batchhard", 900, trained_here=False)
    with pytest.raises(FileNotFoundError, match="No trained run"):
        runs.newest_run()
    add(runs.EXAMPLE, 800, trained_here=False)
    assert runs.newest_run().name == runs.EXAMPLE
    add("old", 100)
    add("new", 200)
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
    path = tmp_path / "checkpoint.pt"
    previous = tmp_path / "checkpoint_previous.pt"
    replace, renames = os.replace, 0

    def count(*args):
        nonlocal renames
        renames += 1
        return replace(*args)

    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count)
        save_checkpoint(path, {"step": 3})
    assert renames >= 6
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(previous)["step"] == 2
    for last in range(renames):
        done = 0

        def dying(*args, last=last):
            nonlocal done
            if done == last:
                raise Killed
            done += 1
            return replace(*args)

        step = 10 * (last + 1)
        save_checkpoint(path, {"step": step})
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", dying)
            save_checkpoint(path, {"step": step + 1})
        assert load_checkpoint(path)["step"] in (step, step + 1)
        assert load_checkpoint(previous)["step"] <= step
        save_checkpoint(path, {"step": step + 2})
        assert load_checkpoint(path)["step"] == step + 2
    assert {p.suffix for p in tmp_path.iterdir()} == {".pt", ".sha256"}


def test_the_sidecar_is_what_sha256sum_reads(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    assert (
        tmp_path / "checkpoint.pt.sha256"
    ).read_text() == f"{runs.sha256(path)}  checkpoint.pt\n"


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


def test_weights_of_something_else_are_refused(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a model of this library.*weights=PATH"):
        load_model(tmp_path / "x.safetensors")


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
