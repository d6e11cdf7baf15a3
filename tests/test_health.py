"""The health report: real runs broken in each way, healthy ones, and the edge of every threshold."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from reidlib import runs
from reidlib.__main__ import main
from reidlib.data.tables import load
from reidlib.model.weights import build_model
from reidlib.paths import outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training import health, journal, loop
from reidlib.training.checkpoint import load_checkpoint
from reidlib.training.checks import AT_ONCE, CHECKS
from reidlib.training.health import Finding, as_text, report, report_run
from reidlib.training.journal import TrainingFailed
from reidlib.training.loop import prepare, train
from reidlib.training.watched import Watched, fresh_layers

SMALL = dict(hidden=64, dim=16, p=4, k=4, precision="float32")
SMALL |= dict(steps=40, hold_out=0, log_every=2, checkpoint_every=20)


def plan(tag="", **changes):
    recipe = make_recipe("demo", **(SMALL | changes))
    return prepare(recipe, tag, device="cpu", dataset=load("synthetic"), show_progress=False)


def fit(plan):
    return train(plan, show_progress=False)


def names(findings):
    return [finding.name for finding in findings]


# --- real runs


def black_images(plan):
    return replace(plan, pixels=np.zeros_like(plan.pixels))


def shuffled_labels(plan):
    order = np.random.default_rng(0).permutation(len(plan.table))
    return replace(plan, table=plan.table.assign(pid=plan.table["pid"].to_numpy()[order]))


# One real run for each kind of cause, and what its advice says; the histories below have the edges of
# every threshold.
RATE_0 = dict(lr=1e-9, hold_out=4, evaluate_every=20)
BROKEN = {
    "rate 10": (dict(lr=10.0), None, "diverging", "rate: 0.0003 (now lr = 10)"),
    "shuffled": (dict(), shuffled_labels, "not learning", "Look at the labels"),
    "black": (dict(), black_images, "collapsed", "Look at the images"),
    "margin 50": (dict(margin=50.0), None, "margin out of reach", "A smaller margin"),
    "few people": (dict(p=12), None, "too few identities", "p=3, or more identities"),
    # Held-out mAP may rise by BatchNorm's statistics alone; the distances tell.
    "rate 0": (RATE_0, None, "not learning", "A higher learning rate (now lr = 1e-09"),
}
# What is true of any run so short, on so few people.
SMALL_TOO = {"still learning", "far from origin", "too easy"}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_is_found(case):
    changes, breaks, expected, advice = BROKEN[case]
    planned = plan("broken", **changes)
    findings = report_run(fit(breaks(planned) if breaks else planned))
    assert {expected} <= {*names(findings)} <= {expected} | SMALL_TOO
    assert findings[0].name == expected and advice in findings[0].try_first
    for finding in findings:  # each with numbers, and with something to do
        assert any(c.isdigit() for c in finding.evidence), finding
        assert len(finding.try_first) > 5


@pytest.mark.slow
@pytest.mark.parametrize("margin", ["soft", 0.2])
def test_a_healthy_run_has_no_finding(margin, capsys):
    folder = fit(plan("healthy", loss="batch_all", margin=margin, p=6, steps=60, log_every=3))
    assert report_run(folder) == runs.read_json(folder / "manifest.json")["health"] == []
    seen = Watched(pd.read_csv(folder / "history.csv"), runs.read_recipe(folder))
    assert seen.loss_at_end < 0.7 * seen.loss[:2].mean()
    assert main(["health", folder.name]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{folder.name}\n{as_text([])}\n" and "Step" not in printed.err
    assert ", ".join(health.named()) in printed.out


def save_backbone(path, trained=()):
    """Write a backbone's weights: fresh but for the layers that are named."""
    state = build_model(make_recipe("demo", **SMALL)).backbone.state_dict()
    for key in state:
        if key.startswith(tuple(trained)) and state[key].is_floating_point():
            state[key] = state[key] + 0.01
    safetensors.torch.save_file(state, path)
    return str(path)


@pytest.mark.parametrize(
    ("trained", "normalise", "expected"),
    [
        ((), "imagenet", ["weights did not load"]),
        (("bn1", "layer1", "layer2"), "imagenet", ["weights did not load"]),
        (("",), "unit", ["wrong normalisation"]),
        (("",), "imagenet", []),
    ],
)
def test_weights_that_are_not_what_they_are_said_to_be(
    tmp_path, capsys, trained, normalise, expected
):
    weights = save_backbone(tmp_path / "w.safetensors", trained)
    folder = fit(plan("w", steps=3, weights=weights, normalise=normalise, loss="batch_all"))
    findings = [f for f in report_run(folder) if f.name != "too short"]
    assert names(findings) == expected
    said = capsys.readouterr().err
    for finding in findings:
        assert said.count(finding.name) == 1 and finding.evidence in said
        assert finding._asdict() in runs.read_json(folder / "manifest.json")["health"]
    if trained == ("bn1", "layer1", "layer2"):
        assert "layer3.0.bn1" in findings[0].evidence and "layer2" not in findings[0].evidence


