"""The folder of a run: names, atomic files, checkpoints that survive a kill at any instant."""

import errno
import hashlib
import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
import safetensors.torch
import torch

from reidlib import load_model, runs
from reidlib.model.weights import build_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.recipes import Recipe, located, make_recipe
from reidlib.training.checkpoint import load_checkpoint, save_checkpoint

SMALL = dict(backbone="mobilenet_v3_small", hidden=16, dim=8, height=32, width=16)


def test_names():
    recipe = make_recipe("plain", loss="batch_all", margin="soft")
    assert runs.run_name("market1501", recipe) == "market1501_batchall_softplus"
    assert runs.run_name("duke", recipe, "seed2") == "duke_batchall_softplus_seed2"
    assert runs.run_name("duke", recipe, 7) == "duke_batchall_softplus_7"
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
    add("replaced~before1", 300, "checkpoint.pt")  # its successor has no weights yet
    add("row", 400, "checkpoint.pt")
    runs.write_json(outputs_dir() / "row" / "manifest.json", {runs.COMPARED: True})
    assert runs.newest_run().name == "new"
    for name in ("new", "old"):
        (outputs_dir() / name / "checkpoint.pt").unlink()
    assert runs.newest_run().name == runs.EXAMPLE
    (outputs_dir() / runs.EXAMPLE / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="rows of a comparison you can open by name"):
        runs.newest_run()


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


ODD = ["null", "[]", '"x"', "true", "-1", "1e999", "1e30"]  # for a number; and for text:
NO_TEXT = ["null", "[]", "{}", "3", "true"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a", one) for one in ["{", "[]", "null", "3", "", '{"a": NaN}', b"\xff\xfe{}", "[" * 99999]]
    + [("metrics", f'{{"{key}": {odd}}}') for key in ("mAP", "queries") for odd in ODD]
    + [("metrics", f'{{"baselines": {{"untrained": {{"top1": {odd}}}}}}}') for odd in ODD]
    + [("metrics", f'{{"{key}": []}}') for key in ("held_out", "baselines", "with_flips")]
    + [("manifest", f'{{"{key}": {odd}}}') for key in ("step", "wall_seconds") for odd in ODD[:6]]
    + [("manifest", f'{{"{key}": {odd}}}') for key in ("status", "reproduce") for odd in NO_TEXT]
    + [("manifest", f'{{"health": {odd}}}') for odd in ("null", "3", '["x"]', '[{"name": "x"}]')],
)
def test_json_of_another_shape_names_its_file(tmp_path, name, text):
    path = tmp_path / f"{name}.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ValueError, match=f"{name}.json is not (valid JSON|as it was written).* Restore it"
    ):
        runs.read_json(path)


def test_a_pipe_is_no_file_of_a_run(tmp_path):
    os.mkfifo(path := tmp_path / "manifest.json")
    with pytest.raises(FileNotFoundError, match="no file .*manifest.json"):
        runs.read_json(path)
    with pytest.raises(ValueError, match="manifest.json is there, and is no file"):
        runs.write_json(path, {})


def test_what_json_lacks_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1}}')
    content = runs.read_json(path)
    for missing in (lambda: content["c"], lambda: content["a"]["c"]):
        with pytest.raises(ValueError, match="a.json has no 'c'. Restore it"):
            missing()
    assert content == {"a": {"b": 1}} and content.get("c") is None


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
    said = (tmp_path / "checkpoint.pt.sha256").read_text()
    assert said == f"{runs.sha256(path)}  checkpoint.pt\n", "as sha256sum reads it"


def test_a_checkpoint_without_its_sidecar_or_with_code_inside_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 1})
    (tmp_path / "checkpoint.pt.sha256").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint\.pt\.sha256 beside it.*No other is whole"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": runs.lock})  # a function would be called by an unpickler
    with pytest.raises(ValueError, match=r"it holds reidlib.runs.lock beside tensors"):
        load_checkpoint(path)


def test_a_full_disk_is_told_and_loses_no_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full(file, content):
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_bytes", full)
        with pytest.raises(OSError, match=r"disk is full: no room for .*checkpoint.pt \(it needs"):
            save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1 and not [*tmp_path.glob(".*")]
    # The sidecar now lists two digests; the one that is there is known all the same.
    save_checkpoint(path, {"step": 3})
    previous = load_checkpoint(tmp_path / "checkpoint_previous.pt")
    assert (load_checkpoint(path)["step"], previous["step"]) == (3, 1)


def test_who_takes_the_lock_sweeps_away_what_killed_processes_left(tmp_path):
    ours, gone = (tmp_path / f".a.pt.{pid}.tmp" for pid in (os.getpid(), 2**22 + 1))
    for file in (ours, gone, tmp_path / ".a.b.tmp", tmp_path / "a.tmp"):
        file.touch()
    (tmp_path / ".release-x" / "y").mkdir(parents=True)
    with runs.lock(tmp_path):
        assert {p.name for p in tmp_path.iterdir()} == {".lock", ours.name, ".a.b.tmp", "a.tmp"}


