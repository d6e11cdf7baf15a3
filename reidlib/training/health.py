"""Is a training healthy? The findings of all checks, each with its evidence and what to try first.

Checks look at the whole history, so what was true in the middle of a run stays in its report, with
the steps. Where one finding explains another (a collapsed network learns nothing), only the first is
told; `EXPLAINS` says which.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from reidlib import runs
from reidlib.recipes import Recipe
from reidlib.training import checks as of
from reidlib.training.checks import Finding
from reidlib.training.watched import Watched

# Worth a line as soon as they are seen: the rest of the run is lost time.
AT_ONCE = (
    of.weights_did_not_load,
    of.wrong_normalisation,
    of.no_margin,
    of.too_few_identities,
    of.diverging,
    of.collapsed,
)
# Of a run that was stopped or killed on its way; the others ask how it ended.
UNDER_WAY = (*AT_ONCE, of.near_collapse)
CHECKS = (
    *UNDER_WAY,
    of.not_learning,
    of.margin_out_of_reach,
    of.too_easy,
    of.overfitting,
    of.still_learning,
    of.far_from_origin,
    of.too_short,
)
# Beside a loss out of bounds or a collapse, nothing that is found later says more.
_LATER = {check.__name__.replace("_", " ") for check in CHECKS if check not in AT_ONCE}
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
        history: the rows of history.csv so far.
        recipe: the run's settings.
        checks: which to make.
        facts: the other fields of `Watched`.
    """
    rows = pd.DataFrame(history)
    if rows.empty:  # it failed in the first step
        nothing = dict.fromkeys(("loss", "active", "lr", "norm", "negative_p95"), math.nan)
        rows = pd.DataFrame([{"step": 1} | nothing])
        checks = tuple(check for check in checks if check in AT_ONCE)
    run = Watched(rows, recipe, **facts)
    findings = [finding for check in checks if (finding := check(run))]
    explained = set().union(*(EXPLAINS.get(f.name, set()) for f in findings))
    return [f for f in findings if f.name not in explained]


def report_run(run: str | Path) -> list[Finding]:
    """Return the findings of a run, by its name or folder: from its manifest, which has all.

    Runs from before there was a report are judged by their history: what only the training could
    see (its weights before the first step) stays unknown there.

    Raises:
        FileNotFoundError: no such run, or one that has logged nothing yet.
    """
    folder = runs.find_run(run)
    manifest, file = runs.read_json(folder / "manifest.json"), folder / "history.csv"
    written = [Finding(**finding) for finding in manifest.get("health", [])]
    if "health" in manifest and manifest["status"] not in ("running", "stopped"):
        return written
    if not file.is_file():
        raise FileNotFoundError(f"{folder.name} has no history.csv: its training has just begun.")
    checks = _checks(manifest["status"])
    recipe, identities = runs.read_recipe(folder), manifest["train_identities"]
    found = report(pd.read_csv(file), recipe, checks, identities=identities)
    names = {finding.name for finding in found}
    return [finding for finding in written if finding.name not in names] + found


def _checks(status: str) -> tuple:
    """Return the checks that can be made of a run of this status."""
    return UNDER_WAY if status in ("running", "stopped") else CHECKS


def run_text(run: str | Path) -> str:
    """Return the report of a run for the terminal; of one that has not ended, says what is left out.

    Raises:
        FileNotFoundError: as in `report_run`.
    """
    folder = runs.find_run(run)
    manifest = runs.read_json(folder / "manifest.json")
    text = as_text(report_run(folder), checks := _checks(manifest["status"]))
    left_out = [check for check in CHECKS if check not in checks]
    if left_out:
        step = pd.read_csv(folder / "history.csv")["step"].iloc[-1]  # a kill leaves no other trace
        step = f"step {step:,} of {manifest['steps']:,}"
        text += f"\nIts training has not ended ({step}), so not checked: {checked(left_out)}."
    return text


def as_text(findings: Sequence[Finding], checks=CHECKS) -> str:
    """Return a report for the terminal: two lines a finding, or one that names what was checked."""
    if not findings:
        return f"Health: no finding. Checked: {checked(checks)}."
    lines = [f"Health: {len(findings)} finding{'s' * (len(findings) > 1)}."]
    for finding in findings:
        lines += [
            f"- {finding.name}: {finding.says} ({finding.evidence}.)",
            f"  Try first: {finding.try_first}",
        ]
    return "\n".join(lines)


def checked(checks=CHECKS) -> str:
    """Return the names of checks, by default of all."""
    return ", ".join(check.__name__.replace("_", " ") for check in checks)


def summary(findings: Sequence[Finding]) -> str:
    """Return a report in one or two sentences, for a notebook."""
    if not findings:
        return f"**The health report has no finding.** Checked: {checked()}."
    first = findings[0]
    return (
        f"**{len(findings)} of {len(CHECKS)} checks found something.** Begin with **{first.name}**: "
        f"{first.says} What stands below it may come from it."
    )
