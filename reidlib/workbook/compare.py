"""Rows of a comparison: each a run, found where it was trained before, else trained headless.

A row is found by its settings and training data, whatever the run is called, so that a comparison
picks up what is there, and goes on where it was stopped.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from reidlib import runs
from reidlib.data.pixels import load_images, load_training_images
from reidlib.data.tables import fingerprint, hold_out, load
from reidlib.evaluation.scoring import PER_QUERY
from reidlib.model.device import pick_device, resolve_precision
from reidlib.model.embed import embed, read_embeddings, write_embeddings
from reidlib.model.weights import load_model
from reidlib.paths import ROOT, outputs_dir
from reidlib.progress import progress
from reidlib.recipes import Recipe

Split = Literal["test", "held_out"]
# What may differ between two runs that are the same row: it does not change what is learnt.
WATCHING = ("log_every", "checkpoint_every", "evaluate_every")


class Row(NamedTuple):
    """One row: all settings, and the tag of its run should it be trained here."""

    recipe: Recipe
    tag: str


class Made(NamedTuple):
    """What became of a row: the folder of its run, or why it has none."""

    folder: Path | None
    problem: str = ""
    trained: bool = False
    """Whether a notebook ran for it now; False for a row that was there."""


def complete(
    rows: Mapping[str, Row],
    split: Split = "test",
    *,
    train: bool = True,
    jobs: int = 2,
    device: str = "auto",
    show_progress: bool = True,
) -> dict[str, Made]:
    """Find each row's run, or train and score it by `03_train` and `04_evaluate`.

    A finished run with the row's settings, on the same training images, is taken as it is. A run of
    the row's own name that is unfinished goes on from its checkpoint; one with other settings is
    deleted and trained again, so give tags that no other run has. A row that fails does not keep
    the others from being made.

    Args:
        rows: by label.
        split: `"test"` scores by 04_evaluate, without flips, in float32. `"held_out"` takes the
            last held-out scores of training, and never looks at the test split.
        train: False takes the runs that are there, scores those that have no scores yet, and says of
            every other row what the nearest run has set otherwise.
        jobs: notebooks at once, each with its share of the CPU's cores; 1 where the device is no CPU.
        device: as in `Trainer`.

    Returns:
        What became of each row, in order. The executed notebooks are in `outputs/notebooks/<run>/`.

    Raises:
        ValueError: a bad `split` or `jobs`; held-out scores of a recipe that holds nobody out;
            two rows that would have one run.
        RuntimeError: no row at all could be made; says why the first could not.
        KeyboardInterrupt: stopped; the runs under way have written checkpoints.
    """
    if split not in PER_QUERY:
        raise ValueError(f"split = {split!r}: choose test or held_out.")
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, not {jobs}.")
    target = pick_device(device)
    rows = {
        label: row._replace(recipe=resolve_precision(row.recipe, target))
        for label, row in rows.items()
    }
    nobody = [label for label, row in rows.items() if not row.recipe.hold_out]
    if split == "held_out" and nobody:
        raise ValueError(f"{nobody[0]}: it has no held-out scores, since hold_out is 0.")
    _data.cache_clear()
    _train_data.cache_clear()
    names = {label: _own(row).name for label, row in rows.items()}
    for label, name in names.items():
        twin = next(other for other, its in names.items() if its == name)
        if rows[twin] != rows[label]:
            raise ValueError(
                f"{twin!r} and {label!r} would both be the run {name}: give other tags."
            )

    notebooks = _Notebooks(split, device, jobs if target.type == "cpu" else 1, train)
    made: dict[str, Made] = {}
    bar = progress(total=len(set(names.values())), desc="rows", unit="row", show=show_progress)
    with ThreadPoolExecutor(notebooks.jobs) as pool:
        try:
            # Rows that are one run are made once.
            futures = {pool.submit(notebooks.make, rows[label]): n for n, label in _first(names)}
            for future in as_completed(futures):
                made[futures[future]] = future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            notebooks.stop()
            raise
        finally:
            bar.close()
    if not any(m.folder for m in made.values()):
        name, why = next((name, m.problem) for name, m in made.items())
        raise RuntimeError(f"No row could be made. {name}: {why}")
    return {label: made[name] for label, name in names.items()}


def find(row: Row) -> Path | None:
    """Return the folder of a finished run with a row's settings and training images, or None.

    The run of the row's own tag goes before others; among those, the first by name.
    """
    wanted, data = _settings(row.recipe), _train_data(row.recipe.dataset, row.recipe.hold_out)
    own = _own(row)
    for folder in [own, *sorted(path.parent for path in outputs_dir().glob("*/manifest.json"))]:
        try:
            known = runs.read_json(folder / "manifest.json")
            finished = known.get("status") == "finished" and known.get("train_data") == data
            if finished and _settings(runs.read_recipe(folder)) == wanted:
                return folder
        except (ValueError, OSError):
            continue  # a broken run, or one of a version whose settings differ, is not this row
    return None


def nearest(row: Row) -> str:
    """Return in words which finished run is nearest to a row, and what it has set otherwise."""
    wanted, found = _settings(row.recipe), []
    for file in sorted(outputs_dir().glob("*/manifest.json")):
        try:
            finished = runs.read_json(file).get("status") == "finished"
            its = _settings(runs.read_recipe(file.parent))
        except (ValueError, OSError):
            continue
        if finished:
            differ = [f"{k} = {its[k]!r}, not {wanted[k]!r}" for k in wanted if its[k] != wanted[k]]
            # A run of another loss or network is farther than any that differs in the details.
            far = sum(its[k] != wanted[k] for k in ("loss", "margin", "dataset", "backbone"))
            found.append((far, len(differ), file.parent.name, differ or ["other training images"]))
    if not found:
        return "There is no finished run at all."
    *_, name, differ = min(found)
    return f"The nearest is {name}: {'; '.join(differ)}."


def embedded(
    folder: Path, split: Split = "test", device: str = "auto", *, flip: bool = False
) -> tuple[np.ndarray, pd.DataFrame, np.ndarray, pd.DataFrame]:
    """Return the embeddings of a run: queries (Q, D), their table, gallery (G, D), its table.

    Those of the test split without flips are read from the run's folder. A released run has none
    there: they are made from its weights, in float32 as its scores were, and kept.

    Args:
        folder: of the run.
        split: as in `complete`.
        device: as in `Trainer`.
        flip: the mean over each image and its mirror image; never kept.
    """
    files = [folder / f"embeddings_{side}.h5" for side in ("query", "gallery")]
    kept = split == "test" and not flip
    if kept and all(file.is_file() for file in files):
        (query_emb, query), (gallery_emb, gallery) = map(read_embeddings, files)
        return query_emb, query, gallery_emb, gallery
    model = load_model(folder, pick_device(device))
    recipe, data = model.recipe, _data(model.recipe.dataset)
    tables = (data.query, data.gallery)
    if split == "held_out":
        tables = hold_out(data.train, recipe.hold_out, seed=0)[1:]
    # As the scores beside them were computed: those of training in its own precision and images.
    precision = "float32" if split == "test" else recipe.precision
    found = []
    for file, table in zip(files, tables, strict=True):
        pixels, table = (load_training_images if split == "held_out" else load_images)(
            table, recipe
        )
        emb = embed(model, pixels, recipe, flip=flip, precision=precision)
        if kept:
            write_embeddings(file, emb, table)
        found += [emb, table]
    return tuple(found)


def _first(names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return each run once, with the first label that has it, in order."""
    return [
        (n, next(la for la, its in names.items() if its == n))
        for n in dict.fromkeys(names.values())
    ]


