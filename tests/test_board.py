"""What TensorBoard shows: read from its files, from its own server, and in a real browser."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from reidlib import runs
from reidlib.data.pixels import load_images
from reidlib.data.tables import load
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look import board, photographs
from reidlib.model.embed import embed
from reidlib.model.weights import load_model
from reidlib.paths import ROOT
from reidlib.recipes import make_recipe
from reidlib.training import loop
from reidlib.workbook import release

SMALL = {"hidden": 16, "dim": 8, "height": 32, "width": 16, "p": 4, "k": 2, "steps": 12}
SMALL |= {"precision": "float32", "hold_out": 5, "log_every": 1, "checkpoint_every": 4}
SMALL |= {"evaluate_every": 4, "backbone": "mobilenet_v3_small"}
HARD, SOFT = "synthetic_batchhard", "synthetic_batchhard_softplus"
PHOTOGRAPH = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")  # how files of pictures begin


def fit(tag="", resume="auto", **changes):
    recipe = make_recipe("demo", **(SMALL | changes))
    return loop.train(recipe, tag, resume=resume, device="cpu", show_progress=False)


def evaluate(folder, name="test", flip=False):
    """What 04_evaluate does with a run; returns its retrieval, evaluation and count of points."""
    model, data = load_model(folder), load("synthetic")
    tables, pixels, emb = [], [], []
    for table in (data.query, data.gallery):
        images, table = load_images(table, model.recipe, show_progress=False)
        tables, pixels = [*tables, table], [*pixels, images]
        options = {"flip": flip, "precision": "float32", "show_progress": False}
        emb.append(embed(model, images, model.recipe, **options))
    retrieval = Retrieval(emb[0], tables[0], emb[1], tables[1])
    evaluation = retrieval.evaluate()
    points = board.write_evaluation(folder, retrieval, evaluation, emb, pixels, name)
    return retrieval, evaluation, points


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


def events(path):
    return [event for event in EventFileLoader(str(path)).Load()]


def values(path):
    """All (tag, step, value) of an event file."""
    return [(v.tag, e.step, v) for e in events(path) for v in e.summary.value]


def event_files(folder):
    return sorted(folder.glob("events.out.tfevents.*"))


# --- no picture in what is given away


def holds_pictures(path):
    content = path.read_bytes()
    kinds = {v.metadata.plugin_data.plugin_name for _, _, v in values(path)}
    texts = [s for _, _, v in values(path) for s in v.tensor.string_val]
    return "images" in kinds or any(s in content for s in PHOTOGRAPH) or bool(texts)


def test_no_picture_in_the_event_files_that_are_given_away(outputs, monkeypatch):
    for name in (HARD, SOFT):
        folder = outputs[0] / name
        given = event_files(folder)
        assert len(given) == 2 and given[1].name.endswith(".test")
        assert not any(holds_pictures(path) for path in given)
        # What the test looks for is there, one folder deeper.
        shown = event_files(folder / board.PICTURES)
        assert len(shown) == 2 and all(holds_pictures(path) for path in shown)
        # And a release does not go there.
        assert not any("/" in file for file in release.FILES)
        kinds = {v.metadata.plugin_data.plugin_name for p in given for _, _, v in values(p)}
        assert kinds == {"scalars", "histograms", "hparams"}


def test_no_picture_in_the_event_files_of_this_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "*tfevents*", "*sprite*", "*/pictures/*", "*.pbtxt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    drawn = f"outputs/{runs.EXAMPLE}/{board.PICTURES}/"  # of people that never were
    names = [name for name in listed.stdout.splitlines() if not name.startswith(drawn)]
    assert len(names) >= 5
    for name in names:
        assert "tfevents" in name and f"/{board.PICTURES}/" not in name, name
        assert not holds_pictures(ROOT / name), name


def test_event_files_stay_small(outputs):
    # 12 logged rows and two sets of histograms; a run of 2,800 steps logs 141 and 15.
    size = sum(path.stat().st_size for path in event_files(outputs[0] / SOFT))
    assert size * 141 / 12 < 1e6


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


def test_a_resumed_run_has_every_step_once(monkeypatch, tensorboard):
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
    server = tensorboard(folder.parent)
    for tag, steps in expected.items():
        assert server.steps("scalars/scalars", folder.name, tag) == steps
    shown = server.steps("images/images", f"{folder.name}/pictures", "ranked_lists/held_out")
    assert shown == [2, 4, 6, 8, 10, 12]
    # Before any evaluation there is one row, begun three times, with what is known.
    (row,) = server.sessions()
    assert row["name"] == folder.name and row["hparams"]["margin"] == "soft"
    last = server.scalars(folder.name, "held_out/mAP")[-1][1]
    assert server.metrics(folder.name)["held_out/mAP"] == pytest.approx(last)
    assert "test/mAP" not in server.metrics(folder.name)


def test_a_run_trained_anew_shows_nothing_of_the_old_one(monkeypatch):
    folder = fit("again", steps=6)
    evaluate(folder)
    old = {*event_files(folder), *event_files(folder / board.PICTURES)}
    assert len(old) == 4
    fit("again", resume="restart", steps=4)
    now = {*event_files(folder), *event_files(folder / board.PICTURES)}
    assert len(now) == 2 and not now & old
    assert [*(folder / board.PICTURES).glob("*.pbtxt")] == []
    assert steps_by_tag(folder)["loss"] == [1, 2, 3, 4]
    # Killed before its first checkpoint: begun again, with files of its own alone.
    crash("killed", 3, monkeypatch, steps=4)
    folder = fit("killed", steps=4)
    assert len(event_files(folder)) == 1 and steps_by_tag(folder)["loss"] == [1, 2, 3, 4]


def test_an_evaluation_replaces_the_one_before(outputs, tmp_path, tensorboard):
    folder = tmp_path / "copy" / SOFT
    shutil.copytree(outputs[0] / SOFT, folder)
    server = tensorboard(folder.parent)  # while it runs
    first = server.scalars(SOFT, "test/mAP")
    assert first == [[12, pytest.approx(outputs[1][SOFT][1].scores["mAP"])]]
    _, again, _ = evaluate(folder, flip=True)
    assert first[0][1] != pytest.approx(again.scores["mAP"])
    evaluate(folder, name="test_other data.set")  # of another data set: beside the first
    for place in (folder, folder / board.PICTURES):
        suffixes = [path.suffix for path in event_files(place)]
        assert suffixes[1:] == [".test", ".test_other_data_set"]
    kept = steps_by_tag(folder)
    for key in ("mAP", "mAP_market", "top1", "top2", "top5", "top10", "mINP"):
        assert kept[f"test/{key}"] == kept[f"test_other_data_set/{key}"] == [12]
    assert "test/queries" not in kept
    expected = [[12, pytest.approx(again.scores["mAP"])]]
    until(lambda: server.scalars(SOFT, "test/mAP") == expected, 60)
    assert len(server.sessions()) == 1
    assert server.metrics(SOFT)["test/mAP"] == pytest.approx(again.scores["mAP"])


# --- settings


def test_settings_as_columns():
    recipe = make_recipe(
        "demo", margin=0.5, dataset="/somewhere/my people", weights="/private/nets/r8.pth"
    )
    chosen = board.hyperparameters(recipe, 123)
    assert chosen["margin"] == "0.5" and chosen["dataset"] == "my people"
    assert chosen["weights"] == "r8.pth" and chosen["size"] == "64×32" and chosen["steps"] == 123
    assert chosen["flip"] is True and chosen["lr"] == 1e-3 and chosen["seed"] == 0
    assert "mean" not in chosen and "log_every" not in chosen and "epochs" not in chosen
    assert not any("/" in str(value) for value in chosen.values())
    other = make_recipe("plain", loss="batch_all", margin="soft", epochs=2)
    other = board.hyperparameters(other, 7)
    assert other["mean"] == "active" and other["margin"] == "soft" and other["steps"] == 7
    # One type a column, or TensorBoard hides runs.
    both = chosen.keys() & other.keys()
    assert all(type(chosen[key]) is type(other[key]) for key in both)


def test_one_row_a_run_with_its_settings_and_scores(outputs, tensorboard):
    server = tensorboard(outputs[0])
    assert {*server.get("/data/runs")} == {HARD, SOFT, f"{HARD}/pictures", f"{SOFT}/pictures"}
    columns = server.hparams("experiment", {"includeMetrics": True})
    shown = [c["name"] for c in columns["hparamInfos"]]
    assert sorted(shown[:5]) == sorted(board.COMPARED) and {"size", "backbone"} < {*shown}
    types = {c["name"]: c["type"] for c in columns["hparamInfos"]}
    assert types["margin"] == "DATA_TYPE_STRING" and types["lr"] == "DATA_TYPE_FLOAT64"
    assert types["flip"] == "DATA_TYPE_BOOL"
    assert [m["name"]["tag"] for m in columns["metricInfos"]] == [*board.SCORES]
    rows = server.sessions()
    assert {row["name"]: row["hparams"]["margin"] for row in rows} == {HARD: "0.2", SOFT: "soft"}
    for row in rows:
        assert row["hparams"]["steps"] == 12 and row["hparams"]["flip"] is True
        metrics, scores = server.metrics(row["name"]), outputs[1][row["name"]][1].scores
        for key in ("mAP", "top1", "mAP_market", "mINP"):
            assert metrics[f"test/{key}"] == pytest.approx(scores[key])
        held_out = runs.read_json(outputs[0] / row["name"] / "metrics.json")["held_out"]["last"]
        assert metrics["held_out/mAP"] == pytest.approx(held_out["held_out_mAP"])


def test_a_run_from_before_gets_its_row_with_its_evaluation(outputs, tmp_path, tensorboard):
    folder = tmp_path / "outputs" / HARD
    folder.mkdir(parents=True)
    for name in ("config.json", "manifest.json", "weights.safetensors"):
        shutil.copy(outputs[0] / HARD / name, folder)
    _, evaluation, _ = evaluate(folder)
    server = tensorboard(folder.parent)
    assert [row["hparams"]["margin"] for row in server.sessions()] == ["0.2"]
    assert server.metrics(HARD)["test/top1"] == pytest.approx(evaluation.scores["top1"])


# --- ranked lists


def test_the_same_queries_each_time_and_the_very_ranking(outputs, monkeypatch):
    drawn = []

    def draw(rows, height):
        drawn.append(rows)
        return photographs.ranked_lists(rows, height)

    monkeypatch.setattr(board, "ranked_lists", draw)
    for name in (HARD, SOFT):
        retrieval, evaluation, _ = outputs[1][name]
        image = board.ranked_lists_image(retrieval, evaluation)
        assert image[:3] == b"\xff\xd8\xff"
        board.ranked_lists_image(retrieval, evaluation, seed=1)
    hard, other, soft, _ = drawn
    assert [row.query for row in hard] == [row.query for row in soft]
    assert [row.query for row in hard] != [row.query for row in other]
    assert len({row.title.split(",")[0] for row in hard}) == 4, "four people"
    retrieval = outputs[1][SOFT][0]
    for row in soft:
        asked = retrieval.query["path"].tolist().index(row.query)
        pid = retrieval.query["pid"][asked]
        assert row.title.startswith(f"identity {pid}, camera ")
        expected = retrieval.ranked_list(asked, topk=10, show_excluded=False)
        pd.testing.assert_frame_equal(row.results[:10], expected)
        assert {*expected["status"]} <= {"match", "wrong"}
    # Without a match there is nothing to see: such queries are not drawn.
    evaluation = outputs[1][SOFT][1]
    per_query = evaluation.per_query.copy()
    per_query.loc[per_query["pid"] != pid, "AP"] = np.nan
    drawn.clear()
    board.ranked_lists_image(retrieval, type(evaluation)({}, per_query, ""))
    assert [row.title.split(",")[0] for row in drawn[0]] == [f"identity {pid}"]


def test_without_held_out_people_training_draws_nothing():
    folder = fit("none", hold_out=0, steps=2)
    assert not (folder / board.PICTURES).exists()


def test_images_that_moved_away_do_not_end_a_training(monkeypatch, capsys):
    def gone(*_):
        raise ValueError("cannot read the image a.jpg: there is no such file")

    monkeypatch.setattr(board, "ranked_lists_image", gone)
    folder = fit("moved", steps=4)
    assert runs.read_json(folder / "manifest.json")["status"] == "finished"
    assert "Step 4: no ranked lists for TensorBoard. cannot read" in capsys.readouterr().err


# --- the map


def test_a_sample_has_whole_people_and_distractors():
    random = np.random.default_rng(3)
    pids = np.concatenate([random.integers(1, 60, 900), [0] * 300, [-1] * 200, [99] * 50])
    splits = np.where(random.random(len(pids)) < 0.15, "query", "gallery")
    splits[(pids <= 0) | (pids == 99)] = "gallery"
    order = random.permutation(len(pids))
    pids, splits = pids[order], splits[order]
    rows = board.sample(pids, splits, 400)
    assert len({*rows}) == len(rows) <= 400 and list(rows) == sorted(rows)
    assert len(rows) > 370, "as many as fit"
    assert (pids[rows] == 0).sum() == 400 * 300 // 1250
    assert -1 not in pids[rows] and 99 not in pids[rows], "no junk; nobody whom no query asks for"
    for person in {*pids[rows]} - {0}:
        assert {*np.flatnonzero(pids == person)} <= {*rows}
    assert np.array_equal(rows, board.sample(pids, splits, 400))
    assert not np.array_equal(rows, board.sample(pids, splits, 400, seed=1))
    everyone = board.sample(pids, splits, 5000)
    assert np.array_equal(everyone, np.flatnonzero(pids != -1))
    # One person with more images than may be shown: the first of them.
    assert list(board.sample(np.array([7] * 9), np.array(["query"] + 8 * ["gallery"]), 4)) == [
        *range(4)
    ]


def test_the_files_of_the_map(tmp_path):
    random = np.random.default_rng(0)
    sizes = [(40, 20), (20, 40), (64, 64), (300, 10), (16, 8), (8, 16), (32, 16)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    names = ["a.jpg", "tab\tin.jpg", "line\nand\r.jpg", "\u2028.jpg", 'q"uote.jpg', "\udcff.jpg"]
    table = pd.DataFrame({"path": [f"/where/ever/{n}" for n in [*names, "人.jpg"]]})
    table = table.assign(pid=[1, 1, -1, 2, 2, 0, 0], camid=3, split="gallery")
    table = table.assign(label=["ann", "ann", "", "bob", "bob", "", ""])
    emb = random.normal(size=(7, 5))
    assert board.write_projector(tmp_path, emb, table, images, tile=32) == 6
    kept = [0, 1, 3, 4, 5, 6]  # without junk
    lines = (tmp_path / "metadata.tsv").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "name\tpid\tcamid\tsplit\tlabel" and lines[-1] == "" and len(lines) == 8
    assert [line.split("\t")[0] for line in lines[1:7]] == [
        *("a.jpg", "tab in.jpg", " .jpg", 'q"uote.jpg', "?.jpg", "人.jpg")
    ]
    assert lines[2].split("\t")[1:] == ["1", "3", "gallery", "ann"]
    assert "where" not in "".join(lines)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "tensors.tsv"), emb[kept], rtol=1e-5)
    sprite = np.asarray(Image.open(tmp_path / "sprite.png"))
    assert sprite.shape == (96, 96, 4)  # three by three for six
    for place, row in enumerate(kept):
        tile = sprite[32 * (place // 3) :, 32 * (place % 3) :][:32, :32]
        height, width = sizes[row]
        h, w = (32, max(1, round(32 * width / height)))
        if width > height:
            h, w = round(32 * height / width), 32
        top, left = (32 - h) // 2, (32 - w) // 2
        expected = Image.fromarray(images[row]).resize((w, h), Image.Resampling.BILINEAR)
        inside = tile[top : top + h, left : left + w]
        assert np.array_equal(inside[..., :3], np.asarray(expected)), row
        assert (inside[..., 3] == 255).all() and (tile[..., 3] > 0).sum() == h * w
    assert (sprite[64:][..., 3] == 0).all(), "the third row is empty"
    with pytest.raises(ValueError, match=r"3 .* up to 8192: take fewer, or smaller"):
        board.write_projector(tmp_path, emb[:3], table[3:6], images[3:6], tile=5000)


def test_the_map_as_tensorboard_serves_it(outputs, tensorboard):
    server = tensorboard(outputs[0])
    retrieval, _, points = outputs[1][HARD]
    kept = (retrieval.gallery["pid"] != -1).sum()
    assert points == len(retrieval.query) + kept, "few enough to show all but junk"
    until(lambda: len(server.get("/data/plugin/projector/runs")) == 2)
    assert {*server.get("/data/plugin/projector/runs")} == {f"{HARD}/pictures", f"{SOFT}/pictures"}
    run = f"run={HARD}/pictures&name=test"
    (config,) = server.get(f"/data/plugin/projector/info?{run}")["embeddings"]
    assert config["tensorShape"] == [points, 8]
    metadata = server.bytes(f"/data/plugin/projector/metadata?{run}").decode()
    shown = pd.read_csv(io.StringIO(metadata), sep="\t")
    assert [*shown] == ["name", "pid", "camid", "split"] and len(shown) == points
    assert shown["split"].value_counts()["query"] == len(retrieval.query)
    tensor = np.frombuffer(server.bytes(f"/data/plugin/projector/tensor?{run}"), np.float32)
    # A distance in the map is the distance in the ranking.
    first, other = tensor.reshape(points, 8)[[0, len(retrieval.query)]]
    row = np.flatnonzero(retrieval.gallery["pid"] != -1)[0]
    expected = retrieval.distances(0, [row])[0]
    assert np.linalg.norm(first - other) == pytest.approx(expected, rel=1e-3)
    sprite = server.bytes(f"/data/plugin/projector/sprite_image?{run}")
    assert sprite == (outputs[0] / HARD / board.PICTURES / "sprite.png").read_bytes()


# --- TensorBoard itself


def until(found, seconds=30):
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return value


class Server:
    """TensorBoard as its users start it, asked as its page asks."""

    def __init__(self, logdir):
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
        command += ["--port", "0", "--reload_interval", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"TensorBoard \S+ at (http://\S+?)/? ", line):
                self.address = found[1]
                break
        else:
            raise AssertionError("TensorBoard did not start")
        until(lambda: self.get("/data/runs"), 60)
        until(lambda: self.sessions(), 60)

    def get(self, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data)
        if data:
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def bytes(self, path):
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return answer.read()

    def series(self, plugin, run, tag):
        query = urllib.parse.urlencode({"run": run, "tag": tag, "sample": 0})
        return self.get(f"/data/plugin/{plugin}?{query}")

    def steps(self, plugin, run, tag):
        return [e["step"] if isinstance(e, dict) else e[1] for e in self.series(plugin, run, tag)]

    def scalars(self, run, tag):
        return [[step, value] for _, step, value in self.series("scalars/scalars", run, tag)]

    def hparams(self, what, content):
        return self.get(f"/data/plugin/hparams/{what}", {"experimentName": "0", **content})

    def sessions(self):
        statuses = [f"STATUS_{s}" for s in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
        columns = [{"hparam": name} for name in ("margin", "steps", "flip")]
        columns += [{"metric": {"tag": tag}} for tag in board.SCORES]
        asked = {"allowedStatuses": statuses, "colParams": columns, "startIndex": 0}
        found = self.hparams("session_groups", asked | {"sliceSize": 100, "aggregationType": 1})
        return found.get("sessionGroups", [])

    def metrics(self, run):
        (row,) = [row for row in self.sessions() if row["name"] == run]
        return {metric["name"]["tag"]: metric["value"] for metric in row["metricValues"]}


@pytest.fixture
def tensorboard():
    """Start TensorBoard on a folder; all are ended with the test."""
    servers = []

    def start(logdir):
        servers.append(Server(logdir))
        return servers[-1]

    yield start
    for server in servers:
        server.process.terminate()
        server.process.communicate(timeout=30)


# --- in a real browser

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
CHROMEDRIVER = shutil.which("chromedriver")


# Texts and pictures of a page with shadow roots and a frame in it, where selectors do not reach.
SEEN = """
const texts = [], pictures = [];
(function walk(node) {
  if (node.nodeType === 3 && node.parentElement?.offsetParent) texts.push(node.textContent.trim());
  if (node.tagName === "IMG" && node.naturalWidth) figures.push(node.naturalWidth);
  if (node.tagName === "IFRAME" && node.contentDocument) walk(node.contentDocument.body);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes ?? []) walk(child);
})(document.body);
return [texts.filter(text => text), pictures];
"""


@pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="no Chromium with its chromedriver on this machine: the browser is not driven",
)
def test_seen_in_a_browser(outputs, tensorboard, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    arguments = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1500,1200"]
    # The projector draws by WebGL, here without a graphics card.
    arguments += ["use-angle=swiftshader", "enable-unsafe-swiftshader"]
    for argument in [*arguments, f"user-data-dir={tmp_path / 'chromium'}"]:
        options.add_argument(f"--{argument}")
    server = tensorboard(outputs[0])
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))

    def seen(tab, *wanted, pictures=0):
        """Open a tab and wait for texts, whole ones, and for so many pictures."""
        driver.get("about:blank")
        driver.get(f"{server.address}/#{tab}")

        def there():
            texts, shown = driver.execute_script(SEEN)
            return {*wanted} <= {*texts} and len(shown) >= pictures and texts

        return until(there, 60)

    try:
        until(lambda: server.get("/data/plugins_listing")["projector"]["enabled"])
        texts = seen("hparams", "Trial ID", "margin", "test/mAP", HARD, SOFT, "0.2", "soft")
        for name in (HARD, SOFT):
            score = outputs[1][name][1].scores["mAP"]
            assert f"{score:.5g}"[:5] in " ".join(texts)
        seen("scalars", "loss", "held_out", "test", HARD, SOFT)
        seen("histograms", "distance/positive", "distance/negative", "loss_per_anchor", SOFT)
        seen("images", "ranked_lists/held_out", "ranked_lists/test", f"{SOFT}/pictures", pictures=4)
        seen("projector", "2 runs found", "Points:", str(outputs[1][SOFT][2]), "Dimension:", "8")

        def colours():  # of the map: points without thumbnails are all of one
            picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
            middle = np.asarray(picture)[200:900, 400:1100].reshape(-1, 3)
            return len(np.unique(middle, axis=0))

        until(lambda: colours() > 5000, 60)
    finally:
        driver.quit()
