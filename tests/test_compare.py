"""A comparison makes what is missing, picks up what is there, and loses nothing."""

import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from conftest import until
from reidlib import runs
from reidlib.__main__ import main
from reidlib.data.tables import fingerprint, hold_out, load
from reidlib.evaluation.metrics import SCORES
from reidlib.evaluation.scoring import score_run
from reidlib.paths import outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training import loop
from reidlib.workbook import compare, results
from reidlib.workbook.compare import Made, Row, complete
from reidlib.workbook.variants import comparison

SMALL = dict(height=32, width=16, p=4, k=2, steps=3, precision="float32", hold_out=3)
A, SOFT = "synthetic_batchhard_a", "synthetic_batchhard_softplus_a"


def row(tag="a", **changes):
    return Row(make_recipe("demo", **(SMALL | changes)), tag)


class Fake:
    """Stands for training and scoring: writes what they leave, and remembers what was done."""

    def __init__(self):
        self.ran, self.problems = [], {}

    def begin(self, what, name):
        self.ran.append((what, name))
        if self.problems.get((what, name)):
            raise self.problems[what, name].pop(0)

    def train(self, recipe, tag, longer, **_):
        assert not longer, "3 steps after 2 are not 3 at once"
        folder = outputs_dir() / runs.run_name("synthetic", recipe, tag)
        self.begin("train", folder.name)
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
        assert options == {"baselines": False, "device": "cpu", "show_progress": False}
        self.begin("score", folder.name)
        scores = {"evaluated_on": "synthetic", "flip": False, "precision": "float32"}
        runs.update_json(folder / "metrics.json", **scores)
        runs.write_text(folder / "per_query.csv", "query\n")
        return SimpleNamespace(retrieval=None, evaluation=None)

    def did(self):
        """What was done since this was asked last."""
        done, self.ran = self.ran, []
        return done


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(compare.loop, "train", fake.train)
    monkeypatch.setattr(compare, "score_run", fake.score)
    monkeypatch.setattr(compare.board, "write_evaluation", lambda *_: None)
    return fake


def done(rows, split="test", **options):
    return complete(rows, split, device="cpu", show_progress=False, **{"jobs": 1} | options)


def one(row, split="test", **options):
    return done({"one": row}, split, **options)["one"]


def test_each_row_is_trained_and_scored_once_and_found_again(fake, monkeypatch):
    rows = {"hinge": row(margin=0.2), "soft": row(), "soft again": row()}
    made = done(rows)
    assert fake.did() == [("train", A), ("score", A), ("train", SOFT), ("score", SOFT)]
    assert made["soft"] == made["soft again"] == Made(outputs_dir() / SOFT, "", True)
    assert list(made) == list(rows)
    assert runs.read_json(made["soft"].folder / "manifest.json")[runs.COMPARED]
    # What is there needs no process, which would read the data anew.
    monkeypatch.setattr(compare, "make", lambda *_: pytest.fail("handed to a process"))
    assert done(rows)["hinge"] == Made(outputs_dir() / A, "", False) and not fake.did()


def test_what_makes_another_row(fake):
    weights = {"weights": "here/w.safetensors"}
    one(row(**weights))
    fake.did()
    watched = {"log_every": 7, "checkpoint_every": 9, "evaluate_every": 11}
    for same in (weights | watched, {"weights": "/there/w.safetensors"}):
        one(row(**same))
        assert not fake.did()
    one(row(weights="here/v.safetensors"))
    assert fake.did() == [("train", SOFT)]


def test_a_run_of_another_name_is_picked_up_by_its_settings(fake):
    one(row("elsewhere"))
    fake.did()
    folder = one(row("here")).folder
    assert folder.name == "synthetic_batchhard_softplus_elsewhere" and not fake.did()
    # The row's own run goes first, even where another comes before it by name.
    runs.update_json(folder / "manifest.json", status="running")
    one(row("here"))
    runs.update_json(folder / "manifest.json", status="finished")
    assert one(row("here")).folder.name == "synthetic_batchhard_softplus_here"