_data = lru_cache(load)


@lru_cache
def _train_data(dataset: str, held_out: int | str) -> str:
    """Return the fingerprint of what a recipe trains on; reading it again takes seconds."""
    train = _data(dataset).train
    return fingerprint(hold_out(train, held_out, seed=0)[0] if held_out else train)


def _own(row: Row) -> Path:
    return outputs_dir() / runs.run_name(_data(row.recipe.dataset).name, row.recipe, row.tag)


def _settings(recipe: Recipe) -> dict:
    """Return what makes a row. A file of weights goes by its name: where it lies is no setting."""
    settings = recipe.model_dump(exclude=set(WATCHING))
    return settings | {"weights": Path(recipe.weights).name}


def _goes_on(own: Path, row: Row) -> bool:
    """Return whether `03_train` may go on with a row's own run: same settings, all of them, and data.

    Where broken images are left out, 03_train alone can tell whether the data is the same.
    """
    recipe = row.recipe
    try:
        data = runs.read_json(own / "manifest.json").get("train_data")
        known = recipe.unreadable == "skip" or data == _train_data(recipe.dataset, recipe.hold_out)
        return known and runs.read_recipe(own) == recipe
    except (ValueError, OSError):
        return False


def _busy(folder: Path) -> bool:
    """Return whether a process is writing a run."""
    try:
        with runs.lock(folder):
            return False
    except RuntimeError:
        return True


