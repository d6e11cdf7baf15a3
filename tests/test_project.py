"""What holds the project's files together: packages, lint, imports between rooms, no stray paths."""

import ast
import copy
import doctest
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import reidlib
from reidlib.paths import ROOT, cache_dir, data_dir, outputs_dir
from reidlib.workbook.notebooks import check_parameters

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
DECLARED = {
    canonicalize_name(requirement.name): requirement
    for text in [*PROJECT["project"]["dependencies"], *EXTRAS["export"], *EXTRAS["test"]]
    if (requirement := Requirement(text)).name != "reidlib"
}
BOOK = {canonicalize_name((r := Requirement(text)).name): r for text in EXTRAS["book"]}
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}


def tracked_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_conda_and_pip_ask_for_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    ranges = {}
    for line in conda:
        if isinstance(line, str) and line != "pip":
            name, bound = re.fullmatch(r"([\w-]+)(.*)", line).groups()
            ranges[canonicalize_name(CONDA_NAMES.get(name, name))] = bound
    assert ranges.pop("python") == PROJECT["project"]["requires-python"]
    assert ranges == {name: str(r.specifier) for name, r in DECLARED.items()}


def test_every_package_is_pinned_inside_its_range():
    text = (ROOT / "constraints.txt").read_text()
    pins = {canonicalize_name(n): v for n, v in re.findall(r"(?m)^([\w.-]+)==(\S+)$", text)}
    for name, requirement in (DECLARED | BOOK).items():
        assert pins[name] in requirement.specifier, name


def test_lint():
    for command in (["check", "--no-cache"], ["format", "--check"]):
        line = [sys.executable, "-m", "ruff", *command, "."]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]


# The floor, then the rooms, each with its files: a file imports only files that stand before it.
ROOMS = {
    "": "paths progress words typed extras recipes records runs",
    "data": "files layouts tracks dataset people synthetic corrections tables pixels check augment sampler",
    "model": "depthwise elsewhere network weights device embed shards stored",
    "evaluation": "distances metrics partial ranks sides retrieval index leaks intervals baselines rerank "
    "pairs verify scoring thresholds",
    "look": "figures live photographs search suspects copies maps why pages embedding_map lists "
    "browser board",
    "training": "losses identity distributed chunks checkpoint watched checks health journal loop",
    "workbook": "export headless notebooks scores release workers compare variants results "
    "verdicts",
}
FILES = [f"{room}.{stem}".lstrip(".") for room, stems in ROOMS.items() for stem in stems.split()]


def imported(tree):
    """What a file imports: its own library's files, as `room.file`, and the packages of others."""
    ours, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package, _, place = (node.module or "").partition(".")
            if package == "reidlib":
                ours |= {place, *(f"{place}.{alias.name}".lstrip(".") for alias in node.names)}
            else:
                others.add(package)
    return ours & {*FILES}, others