@pytest.mark.parametrize(
    ("file", "content", "again"),
    [
        ("manifest.json", {"status": "stopped"}, "train"),
        ("manifest.json", {"train_data": "other images"}, "train"),
        ("manifest.json", {"went_on_after": [2]}, "train"),
        ("config.json", {"seed": 1}, "train"),
        ("config.json", {"no_such_setting": 1}, "train"),
        ("metrics.json", {"flip": True}, "score"),
        ("metrics.json", {"precision": "bfloat16"}, "score"),
        ("metrics.json", {"evaluated_on": "market1501"}, "score"),
    ],
)
def test_unfinished_foreign_and_broken_runs_and_scores_are_not_taken(fake, file, content, again):
    folder = one(row()).folder
    fake.did()
    runs.update_json(folder / file, **content)
    assert one(row()).trained
    assert fake.did()[0] == (again, SOFT)  # training goes on, or refuses: see below


def test_without_training_rows_say_which_run_is_nearest(fake):
    done({"soft": row(), "hinge": row(margin=0.2)})
    (outputs_dir() / SOFT / "per_query.csv").unlink()
    fake.did()
    far, other = row("b", margin=0.2, lr=1e-2, seed=4), row(loss="random")
    made = done({"soft": row(), "far": far, "random": other}, train=False)
    assert made["soft"].folder.name == SOFT and fake.did() == [("score", SOFT)]
    assert made["far"].problem == (
        "No run with these settings is there. "
        f"The nearest is {A}: lr = 0.001, not 0.01; seed = 0, not 4."
    )
    assert f"The nearest is {SOFT}: loss = 'batch_hard', not 'random'." in made["random"].problem
    runs.update_json(outputs_dir() / SOFT / "manifest.json", train_data="others")
    problem = done({"soft": row(), "hinge": row(margin=0.2)}, train=False)["soft"].problem
    assert f"nearest is {SOFT}: other training images" in problem
    for folder in outputs_dir().iterdir():
        runs.update_json(folder / "manifest.json", status="stopped")
    with pytest.raises(RuntimeError, match="No row could be made.*There is no finished run at all"):
        one(row(), train=False)


def test_held_out_scores_leave_the_test_split_alone(fake):
    rows = {"soft": row(), "hinge": row(margin=0.2)}
    folder = done(rows, "held_out")["soft"].folder
    assert fake.did() == [("train", SOFT), ("train", A)]
    (folder / "per_query_held_out.csv").unlink()
    problem = done(rows, "held_out")["soft"].problem
    assert problem == f"{SOFT} has no per_query_held_out.csv: delete it." and not fake.did()


def test_a_row_that_fails_leaves_the_others_alone(fake):
    bad, good = row(margin=0.2), row()
    fake.problems["train", A] = [RuntimeError("The loss became NaN."), RuntimeError("NaN again")]
    made = done({"bad": bad, "good": good})
    assert made["bad"] == Made(None, "The loss became NaN.") and made["good"].folder.name == SOFT
    with pytest.raises(RuntimeError, match=f"No row could be made. {A}: NaN again"):
        one(bad)
    fake.problems["score", A] = [MemoryError()]
    assert done({"bad": bad, "good": good})["bad"].problem == "MemoryError"


@pytest.mark.parametrize("ends", [False, True], ids=["it is killed, too", "it comes to its end"])
def test_a_run_that_another_process_trains_is_waited_for(fake, ends):
    """As the trainings that a killed comparison has left behind."""
    folder = one(row()).folder
    (folder / "per_query.csv").unlink()
    runs.update_json(folder / "manifest.json", status="running")
    fake.problems["train", SOFT] = [runs.Busy("Another process is writing it. Wait for it.")]
    fake.did()
    begun = threading.Event()

    def other():
        with runs.lock(folder):
            begun.set()
            time.sleep(0.3)
            fake.ran.append("the other ends")
            if ends:
                runs.update_json(folder / "manifest.json", status="finished")

    threading.Thread(target=other).start()
    begun.wait()
    assert one(row()).folder == folder
    trained = ("train", SOFT)
    assert fake.did() == [trained, "the other ends", *[trained] * (not ends), ("score", SOFT)]


