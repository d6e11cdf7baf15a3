"""The scores of runs in one table, what each gained over another, and each on each data set."""

import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from reidlib.data.tables import fingerprint, load
from reidlib.evaluation.intervals import confidence_interval, difference
from reidlib.evaluation.metrics import SCORES, score_values
from reidlib.evaluation.scoring import PER_QUERY
from reidlib.paths import data_dir, outputs_dir
from reidlib.records import read_json, read_table
from reidlib.runs import find_run, in_runs, sha256, text_sha256

EXPLAINED = (
    "Per cent; higher is better. mAP: mean average precision over all matches of a query;\n"
    "top-k: share of queries with a match among the k nearest; mINP: how early the last comes."
)
GAINS = (
    "mAP over that of {}, points, paired over the people of the queries. It is about\nthese very "
    "networks: how far another seed moves them is not in the interval."
)
MATRIX = (
    "Per cent, and the 95 % interval over the people of the queries (bootstrap). *: the data set that the\n"
    "run was trained on. Under a data set's name are the first digits of its fingerprint."
)


def scores_text(
    runs: Sequence[str | Path] = (), *, baselines: bool = False, against: str | Path | None = None
) -> str:
    """Return a table of the scores of runs and what it means; nothing is scored here.

    A run whose files cannot be read is named, and the others are shown.

    Args:
        runs: names or folders; by default all runs under `outputs/`.
        baselines: show what the runs are compared with, too.
        against: a run that the others are compared with, query by query.

    Raises:
        FileNotFoundError: no such run, or no run at all.
        ValueError: no run can be read, or none was scored on the queries of `against`.
    """
    folders, tables, notes = [], [], []
    for folder, (rows, said) in _each(runs, partial(_of_run, baselines=baselines), notes):
        folders.append(folder)
        table = pd.DataFrame([*rows.values()], index=[*rows]).reindex(columns=list(SCORES))
        tables.append(100 * table.astype(float))
        notes += said
    if not tables:
        raise ValueError("\n".join(notes))
    table = pd.concat(tables).rename(columns=SCORES)
    parts = [table.to_string(float_format="{:.2f}".format, na_rep="-"), EXPLAINED]
    if against is not None:
        other = find_run(against)
        gains, said = _gains(folders, other)
        notes += said
        form = dict.fromkeys(gains.columns, "{:+.2f}".format) | {"p": "{:.2g}".format}
        parts += [GAINS.format(other.name), gains.to_string(formatters=form)]
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def matrix_text(runs: Sequence[str | Path] = ()) -> str:
    """Return mAP and top-1 of each run on each data set, with 95 % intervals over people.

    The columns are the data sets in the data folder, and others that a run was scored on. Nothing is
    scored here: a cell that a run's weights could fill comes with the command that fills it.

    Args:
        runs: as in `scores_text`; those without weights and scores have no row.

    Raises:
        FileNotFoundError: no such run, or no run at all.
        ValueError: no run has a row.
    """
    notes, rows, fill = [], {}, []
    here = _at_hand(notes)
    for folder, found in _each(runs, _by_data_set, notes):
        whole = (folder / "weights.safetensors").is_file()
        if found or whole:
            rows[folder.name] = pd.DataFrame(dict.fromkeys(here) | found, ["mAP", "top1"])
        for name in (here[key] for key in here if whole and key not in found):
            words = ["score", folder.name, "--dataset", name, "--no-baselines"]
            fill.append(f"python -m reidlib {shlex.join(words)}")
    if not rows:
        raise ValueError(
            "\n".join([*notes, "None of these runs has weights, or scores on a test."])
        )
    table = pd.concat(rows).rename(SCORES, level=1).fillna("–")
    notes += ["Cells that can be filled here, each by its command:", *fill] if fill else []
    return "\n\n".join([table.to_string(), MATRIX, "\n".join(notes)]).rstrip()


def _each(
    runs: Sequence[str | Path], read: Callable[[Path], Any], notes: list[str]
) -> Iterator[tuple[Path, Any]]:
    """Yield the folder of each run, by default of all, and what is read of it; `notes` get the broken."""
    runs = runs or [file.parent.name for file in in_runs("config.json")]
    if not runs:
        raise FileNotFoundError(
            f"There are no runs in {outputs_dir()} yet. Make one: "
            "python -m reidlib run 03_train 04_evaluate"
        )
    for folder in [find_run(run) for run in runs]:
        try:
            found = read(folder)
        except Exception as error:  # a file may be broken in a way of its own
            notes.append(f"{folder.name}: passed over. {error}")
        else:
            yield folder, found


def _at_hand(notes: list[str]) -> dict[tuple[str, str], str]:
    """Return what `--dataset` calls the data sets that are here, by name and fingerprint."""
    here = {}
    folders = sorted(p.name for p in data_dir().glob("[!.]*") if p.is_dir() and p.name != "weights")
    for name in ["synthetic", *folders]:
        try:
            data = load(name)
            here |= {(data.name, fingerprint(data)[:8]): name} if data.test else {}
        except (ValueError, OSError) as error:
            notes.append(f"{name} in {data_dir()} is no column. {error}")
    return here


