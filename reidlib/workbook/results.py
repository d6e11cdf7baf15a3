"""What the rows of a comparison left behind, read and put into tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from reidlib import runs
from reidlib.evaluation.metrics import SCORES, score_values
from reidlib.evaluation.scoring import PER_QUERY
from reidlib.training import health
from reidlib.workbook.compare import Made
from reidlib.workbook.variants import VARIANTS, Key


class Results(NamedTuple):
    """What the rows of a comparison left behind, by their keys."""

    folders: dict[Key, Path]
    tables: dict[Key, pd.DataFrame]
    """per-query tables"""
    histories: dict[Key, pd.DataFrame]
    minutes: dict[Key, float]
    """of training"""
    findings: dict[Key, list[str]]
    """names of health findings"""

    def of(self, name: str) -> list[pd.DataFrame]:
        """Return the per-query tables of a row, one for each seed."""
        return [table for (its, _), table in self.tables.items() if its == name]

    @property
    def compared(self) -> list[str]:
        """The variants that are there, in order."""
        return [name for name in VARIANTS if self.of(name)]

    def first(self, name: str) -> Key:
        """Return a row's run of the lowest seed that is there."""
        return min(key for key in self.tables if key[0] == name)


def read_results(made: Mapping[Key, Made], split: str = "test") -> Results:
    """Read the runs of a comparison.

    Args:
        made: what `compare.complete` returned.
        split: whose per-query tables to read.

    Raises:
        RuntimeError: none of the variants is there: nothing to compare.
    """
    there = {key: m.folder for key, m in made.items() if m.folder}
    if not {name for name, _ in there} & {*VARIANTS}:
        raise RuntimeError("No row of the variants is there, see above: nothing to compare.")
    manifests = {key: runs.read_json(folder / "manifest.json") for key, folder in there.items()}
    return Results(
        there,
        {key: pd.read_csv(folder / PER_QUERY[split]) for key, folder in there.items()},
        {key: pd.read_csv(folder / "history.csv") for key, folder in there.items()},
        {key: manifest["wall_seconds"] / 60 for key, manifest in manifests.items()},
        {key: [f.name for f in health.report_run(folder)] for key, folder in there.items()},
    )


def made_in_words(made: Mapping[Key, Made], minutes: float) -> str:
    """Say how many rows were made now, were there, and are missing."""
    now, there = sum(m.trained for m in made.values()), sum(bool(m.folder) for m in made.values())
    said = f"{now} of {len(made)} rows were made now, in {minutes:.1f} minutes; "
    said += f"{there - now} were there before"
    return said + (f"; missing: {len(made) - there}, see below." if there < len(made) else ".")


def every_run(results: Results) -> pd.DataFrame:
    """Return every run by name with its scores, so that anybody can compute them again."""
    rows = [
        {"row": name, "seed": seed, "run": results.folders[name, seed].name}
        | score_values(table).mean().to_dict()
        | {
            "minutes": results.minutes[name, seed],
            "health": "; ".join(results.findings[name, seed]),
        }
        for (name, seed), table in results.tables.items()
    ]
    return pd.DataFrame(rows)


def summary(results: Results) -> pd.DataFrame:
    """Return the variants' means over seeds in per cent, their deviations, minutes and health."""
    runs_, lines = every_run(results), {}
    for name in results.compared:
        its = runs_[runs_["row"] == name]
        scores = 100 * its[list(SCORES)]
        line = {"seeds": len(its)} | scores.mean().to_dict()
        line |= {f"{key} sd": value for key, value in scores.std().items()}
        held = [
            last_held_out(history) for (n, _), history in results.histories.items() if n == name
        ]
        if None not in held:
            line["held-out mAP"] = float(np.mean(held))
        found = {f for (n, _), names in results.findings.items() if n == name for f in names}
        lines[name] = line | {"minutes": its["minutes"].mean(), "health": "; ".join(sorted(found))}
    return pd.DataFrame.from_dict(lines, orient="index")


def last_held_out(history: pd.DataFrame) -> float | None:
    """Return the last held-out mAP of a training, per cent."""
    scores = history.get("held_out_mAP", pd.Series(dtype=float)).dropna()
    return 100 * scores.iloc[-1] if len(scores) else None


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """Return a summary with its deviations behind ±, for people."""
    shown = pd.DataFrame({"seeds": table["seeds"].astype(int).astype(str)})
    for key, heading in SCORES.items():
        values = zip(table[key], table[f"{key} sd"], table["seeds"], strict=True)
        shown[heading] = [f"{v:.1f}" + (f" ± {sd:.1f}" if n > 1 else "") for v, sd, n in values]
    if "held-out mAP" in table:
        shown["held-out mAP"] = table["held-out mAP"].map("{:.1f}".format)
    shown["minutes of training"] = table["minutes"].map("{:.1f}".format)
    return shown.assign(health=table["health"].replace("", "no finding"))


def best_of(table: pd.DataFrame) -> tuple[str, list[str]]:
    """Return the row of the highest mAP, and those that are equal to it."""
    best = table["mAP"].idxmax()
    return best, [n for n in table.index if n != best and table["mAP"][n] == table["mAP"][best]]


def table_in_words(table: pd.DataFrame) -> str:
    """Say which row is highest, and what mining is worth."""
    best, equal = best_of(table)
    said = f"**{' and '.join([best, *equal])}** {'have' if equal else 'has'} the highest mAP, "
    said += f"{table['mAP'][best]:.1f} %; section 4 says whether that is more than luck."
    mined = [n for n in ("batch-hard soft", "batch-all soft") if n in table.index]
    if "random soft" in table.index and mined:
        chance = table["mAP"]["random soft"]
        worth = ", ".join(f"{name} {table['mAP'][name] - chance:+.1f}" for name in mined)
        said += f" Random triplets reach {chance:.1f} %. Choosing triplets is worth, under the same soft "
        said += f"margin and in points over random ones: {worth}."
    return said
