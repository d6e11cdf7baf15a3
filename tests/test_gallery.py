"""Galleries that stay on disk, evaluations that were killed, and indexes beside the exact ranking."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest

from conftest import problem
from reidlib.__main__ import main
from reidlib.evaluation import partial, ranks, retrieval
from reidlib.evaluation.index import Index, price
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.stored import read_embeddings, write_embeddings

COUNT, DIM = 600, 8
NAN = np.full((1, DIM), np.nan, np.float32)


@pytest.fixture(scope="module")
def sides():
    """Query and gallery, embeddings and tables: clusters of 20 people, ties, junk and distractors."""
    query_emb, query, emb, table = problem(0, queries=30, size=COUNT, people=21, dim=DIM)
    for side in (query_emb, emb):
        side[::7] = side[0]
    table["path"] = [f"{i}.jpg" for i in range(COUNT)]  # a list of images puts a folder before them
    return query_emb.astype(np.float32), query, emb.astype(np.float32), table


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(ranks, "NUMBERS", 70 * DIM)
    monkeypatch.setattr(retrieval, "TILE", 90)


def write(kind, folder, emb, table):
    """The gallery on disk; what `read_embeddings` wants to know of it."""
    cuts = np.split(np.arange(len(emb)), [1, 250, 250, 480])
    if kind == "one h5":
        write_embeddings(folder / "g.h5", emb, table)
        return folder / "g.h5", None
    if kind == "h5 shards":
        for n, rows in enumerate(rows for rows in cuts if len(rows)):
            write_embeddings(folder / f"part_{n + 7}.h5", emb[rows], table.iloc[rows])
        return folder, None
    table[["pid", "path", "camid"]].to_csv(folder / "list.csv", index=False)
    if kind == "one npy":
        np.save(folder / "g.npy", emb)
        return folder / "g.npy", folder / "list.csv"
    for n, rows in enumerate(cuts):
        np.save(folder / f"{n + 9}.npy", emb[rows])
    return folder, None


@pytest.mark.parametrize("kind", ["one h5", "h5 shards", "one npy", "npy shards", "memmap", "h5py"])
def test_on_disk_is_in_memory_bit_for_bit(sides, tmp_path, kind):
    query_emb, query, emb, table = sides
    whole = Retrieval(*sides)
    if kind == "memmap":
        np.save(tmp_path / "g.npy", emb)
        shown = np.load(tmp_path / "g.npy", mmap_mode="r"), table
    elif kind == "h5py":
        write_embeddings(tmp_path / "g.h5", emb, table)
        shown = h5py.File(tmp_path / "g.h5")["emb"], table
    else:
        source, csv = write(kind, tmp_path, emb, table)
        shown = read_embeddings(source, csv, in_memory=False)
        assert not isinstance(shown[0], np.ndarray)
        np.testing.assert_array_equal(read_embeddings(source, csv)[0], emb)
        assert shown[1][["pid", "camid"]].equals(table[["pid", "camid"]])
        shown = shown[0], table
    found = Retrieval(query_emb, query, *shown)
    assert found.evaluate().scores == whole.evaluate().scores
    pd.testing.assert_frame_equal(found.evaluate().per_query, whole.evaluate().per_query)
    for topk in (3, None):
        lists = (one.ranked_lists(topk=topk, show_missed=True) for one in (found, whole))
        pd.testing.assert_frame_equal(*lists)
        lists = (one.ask([5, 2]).ranked_lists(topk=topk) for one in (found, whole))
        pd.testing.assert_frame_equal(*lists)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda files: files[1].unlink(), "lacks shards: there is none of number 11"),
        (lambda files: files[-1].unlink(), "has 599 embeddings, the list of images 600 rows"),
        (lambda files: os.truncate(files[-1], 150), "9.npy cannot be read as .npy, or is cut off"),
        (lambda files: files[0].write_text("no"), "10.npy cannot be read as .npy"),
        (lambda files: np.save(files[-1], NAN[:, :5]), "of 5, float32: shards must come from the"),
        (lambda files: [f.unlink() for f in files], "must hold embeddings as .npy or as .h5"),
        (lambda files: np.save(files[-1], NAN), "gallery embeddings hold NaN or infinity in 1 row"),
    ],
)
def test_broken_shards_are_named(sides, tmp_path, spoil, told):
    query_emb, query, emb, table = sides
    write("npy shards", tmp_path, emb, table)
    spoil(sorted(tmp_path.glob("*.npy")))
    with pytest.raises(ValueError, match=told):
        Retrieval(query_emb, query, *read_embeddings(tmp_path, in_memory=False))


def test_a_missing_last_shard_is_noticed_by_names_that_say_how_many(sides, tmp_path):
    _, _, emb, table = sides
    for n in range(1, 12):
        write_embeddings(tmp_path / f"gallery-{n}-of-11.h5", emb[n : n + 1], table.iloc[[n]])
    np.testing.assert_array_equal(read_embeddings(tmp_path)[0], emb[1:12])
    (tmp_path / "gallery-11-of-11.h5").unlink()
    with pytest.raises(ValueError, match="has 10 shards, of 11 by their names"):
        read_embeddings(tmp_path)
    for n in range(1, 11):
        (tmp_path / f"gallery-{n}-of-11.h5").rename(tmp_path / f"{n}_of_{10 + n // 10}.h5")
    with pytest.raises(ValueError, match="has 10 shards, of 10, 11 by their names"):
        read_embeddings(tmp_path)


def test_shards_of_other_weights_or_damaged_are_refused(sides, tmp_path):
    _, _, emb, table = sides
    for n in (0, 1):
        write_embeddings(tmp_path / f"{n}.h5", emb, table, {"weights_sha256": str(n)})
    with pytest.raises(ValueError, match="of different origin"):
        read_embeddings(tmp_path, in_memory=False)
    (tmp_path / "0.h5").unlink()
    with h5py.File(tmp_path / "1.h5", "r+") as file:
        file["emb"][3, 3] += 1
    with pytest.raises(ValueError, match="SHA-256 differs"):
        read_embeddings(tmp_path, in_memory=False)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("unsure", [1000, 3])
def test_a_killed_evaluation_goes_on(sides, tmp_path, monkeypatch, unsure):
    """Also where it was counting again in float64."""
    monkeypatch.setattr(partial, "SECONDS", 0)
    monkeypatch.setattr(ranks, "UNSURE", unsure)
    expected, file = Retrieval(*sides).evaluate(), tmp_path / "x.partial"
    usual, asked = Retrieval._tile, []

    def tile(self, rows, dtype):
        asked.append((dtype, rows[0]))
        if len(asked) == killed_at:
            raise Killed
        return usual(self, rows, dtype)

    monkeypatch.setattr(Retrieval, "_tile", tile)
    killed_at, seen = 4, []
    while True:
        asked.clear()
        try:
            found = Retrieval(*sides).evaluate(partial_file=file)
            break
        except Killed:
            seen += asked[:-1]
            assert file.exists()
    seen += asked
    pd.testing.assert_frame_equal(found.per_query, expected.per_query)
    assert found.scores == expected.scores and not file.exists()
    assert len({*seen}) == len(seen) > 6, "no tile is counted twice"
    assert ({dtype for dtype, _ in seen} == {np.float32}) == (unsure == 1000)


def test_counts_of_another_gallery_are_not_taken_up(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SECONDS", 0)
    monkeypatch.setattr(partial.Path, "unlink", lambda *_, **__: None)
    file = tmp_path / "x.partial"
    Retrieval(*sides).evaluate(partial_file=file)
    assert file.exists()
    other = (*sides[:2], sides[2] + np.float32(1), sides[3])
    expected = Retrieval(*other).evaluate()
    assert Retrieval(*other).evaluate(partial_file=file).scores == expected.scores
    file.write_text("damaged")
    assert Retrieval(*other).evaluate(partial_file=file).scores == expected.scores


def test_shell_evaluates_shards_and_writes_the_table(sides, tmp_path, capsys):
    query_emb, query, emb, table = sides
    write_embeddings(tmp_path / "q.h5", query_emb, query)
    (tmp_path / "g").mkdir()
    write("npy shards", tmp_path / "g", emb, table)
    line = ["evaluate", "--query", tmp_path / "q.h5", "--gallery", tmp_path / "g"]
    assert main([*map(str, line), "--out", str(tmp_path / "new" / "t.csv")]) == 0
    expected = Retrieval(*sides).evaluate()
    assert json.loads(capsys.readouterr().out) == expected.scores
    written = pd.read_csv(tmp_path / "new" / "t.csv")
    pd.testing.assert_series_equal(written["AP"], expected.per_query["AP"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.csv"]


LIMITED = """
import resource, sys
import numpy as np, pandas as pd
from reidlib.evaluation.retrieval import Retrieval
from reidlib.model.stored import read_embeddings

