"""A run opened and scored: one run has one score, and what is on disk is of these weights and images."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from reidlib import runs
from reidlib.data.pixels import load_images
from reidlib.data.synthetic import draw_dataset
from reidlib.data.tables import hold_out, load
from reidlib.evaluation import scoring
from reidlib.evaluation.metrics import SCORES
from reidlib.evaluation.retrieval import evaluate
from reidlib.evaluation.scoring import PER_QUERY, open_run, score_run
from reidlib.model.embed import embed, embed_views, read_about, read_embeddings
from reidlib.model.weights import build_model, load_model, save_weights
from reidlib.recipes import make_recipe

RECIPE = make_recipe("demo", hidden=16, dim=8, width=48, hold_out=4)
QUIET = {"show_progress": False, "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    """A run that was never trained."""
    folder = tmp_path / "outputs" / "synthetic_mine"
    folder.mkdir(parents=True)
    save_weights(folder / "weights.safetensors", build_model(RECIPE), RECIPE)
    runs.write_json(folder / "config.json", RECIPE.model_dump())
    runs.write_json(folder / "manifest.json", {"step": 400, "steps": 400})
    return folder


@pytest.fixture
def embedded(monkeypatch):
    """How many images were embedded, a number for each call."""
    calls = []

    def counted(model, pixels, *args, **options):
        calls.append(len(pixels))
        return embed_views(model, pixels, *args, **options)

    monkeypatch.setattr(scoring, "embed_views", counted)
    return calls


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Another data set."""
    size = {"images_per_camera": 1, "distractors": 3, "junk": 2}
    return draw_dataset(tmp_path_factory.mktemp("else") / "where", train_ids=4, test_ids=4, **size)


def change_weights(folder):
    model = load_model(folder)
    with torch.no_grad():
        model.head[3].weight += torch.rand(8, 16)
    save_weights(folder / "weights.safetensors", model, RECIPE)


def metrics_of(folder):
    return runs.read_json(folder / "metrics.json")


def scorings_of(folder):
    return runs.read_json(folder / "manifest.json")["scored"]


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".lock"}


def test_the_scores_are_those_of_the_embeddings_that_it_wrote(folder):
    weights = (folder / "weights.safetensors").read_bytes()
    scored = score_run("synthetic_mine", **QUIET)
    sides = [read_embeddings(folder / f"embeddings_{side}.h5") for side in ("query", "gallery")]
    expected = evaluate(*sides[0], *sides[1])
    assert scored.scores == expected.scores and 0 < scored.scores["mAP"] < 1
    data, model = load("synthetic"), load_model(folder)
    for (emb, table), of in zip(sides, (data.query, data.gallery), strict=True):
        pixels, of = load_images(of, RECIPE, show_progress=False)
        assert table["path"].tolist() == of["path"].tolist()
        np.testing.assert_array_equal(emb, embed(model, pixels, RECIPE, show_progress=False))

    metrics = metrics_of(folder)
    assert metrics | expected.scores == metrics
    assert {*metrics["intervals"]} == {*SCORES}
    for name, (low, high) in metrics["intervals"].items():
        assert low <= metrics[name] <= high
    assert {*metrics["baselines"]} == {"untrained", "colour_histogram"}
    assert metrics["baselines"]["untrained"] == expected.scores, "it was never trained"
    assert metrics["evaluated_on"] == "synthetic" and metrics["protocol"] == expected.protocol
    assert metrics["flip"] is False and "with_flips" not in metrics
    written, columns = pd.read_csv(folder / PER_QUERY["test"]), ["AP", "first_rank", "INP", "pid"]
    pd.testing.assert_frame_equal(
        written[columns], expected.per_query[columns], check_dtype=False, rtol=1e-12
    )
    assert written["path"][0].startswith("query/"), "the same on every machine"
    assert (folder / "weights.safetensors").read_bytes() == weights
    (entry,) = scorings_of(folder)
    assert entry["flip"] is False and entry["data"] == "synthetic"
    for side, digest in entry["embeddings_sha256"].items():
        assert digest == runs.sha256(folder / f"embeddings_{side}.h5")


