"""Training: killed and resumed bit for bit, stopped, refused, failing in plain words."""

import hashlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reidlib import load_model, runs
from reidlib.look import live
from reidlib.model.device import resolve_precision
from reidlib.model.weights import build_model
from reidlib.paths import ROOT, outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training import journal, loop
from reidlib.training.checkpoint import load_checkpoint
from reidlib.training.loop import train

SMALL = dict(backbone="mobilenet_v3_small", hidden=32, dim=16, height=32, width=16, p=4, k=2)
SMALL |= dict(steps=12, precision="float32", hold_out=3)
SMALL |= dict(log_every=1, checkpoint_every=4, evaluate_every=6)
RUN = "synthetic_batchhard_softplus_{}"
QUICK = dict(steps=2, hold_out=0)


def small(**changes):
    return make_recipe("demo", **(SMALL | changes))


def fit(tag="", resume="auto", **changes):
    return train(small(**changes), tag, resume=resume, device="cpu", show_progress=False)


def leaves(tree, path=""):
    """All entries of a state by their path; they are equal where they are the same to the last bit."""
    if isinstance(tree, torch.Tensor):
        return {path: (tree.dtype, hashlib.sha256(tree.numpy().tobytes()).hexdigest())}
    if not isinstance(tree, dict | list | tuple):
        return {path: repr(tree)}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in items for k, v in leaves(value, f"{path}/{key}").items()}


def final_state(folder):
    """All that a finished run is, without what the clock put into it."""
    state = load_checkpoint(folder / "checkpoint.pt")
    assert state["step"] == 12
    assert {"model", "optimiser", "sampler", "augmentation", "torch_random"} < state.keys()
    del state["seconds"]
    for row in state["history"]:
        del row["seconds"], row["images_per_s"]
    state["csv"] = (
        pd.read_csv(folder / "history.csv").drop(columns=["seconds", "images_per_s"]).to_csv()
    )
    state["weights"] = runs.sha256(folder / "weights.safetensors")
    return leaves(state)


@contextmanager
def in_each_step(action):
    """Call `action` with the number of a step in the middle of it, when its loss is computed."""
    loss, count = loop.LOSSES["batch_hard"], itertools.count(1)

    def watched(*args, **options):
        action(next(count))
        return loss(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loop.LOSSES, "batch_hard", watched)
        yield


KILLED_AT = (2, 7, 12)  # before the first checkpoint; between two; in the last step


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_root):
    """The folder of a run of twelve steps that nothing disturbed, and was copied as it went."""
    outputs = tmp_path_factory.mktemp("whole")

    def copy(step):
        if step in KILLED_AT:
            shutil.copytree(outputs / RUN.format("whole"), outputs / f"killed_at_{step}")

    with pytest.MonkeyPatch.context() as patch, in_each_step(copy):
        patch.setenv("REID_DATA", str(data_root))
        patch.setenv("REID_CACHE", str(data_root / ".cache"))
        patch.setenv("REID_OUTPUTS", str(outputs))
        return fit("whole")


def killed(whole, step=7):
    """A run "killed": what the disk would hold, had a kill fallen into this step of the whole run."""
    folder = outputs_dir() / RUN.format("killed")
    return Path(shutil.copytree(whole.parent / f"killed_at_{step}", folder))


@pytest.mark.slow
@pytest.mark.parametrize("step", KILLED_AT)
def test_a_killed_run_resumes_bit_for_bit(whole, step, monkeypatch):
    # Pictures change nothing that is compared, and take most of the time.
    monkeypatch.setattr(loop.board.Board, "add_ranked_lists", lambda *_: None)
    folder = killed(whole, step)
    assert not (folder / "weights.safetensors").exists()
    assert (folder / "checkpoint.pt").exists() == (step > 4)
    assert fit("killed") == folder
    assert final_state(folder) == final_state(whole)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["sampler", "augmentation", "optimiser"])
def test_negative_control_a_forgotten_state_shows(whole, lost, monkeypatch):
    """What the comparison above relies on: without one of the states the bytes do differ."""
    load_state = loop.State.load_state_dict

    def forgetful(state, saved):
        load_state(state, saved | {lost: state.state_dict()[lost]})

    monkeypatch.setattr(loop.State, "load_state_dict", forgetful)
    killed(whole)
    differ = final_state(fit("killed")).items() ^ final_state(whole).items()
    assert any(path.startswith("/model") for path, _ in differ)


