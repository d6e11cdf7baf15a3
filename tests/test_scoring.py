"""A run opened and scored: one run has one score, and what is on disk is of these weights and images."""

import dataclasses
import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from reidlib import runs
from reidlib.data.pixels import load_images
from reidlib.data.synthetic import draw_dataset
from reidlib.data.tables import fingerprint, hold_out, load
from reidlib.evaluation import scoring
from reidlib.evaluation.metrics import SCORES
from reidlib.evaluation.retrieval import evaluate
from reidlib.evaluation.scoring import PER_QUERY, open_run, score_run
from reidlib.model.embed import embed, embed_views
from reidlib.model.stored import read_embeddings
from reidlib.model.weights import build_model, load_model, save_weights
from reidlib.recipes import make_recipe
from reidlib.training.loop import prepare
from reidlib.workbook.scores import read_per_query, scores_text

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
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name != ".lock"}


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
    assert {*metrics["baselines"]} == {"untrained", "colours_without_camera"}
    assert metrics["baselines"]["untrained"] == expected.scores, "it was never trained"
    assert metrics["evaluated_on"] == "synthetic" and metrics["protocol"] == expected.protocol
    assert metrics["flip"] is False and "with_flips" not in metrics
    written, columns = pd.read_csv(folder / PER_QUERY["test"]), ["AP", "first_rank", "INP", "pid"]
    sides = written[columns], expected.per_query[columns]
    pd.testing.assert_frame_equal(*sides, check_dtype=False, rtol=1e-12)
    assert written["path"][0].startswith("query/"), "the same on every machine"
    assert (folder / "weights.safetensors").read_bytes() == weights
    (entry,) = scorings_of(folder)
    assert entry["flip"] is False and entry["data"] == "synthetic"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["at"])
    for side, digest in entry["embeddings_sha256"].items():
        assert digest == runs.sha256(folder / f"embeddings_{side}.h5")


def test_what_people_see(folder):
    scored = score_run(folder, flip=True, **QUIET)
    table = scored.table()
    names = ["synthetic_mine", "with flips averaged", "untrained", "colours without camera"]
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


OTHERS = ["weights", "precision", "flip", "rows", "pid", "data", "gone", "damaged"]


@pytest.mark.slow
@pytest.mark.parametrize("what", OTHERS)
def test_embeddings_of_something_else_are_made_anew(folder, embedded, elsewhere, what):
    score_run(folder, baselines=False, **QUIET)
    if what == "weights":
        change_weights(folder)
    if what == "gone":
        (folder / "embeddings_gallery.h5").unlink()
    if what == "damaged":  # the sign of one number
        file = folder / "embeddings_query.h5"
        emb, content = read_embeddings(file)[0], bytearray(file.read_bytes())
        content[content.index(emb[0].tobytes()) + 3] ^= 0x80
        file.write_bytes(content)
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


ELSE = ["data", "other gallery", "moved", "trained elsewhere", "bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ELSE)
def test_no_result_replaces_one_of_something_else(folder, elsewhere, tmp_path, embedded, what):
    train = fingerprint(hold_out(load("synthetic").train, 4, seed=0)[0])
    runs.update_json(folder / "manifest.json", train_data=train)
    score_run(folder, baselines=False, **QUIET)
    before, options = files_of(folder), {}
    if what == "trained elsewhere":  # another folder has the name now
        runs.update_json(folder / "manifest.json", train_data="of other images")
    if what == "bfloat16":
        options = {"precision": "bfloat16"}
    if what == "data":
        options = {"dataset": elsewhere}
    if what in ("other gallery", "moved"):
        options = {"dataset": tmp_path / "copy"}
        shutil.copytree(load("synthetic").root, tmp_path / "copy")
    if what == "other gallery":
        Path(load(tmp_path / "copy").gallery["path"][0]).unlink()
    scored = score_run(folder, baselines=False, **options, **QUIET)
    apart = scored.place != folder
    assert apart == (what != "moved"), "the same images are the same data set, wherever they lie"
    changed = {name for name, content in files_of(folder).items() if before.get(name) != content}
    assert changed <= {"manifest.json"} or what == "moved"
    if not apart:
        return
    assert runs.read_json(scored.place / "metrics.json")["mAP"] == scored.scores["mAP"]
    about = read_embeddings(scored.place / "embeddings_query.h5")[1].attrs
    assert about["precision"] == options.get("precision", "float32")
    assert scored.place.name in str(scored.table())
    assert what == "bfloat16" or scored.run.notes[-1:]
    shown = scores_text([folder])
    assert f"  {scored.place.name}" in shown and "queries of synthetic" in shown
    made = len(embedded)
    again = open_run(folder, options.get("dataset"), **QUIET)
    again.embeddings(precision=options.get("precision", "float32"), show_progress=False)
    assert len(embedded) == made, "those apart are read again, too"


# --- what stands beside the scores


def test_flips_are_added_and_replace_nothing(folder):
    plain = score_run(folder, baselines=False, **QUIET)
    before, written = files_of(folder), metrics_of(folder)
    scored = score_run(folder, flip=True, baselines=False, **QUIET)
    assert scored.scores == plain.scores != scored.with_flips.scores
    metrics, after = metrics_of(folder), files_of(folder)
    assert metrics == written | {"with_flips": scored.with_flips.scores}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"metrics.json", "manifest.json"}
    assert scorings_of(folder)[-1]["flip"] is True
    run, both = scored.run, {"flip": True, "show_progress": False}
    sides = run.query_pixels, run.gallery_pixels
    query, gallery = (embed(run.model, pixels, RECIPE, **both) for pixels in sides)
    assert evaluate(query, run.query, gallery, run.gallery).scores == scored.with_flips.scores
    np.testing.assert_array_equal(run.embeddings(**both)[0], query)
    score_run(folder, baselines=False, **QUIET)
    assert metrics_of(folder) == metrics, "what was known of these weights stays"


