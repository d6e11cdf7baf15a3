"""A comparison makes what is missing, picks up what is there, and loses nothing."""

import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from reidlib import runs
from reidlib.data.tables import fingerprint, hold_out, load
from reidlib.evaluation.metrics import SCORES
from reidlib.evaluation.scoring import score_run
from reidlib.paths import outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training import loop
from reidlib.workbook import compare
from reidlib.workbook.compare import Made, Row, complete, find, nearest
from reidlib.workbook.results import every_run, made_in_words, read_results
from reidlib.workbook.variants import VARIANTS, comparison

SMALL = dict(height=32, width=16, p=4, k=2, steps=3, precision="float32", hold_out=3)


def row(tag="a", **changes):
    return Row(make_recipe("demo", **(SMALL | changes)), tag)


class Fake:
    """Stands for training and scoring: writes what they leave, and remembers what was done."""

    def __init__(self):
        self.ran, self.problems = [], {}

    def fail(self, what, name):
        problem = self.problems.get((what, name))
        if isinstance(problem, list):
            problem = problem.pop(0) if problem else None
        if problem:
            raise problem

    def train(self, recipe, tag, **_):
        folder = outputs_dir() / runs.run_name("synthetic", recipe, tag)
        self.ran.append(("train", folder.name))
        self.fail("train", folder.name)
        folder.mkdir(exist_ok=True, parents=True)
        runs.write_json(folder / "config.json", recipe.model_dump())
        data = fingerprint(hold_out(load("synthetic").train, recipe.hold_out, seed=0)[0])
        manifest = {"status": "finished", "train_data": data, "wall_seconds": 60, "health": []}
        runs.write_json(folder / "manifest.json", manifest)
        runs.write_text(folder / "history.csv", "step\n1\n")
        ap = np.random.default_rng(len(self.ran)).random(8)
        table = pd.DataFrame({"query": range(8), "pid": [1, 1, 2, 2, 3, 3, 4, 4], "AP": ap})
        table = table.assign(matches=1, AP_market=ap, INP=ap, first_rank=1)
        runs.write_text(folder / "per_query_held_out.csv", table.to_csv(index=False))
        return folder

    def score(self, folder, **options):
        self.ran.append(("score", folder.name))
        assert options == {"baselines": False, "device": "cpu", "show_progress": False}
        self.fail("score", folder.name)
        scores = {"evaluated_on": "synthetic", "flip": False, "precision": "float32"}
        runs.update_json(folder / "metrics.json", **scores)
        runs.write_text(folder / "per_query.csv", "query\n")
        return SimpleNamespace(retrieval=None, evaluation=None)


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(compare.loop, "train", fake.train)
    monkeypatch.setattr(compare, "score_run", fake.score)
    monkeypatch.setattr(compare.board, "write_evaluation", lambda *_: None)
    compare.forget_data()
    return fake


def done(rows, split="test", **options):
    return complete(rows, split, device="cpu", show_progress=False, **{"jobs": 1} | options)


A, SOFT = "synthetic_batchhard_a", "synthetic_batchhard_softplus_a"


def test_each_row_is_trained_and_scored_once_and_found_again(fake, monkeypatch):
    rows = {"hinge": row(margin=0.2), "soft": row(), "soft again": row()}
    made = done(rows)
    both = [("train", A), ("score", A), ("train", SOFT), ("score", SOFT)]
    assert fake.ran == both
    assert made["soft"] == made["soft again"] == Made(outputs_dir() / SOFT, "", True)
    assert list(made) == list(rows)
    # What is there needs no process, which would read the data anew.
    monkeypatch.setattr(compare, "make", lambda *_: pytest.fail("handed to a process"))
    again = done(rows)
    assert fake.ran == both, "nothing was made again"
    assert again["hinge"] == Made(outputs_dir() / A, "", False)


def test_what_only_watches_the_training_is_no_other_row(fake):
    done({"one": row()})
    fake.ran.clear()
    done({"one": row(log_every=7, checkpoint_every=9, evaluate_every=11)})
    assert fake.ran == []


def test_a_run_of_another_name_is_picked_up_by_its_settings(fake):
    done({"one": row("elsewhere")})
    fake.ran.clear()
    made = done({"one": row("here")})
    assert made["one"].folder.name == "synthetic_batchhard_softplus_elsewhere"
    assert fake.ran == []
    # The row's own run goes first, even where another comes before it by name.
    runs.update_json(made["one"].folder / "manifest.json", status="running")
    done({"one": row("here")})
    runs.update_json(made["one"].folder / "manifest.json", status="finished")
    assert find(row("here")).name == "synthetic_batchhard_softplus_here"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", {"status": "stopped"}),
        ("manifest.json", {"train_data": "other images"}),
        ("config.json", {"seed": 1}),
        ("config.json", {"no_such_setting": 1}),
    ],
)
def test_unfinished_foreign_and_broken_runs_are_not_taken(fake, file, content):
    folder = done({"one": row()})["one"].folder
    runs.update_json(folder / file, **content)
    compare.forget_data()
    assert find(row()) is None
    fake.ran.clear()
    done({"one": row()})
    assert fake.ran[0] == ("train", SOFT)  # which goes on, or refuses: see below


