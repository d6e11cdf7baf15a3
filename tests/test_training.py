"""Training: killed and resumed bit for bit, stopped, refused, failing in plain words."""

import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reidlib import load_model, runs
from reidlib.model.device import resolve_precision
from reidlib.model.weights import build_model
from reidlib.paths import ROOT, outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training import loop
from reidlib.training.checkpoint import load_checkpoint
from reidlib.training.journal import TrainingFailed
from reidlib.training.loop import train

SMALL = dict(
    backbone="mobilenet_v3_small",
    hidden=32,
    dim=16,
    height=32,
    width=16,
    p=4,
    k=2,
    steps=12,
    precision="float32",
    hold_out=3,
    log_every=1,
    checkpoint_every=4,
    evaluate_every=6,
)


def small(**changes):
    return make_recipe("demo", **(SMALL | changes))


def fit(tag="", resume="auto", **changes):
    return train(small(**changes), tag, resume=resume, device="cpu", show_progress=False)


def differences(a, b, path="") -> list[str]:
    """Names of all entries that are not the same to the last bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [path]


def final_state(folder):
    """The last checkpoint without what the clock put into it."""
    state = load_checkpoint(folder / "checkpoint.pt")
    assert state["step"] == 12
    assert {"model", "optimiser", "sampler", "augmentation", "torch_random"} < state.keys()
    del state["seconds"]
    for row in state["history"]:
        del row["seconds"], row["images_per_s"]
    return state


# Trains in a process of its own that sends itself a signal in the middle of a step.
CHILD = """
import os, sys
from reidlib.training import loop
from reidlib.recipes import Recipe
recipe, tag, step, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
loss, calls = loop.LOSSES["batch_hard"], 0
def signalled(*args, **options):
    global calls
    calls += 1
    if calls == step:
        os.kill(os.getpid(), number)
    return loss(*args, **options)
