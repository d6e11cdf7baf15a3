"""What TensorBoard shows: read from its files, from its own server, and in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from conftest import until
from reidlib import runs
from reidlib.evaluation.metrics import SCORES
from reidlib.evaluation.scoring import open_run
from reidlib.look import board
from reidlib.paths import ROOT, outputs_dir
from reidlib.recipes import make_recipe
from reidlib.training import loop
from reidlib.workbook import release

pytestmark = pytest.mark.slow  # nearly all need the two trained runs, and most a server

SMALL = {"hidden": 16, "dim": 8, "height": 32, "width": 16, "p": 4, "k": 2, "steps": 12}
SMALL |= {"precision": "float32", "hold_out": 5, "log_every": 1, "checkpoint_every": 4}
SMALL |= {"evaluate_every": 4, "backbone": "mobilenet_v3_small"}
HARD, SOFT = "synthetic_batchhard", "synthetic_batchhard_softplus"
PHOTOGRAPH = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")  # how files of pictures begin


def fit(tag="", resume="auto", **changes):
    recipe = make_recipe("demo", **(SMALL | changes))
    return loop.train(recipe, tag, resume=resume, device="cpu", show_progress=False)


def evaluate(folder, name="test", flip=False):
    """What 04_evaluate does with a run; returns its retrieval and evaluation."""
    run = open_run(folder, device="cpu", show_progress=False)
    retrieval = run.retrieval(flip=flip, show_progress=False)
    evaluation = retrieval.evaluate()
    board.write_evaluation(folder, retrieval, evaluation, name)
    return retrieval, evaluation


@pytest.fixture(scope="module")
def outputs(data_root, tmp_path_factory):
    """An outputs folder with two runs, trained and evaluated; and what was evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REID_DATA", str(data_root))
        patch.setenv("REID_CACHE", str(data_root / ".cache"))
        patch.setenv("REID_OUTPUTS", str(tmp_path_factory.mktemp("board") / "outputs"))
        options = {"backbone": "resnet8", "checkpoint_every": 12}
        folders = {HARD: fit(margin=0.2, **options), SOFT: fit(margin="soft", **options)}
        assert [folder.name for folder in folders.values()] == [*folders]
        evaluated = {name: evaluate(folder) for name, folder in folders.items()}
    return folders[HARD].parent, evaluated


def values(path):
    """All values of an event file."""
    return [value for event in EventFileLoader(str(path)).Load() for value in event.summary.value]


def event_files(folder):
    return sorted(folder.glob("events.out.tfevents.*"))


# --- no picture in what is given away


def plugins(path):
    """Which plugins of TensorBoard an event file feeds."""
    return {v.metadata.plugin_data.plugin_name for v in values(path)}


def holds_pictures(path):
    content = path.read_bytes()
    texts = [s for v in values(path) for s in v.tensor.string_val]
    return "images" in plugins(path) or any(s in content for s in PHOTOGRAPH) or bool(texts)


def test_no_picture_in_the_event_files_that_are_given_away(outputs):
    assert not any("/" in file for file in release.FILES), "a release looks into no folder"
    for name in (HARD, SOFT):
        given, shown = (event_files(outputs[0] / name / part) for part in ("", board.PICTURES))
        assert len(given) == 2 and given[1].name.endswith(".test")
        assert not any(holds_pictures(path) for path in given)
        assert set.union(*map(plugins, given)) == {"scalars", "histograms", "hparams"}
        # 12 logged rows and two sets of histograms; a run of 2,800 steps logs 141 and 15.
        assert sum(path.stat().st_size for path in given) * 141 / 12 < 1e6
        # What the test looks for is there, one folder deeper.
        assert len(shown) == 2 and all(holds_pictures(path) for path in shown)


def test_no_picture_in_the_event_files_of_this_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "*tfevents*", "*sprite*", "*/pictures/*", "*.pbtxt"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    drawn = f"outputs/{runs.EXAMPLE}/{board.PICTURES}/"  # of people that never were
    names = [name for name in listed.stdout.splitlines() if not name.startswith(drawn)]
    assert len(names) >= 5
    for name in names:
        assert "tfevents" in name and f"/{board.PICTURES}/" not in name, name
        assert not holds_pictures(ROOT / name), name


# --- steps, once each


def steps_by_tag(folder):
    """What TensorBoard's slow reader keeps; the fast one is asked below."""
    kept = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    kept.Reload()
    return {tag: [e.step for e in kept.Tensors(tag)] for tag in kept.Tags()["tensors"]}