def test_a_file_of_weights_goes_by_its_name(fake):
    done({"one": row(weights="here/w.safetensors")})
    fake.ran.clear()
    done({"one": row(weights="/there/w.safetensors")})
    assert fake.ran == []
    done({"one": row(weights="here/v.safetensors")})
    assert fake.ran[0] == ("train", SOFT)


def test_without_training_rows_say_which_run_is_nearest(fake):
    done({"soft": row(), "hinge": row(margin=0.2)})
    (outputs_dir() / SOFT / "per_query.csv").unlink()
    fake.ran.clear()
    rows = {
        "soft": row(),
        "far": row("b", margin=0.2, lr=1e-2, seed=4),
        "random": row(loss="random"),
    }
    made = done(rows, train=False)
    assert made["soft"].folder.name == SOFT and fake.ran == [("score", SOFT)]
    assert made["far"].problem == (
        "No run with these settings is there. "
        f"The nearest is {A}: lr = 0.001, not 0.01; seed = 0, not 4."
    )
    assert f"The nearest is {SOFT}: loss = 'batch_hard', not 'random'." in made["random"].problem
    runs.update_json(outputs_dir() / SOFT / "manifest.json", train_data="others")
    assert "nearest is synthetic_batchhard_softplus_a: other training images" in nearest(row())
    for folder in outputs_dir().iterdir():
        runs.update_json(folder / "manifest.json", status="stopped")
    with pytest.raises(RuntimeError, match="No row could be made.*There is no finished run at all"):
        done({"one": row()}, train=False)


@pytest.mark.parametrize(
    "change", [{"flip": True}, {"precision": "bfloat16"}, {"evaluated_on": "market1501"}]
)
def test_scores_of_another_kind_are_made_again_without_training(fake, change):
    folder = done({"one": row()})["one"].folder
    fake.ran.clear()
    runs.update_json(folder / "metrics.json", **change)
    made = done({"one": row()})
    assert fake.ran == [("score", SOFT)] and made["one"].trained


def test_held_out_scores_leave_the_test_split_alone(fake):
    done({"one": row()}, "held_out")
    assert fake.ran == [("train", SOFT)]
    with pytest.raises(ValueError, match=r"one: it has no held-out scores, since hold_out is 0"):
        done({"one": row(hold_out=0)}, "held_out")


def test_a_row_that_fails_leaves_the_others_alone(fake):
    fake.problems["train", A] = RuntimeError("The loss became NaN.")
    made = done({"bad": row(margin=0.2), "good": row()})
    assert made["bad"] == Made(None, "The loss became NaN.")
    assert made["good"].folder.name == SOFT
    with pytest.raises(RuntimeError, match="No row could be made.*The loss became NaN"):
        done({"bad": row(margin=0.2)})
    fake.problems.clear()
    fake.problems["score", A] = MemoryError("no memory")
    assert done({"bad": row(margin=0.2), "good": row()})["bad"].problem == "no memory"


def test_a_run_that_another_process_trains_is_waited_for(fake, monkeypatch):
    """As the trainings that a killed comparison has left behind."""
    busy = runs.Busy("Another process is writing it. Wait for it.")
    folder, held = outputs_dir() / SOFT, ExitStack()
    waits = []

    def sleep(seconds, finish=False):
        waits.append(seconds)
        if len(waits) == 3:
            held.close()  # the other process ends
            if finish:
                runs.update_json(folder / "manifest.json", status="finished")

    # The other one was killed, too: the row is trained here.
    monkeypatch.setattr(compare, "time", SimpleNamespace(sleep=sleep))
    fake.problems["train", SOFT] = [busy]
    held.enter_context(runs.lock(folder))
    assert done({"one": row()})["one"].folder == folder
    assert fake.ran == 2 * [("train", SOFT)] + [("score", SOFT)] and len(waits) == 3
    # It came to its end: nothing is left to train.
    runs.update_json(folder / "manifest.json", status="running")
    (folder / "per_query.csv").unlink()
    fake.ran.clear()
    waits.clear()
    monkeypatch.setattr(compare, "time", SimpleNamespace(sleep=lambda s: sleep(s, finish=True)))
    fake.problems["train", SOFT] = [busy]
    held.enter_context(runs.lock(folder))
    assert done({"one": row()})["one"].folder == folder
    assert fake.ran == [("train", SOFT), ("score", SOFT)] and len(waits) == 3


def test_an_interrupt_stops_what_is_not_begun(fake):
    fake.problems["train", SOFT.replace("_a", "_r0")] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        done({str(i): row(f"r{i}", seed=i) for i in range(6)})
    assert len(fake.ran) == 1, "of 12"


