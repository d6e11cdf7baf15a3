"""`make bench` runs, and judges by what it measured. (Its numbers are for a quiet machine.)"""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from reidlib.model.embed import embed
from reidlib.model.weights import load_model
from reidlib.paths import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import run

    return run


@pytest.mark.slow
def test_quick_run_of_a_part(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "losses"],
        env=os.environ | {"REID_OUTPUTS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pytorch-metric-learning, batch-all" in done.stdout and "threads, torch" in done.stdout
    written = json.loads((tmp_path / "bench" / "results.json").read_text())
    rows = {row["case"]: row for row in written["beside peers"]}
    assert rows["ours, batch-all"]["x ours"] == 1 < rows["masked B x B x B"]["x ours"]


def test_goals_can_be_missed(bench):
    row = {"seconds": 0.6, "MB": math.nan, "x ours": 5.0}
    assert bench.judged(row, {"seconds": 0.5, "MB": 100}) == "at most 0.5 s: MISSED"
    assert bench.judged(row, {"least": 6}) == "at least x 6: MISSED"
    assert bench.judged(row | {"x ours": 6.0}, {"least": 6}) == "at least x 6: holds"
    assert bench.judged(row, {"most": 0.05}) == "at most x 0.05: MISSED"
    assert bench.judged(row, {}) == ""


def test_minutes_count_those_of_the_run_that_one_started_from(bench, tmp_path, monkeypatch, capsys):
    import minutes

    run = "market1501_batchhard_softplus"
    for tag in ["cpu_small", "cpu", "at_192", "best", "warm0", "soup1", "soup2", "soup3", "soup"]:
        shutil.copytree(ROOT / "outputs" / f"{run}_{tag}", tmp_path / f"{run}_{tag}")
    monkeypatch.setenv("REID_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["minutes.py"])
    minutes.main()
    tables = capsys.readouterr().out
    assert f"| {run}_best | NVIDIA H100 80GB HBM3 | 6 | 73.36 | 86.88 | passed |" in tables
    # 2,241 seconds of the small images, and 3,185 of the large ones.
    assert f"| {run}_cpu | AMD EPYC, 1 core | 90 | 70.85 | 86.10 | passed |" in tables
    # Of the mean of three, what these started from counts once: 351, 6,513, 2,476, 2,490, 1,232 and 112 s.
    row = next(line for line in tables.splitlines() if line.startswith(f"| {run}_soup |"))
    assert row.endswith("then AMD EPYC, 2 cores | 220 | 76.92 | 89.88 | passed |")
    assert f"| {run}_at_192 | AMD EPYC, 1 core | 76.7 after 31.8 |" in tables
    assert (tmp_path / "bench" / "minutes.svg").exists()


def test_every_part_of_a_step_is_found(bench, monkeypatch, capsys):
    """A part that the loop no longer calls has no time, and would end in an error."""
    import step

    small = "--backbone resnet8 --height 32 --p 2 --steps 8"
    monkeypatch.setattr(sys, "argv", ["step.py", *small.split()])
    step.main()
    said, *rows = capsys.readouterr().out.splitlines()
    assert said.startswith("resnet8, 32×16, B = 8: a step takes ")
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [*step.PARTS, "all else"]
    shares = [float(row.split("|")[3].strip(" %")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("resize", ["float", "pillow"])
@pytest.mark.parametrize("name", ["batchhard_softplus", "batchhard_softplus_soup"])
def test_recompute_gives_torchreid_what_the_library_would_rank(
    bench, name, resize, tmp_path, monkeypatch, capsys
):
    """Pictures of Market-1501's names; the distances are those of the library's embeddings."""
    import recompute

    root = tmp_path / "Market-1501-v15.09.15"
    rng = np.random.default_rng(0)
    pictures = {}
    for side, pids in (("query", (1, 2)), ("bounding_box_test", (-1, 0, 1, 2))):
        (root / side).mkdir(parents=True)
        for pid in pids:
            colour = rng.integers(0, 256, 3)
            picture = (colour + rng.integers(-40, 40, (128, 64, 3))).clip(0, 255).astype(np.uint8)
            file = root / side / f"{pid if pid == -1 else f'{pid:04}'}_c{pid + 2}s1_000001_01.jpg"
            Image.fromarray(picture).save(file)
            pictures[side, pid] = np.asarray(Image.open(file))
    asked = []

    def evaluate_rank(*args, **options):
        asked.extend(args)
        return np.linspace(0.5, 0.95, 10), 0.25

    monkeypatch.setenv("REID_DATA", str(tmp_path))
    monkeypatch.setattr(
        recompute.peers, "torchreid", lambda path: SimpleNamespace(evaluate_rank=evaluate_rank)
    )
    folder = ROOT / "outputs" / f"market1501_{name}"
    monkeypatch.setattr(sys, "argv", ["recompute.py", str(folder), "--resize", resize])
    recompute.main()
    distances, query_pids, gallery_pids, query_camids, gallery_camids = asked
    assert query_pids.tolist() == [1, 2] and query_camids.tolist() == [3, 4]
    assert gallery_pids.tolist() == [0, 1, 2] and gallery_camids.tolist() == [2, 3, 4], "no junk"
    model = load_model(folder)

    def embedded(side, pids):
        images = [pictures[side, pid] for pid in pids]
        if resize == "pillow":
            shape, method = (128, 256), Image.Resampling.BILINEAR
            images = [np.asarray(Image.fromarray(x).resize(shape, method)) for x in images]
        return embed(model, np.stack(images), model.recipe, show_progress=False)

    query, gallery = embedded("query", [1, 2]), embedded("bounding_box_test", [0, 1, 2])
    expected = np.linalg.norm(query[:, None] - gallery[None], axis=2)
    np.testing.assert_allclose(distances, expected, rtol=1e-3)
    told = capsys.readouterr().out
    stated = 100 * json.loads((folder / "metrics.json").read_text())["mAP"]
    assert f"mAP    torchreid  25.00   stated  {stated:.2f}" in told


def test_recompute_without_what_it_needs_says_what_to_do(bench, tmp_path, monkeypatch, capsys):
    import recompute

    monkeypatch.setenv("REID_DATA", str(tmp_path))
    for name, found, told in (
        ("batchhard_softplus_seed1", "rank", "released without weights"),
        ("batchhard_softplus", None, "start this as `make recompute`"),
        ("batchhard_softplus", "rank", "There is no "),
    ):
        folder = ROOT / "outputs" / f"market1501_{name}"
        monkeypatch.setattr(sys, "argv", ["recompute.py", str(folder)])
        monkeypatch.setattr(recompute.peers, "torchreid", lambda path, found=found: found)
        with pytest.raises(SystemExit):
            recompute.main()
        assert told in capsys.readouterr().err