def _scored(folder: Path, split: Split) -> bool:
    """Return whether the scores that a comparison wants are there: without flips, in float32."""
    if not (folder / PER_QUERY[split]).is_file():
        return False
    if split == "held_out":
        return True
    metrics = runs.read_json(folder / "metrics.json")
    own = metrics.get("evaluated_on") == _data(runs.read_recipe(folder).dataset).name
    return own and metrics.get("flip") is False and metrics.get("precision") == "float32"


class _Notebooks:
    """Runs the notebooks of rows, several at once, each in a process that `stop` can end."""

    def __init__(self, split: Split, device: str, jobs: int, train: bool):
        self.split, self.device, self.jobs, self.train = split, device, jobs, train
        self.stopped = False
        self.children: set[subprocess.Popen] = set()

    def stop(self) -> None:
        """End what runs; a training writes a checkpoint first."""
        self.stopped = True
        for child in list(self.children):
            child.terminate()

    def make(self, row: Row) -> Made:
        """Find one row's run and scores, or make what is missing of them."""
        own, trained = _own(row), False
        folder = find(row)
        if not folder and not self.train:
            return Made(None, f"No run with these settings is there. {nearest(row)}")
        if not folder:
            trained, problem = True, self._train(row, own)
            if problem:
                return Made(None, problem)
            folder = find(row)
            if not folder:
                # Images were left out as unreadable: no other run can be known to have the same.
                folder = own
        if not _scored(folder, self.split):
            if self.split == "held_out":
                return Made(None, f"{folder.name} has no {PER_QUERY['held_out']}: delete it.")
            trained, problem = True, self._evaluate(folder)
            if problem:
                return Made(None, problem)
        return Made(folder, trained=trained)

    def _train(self, row: Row, own: Path) -> str:
        settings = {k: v for k, v in row.recipe.model_dump().items() if v is not None}
        settings |= {"recipe": "trinet", "tag": row.tag}
        while True:
            settings["resume"] = "auto" if _goes_on(own, row) else "restart"
            problem = self._run("03_train", own, settings)
            if "Another process is writing" not in problem:
                return problem
            # A comparison that was killed leaves its last trainings behind; they end by themselves.
            while not self.stopped and _busy(own):
                time.sleep(2)
            if find(row):
                return ""

    def _evaluate(self, folder: Path) -> str:
        # The other figures of 04_evaluate are for a reader of one run.
        quick = {"baselines": False, "lists": 1, "html_queries": 20}
        return self._run("04_evaluate", folder, {"run": str(folder), **quick})

    def _run(self, notebook: str, run: Path, parameters: dict) -> str:
        """Run a notebook headless; return what went wrong, or an empty string."""
        if self.stopped:
            return "stopped"
        copies = outputs_dir() / "notebooks" / run.name
        command = [sys.executable, "-m", "reidlib", "run", notebook, "--output", str(copies)]
        for name, value in (parameters | {"device": self.device}).items():
            command += ["-p", name, str(value)]
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.children.add(child)
        if self.stopped:  # meanwhile
            child.terminate()
        said = child.communicate()[1]
        self.children.discard(child)
        if not child.returncode:
            return ""
        lines = [line for line in said.splitlines() if line.strip()]
        return "\n".join(lines[-2:]) or f"{notebook} ended with status {child.returncode}"
