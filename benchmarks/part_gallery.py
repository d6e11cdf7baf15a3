"""Galleries on disk, exact and through an index: time, memory, and what an index loses.

    python benchmarks/part_gallery.py [--full] [--run RUN]

Queries and gallery are those of a run that was scored here, Market-1501 for example; without one,
people drawn as in part_evaluation. To them come drawn distractors: normal, with the mean and the
covariance of the gallery. They are no photographs, and easier or harder than real ones. Files lie in a
temporary folder. Memory is the growth of a fresh process's peak, as Linux counts it. --full goes on to
10 million, which takes 6 GB of disk and many minutes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import pandas as pd
from part_evaluation import drawn
from run import machine

from reidlib.evaluation.index import KINDS, Index, price
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.shards import Shards, npy
from reidlib.model.stored import read_embeddings
from reidlib.runs import find_run

SHARD = 250_000  # rows
SIZES, MOST = (0, 500_000, 1_000_000, 2_000_000), 10_000_000  # distractors
IN_MEMORY = 1_000_000  # distractors, at most, that are held in memory too, for comparison
SAMPLE = 340  # queries by which an index is judged
SLOW = ("hnsw", MOST)  # its graph takes twenty times the minute of half a million, or more


def people(run: str):
    """Query and gallery of a run, without junk, or drawn; and what they are."""
    try:
        files = [find_run(run) / f"embeddings_{side}.h5" for side in ("query", "gallery")]
        (query_emb, query), (emb, table) = map(read_embeddings, files)
        said = f"queries and gallery of {run}"
    except FileNotFoundError:
        query_emb, query, emb, table = drawn(1)
        said = "drawn people (the run has no embeddings here: score it first)"
    kept = (table["pid"] != -1).to_numpy()
    tables = (query[["pid", "camid"]], table.loc[kept, ["pid", "camid"]].reset_index(drop=True))
    return query_emb, tables[0], emb[kept], tables[1], said


def write(folder: Path, run: str, most: int) -> tuple[str, int]:
    """Write queries, gallery and distractors as shards; return what they are, and the gallery's size."""
    query_emb, query, emb, table, said = people(run)
    np.save(folder / "query.npy", query_emb)
    query.to_csv(folder / "query.csv", index=False)
    table.to_csv(folder / "table.csv", index=False)
    np.save(folder / "shard_0.npy", emb)
    rng, centre = np.random.default_rng(0), emb.mean(axis=0)
    turn = np.linalg.cholesky(np.cov(emb.T) + 1e-9 * np.eye(emb.shape[1])).astype(np.float32)
    for n in range(most // SHARD):
        noise = rng.standard_normal((SHARD, emb.shape[1]), dtype=np.float32)
        np.save(folder / f"shard_{n + 1}.npy", noise @ turn.T + centre)
    return said, len(emb)


def retrieval(folder: Path, distractors: int, in_memory: bool) -> Retrieval:
    """The queries against the gallery with so many distractors, of camera 0 and pid 0."""
    count = 1 + distractors // SHARD
    emb = Shards(npy(folder / f"shard_{n}.npy") for n in range(count))
    table = pd.read_csv(folder / "table.csv")
    more = pd.DataFrame(0, index=range(distractors), columns=table.columns)
    table = pd.concat([table, more], ignore_index=True)
    query = pd.read_csv(folder / "query.csv")
    return Retrieval(np.load(folder / "query.npy"), query, emb[:] if in_memory else emb, table)


def status(field: str) -> float:
    """MB that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def job(folder: str, distractors: str, what: str) -> None:
    """What a fresh process does; it prints JSON."""
    folder, distractors = Path(folder), int(distractors)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = status("VmRSS"), perf_counter()
    ranking = retrieval(folder, distractors, what == "memory")
    found = {}
    if what in ("memory", "disk"):
        scores = ranking.evaluate().scores
        found = {"seconds": perf_counter() - started, "mAP": scores["mAP"]}
        found["digest"] = repr(scores)
    else:
        queries = np.arange(0, len(ranking.query), max(1, len(ranking.query) // SAMPLE))
        started = perf_counter()
        index = Index.of(ranking.gallery_side.emb, what)
        found["built"] = perf_counter() - started
        started = perf_counter()
        ranking.ranked_lists(queries, topk=100, index=index)
        found["ms a query"] = 1000 * (perf_counter() - started) / len(queries)
        found["MB"] = (
            status("VmHWM") - before
        )  # before the exact ranking, which it is compared with
        asked = (ranking.query_side.emb[queries], ranking.query.iloc[queries])
        few = Retrieval(*asked, ranking.gallery_side.emb, ranking.gallery)
        found |= price(few, index, k=100)
    print(json.dumps({"MB": status("VmHWM") - before} | found))


def run_job(*args) -> dict:
    """`job` in a process of its own."""
    command = [sys.executable, __file__, "--job", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def exact(folder: Path, gallery: int, sizes: list[int]) -> None:
    """Print the table of exact evaluations."""
    print("\n| gallery | on disk | memory | in memory | memory | µs an image | mAP |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        disk = run_job(folder, size, "disk")
        row = [f"{gallery + size:,}", f"{disk['seconds']:.1f} s", f"{disk['MB']:.0f} MB"]
        held = run_job(folder, size, "memory") if size <= IN_MEMORY else None
        row += [f"{held['seconds']:.1f} s", f"{held['MB']:.0f} MB"] if held else ["", ""]
        if held and held["digest"] != disk["digest"]:
            sys.exit(f"Scores differ: {held['digest']} in memory, {disk['digest']} from disk.")
        row += [f"{1e6 * disk['seconds'] / (gallery + size):.1f}", f"{100 * disk['mAP']:.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)


def indexed(folder: Path, gallery: int, sizes: list[int]) -> None:
    """Print the table of indexes: lists of 100 for a sample of the queries."""
    head = "gallery | index | built | a query | memory | recall@100 | mAP | at 100 | with index | top-1 lost"
    print(f"\n| {head} |\n|{'---|' * 10}")
    for size in sizes:
        for kind in KINDS:
            if (kind, size) == SLOW or (kind, size) == ("flat", MOST):
                continue
            f = run_job(folder, size, kind)
            scores = [f"{100 * f[key]:.2f}" for key in ("mAP", "mAP at k", "mAP with index")]
            cells = [
                f"{gallery + size:,}",
                kind,
                f"{f['built']:.1f} s",
                f"{f['ms a query']:.1f} ms",
            ]
            cells += [f"{f['MB']:.0f} MB", f"{100 * f['recall']:.1f} %", *scores]
            cells += [f"{100 * (f['top-1'] - f['top-1 with index']):.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Write the gallery, then print both tables."""
    if sys.argv[1:2] == ["--job"]:
        return job(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="on to 10 million")
    parser.add_argument("--run", default="market1501_batchhard_softplus", help="scored here")
    parser.add_argument("--sizes", type=int, nargs="+", help="distractors, for trying out")
    options = parser.parse_args()
    sizes = options.sizes or [*SIZES, *[MOST] * options.full]
    started = perf_counter()
    with TemporaryDirectory() as folder:
        said, gallery = write(Path(folder), options.run, max(sizes))
        print(
            f"{machine()}: {said}, and drawn distractors. {perf_counter() - started:.0f} s to write."
        )
        exact(Path(folder), gallery, sizes)
        indexed(Path(folder), gallery, [size for size in sizes if size in (0, SIZES[1], MOST)])
    print(f"\n{perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
