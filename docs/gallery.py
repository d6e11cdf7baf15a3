"""The README's pictures, from the executed notebooks of `make gallery`; built-in data only.

A figure is found by the beginning of its alt text. The page of ranked lists is photographed in
headless Chromium; without one its old picture stays.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

from book import figures
from reidlib.paths import ROOT, outputs_dir
from reidlib.runs import find_run

FIGURES = {  # file: (notebook, beginning of the alt text, width in pixels)
    "ranked_lists.jpg": ("04_evaluate", "Ranked lists of the best", 1600),
    "why_wrong.jpg": ("14_why_wrong", "Worst queries: where features", 1200),
}


def figure(notebook: str, alt: str) -> Image.Image:
    """The first figure of an executed notebook whose alt text begins so."""
    executed = nbformat.read(outputs_dir() / "notebooks" / f"{notebook}.ipynb", as_version=4)
    data = next(data for data, words in figures(executed) if words.startswith(alt))
    return Image.open(io.BytesIO(data)).convert("RGB")


def photograph(page: Path, out: Path) -> None:
    """The upper part of a page, as Chromium shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"No Chromium here: {out.name} stays as it is.")
        return
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        command = [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        # Of its own clock, which waits for nothing: time enough for thumbnails to fade in.
        command += ["--window-size=1250,760", "--virtual-time-budget=5000", page.as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        Image.open(shot).convert("RGB").save(out, quality=80, optimize=True)


if __name__ == "__main__":
    for name, (notebook, alt, width) in FIGURES.items():
        picture = figure(notebook, alt)
        picture.thumbnail((width, 10_000))
        picture.save(ROOT / "docs" / name, quality=80, optimize=True)
    photograph(find_run(sys.argv[1]) / "ranked_lists.html", ROOT / "docs" / "browser.jpg")
