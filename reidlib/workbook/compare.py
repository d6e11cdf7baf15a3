"""Rows of a comparison: each a run, found where it was trained before, else trained and scored now.

A row is found by its settings and training data, whatever the run is called, so that a comparison
picks up what is there, and goes on where it was stopped.
"""

import time
from collections.abc import Mapping
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from reidlib import runs
from reidlib.data.tables import fingerprint, hold_out, load
from reidlib.evaluation.scoring import PER_QUERY, score_run
from reidlib.look import board
from reidlib.model.device import pick_device, resolve_precision
from reidlib.paths import outputs_dir
from reidlib.progress import progress
from reidlib.recipes import WATCHING, Recipe
from reidlib.training import loop
from reidlib.workbook import workers

Split = Literal["test", "held_out"]


class Row(NamedTuple):
    """One row: all settings, and the tag of its run should it be trained here."""

    recipe: Recipe
    tag: str


class Made(NamedTuple):
    """What became of a row: the folder of its run, or why it has none."""

    folder: Path | None
    problem: str = ""
    trained: bool = False
    """Whether it was trained or scored now; False for a row that was there."""


def complete(
    rows: Mapping[str, Row],
    split: Split = "test",
    *,
    train: bool = True,
    jobs: int = 2,
    device: str = "auto",
    show_progress: bool = True,
) -> dict[str, Made]:
    """Find each row's run, or train and score it.

    A finished run with the row's settings, on the same training images, is taken as it is. A run of
    the row's own name that is unfinished goes on from its checkpoint. One with other settings is
    named and left alone: give the row a tag that no other run has. A row that fails does not keep
    the others from being made.

    Args:
        rows: by label.
        split: `"test"` scores by `score_run`, in float32. `"held_out"` takes the last held-out scores
            of training, and never looks at the test split.
        train: False takes the runs that are there, scores those that have no scores yet, and says of
            every other row what the nearest run has set otherwise.
        jobs: rows at once, each in a process with its share of the CPU's cores; 1 where the device is
            no CPU. One alone is made in this process.
        device: as in `loop.train`.
        show_progress: draw a bar of rows.

    Returns:
        What became of each row, in order.

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
    names = _names(rows, split)
    # Rows that are one run are made once; those that need no work need no process either.
    once = {name: rows[label] for label, name in names.items()}
    known = {name: _settled(once[name], find(once[name]), split, train) for name in once}
    made = {name: done for name, done in known.items() if done}
    tasks = {name: (once[name], split, train, device) for name in known if name not in made}
    jobs = min(jobs if target.type == "cpu" else 1, len(tasks))
    bar = progress(total=len(known), initial=len(made), desc="rows", unit="row", show=show_progress)
    with closing(bar), closing(workers.each(make, tasks, jobs)) as results:
        for name, result in results:
            made[name] = Made(None, str(result)) if isinstance(result, workers.Died) else result
            bar.update()
    if not any(m.folder for m in made.values()):
        name = next(iter(known))
        raise RuntimeError(f"No row could be made. {name}: {made[name].problem}")
    return {label: made[name] for label, name in names.items()}


def _names(rows: Mapping[str, Row], split: Split) -> dict[str, str]:
    """Return the name of each row's own run, after checking that no two rows would share one."""
    nobody = [label for label, row in rows.items() if not row.recipe.hold_out]
    if split == "held_out" and nobody:
        raise ValueError(f"{nobody[0]}: it has no held-out scores, since hold_out is 0.")
    forget_data()
    names = {label: _own(row).name for label, row in rows.items()}
    for label, name in names.items():
        twin = next(other for other, its in names.items() if its == name)
        if rows[twin] != rows[label]:
            raise ValueError(
                f"{twin!r} and {label!r} would both be the run {name}: give other tags."
            )
    return names


def make(row: Row, split: Split, train: bool, device: str) -> Made:
    """Find one row's run and scores, or make what is missing of them; what fails is told, not raised."""
    folder, trained = find(row), False
    if settled := _settled(row, folder, split, train):
        return settled
    try:
        if not folder:
            folder, trained = _train(row, device), True
        if not _scored(folder, split):
            if split == "held_out":
                return Made(None, f"{folder.name} has no {PER_QUERY['held_out']}: delete it.")
            scored = score_run(folder, baselines=False, device=device, show_progress=False)
            board.write_evaluation(folder, scored.retrieval, scored.evaluation)
            trained = True
    except Exception as error:  # any row may fail in a way of its own
        return Made(None, str(error).strip() or type(error).__name__)
    return Made(folder, trained=trained)


def _settled(row: Row, folder: Path | None, split: Split, train: bool) -> Made | None:
    """Return what becomes of a row that needs no work, given its run; None for one that does."""
    if not folder:
        problem = "No run with these settings is there."
        return None if train else Made(None, f"{problem} {nearest(row)}")
    try:
        return Made(folder) if _scored(folder, split) else None
    except (ValueError, OSError):
        return None  # whoever scores it again says what is wrong


def _train(row: Row, device: str) -> Path:
    """Train a row under its own name, or go on with that run."""
    own = _own(row)
    while True:
        try:
            return loop.train(row.recipe, row.tag, device=device, show_progress=False)
        except runs.Busy:
            # A comparison that was killed leaves its last trainings behind; they end by themselves.
            while _busy(own):
                time.sleep(2)
        if folder := find(row):
            return folder


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


_data = lru_cache(load)


@lru_cache
def _train_data(dataset: str, held_out: int | str) -> str:
    """Return the fingerprint of what a recipe trains on; reading it again takes seconds."""
    train = _data(dataset).train
    return fingerprint(hold_out(train, held_out, seed=0)[0] if held_out else train)


def forget_data() -> None:
    """Look at the data sets anew: they may have changed since the last comparison."""
    _data.cache_clear()
    _train_data.cache_clear()


def _own(row: Row) -> Path:
    return outputs_dir() / runs.run_name(_data(row.recipe.dataset).name, row.recipe, row.tag)


def _settings(recipe: Recipe) -> dict:
    """Return what makes a row. A file of weights goes by its name: where it lies is no setting."""
    settings = recipe.model_dump(exclude=set(WATCHING))
    return settings | {"weights": Path(recipe.weights).name}


def _busy(folder: Path) -> bool:
    """Return whether a process is writing a run."""
    try:
        with runs.lock(folder):
            return False
    except runs.Busy:
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
