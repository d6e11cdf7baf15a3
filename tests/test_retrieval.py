"""The evaluator against the definitions, written out as loops over plain Python lists."""

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import problem as people
from conftest import table
from reidlib.evaluation import retrieval
from reidlib.evaluation.metrics import average_precision
from reidlib.evaluation.retrieval import Retrieval, evaluate


def line(*positions):
    """Embeddings on a line, where distances can be read off."""
    return np.array(positions, dtype=np.float64)[:, None]


def oracle_list(i, query_emb, query, gallery_emb, gallery):
    """All that query i sees, from the protocol, one image at a time: (i, rank, row, status)."""
    cameras = all("camid" in t and (t["camid"] >= 0).any() for t in (query, gallery))
    asked, rows = query.iloc[i], []
    for j, shown in enumerate(gallery.itertuples()):
        status = "match" if shown.pid == asked.pid else "wrong"
        if status == "match" and cameras and shown.camid == asked.camid:
            status = "same camera"
        if shown.pid == asked.pid and "path" in query and shown.path == asked.path:
            status = "query itself"
        if shown.pid == -1:
            status = "junk"
        difference = gallery_emb[j].astype(np.float64) - query_emb[i].astype(np.float64)
        rows.append((float((difference**2).sum()), j, status))
    ranks, whole = iter(range(1, len(rows) + 1)), []
    for _, j, status in sorted(rows):
        whole.append((i, next(ranks) if status in ("match", "wrong") else None, j, status))
    return whole


def oracle(*args):
    """Scores and per-query values, from the definitions in the design."""
    rows = []
    for i in range(len(args[1])):
        ranks = [rank for _, rank, _, status in oracle_list(i, *args) if status == "match"]
        n = len(ranks)
        ap = ap_market = 0.0
        for found, rank in enumerate(ranks, 1):
            ap += found / rank / n
            before = (found - 1) / (rank - 1) if rank > 1 else 1.0
            ap_market += (found / rank + before) / 2 / n
        rows.append(
            [n, ap, ap_market, ranks[0], ranks[-1], n / ranks[-1]] if n else [0, *[np.nan] * 5]
        )
    columns = ["matches", "AP", "AP_market", "first_rank", "last_rank", "INP"]
    per_query = pd.DataFrame(rows, columns=columns)
    have = per_query[per_query["matches"] > 0]
    scores = {"mAP": have["AP"].mean(), "mAP_market": have["AP_market"].mean()}
    scores |= {f"top{k}": (have["first_rank"] <= k).mean() for k in (1, 2, 5, 10)}
    scores |= {"mINP": have["INP"].mean(), "queries": len(rows)}
    return scores | {"queries_without_match": len(rows) - len(have)}, per_query


def problem(seed, *, kind="integers", dtype=np.float32, **options):
    """Embeddings of whole numbers, many at the same distance; or half of them copies of others."""
    ties = kind == "integers"
    query_emb, query, gallery_emb, gallery = people(seed, queries=12, ties=ties, **options)
    if kind == "duplicates":  # the same image three times and more, all over the gallery
        rng = np.random.default_rng(seed)
        copies = rng.permutation(60)
        gallery_emb[copies[:30]] = gallery_emb[copies[rng.integers(0, 8, 30)]]
    return query_emb.astype(dtype), query, gallery_emb.astype(dtype), gallery


def assert_agrees(args):
    scores, per_query = oracle(*args)
    odd = [t.set_axis(t.index[::-1] + 100) for t in args[1::2]]  # a row number is a position
    result = evaluate(args[0], odd[0], args[2], odd[1])
    assert list(result.scores) == list(scores)
    assert result.scores == pytest.approx(scores, abs=1e-12)
    found = result.per_query[list(per_query)]
    pd.testing.assert_frame_equal(found, per_query, check_dtype=False, rtol=0, atol=1e-12)
    return result