def test_errors(fake):
    with pytest.raises(ValueError, match="choose test or held_out"):
        done({"one": row()}, "train")
    with pytest.raises(ValueError, match="jobs must be 1 or more"):
        done({"one": row()}, jobs=0)
    with pytest.raises(ValueError, match="'one' and 'two' would both be the run"):
        done({"one": row(), "two": row(steps=9)})
    assert fake.ran == []


def test_the_whole_comparison_on_held_out_people_picks_up_what_is_there(fake):
    recipe = row(height=64, width=32).recipe  # half of it is smaller: no step is another row
    compared = comparison(recipe, seeds=1)
    made = done(compared.rows, "held_out")
    count = len(compared.rows)
    assert count == 5 + 6 + 6 + 5, "variants, margins, the path, the departures"
    assert f"{count} of {count} rows were made now" in made_in_words(made, 0)
    every = every_run(read_results(made, "held_out"))
    assert list(every) == ["row", "seed", "run", *SCORES, "minutes", "health"]
    assert len(every) == every["run"].nunique() == count
    for its in every.itertuples():
        table = pd.read_csv(outputs_dir() / its.run / "per_query_held_out.csv")
        assert its.mAP == pytest.approx(table["AP"].mean(), abs=1e-12)
    assert not list(outputs_dir().glob("*/per_query.csv")), "the test split"

    # Interrupted: one run was deleted, one stopped on its way. The others stay as they are.
    gone, stopped = "synthetic_batchhard_compare_m0.5", "synthetic_random_softplus_compare_s0"
    shutil.rmtree(outputs_dir() / gone)
    runs.update_json(outputs_dir() / stopped / "manifest.json", status="stopped")
    fake.ran.clear()
    made = done(compared.rows, "held_out")
    assert {*fake.ran} == {("train", gone), ("train", stopped)}
    assert f"2 of {count} rows were made now" in made_in_words(made, 0)

    # Only what is there: the second seed is missing, and so is one row of the first.
    shutil.rmtree(outputs_dir() / "synthetic_batchhard_compare_s0")
    fake.ran.clear()
    made = done(comparison(recipe, seeds=2).rows, "held_out", train=False)
    assert "missing: 6, see below" in made_in_words(made, 0) and not fake.ran
    problem = made["batch-all 0.2", 1].problem
    assert problem.endswith("The nearest is synthetic_batchall_compare_s0: seed = 0, not 1.")
    assert not (outputs_dir() / "synthetic_batchhard_compare_s0").exists()
    assert read_results(made, "held_out").compared == [n for n in VARIANTS if n != "batch-hard 0.2"]


# --- for real


@pytest.mark.slow
def test_rows_are_trained_scored_and_found_again_in_processes_of_their_own():
    rows = {"hinge": row(margin=0.2), "soft": row(), "too many": row("b", p=1000)}
    made = done(rows, jobs=2)
    assert made["too many"].folder is None and "P = 1000 identities" in made["too many"].problem
    for name in ("hinge", "soft"):
        assert made[name].trained and runs.read_recipe(made[name].folder) == rows[name].recipe
        scored = score_run(made[name].folder, baselines=False, device="cpu", show_progress=False)
        table = pd.read_csv(made[name].folder / "per_query.csv")
        assert table["AP"].mean() == pytest.approx(scored.scores["mAP"], abs=1e-12)
    again = done({name: rows[name] for name in ("hinge", "soft")})
    assert not any(m.trained for m in again.values())
    assert [m.folder for m in again.values()] == [made[name].folder for name in again]

    # Other settings under the same tag: the run that is there stays as it is, and is named.
    weights = made["soft"].folder / "weights.safetensors"
    before = weights.read_bytes()
    told = done({"other": row(steps=4), "hinge": rows["hinge"]})["other"]
    assert told.folder is None and "steps: 3 there, 4 now" in told.problem
    manifest = made["soft"].folder / "manifest.json"
    manifest.write_text('{"status": "fin')
    told = done({"soft": row(), "hinge": rows["hinge"]})["soft"]
    assert told.folder is None and "manifest.json is not valid JSON" in told.problem
    manifest.unlink()
    told = done({"soft": row(), "hinge": rows["hinge"]})["soft"]
    assert "weights.safetensors and no manifest.json" in told.problem
    assert weights.read_bytes() == before
    weights.unlink()
    checkpoint = made["soft"].folder / "checkpoint.pt"
    before = checkpoint.read_bytes()
    told = done({"soft": row(), "hinge": rows["hinge"]})["soft"]
    assert "checkpoint.pt and no manifest.json" in told.problem
    assert checkpoint.read_bytes() == before


@pytest.mark.slow
def test_a_row_that_was_stopped_goes_on():
    it = row(steps=6, checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            done({"it": it})
    folder = outputs_dir() / SOFT
    assert (folder / "checkpoint.pt").exists() and not (folder / "weights.safetensors").exists()
    assert done({"it": it})["it"] == Made(folder, "", True)
    # A run of another name beside it, never stopped. (By `complete` it would be this very row.)
    whole = loop.train(it.recipe, "whole", device="cpu", show_progress=False)
    files = [f / "weights.safetensors" for f in (folder, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
