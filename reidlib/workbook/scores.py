"""The scores of runs in one table, and what each gained over another, from the files of the runs."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from reidlib.evaluation.intervals import difference
from reidlib.evaluation.metrics import SCORES, score_values
from reidlib.evaluation.scoring import PER_QUERY
from reidlib.paths import outputs_dir
from reidlib.runs import find_run, read_json

EXPLAINED = (
    "Per cent; higher is better. mAP: mean average precision over all matches of a query;\n"
    "topk: share of queries with a match among the k nearest; mINP: how early the last comes."
)
GAINS = (
    "mAP over that of {}, points, paired over the people of the queries. It is about\nthese very "
    "networks: how far another seed moves them is not in the interval."
)


def scores_text(
    runs: Sequence[str | Path] = (), *, baselines: bool = False, against: str | Path | None = None
) -> str:
    """Return a table of the scores of runs and what it means; nothing is scored here.

    Args:
        runs: names or folders; by default all runs under `outputs/`.
        baselines: show what the runs are compared with, too.
        against: a run that the others are compared with, query by query.

    Raises:
        FileNotFoundError: no such run, or no run at all.
        ValueError: no run was scored on the queries of `against`.
    """
    runs = runs or sorted(path.parent.name for path in outputs_dir().glob("*/config.json"))
    if not runs:
        raise FileNotFoundError(
            f"There are no runs in {outputs_dir()} yet. Make one: "
            "python -m reidlib run 03_train 04_evaluate"
        )
    folders, rows, notes = [find_run(run) for run in runs], [], []
    for folder in folders:
        table, said = _of_run(folder, baselines)
        rows += table.items()
        notes += said
    labels, scores = zip(*rows, strict=True)
    table = 100 * pd.DataFrame(scores, index=labels).reindex(columns=list(SCORES)).astype(float)
    parts = [table.to_string(float_format="{:.2f}".format, na_rep="-"), EXPLAINED]
    if against is not None:
        other = find_run(against)
        gains = _gains(folders, other)
        form = dict.fromkeys(gains.columns, "{:+.2f}".format) | {"p": "{:.2g}".format}
        parts += [GAINS.format(other.name), gains.to_string(formatters=form)]
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def _of_run(folder: Path, baselines: bool) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return the rows of one run by their labels, and sentences on what they do not say."""
    file, picture = folder / "metrics.json", folder / "ranked_lists.jpg"
    metrics = read_json(file) if file.is_file() else {}
    rows, notes = {folder.name: metrics}, []
    if "with_flips" in metrics:
        rows["  with flips averaged"] = metrics["with_flips"]
    if (held_out := folder / PER_QUERY["held_out"]).is_file():
        rows["  on people held out"] = score_values(pd.read_csv(held_out)).mean().to_dict()
    for name, scores in metrics.get("baselines", {}).items() if baselines else ():
        rows[f"  {name.replace('_', ' ')}"] = scores
    if "mAP" in metrics:
        lost = metrics["queries_without_match"]
        without = f", {lost} of them without a match and left out" if lost else ""
        notes.append(f"{folder.name}: {metrics['queries']} queries{without}")
    elif not held_out.is_file():
        notes.append(f"{folder.name}: not scored yet; python -m reidlib score {folder.name}")
    if picture.is_file():
        notes.append(f"ranked lists: {picture}")
    return rows, notes


def _gains(folders: Sequence[Path], against: Path) -> pd.DataFrame:
    """Return gains of mAP in points, their intervals, and p: a row for each run and split."""
    gains = {}
    for folder in folders:
        for split, file in PER_QUERY.items():
            both = [run / file for run in (folder, against)]
            if folder == against or not all(path.is_file() for path in both):
                continue
            try:
                found = difference(*([pd.read_csv(path)] for path in both))
            except ValueError:  # of other queries: another data set, or other people held out
                continue
            label = folder.name + (" (held out)" if split == "held_out" else "")
            gains[label] = [100 * v for v in (found.value, found.low, found.high)] + [found.p]
    if not gains:
        raise ValueError(f"No run here was scored on the same queries as {against.name}.")
    return pd.DataFrame.from_dict(gains, "index", columns=["gain", "95 % from", "to", "p"])