@pytest.mark.parametrize("cameras", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["integers", "duplicates"])
def test_agrees_with_the_definitions(kind, dtype, cameras):
    for seed in range(12):
        result = assert_agrees(problem(seed, kind=kind, dtype=dtype, cameras=cameras))
        assert result.scores["queries_without_match"] >= 1
        assert 0 < result.scores["mAP"] < 1


@pytest.mark.parametrize(("offset", "dtype"), [(1e6, np.float64), (1e3, np.float32)])
def test_far_from_the_origin(offset, dtype):
    for seed in range(5):
        query_emb, query, gallery_emb, gallery = problem(seed, kind="duplicates", dtype=dtype)
        far = assert_agrees(
            (query_emb + dtype(offset), query, gallery_emb + dtype(offset), gallery)
        )
        if dtype == np.float64:  # 1e6 costs six digits of sixteen, too few to change an order
            assert far.scores == evaluate(query_emb, query, gallery_emb, gallery).scores


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_takes_tensors_and_leaves_inputs_as_they_were(dtype):
    args = problem(2)
    before = [arg.copy() for arg in args]
    expected = evaluate(*args).scores
    query_emb, gallery_emb = (torch.tensor(e, dtype=dtype, requires_grad=True) for e in args[::2])
    assert evaluate(query_emb, args[1], gallery_emb, args[3]).scores == expected
    for arg, old in zip(args, before, strict=True):
        assert np.array_equal(arg, old)


def test_a_case_by_hand():
    # Kept, by distance from 0: wrong 1, match 2, distractor 3, match 4. Left out: junk at 0.5 and
    # the same identity from the same camera at 0.1; another identity from that camera stays.
    gallery = table([5, -1, 7, 5, 0, 5], [1, 1, 1, 2, 3, 3])
    result = evaluate(line(0), table([5], [1]), line(0.1, 0.5, 1, 2, 3, 4), gallery)
    ap, ap_market = (1 / 2 + 2 / 4) / 2, ((1 / 2 + 0) / 2 + (2 / 4 + 1 / 3) / 2) / 2
    scores = {"mAP": ap, "mAP_market": ap_market, "top1": 0, "top2": 1, "top5": 1, "top10": 1}
    scores |= {"mINP": 2 / 4, "queries": 1, "queries_without_match": 0}
    assert result.scores == pytest.approx(scores)
    expected = {"query": 0, "pid": 5, "camid": 1, "matches": 2, "AP": ap, "AP_market": ap_market}
    expected |= {"first_rank": 2, "last_rank": 4, "INP": 0.5}
    assert result.per_query.iloc[0].to_dict() == pytest.approx(expected)
    assert "Queries: 1. Gallery images: 5, after 1 of junk" in result.protocol
    assert "same camera: 1." in result.protocol
    assert "50.0" in str(result) and "33.33" in str(result)
    assert result.table()["mAP"].item() == 50.0


@pytest.mark.parametrize("camids", [None, [-1, -1]])
def test_without_cameras_a_query_does_not_find_itself(camids):
    images = table([1, 1], camids, ["a.jpg", "b.jpg"])
    images = pd.concat([images, images.assign(pid=2, path=["c.jpg", "d.jpg"])], ignore_index=True)
    emb = line(0, 3, 1.2, 2)
    result = assert_agrees((emb, images, emb, images))
    assert (result.per_query["matches"] == 1).all()
    assert result.scores["top1"] == 0.5
    assert "Cameras are unknown" in result.protocol
    assert "the query image itself (path): 4." in result.protocol
    no_paths = images.drop(columns="path")
    assert evaluate(emb, no_paths, emb, no_paths).scores["top1"] == 1
    empty = images.assign(path="")  # a file of embeddings may hold empty paths
    assert evaluate(emb, empty, emb, empty).scores["top1"] == 1


def test_no_image_is_dropped_twice_nor_for_its_camera_unless_asked():
    images = table([1, 1, 1], [1, 1, 2], ["a.jpg", "b.jpg", "c.jpg"])
    result = assert_agrees((line(0), images[:1], line(0, 1, 2), images))
    assert "same camera: 2." in result.protocol and "itself" not in result.protocol
    stays = evaluate(line(0), images[:1], line(0, 1, 2), images, exclude_same_camera=False)
    assert stays.per_query["matches"].item() == 2 and stays.scores["top1"] == 1
    said = "stay in, as asked. Dropped for their query, being the query image itself (path): 1."
    assert said in stays.protocol