def test_rows_that_another_process_is_at_come_last_and_are_waited_for(fake, capsys):
    """The other one, a thread here, ends when the row that nobody is at is done."""
    rows, begun = {"hinge": row(margin=0.2), "soft": row()}, threading.Event()
    fake.problems["train", A] = [runs.Busy("another trains it"), runs.Busy("still")]

    def other():
        with runs.lock(outputs_dir() / A):
            begun.set()
            until(lambda: ("score", SOFT) in fake.ran)

    threading.Thread(target=other).start()
    begun.wait()
    assert all(m.trained for m in done(rows).values())
    train, soft = ("train", A), [("train", SOFT), ("score", SOFT)]
    assert fake.did() == [train, *soft, train, train, ("score", A)]
    said = capsys.readouterr().err
    assert f"{A}: another process is at it; others first.\n" in said
    assert f"{A}: another process is at it; waiting.\n" in said


LINE = "--hold-out=3 --height=32 --width=16 --p=4 --k=2 --steps=10 --precision=float32 --device=cpu"
LINE = f"compare --seeds 1 --no-margins --no-ladder {LINE}".split()


def listed(capsys, *words):
    """The commands that --list prints, each in words."""
    capsys.readouterr()
    assert main([*LINE, *words, "--list"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_each_listed_command_makes_its_row_and_any_merges_them(fake, capsys):
    options = ["--tag", "a", "--split", "held_out"]
    commands = listed(capsys, *options)
    assert [words[:3] for words in commands] == [[sys.executable, "-m", "reidlib"]] * 5
    for words in commands[::-1]:
        assert main(words[3:]) == 0
        assert fake.did() == [("train", f"synthetic_{words[-1]}")]
        assert main(words[3:]) == 0 and not fake.did(), "it is there"
    assert len(listed(capsys, "--seeds", "2")) == 10
    assert main([*LINE, *options]) == 0 and not fake.did()
    said = capsys.readouterr().out
    assert said.count("on people held out") == len(commands)
    shutil.rmtree(outputs_dir() / f"{A}_s0")
    fake.problems["train", f"{A}_s0"] = [RuntimeError("The loss became NaN.")]
    assert main([*LINE, *options]) == 1
    out, err = capsys.readouterr()
    assert out.count("held out") == 4 and "batchhard_a_s0: The loss became NaN." in err
    assert main([*LINE, *options, "--row", "batchard_a_s0"]) == 1
    assert "no row 'batchard_a_s0'; did you mean 'batchhard_a_s0'?" in capsys.readouterr().err


def test_a_data_set_without_a_test_is_refused_before_anything_is_trained(fake, tmp_path):
    for name in (names := [f"{pid}_{n}.jpg" for pid in (1, 2, 3) for n in (1, 2)]):
        (tmp_path / name).touch()
    (tmp_path / "train.csv").write_text("\n".join(f"{name[0]},{name}" for name in names))
    with pytest.raises(ValueError, match="has no test"):
        one(row(dataset=str(tmp_path / "train.csv"), hold_out=0))
    assert not fake.did()


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ({"one": row()}, {"split": "train"}, "choose test or held_out"),
        ({"one": row()}, {"jobs": 0}, "jobs must be 1 or more"),
        ({"one": row(), "two": row(steps=9)}, {}, f"'one' and 'two' would both be the run {SOFT}"),
        ({"one": row(hold_out=0)}, {"split": "held_out"}, "one: it has no held-out scores, since"),
    ],
)
def test_errors(fake, rows, options, said):
    with pytest.raises(ValueError, match=said):
        done(rows, **options)
    assert not fake.did()


