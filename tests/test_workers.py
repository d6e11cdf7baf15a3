"""Processes that work at tasks: a dead one loses its own, a stop begins nothing more."""

import os
import signal
import threading
import time

import pytest

from reidlib.workbook.workers import each


def task(folder, name, what=""):
    """Runs in a process of its own."""
    (folder / f"{name} begun").touch()
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (folder / f"{name} told").touch() or exit(143))
        (folder / f"{name} waits").touch()
        time.sleep(60)
    import torch

    return os.getpid(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


@pytest.mark.slow
def test_a_process_that_dies_loses_its_own_task_and_each_has_its_share_of_the_cores(tmp_path):
    tasks = {name: (tmp_path, name) for name in "acd"} | {"b": (tmp_path, "b", "die")}
    results = dict(each(task, {name: tasks[name] for name in "abcd"}, jobs=2))
    assert results.keys() == {*"abcd"} and results.pop("b") is None
    share = max(1, os.cpu_count() // 2)
    assert {(threads, of) for _, threads, of in results.values()} == {(share, str(share))}
    assert os.getpid() not in {pid for pid, *_ in results.values()}


@pytest.mark.slow
def test_a_stop_is_told_to_what_runs_and_nothing_else_begins(tmp_path, request):
    # A shell's background job is born deaf to SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt():
        while len(list(tmp_path.glob("* waits"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    tasks = {name: (tmp_path, name, "wait") for name in "abcde"}
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        list(each(task, tasks, jobs=2))
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {f"{name} {what}" for name in "ab" for what in ("begun", "waits", "told")}


def test_one_job_works_here_and_yields_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    results = each(task, {name: (tmp_path, name) for name in "ab"}, jobs=1)
    name, (pid, _, threads) = next(results)
    assert (name, pid, threads) == ("a", os.getpid(), "3")
    assert not (tmp_path / "b begun").exists(), "a bar moves row by row"
    assert [name for name, _ in results] == ["b"]
