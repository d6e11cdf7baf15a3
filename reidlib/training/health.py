"""Is a training healthy? The findings of all checks, each with its evidence and what to try first.

Checks look at the whole history, so what was true in the middle of a run stays in its report, with
the steps. Where one finding explains another (a collapsed network learns nothing), only the first is
told; `EXPLAINS` says which.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from reidlib import runs
from reidlib.recipes import Recipe
from reidlib.records import read_table
from reidlib.training.checks import AT_ONCE, CHECKS, UNDER_WAY
from reidlib.training.watched import Watched

# The columns of history.csv that the checks read.
READ = ["step", "lr", "loss", "active", "norm", "positive_p50", "negative_p50", "negative_p95"]


class Finding(NamedTuple):
    """Something that is wrong with a run, or was."""

    name: str  # its check's, with spaces: "collapsed", "too easy", …
    says: str  # one sentence: what happened
    evidence: str  # the numbers that show it
    try_first: str  # what to do about it


def named(checks=CHECKS) -> list[str]:
    """Return the names of checks, which are those of their findings."""
    return [check.__name__.replace("_", " ") for check in checks]


# Beside a loss out of bounds or a collapse, nothing that is found later says more.
_LATER = {*named(CHECKS)} - {*named(AT_ONCE)}
EXPLAINS = {
    "diverging": _LATER,
    "collapsed": _LATER,
    "near collapse": {"still learning"},
    "not learning": {"still learning", "overfitting"},
    "margin out of reach": {"still learning", "not learning", "overfitting"},
    "overfitting": {"still learning"},
}


def report(
    history: pd.DataFrame | list[dict], recipe: Recipe, checks=CHECKS, **facts
) -> list[Finding]:
    """Return what is wrong with a run, in the order of `checks`; an empty list for a healthy one.

    Args:
        history: the rows of history.csv so far. Without any, only checks `AT_ONCE` can be made.
        facts: the other fields of `Watched`.
    """
    rows = pd.DataFrame(history)
    if rows.empty:
        nothing = dict.fromkeys(("loss", "active", "norm", "negative_p95"), math.nan)
        rows = pd.DataFrame([{"step": 1} | nothing])
    run = Watched(rows, recipe, **facts)
    told = {name: check(run) for name, check in zip(named(checks), checks, strict=True)}
    findings = [Finding(name, *sentences) for name, sentences in told.items() if sentences]
    explained = set().union(*(EXPLAINS.get(finding.name, set()) for finding in findings))
    return [finding for finding in findings if finding.name not in explained]


def report_run(run: str | Path) -> list[Finding]:
    """Return the findings of a run, by its name or folder, from its manifest.

    Runs under way, and those from before there was a report, are judged by their history: what only
    the training could see (its weights before the first step) is taken from the manifest, if there.

    Raises:
        FileNotFoundError: no such run, or one that has logged nothing yet.
    """
    return _judged(run)[0]


def run_text(run: str | Path) -> str:
    """Return the report of a run for the terminal; of one that has not ended, says what is left out.

    Raises:
        FileNotFoundError: as in `report_run`.
    """
    findings, checks, left_out = _judged(run)
    return as_text(findings, checks) + left_out


def _judged(run: str | Path) -> tuple[list[Finding], tuple, str]:
    """Return a run's findings, the checks that were made, and of a run under way which were not."""
    folder, left_out = runs.find_run(run), ""
    manifest, file = runs.read_json(folder / "manifest.json"), folder / "history.csv"
    found = {finding["name"]: Finding(**finding) for finding in manifest.get("health", [])}
    under_way = manifest["status"] in ("running", "stopped")
    checks = UNDER_WAY if under_way else CHECKS
    if under_way or "health" not in manifest:  # a kill leaves no other trace than its history
        if not file.is_file():
            raise FileNotFoundError(f"{folder.name} has no history.csv: it has just begun.")
        history, recipe = read_table(file, READ), runs.read_recipe(folder)
        now = report(history, recipe, checks, identities=manifest["train_identities"])
        found |= {finding.name: finding for finding in now}
    if under_way:
        others = ", ".join(named(check for check in CHECKS if check not in checks))
        done = f"step {history['step'].iloc[-1]:,} of {manifest['steps']:,}"
        left_out = f"\nIts training has not ended ({done}), so not checked: {others}."
    return [*found.values()], checks, left_out


def as_text(findings: Sequence[Finding], checks=CHECKS) -> str:
    """Return a report for the terminal: two lines a finding, or one that names what was checked."""
    if not findings:
        return f"Health: no finding. Checked: {', '.join(named(checks))}."
    lines = [f"Health: {len(findings)} finding{'s' * (len(findings) > 1)}."]
    for name, says, evidence, try_first in findings:
        lines += [f"- {name}: {says} ({evidence}.)", f"  Try first: {try_first}"]
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    """Return a report in one or two sentences, for a notebook."""
    if not findings:
        return f"**The health report has no finding.** Checked: {', '.join(named())}."
    found = f"**{len(findings)} of {len(CHECKS)} checks found something.**"
    below = ": what stands below it may come from it" if len(findings) > 1 else ""
    return f"{found} Begin with **{findings[0].name}**{below}."
