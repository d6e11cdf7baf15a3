"""A comparison makes what is missing, picks up what is there, and loses nothing."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from reidlib import runs
from reidlib.data.tables import load
from reidlib.evaluation.retrieval import evaluate
from reidlib.model.embed import read_embeddings, write_embeddings
from reidlib.paths import outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training.loop import reproduce_command, train
from reidlib.workbook import compare
from reidlib.workbook.compare import Made, Row, complete, embedded, find, nearest

SMALL = dict(height=32, width=16, p=4, k=2, steps=3, precision="float32", hold_out=3)


def row(tag="a", **changes):
    return Row(make_recipe("demo", **(SMALL | changes)), tag)


class Fake:
    """Stands for the headless notebooks: writes what they leave, and remembers what was asked."""

    def __init__(self):
        self.asked, self.problems, self.at_once, self.most = [], {}, 0, 0
        self.lock, self.seconds = threading.Lock(), 0.0

    def __call__(self, jobs, notebook, folder, parameters):
        with self.lock:
            self.asked.append((notebook, folder.name, parameters))
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(self.seconds)
        with self.lock:
            self.at_once -= 1
        problem = self.problems.get((notebook, folder.name), "")
        if isinstance(problem, list):
            problem = problem.pop(0) if problem else ""
        if isinstance(problem, BaseException):
            raise problem
        if problem:
            return problem
        folder.mkdir(exist_ok=True, parents=True)
        if notebook == "03_train":
            settings = {k: v for k, v in parameters.items() if k not in ("recipe", "tag", "resume")}
            recipe = make_recipe("trinet", **settings)
            runs.write_json(folder / "config.json", recipe.model_dump())
            data = compare._train_data(recipe.dataset, recipe.hold_out)
            runs.write_json(folder / "manifest.json", {"status": "finished", "train_data": data})
            runs.write_text(folder / "per_query_held_out.csv", "query\n")
        else:
            scores = {"evaluated_on": "synthetic", "flip": False, "precision": "float32"}
            runs.update_json(folder / "metrics.json", **scores)
            runs.write_text(folder / "per_query.csv", "query\n")
        return ""

    @property
    def ran(self):
        return [(notebook, name) for notebook, name, _ in self.asked]


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(compare._Notebooks, "_run", lambda *arguments: fake(*arguments))
    compare._data.cache_clear()
    compare._train_data.cache_clear()
    return fake


def done(rows, split="test", **options):
    return complete(rows, split, device="cpu", show_progress=False, **options)


A, SOFT = "synthetic_batchhard_a", "synthetic_batchhard_softplus_a"


def test_each_row_is_trained_and_scored_once_and_found_again(fake):
    rows = {"hinge": row(margin=0.2), "soft": row(), "soft again": row()}
    made = done(rows, jobs=1)
    both = [("03_train", A), ("04_evaluate", A), ("03_train", SOFT), ("04_evaluate", SOFT)]
    assert fake.ran == both
    assert made["soft"] == made["soft again"] == Made(outputs_dir() / SOFT, "", True)
    assert list(made) == list(rows)
    again = done(rows)
    assert fake.ran == both, "nothing was made again"
    assert again["hinge"] == Made(outputs_dir() / A, "", False)


def test_the_notebook_gets_every_setting_of_the_row(fake):
    wanted = row(margin=0.2, loss="batch_all", mean="valid", reduction="sum", weights="none")
    done({"it": wanted})
    notebook, name, given = fake.asked[0]
    assert (notebook, name, given["tag"]) == ("03_train", "synthetic_batchall_a", "a")
    config = runs.read_recipe(outputs_dir() / name)
    assert config == wanted.recipe and "--reduction sum" in reproduce_command(config)
    # 04_evaluate scores in its own precision, not in that of training.
    assert set(fake.asked[1][2]) == {"run", "baselines", "lists", "html_queries"}


def test_a_row_whose_settings_changed_is_trained_again_and_no_other(fake):
    done({"one": row("one"), "two": row("two")}, jobs=1)
    fake.asked.clear()
    done({"one": row("one"), "two": row("two", steps=4)}, jobs=1)
    name = "synthetic_batchhard_softplus_two"
    assert fake.ran == [("03_train", name), ("04_evaluate", name)]
    assert fake.asked[0][2]["resume"] == "restart"


def test_what_only_watches_the_training_is_no_other_row(fake):
    done({"one": row()})
    fake.asked.clear()
    done({"one": row(log_every=7, checkpoint_every=9, evaluate_every=11)})
    assert fake.ran == []


def test_a_run_of_another_name_is_picked_up_by_its_settings(fake):
    done({"one": row("elsewhere")})
    fake.asked.clear()
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
    compare._data.cache_clear()
    assert find(row()) is None
    fake.asked.clear()
    done({"one": row()})
    assert fake.ran[0] == ("03_train", SOFT)
    assert fake.asked[0][2]["resume"] == ("auto" if "status" in content else "restart")


def test_an_unfinished_run_goes_on_only_where_training_would(fake):
    """03_train refuses to go on with other settings of any kind, those that only watch too."""
    folder = done({"one": row()})["one"].folder
    runs.update_json(folder / "manifest.json", status="running")
    fake.asked.clear()
    done({"one": row(checkpoint_every=7)})
    assert fake.asked[0][2]["resume"] == "restart"


def test_a_file_of_weights_goes_by_its_name(fake):
    done({"one": row(weights="here/w.safetensors")})
    fake.asked.clear()
    done({"one": row(weights="/there/w.safetensors")})
    assert fake.ran == []
    done({"one": row(weights="here/v.safetensors")})
    assert fake.ran[0] == ("03_train", SOFT)


def test_without_training_rows_say_which_run_is_nearest(fake):
    done({"soft": row(), "hinge": row(margin=0.2)})
    (outputs_dir() / SOFT / "per_query.csv").unlink()
    fake.asked.clear()
    rows = {
        "soft": row(),
        "far": row("b", margin=0.2, lr=1e-2, seed=4),
        "random": row(loss="random"),
    }
    made = done(rows, train=False)
    assert made["soft"].folder.name == SOFT and fake.ran == [("04_evaluate", SOFT)]
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
    fake.asked.clear()
    runs.update_json(folder / "metrics.json", **change)
    made = done({"one": row()})
    assert fake.ran == [("04_evaluate", SOFT)] and made["one"].trained


def test_held_out_scores_leave_the_test_split_alone(fake):
    done({"one": row()}, "held_out")
    assert fake.ran == [("03_train", SOFT)]
    with pytest.raises(ValueError, match=r"one: it has no held-out scores, since hold_out is 0"):
        done({"one": row(hold_out=0)}, "held_out")


def test_a_row_that_fails_leaves_the_others_alone(fake):
    fake.problems["03_train", A] = "The loss became NaN."
    made = done({"bad": row(margin=0.2), "good": row()})
    assert made["bad"] == Made(None, "The loss became NaN.")
    assert made["good"].folder.name == SOFT
    with pytest.raises(RuntimeError, match="No row could be made.*The loss became NaN"):
        done({"bad": row(margin=0.2)})
    fake.problems.clear()
    fake.problems["04_evaluate", A] = "no memory"
    assert done({"bad": row(margin=0.2), "good": row()})["bad"].problem == "no memory"


def test_a_run_that_another_process_trains_is_waited_for(fake, monkeypatch):
    """As the trainings that a killed comparison has left behind."""
    busy = "Another process is writing it. Wait for it."
    folder, waits = outputs_dir() / SOFT, []
    with runs.lock(folder):
        assert compare._busy(folder)
    assert not compare._busy(folder)
    monkeypatch.setattr(compare, "_busy", lambda folder: len(waits) % 4 != 3)
    monkeypatch.setattr(compare, "time", SimpleNamespace(sleep=waits.append))
    # The other one was killed, too: the row is trained here.
    fake.problems["03_train", SOFT] = [busy]
    assert done({"one": row()})["one"].folder == folder
    assert fake.ran == 2 * [("03_train", SOFT)] + [("04_evaluate", SOFT)] and len(waits) == 3
    # It came to its end: nothing is left to train.
    runs.update_json(folder / "manifest.json", status="running")
    (folder / "per_query.csv").unlink()
    fake.asked.clear()

    def finish(seconds):
        waits.append(seconds)
        runs.update_json(folder / "manifest.json", status="finished")

    monkeypatch.setattr(compare, "time", SimpleNamespace(sleep=finish))
    fake.problems["03_train", SOFT] = [busy]
    waits.clear()
    assert done({"one": row()})["one"].folder == folder
    assert fake.ran == [("03_train", SOFT), ("04_evaluate", SOFT)] and len(waits) == 3


def test_jobs_is_how_many_run_at_once(fake):
    fake.seconds = 0.05
    rows = {str(i): row(f"r{i}") for i in range(4)}
    done(rows, jobs=2)
    assert fake.most == 2
    fake.most = 0
    done({str(i): row(f"s{i}", seed=1) for i in range(3)}, jobs=1)
    assert fake.most == 1


def test_an_interrupt_stops_what_is_not_begun(fake):
    fake.problems["03_train", SOFT.replace("_a", "_r0")] = KeyboardInterrupt()
    fake.seconds = 0.05
    with pytest.raises(KeyboardInterrupt):
        done({str(i): row(f"r{i}", seed=i) for i in range(6)}, jobs=1)
    assert len(fake.ran) <= 4, "of 12"


def test_errors(fake):
    with pytest.raises(ValueError, match="choose test or held_out"):
        done({"one": row()}, "train")
    with pytest.raises(ValueError, match="jobs must be 1 or more"):
        done({"one": row()}, jobs=0)
    with pytest.raises(ValueError, match="'one' and 'two' would both be the run"):
        done({"one": row(), "two": row(steps=9)})
    assert fake.ran == []


def test_the_real_notebooks_are_run_and_their_problems_told(tmp_path):
    """One row that cannot train, for real: too many identities for the data set."""
    with pytest.raises(RuntimeError, match=r"(?s)No row could be made.*03_train, cell.*identities"):
        done({"one": row(p=1000)})
    assert (outputs_dir() / "notebooks" / SOFT / "03_train.failed.ipynb").is_file()


def test_embeddings_are_read_where_they_are_and_made_where_not(tmp_path):
    recipe = make_recipe("demo", **(SMALL | dict(hold_out=5)))
    folder = train(recipe, "a", device="cpu", show_progress=False)
    query_emb, query, gallery_emb, gallery = embedded(folder)
    data = load("synthetic")
    assert len(query_emb) == len(query) == len(data.query)
    assert len(gallery_emb) == len(gallery) == len(data.gallery)
    kept = folder / "embeddings_query.h5"
    assert np.array_equal(read_embeddings(kept)[0], query_emb)
    write_embeddings(kept, 2 * query_emb, query)
    assert np.array_equal(embedded(folder)[0], 2 * query_emb), "read, not made again"
    flipped = embedded(folder, flip=True)[0]
    assert not np.allclose(flipped, query_emb, atol=1e-6)
    assert np.array_equal(read_embeddings(kept)[0], 2 * query_emb), "flips are not kept"
    # The held-out scores of training come from these very embeddings.
    held = evaluate(*embedded(folder, "held_out"))
    table = pd.read_csv(folder / "per_query_held_out.csv")
    np.testing.assert_allclose(held.per_query["AP"], table["AP"], atol=1e-9)
    assert held.per_query["pid"].nunique() == 5