def test_files_import_only_files_that_stand_before_them():
    library = ROOT / "reidlib"
    found = {
        ".".join(path.relative_to(library).with_suffix("").parts)
        for path in library.rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    assert found == {*FILES}
    for i, file in enumerate(FILES):
        tree = ast.parse((library / f"{file.replace('.', '/')}.py").read_text())
        ours, others = imported(tree)
        assert ours <= {*FILES[:i]}, file
        assert ("matplotlib" in others) == (file in ("look.figures", "look.photographs")), file


def test_another_copy_of_the_repository_is_refused(tmp_path, monkeypatch):
    """A kernel starts in its notebooks; an environment that was copied too imports this library."""
    (tmp_path / "copy/reidlib").mkdir(parents=True)
    (tmp_path / "copy/reidlib/paths.py").touch()
    (tmp_path / "copy/notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "copy/notebooks")
    for door in (outputs_dir, data_dir, cache_dir, lambda: check_parameters(["", "a = 1", ""])):
        with pytest.raises(RuntimeError, match="This is .*copy, but .*make clean"):
            door()
    monkeypatch.chdir(tmp_path)
    assert outputs_dir() == tmp_path / "outputs"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "copy/.venv"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(RuntimeError, match="This is .*copy, but"):
        outputs_dir()
    monkeypatch.chdir(ROOT / "notebooks")
    assert outputs_dir() == tmp_path / "outputs"


@pytest.mark.parametrize("fault", ["copied", "dangling", "without pip", "of another library"])
def test_make_notices_an_environment_that_is_not_ready(tmp_path, fault):
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    (tmp_path / "reidlib").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/.ready").touch()
    here = tmp_path / ("elsewhere" if fault == "copied" else "")
    (binaries / "activate").write_text(f'VIRTUAL_ENV="{here / ".venv"}"')
    if fault == "dangling":
        (binaries / "python").symlink_to("nowhere")
    else:
        (binaries / "python").write_text(
            f'#!/bin/sh\n{"exit 1" if fault == "without pip" else f"exec {sys.executable}"} "$@"\n'
        )
        (binaries / "python").chmod(0o755)
    line = ["make", "setup"] if fault == "copied" else ["make", "-n", "setup"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / ".venv/.ready").exists() == (fault == "copied")  # it may be the original's
    if fault == "copied":
        assert done.returncode and "make clean" in done.stdout and "Install" not in done.stdout
    else:
        assert "venv --clear .venv" in done.stdout and "pip install" in done.stdout


def test_nothing_is_unpickled():
    for path in (ROOT / "reidlib").rglob("*.py"):
        text = path.read_text()
        assert "pickle.load" not in text and "allow_pickle=True" not in text
        for call in re.findall(r"(?<!safetensors\.)torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path.name


def test_no_image_of_real_people_and_no_path_of_a_machine_is_committed():
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        assert not re.search(r"_c\ds\d_\d{6}_\d\d\.jpg", name), name
        if path.suffix[1:] in ["py", "md", "ipynb", "yml", "yaml", "toml", "txt", "json", "csv"]:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(/home/|/root/|/Users/)\w", text), name


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(
        "REID_DATA", str(tmp_path)
    )  # the built-in data as it is, not the tests' small one
    monkeypatch.setenv("REID_OUTPUTS", str(ROOT / "outputs"))
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert not failed
    assert attempted or page.stem not in ("README", "results")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_name_what_there_is(page):
    text = page.read_text()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z]+)`", text):
        assert target in targets, target
    for linked in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / linked).exists(), linked
    for file in re.findall(r"`(reidlib/[\w/]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_the_readme_names_every_notebook_and_the_book_has_every_page():
    text = (ROOT / "README.md").read_text()
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        assert file.stem in text, file.name
    contents = (ROOT / "docs/index.md").read_text()  # `notebooks/0*` and `1*` are all of them
    for file in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"^{file.stem}$", contents, re.M) or file.stem == "index", file.name


def test_a_workflow_runs_what_is_here():
    """It cannot be run here: so its steps are targets of the Makefile, or modules."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        for line in [step["run"] for job in jobs for step in job["steps"] if "run" in step]:
            assert line in [f"make {t}" for t in targets] or line.startswith("python -m "), line


@pytest.mark.parametrize("name", reidlib.__all__)
def test_public_names_have_an_example(name):
    """The examples themselves run as doctests."""
    assert ">>>" in getattr(reidlib, name).__doc__


FOLD = runpy.run_path(str(ROOT / "docs/fold.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_figures_and_sentences_are_folded_and_what_teaches_is_open(path):
    notebook = json.loads(path.read_text())
    assert FOLD["fold"](copy.deepcopy(notebook)) == notebook, "make format marks the cells"


@pytest.mark.parametrize(
    ("source", "folded"),
    [
        ("say('a sentence')", True),
        ("figure = figures.curves(series)\nfigures.show(figure, 'alt')", True),
        ("with figures.optional('it'):\n    figures.show(figure, 'alt')", True),
        ("table.head(3)", True),
        ("import numpy as np\ncheck_parameters(In)", True),
        ("folder = train(plan)\nsay(folder)", False),
        ("losses = [max(0, m + p - n) for p, n in triplets]", False),
        ("def loop():\n    print(1)", False),
        ("model.train()\nprint(model)", True),
    ],
)
def test_what_is_folded(source, folded):
    assert FOLD["folds"](source, []) == folded
    assert not FOLD["folds"](source, ["parameters"])
    assert FOLD["folds"]("a = 1\n" * 31, ["parameters"])
