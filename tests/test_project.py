"""What holds the project's files together: packages, lint, imports between rooms, no stray paths."""

import ast
import doctest
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reidlib.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DECLARED = {
    canonicalize_name(r.name): r
    for text in [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["export"],
        *PROJECT["project"]["optional-dependencies"]["test"],
    ]
    for r in [Requirement(text)]
    if r.name != "reidlib"
}
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}


def tracked_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


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
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    for name, requirement in DECLARED.items():
        assert pins[name] in requirement.specifier, name


def test_lint():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:]


# The order of the rooms: each imports only rooms above it.
ROOMS = (
    *("paths", "words", "progress", "recipes", "runs"),
    *("synthetic", "files", "datasets", "images", "check", "augment", "sampling"),
    *("depthwise", "networks", "weights", "device", "embedding"),
    *("metrics", "evaluation", "significance", "baselines", "reranking", "verification"),
    *("pictures", "search", "suspects", "diagnosis", "linked_map", "browser", "board"),
    *("losses", "checkpoint", "health", "training"),
    *("export", "notebooks", "comparison", "release", "__main__"),
)


def test_rooms_import_only_rooms_above_them():
    files = {path.stem: path for path in (ROOT / "reidlib").glob("*.py")}
    assert {*files} - {"__init__"} == {*ROOMS}
    for i, room in enumerate(ROOMS):
        tree = ast.parse(files[room].read_text())
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "reidlib"
            for name in (
                [node.module.split(".")[1]]
                if "." in node.module
                else [alias.name for alias in node.names if alias.name in ROOMS]
            )
        }
        assert imported <= {*ROOMS[:i]}, room
        modules = {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
        } | {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert ("matplotlib" in modules) == (room == "pictures"), room


def test_nothing_is_unpickled():
    for path in (ROOT / "reidlib").glob("*.py"):
        text = path.read_text()
        assert "pickle.load" not in text and "allow_pickle=True" not in text
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path.name


def test_no_image_of_real_people_and_no_path_of_a_machine_is_committed():
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        assert not re.search(r"_c\ds\d_\d{6}_\d\d\.jpg", name), name
        if path.suffix in {
            ".py",
            ".md",
            ".ipynb",
            ".yml",
            ".yaml",
            ".toml",
            ".txt",
            ".json",
            ".csv",
        }:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(/home/|/root/|/Users/)\w", text), name


def test_the_readme_s_examples_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("REID_OUTPUTS", str(ROOT / "outputs"))
    failed, attempted = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert attempted > 5 and not failed


def test_the_readme_names_what_there_is():
    text = (ROOT / "README.md").read_text()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert notebook.stem in text, notebook.stem
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z]+)`", text):
        assert target in targets, target
    for linked in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / linked).exists(), linked
