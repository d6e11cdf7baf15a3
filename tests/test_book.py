"""Executed notebooks become pages of the book: pictures, cards, times, the browser in a frame."""

import runpy

import nbformat
import pytest
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from reidlib.look import figures
from reidlib.paths import ROOT, outputs_dir
from reidlib.workbook.headless import RESULT

book = runpy.run_path(str(ROOT / "docs/book.py"))


def cell(source, data):
    """A cell that ran for two seconds."""
    clock = {
        key: f"2026-01-01T00:00:0{at}Z"
        for key, at in (("iopub.execute_input", 1), ("shell.execute_reply", 3))
    }
    made = new_code_cell(source, outputs=[new_output("display_data", data)])
    made.metadata.update(execution=clock)
    return made


@pytest.fixture
def executed(tmp_path):
    """An executed notebook with two figures, the browser, and what it hands on; a run beside it."""
    shown = [
        {"text/html": figures.img(Figure((2, 1)), alt, photo)}
        for alt, photo in (("curves", False), ("<photographs>", True))
    ]
    cells = [
        new_markdown_cell(
            "# 04 · A title\n\n**Question:** what is\nasked?\n\nMore.".replace("\\\n", "\n")
        ),
        cell("show(first)", shown[0]),
        cell("show(second)", shown[1]),
        cell("browser = Browser(shown)", {"text/plain": f"{ROOT / 'x'}"}),
        cell("result()", {RESULT: {}, "text/plain": "run = 1"}),
    ]
    (outputs_dir() / "run").mkdir(parents=True)
    (outputs_dir() / "run/ranked_lists.html").write_text("lists")
    path = tmp_path / "04_a_title.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_what_sphinx_gets(executed):
    for _ in range(2):  # `make pages` does it again
        book["main"](executed.parent)
        notebook = nbformat.read(executed, as_version=4)
        assert not notebook.cells[4].outputs
        assert '<iframe src="../ranked_lists.html" title=' in str(notebook.cells[3].outputs)
        assert str(ROOT) not in executed.read_text()
    assert (executed.parent / "pages/ranked_lists.html").read_text() == "lists"
    card = (executed.parent / "cards_0.txt").read_text()
    assert (
        "04 · A title\n" in card
        and ":img-alt: <photographs>\n" in card
        and "\nWhat is\nasked?" in card
    )
    assert executed.with_suffix(".jpg").stat().st_size > 100
    assert "| [04_a_title](04_a_title.ipynb) | 8 |" in (executed.parent / "times.md").read_text()


def test_the_browser_stays_a_picture_without_its_page(executed):
    (outputs_dir() / "run/ranked_lists.html").unlink()
    book["main"](executed.parent)
    assert "iframe" not in executed.read_text()
