"""The notebook runner, on tiny notebooks in real kernels (seven starts in all)."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, Literal

import nbformat
import papermill
import pytest

from conftest import until
from reidlib.__main__ import main
from reidlib.typed import typed
from reidlib.workbook import notebooks
from reidlib.workbook.headless import NotebookFailed
from reidlib.workbook.notebooks import check_parameters, find_notebook, read_parameters, run

pytestmark = pytest.mark.slow


def write(path, *cells, parameters=""):
    """Make a notebook of code cells; `parameters` is the source of its tagged cell."""
    kernel = {"name": "python3", "display_name": "-", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    tagged = {"metadata": {"tags": ["parameters"]}}
    notebook.cells = [nbformat.v4.new_code_cell(parameters, **tagged)] if parameters else []
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, path)
    return path


def shown(copy):
    """Return what the last cell that shows something in an executed copy says."""
    outputs = [o for c in nbformat.read(copy, 4).cells for o in c.get("outputs", [])]
    return outputs[-1]["data"]["text/plain"]


# --- what needs no kernel


@pytest.mark.parametrize(
    ("history", "unknown"),
    [
        (["", "a = 1\nb: int = 2", "# Parameters\nb = 3\n", "import os"], None),
        (["", "a = 1", "import os"], None),  # nothing injected
        (["", "# Parameters\na = 1", "b = 2"], None),  # the notebook's own cell may be headed so
        (["", "import os\n%pylab", "a = 1", "# Parameters\nc = 1"], "'c'"),
        (["", "margin = 1", "# Parameters\nmarign = 2\nlr = 3"], "'marign'; did you mean 'margin'"),
        # run again, after a cell that assigns other names
        (["", "a = 1", "# Parameters\na = 2", "z = 1", "# Parameters\na = 2"], None),
        (["", "n: int = 3  # how many", "# Parameters\nn = 0", ""], "n = 0: .*number, 1 or more"),
        (["", "n: int = 0  # edited in JupyterLab", ""], "n = 0: .*number, 1 or more"),
        (["", "n: int = 0  # how many; 0: all", ""], None),
        (["", 'tag: str = ""  # a name', "# Parameters\ntag = 7.5", ""], "tag = 7.5: .*text"),
    ],
)
def test_check_parameters(history, unknown):
    if unknown is None:
        check_parameters(history)
    else:
        with pytest.raises(ValueError, match=unknown):
            check_parameters(history)


def test_a_notebook_gets_the_value_as_its_parameter_wants_it(monkeypatch):
    """Papermill makes a number of `-p tag 7`, and the notebook wants a name."""
    shell = SimpleNamespace(user_ns={"tag": 7, "n": 2})
    monkeypatch.setattr(notebooks, "get_ipython", lambda: shell)
    check_parameters(["", 'tag: str = ""\nn: int = 1', "# Parameters\ntag = 7\nn = 2", ""])
    assert shell.user_ns == {"tag": "7", "n": 2}


def test_parameters_are_read_with_their_types(tmp_path):
    source = (
        "# all of it\n"
        'margin: float | str = "soft"  # m = 0: hinge\n'  # papermill's own reader loses this line
        "steps: int = None\n"
        'epoch: Literal["identities", "images"] | None = "images"\n'
        "lr = 3e-4\n"
        "for_papermill = None  # type: float|str which knows no other way\n"
        "seeds: list[int] = [0,\n  1]\n"
        "anything = None\n"
        "odd: Unknown = 1\n"
        "evil: open('evil', 'w') = 1\n"
        "choice: Literal[A, B] = 1\n"
    )
    found = read_parameters(write(tmp_path / "a.ipynb", parameters=source))
    assert {name: p.annotation for name, p in found.items()} == {
        "margin": float | str,
        "steps": int | None,
        "epoch": Literal["identities", "images"] | None,
        "lr": float,
        "for_papermill": float | str | None,
        "seeds": list[int],
        "anything": Any,
        "odd": int,
        "evil": int,
        "choice": int,
    }
    assert found["seeds"].default == [0, 1]


SOFT = float | Literal["soft"]


@pytest.mark.parametrize(
    ("annotation", "read"),  # more of them in the docstring of `typed`
    [
        (float, [("1e-3", 0.001), ("3", 3.0), (1, 1.0)]),
        (int, [("1e3", 1000), (2.0, 2)]),
        (int | float, [("18", 18)]),
        (SOFT, [("0.2", 0.2), ("soft", "soft")]),
        (int | str, [("market1501", "market1501")]),
        (int | str | None, [("101", 101)]),
        (bool | None, [("False", False)]),
        (str, [("true", "true"), ("7", "7")]),
        (int | None, [("none", None), (None, None)]),
        (float | None, [("null", None)]),
        (str | None, [("none", "none")]),  # weights="none" is no None
        (list, [("[0, 1]", [0, 1]), ([0, 1], [0, 1])]),
        (Literal[1, 2], [("2", 2)]),
        (Any, [("2", 2), ("True", True), ("x", "x"), (True, True)]),
    ],
)
def test_a_value_is_read_as_the_declared_type(annotation, read):
    for given, value in read:
        got = typed(given, annotation)
        assert got == value and type(got) is type(value), given


@pytest.mark.parametrize(
    ("annotation", "wanted", "refused"),
    [
        (int, "a whole number", ["1.5", "True", True, 1.5, None]),
        (float, "a number", ["none", "True"]),
        (float | None, "a number or none", ["fast"]),
        (SOFT, "a number or 'soft'", ["hard"]),
        (list, "a list", ["[0"]),
        (Literal[1, 2], "1 or 2", ["3"]),
        (bool, "true or false", [1]),
        (str, "text", [3.0, True]),
    ],
)
def test_a_value_of_another_type_is_refused(annotation, wanted, refused):
    for value in refused:
        with pytest.raises(ValueError, match=f"should be {wanted}\\.$"):
            typed(value, annotation)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository with two notebooks that cannot run: nothing here may start a kernel."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "execute", lambda *_: pytest.fail("it ran"))
    (tmp_path / "notebooks").mkdir()
    folder = tmp_path / "notebooks"
    write(folder / "03_train.ipynb", parameters="lr: float = 0.1\nflip = True\np: int = 18  # P")
    write(folder / "04_evaluate.ipynb", parameters='run = ""\ntop = 5')
    return folder


def test_notebooks_are_found_by_name_number_and_path(folder):
    train = folder / "03_train.ipynb"
    for name in ("03_train", "03", "03_train.ipynb", train, str(train)):
        assert find_notebook(name) == train
    with pytest.raises(FileNotFoundError, match="did you mean '03_train'.*04_evaluate"):
        find_notebook("03_trian")
    with pytest.raises(FileNotFoundError, match="03_train, 04_evaluate"):
        find_notebook("0")
    (folder / "03_other.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="03_other or 03_train"):
        find_notebook("03")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"flop": "1", "lr": 1}, "'flop'; did you mean 'flip'.* run, top.*03_train, 04_evaluate"),
        ({"lr": "fast"}, r"lr = 'fast': 03_train wants a number \(its default is 0.1\)"),
        ({"flip": 1}, "flip = 1: 03_train wants true or false"),
        ({"p": "0"}, "p = '0': 03_train wants a whole number, 1 or more"),
        ({"run": [3]}, r"run = \[3\]: 04_evaluate wants text"),
        ({"p": 2**31}, "wants a whole number, 1 or more, below 2.31"),
        ({"lr": "nan"}, "lr = 'nan': 03_train wants a number"),
        ({"lr": "1e400"}, "lr = '1e400': 03_train wants a number"),
        ({"top": None}, "top = None"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(folder, parameters, message):
    with pytest.raises(ValueError, match=message):
        run(["03", "04"], parameters)


def test_wrong_places_are_refused_before_anything_runs(folder, monkeypatch):
    with pytest.raises(ValueError, match="would overwrite"):
        run("03", output=folder)
    with pytest.raises(ValueError, match="give a folder"):
        run(["03", "04"], output=folder / "x.ipynb")
    (folder / "05_broken.ipynb").write_text("not JSON")
    with pytest.raises(ValueError, match="05_broken.ipynb is not a Jupyter notebook"):
        run(["03", "05"])
    monkeypatch.setattr("resource.getrlimit", lambda _: (20, 1024))
    with pytest.raises(OSError, match="ulimit -n 1024"):  # before a kernel dies
        run("03")


# --- real kernels


def test_a_chain_passes_parameters_and_results(tmp_path, monkeypatch, capfd):
    # A python3 of somebody else that Jupyter would take first.
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "wrong"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    place = tmp_path / "{copies}"  # papermill would format it
    place.mkdir()
    (place / "a.failed.ipynb").write_text("of an earlier attempt")
    a = write(
        tmp_path / "a.ipynb",
        "from reidlib.workbook.notebooks import check_parameters, result\ncheck_parameters(In)",
        "result(run=f'demo_{margin}_{steps}', top=7, unused=1)",
        parameters='margin: float | str = "soft"\nsteps: int = 3',
    )
    b = write(
        tmp_path / "b.ipynb",
        "import sys\nprint(end='noise')\n(run, top, sys.executable)",
        parameters='run: str = ""\ntop: int = 0',
    )
    copies = run([a, b], {"margin": "0.2", "steps": "1e2", "top": 2}, output=place)
    assert copies == [place / "a.ipynb", place / "b.ipynb"]
    assert sorted(path.name for path in place.iterdir()) == ["a.ipynb", "b.ipynb"]
    assert shown(copies[1]) == repr(("demo_0.2_100", 2, sys.executable))
    out, err = capfd.readouterr()
    # libzmq, of a kernel that ends, may print that an assertion of its own failed.
    lines = [line for line in err.splitlines() if "(src/signaler.cpp:" not in line]
    assert out == "" and str(copies[0]) in lines[1]
    said = [line.split(" in ")[0] for line in lines]
    assert said == ["a: started", "a: done", "b: started", "b: done"]


def test_plain_papermill_with_an_unknown_parameter_fails_in_the_notebook(tmp_path):
    a = write(
        tmp_path / "a.ipynb",
        "from reidlib.workbook.notebooks import check_parameters\ncheck_parameters(In)",
        parameters="margin = 0.2\nlr = 1",
    )
    given, options = {"marign": 0.5, "lr": 2}, {"progress_bar": False}
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'margin'"):
        papermill.execute_notebook(a, tmp_path / "out.ipynb", given, **options)


def test_a_failure_keeps_the_earlier_good_copy_and_ends_with_its_error(tmp_path, capfd):
    a = write(tmp_path / "a.ipynb", "1 + 1", "# why\nraise OSError('disk full')", "2 + 2")
    good = tmp_path / "copies/a.ipynb"
    good.parent.mkdir()
    good.write_text("good")
    assert main(["run", str(a), "--output", str(good.parent)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 4  # started, failed, and the error:
    assert str(tmp_path / "copies/a.failed.ipynb") in lines[1]
    assert lines[2:] == ["a, cell In [2] \"raise OSError('disk full')\":", "OSError: disk full"]
    assert good.read_text() == "good"
    failed = nbformat.read(good.with_name("a.failed.ipynb"), 4)
    assert [cell.execution_count for cell in failed.cells] == [1, 2, None]
    assert len(list(good.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("import sys\nsys.exit()", r"^a, cell In \[1\] 'import sys':\nSystemExit"),
        ("import os\nos.kill(os.getpid(), 9)", r"^a, cell.* 'import os':\nThe kernel died. Out of"),
    ],
)
def test_a_notebook_that_ends_early_has_failed(tmp_path, cell, said):
    a = write(tmp_path / "a.ipynb", cell, "2 + 2")
    with pytest.raises(NotebookFailed, match=said):
        run(a, show_progress=False)
    assert [p.name for p in (tmp_path / "outputs/notebooks").iterdir()] == ["a.failed.ipynb"]


def test_a_signal_lets_the_running_cell_end_by_itself_and_leaves_no_kernel(tmp_path):
    # As a training does: the first interrupt ends the step, a checkpoint is written.
    a = write(
        tmp_path / "a.ipynb",
        "import os, pathlib, signal, time\n"
        "place, asked = pathlib.Path(place), []\n"
        "signal.signal(signal.SIGINT, lambda number, _: asked.append(number))\n"
        "place.write_text(str(os.getpid()))\n"
        "while not asked: time.sleep(0.02)\n"
        "time.sleep(4)\n"  # longer than jupyter_client waits before it kills
        "place.write_text('checkpoint')",
        "place.write_text('went on')",
        parameters='place: str = ""\nother: int = 1',
    )
    place = tmp_path / "place"
    command = [sys.executable, "-m", "reidlib", "run", str(a), "-p", "place", str(place)]
    runner = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: place.exists() and place.read_text())
        kernel = int(place.read_text())
        runner.send_signal(signal.SIGTERM)
        _, err = runner.communicate(timeout=60)
    finally:
        runner.kill()
    assert runner.returncode == 128 + signal.SIGTERM
    assert place.read_text() == "checkpoint"
    assert "Stopping" in err and "a: stopped" in err and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    assert [p.name for p in (tmp_path / "outputs/notebooks").iterdir()] == ["a.failed.ipynb"]