def test_cameras_known_of_some_images():
    one_sided = line(0), table([1]), line(0, 1), table([1, 2], [3, 3])
    with pytest.raises(ValueError, match="known in the gallery table alone"):
        Retrieval(*one_sided)
    assert evaluate(*one_sided, exclude_same_camera=False).scores["mAP"] == 1
    with pytest.raises(ValueError, match="known in the query table alone"):
        Retrieval(line(0), table([1], [3]), line(0, 1), table([1, 2]))
    nobody = table([-1])  # has no match that could be left out
    assert len(Retrieval(line(0), nobody, *one_sided[2:]).ranked_list(0)) == 2
    junk = table([1, -1], [2, -1])  # it alone may lack one
    assert evaluate(line(0), table([1], [1]), line(0, 1), junk).scores["mAP"] == 1


def test_queries_without_match_are_named_and_left_out():
    result = evaluate(line(0, 0, 0, 0), table([1, 8, 1, 9]), line(0, 1), table([1, 2]))
    assert result.scores["mAP"] == 1 and result.scores["top1"] == 1
    assert (result.scores["queries"], result.scores["queries_without_match"]) == (4, 2)
    assert "2 rows (1, 3)" in result.protocol
    assert result.per_query["AP"].fillna(-1).tolist() == [1, -1, 1, -1]


def test_average_precision_difference_is_the_identity_of_the_design():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 20))
        ranks = np.sort(rng.choice(40, n, replace=False) + 1)
        gap = sum((r - i) / (r * (r - 1)) for i, r in enumerate(ranks, 1) if r > 1) / (2 * n)
        ap, ap_market = average_precision(ranks)
        assert ap - ap_market == pytest.approx(gap, abs=1e-14)
    assert average_precision([1, 2, 3]) == (1, 1)
    assert average_precision([2]) == (0.5, 0.25)
    for wrong in ([], [0, 1], [2, 2], [3, 1], [[1]]):
        with pytest.raises(ValueError, match="ascending"):
            average_precision(wrong)


def test_ranked_list_by_hand():
    gallery = table([5, -1, 7, 5, 0, 5, 5], [1, 1, 1, 2, 3, 3, 1], list("abcdefg"))
    args = line(0), table([5], [1], ["q"]), line(0.1, 1.5, 1, -2, 3, 4, 9), gallery
    retrieval = Retrieval(*args)
    shown = retrieval.ranked_list(0, topk=2)
    assert list(shown) == ["rank", "gallery", "path", "pid", "camid", "distance", "status"]
    assert shown["rank"].fillna(0).tolist() == [0, 1, 0, 2] and shown["rank"].dtype == "Int64"
    assert shown["path"].tolist() == ["a", "c", "b", "d"]
    assert shown["distance"].tolist() == [0.1, 1, 1.5, 2]
    assert shown["status"].tolist() == ["same camera", "wrong", "junk", "match"]
    short = retrieval.ranked_list(0, topk=2, show_excluded=False)
    assert short["gallery"].tolist() == [2, 3] and short["rank"].tolist() == [1, 2]
    assert len(retrieval.ranked_list(0)) == 7  # fewer than ten: all there is
    stays = Retrieval(*args, exclude_same_camera=False).ranked_list(0, topk=1)
    assert stays["status"].tolist() == ["match"]
    itself = Retrieval(line(0), table([5], [9], ["a"]), *args[2:])
    assert itself.ranked_list(0, topk=1)["status"].tolist() == ["query itself", "wrong"]
    with pytest.raises(ValueError, match="query_row is 1"):
        retrieval.ranked_list(1)
    with pytest.raises(ValueError, match="topk"):
        retrieval.ranked_list(0, topk=0)