def test_fresh_layers_are_those_with_either_pair_untouched():
    net = torch.nn.Sequential(*(torch.nn.BatchNorm2d(2) for _ in range(4)), torch.nn.ReLU())
    for i in (1, 3):
        net[i].running_mean += 1
    for i in (2, 3):
        net[i].bias.data += 1
    assert fresh_layers(net) == ["0", "1", "2"]


@pytest.mark.parametrize(("lr", "first_step"), [(1e18, False), (None, True)])
def test_a_run_that_fails_says_so_in_its_manifest_and_at_once(monkeypatch, capsys, lr, first_step):
    failing = plan("nan", lr=lr or 1e-3, log_every=1, checkpoint_every=1)
    if first_step:
        broken = build_model(failing.recipe)
        torch.nn.init.constant_(broken.head[-1].weight, math.nan)
        monkeypatch.setattr(loop, "build_model", lambda *_, **__: broken)
    with pytest.raises(TrainingFailed, match="became NaN or infinite.* Try first: "):
        fit(failing)
    assert runs.read_json(failing.folder / "manifest.json")["status"] == "failed"
    for file in failing.folder.glob("checkpoint.pt"):
        assert all(value.isfinite().all() for value in load_checkpoint(file)["model"].values())
    (finding,) = [f for f in report_run(failing.folder) if f.name == "diverging"]
    assert "became NaN or infinite, so training stopped" in finding.says
    # In 03_train the error ends the cell before the report is shown, so it stands above it.
    assert as_text([finding]) in capsys.readouterr().err
    assert ("the first step" in finding.evidence) == first_step
    assert ("lower learning rate" in finding.try_first) != first_step


@pytest.mark.slow
def test_a_finding_is_said_once_also_after_a_resume(monkeypatch, capsys):
    first, save = plan("resumed", lr=10.0), journal.save_checkpoint

    class Crash(Exception):
        pass

    def crash(file, state):
        save(file, state)
        table = pd.DataFrame(state["history"])
        runs.write_text(first.folder / "history.csv", table.to_csv(index=False))
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(journal, "save_checkpoint", crash)
        fit(first)
    assert capsys.readouterr().err.count("diverging:") == 1
    # Killed: its manifest is from its start, its history is not.
    assert runs.read_json(first.folder / "manifest.json")["health"] == []
    assert names(report_run(first.folder)) == ["diverging"]
    folder = fit(first)
    assert "diverging:" not in capsys.readouterr().err
    assert "diverging" in names(report_run(folder))


# --- crafted histories


def history(rows=20, **changes):
    """A healthy run: the loss falls, strangers move away, the rate decays."""
    step = np.r_[1, np.arange(1, rows) * 20]
    done = np.linspace(0, 1, rows)
    table = pd.DataFrame({"step": step, "lr": 1e-3 * np.where(done < 0.6, 1, 0.01)})
    table["loss"] = 0.2 + 1.8 * np.exp(-8 * done)
    table["active"] = 0.1 + 0.9 * np.exp(-8 * done)
    table["positive_p50"], table["negative_p50"] = 4 - done, 4.1 + 4 * done
    table["negative_p95"], table["norm"] = 1.3 * table["negative_p50"], 3.0
    return table.assign(**changes)


def judged(recipe=None, facts=None, **changes):
    return names(report(history(**changes), make_recipe("demo", **(recipe or {})), **(facts or {})))


STEP, FALLS, BEFORE, FEW = np.arange(20), history()["loss"], dict(before=0.1), dict(hold_out=9)


def scored(*scores):
    """Held-out mAP at every fifth row of 20."""
    column = np.full(20, math.nan)
    column[4::5] = scores
    return column


def at_end(rows, value, other):
    return np.r_[np.broadcast_to(other, 20)[: 20 - rows], [value] * rows]


