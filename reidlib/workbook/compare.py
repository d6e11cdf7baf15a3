"""Rows of a comparison: each a run, found where it was trained before, else trained and scored now.

A row is found by its settings and training data, whatever the run is called. Any number of
comparisons may be under way at once: the lock of its run gives a row to one of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
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
from reidlib.recipes import WATCHING, Recipe, bare, located
from reidlib.training import loop
from reidlib.training.journal import tell
from reidlib.workbook import workers

Split = Literal["test", "held_out"]


class Row(NamedTuple):
    """One row: all settings, and the tag of its run should it be trained here."""

    recipe: Recipe
    tag: str


class Sought(NamedTuple):
    """A row, and what its run is known by; to find that out takes seconds."""

    recipe: Recipe
    tag: str
    folder: Path  # its own, should it be trained here
    dataset: str
    data: str  # the fingerprint of its training images


class Made(NamedTuple):
    """What became of a row: the folder of its run, or why it has none."""

    folder: Path | None
    problem: str = ""
    trained: bool = False  # or scored, now; False for a row that was there


ELSEWHERE = Made(None, "Another process is at it.")


def complete(
    rows: Mapping[str, Row],
    split: Split = "test",
    *,
    train: bool = True,
    jobs: int = 2,
    device: str = "auto",
    show_progress: bool = True,
) -> dict[str, Made]:
    """Find each row's run, or train and score it; return what became of each, in order.

    A finished run with the row's settings, on the same training images, is taken as it is. A run of
    the row's own name that is unfinished goes on from its checkpoint; one with other settings is
    named and left alone. A row that fails leaves the others alone. One that another process is at
    comes last, and is waited for.

    Args:
        rows: by label.
        split: `"test"` scores in float32; `"held_out"` takes the last held-out scores of training, and
            never looks at the test split.
        train: False trains nothing, scores what has no scores yet, and says of every row without a
            run what the nearest run has set otherwise.
        jobs: rows at once, each in a process of its own; always 1 on another device than the CPU.
        device, show_progress: as in `loop.train`.

    Raises:
        ValueError: a bad `split` or `jobs`; held-out scores of a recipe that holds nobody out, or a
            data set without a test; two rows that would have one run.
        RuntimeError: no row at all could be made; says why the first could not.
    """
    if split not in PER_QUERY:
        raise ValueError(f"split = {split!r}: choose test or held_out.")
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, not {jobs}.")
    target, known = pick_device(device), lru_cache(_data)
    names, once = {}, {}  # rows that are one run are made once
    for label, (recipe, tag) in rows.items():
        if split == "held_out" and not recipe.hold_out:
            raise ValueError(f"{label}: it has no held-out scores, since hold_out is 0.")
        recipe = resolve_precision(located(recipe), target)
        dataset, data = known(recipe.dataset, recipe.pattern, recipe.hold_out, split)
        names[label] = name = runs.run_name(dataset, recipe, tag)
        row = Sought(recipe, tag, outputs_dir() / name, dataset, data)
        if once.setdefault(name, row) != row:
            twin = next(other for other in names if names[other] == name)
            raise ValueError(
                f"{twin!r} and {label!r} would both be the run {name}: give other tags."
            )
    # Those that need no work need no process either.
    made = {name: done for name, row in once.items() if (done := _settled(row, split, train))}
    jobs = jobs if target.type == "cpu" else 1
    bar = progress(total=len(once), initial=len(made), desc="rows", unit="row", show=show_progress)
    with closing(bar):
        for wait in (False, True) if len(once) - len(made) > 1 else (True,):
            tasks = {n: (row, split, device, wait) for n, row in once.items() if n not in made}
            with closing(workers.each(make, tasks, min(jobs, len(tasks)))) as results:
                for name, result in results:
                    if result != ELSEWHERE:
                        killed = Made(None, "Its process was killed; is there enough memory?")
                        made[name] = result or killed
                        bar.update()
    if not any(m.folder for m in made.values()):
        name = next(iter(once))
        raise RuntimeError(f"No row could be made. {name}: {made[name].problem}")
    return {label: made[name] for label, name in names.items()}


def _data(dataset: str, pattern: str, held_out: int | str, split: Split) -> tuple[str, str]:
    """Return a data set's name, and the fingerprint of the images that are trained on.

    A ValueError where it has no test, and rows are to be scored on that.
    """
    data = load(dataset, pattern=pattern)
    if split == "test":
        _ = data.test
    train = hold_out(data.train, held_out, seed=0)[0] if held_out else data.train
    return data.name, fingerprint(train)


def _settled(row: Sought, split: Split, train: bool) -> Made | None:
    """Return what becomes of a row that needs no work; None for one that does."""
    if not (folder := _find(row)):
        said = "" if train else f"No run with these settings is there. {_nearest(row)}"
        return Made(None, said) if said else None
    with suppress(ValueError, OSError):  # whoever scores it again says what is wrong
        if _scored(row, folder, split):
            return Made(folder)
        if split == "held_out":
            return Made(None, f"{folder.name} has no {PER_QUERY[split]}: delete it.")
    return None


def make(row: Sought, split: Split, device: str, wait: bool = True) -> Made:
    """Train and score a row, or what of it is missing; what fails is told, not raised.

    Of a row that another process is at, return `ELSEWHERE`; or `wait`, and do what is left then:
    nothing, or where the other was killed, the rest from its checkpoint on.
    """
    while True:
        folder = None
        try:
            folder, trained = _find(row), False
            if not folder:
                folder, trained = _train(row, device), True
            if split == "test" and not _scored(row, folder, split):
                scored = score_run(folder, baselines=False, device=device, show_progress=False)
                board.write_evaluation(folder, scored.retrieval, scored.evaluation)
                trained = True
            return Made(folder, trained=trained)
        except runs.Busy:
            busy = folder or row.folder
            tell(f"{busy.name}: another process is at it; {'waiting' if wait else 'others first'}.")
            if not wait:
                return ELSEWHERE
            with runs.lock(busy, timeout=-1):
                pass
        except Exception as error:  # any row may fail in a way of its own
            return Made(None, str(error).strip() or type(error).__name__)


def _train(row: Sought, device: str) -> Path:
    """Train a row under its own name, or go on with that run."""
    options = {"device": device, "show_progress": False, "longer": False}
    folder = loop.train(row.recipe, row.tag, **options)
    with runs.lock(folder, timeout=-1):  # who has waited for it may be scoring it
        runs.update_json(folder / "manifest.json", **{runs.COMPARED: True})
    return folder


def _find(row: Sought) -> Path | None:
    """Return a finished run with a row's settings and training images: its own, or the first by name."""
    wanted = (_settings(row.recipe), row.data)
    found = [folder for folder, *its in _finished() if tuple(its) == wanted]
    return row.folder if row.folder in found else next(iter(found), None)


