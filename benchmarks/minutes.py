"""Minutes of training to the paper's 69.1 mAP, and the way there on people held out.

    python benchmarks/minutes.py [RUN ...]

Reads the folders of runs in `outputs`, by default all of Market-1501, and trains nothing. The first
table has runs that were scored on the test split; where one started from others, their minutes count,
too. The second has those that were scored on held-out people while they trained; that gallery is
smaller and easier, so its numbers lie higher. The curves go to outputs/bench/minutes.svg.
"""

import argparse
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from reidlib.paths import outputs_dir
from reidlib.recipes import listed
from reidlib.runs import find_run, read_json

PAPER = 0.6914  # arXiv 1703.07737, table 2, with flips and crops averaged


def machine(run: dict) -> str:
    """Device and cores that a run used."""
    if "cores" not in run["device"]:  # a graphics card
        return run["device"]
    cores = run["threads"] * run.get("processes", 1)
    return f"{run['device'].split(',')[0]}, {cores} core{'s' * (cores > 1)}"


def stages(folder: Path) -> dict[str, dict]:
    """Return the manifests of a run, and before it of those that it started from, by their names."""
    before = {}
    for name in listed(read_json(folder / "config.json")["weights"]):
        with suppress(FileNotFoundError):
            before |= stages(find_run(name))
    return before | {folder.name: read_json(folder / "manifest.json")}


def main() -> None:
    """Print both tables, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN")
    names = parser.parse_args().runs or sorted(p.name for p in outputs_dir().glob("market1501_*"))
    scored, curves = [], {}
    for folder in map(find_run, names):
        runs, history = stages(folder).values(), pd.read_csv(folder / "history.csv")
        scores = read_json(folder / "metrics.json", {})
        minutes = sum(run["wall_seconds"] for run in runs) / 60
        where = ", then ".join(dict.fromkeys(map(machine, runs)))
        if "mAP" in scores:
            scored.append((scores["mAP"], scores["top1"], minutes, where, folder.name))
        if "held_out_mAP" in history:
            known = history.dropna(subset="held_out_mAP")
            curves[folder.name] = (where, known["seconds"] / 60, known["held_out_mAP"])
    print(
        f"| on the test split | machine | minutes | mAP | top-1 | the paper's {100 * PAPER:.1f} |"
    )
    print("|---|---|---|---|---|---|")
    for value, top1, minutes, where, name in sorted(scored, reverse=True):
        passed = "passed" if value >= PAPER else f"{100 * (PAPER - value):.1f} below"
        print(
            f"| {name} | {where} | {minutes:.0f} | {100 * value:.2f} | {100 * top1:.2f} | {passed} |"
        )
    print("\n| on held-out people | machine | mAP after so many minutes |\n|---|---|---|")
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, (where, minutes, values) in curves.items():
        said = ", ".join(
            f"{100 * v:.1f} after {m:.1f}" for m, v in zip(minutes, values, strict=True)
        )
        print(f"| {name} | {where} | {said} |")
        axis.plot(minutes, 100 * values, marker="o", label=f"{name} ({where})")
    axis.set(xlabel="minutes of training", ylabel="mAP on held-out people, per cent", xscale="log")
    axis.legend(fontsize="x-small")
    (outputs_dir() / "bench").mkdir(parents=True, exist_ok=True)
    figure.savefig(outputs_dir() / "bench/minutes.svg")


if __name__ == "__main__":
    main()