def shrunk(negative, loss):
    distances = dict(negative_p50=at_end(10, negative, 4.1), positive_p50=at_end(10, 0.4, 4.0))
    return distances | dict(loss=loss, norm=0.6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        # the loss, against three times its start (2.0)
        (dict(loss=np.where((STEP == 5) | (STEP == 6), 6.1, FALLS)), ["diverging"]),
        (dict(loss=np.where((STEP == 5) | (STEP == 6), 5.9, FALLS)), []),
        (dict(loss=np.where(STEP == 5, 60.0, FALLS)), []),  # one batch is no trend
        (dict(loss=np.where(STEP < 1, 2.0, 2.6)), ["diverging"]),
        (dict(loss=np.where(STEP < 1, 2.0, 2.4)), []),
        (dict(norm=np.where(STEP < 10, 3.0, 91.0), negative_p50=60.0), ["diverging"]),
        (dict(norm=np.where(STEP < 10, 3.0, 89.0), negative_p50=60.0), []),
        # distances between identities, against a tenth of 1
        (dict(negative_p95=at_end(2, 0.09, 5.0)), ["collapsed"]),
        (dict(negative_p95=at_end(1, 0.09, 5.0)), []),
        (dict(negative_p95=at_end(5, 0.11, 5.0)), []),
        (dict(negative_p95=np.where((STEP > 4) & (STEP < 9), 0.09, 5.0)), ["collapsed"]),
        (dict(negative_p95=0.03, recipe=dict(margin=0.2)), ["margin out of reach"]),
        (dict(negative_p95=0.01, recipe=dict(margin=0.2)), ["collapsed"]),
        (shrunk(0.9, 0.69), ["near collapse"]),
        (shrunk(1.01, 0.69), []),
        (shrunk(0.9, 0.58), []),
        (shrunk(0.8, 0.69) | dict(negative_p50=at_end(10, 0.8, 3.0)), []),
        # strangers against the same person: 1.1
        (dict(positive_p50=4.0, negative_p50=at_end(19, 4.6, 4.0)), []),
        (dict(positive_p50=4.0, negative_p50=at_end(19, 4.3, 4.0)), ["not learning"]),
        (dict(held_out_mAP=scored(0.1, 0.11, 0.11, 0.11), facts=BEFORE), ["not learning"]),
        (dict(held_out_mAP=scored(0.1, 0.11, 0.13, 0.13), facts=BEFORE), []),
        (dict(held_out_mAP=scored(0.9, 0.9, 0.9, 0.9), recipe=FEW, facts=dict(before=0.9)), []),
        # active triplets
        (dict(active=at_end(6, 0, 0.1), recipe=dict(margin=0.2)), ["too easy"]),
        (dict(active=at_end(5, 0, 0.1), recipe=dict(margin=0.2)), []),
        (dict(active=0.0), []),  # the soft margin still pulls
        (dict(loss=at_end(6, 9e-4, 0.2)), ["too easy"]),
        (dict(loss=at_end(6, 1.1e-3, 0.2)), []),
        (dict(recipe=dict(margin=0.0)), ["no margin"]),
        (dict(recipe=dict(margin=0.01)), []),
        (dict(recipe=dict(margin=10.3)), ["margin out of reach"]),
        (dict(recipe=dict(margin=9.0)), []),
        # held-out scores over time
        (dict(held_out_mAP=scored(0.5, 0.7, 0.64, 0.64)), ["overfitting"]),
        (dict(held_out_mAP=scored(0.5, 0.7, 0.66, 0.66)), []),
        (dict(held_out_mAP=scored(0.5, 0.6, 0.7, 0.72), lr=1e-3), ["still learning"]),
        (dict(held_out_mAP=scored(0.5, 0.7, 0.72, 0.724), lr=1e-3), ["still learning"]),
        (dict(held_out_mAP=scored(0.5, 0.7, 0.71, 0.72), lr=1e-3), []),
        (dict(held_out_mAP=scored(0.5, 0.6, 0.7, 0.72)), []),  # the rate has decayed
        # the loss at the end
        (dict(loss=np.linspace(2, 0.4, 20), lr=1e-3), ["still learning"]),
        (
            dict(loss=np.linspace(2, 0.4, 20), lr=np.where(STEP < 12, 1e-3, 6e-5)),
            ["still learning"],
        ),
        (dict(loss=np.linspace(2, 0.4, 20), lr=np.where(STEP < 12, 1e-3, 4e-5)), []),
        (
            dict(loss=np.r_[2 - STEP[:10] / 10, np.linspace(1, 0.79, 10)], lr=1e-3),
            ["still learning"],
        ),
        (dict(loss=np.r_[2 - STEP[:10] / 10, np.linspace(1, 0.86, 10)], lr=1e-3), []),
        (dict(loss=np.where(STEP < 10, 2 - STEP / 6, 0.4), lr=1e-3), []),
        (dict(loss=np.maximum(0.65, 2 - STEP / 8)), ["still learning"]),
        (dict(loss=np.maximum(0.55, 2 - STEP / 8)), []),
        # the centre of the embeddings, against five distances (7.6)
        (dict(norm=40.0), ["far from origin"]),
        (dict(norm=36.0), []),
        (dict(norm=20.0, recipe=dict(squared=True)), ["far from origin"]),
        # facts
        (dict(facts=dict(identities=36)), []),
        (dict(facts=dict(identities=35)), ["too few identities"]),
        (dict(facts=dict(identities=100, short=21)), ["too few identities"]),
        (dict(facts=dict(identities=100, short=20)), []),
        (dict(rows=9), ["too short"]),
        (dict(rows=10), []),
        # what follows from another finding is left out
        (dict(negative_p95=0.01, negative_p50=0.01, positive_p50=0.01, norm=9.0), ["collapsed"]),
    ],
)
def test_at_the_edge_of_each_threshold(changes, expected):
    assert judged(**changes) == expected