@pytest.mark.parametrize("cameras", [True, False])
@pytest.mark.parametrize("kind", ["integers", "duplicates"])
def test_many_lists_are_the_same_as_slow_ones(kind, cameras):
    for seed in range(6):
        args = problem(seed, kind=kind, cameras=cameras)
        retrieval, asked = Retrieval(*args), [3, 0, 11, 3]
        wholes = [oracle_list(i, *args) for i in asked]
        for topk in (1, 4, 17, 1000):
            for show_missed in (False, True):
                wanted = []
                for whole in wholes:
                    ends = [n for n, (_, rank, *_) in enumerate(whole, 1) if rank == topk]
                    end = ends[0] if ends else len(whole)
                    missed = [one for one in whole[end:] if one[3] == "match"]
                    wanted += whole[:end] + missed * show_missed
                found = retrieval.ranked_lists(asked, topk=topk, show_missed=show_missed)
                assert found.attrs["all_matches"] == show_missed
                rank = found["rank"].astype(object).where(found["rank"].notna(), None)
                columns = (found["query"], rank, found["gallery"], found["status"])
                assert list(zip(*columns, strict=True)) == wanted
                for i, j, distance in found[["query", "gallery", "distance"]].itertuples(False):
                    assert distance == retrieval.distances(i, [j])[0]
    everyone = retrieval.ranked_lists(topk=None)
    assert len(everyone) == 12 * 60 and everyone.attrs["all_matches"]
    one = everyone[everyone["query"] == 5].drop(columns="query").reset_index(drop=True)
    pd.testing.assert_frame_equal(retrieval.ranked_list(5, topk=None), one)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_distances_that_came_ready(dtype):
    for seed in range(6):
        args = problem(seed, kind="integers")
        known = Retrieval(*args)
        distances = np.array([known.distances(i) ** 2 for i in range(12)]).round().astype(dtype)
        ready = Retrieval.from_distances(distances, args[1], args[3])
        assert ready.evaluate().scores == known.evaluate().scores
        lists = [r.ranked_lists(topk=7, show_missed=True) for r in (known, ready)]
        left, right = (table.drop(columns="distance") for table in lists)
        pd.testing.assert_frame_equal(left, right)
        np.testing.assert_allclose(lists[0]["distance"] ** 2, lists[1]["distance"], atol=1e-9)
    with pytest.raises(ValueError, match="do not say how far"):
        ready.ask([0])
    broken = np.where(np.arange(12)[:, None] == 2, np.nan, distances)
    for wrong, message in (
        (distances[1:], r"\(12, 60\) for these tables, not \(11, 60\)"),
        (broken, r"NaN or infinity in 1 row \(2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Retrieval.from_distances(wrong, args[1], args[3])


def test_gallery_images_ask():
    gallery = table([5, -1, 7, 5, 0, 5], [1, 1, 1, 2, 3, 3], list("abcdef"))
    retrieval = Retrieval(line(0), table([5], [1], ["q"]), line(0, 1, 2, 3, 4, 5), gallery)
    asked = retrieval.ask([3, 4, 1])
    lists = asked.ranked_lists(topk=9)
    status = {i: list(t["status"]) for i, t in lists.groupby("query", sort=False)}
    # Nearest first: d c e b f a for the image d, which is itself left out.
    assert status[0] == ["query itself", "wrong", "wrong", "junk", "match", "match"]
    assert lists[lists["query"] == 0]["path"].tolist() == list("dcebfa")
    # A distractor and junk are nobody: nothing is right or wrong.
    assert status[1] == ["query itself", *["unknown"] * 3, "junk", "unknown"]
    assert status[2] == ["query itself", *["unknown"] * 5]
    with pytest.raises(ValueError, match="ask for nobody"):
        asked.evaluate()
    for wrong in ([], [6], [-1], 0, [0.5]):
        with pytest.raises(ValueError, match="gallery"):
            retrieval.ask(wrong)


@pytest.mark.parametrize("pid", [-1, 4])
def test_without_labels_everything_is_ranked_and_nothing_judged(pid):
    gallery = table([-1, -1, -1], None, ["a", "b", "q"])
    retrieval = Retrieval(line(0), table([pid], None, ["q"]), line(2, 1, 0), gallery)
    found = retrieval.ranked_list(0)
    assert found["status"].tolist() == ["query itself", "unknown", "unknown"]
    assert found["path"].tolist() == ["q", "b", "a"]
    with pytest.raises(ValueError, match="junk"):
        retrieval.evaluate()


def test_distance_sample():
    gallery = table([5, -1, 7, 5, 0, 5], [1, 1, 1, 2, 3, 3])
    found = Retrieval(line(0, 0), table([5, 8], [1, 1]), line(0.1, 0.5, 1, 2, 3, 4), gallery)
    matches, others = found.distance_sample()
    assert matches.tolist() == [2, 4]  # neither the same camera nor junk; query 1 has none
    assert sorted(others[:2]) == [1, 3] and sorted(others[2:]) == [0.1, 1, 2, 3, 4]
    few = [found.distance_sample(per_query=1, seed=seed)[1] for seed in [*range(20), 0]]
    assert {len(draws) for draws in few} == {2} and np.array_equal(few[0], few[-1])
    assert {draws[0] for draws in few} == {1, 3}


def test_the_ranking_is_made_once(monkeypatch):
    found = Retrieval(*problem(2))
    usual = found.evaluate()
    monkeypatch.setattr(retrieval, "match_ranks", None)
    assert found.evaluate().scores == usual.scores and "top3" in found.evaluate([3]).scores
    assert found.ranked_list(0, show_missed=True)["rank"].max() == usual.per_query["last_rank"][0]


E2 = line(0, 1)
T2 = table([1, 2], [1, 2])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((line(0), T2, E2, T2), "1 query embeddings beside a query table of 2 rows"),
        ((E2, T2, line(0), T2), "1 gallery embeddings"),
        ((np.zeros((2, 3)), T2, E2, T2), "3 dimensions, gallery embeddings 1"),
        ((np.zeros(2), T2, E2, T2), r"must be \(N, D\)"),
        ((np.zeros((2, 0)), T2, E2, T2), r"must be \(N, D\)"),
        ((np.array([["a"], ["b"]]), T2, E2, T2), r"must be \(N, D\)"),
        ((line(0, np.nan), T2, E2, T2), r"query embeddings hold NaN or infinity in 1 row \(1\)"),
        ((E2, T2, line(np.inf, 1), T2), "gallery embeddings hold NaN"),
        ((E2, T2, line(-1e300, 1e300), T2), "overflow"),
        ((E2[:0], T2[:0], E2, T2), "query is empty"),
        ((E2, T2, E2[:0], T2[:0]), "gallery is empty"),
        ((E2, T2, E2, table([-1, -1])), "junk"),
        ((E2, table([0, 1], [1, 2]), E2, T2), r"1 row \(0\) of the query table"),
        ((E2, table([1, -1], [1, 2]), E2, T2), r"1 row \(1\) of the query table"),
        ((E2, T2, E2, table([1, -2])), "below -1"),
        ((E2, T2.drop(columns="pid"), E2, T2), "needs a column 'pid'"),
        ((E2, table([1.0, np.nan]), E2, T2), "whole numbers"),
        ((E2, table(["0001", "0002"]), E2, T2), "whole numbers"),
        ((E2, T2, E2, table([1, 2], [1, -1])), "1 of 2 images of the gallery table have no camera"),
        ((E2, table([8, 9], [1, 2]), E2, T2), "share no pid"),
        ((E2, T2, E2, T2), "same camera: 2. .* pass exclude_same_camera=False"),
    ],
)
def test_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*args)


@pytest.mark.parametrize("topk", [[0, 1], []])
def test_ranks_of_cmc_that_there_are_not(topk):
    with pytest.raises(ValueError, match="topk"):
        evaluate(E2, table([1, 2]), E2, table([1, 2]), topk=topk)