def _by_data_set(folder: Path) -> dict[tuple[str, str], pd.Series]:
    """Return a run's scores in words, by name and fingerprint of each data set that it was scored on."""
    found = {}
    for place in (folder, *folder.glob("on_*_" + 8 * "[0-9a-f]")):  # others: of another protocol
        metrics = read_json(place / "metrics.json", {})
        if "test_data" in metrics and not _of_other_weights(metrics, folder):
            scores = 100 * confidence_interval(read_per_query(place), by="pid")
            people = bool(scores.notna().all(axis=None))  # several: one has no interval
            interval = " ({low:.1f} to {high:.1f})" * people
            form = "{value:.2f}" + interval + "*" * (place == folder)
            key = metrics["evaluated_on"], metrics["test_data"][:8]
            found[key] = scores.apply(form.format_map, axis=1)
    return found


def _of_other_weights(scores: dict, folder: Path) -> bool:
    """Say whether scores are of weights that a run no longer has."""
    known, weights = scores.get("weights_sha256"), folder / "weights.safetensors"
    return bool(known) and weights.is_file() and known != sha256(weights)


def _of_run(folder: Path, baselines: bool) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return the rows of one run by their labels, and sentences on what they do not say."""
    metrics, picture = read_json(folder / "metrics.json", {}), folder / "ranked_lists.jpg"
    rows, notes = {folder.name: metrics}, []
    if "with_flips" in metrics:
        rows["  with flips averaged"] = metrics["with_flips"]
    rows |= {f"  {name} by itself": s for name, s in metrics.get("by_data_set", {}).items()}
    if (held_out := folder / PER_QUERY["held_out"]).is_file():
        table = read_per_query(folder, "held_out")
        rows["  on people held out"] = score_values(table).mean().to_dict()
    for name, scores in metrics.get("baselines", {}).items() if baselines else ():
        rows[f"  {name.replace('_', ' ')}"] = scores
    elsewhere = {f.parent.name: read_json(f) for f in sorted(folder.glob("*/metrics.json"))}
    rows |= {f"  {name}": scores for name, scores in elsewhere.items()}
    for name, scores in ({folder.name: metrics} | elsewhere).items():
        if "mAP" not in scores:
            continue
        lost = scores["queries_without_match"]
        without = f", {lost} of them without a match and left out" if lost else ""
        of = f" of {scores['evaluated_on']}" if "evaluated_on" in scores else ""
        warning = f". {scores['warning']}" if scores.get("warning") else ""
        notes.append(f"{name}: {scores['queries']} queries{of}{without}{warning}")
        if _of_other_weights(scores, folder):
            notes.append(f"{name}: of other weights than the run has now; score it again.")
    if "mAP" not in metrics and not held_out.is_file():
        notes.append(f"{folder.name}: not scored yet; python -m reidlib score {folder.name}")
    if picture.is_file():
        notes.append(f"ranked lists: {picture}")
    return rows, notes


def _gains(folders: Sequence[Path], against: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return gains of mAP in points, their intervals, and p: a row for each run and split; and
    sentences on tables that cannot be read.
    """
    gains, notes = {}, []
    for folder, (split, file) in itertools.product(folders, PER_QUERY.items()):
        both = (folder, against)
        if folder == against or not all((run / file).is_file() for run in both):
            continue
        try:
            tables = [[read_per_query(run, split)] for run in both]
        except Exception as error:
            notes.append(f"{folder.name}: not compared. {error}")
            continue
        with suppress(ValueError):  # of other queries: another data set, other people held out
            value, low, high, p, *_ = difference(*tables)
            label = folder.name + (" (held out)" if split == "held_out" else "")
            gains[label] = 100 * value, 100 * low, 100 * high, p
    if not gains:
        nothing = f"No run here was scored on the same queries as {against.name}."
        raise ValueError("\n".join([nothing, *notes]))
    columns = ["gain", "95 % from", "to", "p"]
    return pd.DataFrame.from_dict(gains, "index", columns=columns), notes


def read_per_query(folder: Path, split: str = "test") -> pd.DataFrame:
    """Read the per-query table of a run and split, after comparing its means with `metrics.json`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such table, is cut short, or belongs to other scores.
    """
    file = folder / PER_QUERY[split]
    numbers = ("query", "pid", "matches", "AP", "AP_market", "first_rank", "INP")
    table = read_table(file, numbers)
    metrics = read_json(folder / "metrics.json", {})
    if split == "held_out":  # while it trains, the table is ahead
        ended = read_json(folder / "manifest.json", {}).get("status") == "finished"
        held_out = metrics.get("held_out", {}) if ended else {}
        metrics = {k.removeprefix("held_out_"): v for k, v in held_out.get("last", {}).items()}
        metrics["per_query_sha256"] = held_out.get("per_query_sha256")
    written = metrics.get("per_query_sha256")
    found = score_values(table).mean()
    differ = [key for key in SCORES if not abs(found[key] - metrics.get(key, found[key])) < 1e-9]
    # Runs of older versions have no digest.
    if differ or written not in (None, text_sha256(file.read_text(encoding="utf-8"))):
        raise ValueError(
            f"{file} is not that of metrics.json beside it: it is cut short, altered or of other scores. "
            + ("Score the run again." if split == "test" else "Restore it, or train the run again.")
        )
    return table