def test_weights_travel_alone_and_altered_ones_are_refused(tmp_path):
    recipe = make_recipe("demo", **SMALL)
    model, path = build_model(recipe), tmp_path / "weights.safetensors"
    save_weights(path, model, recipe)
    loaded, good = load_model(path), path.read_bytes()
    assert loaded.recipe == recipe and not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    start = 8 + int.from_bytes(good[:8], "little")
    one_bit = bytearray(good)
    one_bit[(start + len(good)) // 2] ^= 0x40
    path.write_bytes(good[:-10])
    with pytest.raises(ValueError, match="weights.safetensors cannot be read"):
        load_model(path)
    other_size = good.replace(rb"\"width\": 16", rb"\"width\": 32")
    for bad in (bytes(one_bit), good[:-65536] + bytes(65536), other_size):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="cannot be read: it is altered: its numbers"):
            load_model(path)
    # Whole in itself, and of another run.
    save_weights(path, build_model(recipe.model_copy(update={"seed": 1})), recipe)
    digest = hashlib.sha256(good).hexdigest()
    manifest = {"status": "finished", "weights_sha256": digest}
    runs.write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(ValueError, match="altered, or of another run: .*manifest.json"):
        load_model(path)
    path.write_bytes(good)
    load_model(path)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="not a model of this library.*weights=PATH"):
        load_model(foreign)
    old = {"reidlib_recipe": recipe.model_dump_json()}
    safetensors.torch.save_file(model.state_dict(), tmp_path / "old.safetensors", old)
    assert load_model(tmp_path / "old.safetensors").recipe == recipe
    for bad, said in ((torch.nan, "has NaN"), (torch.inf, "has NaN or infinity in 1 of")):
        torch.nn.init.constant_(model.head[0].bias, bad)
        save_weights(tmp_path / "bad.safetensors", model, recipe)
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path / "bad.safetensors")


def test_a_run_starts_from_a_trained_one_with_its_head_if_that_fits(tmp_path):
    recipe, path = make_recipe("demo", **SMALL, norm=True), tmp_path / "weights.safetensors"
    source = build_model(recipe)
    torch.nn.init.uniform_(source.norm.running_mean)
    save_weights(path, source, recipe)
    for change, same in (({}, True), ({"dim": 9}, False), ({"norm": False}, False)):
        changes = SMALL | {"norm": True, "weights": str(path), "seed": 9} | change
        model = build_model(make_recipe("demo", **changes))
        for a, b in zip(source.backbone.parameters(), model.backbone.parameters(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(source.head[0].weight, model.head[0].weight) == same
        if "norm" not in change:
            assert torch.equal(source.norm.running_mean, model.norm.running_mean) == same


def test_a_run_starts_from_another_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("REID_OUTPUTS", str(tmp_path))
    recipe = make_recipe("demo", **SMALL)
    source, folder = build_model(recipe), tmp_path / "a_run"
    folder.mkdir()
    runs.write_json(folder / "config.json", recipe.model_dump())
    changes = SMALL | {"weights": "a_run", "seed": 9}
    with pytest.raises(FileNotFoundError, match="no file of weights 'a_run'.*has not ended"):
        build_model(make_recipe("demo", **changes))
    save_weights(folder / "weights.safetensors", source, recipe)
    model = build_model(make_recipe("demo", **changes))
    assert torch.equal(source.head[0].weight, model.head[0].weight)
    assert located(make_recipe("demo", **changes)).weights == "a_run"


def test_a_run_starts_from_the_mean_of_several(tmp_path, monkeypatch):
    monkeypatch.setenv("REID_OUTPUTS", str(tmp_path))
    sources = []
    for seed in range(3):
        recipe = make_recipe("demo", **SMALL, seed=seed)
        sources.append(build_model(recipe))
        sources[-1].head[1].num_batches_tracked += seed
        (tmp_path / f"run{seed}").mkdir()
        runs.write_json(tmp_path / f"run{seed}" / "config.json", recipe.model_dump())
        weights = tmp_path / f"run{seed}" / "weights.safetensors"
        save_weights(weights, sources[-1], recipe, half=seed == 2)
    changes = SMALL | {"weights": "run0, run1,run2", "seed": 9}
    mean = build_model(make_recipe("demo", **changes)).state_dict()
    states = [source.state_dict() for source in sources]
    for name, tensor in mean.items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-3)
    other = make_recipe("demo", **SMALL | {"dim": 9})
    save_weights(tmp_path / "other.safetensors", build_model(other), other)
    changes["weights"] = f"run0,{tmp_path / 'other.safetensors'}"
    with pytest.raises(ValueError, match="of different networks: there is no mean"):
        build_model(make_recipe("demo", **changes))


@pytest.mark.parametrize(
    ("then", "now", "refused"), [(0, 20, True), (10, 20, True), (20, 20, False)]
)
def test_weights_that_know_the_held_out_people_are_refused(tmp_path, then, now, refused):
    path, recipe = tmp_path / "weights.safetensors", make_recipe("demo", **SMALL, hold_out=then)
    save_weights(path, build_model(recipe), recipe)
    later = make_recipe("demo", **SMALL, hold_out=now, weights=str(path))
    with pytest.raises(ValueError, match="may know the people") if refused else nullcontext():
        build_model(later)
    build_model(later.model_copy(update={"dataset": "elsewhere"}))
    build_model(later.model_copy(update={"hold_out": 0}))


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
        (["/x/reidlib/__main__.py", "run", "a b"], "python -m reidlib run 'a b'"),
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
