"""What the rows of a comparison left behind, read and put into tables."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from reidlib import runs
from reidlib.evaluation.metrics import SCORES, score_values
from reidlib.records import read_table
from reidlib.training import health
from reidlib.workbook.compare import Made
from reidlib.workbook.scores import read_per_query
from reidlib.workbook.variants import VARIANTS, Key


class Run(NamedTuple):
    """What one row left behind."""

    folder: Path
    per_query: pd.DataFrame
    history: pd.DataFrame
    minutes: float  # of training
    findings: list[str]  # names of health findings

    @property
    def scores(self) -> dict[str, float]:
        """Fractions."""
        return score_values(self.per_query).mean().to_dict()

    @property
    def held_out(self) -> float:
        """The last held-out mAP of training, per cent; NaN if nobody was held out."""
        mAP = self.history.get("held_out_mAP", pd.Series(dtype=float)).dropna()
        return 100 * mAP.iloc[-1] if len(mAP) else np.nan


Runs = Mapping[Key, Run]


def read(made: Mapping[Key, Made], split: str = "test") -> dict[Key, Run]:
    """Read the runs that `compare.complete` made, and their per-query tables of a split.

    A run whose files cannot be read is named, and left out.

    Raises:
        RuntimeError: none of the variants is there: nothing to compare.
    """
    found = {}
    for (name, seed), folder in {key: m.folder for key, m in made.items() if m.folder}.items():
        try:
            found[name, seed] = Run(
                folder,
                read_per_query(folder, split),
                read_table(folder / "history.csv", ("step",)),
                runs.read_json(folder / "manifest.json")["wall_seconds"] / 60,
                [finding.name for finding in health.report_run(folder)],
            )
        except (OSError, ValueError, TypeError) as error:
            print(f"NOT IN THE TABLES, {name}, seed {seed}: {error}")
    if not compared(found):
        raise RuntimeError("No row of the variants is there, see above: nothing to compare.")
    return found


def compared(keys: Iterable[Key]) -> list[str]:
    """Return the variants that are there, in order."""
    there = {name for name, _ in keys}
    return [name for name in VARIANTS if name in there]


def seeds_of(found: Runs, name: str) -> list[Run]:
    """Return the runs of a row, the lowest seed first."""
    return [run for (its, _), run in found.items() if its == name]


def tables_of(found: Runs, name: str) -> list[pd.DataFrame]:
    """Return the per-query tables of a row, one for each seed."""
    return [run.per_query for run in seeds_of(found, name)]


def made_in_words(made: Mapping[Key, Made], minutes: float) -> str:
    """Say how many rows were made now, were there, and are missing."""
    now, there = sum(m.trained for m in made.values()), sum(bool(m.folder) for m in made.values())
    return (
        f"{now} of {len(made)} rows were made now, in {minutes:.1f} minutes; {there - now} were there "
        f"before; missing: {len(made) - there}."
    )


def every_run(found: Runs) -> pd.DataFrame:
    """Return every run by name with its scores, so that anybody can compute them again."""
    rows = [
        {"row": name, "seed": seed, "run": run.folder.name}
        | run.scores
        | {"minutes": run.minutes, "health": "; ".join(run.findings)}
        for (name, seed), run in found.items()
    ]
    return pd.DataFrame(rows)


def summary(found: Runs) -> pd.DataFrame:
    """Return the variants' means over seeds in per cent, their deviations, minutes and health."""
    lines = {}
    for name in compared(found):
        its = seeds_of(found, name)
        scores = 100 * pd.DataFrame([run.scores for run in its])
        line = {"seeds": len(its)} | scores.mean().to_dict()
        line |= scores.std().add_suffix(" sd").to_dict()
        held = np.mean([run.held_out for run in its])
        if not np.isnan(held):
            line["held-out mAP"] = held
        line["minutes"] = np.mean([run.minutes for run in its])
        findings = {finding for run in its for finding in run.findings}
        lines[name] = line | {"health": "; ".join(sorted(findings))}
    return pd.DataFrame.from_dict(lines, orient="index")


def for_people(table: pd.DataFrame, baselines: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return a summary, the highest first, its deviations behind ±; last what needs no training."""
    table = table.sort_values("mAP", ascending=False, kind="stable")
    shown = pd.DataFrame({"seeds": table["seeds"].astype(int).astype(str)})
    for key, heading in SCORES.items():
        shown[heading] = table[key].map("{:.1f}".format)
        spread = table[f"{key} sd"].map(" ± {:.1f}".format)
        shown[heading] += spread.where(table["seeds"] > 1, "")
    if "held-out mAP" in table:
        shown["held-out mAP"] = table["held-out mAP"].map("{:.1f}".format)
    shown["minutes of training"] = table["minutes"].map("{:.1f}".format)
    shown = shown.assign(health=table["health"].replace("", "no finding"))
    others = 100 * pd.DataFrame(baselines, index=[*SCORES]).T.rename(columns=SCORES)
    others = others.rename(lambda name: name.replace("_", " ")).map("{:.1f}".format)
    return pd.concat([shown, others]).fillna("–")


def highest(table: pd.DataFrame) -> list[str]:
    """Return the rows of the highest mAP: one, or several that are equal."""
    return list(table.index[table["mAP"] == table["mAP"].max()])


def table_in_words(table: pd.DataFrame, baselines: Mapping[str, Mapping[str, float]]) -> str:
    """Say which row is highest, what beats it without training, and what mining is worth."""
    mAP, best = table["mAP"], " and ".join(highest(table))
    said = f"Highest mAP: **{best}**, {mAP.max():.1f} %; section 4 says whether that is more than luck."
    if any(100 * scores["mAP"] >= mAP.max() for scores in baselines.values()):
        said += " **Without training there is as much or more, see the last rows.**"
    mined = [name for name in ("batch-hard soft", "batch-all soft") if name in mAP]
    if "random soft" in mAP and mined:
        worth = ", ".join(f"{name} {mAP[name] - mAP['random soft']:+.1f}" for name in mined)
        said += f" Random triplets reach {mAP['random soft']:.1f} %. Choosing triplets is worth, in points "
        said += f"under the same soft margin: {worth}."
    return said