def crash(tag, step, monkeypatch, **changes):
    """Train and break off in the middle of a step."""
    loss, calls = loop.LOSSES["batch_hard"], []

    def crashing(*args, **options):
        calls.append(1)
        if len(calls) == step:
            raise KeyError("a crash")
        return loss(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="a crash"):
        patch.setitem(loop.LOSSES, "batch_hard", crashing)
        fit(tag, **changes)


def test_a_resumed_run_has_every_step_once(monkeypatch, growing):
    often = {"evaluate_every": 2}
    crash("resumed", 7, monkeypatch, **often)  # the checkpoint is from step 4
    crash("resumed", 7, monkeypatch, **often)  # and again, in step 11 after the one of step 8
    folder = fit("resumed", **often)
    assert len(event_files(folder)) == len(event_files(folder / board.PICTURES)) == 3
    expected = {"loss": [*range(1, 13)], "held_out/mAP": [2, 4, 6, 8, 10, 12]}
    kept = steps_by_tag(folder)
    assert {tag: kept[tag] for tag in expected} == expected
    lists = {"ranked_lists/held_out": [2, 4, 6, 8, 10, 12]}
    assert steps_by_tag(folder / board.PICTURES) == lists
    server, run = growing(folder)
    for tag, steps in expected.items():
        until(lambda tag=tag, steps=steps: server.steps(run, tag) == steps)
    shown = f"{run}/pictures", "ranked_lists/held_out", "images/images"
    until(lambda: server.steps(*shown) == [2, 4, 6, 8, 10, 12])
    # Before any evaluation there is one row, begun three times, with what is known.
    (row,) = server.rows(run)
    assert row["hparams"]["margin"] == "soft"
    last = server.series(run, "held_out/mAP")[-1][1]
    assert server.metrics(run)["held_out/mAP"] == pytest.approx(last)
    assert "test/mAP" not in server.metrics(run)


def test_a_run_trained_anew_shows_nothing_of_the_old_one(monkeypatch):
    folder = fit("again", steps=6)
    evaluate(folder)
    old = {*event_files(folder), *event_files(folder / board.PICTURES)}
    assert len(old) == 4
    fit("again", resume="restart", steps=4)
    now = {*event_files(folder), *event_files(folder / board.PICTURES)}
    assert len(now) == 2 and not now & old
    assert steps_by_tag(folder)["loss"] == [1, 2, 3, 4]
    # Killed before its first checkpoint: begun again, with files of its own alone.
    crash("killed", 3, monkeypatch, steps=4)
    folder = fit("killed", steps=4)
    assert len(event_files(folder)) == 1 and steps_by_tag(folder)["loss"] == [1, 2, 3, 4]


def test_an_evaluation_replaces_the_one_before(outputs, growing, tmp_path):
    server, run = growing(shutil.copytree(outputs[0] / SOFT, tmp_path / "copy"))
    folder = server.logdir / run
    first = until(lambda: server.series(run, "test/mAP"))
    assert first == [[12, pytest.approx(outputs[1][SOFT][1].scores["mAP"])]]
    _, again = evaluate(folder, flip=True)
    assert first[0][1] != pytest.approx(again.scores["mAP"])
    evaluate(folder, name="test_other data.set")  # of another data set: beside the first
    for pictures in (folder, folder / board.PICTURES):
        suffixes = [path.suffix for path in event_files(pictures)]
        assert sorted(suffixes[1:]) == [".test", ".test_other_data_set"]
    kept = steps_by_tag(folder)
    for key in SCORES:
        assert kept[f"test/{key}"] == kept[f"test_other_data_set/{key}"] == [12]
    assert "test/queries" not in kept
    expected = [[12, pytest.approx(again.scores["mAP"])]]
    until(lambda: server.series(run, "test/mAP") == expected, 60)
    assert len(server.rows(run)) == 1
    assert server.metrics(run)["test/mAP"] == pytest.approx(again.scores["mAP"])


def test_an_overview_has_the_four_first_and_no_more_runs_than_are_shown(tmp_path):
    outputs = outputs_dir()
    names = [f"market1501_{name}" for name in (*board.FOUR, "batchhard_best")]
    own = [f"mine_{i:02}" for i in range(20)]
    for age, name in enumerate([*names, runs.EXAMPLE, *own]):
        (outputs / name).mkdir(parents=True)
        if name in own:
            (outputs / name / "checkpoint.pt").touch()
        os.utime(outputs / name, (age, age))
    folder = board.overview()
    wanted = [*board.FOUR, "example", *own[-12:]]
    assert sorted(link.name for link in folder.iterdir()) == wanted and len(wanted) == board.MOST
    assert (folder / "batchhard").resolve() == (outputs / "market1501_batchhard").resolve()
    (outputs / "new").mkdir()
    now = {link.name for link in board.overview(outputs / "new").iterdir()}
    assert now == {*wanted, "new"} - {"mine_08"}