loop.LOSSES["batch_hard"] = signalled
loop.train(Recipe.model_validate_json(recipe), tag, device="cpu", show_progress=False)
"""


def fit_and_signal(tag, step, number, **changes):
    """Train in another process, and return how it ended (a negative status: the signal killed it)."""
    command = [sys.executable, "-c", CHILD, small(**changes).model_dump_json(), tag]
    return subprocess.run(
        [*command, str(step), str(number)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=300,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_root):
    """The folder of a run of twelve steps that nothing disturbed, trained once."""
    outputs = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATA", str(data_root))
        patch.setenv("REID_CACHE", str(data_root / ".cache"))
        patch.setenv("REID_OUTPUTS", str(outputs))
        return fit("whole")


def test_a_killed_run_resumes_bit_for_bit(whole):
    expected = final_state(whole)
    for step in (2, 7, 12):  # before the first checkpoint; between two; in the last step
        tag = f"killed_at_{step}"
        assert fit_and_signal(tag, step, signal.SIGKILL).returncode == -signal.SIGKILL
        folder = runs.find_run(f"synthetic_batchhard_softplus_{tag}")
        assert not (folder / "weights.safetensors").exists()
        assert (folder / "checkpoint.pt").exists() == (step > 4)
        assert differences(expected, final_state(fit(tag))) == []
        a = (folder / "weights.safetensors").read_bytes()
        assert a == (whole / "weights.safetensors").read_bytes()
        columns = ["seconds", "images_per_s"]
        history, other = (
            pd.read_csv(f / "history.csv").drop(columns=columns) for f in (folder, whole)
        )
        pd.testing.assert_frame_equal(history, other, check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["sampler", "augmentation", "optimiser"])
def test_negative_control_a_forgotten_state_shows(whole, lost, monkeypatch):
    """What the comparison above relies on: without one of the states the bytes do differ."""
    expected = final_state(whole)
    fit_until("part", 7, monkeypatch)
    load_state = loop.State.load_state_dict

    def forgetful(state, saved):
        load_state(state, saved | {lost: state.state_dict()[lost]})

    monkeypatch.setattr(loop.State, "load_state_dict", forgetful)
    folder = fit("part")
    assert any(d.startswith("/model") for d in differences(expected, final_state(folder)))


def fit_until(tag, step, monkeypatch, **changes):
    """Train in this process and break off in the middle of a step, as a crash would."""

    class Crash(Exception):
        pass

    loss, calls = loop.LOSSES["batch_hard"], 0

    def crashing(*args, **options):
        nonlocal calls
        calls += 1
        if calls == step:
            raise Crash
        return loss(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setitem(loop.LOSSES, "batch_hard", crashing)
        fit(tag, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_asked_to_stop_it_ends_the_step_and_writes_a_checkpoint(whole, number, status):
    done = fit_and_signal("stopped", 6, number)
    assert done.returncode in (status, 1, 130), done.stderr
    assert "Stopped after step 6 of 12; run it again to go on." in done.stdout
    folder = runs.find_run("synthetic_batchhard_softplus_stopped")
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 6
    assert runs.read_json(folder / "manifest.json")["status"] == "stopped"
    assert differences(final_state(whole), final_state(fit("stopped"))) == []


@pytest.mark.slow
def test_tensorboard_shows_no_step_twice_after_a_resume(monkeypatch):
    fit_until("crashed", 7, monkeypatch)
    folder = fit("crashed")
    assert len([*folder.glob("events.out.tfevents.*")]) == 2
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    board.Reload()
    scalars = board.Tags()["scalars"]
    assert {"loss", "active", "lr", "images_per_s", "distance/positive_p50", "norm"} <= {*scalars}
    for name in scalars:
        steps = [event.step for event in board.Scalars(name)]
        expected = [6, 12] if name.startswith("held_out/") else [*range(1, 13)]
        assert steps == expected, name
    assert {"distance/positive", "distance/negative"} <= {*board.Tags()["histograms"]}


@pytest.mark.slow
def test_a_truncated_or_altered_checkpoint_is_refused_and_the_one_before_offered(
    whole, monkeypatch
):
    expected = final_state(whole)
    fit_until("broken", 11, monkeypatch)
    folder = runs.find_run("synthetic_batchhard_softplus_broken")
    path = folder / "checkpoint.pt"
    good = path.read_bytes()
    for bad in (good[:-100], good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], b""):
        path.write_bytes(bad)
        message = 'checkpoint.pt is truncated or altered.*checkpoint_previous.pt.*resume="previous"'
        with pytest.raises(ValueError, match=message):
            fit("broken")
    assert load_checkpoint(folder / "checkpoint_previous.pt")["step"] == 4
    assert differences(expected, final_state(fit("broken", resume="previous"))) == []


def test_other_settings_are_refused_and_named(monkeypatch):
    fit_until("a", 6, monkeypatch)
    with pytest.raises(ValueError, match=r"other settings \(lr: 0.001 there, 0.002 now\)"):
        fit("a", lr=0.002)
    with pytest.raises(ValueError, match="hold_out: 3 there, 4 now"):
        fit("a", hold_out=4)


@pytest.mark.slow
def test_a_finished_run_is_kept():
    folder = fit("done")

    def content():
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    before = content()
    assert fit("done") == folder
    assert content() == before
    with pytest.raises(FileExistsError, match="Give another tag"):
        fit("done", resume="never")
    fit("done", resume="restart", seed=1)
    assert (folder / "weights.safetensors").read_bytes() != before["weights.safetensors"]


def test_restart_leaves_nothing_of_a_run_before(whole):
    """A checkpoint that stayed would be taken for one of the new run, were that killed early."""
    folder = outputs_dir() / "synthetic_batchhard_softplus_again"
    for kept in ("manifest.json", "checkpoint.pt"):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        if kept == "checkpoint.pt":
            (folder / "manifest.json").unlink()
            for resume in ("auto", "never"):
                with pytest.raises(ValueError, match="no manifest.json, so nobody can say"):
                    fit("again", resume)
        fit("again", resume="restart", steps=2, hold_out=0)
        assert load_checkpoint(folder / "checkpoint.pt")["step"] == 2
        assert not [*folder.glob("checkpoint_*")] and not (folder / "metrics.json").exists()


@pytest.mark.slow
def test_two_processes_cannot_write_one_run():
    folder = outputs_dir() / "synthetic_batchhard_softplus_locked"
    message = "Another process is writing .*_locked"
    with runs.lock(folder), pytest.raises(RuntimeError, match=message):
        fit("locked", steps=1, hold_out=0)
    assert fit("locked", steps=1, hold_out=0) == folder


def test_a_loss_that_is_not_finite_stops_with_advice():
    with pytest.raises(
        TrainingFailed, match=r"NaN or infinite.*lower learning rate \(now lr = 1e\+18"
    ):
        fit("nan", lr=1e18, checkpoint_every=1)
    folder = runs.find_run("synthetic_batchhard_softplus_nan")
    assert runs.read_json(folder / "manifest.json")["status"] == "failed"
    if (folder / "checkpoint.pt").exists():
        state = load_checkpoint(folder / "checkpoint.pt")["model"]
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.slow
@pytest.mark.parametrize(("margin", "sits"), [("soft", "ln 2 = 0.693"), (0.5, "the margin, 0.5")])
def test_a_collapse_is_said_in_plain_words(monkeypatch, capsys, margin, sits):
    build = build_model

    def collapsed(*args, **options):
        model = build(*args, **options)
        torch.nn.init.zeros_(model.head[-1].weight)
        return model

    monkeypatch.setattr(loop, "build_model", collapsed)
    folder = fit("collapsed", margin=margin, steps=60, log_every=4, lr=1e-9, hold_out=0)
    (finding,) = runs.read_json(folder / "manifest.json")["health"]
    assert finding["name"] == "collapsed" and sits in finding["evidence"]
    assert finding["says"] in capsys.readouterr().err


def test_precision_follows_the_device_and_the_input():
    cpu = torch.device("cpu")
    choose = lambda **changes: resolve_precision(make_recipe("demo", **changes), cpu)
    assert choose(height=64, width=32).precision == "float32"
    assert choose(width=48).precision in ("float32", "bfloat16")
    assert choose(precision="bfloat16", width=48).precision == "bfloat16"
    with pytest.raises(ValueError, match='64×48 at least, not 64×32: use precision = "float32"'):
        choose(precision="bfloat16", width=32)


@pytest.mark.parametrize(
    ("can", "told"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, False),
        ({"sve": True}, False),  # another architecture: nothing is known
    ],
)
def test_emulated_bfloat16_is_told(can, told, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    for precision in ("bfloat16", "auto", "float32"):
        recipe = small(height=64, width=48, precision=precision)
        loop.prepare(recipe, device="cpu", show_progress=False)
        expected = told and precision == "bfloat16"
        assert ("no instructions for bfloat16" in capsys.readouterr().err) == expected


def test_the_run_explains_itself(whole, monkeypatch):
    folder = whole
    monkeypatch.setenv("REID_OUTPUTS", str(folder.parent))
    manifest = runs.read_json(folder / "manifest.json")
    assert manifest["status"] == "finished" and manifest["step"] == manifest["steps"] == 12
    assert manifest["train_identities"] == 12 - 3 and manifest["images_seen"] == 12 * 8
    assert manifest["packages"]["torch"] and manifest["device"] and manifest["seed"] == 0
    assert runs.read_recipe(folder) == small()
    history = pd.read_csv(folder / "history.csv")
    assert history["step"].tolist() == [*range(1, 13)]
    assert history["held_out_mAP"].notna().sum() == 2
    best = runs.read_json(folder / "metrics.json")["held_out"]["best"]
    assert best["mAP"] == history["held_out_mAP"].max()
    assert load_checkpoint(folder / "checkpoint_best.pt")["step"] == best["step"]
    expected = load_checkpoint(folder / "checkpoint.pt")["model"]
    for source in (folder, folder.name, folder / "weights.safetensors"):
        model = load_model(source)
        assert not model.training and model.recipe == small()
        assert differences(expected, model.state_dict()) == []


@pytest.mark.parametrize("loss", ["batch_all", "random"])
@pytest.mark.parametrize("margin", ["soft", 0.3])
def test_every_loss_trains(loss, margin):
    folder = fit(loss=loss, margin=margin, steps=2, hold_out=0)
    name = loss.replace("_", "") + ("_softplus" if margin == "soft" else "")
    assert folder.name == f"synthetic_{name}"
    assert pd.read_csv(folder / "history.csv")["loss"].gt(0).all()


@pytest.mark.slow
def test_the_loss_goes_down():
    settings = dict(backbone="resnet8", p=8, k=4, steps=60, loss="batch_all", mean="valid")
    folder = fit("learns", **settings, margin=1.0, hold_out=0)
    loss = pd.read_csv(folder / "history.csv")["loss"]
    assert loss[-5:].mean() < 0.7 * loss[:5].mean()


def test_any_folder_of_identities_trains_and_names_its_run(tmp_path, data_root):
    from PIL import Image

    for path in (data_root / "synthetic" / "bounding_box_train").iterdir():
        place = tmp_path / "my people" / f"person {path.name[:4]}" / f"é {path.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((50 + len(place.parent.name), 90)).save(place)
    folder = fit(dataset=str(tmp_path / "my people"), steps=2, p=3, hold_out=0)
    assert folder.name == "my-people_batchhard_softplus"
    assert runs.read_json(folder / "manifest.json")["train_identities"] == 6


def test_too_few_identities_are_an_error_before_anything_is_written():
    with pytest.raises(ValueError, match="P = 10 identities, the data has 9"):
        fit("few", p=10)
    assert not (outputs_dir() / "synthetic_batchhard_softplus_few").exists()


def test_a_released_run_is_not_trained_over(capsys):
    folder = fit("released", steps=2, hold_out=0)
    for file in folder.glob("checkpoint*"):
        file.unlink()
    before = (folder / "weights.safetensors").stat().st_mtime_ns
    assert fit("released", steps=2, hold_out=0) == folder
    told = capsys.readouterr().out
    assert "was trained before" in told and "give another tag" in told
    assert (folder / "weights.safetensors").stat().st_mtime_ns == before
    (folder / "weights.safetensors").unlink()
    fit("released", steps=2, hold_out=0)
    assert (folder / "weights.safetensors").is_file()
