"""Make the notebooks that `make book` ran ready for Sphinx: `python docs/book.py`.

They are in `docs/notebooks`. Beside them come a picture of each and a card with it for the first
page, a page of times, and in `pages` those that the library made, since a book has no widgets.
"""

import base64
import html
import io
import os
import platform
import re
import shutil
from datetime import datetime
from pathlib import Path

import nbformat
import torch
from PIL import Image, ImageOps

from reidlib.paths import ROOT, outputs_dir
from reidlib.workbook.headless import RESULT

PLACE = ROOT / "docs" / "notebooks"
IMAGE = re.compile(r'<img\b[^>]*\bsrc="data:image/\w+;base64,([^"]+)" alt="([^"]*)"')
SIZE = (480, 300)  # of a card's picture
QUESTION = re.compile(r"# (.+)\n\n\*\*Question:\*\* ((?:.+\n)+)")
PAGES = {  # what a cell calls: the page that the library writes of it, in a run's folder
    "Browser(": ("ranked_lists.html", "The ranked-list browser"),
    "linked_map(": ("embedding_map.html", "The map of embeddings"),
}
FRAME = (
    '<iframe src="../{0}" title="{1}" width="100%" height="900"></iframe>'
    '<p><a href="../{0}">{1}, as a page of its own</a></p>'
)
CARD = """:::{{grid-item-card}} {title}
:link: /notebooks/{stem}
:link-type: doc
:img-top: /notebooks/{stem}.jpg
:img-alt: {alt}

{question}:::

"""
TIMES = """# How long it took

The notebooks of this book ran on {day:%d %B %Y}, on {cores} cores of a {machine}, with Python {python} and
torch {torch}, in {minutes:.0f} minutes.

| notebook | seconds |
|---|---|
"""


def figures(notebook: nbformat.NotebookNode) -> list[tuple[bytes, str]]:
    """Every figure that a notebook shows, (file, alt text)."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    return [(base64.b64decode(data), html.unescape(alt)) for data, alt in IMAGE.findall(shown)]


def cover(notebook: nbformat.NotebookNode, path: Path) -> str:
    """Write the picture of a notebook's card, its first photographs or else curves; return alt text."""
    pictures = [(Image.open(io.BytesIO(data)), alt) for data, alt in figures(notebook)]
    picture, alt = next((p for p in pictures if p[0].format == "JPEG"), pictures[0])
    if picture.format == "JPEG":
        card = ImageOps.fit(picture, SIZE, centering=(0, 0))
    else:
        card = ImageOps.pad(picture.convert("RGB"), SIZE, color="white")
    card.save(path, quality=80)
    return alt


def seconds(notebook: nbformat.NotebookNode) -> float:
    """How long a notebook's cells ran, together."""
    clocks = [cell.metadata.get("execution", {}) for cell in notebook.cells]
    begin, end = "iopub.execute_input", "shell.execute_reply"
    spans = [[datetime.fromisoformat(c[key]) for key in (begin, end)] for c in clocks if end in c]
    return sum((stop - start).total_seconds() for start, stop in spans)


def for_a_book(notebook: nbformat.NotebookNode, pages: Path) -> None:
    """Frame the library's pages where cells show them or a widget; drop what only chains read."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if RESULT not in o.get("data", {})]
            for call, (name, title) in PAGES.items():
                if call in cell.source and (pages / name).exists():
                    shown = {"text/html": FRAME.format(name, title)}
                    cell.outputs = [nbformat.v4.new_output("display_data", shown)]


def main(place: Path = PLACE) -> None:
    """Ready all that ran."""
    shutil.rmtree(place / "pages", ignore_errors=True)
    (place / "pages").mkdir()
    for name, _ in PAGES.values():
        for page in sorted(outputs_dir().glob(f"*/{name}"), key=os.path.getmtime)[-1:]:
            shutil.copy(page, place / "pages")
    took, cards = {}, {"0": "", "1": ""}
    for path in sorted(place.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8").replace(f"{ROOT}{os.sep}", "")
        text = text.replace("](../docs/", "](../")  # drawings, seen from the notebooks of the book
        notebook = nbformat.reads(text, as_version=4)
        for_a_book(notebook, place / "pages")
        nbformat.write(notebook, path)
        alt = cover(notebook, path.with_suffix(".jpg"))
        title, question = QUESTION.match(notebook.cells[0].source).groups()
        question = question[0].upper() + question[1:]
        cards[path.stem[0]] += CARD.format(title=title, stem=path.stem, alt=alt, question=question)
        took[path.stem] = seconds(notebook)
    for part, text in cards.items():
        (place / f"cards_{part}.txt").write_text(text, encoding="utf-8")
    about = dict(day=datetime.now(), cores=os.cpu_count(), machine=platform.machine())
    about |= dict(python=platform.python_version(), torch=torch.__version__)
    rows = [f"| [{stem}]({stem}.ipynb) | {time:.0f} |\n" for stem, time in took.items()]
    text = TIMES.format(**about, minutes=sum(took.values()) / 60) + "".join(rows)
    (place / "times.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
