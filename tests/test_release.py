"""A released run: half the bytes, the same scores but for rounding, and a card that tells no tales."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torchvision
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import metadata
from torch import nn

from reidlib import runs
from reidlib.data.pixels import load_images
from reidlib.data.synthetic import draw_dataset
from reidlib.data.tables import fingerprint, hold_out, load
from reidlib.evaluation.retrieval import evaluate
from reidlib.model.embed import embed
from reidlib.model.weights import build_model, load_model, save_weights
from reidlib.paths import ROOT
from reidlib.recipes import make_recipe
from reidlib.workbook import release

SMALL = dict(backbone="mobilenet_v3_small", hidden=16, dim=8, hold_out=3)
RECIPE = make_recipe("demo", margin=0.3, **SMALL)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "outputs" / "synthetic_batchhard_mine"
    folder.mkdir(parents=True)
    save_weights(folder / "weights.safetensors", build_model(RECIPE), RECIPE)
    runs.write_json(folder / "config.json", RECIPE.model_dump())
    data = fingerprint(hold_out(load("synthetic").train, RECIPE.hold_out, seed=0)[0])
    manifest = {"step": 400, "steps": 400, "train_images": 1234, "train_identities": 30}
    manifest |= {"train_data": data, "reproduce": "python -m reidlib train --margin 0.3"}
    runs.write_json(folder / "manifest.json", manifest)
    runs.write_text(folder / "history.csv", "step,loss\n400,0.1\n")
    return folder


def fresh_scores(folder, flip):
    """The scores of a run on the built-in data, in one go."""
    data, model = load("synthetic"), load_model(folder)
    sides = []
    for table in (data.query, data.gallery):
        pixels, table = load_images(table, model.recipe, show_progress=False)
        sides += [embed(model, pixels, model.recipe, flip=flip, show_progress=False), table]
    return evaluate(*sides).scores


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".lock"}


@pytest.mark.slow
def test_a_release(folder):
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 32, 3), dtype=np.uint8)
    before = embed(load_model(folder), images, RECIPE, show_progress=False)
    weights = folder / "weights.safetensors"
    size = weights.stat().st_size
    manifest, files = runs.read_json(folder / "manifest.json"), content(folder)
    runs.update_json(folder / "manifest.json", train_data="f" * 64)
    with pytest.raises(ValueError, match="not the data set that synthetic_batchhard_mine was"):
        release.release(folder)
    runs.write_json(folder / "manifest.json", manifest)
    assert content(folder) == files
    runs.write_json(folder / "metrics.json", {"held_out": {"mAP": 0.5}, "with_flips": {"mAP": 0}})
    files = release.release("synthetic_batchhard_mine")
    assert weights.stat().st_size < 0.52 * size
    after = embed(load_model(folder), images, RECIPE, show_progress=False)
    assert 0 < np.abs(after - before).max() < 0.01 * np.abs(before).max()
    state = load_model(folder).state_dict()
    first = build_model(RECIPE).state_dict()
    for name, value in first.items():
        if value.dim() <= 1:  # biases, and the statistics of BatchNorm
            assert torch.equal(state[name], value), name

    plain, flipped = (fresh_scores(folder, flip) for flip in (False, True))
    metrics = runs.read_json(folder / "metrics.json")
    assert metrics["with_flips"] == pytest.approx(flipped) and flipped != pytest.approx(plain)
    assert {name: metrics[name] for name in plain} == pytest.approx(plain)
    assert metrics["held_out"] == {"mAP": 0.5}, "of the training"
    manifest, digest = runs.read_json(folder / "manifest.json"), runs.sha256(weights)
    assert metrics["weights_sha256"] == manifest["weights_sha256"] == digest
    card = (folder / "README.md").read_text()
    low, high = (f"{100 * end:.2f}" for end in metrics["intervals"]["mAP"])
    ours, theirs = (f"{100 * scores['mAP']:.2f}" for scores in (plain, flipped))
    assert f"| mAP | {ours} | {low} to {high} | {theirs} |" in card
    assert "python -m reidlib train --margin 0.3" in card and "1,234 images of\n30 people" in card
    assert str(folder.parent) not in card and not re.search(r"\{|\}|None|release-", card)

    names = [*release.FILES, *(path.name for path in folder.glob("events.out.tfevents.*.test"))]
    assert [f.name for f in files] == names and all(f.is_file() for f in files)
    assert len(names) == len(release.FILES) + 1
    halved = weights.read_bytes()
    again = release.release("synthetic_batchhard_mine")
    assert again[:-1] == files[:-1] and (folder / "README.md").read_text() == card
    assert weights.read_bytes() == halved, "twice is once"
    left = {f.name for f in folder.iterdir()} - {f.name for f in again} - {".lock"}
    assert left == {"embeddings_query.h5", "embeddings_gallery.h5"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["score_run", "model_card", "save_weights"])
def test_a_release_that_fails_leaves_the_run_as_it_was(folder, monkeypatch, what):
    def fail(*_, **__):
        raise OSError("disk full")

    before = content(folder)
    monkeypatch.setattr(release, what, fail)
    with pytest.raises(OSError, match="disk full"):
        release.release(folder)
    assert content(folder) == before


# --- the Hub of models


def test_a_published_run_is_what_the_hub_reads_and_loads_from_there(folder, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    run, to = ROOT / "outputs" / runs.EXAMPLE, tmp_path / "hub"
    files = release.publish(run, to)
    assert {*files} == {*to.iterdir()} and [f.name for f in files] == release.HUB_FILES
    metrics = runs.read_json(run / "metrics.json")
    card = hub.ModelCard.load(to / "README.md")
    said = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert said == {key: metrics[key] for key in metrics["intervals"]} and "mAP" in said
    assert {r.dataset_name for r in card.data.eval_results} == {metrics["evaluated_on"]}
    assert card.data.model_name == run.name and f"hf-hub:OWNER/{run.name}" in card.text
    asked = []

    def download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        if repo_id != "me/mine":
            raise OSError("404: no such repository")
        return str(to / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    expected = load_model(run).state_dict()
    for name in (to, "hf-hub:me/mine", "hf-hub:me/mine@v1"):
        state = load_model(name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert [a[1:] for a in asked] == [("model.safetensors", None), ("model.safetensors", "v1")]
    with pytest.raises(RuntimeError, match=r"hf-hub:you/none could not be had \(404.*owner/name"):
        load_model("hf-hub:you/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match=r"hf-hub:me/mine needs .* huggingface_hub.*\[timm\]"):
        load_model("hf-hub:me/mine")


def test_what_cannot_be_published_is_named(folder, tmp_path):
    for scores in ({}, {"mAP": 0.5, "weights_sha256": "0" * 64}):
        runs.write_json(folder / "metrics.json", scores)
        with pytest.raises(ValueError, match="no scores of its weights.*reidlib score"):
            release.publish(folder, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    run = ROOT / "outputs" / runs.EXAMPLE
    (tmp_path / "file").touch()
    for to in (run, tmp_path / "file"):
        with pytest.raises(ValueError, match="cannot be written: give a new folder"):
            release.publish(run, to)


# --- the runs that came with the repository

RELEASED = sorted(path.parent for path in (ROOT / "outputs").glob("*/README.md"))
COMMITTED = (*release.FILES, "per_query_held_out.csv")


def committed(folder):
    return [f for f in folder.iterdir() if f.name in COMMITTED or "tfevents" in f.name]


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_a_released_run_is_whole_light_and_tells_what_its_files_say(folder):
    sizes = {f.name: f.stat().st_size for f in committed(folder)}
    assert {*release.FILES} <= {*sizes} and any("tfevents" in name for name in sizes)
    assert sizes.pop("weights.safetensors") < 9e6
    assert sum(sizes.values()) < 2e6
    metrics, table = runs.read_json(folder / "metrics.json"), pd.read_csv(folder / "per_query.csv")
    answered = table.dropna(subset=["AP"])
    assert len(table) == metrics["queries"]
    assert metrics["mAP"] == pytest.approx(answered["AP"].mean(), abs=1e-12)
    assert metrics["top1"] == pytest.approx((answered["first_rank"] == 1).mean(), abs=1e-12)
    assert not metrics["flip"] and metrics["precision"] == "float32"
    assert (folder / "README.md").read_text() == release.model_card(folder)
    # TensorBoard shows it straight after a clone, with settings and scores.
    files = map(str, folder.glob("events.out.tfevents.*"))
    events = [event for file in files for event in EventFileLoader(file).Load()]
    values = {value.tag: value for event in events for value in event.summary.value}
    assert metadata.SESSION_START_INFO_TAG in values, "no row in the HParams tab"
    for key in metrics["intervals"]:
        shown = values[f"test/{key}"].tensor.float_val[0]
        assert shown == pytest.approx(metrics[key], abs=1e-6)
    for file in committed(folder):  # of no machine, and of nobody's face
        content = file.read_bytes()
        assert str(ROOT.parent).encode() + b"/" not in content and b"/home/" not in content, file
        assert b"\xff\xd8\xff" not in content or file.suffix == ".safetensors", file
        assert b"\x89PNG" not in content, file


@pytest.mark.parametrize("name", ["batchhard_softplus", "batchhard_softplus_soup"])
def test_the_card_is_enough_to_load_the_weights_with_torchvision_alone(name):
    folder = ROOT / "outputs" / f"market1501_{name}"
    card = (folder / "README.md").read_text()
    assert "256×128, divided by 255, less ImageNet's mean" in card and "last stride 1" in card
    state = safetensors.torch.load_file(folder / "weights.safetensors")
    parts = {"backbone.": torchvision.models.mobilenet_v2(weights=None)}
    parts["backbone."].features[14].conv[1][0].stride = (1, 1)
    del parts["backbone."].classifier
    if "`norm.`" in card:
        parts["norm."] = nn.BatchNorm1d(1280)
    if "`head.`" in card:
        layers = nn.Linear(1280, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 128)
        parts["head."] = nn.Sequential(*layers)
    for prefix, module in parts.items():
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module.eval().load_state_dict(own)
    images = np.random.default_rng(0).integers(0, 256, (3, 128, 64, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = nn.functional.interpolate(x, size=(256, 128), mode="bilinear", antialias=True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torchvision.transforms.functional.normalize(x / 255, mean, std)
    with torch.no_grad():
        power = 3 if "mean of x^3 over the map" in card else 1
        features = parts["backbone."].features(x).clamp(min=1e-6)
        emb = (features**power).mean(dim=(2, 3)) ** (1 / power)  # (B, 1280, h, w) -> (B, 1280)
        for prefix in ("norm.", "head."):
            emb = parts[prefix](emb) if prefix in parts else emb
    model = load_model(folder)
    ours = embed(model, images, model.recipe, show_progress=False)
    np.testing.assert_allclose(emb.numpy(), ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())


def test_no_picture_of_people_is_committed_and_the_example_is_small():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "outputs"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(name) for name in listed.splitlines()]
    assert {file.parts[1] for file in files if "pictures" in file.parts} <= {runs.EXAMPLE}
    sizes = [(ROOT / file).stat().st_size for file in files if runs.EXAMPLE in file.parts]
    assert 3e6 < sum(sizes) < 10e6


@pytest.mark.slow
def test_the_example_has_the_scores_that_it_states(tmp_path, monkeypatch):
    monkeypatch.setenv("REID_DATA", str(tmp_path))
    monkeypatch.setenv("REID_CACHE", str(tmp_path / "cache"))
    folder = ROOT / "outputs" / runs.EXAMPLE
    draw_dataset(tmp_path / "synthetic", train_ids=2)  # the test split is the same
    scores, stated = fresh_scores(folder, False), runs.read_json(folder / "metrics.json")
    for key in ("mAP", "mAP_market", "top1", "top5", "top10", "mINP"):
        assert scores[key] == pytest.approx(stated[key], abs=0.0005), key
    assert scores["mAP"] > 0.7