def test_what_people_see(folder):
    scored = score_run(folder, flip=True, **QUIET)
    table = scored.table()
    names = ["synthetic_mine", "with flips averaged", "untrained", "colour histogram"]
    assert list(table.index) == names and list(table.columns) == list(SCORES.values())
    assert table["mAP"].iloc[0] == pytest.approx(100 * scored.scores["mAP"])
    assert scored.evaluation.protocol in repr(scored) and not scored.notes
    assert scored.retrieval.evaluate().scores == scored.scores


# --- embeddings on disk


def test_embeddings_are_read_again_by_whoever_opens_the_run(folder, embedded):
    first = score_run(folder, baselines=False, **QUIET)
    kept = first.run.embeddings()
    assert embedded == [len(first.run.query), len(first.run.gallery)] == [*map(len, kept)]
    assert score_run(folder, baselines=False, **QUIET).scores == first.scores
    for one, other in zip(open_run(folder, **QUIET).embeddings(), kept, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(embedded) == 2 and len(scorings_of(folder)) == 2


@pytest.mark.parametrize("what", ["weights", "precision", "flip", "rows", "pid", "data", "gone"])
def test_embeddings_of_something_else_are_made_anew(folder, embedded, elsewhere, what):
    score_run(folder, baselines=False, **QUIET)
    if what == "weights":
        change_weights(folder)
    if what == "gone":
        (folder / "embeddings_gallery.h5").unlink()
    run = open_run(folder, elsewhere if what == "data" else None, **QUIET)
    if what == "rows":
        rows = {"query": run.query[1:].reset_index(drop=True), "query_pixels": run.query_pixels[1:]}
        run = dataclasses.replace(run, **rows)
    if what == "pid":
        run = dataclasses.replace(run, query=run.query.assign(pid=run.query["pid"] + 2))
    options = {"precision": {"precision": "bfloat16"}, "flip": {"flip": True}}.get(what, {})
    del embedded[:]
    emb, _ = run.embeddings(show_progress=False, **options)
    assert embedded == [len(run.query), len(run.gallery)] == [len(emb), len(run.gallery_pixels)]
    run.embeddings(show_progress=False, **options)
    assert len(embedded) == 2, "made once"


def test_an_image_that_was_replaced_is_embedded_again(folder, elsewhere, embedded):
    first = score_run(folder, elsewhere, baselines=False, **QUIET)
    image, other = map(Path, first.run.query["path"][:2])
    before = image.read_bytes()
    del embedded[:]
    try:
        image.write_bytes(other.read_bytes())
        emb, _ = open_run(folder, elsewhere, **QUIET).embeddings(show_progress=False)
    finally:
        image.write_bytes(before)
    assert embedded and np.array_equal(emb[0], emb[1])


def test_other_precision_replaces_and_says_so(folder, embedded):
    first = score_run(folder, baselines=False, **QUIET)
    second = score_run(folder, baselines=False, precision="bfloat16", **QUIET)
    assert len(embedded) == 4 and metrics_of(folder)["precision"] == "bfloat16"
    assert read_about(folder / "embeddings_query.h5")["precision"] == "bfloat16"
    one, two = first.retrieval.evaluate().per_query, second.retrieval.evaluate().per_query
    assert not one["AP"].equals(two["AP"])


# --- what stands beside the scores


def test_flips_are_added_and_replace_nothing(folder):
    plain = score_run(folder, baselines=False, **QUIET)
    before, written = files_of(folder), metrics_of(folder)
    scored = score_run(folder, flip=True, baselines=False, **QUIET)
    assert scored.scores == plain.scores != scored.with_flips.scores
    metrics, after = metrics_of(folder), files_of(folder)
    assert metrics == written | {"with_flips": scored.with_flips.scores}
    assert {name for name in after if after[name] != before[name]} == {
        "metrics.json",
        "manifest.json",
    }
    assert scorings_of(folder)[-1]["flip"] is True
    run, both = scored.run, {"flip": True, "show_progress": False}
    query, gallery = (
        embed(run.model, pixels, RECIPE, **both)
        for pixels in (run.query_pixels, run.gallery_pixels)
    )
    assert evaluate(query, run.query, gallery, run.gallery).scores == scored.with_flips.scores
    np.testing.assert_array_equal(run.embeddings(**both)[0], query)
    score_run(folder, baselines=False, **QUIET)
    assert metrics_of(folder) == metrics, "what was known of these weights stays"


@pytest.mark.parametrize("what", ["weights", "data"])
def test_what_was_scored_of_something_else_does_not_stay(folder, elsewhere, what):
    runs.write_json(folder / "metrics.json", {"held_out": {"mAP": 0.5}})
    score_run(folder, flip=True, **QUIET)
    kept = metrics_of(folder)
    assert kept["with_flips"] and kept["baselines"] and kept["held_out"] == {"mAP": 0.5}
    if what == "weights":
        change_weights(folder)
    score_run(folder, elsewhere if what == "data" else None, baselines=False, **QUIET)
    metrics = metrics_of(folder)
    assert "with_flips" not in metrics and metrics["baselines"] == {}
    assert metrics["held_out"] == {"mAP": 0.5}, "of the training, not of the test split"
    assert metrics["weights_sha256"] == runs.sha256(folder / "weights.safetensors")
    assert (metrics["test_data"] != kept["test_data"]) == (what == "data")


def test_a_run_whose_starting_weights_are_not_here_has_one_baseline(folder):
    recipe = RECIPE.model_copy(update={"weights": "somewhere.pth"})
    save_weights(folder / "weights.safetensors", load_model(folder), recipe)
    scored = score_run(folder, **QUIET)
    assert {*scored.baselines} == {"colour_histogram"}
    assert len(scored.notes) == 1 and "somewhere.pth" in scored.notes[0]


# --- people held out


def test_people_held_out_are_asked_about_and_never_scored_as_the_test_split(folder):
    score_run(folder, baselines=False, **QUIET)
    before = files_of(folder)
    run = open_run(folder, split="held_out", **QUIET)
    _, query, gallery = hold_out(load("synthetic").train, 4, seed=0)
    assert run.query["path"].tolist() == query["path"].tolist()
    assert run.gallery["path"].tolist() == gallery["path"].tolist()
    evaluation = run.retrieval(show_progress=False).evaluate()
    assert evaluation.scores["queries"] == len(query) and run.query["pid"].nunique() == 4
    with pytest.raises(ValueError, match="opened on people held out"):
        score_run(run)
    assert files_of(folder) == before


def test_splits_that_there_are_not(folder, elsewhere):
    with pytest.raises(ValueError, match="split = 'train' of synthetic_mine: choose test, or held"):
        open_run(folder, split="train", **QUIET)
    with pytest.raises(ValueError, match="held_out of the run's own data set"):
        open_run(folder, elsewhere, split="held_out", **QUIET)
    recipe = RECIPE.model_copy(update={"hold_out": 0})
    save_weights(folder / "weights.safetensors", load_model(folder), recipe)
    with pytest.raises(ValueError, match="its hold_out is 0"):
        open_run(folder, split="held_out", **QUIET)


# --- what fails


def test_nothing_is_written_when_something_fails(folder, monkeypatch):
    before = files_of(folder)
    for what, message in (
        ({"run": "nobody"}, "no run 'nobody'"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"device": "warp"}, "no device 'warp'"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            score_run(**{"run": folder, **QUIET, **what})
    with runs.lock(folder), pytest.raises(RuntimeError, match="Another process is writing"):
        score_run(folder, baselines=False, **QUIET)
    assert files_of(folder) == before
    monkeypatch.setattr(scoring, "score_baselines", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_run(folder, **QUIET)
    assert files_of(folder) == before
    (folder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="training has not ended"):
        score_run(folder, **QUIET)