@pytest.mark.slow
def test_what_was_scored_of_other_weights_does_not_stay(folder):
    runs.write_json(folder / "metrics.json", {"held_out": {"mAP": 0.5}})
    score_run(folder, flip=True, **QUIET)
    kept = metrics_of(folder)
    assert kept["with_flips"] and kept["baselines"] and kept["held_out"] == {"mAP": 0.5}
    change_weights(folder)
    assert "of other weights than the run has now" in scores_text([folder])
    score_run(folder, baselines=False, **QUIET)
    metrics = metrics_of(folder)
    assert "with_flips" not in metrics and metrics["baselines"] == {}
    assert metrics["held_out"] == {"mAP": 0.5}, "of the training, not of the test split"
    assert metrics["weights_sha256"] == runs.sha256(folder / "weights.safetensors")


def test_a_run_whose_starting_weights_are_not_here_has_one_baseline(folder):
    recipe = RECIPE.model_copy(update={"weights": "somewhere.pth"})
    save_weights(folder / "weights.safetensors", load_model(folder), recipe)
    scored = score_run(folder, **QUIET)
    assert {*scored.baselines} == {"colours_without_camera"}
    assert len(scored.notes) == 1 and "somewhere.pth" in scored.notes[0]


def test_what_a_pretrained_network_knows_is_scored_without_its_random_head(folder, tmp_path):
    backbone = build_model(RECIPE.model_copy(update={"seed": 1})).backbone
    torch.save(backbone.state_dict(), tmp_path / "b.pth")
    recipe = RECIPE.model_copy(update={"weights": str(tmp_path / "b.pth")})
    save_weights(folder / "weights.safetensors", load_model(folder), recipe)
    scored = score_run(folder, **QUIET)
    assert {*scored.baselines} == {"pretrained", "colours_without_camera"}
    run, bare = scored.run, build_model(recipe.model_copy(update={"head": False}))
    sides = run.query_pixels, run.gallery_pixels
    embs = [embed(bare, pixels, recipe, show_progress=False) for pixels in sides]
    wanted = run.ranked(*embs).evaluate().scores
    assert scored.baselines["pretrained"].scores == wanted


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
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="mine could not be"):
        patch.setattr(runs, "write_json", lambda *_: (_ for _ in ()).throw(full))
        score_run(folder, baselines=False, **QUIET)
    assert files_of(folder) == before
    monkeypatch.setattr(scoring, "score_baselines", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_run(folder, **QUIET)
    assert metrics_of(folder)["mAP"] > 0, "scores are written as soon as they are known"
    (folder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="training has not ended"):
        score_run(folder, **QUIET)


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_kill_at_any_rename_leaves_one_set(folder, monkeypatch):
    score_run(folder, baselines=False, **QUIET)
    old = metrics_of(folder)["weights_sha256"]
    change_weights(folder)
    run, killed, seen = open_run(folder, **QUIET), True, set()
    run.embeddings(show_progress=False)  # made once
    before = files_of(folder)
    while killed:
        left, real = len(seen), os.rename
        seen.add(left)

        def rename(*args, real=real):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            patch.setattr(os, "replace", rename)
            try:
                score_run(run, baselines=False, **QUIET)
                killed = False
            except Killed:
                killed = True
        (folder / ".unfinished").mkdir(exist_ok=True)  # where a kill leaves it
        assert runs.find_run(folder) == folder  # whoever opens the run
        metrics, (*_, entry) = metrics_of(folder), scorings_of(folder)
        files = [folder / f"embeddings_{side}.h5" for side in ("query", "gallery")]
        assert [*entry["embeddings_sha256"].values()] == [*map(runs.sha256, files)]
        for file in files:
            assert read_embeddings(file)[1].attrs["weights_sha256"] == metrics["weights_sha256"]
        read_per_query(folder)  # compares
        assert (metrics["weights_sha256"] == old) == (files_of(folder) == before) or not killed
        for name, content in before.items():
            (folder / name).write_bytes(content)
    assert len(seen) > 8 and metrics["weights_sha256"] != old


def test_one_query_has_scores_and_no_interval(folder):
    run = open_run(folder, **QUIET)
    run = dataclasses.replace(run, query=run.query[:1], query_pixels=run.query_pixels[:1])
    scored = score_run(run, baselines=False, **QUIET)
    assert metrics_of(folder)["mAP"] == scored.scores["mAP"] and not metrics_of(folder)["intervals"]
    assert scored.spread_in_words().startswith("One query alone")


@pytest.mark.parametrize("known", [False, True])
def test_a_query_that_is_found_by_its_own_photograph_saved_anew_is_told(folder, known):
    run = open_run(folder, **QUIET)
    camids = [table["camid"] if known else -1 for table in (run.query, run.gallery)]
    query, gallery = run.query.assign(camid=camids[0]), run.gallery.assign(camid=camids[1])
    copied = np.flatnonzero(gallery["pid"].isin(query["pid"][:2]))[[0, -1]]
    pixels = run.gallery_pixels.copy()
    for row in copied:
        asked = query.index[query["pid"] == gallery["pid"][row]][0]
        # as JPEG leaves them
        noise = np.random.default_rng(0).integers(-3, 4, pixels[row].shape)
        pixels[row] = (run.query_pixels[asked].astype(int) + noise).clip(0, 255)
    run = dataclasses.replace(run, query=query, gallery=gallery, gallery_pixels=pixels)
    said = f"{gallery['pid'][copied].nunique()} of {len(query)} queries are found by a copy"
    protocol = score_run(run, baselines=False, **QUIET).evaluation.protocol
    for text in (protocol, metrics_of(folder)["warning"], scores_text([folder])):
        assert (said in text) is not known


def test_people_in_training_and_test_stand_beside_every_score(folder, capsys):
    run, recipe = open_run(folder, **QUIET), RECIPE.model_copy(update={"hold_out": 0, "p": 4})
    both = run.query["pid"].unique()[:2]
    train = run.data.train.replace({"pid": {run.data.train["pid"][0]: both[0]}})
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=train))
    said = f"1 identities are in training and in test: {both[0]}."
    scored = score_run(run, baselines=False, **QUIET)
    assert said in scored.evaluation.protocol and said in str(run.notes) and said in str(scored)
    assert said in scores_text([folder])
    prepare(recipe, device="cpu", dataset=run.data, show_progress=False)
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("per_query.csv", lambda text: text[: len(text) // 2]),
        ("per_query.csv", lambda text: "\n".join(text.splitlines()[:-1])),
        ("per_query.csv", lambda text: text.replace(",0.", ",1.", 1)),
        ("per_query.csv", lambda text: re.sub(r"(?m)^(0,[^,]+),\d+", r"\1,999", text)),  # a pid
        ("per_query.csv", lambda text: text.replace("AP,", "ap,")),
        ("per_query.csv", lambda text: ""),
        ("per_query.csv", lambda text: text.encode("utf-16")),
        ("metrics.json", lambda text: "[]"),
        ("metrics.json", lambda text: "null"),
        ("metrics.json", lambda text: text[:100]),
        ("metrics.json", lambda text: '{"mAP": "x", "queries": 1, "queries_without_match": 0}'),
        ("metrics.json", lambda text: '{"mAP": 0.5}'),
        ("metrics.json", lambda text: '{"baselines": []}'),
        ("metrics.json", lambda text: re.sub('"top2": [0-9.]+', '"top2": 1e999', text)),
        ("metrics.json", lambda text: re.sub('"queries": [0-9]+', '"queries": null', text)),
    ],
)
def test_a_broken_table_is_named_and_hides_no_other_run(folder, tmp_path, file, damage):
    score_run(folder, baselines=False, **QUIET)
    good, base = (shutil.copytree(folder, folder.with_name(name)) for name in ("good", "base"))
    broken = damage((folder / file).read_text())
    (folder / file).write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    table, *_, notes = scores_text(baselines=True, against=base).split("\n\n")
    assert "good" in table and "mAP" in table
    said = [line for line in notes.splitlines() if "passed over" in line or "not compared" in line]
    assert said and all(line.startswith("synthetic_mine: ") for line in said)
    if file == "per_query.csv":
        with pytest.raises(ValueError, match="per_query.csv .*[Ss]core the run again"):
            read_per_query(folder)
    assert read_per_query(good)["AP"].mean() == pytest.approx(metrics_of(good)["mAP"])