query, table = np.load(f"{sys.argv[1]}/query.npz"), pd.DataFrame({"pid": np.arange(400_000)})
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (1024 * used + 350 * 10**6,) * 2)
emb, _ = read_embeddings(f"{sys.argv[1]}/g", in_memory=sys.argv[2] == "memory")
asked = pd.DataFrame({"pid": query["pid"]})
print(Retrieval(query["emb"], asked, emb, table).evaluate().scores["mAP"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux")
def test_memory_is_bounded(tmp_path):
    """A gallery of 410 MB, under 350 MB more than the process has before it opens it."""
    rng = np.random.default_rng(0)
    (tmp_path / "g").mkdir()
    shards = [rng.normal(size=(100_000, 256)).astype(np.float32) for _ in range(4)]
    for n, emb in enumerate(shards):
        np.save(tmp_path / "g" / f"{n}.npy", emb)
    lines = "\n".join(["pid,path", *(f"{i},{i}.jpg" for i in range(400_000))])
    (tmp_path / "g" / "list.csv").write_text(lines)
    pids = np.arange(1, 400_000, 40_000)
    asked = np.concatenate(shards)[pids] + rng.normal(size=(10, 256)).astype(np.float32)
    np.savez(tmp_path / "query.npz", emb=asked, pid=pids)
    for how in ("memory", "disk"):
        command = [sys.executable, "-c", LIMITED, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True)
        assert ("MemoryError" in done.stderr) == (how == "memory"), done.stderr[-2000:]
    assert float(done.stdout) == 1


# --- indexes


@pytest.fixture(scope="module")
def made(sides):
    pytest.importorskip("faiss")
    return {kind: Index.of(sides[2], kind) for kind in ("flat", "hnsw", "ivfpq")}


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_what_an_index_finds_and_what_that_costs(sides, made, kind, capfd):
    exact = Retrieval(*sides)
    Index.of(sides[2], kind)
    assert capfd.readouterr().err == ""  # FAISS warns of few images to train on
    found = price(exact, made[kind], k=20)
    truth = exact.evaluate().scores
    assert found["mAP"] == pytest.approx(truth["mAP"]) and found["top-1"] == truth["top1"]
    if kind == "flat":
        assert found["recall"] == 1 and found["mAP with index"] == found["mAP at k"]
    assert found["recall"] > 0.3 and 0 < found["mAP at k"] < found["mAP"]


def test_lists_through_an_index_keep_the_protocol(sides, made):
    """Each query drops images; so the index is asked for more, until k are left."""
    exact = Retrieval(*sides)
    lists = (exact.ranked_lists(topk=5, index=index) for index in (None, made["flat"]))
    pd.testing.assert_frame_equal(*lists)
    hnsw = exact.ranked_lists(topk=5, index=made["hnsw"])
    assert (hnsw[hnsw["rank"].notna()].groupby("query").size() == 5).all()
    assert {"same camera", "junk"} <= {*hnsw["status"]}
    assert (np.diff(hnsw["distance"])[np.diff(hnsw["query"]) == 0] >= 0).all()


def test_matches_that_are_not_found_count_nothing():
    """Ranks 1 and 3 of three, by hand: (1 + 2/3) / 3 where the third match is beyond k."""
    query, gallery = pd.DataFrame({"pid": [1]}), pd.DataFrame({"pid": [1, 2, 1, 3, 1]})
    pytest.importorskip("faiss")
    emb = np.arange(1, 6, dtype=np.float32)[:, None]
    exact = Retrieval(np.zeros((1, 1), np.float32), query, emb, gallery)
    found = price(exact, Index.of(emb, "flat"), k=3)
    assert found["mAP at k"] == found["mAP with index"] == pytest.approx((1 + 2 / 3) / 3)
    assert found["mAP"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_an_index_on_disk_knows_its_embeddings(sides, made, tmp_path):
    emb = sides[2]
    made["hnsw"].save(tmp_path / "x.index")
    again = Index.load(tmp_path / "x.index", emb)
    assert len(again) == COUNT and again.kind == "hnsw"
    np.testing.assert_array_equal(again.search(emb[:9], 7)[0], made["hnsw"].search(emb[:9], 7)[0])
    again.add(emb[:1])
    again.save(tmp_path / "y.index")
    assert len(Index.load(tmp_path / "y.index", np.append(emb, emb[:1], axis=0))) == COUNT + 1
    for other in (emb[:, :4], emb[1:], emb + 1):
        with pytest.raises(ValueError, match="is an index of other embeddings .600 × 8, these are"):
            Index.load(tmp_path / "x.index", other)
    (tmp_path / "x.index").write_bytes((tmp_path / "x.index").read_bytes()[:-999])
    with pytest.raises(ValueError, match="cannot be read as an index.*Make it again"):
        Index.load(tmp_path / "x.index", emb)


def test_indexes_that_do_not_fit_are_refused(sides, made, monkeypatch):
    with pytest.raises(ValueError, match="choose flat, hnsw, ivfpq"):
        Index(DIM, "tree")
    with pytest.raises(ValueError, match="10 embeddings are too few"):
        Index.of(sides[2][:10], "ivfpq")
    with pytest.raises(ValueError, match=r"an index of 8 numbers does not fit \(2, 3\)"):
        made["flat"].search(np.ones((2, 3)), 1)
    less = Retrieval(*sides[:2], sides[2][1:], sides[3][1:])
    with pytest.raises(ValueError, match="600 × 8 numbers, and is not of this gallery"):
        less.ranked_lists(index=made["flat"])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RuntimeError, match=r"needs the package faiss.*\.\[index\]"):
        Index(DIM)