def _nearest(row: Sought) -> str:
    """Return in words which finished run is nearest to a row, and what it has set otherwise."""
    wanted, found = _settings(row.recipe), []
    for folder, its, _ in _finished():
        differ = [f"{k} = {its[k]!r}, not {wanted[k]!r}" for k in wanted if its[k] != wanted[k]]
        # A run of another loss or network is farther than any that differs in the details.
        far = sum(its[k] != wanted[k] for k in ("loss", "margin", "dataset", "backbone"))
        found.append((far, len(differ), folder.name, differ or ["other training images"]))
    if not found:
        return "There is no finished run at all."
    *_, name, differ = min(found)
    return f"The nearest is {name}: {'; '.join(differ)}."


def _finished() -> Iterator[tuple[Path, dict, str]]:
    """Yield the finished runs by name: folder, settings, and fingerprint of the training images."""
    for file in runs.in_runs("manifest.json"):
        try:
            manifest = runs.read_json(file)
            settings = _settings(runs.read_recipe(file.parent))
        except (ValueError, OSError):
            continue  # a broken run, or one of a version whose settings differ, is no row
        # One that went on after its end is not what its settings say.
        if manifest.get("status") == "finished" and not manifest.get("went_on_after"):
            yield file.parent, settings, manifest.get("train_data")


def _settings(recipe: Recipe) -> dict:
    """Return what makes a row. A file of weights goes by its name: where it lies is no setting."""
    settings = located(recipe).model_dump(exclude=set(WATCHING))
    return settings | {"weights": bare(recipe.weights)}


def _scored(row: Sought, folder: Path, split: Split) -> bool:
    """Return whether the scores that a comparison wants are there: without flips, in float32."""
    there = (folder / PER_QUERY[split]).is_file()
    if split == "held_out" or not there:
        return there
    wanted = {"evaluated_on": row.dataset, "flip": False, "precision": "float32"}
    return wanted.items() <= runs.read_json(folder / "metrics.json").items()