@pytest.mark.parametrize("squared", [False, True])
def test_the_mean_over_active_triplets_may_rise(squared):
    """It is the mean over all that is judged, of batch-all with a margin."""
    rising = dict(loss=np.linspace(0.3, 0.9, 20), active=np.exp(-STEP / 2))
    recipe = dict(margin=0.5, squared=squared)
    assert judged(recipe | dict(loss="batch_all"), **rising) == []
    assert judged(recipe | dict(loss="batch_all", mean="valid"), **rising) == ["diverging"]


def test_a_run_that_collapsed_says_when_and_whether_it_left_it():
    table = history(negative_p95=np.where((STEP > 4) & (STEP < 9), 0.09, 5.0))
    (finding,) = report(table, make_recipe("demo"))
    assert "has left it" in finding.says and "from step 100 to 160" in finding.evidence
    table.loc[table.index[-2:], "negative_p95"] = 0.01
    for margin, sits in (("soft", "sits at 0.693"), (0.5, "sits at 0.500")):
        (finding,) = report(table, make_recipe("demo", margin=margin))
        assert "has collapsed" in finding.says and sits in finding.evidence
        assert "from step 360 to 380" in finding.evidence


def test_every_check_is_named_as_its_finding():
    explained = set().union(*health.EXPLAINS.values(), health.EXPLAINS)
    assert explained <= {*health.named()} and {*AT_ONCE} < {*CHECKS}


def test_reports_read_as_text():
    found = [Finding("a", "B.", "c = 1", "D."), Finding("e", "F.", "g = 2", "H.")]
    lines = ["Health: 2 findings.", "- a: B. (c = 1.)", "  Try first: D."]
    assert as_text(found).splitlines() == [*lines, "- e: F. (g = 2.)", "  Try first: H."]
    assert health.summary(found).startswith(
        f"**2 of {len(CHECKS)} checks found something.** Begin with **a**"
    )
    assert "no finding" in health.summary([])


# --- finished runs


def folder_of(name, **manifest):
    """A run that is its settings and its manifest."""
    folder = outputs_dir() / name
    folder.mkdir(parents=True)
    runs.write_json(folder / "config.json", make_recipe("demo").model_dump())
    runs.write_json(folder / "manifest.json", manifest)
    return folder


def test_runs_from_before_the_report_are_judged_by_their_history():
    folder = folder_of("old", status="finished", train_identities=20, warnings=[])
    with pytest.raises(FileNotFoundError, match="old has no history.csv"):
        report_run(folder)
    history(lr=1e-3, loss=np.linspace(2, 0.4, 20)).to_csv(folder / "history.csv", index=False)
    assert names(report_run(folder)) == ["too few identities", "still learning"]
    # A run under way is not told that it ended too early, and keeps what was found at its start.
    found = ["weights did not load", "too few identities"]
    findings = [Finding(name, "a", "b", "c")._asdict() for name in found]
    runs.update_json(folder / "manifest.json", status="running", steps=400, health=findings)
    assert names(report_run(folder)) == found


def test_a_run_that_was_stopped_is_judged_as_far_as_it_went(capsys):
    folder = folder_of("halfway", status="stopped", train_identities=200, health=[], steps=4000)
    fell = {"negative_p50": np.linspace(4.7, 0.1, 20), "negative_p95": 0.2, "loss": 0.72}
    for changes, found in ((fell, ["near collapse"]), ({}, [])):
        history(**changes).to_csv(folder / "history.csv", index=False)
        assert names(report_run(folder)) == found
        assert main(["health", "halfway"]) == 0
        said = capsys.readouterr().out
        assert "has not ended (step 380 of 4,000), so not checked: not learning, margin" in said
        assert "near collapse" in said.split("Its training")[0], "found, or checked"
        assert "still learning" not in said.split("Its training")[0]
