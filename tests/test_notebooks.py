"""Every notebook runs headless, from any folder, and leaves what it says; sources are clean."""

import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

import nbformat
import pandas as pd
import papermill
import pytest

from reidlib import runs
from reidlib.evaluation.retrieval import evaluate
from reidlib.model.stored import read_embeddings
from reidlib.paths import ROOT
from reidlib.recipes import Recipe
from reidlib.workbook.notebooks import read_parameters

SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = shlex.split((ROOT / "tests" / "small_parameters.txt").read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_sources_are_stripped_and_portable(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] is code[0]
    seen = papermill.inspect_notebook(path)  # what `papermill --help-notebook` shows
    assert [*seen] == [*read_parameters(path)]
    assert all(p["inferred_type_name"] != "None" and p["help"] for p in seen.values())
    assert "check_parameters(In)" in code[1].source
    text = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"""["'](/|~|[A-Z]:\\)\w+/""", text), "an absolute path"
    headings = "**Question:**", "| reads |", "| writes |", "| takes |", "Takeaways", "### Exercises"
    assert all(heading in text for heading in headings)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_cells_are_short_and_programs_live_in_the_library(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    lines = [
        len([s for s in cell.source.splitlines() if s.strip() and not s.strip().startswith("#")])
        for cell in cells
        if "parameters" not in cell.metadata.get("tags", [])
    ]
    assert max(lines) <= 25 and statistics.median(lines) <= 8, lines
    source = "\n".join(cell.source for cell in cells)
    assert "globals()" not in source and "Markdown(" not in source  # `say` shows sentences
    assert ".style" not in source  # it escapes nothing; `figures.Table` does


def plain_types(annotation):
    """The plain types that an annotation allows."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in args}
    if origin is Annotated:
        return plain_types(args[0])
    return set().union(*map(plain_types, args)) if args else {annotation}


@pytest.mark.parametrize("name", ["03_train", "05_compare_margins"])
def test_settings_of_a_notebook_are_those_of_the_recipe(name):
    """Papermill wants them typed in the notebook; so they are held to the recipe, the one source."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    parameters, settings = read_parameters(path), Recipe.model_fields
    assert name != "03_train" or settings.keys() <= parameters.keys()
    (cell, *_) = (c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    comments = dict(re.findall(r"(?m)^(\w+)\b.+?  # (?:type: \S+ )?(.+)$", cell.source))
    for setting in settings.keys() & parameters.keys():
        wanted = plain_types(settings[setting].annotation)
        assert plain_types(parameters[setting].annotation) == wanted | {NoneType}, setting
        assert re.match(rf"{re.escape(comments[setting])}(\W|$)", settings[setting].description)


def execute(arguments, folder, outputs, data):
    environment = os.environ | {"REID_OUTPUTS": str(outputs), "REID_DATA": str(data)}
    options = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 900}
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, data_root):
    """All notebooks in one chain, as `make notebooks` runs them."""
    outputs = tmp_path_factory.mktemp("outputs")
    names = [path.stem for path in SOURCES]
    done = execute(["reidlib", "run", *names, *SMALL], ROOT / "notebooks", outputs, data_root)
    assert done.returncode == 0, done.stderr[-3000:]
    return outputs


