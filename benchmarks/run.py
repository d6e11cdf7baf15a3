"""Each part of the library beside its peers, side by side on this machine: `make bench`.

    python benchmarks/run.py [--quick | --full] [PART ...]

Contenders run in turn, round after round, so that other work on the machine meets all of them. "x ours"
is taken within a round: how many times as long as ours it takes; for a limit or a part of ours, its
share. Memory is the growth of the process's peak in a fresh process, as Linux counts it. A peer that
is not installed is named and left out. Then the work grows, for ours alone. Two tables are printed,
and written to outputs/bench/.
"""

import argparse
import importlib
import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import pandas as pd
import torch

from reidlib.model.device import race
from reidlib.paths import outputs_dir

PARTS = ("evaluation", "losses", "images", "network", "reranking")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def part_of(name: str):
    """The module of a part. It has `cases(size)`: contender -> a function to time, or None if it is
    not installed; `SIZES`, to which the work grows, 1 being the one beside the peers; and `GOALS`:
    contender -> limits for "seconds" and "MB", and for "x ours" a "least" or a "most".
    """
    return importlib.import_module(f"part_{name}")


def peak(part: str, name: str, size: float) -> float:
    """MB by which the peak memory of a fresh process grows while a contender runs; NaN unknown."""
    command = [sys.executable, __file__, "--peak", part, name, str(size)]
    out = subprocess.run(command, capture_output=True, text=True)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else math.nan


def print_peak(part: str, name: str, size: str) -> None:
    """What `peak` starts."""
    run = part_of(part).cases(float(size))[name]

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    run()
    print((status("VmHWM") - before) / 1024)


def machine() -> str:
    """The processor's name, cores and torch."""
    names = [platform.processor() or platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line] or names
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}{gpu}"


def judged(row: dict, goal: dict) -> str:
    """A goal in words, and whether the row holds it."""
    bounds = [
        ("seconds", "most", goal.get("seconds"), "{:g} s"),
        ("MB", "most", goal.get("MB"), "{:g} MB"),
        ("x ours", "least", goal.get("least"), "x {:.3g}"),
        ("x ours", "most", goal.get("most"), "x {:.3g}"),
    ]
    words = []
    for key, kind, bound, form in bounds:
        if bound is not None and not math.isnan(row[key]):
            holds = row[key] <= bound if kind == "most" else row[key] >= bound
            words.append(f"at {kind} {form.format(bound)}: {'holds' if holds else 'MISSED'}")
    return ", ".join(words)


def beside_peers(name: str, size: float, rounds: int, seconds: float, memory: bool, full: bool):
    """Rows of the first table, a contender each."""
    part = part_of(name)
    found = part.cases(size, full=True) if full and name == "reranking" else part.cases(size)
    missing = [case for case, run in found.items() if run is None]
    if missing:
        print(f"{name}: not installed, left out: {', '.join(missing)}", flush=True)
    times = race({case: run for case, run in found.items() if run}, rounds, seconds)
    rows, reference = [], ""
    for case, of_one in times.items():
        # "ours" is the reference of what follows it, up to the next "ours".
        reference = case if case.startswith("ours") else reference
        ratios = [a / b for a, b in zip(of_one, times[reference], strict=False)]
        row = {
            "part": name,
            "case": case,
            "seconds": median(of_one),
            "fastest": min(of_one),
            "slowest": max(of_one),
            "x ours": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "rounds": len(of_one),
            "MB": peak(name, case, size) if memory and part.MEMORY else math.nan,
        }
        # Goals are about work of the whole size.
        row["goal"] = judged(row, part.GOALS.get(case, {})) if size == 1 else ""
        rows.append(row)
        print(f"  {name}: {case}: {row['seconds']:.4f} s", flush=True)
    return rows


def growth(name: str, sizes: list[float], rounds: int, seconds: float) -> list[dict]:
    """Rows of the second table: a contender and size each."""
    part, rows, first = part_of(name), [], {}
    for size in sizes:
        found = part.cases(size)
        grows = getattr(part, "GROWS", ("ours",))
        run = {case: fn for case, fn in found.items() if fn and case.startswith(grows)}
        for case, of_one in race(run, rounds, seconds).items():
            taken = median(of_one)
            first.setdefault(case, (size, taken))
            row = {"part": name, "case": case, "work": size / first[case][0], "seconds": taken}
            rows.append(row | {"time": taken / first[case][1]})
        print(f"  {name}: size {size:g}", flush=True)
    return rows


def printed(rows: list[dict], grown: list[dict]) -> str:
    """Both tables as text."""
    head = f"{'':11}{'':46}{'seconds':>10}   {'x ours [low, high]':24}{'MB':>7}  goal"
    lines = [head]
    for row in rows:
        spread = f"{row['x ours']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
        spread = "" if row["case"].startswith("ours") else spread
        mb = "" if math.isnan(row["MB"]) else f"{row['MB']:.0f}"
        lines.append(
            f"{row['part']:11}{row['case']:46}{row['seconds']:10.4f}   {spread:24}{mb:>7}  "
            f"{row['goal']}"
        )
    if grown:
        lines += ["", "Growth: work, and times the time"]
        for (part, case), of_one in pd.DataFrame(grown).groupby(["part", "case"], sort=False):
            if len(of_one) > 1:
                steps = [f"{r.work:g}: {r.time:.2f}" for r in of_one.iloc[1:].itertuples()]
                lines.append(f"{part:11}{case:46}{',  '.join(steps)}")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for and write the tables."""
    if sys.argv[1:2] == ["--peak"]:
        return print_peak(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--quick", action="store_true", help="a fifth of the work; no memory or growth"
    )
    how.add_argument(
        "--full", action="store_true", help="more rounds; dense re-ranking at full size, some 10 GB"
    )
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    started = perf_counter()
    size, rounds, seconds = (
        (0.2, 2, 2) if options.quick else (1, 9, 60) if options.full else (1, 5, 8)
    )
    print(machine(), flush=True)
    rows, grown = [], []
    for name in options.parts or PARTS:
        rows += beside_peers(name, size, rounds, seconds, not options.quick, options.full)
        if not options.quick:
            grown += growth(name, part_of(name).SIZES, 3, 4)
    taken = perf_counter() - started
    text = f"{printed(rows, grown)}\n\n{machine()}. {taken / 60:.1f} minutes."
    print(f"\n{text}")
    folder = outputs_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.txt").write_text(text + "\n")
    content = {"machine": machine(), "command": sys.argv[1:], "beside peers": rows, "growth": grown}
    (folder / "results.json").write_text(json.dumps(content, indent=1))
    print(f"written: {folder / 'results.txt'}, results.json")


if __name__ == "__main__":
    main()