# --- settings


def test_settings_as_columns():
    places = {"dataset": "/somewhere/my people", "weights": "/private/nets/r8.pth"}
    chosen = board.hyperparameters(make_recipe("demo", margin=0.5, **places), 123)
    expected = {"margin": "0.5", "dataset": "my people", "weights": "r8.pth", "size": "64×32"}
    expected |= {"steps": 123, "flip": True, "lr": "1e-3", "seed": "0"}
    assert expected.items() <= chosen.items()
    assert not {"mean", "log_every", "checkpoint_every", "evaluate_every", "epochs"} & {*chosen}
    assert not any("/" in str(value) for value in chosen.values())
    other = make_recipe("plain", loss="batch_all", margin="soft", epochs=2)
    other = board.hyperparameters(other, 7)
    assert {"mean": "active", "margin": "soft", "steps": 7}.items() <= other.items()
    # One type a column, or TensorBoard hides runs.
    both = chosen.keys() & other.keys()
    assert all(type(chosen[key]) is type(other[key]) for key in both)


def test_one_row_a_run_with_its_settings_and_scores(outputs, tensorboard):
    server = tensorboard
    assert {*server.get("/data/runs")} == {HARD, SOFT, f"{HARD}/pictures", f"{SOFT}/pictures"}
    columns = server.hparams("experiment", {"includeMetrics": True})
    types = {c["name"]: c["type"].removeprefix("DATA_TYPE_") for c in columns["hparamInfos"]}
    assert sorted([*types][:5]) == sorted(board.COMPARED) and {"size", "backbone"} < {*types}
    assert {"margin": "STRING", "lr": "STRING", "flip": "BOOL"}.items() <= types.items()
    tags = [m["name"]["tag"] for m in columns["metricInfos"]]
    assert tags == [*board.SCORE_TAGS] and {f"test/{key}" for key in SCORES} < {*tags}
    assert tags[:5] == ["test/mAP", "test/top1", "held_out/mAP", "held_out/top1", "loss"]
    rows = server.sessions()
    assert {row["name"]: row["hparams"]["margin"] for row in rows} == {HARD: "0.2", SOFT: "soft"}
    for row in rows:
        assert row["hparams"]["steps"] == 12 and row["hparams"]["flip"] is True
        metrics, scores = server.metrics(row["name"]), outputs[1][row["name"]][1].scores
        for key in ("mAP", "top1", "mAP_market", "mINP"):
            assert metrics[f"test/{key}"] == pytest.approx(scores[key])
        held_out = runs.read_json(outputs[0] / row["name"] / "metrics.json")["held_out"]["last"]
        assert metrics["held_out/mAP"] == pytest.approx(held_out["held_out_mAP"])


def test_a_run_from_before_gets_its_row_with_its_evaluation(outputs, growing, tmp_path):
    folder = tmp_path / "before"
    folder.mkdir()
    for name in ("config.json", "manifest.json", "weights.safetensors"):
        shutil.copy(outputs[0] / HARD / name, folder)
    _, evaluation = evaluate(folder)
    server, run = growing(folder)
    until(lambda: "test/top1" in server.metrics(run))
    assert [row["hparams"]["margin"] for row in server.rows(run)] == ["0.2"]
    assert server.metrics(run)["test/top1"] == pytest.approx(evaluation.scores["top1"])


# --- ranked lists


def test_the_same_queries_each_time_and_the_very_ranking(outputs, monkeypatch):
    drawn = []
    monkeypatch.setattr(board, "encode", lambda *_, **__: b"")
    monkeypatch.setattr(board, "ranked_lists", lambda rows, height: drawn.append(rows))
    for name in (HARD, SOFT):
        board.ranked_lists_image(*outputs[1][name])
    hard, soft = drawn
    assert [row.query for row in hard] == [row.query for row in soft]
    assert len({row.title.split(",")[0] for row in soft}) == 4, "four people"
    retrieval, evaluation = outputs[1][SOFT]
    for row in soft:
        asked = retrieval.query["path"].tolist().index(row.query)
        pid = retrieval.query["pid"][asked]
        assert row.title.startswith(f"identity {pid}, camera ")
        expected = retrieval.ranked_list(asked, topk=10, show_excluded=False)
        pd.testing.assert_frame_equal(row.results[:10], expected)
        assert {*expected["status"]} <= {"match", "wrong"}
    # Without a match there is nothing to see: such queries are not drawn.
    per_query = evaluation.per_query.copy()
    per_query.loc[per_query["pid"] != pid, "AP"] = np.nan
    board.ranked_lists_image(retrieval, type(evaluation)({}, per_query, ""))
    assert [row.title.split(",")[0] for row in drawn[-1]] == [f"identity {pid}"]