def texts(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                yield output.text
            else:
                yield "".join(output.get("data", {}).get("text/plain", ""))
                yield "".join(output.get("data", {}).get("text/markdown", ""))


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_every_notebook_runs(chain, path):
    executed = nbformat.read(chain / "notebooks" / path.name, as_version=4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code if cell.source.strip())
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = "".join(o.get("data", {}).get("text/html", "") for o in outputs if "data" in o)
    images = re.findall(r"<img [^>]*>", pictures)
    assert images and all(re.search(r'alt="[^"]{10,}"', image) for image in images)
    assert "application/vnd.jupyter.widget-view+json" not in str(outputs), "a dead widget"
    for text in texts(executed):
        assert "Warning:" not in text and text.count("\r") <= 1, text
    assert (chain / "notebooks" / path.name).stat().st_size < 5e6


@pytest.mark.slow
def test_training_and_evaluation_leave_a_whole_run(chain):
    folder = chain / "synthetic_batchhard_softplus_small"
    expected = {
        *("config.json", "manifest.json", "metrics.json", "history.csv", "checkpoint.pt"),
        *("checkpoint.pt.sha256", "weights.safetensors", "embeddings_query.h5"),
        *("embeddings_gallery.h5", "per_query.csv", "ranked_lists.jpg", "ranked_lists.html"),
        *("rerank_and_tta.csv", "search.csv", "verification.json", "causes.csv", "suspects.csv"),
        "embedding_map.html",
    }
    assert expected <= {path.name for path in folder.iterdir()}
    metrics = runs.read_json(folder / "metrics.json")
    query, gallery = (read_embeddings(folder / f"embeddings_{s}.h5") for s in ("query", "gallery"))
    again = evaluate(*query, *gallery)
    for key, value in again.scores.items():
        assert metrics[key] == pytest.approx(value, abs=1e-12), key
    table = pd.read_csv(folder / "per_query.csv")
    assert table["AP"].mean() == pytest.approx(metrics["mAP"], abs=1e-12)
    assert {*metrics["baselines"]} == {"untrained", "colours_without_camera"}
    assert metrics["held_out"]["best"]["mAP"] > 0
    verified = runs.read_json(folder / "verification.json")
    assert verified["chosen_on"] == "held-out identities"


def test_no_figure_of_04_stops_it():
    """Small data has figures that cannot be drawn; see `figures.optional`."""
    cells = nbformat.read(ROOT / "notebooks" / "04_evaluate.ipynb", as_version=4).cells
    drawn = [cell.source for cell in cells if "figures.show(" in cell.source]
    assert len(drawn) == 5 and all("with figures.optional(" in source for source in drawn)


@pytest.mark.slow
def test_data_of_three_people_without_cameras_are_told_as_they_are(tmp_path, data_root):
    """Each picture of the built-in data in its person's folder, which says no camera."""
    for split, people in (("bounding_box_train", 3), ("query", 2), ("bounding_box_test", 2)):
        files = sorted((data_root / "synthetic" / split).glob("0*[1-9]_c*"))
        for name in sorted({file.name[:4] for file in files})[:people]:
            folder = tmp_path / "few" / split.removeprefix("bounding_box_") / name
            folder.mkdir(parents=True)
            for file in [file for file in files if file.name.startswith(name)][:4]:
                shutil.copy(file, folder / file.name[5:])
    few = tmp_path / "few"
    line = f"reidlib run 00 01 06 -p dataset {few} -p folder {few} -p p 2 -p steps 2 -p start"
    line = [*line.split(), ""]
    done = execute(line, tmp_path, tmp_path / "outputs", data_root)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in (tmp_path / "outputs" / "notebooks").iterdir():
        said = "\n".join(texts(nbformat.read(path, as_version=4)))
        assert not re.search(r"\bnan\b|camera [−-]1|, 0 to 0", said), said


@pytest.mark.slow
def test_the_comparison_leaves_its_tables(chain):
    """All its rows, and what is made of them: see `test_compare` and `test_verdicts`."""
    executed = nbformat.read(chain / "notebooks" / "05_compare_margins.ipynb", as_version=4)
    said = "\n".join(texts(executed))
    assert "**5 rows** of 40 steps" in said and "NOT IN THE TABLES" not in said
    every, table = (pd.read_csv(chain / f"compare_margins{end}.csv") for end in ("_runs", ""))
    assert len(every) == every["run"].nunique() == len(table) == 5
    for row in every.itertuples():
        scores = runs.read_json(chain / row.run / "metrics.json")
        assert row.mAP == pytest.approx(scores["mAP"], abs=1e-12)
    assert 100 * every["mAP"].max() == pytest.approx(table["mAP"].max(), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"], ids=["root", "notebooks"])
def test_plain_papermill_from_any_folder(tmp_path, data_root, folder):
    path = ROOT / "notebooks" / "03_train.ipynb"
    # Papermill refuses none of the parameters that 03_train does not have; the notebook does.
    known, small = read_parameters(path), zip(SMALL[1::3], SMALL[2::3], strict=True)
    values = {name: value for name, value in small if name in known} | {"steps": "2"}
    arguments = ["papermill", os.path.relpath(path, folder), str(tmp_path / "out.ipynb")]
    for pair in values.items():
        arguments += ["-p", *pair]
    done = execute(arguments, folder, tmp_path / "outputs", data_root)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "outputs" / "synthetic_batchhard_softplus_small"
    assert runs.read_json(run / "manifest.json")["status"] == "finished"