def test_the_whole_comparison_on_held_out_people_picks_up_what_is_there(fake, capsys):
    recipe = row(height=64, width=32).recipe  # half of it is smaller: no step is another row
    compared = comparison(recipe, seeds=1)
    made = done(compared.rows, "held_out")
    count = len(compared.rows)
    assert f"{count} of {count} rows were made now" in results.made_in_words(made, 0)
    every = results.every_run(results.read(made, "held_out"))
    assert list(every) == ["row", "seed", "run", *SCORES, "minutes", "health"]
    assert len(every) == every["run"].nunique() == count
    for its in every.itertuples():
        table = pd.read_csv(outputs_dir() / its.run / "per_query_held_out.csv")
        assert its.mAP == pytest.approx(table["AP"].mean(), abs=1e-12)
    assert not list(outputs_dir().glob("*/per_query.csv")), "the test split"
    fake.did()
    # Interrupted: one run was deleted, one stopped on its way. The others stay as they are.
    gone, stopped = "synthetic_batchhard_compare_m0.5", "synthetic_random_softplus_compare_s0"
    shutil.rmtree(outputs_dir() / gone)
    runs.update_json(outputs_dir() / stopped / "manifest.json", status="stopped")
    made = done(compared.rows, "held_out")
    assert {*fake.did()} == {("train", gone), ("train", stopped)}
    assert f"2 of {count} rows were made now" in results.made_in_words(made, 0)
    # One whose table is cut short is named, and the others are compared.
    table = outputs_dir() / gone / "per_query_held_out.csv"
    table.write_text(table.read_text()[:20])
    capsys.readouterr()
    assert len(results.read(made, "held_out")) == count - 1
    assert re.match(f"NOT IN THE TABLES, .*{gone}/{table.name} has no", capsys.readouterr().out)


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
    assert [m for m in again.values()] == [Made(made[name].folder) for name in again]

    # A run of the row's name with other settings, or a broken one, stays as it is, and is named.
    weights = made["soft"].folder / "weights.safetensors"
    before = weights.read_bytes()
    told = done({"other": row(steps=4), "hinge": rows["hinge"]})["other"]
    assert told.folder is None and "steps: 3 there, 4 now" in told.problem
    (weights.parent / "manifest.json").write_text('{"status": "fin')
    told = done({"soft": row(), "hinge": rows["hinge"]})["soft"]
    assert told.folder is None and "manifest.json is not valid JSON" in told.problem
    assert weights.read_bytes() == before


def work(folder, name, commands):
    """A shell loop over commands, which writes down each step of each row.

    The first that trains waits until another one wants its row, and kills itself in the sixth step.
    """
    os.chdir(folder)
    sys.stdout = sys.stderr = open(f"err{name}", "w", buffering=1)  # noqa: SIM115
    across, steps = loop.distributed.across, []

    def noted(*args):
        steps.append(row)
        if steps.count(row) == 6 and not Path("killed").exists():
            told = "; waiting."  # by another one
            until(lambda: any(told in path.read_text() for path in Path().glob("err*")), 120)
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open("steps", "a") as file:
            file.write(f"{row}\n")
        return across(*args)

    loop.distributed.across = noted
    for words in commands:
        row = words[-1]
        assert main(words[3:]) == 0


@pytest.mark.slow
def test_two_workers_one_of_them_killed_train_each_row_once(tmp_path, capsys):
    words = ["--hold-out=0", "--tag=w"]
    commands = listed(capsys, *words)
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(["reidlib.workbook.results"])

    def start(name):
        worker = context.Process(target=work, args=(tmp_path, name, commands))
        worker.start()
        return worker

    two = [start(0), start(1)]
    killed = until(lambda: [worker for worker in two if worker.exitcode is not None], 120)
    assert [worker.exitcode for worker in killed] == [-signal.SIGKILL]
    workers = [*(worker for worker in two if worker not in killed), start(2)]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    # A checkpoint has every second step, so of five that the killed one did the last comes again.
    first, *others = (words[-1] for words in commands)
    done = Counter((tmp_path / "steps").read_text().split())
    assert done == {first: 11} | dict.fromkeys(others, 10)
    assert main([*LINE, *words]) == 0  # trains nothing
    assert capsys.readouterr().out.count(" queries of synthetic") == len(commands)