# Trains in a process of its own that sends itself a signal in the middle of a step.
CHILD = """
import os, sys
from reidlib.training import journal, loop
from reidlib.recipes import Recipe
loss, calls = loop.LOSSES["batch_hard"], []
def signalled(*args, **options):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), int(sys.argv[2]))
    return loss(*args, **options)
loop.LOSSES["batch_hard"] = signalled
loop.train(Recipe.model_validate_json(sys.argv[1]), "signal", device="cpu", show_progress=False)
"""


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [
        (signal.SIGKILL, (-9,), 4),
        pytest.param(signal.SIGTERM, (143,), 6, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, (-2, 1, 130), 6, marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_ends_the_step_and_killed_it_does_not(whole, number, status, step):
    line = [sys.executable, "-c", CHILD, small().model_dump_json(), str(int(number))]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    done = subprocess.run(line, cwd=ROOT, **options)
    assert done.returncode in status and not done.stdout, done.stderr
    stopped = number != signal.SIGKILL
    assert ("Stopped after step 6 of 12; run it again to go on." in done.stderr) == stopped
    folder = runs.find_run(RUN.format("signal"))
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == step
    said = "stopped" if stopped else "running"
    assert runs.read_json(folder / "manifest.json")["status"] == said
    assert final_state(fit("signal")) == final_state(whole)


@pytest.mark.parametrize("hold_out", [0, 3])
def test_a_notebook_sees_curves_that_grow_and_one_sentence_when_stopped(
    monkeypatch, capsys, hold_out
):
    shown = []
    for room in (live, journal):
        monkeypatch.setattr(room, "in_notebook", lambda: True)
    monkeypatch.setattr(
        live, "display", lambda content, **options: shown.append((content, options))
    )
    plan = loop.prepare(small(hold_out=hold_out), device="cpu", show_progress=False)

    def interrupt(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with in_each_step(interrupt), pytest.raises(KeyboardInterrupt) as stopped:
        train(plan)
    (said,) = stopped.value._render_traceback_()
    assert said == "Stopped after step 3 of 12; run it again to go on."
    assert said not in capsys.readouterr().err
    alts = [content["text/plain"] for content, _ in shown]
    assert {options["display_id"] for _, options in shown} == {shown[0][1]["display_id"]}
    assert [options["update"] for _, options in shown] == [False, *[True] * (len(shown) - 1)]
    assert "step 1 of 12" in alts[0] and "step 3 of 12" in alts[-1] and len(alts) < 4
    history = pd.DataFrame(
        {"step": [1, 2], "loss": [1.0, 0.5], "held_out_mAP": [float("nan"), 0.6]}
    )
    panels = live.growth(history, plan.recipe, 12).axes
    seen = [[*panel.lines[0].get_ydata()] for panel in panels]
    assert seen == [[1.0, 0.5], [60.0]][: 2 if hold_out else 1]


def test_the_first_batch_of_a_plan_is_the_first_that_is_trained_on():
    """03 shows its loss before training, and the curve begins there."""
    plan = loop.prepare(small(steps=1, hold_out=0), device="cpu", show_progress=False)
    rows = next(iter(plan.sampler()))
    images = plan.augmentation()(torch.from_numpy(plan.pixels[rows]))
    pids = torch.tensor(plan.table["pid"].to_numpy()[rows])
    with torch.no_grad():
        before = plan.loss()(build_model(plan.recipe).train()(images), pids)
    logged = pd.read_csv(train(plan, show_progress=False) / "history.csv")["loss"]
    assert [before.loss.item()] == pytest.approx([*logged], rel=1e-4)


@pytest.mark.slow
def test_tensorboard_shows_no_step_twice_after_a_resume(whole):
    killed(whole)
    folder = fit("killed")
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
def test_a_truncated_altered_or_lost_checkpoint_is_refused_and_the_one_before_offered(whole):
    folder = killed(whole, 12)
    path = folder / "checkpoint.pt"
    good = path.read_bytes()
    offered = '.*Go on from checkpoint_previous.pt, which is whole, with resume="previous"'
    for bad in (good[:-100], good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"checkpoint.pt is truncated or altered{offered}"):
            fit("killed")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*checkpoint.pt{offered}"):
        fit("killed")
    assert load_checkpoint(folder / "checkpoint_previous.pt")["step"] == 4
    assert final_state(fit("killed", resume="previous")) == final_state(whole)


def test_other_settings_are_refused_and_named(whole):
    killed(whole)
    with pytest.raises(ValueError, match=r"other settings \(lr: 0.001 there, 0.002 now\)"):
        fit("killed", lr=0.002)
    with pytest.raises(ValueError, match="hold_out: 3 there, 4 now"):
        fit("killed", hold_out=4)


def done(whole):
    """A run "done": a copy of the whole one."""
    return Path(shutil.copytree(whole, outputs_dir() / RUN.format("done")))


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_a_finished_run_is_kept(whole):
    folder = done(whole)
    before = content(folder)
    assert fit("done") == folder and content(folder) == before
    with pytest.raises(FileExistsError, match="Give another tag"):
        fit("done", resume="never")
    with pytest.raises(ValueError, match="choose auto, previous, never, restart"):
        fit("done", resume="yes")


def test_restart_leaves_nothing_of_a_run_before(whole):
    """A checkpoint that stayed would be taken for one of the new run, were that killed early."""
    folder = outputs_dir() / RUN.format("again")
    for kept in ("manifest.json", "checkpoint.pt"):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        if kept == "checkpoint.pt":
            (folder / "manifest.json").unlink()
            for resume in ("auto", "never"):
                with pytest.raises(ValueError, match="no manifest.json, so nobody can say"):
                    fit("again", resume)
        fit("again", resume="restart", **QUICK)
        assert load_checkpoint(folder / "checkpoint.pt")["step"] == 2
        assert not [*folder.glob("checkpoint_*")] and not (folder / "metrics.json").exists()


@pytest.mark.parametrize(
    "slip",
    [
        {"weights": "/typo.pth"},
        {"backbone": "resnet51"},
        {"seed": 2**70},
        {"lr": 1e30, "checkpoint_every": 9},  # NaN after a step or two
    ],
    ids=lambda slip: next(iter(slip)),
)
def test_a_restart_that_fails_leaves_the_run_as_it_was(whole, slip):
    folder = done(whole)
    before = content(folder)
    with pytest.raises((ValueError, OSError, RuntimeError)):
        fit("done", "restart", **slip)
    assert content(folder) == before and not runs.asides(folder)


def test_a_run_that_is_replaced_stands_aside_until_there_is_a_checkpoint(whole, capsys):
    """So a kill at any step loses neither: in each, one of the two is whole."""
    folder, kept = done(whole), []
    before = content(folder)
    with in_each_step(lambda _: kept.append([content(run) for run in runs.asides(folder)])):
        fit("done", "restart", steps=6, hold_out=0)
    assert kept == [[before]] * 4 + [[]] * 2 and not runs.asides(folder)
    assert "done~before1 until a checkpoint is written" in capsys.readouterr().err


def test_weights_that_are_lost_or_altered_are_written_again_from_the_checkpoint(whole):
    weights = done(whole) / "weights.safetensors"
    good = weights.read_bytes()
    way_out = "Train it as before, .* checkpoint.pt. python -m reidlib train .*--steps 12"
    for bad in (None, good[:-100], good[:-64] + bytes(64)):
        weights.unlink() if bad is None else weights.write_bytes(bad)
        with pytest.raises((FileNotFoundError, ValueError), match=way_out):
            load_model(weights.parent)
        fit("done")
        assert weights.read_bytes() == good
    for file in weights.parent.glob("checkpoint*"):
        file.unlink()
    weights.write_bytes(good[:-100])
    with pytest.raises(ValueError, match="cut short.*Take that file from where it came from"):
        fit("done")


def test_a_lost_checkpoint_before_the_last_offers_the_last(whole):
    (done(whole) / "checkpoint_previous.pt").unlink()
    with pytest.raises(
        FileNotFoundError, match='checkpoint.pt, which is whole, with resume="auto"'
    ):
        fit("done", "previous")


def test_a_finished_run_goes_on_with_more_steps_and_may_be_watched_otherwise(capsys):
    folder = fit("on", **QUICK)
    first = load_checkpoint(last := folder / "checkpoint.pt")["model"]
    changes = QUICK | {"steps": 4, "log_every": 3, "checkpoint_every": 9, "evaluate_every": 5}
    with pytest.raises(ValueError, match="steps: 2 there, 4 now"):
        train(small(**changes), "on", device="cpu", show_progress=False, longer=False)
    assert fit("on", **changes) == folder
    manifest, state = runs.read_json(folder / "manifest.json"), load_checkpoint(last)
    assert manifest["step"] == state["step"] == 4 and manifest["went_on_after"] == [2]
    assert [row["step"] for row in state["history"]] == [1, 2, 3, 4]
    assert leaves(first) != leaves(state["model"]) == leaves(dict(load_model(folder).state_dict()))
    assert re.search("--steps 2 .* && .* --steps 4 ", manifest["reproduce"])
    assert runs.read_recipe(folder) == small(**changes)
    with pytest.raises(ValueError, match="went on after: .2. there, None now"):
        train(small(**changes), "on", device="cpu", show_progress=False, longer=False)
    # As a released run: it has no checkpoint.
    for file in folder.glob("checkpoint*"):
        file.unlink()
    before = content(folder)
    assert fit("on", **changes) == folder and content(folder) == before
    told = capsys.readouterr().err
    assert "was trained before" in told and "give another tag" in told
    (folder / "weights.safetensors").rename(outputs_dir() / "elsewhere")
    way_out = (
        "no checkpoint.pt to go on from.*weights='synthetic_batchhard_softplus_on'.*resume=.restart"
    )
    for other in ({}, {"steps": 6}):
        with pytest.raises(ValueError, match=way_out):
            fit("on", **(changes | other))


def test_two_processes_cannot_write_one_run():
    message = "Another process is writing .*_locked"
    with (
        runs.lock(outputs_dir() / RUN.format("locked")),
        pytest.raises(RuntimeError, match=message),
    ):
        fit("locked")


def test_precision_follows_the_device_and_the_input():
    cpu = torch.device("cpu")
    choose = lambda **changes: resolve_precision(make_recipe("demo", **changes), cpu)
    assert choose(height=64, width=32).precision == "float32"
    assert choose(width=48).precision in ("float32", "bfloat16")
    assert choose(precision="bfloat16", width=48).precision == "bfloat16"
    with pytest.raises(ValueError, match='64×48 at least, not 64×32: use precision = "float32"'):
        choose(precision="bfloat16", width=32)


@pytest.mark.parametrize("has", ["nothing", "avx512_bf16", "amx_bf16", "sve"])
def test_emulated_bfloat16_is_told(has, monkeypatch, capsys):
    can = dict.fromkeys(("avx512_bf16", "amx_bf16"), False) | {has: True}
    if has == "sve":
        can = {"sve": True}  # another architecture: nothing is known
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    for precision in ("bfloat16", "auto", "float32"):
        recipe = small(height=64, width=48, precision=precision)
        loop.prepare(recipe, device="cpu", show_progress=False)
        expected = has == "nothing" and precision == "bfloat16"
        assert ("emulates bfloat16" in capsys.readouterr().err) == expected


def test_the_run_explains_itself(whole, monkeypatch):
    monkeypatch.setenv("REID_OUTPUTS", str(whole.parent))
    manifest = runs.read_json(whole / "manifest.json")
    assert manifest["status"] == "finished" and manifest["step"] == manifest["steps"] == 12
    assert manifest["train_identities"] == 12 - 3 and manifest["images_seen"] == 12 * 8
    assert manifest["packages"]["torch"] and manifest["device"] and manifest["seed"] == 0
    assert runs.read_recipe(whole) == small()
    history = pd.read_csv(whole / "history.csv")
    assert history["step"].tolist() == [*range(1, 13)]
    assert history["held_out_mAP"].notna().sum() == 2
    scores = runs.read_json(whole / "metrics.json")["held_out"]
    best = scores["best"]
    assert 0 < scores["before_mAP"] < 1 and best["mAP"] == history["held_out_mAP"].max()
    assert load_checkpoint(whole / "checkpoint_best.pt")["step"] == best["step"]
    expected = load_checkpoint(whole / "checkpoint.pt")["model"]
    for source in (whole, whole.name, whole / "weights.safetensors"):
        model = load_model(source)
        assert not model.training and model.recipe == small()
        assert leaves(expected) == leaves(dict(model.state_dict()))


def test_too_few_identities_are_an_error_before_anything_is_written():
    with pytest.raises(ValueError, match="P = 10 identities, the data has 9"):
        fit("few", p=10)
    assert not (outputs_dir() / RUN.format("few")).exists()
