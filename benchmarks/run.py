"""Each part of the library beside its peers, side by side on this machine: `make bench`.

    python benchmarks/run.py [--quick | --full] [PART ...]

Contenders run in turn, round after round, so that other work on the machine meets all of them. A
ratio is taken within a round: how many times slower than ours. Memory is the growth of the
process's peak in a fresh process, as Linux counts it. A peer that is not installed is named and left
out. The table is printed, and written to outputs/bench/.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import pandas as pd
import torch

from reidlib.paths import outputs_dir

PARTS = ("evaluation", "losses", "images", "network", "reranking")
HERE = Path(__file__).resolve().parent


def cases(part: str, size: float) -> dict:
    """The contenders of a part: name -> a function to time, or None if it is not installed."""
    sys.path.insert(0, str(HERE))
    return importlib.import_module(f"part_{part}").cases(size)


def race(contenders: dict, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each, in turn, the first round to warm up. Whoever has run for `seconds` in all drops
    out with what it has.
    """
    times = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, run in contenders.items():
            if sum(times[name]) < seconds:
                start = perf_counter()
                run()
                times[name].append(perf_counter() - start)
    return times


def peak(part: str, name: str, size: float) -> float:
    """MB by which the peak memory of a fresh process grows while a contender runs; NaN unknown."""
    command = [sys.executable, __file__, "--peak", part, name, str(size)]
    out = subprocess.run(command, capture_output=True, text=True)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else float("nan")


def print_peak(part: str, name: str, size: str) -> None:
    """What `peak` starts."""
    run = cases(part, float(size))[name]

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


def measure(part: str, factors: list[float], repeats: int, seconds: float, memory: bool) -> list:
    """Rows of the table, one a contender and size; the first contender is ours."""
    rows = []
    for factor in factors:
        found = cases(part, factor)
        missing = [name for name, run in found.items() if run is None]
        if missing and factor == factors[0]:
            print(f"{part}: not installed, left out: {', '.join(missing)}", flush=True)
        # Slow peers stay at the smallest size: growth is a question to our own code.
        run = {
            name: fn
            for name, fn in found.items()
            if fn and (factor == factors[0] or name.startswith(("ours", "limit")))
        }
        # "ours: x" is the reference of what follows it, up to the next "ours".
        times, reference = race(run, repeats, seconds), ""
        for name, of_one in times.items():
            reference = name if name.startswith("ours") else reference
            # Round by round; without the first, unless there is no other.
            ratios = [a / b for a, b in zip(of_one, times[reference], strict=False)]
            ratios, of_one = (x[1:] or x for x in (ratios, of_one))
            row = {
                "part": part,
                "size": factor,
                "case": name,
                "seconds": median(of_one),
                "fastest": min(of_one),
                "slowest": max(of_one),
                "times ours": median(ratios),
                "ratio low": min(ratios),
                "ratio high": max(ratios),
                "rounds": len(of_one),
                "peak MB": peak(part, name, factor)
                if memory and factor == factors[0]
                else float("nan"),
            }
            rows.append(row)
            print(
                f"{part:11} x{factor:<4g} {name:44} {row['seconds']:9.4f} s "
                f"[{row['fastest']:.4f}, {row['slowest']:.4f}]  x{row['times ours']:.2f} "
                f"[{row['ratio low']:.2f}, {row['ratio high']:.2f}]  {row['peak MB']:.0f} MB",
                flush=True,
            )
    return rows


def main() -> None:
    """Run what was asked for and write the table."""
    if sys.argv[1:2] == ["--peak"]:
        return print_peak(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="a fifth of the work, no memory")
    how.add_argument("--full", action="store_true", help="sizes up to x8, more rounds")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if options.quick:
        run = partial(measure, factors=[0.2], repeats=3, seconds=5, memory=False)
    elif options.full:
        run = partial(measure, factors=[1, 2, 4, 8], repeats=7, seconds=100, memory=True)
    else:
        run = partial(measure, factors=[1, 2], repeats=5, seconds=12, memory=True)

    print(machine(), flush=True)
    rows = [row for part in options.parts or PARTS for row in run(part)]
    folder = outputs_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    content = {"machine": machine(), "command": sys.argv[1:], "rows": rows}
    (folder / "results.json").write_text(json.dumps(content, indent=1))
    print(f"written: {folder / 'results.csv'}")


if __name__ == "__main__":
    main()