def test_images_that_moved_away_do_not_end_a_training(monkeypatch, capsys):
    alone = fit("none", hold_out=0, steps=2)
    assert not (alone / board.PICTURES).exists(), "nobody is held out, nothing is drawn"

    def gone(*_):
        raise ValueError("cannot read the image a.jpg: there is no such file")

    monkeypatch.setattr(board, "ranked_lists_image", gone)
    folder = fit("moved", steps=4)
    assert runs.read_json(folder / "manifest.json")["status"] == "finished"
    assert "Step 4: no ranked lists for TensorBoard. cannot read" in capsys.readouterr().err


# --- TensorBoard itself


class Server:
    """TensorBoard as its users start it, asked as its page asks."""

    def __init__(self, logdir):
        self.logdir = logdir
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
        command += ["--port", "0", "--reload_interval", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"TensorBoard \S+ at (http://\S+?)/? ", line):
                self.address = found[1]
                break
        else:
            raise AssertionError("TensorBoard did not start")

    def get(self, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data)
        if data:
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def series(self, run, tag, plugin="scalars/scalars"):
        """Steps and values of scalars, steps of images alone; nothing where they are not read yet."""
        query = urllib.parse.urlencode({"run": run, "tag": tag, "sample": 0})
        try:
            found = self.get(f"/data/plugin/{plugin}?{query}")
        except urllib.error.HTTPError:
            return []
        return [[e["step"]] if isinstance(e, dict) else e[1:] for e in found]

    def steps(self, *series):
        return [step for step, *_ in self.series(*series)]

    def hparams(self, what, content):
        return self.get(f"/data/plugin/hparams/{what}", {"experimentName": "0", **content})

    def sessions(self):
        statuses = [f"STATUS_{s}" for s in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
        columns = [{"hparam": name} for name in ("margin", "steps", "flip")]
        columns += [{"metric": {"tag": tag}} for tag in board.SCORE_TAGS]
        asked = {"allowedStatuses": statuses, "colParams": columns, "startIndex": 0}
        found = self.hparams("session_groups", asked | {"sliceSize": 100, "aggregationType": 1})
        return found.get("sessionGroups", [])

    def rows(self, run):
        return [row for row in self.sessions() if row["name"] == run]

    def metrics(self, run):
        (row,) = self.rows(run)
        return {metric["name"]["tag"]: metric["value"] for metric in row["metricValues"]}

    def stop(self):
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def tensorboard(outputs):
    """TensorBoard on the two runs, for tests that only read."""
    server = Server(outputs[0])
    until(lambda: len(server.get("/data/runs")) == 4 and len(server.sessions()) == 2, 60)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """Move a run, at once, under the eyes of a TensorBoard that runs; gives it and the run's name."""
    server = Server(tmp_path_factory.mktemp("growing"))

    def show(folder):
        folder.rename(server.logdir / folder.name)
        until(lambda: server.rows(folder.name), 60)
        return server, folder.name

    yield show
    server.stop()


# --- in a real browser

# Texts and pictures of a page with shadow roots and a frame in it, where selectors do not reach.
SEEN = """
const texts = [], pictures = [];
(function walk(node) {
  if (node.nodeType === 3 && node.parentElement?.offsetParent) texts.push(node.textContent.trim());
  if (node.tagName === "IMG" && node.naturalWidth) pictures.push(node.naturalWidth);
  if (node.tagName === "IFRAME" && node.contentDocument) walk(node.contentDocument.body);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes ?? []) walk(child);
})(document.body);
return [texts.filter(text => text), pictures];
"""


def test_seen_in_a_browser(outputs, tensorboard, chromium):
    def seen(tab, *wanted, pictures=0):
        """Open a tab and wait for texts, whole ones, and for so many pictures."""
        chromium.get("about:blank")
        chromium.get(f"{tensorboard.address}/#{tab}")

        def there():
            texts, shown = chromium.execute_script(SEEN)
            return {*wanted} <= {*texts} and len(shown) >= pictures and texts

        return until(there, 60)

    words = ("Trial ID", "margin", "mAP test", "learning rate", HARD, SOFT, "0.2", "soft")
    texts = " ".join(seen("hparams", *words))
    assert all(f"{of[1].scores['mAP']:.5g}"[:5] in texts for of in outputs[1].values())
    seen("scalars", "loss", "held_out", "test", HARD, SOFT)
    seen("histograms", "distance/positive", "distance/negative", "loss_per_anchor", SOFT)
    seen("images", "ranked_lists/held_out", "ranked_lists/test", f"{SOFT}/pictures", pictures=4)
