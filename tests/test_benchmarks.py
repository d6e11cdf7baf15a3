"""`make bench` runs, and judges by what it measured. (Its numbers are for a quiet machine.)"""

import json
import math
import os
import subprocess
import sys

import pytest

from reidlib.paths import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import run

    return run


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


def test_contenders_run_in_turn_and_the_slow_ones_drop_out(bench):
    ran = []
    times = bench.race({name: lambda name=name: ran.append(name) for name in "ab"}, 3, 0)
    assert ran[:6] == list("ababab")  # a round to warm up and two that count
    assert {name: len(of_one) for name, of_one in times.items()} == {"a": 2, "b": 2}


def test_goals_can_be_missed(bench):
    row = {"seconds": 0.6, "MB": math.nan, "x ours": 5.0}
    assert bench.judged(row, {"seconds": 0.5, "MB": 100}) == "at most 0.5 s: MISSED"
    assert bench.judged(row, {"least": 6}) == "at least x 6: MISSED"
    assert bench.judged(row | {"x ours": 6.0}, {"least": 6}) == "at least x 6: holds"
    assert bench.judged(row, {"most": 0.05}) == "at most x 0.05: MISSED"
    assert bench.judged(row, {}) == ""
