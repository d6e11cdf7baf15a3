"""The ranked-list browser: what is in a page, and both page and widget driven in a real browser."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import complaints, until
from reidlib.data.corrections import correct
from reidlib.data.tables import fingerprint, load
from reidlib.evaluation.metrics import average_precision
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look import browser, figures, lists, photographs
from reidlib.look.browser import MORE, Browser, ranked_list_page, with_why
from reidlib.look.maps import Sides
from reidlib.paths import ROOT

TOPK = 6
COLUMNS = ("run", "asked", "query", "rank", "gallery", "pid", "camid", "distance", "status")
COLUMNS += ("query_path", "path")
# Together, folder and file name hold `</script>`, which no file name alone can.
HOSTILE = (
    "plain.png",
    "a \"double\" and 'single' & more.png",
    "<img src=x onerror=alert(1)>.png",
    "<!--<script>alert('ü')<",
    "ünï çödé 人物 \u2028 line.png",
    "  spaces  and, commas;  .png",
    "${alert(1)} `tick` {{brace}}.png",
    "=1+1,%00.png",
)


def hostile_name(i):
    name = HOSTILE[i % len(HOSTILE)]
    return f"{i:02d} {name}/script>.png" if name.endswith("<") else f"{i:02d} {name}"


def save_image(path, rng, size=(16, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(path)
    return str(path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Query and gallery of five people and three cameras, distractors and junk, with awkward names."""
    root, rng = tmp_path_factory.mktemp("photos of people"), np.random.default_rng(0)
    rows = [(pid, camid) for pid in (1, 2, 3, 12, 40) for camid in (1, 2, 3)]
    sides = {
        "query": [row for row in rows if row[1] < 3],
        "gallery": [row for row in rows for _ in range(3)] + [(0, 1)] * 4 + [(-1, 2)] * 4,
    }
    out = []
    for side, labels in sides.items():
        table = pd.DataFrame(labels, columns=["pid", "camid"])
        # The last query has no match: the gallery knows its person from its own camera only.
        table.loc[len(table)] = 77, 1
        names = [*map(hostile_name, range(len(labels))), "lonely.png"]
        paths = [
            save_image(root / side / name, rng, (16, 32 if i % 5 else 20))
            for i, name in enumerate(names)
        ]
        out.append(table.assign(path=paths))
    return out


def embeddings(tables, seed=0, noise=1.2):
    """Query and gallery embeddings: each image near its person."""
    rng = np.random.default_rng(seed)
    centre = lambda pid: np.random.default_rng(abs(pid)).normal(size=8)
    return [
        np.stack([centre(pid) for pid in table["pid"]]) + noise * rng.normal(size=(len(table), 8))
        for table in tables
    ]


def retrieval(tables, seed=0, noise=1.2, **options):
    query_emb, gallery_emb = embeddings(tables, seed, noise)
    return Retrieval(query_emb, tables[0], gallery_emb, tables[1], **options)


def shown(one, row, **options):
    """The list that a page and a widget show of a query."""
    return one.ranked_list(row, **{"topk": TOPK, "show_missed": True, **options})


@pytest.fixture(scope="module")
def runs(tables):
    return {"plain": retrieval(tables), "<b>better</b> & 2": retrieval(tables, 1, 0.7)}


@pytest.fixture(scope="module")
def page(runs):
    """A page of both runs."""
    return ranked_list_page(runs, topk=TOPK)


def inside(page, what="data"):
    """The JSON in a page."""
    opening = f'<script type="application/json" id="ranked-lists-{what}">'
    (found,) = re.findall(f"{opening}(.*?)</script>", page)
    return json.loads(found)


def read(photo):
    """A thumbnail of a page."""
    return Image.open(io.BytesIO(base64.b64decode(photo)))


# --- the page, as a string


@pytest.mark.slow
def test_every_list_of_a_page_is_the_evaluators_and_its_ap_follows_from_it(runs, page):
    data = inside(page)
    assert data["about"]["queries"]["row"] == [*range(11)]
    follow = [key for key in data["lists"] if key[0] == "g"]
    assert len(follow) > 20 and len(data["lists"]) == 11 + len(follow)
    status_of = {code: status for status, code in lists.CODES.items()}
    checked = 0
    for r, one in enumerate(runs.values()):
        per_query = one.evaluate().per_query
        for key, records in data["lists"].items():
            record, row = records[r], int(key[1:])
            asked, at = (one, row) if key[0] == "q" else (one.ask([row]), 0)
            # All matches are there, and all that ranks, or would rank, up to the last of the first six,
            # of a query up to three times as many.
            expected = shown(asked, at, topk=TOPK if key[0] == "g" else MORE * TOPK)
            assert record["rows"] == expected["gallery"].tolist()
            assert record["ranks"] == expected["rank"].fillna(0).tolist()
            assert [status_of[code] for code in record["status"]] == expected["status"].tolist()
            np.testing.assert_allclose(record["distances"], expected["distance"], rtol=1e-3)
            ranks = expected["rank"][expected["status"] == "match"].tolist()
            whole = asked.ranked_list(at, topk=None)
            assert len(ranks) == (whole["status"] == "match").sum()
            aps = average_precision(ranks) if ranks else (None, None)
            assert (record["ap"], record["ap_market"]) == pytest.approx(aps)
            checked += bool(ranks)
            if key[0] == "q" and ranks:
                assert aps == pytest.approx(per_query.loc[row, ["AP", "AP_market"]], abs=1e-12)
                assert data["about"]["queries"]["ap"][r][row] == record["ap"]
    assert checked > 60
    codes = "".join(record["status"] for records in data["lists"].values() for record in records)
    assert {*codes} == {*"mwucji"}  # also distractors and junk ask, and nothing is right for them


def test_nothing_in_a_name_becomes_markup(tables, runs):
    title = "<script>alert(1)</script> & \u2028"
    page = ranked_list_page(runs, topk=TOPK, title=title)
    assert page.count("<script") == page.count("</script>") == 4
    assert "onerror" in page and "<img" not in page and "<b>" not in page
    assert "\u2028" not in page.split("</title>")[1]
    data = inside(page)
    assert data["about"]["title"] == title
    assert data["about"]["runs"][1]["name"] == "<b>better</b> & 2"
    names = [name for name, _, _ in data["images"].values()]
    assert any("</script>" in name for name in names)
    for key, (name, pid, camid) in data["images"].items():
        row = tables[1].iloc[int(key[1:])]
        assert row["path"].endswith("/" + name) and (pid, camid) == (row["pid"], row["camid"])
    assert str(Path(tables[0]["path"][0]).parent) not in page, "a folder of this machine"


def test_bytes_that_are_no_text_in_a_name(tables):
    query = tables[0].assign(path=[os.fsdecode(b"caf\xe9 %d.png" % i) for i in range(11)])
    found = retrieval((query, tables[1]))
    page = ranked_list_page({os.fsdecode(b"\xff"): found}, title=os.fsdecode(b"\xfe"), topk=2)
    page.encode()
    assert inside(page)["about"]["queries"]["name"][0] == "caf? 0.png"


def test_the_network_is_out_of_reach(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert not re.search(r"https?://|<link|@import|\burl\(['\"h]", page)


def test_thumbnails_are_there_once_small_and_keep_their_proportions(tables, page, monkeypatch):
    photos, data = inside(page, "photos"), inside(page)
    assert {*photos} == {f"q{row}" for row in range(11)} | {*data["images"]}
    assert read(photos["q1"]).format == "WEBP" and read(photos["q1"]).size == (16, 32)
    rng = np.random.default_rng(0)
    large = save_image(Path(tables[0]["path"][0]).parent.parent / "large.png", rng, (400, 800))
    query = tables[0].assign(path=large)
    photos = inside(ranked_list_page(retrieval((query, tables[1])), topk=1), "photos")
    assert read(photos["q0"]).size == (128, 256)
    monkeypatch.setattr(browser, "FEW", 20)  # a page of more keeps them small
    photos = inside(ranked_list_page(retrieval((query, tables[1])), topk=1), "photos")
    assert read(photos["q0"]).size == (56, 112)


def test_pictures_that_are_missing_are_said_to_be(tables):
    query = tables[0].assign(path="/nowhere/x.png")
    page = ranked_list_page(retrieval((query, tables[1])), topk=TOPK)
    assert {key[0] for key in inside(page, "photos")} == {"g"}
    notes = " ".join(inside(page)["about"]["notes"])
    assert "No picture of 11 images" in notes and "there is no such file" in notes
    bare = [table[["pid"]] for table in tables]  # embeddings alone, as other toolkits store them
    data = inside(ranked_list_page(retrieval(bare), topk=TOPK))
    assert data["about"]["queries"]["name"] == [""] * 11
    assert data["about"]["cameras"] == {"query": [], "gallery": []}


def test_which_queries_are_in_a_page(runs):
    def chosen(retrievals, queries):
        about = inside(ranked_list_page(retrievals, queries=queries, topk=1))["about"]
        return about["queries"]["row"], " ".join(about["notes"])

    one, two = runs.values()
    ap = one.evaluate().per_query["AP"]
    rows, notes = chosen(one, 8)
    assert len(rows) == len({*rows}) == 8
    assert {*ap.nsmallest(4, keep="all").index, *ap.nlargest(2).index} <= {*rows}
    said = "8 of 11 queries are in this file: the 4 of lowest AP, the 2 of highest AP, 2 drawn"
    assert said in notes and chosen(one, 8)[0] == rows
    change = two.evaluate().per_query["AP"] - ap
    rows, _ = chosen(runs, 4)
    assert {change.idxmin(), change.idxmax()} <= {*rows} and len(rows) == 4
    assert chosen(one, [7, 3])[0] == [3, 7]
    for queries in (None, 11, 500):
        assert chosen(one, queries)[0] == [*range(11)]


def test_what_cannot_be_shown_is_refused(tables, runs):
    one = runs["plain"]
    query, gallery = tables
    pid = query.assign(pid=query["pid"].replace({1: 2}))
    camid = gallery.assign(camid=gallery["camid"].where(gallery.index != 5, 9))
    path = gallery["path"].where(gallery.index != 3, gallery["path"][3] + "x")
    others = {
        "10 and 11 query images|11 and 10 query images": (query[:10], gallery),
        "pid of row 0 of the query table is 1 in the first and 2 in the second": (pid, gallery),
        "camid of row 5 of the gallery": (query, camid),
        "file name of row 3 of the gallery": (query, gallery.assign(path=path)),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            ranked_list_page({"a": one, "b": retrieval(other)})
    moved = [table.assign(path="/elsewhere" + table["path"]) for table in tables]
    there = retrieval(moved)
    ranked_list_page({"here": one, "there": there}, topk=1)  # the same, in another folder
    wrong = [(v, {}, "shows a Retrieval") for v in ([one], "plain", {"a": "plain"})]
    wrong += [(runs, {}, "one run or two") for runs in ({}, dict.fromkeys("abc", one))]
    wrong += [(one, {"queries": q}, "queries must") for q in (0, -3, [], [11], [-1], [0.5])]
    all_cameras = retrieval(tables, exclude_same_camera=False)
    wrong += [(one, {"topk": 0}, "topk"), ({"a": one, "b": all_cameras}, {}, "own camera")]
    for shown, options, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            ranked_list_page(shown, **options)


def test_nobody_known_gives_lists_without_right_or_wrong(tables):
    unlabelled = [table.assign(pid=-1, camid=-1) for table in tables]
    unlabelled[0]["pid"] = 1
    data = inside(ranked_list_page(retrieval(unlabelled, noise=0.1), topk=3))
    assert not data["about"]["runs"][0]["scored"]
    assert "Not scored: nobody is known in these pictures" in data["about"]["runs"][0]["scores"]
    for (record,) in data["lists"].values():
        assert {*record["status"]} <= {*"ui"} and record["ap"] is None
    assert data["lists"]["q0"][0]["status"] == "u" * 9


def test_distances_alone_cannot_be_followed(tables, runs):
    distances = np.stack([runs["plain"].distances(row) for row in range(11)])
    given = Retrieval.from_distances(distances, *tables)
    data = inside(ranked_list_page(given, topk=TOPK))
    assert {key[0] for key in data["lists"]} == {"q"} and not data["about"]["follows"]
    assert any("cannot be made the query" in note for note in data["about"]["notes"])
    both = inside(ranked_list_page({"plain": runs["plain"], "given": given}, topk=TOPK))
    assert both["lists"]["q3"][0] == both["lists"]["q3"][1]
    assert both["lists"]["g3"][0] is not None and both["lists"]["g3"][1] is None


# --- the widget's Python side, without a front end


def test_the_widget_answers_like_the_page(runs, page):
    widget = Browser(runs, topk=TOPK, live=False)
    ask = lambda what, *keys, **more: widget.answer({"id": 1, "ask": what, "keys": [*keys], **more})
    data = inside(page)
    for key in ("q4", "g7", "g46"):
        answer = ask("lists", key, topk=TOPK if key[0] == "g" else MORE * TOPK)["answer"]
        assert answer["lists"] == {key: data["lists"][key]}
        assert answer["images"].items() <= data["images"].items()
        assert key[0] == "q" or key in answer["images"]
    assert {*ask("photos", "q1", "g0")["answer"]} == {"q1", "g0"}
    for key in ("q11", "g54", "x1", "q-1", "", "q1.5", "q²"):
        assert "there is no image" in ask("lists", key)["error"]
    assert widget.about["queries"] == data["about"]["queries"]


def test_the_selection_is_a_table(runs):
    widget = Browser(runs, topk=TOPK, live=False)
    first = int(widget.view["key"][1:])
    assert first == runs["plain"].evaluate().per_query["AP"].idxmin()
    table = widget.selection
    assert [*table.columns] == [*COLUMNS]
    assert [*dict.fromkeys(table["run"])] == [*runs]
    mine = table[table["run"] == "plain"]
    for column in ("gallery", "distance"):
        assert mine[column].tolist() == shown(runs["plain"], first)[column].tolist()
    widget.view = {"key": "g9", "camera": "2", "excluded": False}
    table = widget.selection
    assert {*table["camid"]} == {2} and {*table["asked"]} == {"gallery"}
    assert table["rank"].notna().all()
    name = "<b>better</b> & 2"
    better = runs[name].ranked_list(0, topk=TOPK)["gallery"]
    mine = runs["plain"].ask([9]).ranked_list(0, topk=TOPK)["gallery"]
    widget.ticked = [[1, "q0", better[4]], [0, "g9", mine[1]], [1, "q0", better[2]]]
    ticked = widget.selection[["run", "asked", "query", "gallery"]].to_numpy().tolist()
    of_query = [[name, "query", 0, better[2]], [name, "query", 0, better[4]]]
    assert ticked == [*of_query, ["plain", "gallery", 9, mine[1]]]


def test_what_is_noted_is_a_table_that_corrects_the_data(runs, tables, tmp_path):
    widget = Browser(runs, topk=TOPK, live=False)
    assert [*widget.tags.columns] == ["path", "action", "pid", "tag", "note"] and widget.tags.empty
    drop = {"action": "drop", "tag": "blurred", "path": "query/x.png"}
    widget.tagged = {"q1": drop, "g4": {"action": "relabel", "pid": "40"}, "g5": {"note": "why?"}}
    assert widget.tags["path"].tolist() == [tables[0]["path"][1], *tables[1]["path"][[4, 5]]]
    widget.tags.to_csv(tmp_path / "corrections.csv", index=False)
    sides = lambda: dict(zip(("query", "gallery"), tables, strict=True))
    fixed = correct(tmp_path, sides(), notes := [])
    assert "1 images left out, 1 relabelled" in notes[0] and len(fixed["query"]) == 10
    assert fixed["gallery"]["pid"][4] == 40 and tables[1]["pid"][4] != 40
    of_several = [table.assign(dataset=np.where(table.index < 2, "a", "b")) for table in tables]
    joined = Browser(retrieval(of_several), live=False)
    joined.tagged = widget.tagged
    for text, message in (
        ("nowhere.png,drop,", "has 0 such"),
        (f"{widget.tags['path'][0]},rename,3", "the action is drop, or relabel"),
        (f"{widget.tags['path'][0]},relabel,bob", "to pid 'bob'"),
        (joined.tags.iloc[1][["path", "action", "pid"]].str.cat(sep=","), "to pid '40 of a.b'"),
    ):
        (tmp_path / "corrections.csv").write_text("path,action,pid\n" + text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            correct(tmp_path, sides(), [])
    (tmp_path / "corrections.csv").write_text("file\na.png", encoding="utf-8")
    with pytest.raises(ValueError, match="is no CSV with path, action, pid"):
        correct(tmp_path, sides(), [])


def test_a_correction_beside_the_data_is_another_data_set(data_root, tmp_path):
    root = shutil.copytree(data_root / "synthetic", tmp_path / "mine")
    before = load(root)
    name = Path(before.train["path"][0]).relative_to(root).as_posix()
    (root / "corrections.csv").write_text(f"path,action,pid\n{name},drop,\n", encoding="utf-8")
    after = load(root)
    assert len(after.train) == len(before.train) - 1 and fingerprint(after) != fingerprint(before)
    assert "corrections.csv: 1 images left out, 0 relabelled." in after.notes


def test_what_is_known_of_failures_comes_into_a_page_later(runs, page):
    rows = Sides(np.array([3]), np.array([5]), np.array([9]))
    causes = pd.DataFrame({"query": [0, 3], "cause": ["", "odd_picture"]})
    nine = [np.full((8, 4, 3), i * 20, np.uint8) for i in range(9)]
    why = browser.why_wrong(causes, ["q3", "g5"], rows, nine)
    assert why["causes"] == {"q3": "odd_picture"} and [*why["maps"]] == ["q3 g5", "q3 g9"]
    shade = [[np.asarray(read(photo)).mean() for photo in both] for both in why["maps"].values()]
    np.testing.assert_allclose(shade, [[40, 100], [120, 160]], atol=4)
    later = with_why(page, why)
    assert inside(page, "why") == {} and inside(later, "why") == why
    assert inside(later) == inside(page)
    assert browser.listed_in(later) == {*inside(page)["lists"]}


def test_without_a_front_end_there_is_a_picture_and_no_widget(runs, tables, tmp_path):
    bundle, _ = Browser(runs["plain"], topk=TOPK)._repr_mimebundle_()
    assert {*bundle} == {"text/plain", "text/html"}
    image = r'<img [^>]*src="data:image/jpeg;base64,[^"]{1000,}" alt="[^"]{10,}"'
    assert re.search(image, bundle["text/html"])
    live, _ = Browser(runs["plain"], topk=TOPK, live=True)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in live and "<img" in live["text/html"]
    assert len(live["text/html"]) < 500_000
    lost = [table.assign(path="/no <where>/x.png") for table in tables]
    bundle, _ = Browser(retrieval(lost), live=False)._repr_mimebundle_()
    assert "&lt;where&gt;" in bundle["text/html"] and "<img" not in bundle["text/html"]


# --- in a real browser


class Page:
    """What a person does with the browser, in a page or a widget."""

    def __init__(self, driver):
        self.driver = driver

    def all(self, selector):
        return self.driver.find_elements("css selector", f".ranked-lists {selector}")

    def one(self, selector):
        return self.all(selector)[0]

    def text(self, selector):
        return self.one(selector).text

    def choose(self, name, text):
        from selenium.webdriver.support.ui import Select

        Select(self.one(f"select[name='{name}']")).select_by_visible_text(text)

    def picked(self):
        """Keys of the queries that the picker offers, in order."""
        return [button.get_attribute("data-key") for button in self.all(".strip button")]

    def key(self):
        return until(lambda: self.all(".strip [aria-current]"))[0].get_attribute("data-key")

    def results(self, run=0):
        """Rank, status and gallery row of each result on the screen."""
        script = """return [...document.querySelectorAll('.ranked-lists .run')[arguments[0]]
            .querySelectorAll('li')].map(li => ({...li.dataset}))"""
        found = self.driver.execute_script(script, run)
        return [(int(r["rank"]), r["status"], int(r["row"])) for r in found]

    def press(self, *keys):
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def focused(self):
        return self.driver.switch_to.active_element

    def pick(self, row):
        self.one(f"[data-key=q{row}]").click()

    def stated(self, run=0):
        """Both APs that a list states, per cent."""
        words = r"AP ([\d.]+) % \(Market's definition: ([\d.]+) %\)"
        return [float(x) for x in re.search(words, self.all(".statement")[run].text).groups()]

    def checked_ap(self, run=0):
        """The AP that a list states, per cent: it is the one that its results give."""
        ranks = [rank for rank, status, _ in self.results(run) if status == "match"]
        computed = [100 * x for x in average_precision(ranks)]
        assert self.stated(run) == pytest.approx(computed, abs=0.0051)
        return self.stated(run)[0]


@pytest.fixture
def opened(chromium, runs, tmp_path):
    """Open a page from disk; at the end, nothing may stand in its console."""

    def open_page(retrievals, **options):
        file = tmp_path / "ranked lists.html"
        file.write_text(ranked_list_page(retrievals, topk=TOPK, **options), encoding="utf-8")
        chromium.get(file.as_uri())
        page = Page(chromium)
        until(lambda: page.all(".statement"))
        return page

    yield open_page
    assert complaints(chromium) == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert chromium.execute_script("return document.querySelectorAll('script').length") == 4


def downloaded(page, button, file):
    """The file that a click on a button saves."""
    options = {"behavior": "allow", "downloadPath": str(file.parent)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", options)
    page.one(button).click()
    until(lambda: file.exists() and file.stat().st_size)
    return file


def rows_of(table):
    """A ranked list as `Page.results` reads it off the screen."""
    columns = table["rank"].fillna(0), table["status"], table["gallery"]
    return [*zip(*columns, strict=True)]


def test_picking_a_query(opened, runs, tables):
    page, ap = opened(runs["plain"]), runs["plain"].evaluate().per_query["AP"].to_numpy()
    # Orders. The query without a match is last in both directions.
    worst, best = ([f"q{row}" for row in np.argsort(by, kind="stable")] for by in (ap, -ap))
    assert page.picked() == worst and worst[-1] == "q10" and page.key() == worst[0]
    page.choose("order", "AP, best first")
    assert page.picked() == best and best[-1] == "q10"
    page.choose("order", "random order")
    assert sorted(page.picked()) == sorted(worst) and page.picked() not in (worst, best)
    page.choose("order", "order of the query table")
    assert page.picked() == [f"q{row}" for row in range(11)]
    # Search by identity (12 is part of no name that it should find), by name, by camera.
    search = page.one("input[name=search]")
    for typed, found, note in (
        ("12", ["q6", "q7"], "2 of 11 queries"),
        ("ÇÖDÉ", ["q4"], "1 of 11 queries"),
        ("no such name", [], "No query fits"),
    ):
        search.clear()
        search.send_keys(typed)
        assert page.picked() == found and page.text(".picker .note").startswith(note)
    page.driver.execute_script(
        "arguments[0].value=''; arguments[0].dispatchEvent(new Event('input'))", search
    )
    page.choose("query-camera", "camera 2")
    assert page.picked() == [f"q{row}" for row in np.flatnonzero(tables[0]["camid"] == 2)]
    page.choose("query-camera", "all")
    assert len(page.picked()) == 11


def test_each_list_is_the_evaluators_and_its_ap_follows_from_the_screen(opened, runs):
    page, ap = opened(runs["plain"]), runs["plain"].evaluate().per_query["AP"]
    for row in (0, 3, 7, 9):
        page.pick(row)
        expected = shown(runs["plain"], row)
        assert page.results() == rows_of(expected)
        assert page.checked_ap() == pytest.approx(100 * ap[row], abs=0.0051)
        assert page.key() == f"q{row}" and page.driver.current_url.endswith(f"#q{row}")
        missed = [rank for rank, status, _ in page.results() if rank > TOPK]
        assert len(missed) == (expected["rank"] > TOPK).sum()
        if missed:
            assert f"Missed: {len(missed)} match" in page.text(".run")
            assert f"at rank {', '.join(map(str, missed))}" in page.text(".run")
    page.pick(10)
    assert "No match" in page.text(".statement")


def test_what_each_result_says(opened, runs):
    page = opened(runs["plain"])
    page.pick(0)
    words = {"match": "✓ {} right", "wrong": "✗ {} wrong", "junk": "– junk"}
    words |= {"same camera": "– same camera"}
    results = shown(runs["plain"], 0).itertuples()
    for item, result in zip(page.all(".results li"), results, strict=True):
        inner = lambda selector, item=item: item.find_element("css selector", selector)
        assert words[result.status].format(result.rank) in item.text
        assert f"distance {result.distance:#.4g}" in item.text and f"c{result.camid}" in item.text
        name = inner(".file").get_attribute("textContent")
        assert name and result.path.endswith("/" + name)
        alt = inner("img").get_attribute("alt")
        assert f"camera {result.camid}" in alt and words[result.status].split()[-1] in alt
        frame = inner(".photo").value_of_css_property("border-top-color").replace("rgba", "rgb")
        mark = photographs.STATUS.get(result.status, figures.EXCLUDED)
        colour = ", ".join(str(int(mark.colour[i : i + 2], 16)) for i in (1, 3, 5))
        assert frame.startswith(f"rgb({colour}")


def test_filters_and_a_result_that_becomes_the_query(opened, runs, tables):
    page = opened(runs["plain"])
    page.pick(0)
    # Excluded images away, then one camera: ranks and AP stay.
    whole, stated = page.results(), page.stated()
    page.one("input[name=excluded]").click()
    assert page.results() == [result for result in whole if result[0]] != whole
    assert "leaves out." in page.text(".run")
    page.choose("result-camera", "camera 3")
    cameras = tables[1]["camid"]
    assert page.results() == [r for r in whole if r[0] and cameras[r[2]] == 3]
    assert "Ranks and AP are those of the whole list" in page.text(".run")
    assert page.stated() == stated
    page.choose("result-camera", "all")
    page.one("input[name=excluded]").click()
    assert page.results() == whole
    # A click on a result makes it the query; its own list states its own AP.
    row = whole[2][2]
    page.all(".photo")[2].click()
    until(lambda: "a gallery image, asked as a query" in page.text(".asked"))
    asked = shown(runs["plain"].ask([row]), 0)
    assert page.results() == rows_of(asked) and (asked["status"] == "match").any()
    page.checked_ap()
    page.one(".back").click()
    until(lambda: page.results() == whole and page.key() == "q0")


def test_queries_are_filtered_by_what_is_known_of_them(opened, runs, tables, chromium):
    per_query = runs["plain"].evaluate().per_query
    wrong = [f"q{row}" for row in np.flatnonzero(per_query["first_rank"] > 1)]
    first = [runs["plain"].ranked_list(i, topk=1, show_excluded=False) for i in range(11)]
    near = tables[1]["camid"][[found["gallery"].iloc[0] for found in first]].to_numpy()
    page = opened(runs["plain"], why={"causes": {wrong[0]: "own_camera", wrong[1]: "odd_picture"}})
    page.choose("order", "order of the query table")
    assert 2 < len(wrong) < 10
    for name, text, expected in (
        ("rank-1", "wrong", wrong),
        ("rank-1", "right", [f"q{row}" for row in np.flatnonzero(per_query["first_rank"] == 1)]),
        ("near-camera", "camera 2", [f"q{row}" for row in np.flatnonzero(near == 2)]),
        ("cause", "odd_picture", [wrong[1]]),
    ):
        page.choose(name, text)
        assert page.picked() == expected, name
        page.choose(name, "all")
    low, high = per_query["AP"].quantile([0.3, 0.8])
    for name, value in (("low", low), ("high", high)):
        page.one(f"input[name={name}]").send_keys(f"{100 * value:.1f}\t")
    within = (per_query["AP"] > low) & (per_query["AP"] < high)
    assert page.picked() == [f"q{row}" for row in np.flatnonzero(within)]
    # On a phone the filters fold.
    shown = lambda: [fold.get_attribute("open") for fold in page.all(".fold")]
    assert shown() == ["true", "true"]
    try:
        chromium.set_window_size(500, 900)
        until(lambda: shown() == [None, None])
    finally:
        chromium.set_window_size(1300, 1000)
    page = opened(retrieval([table.assign(camid=-1) for table in tables]))
    assert not page.all("select[name$=camera]"), "a menu of no cameras"


def test_back_previous_next_and_a_link_to_a_query(opened, runs, chromium):
    from selenium.webdriver.common.keys import Keys

    page = opened(runs["plain"])
    order = page.picked()
    page.pick(3)
    page.pick(7)
    chromium.back()
    until(lambda: page.key() == "q3" and "q3" in chromium.current_url)
    chromium.forward()
    until(lambda: page.key() == "q7")
    page.one(".back").click()
    until(lambda: page.key() == "q3")
    at = order.index("q3")
    page.all(".step")[1].click()
    assert page.key() == order[at + 1]
    page.press("pp")
    until(lambda: page.key() == order[at - 1])
    page.one("input[name=search]").send_keys("n")
    assert page.key() == order[at - 1], "what is typed is no key"
    page.one("input[name=search]").send_keys(Keys.BACKSPACE)
    assert page.key() == order[at - 1] and len(page.picked()) == 11
    page.driver.execute_script("document.querySelectorAll('summary')[1].click()")
    assert "previous query" in page.text("dl")
    page.one("input[name=letters]").click()
    page.press("n")
    assert page.key() == order[at - 1], "single letters are off"
    # A link draws the strip as far as its query, and brings it into sight.
    chromium.get(chromium.current_url.split("#")[0] + f"#{order[-2]}")
    chromium.refresh()
    until(lambda: page.all(".strip [aria-current]"))
    strip, marked = page.one(".strip").rect, page.one(".strip [aria-current]").rect
    assert page.key() == order[-2]
    assert 0 <= marked["y"] - strip["y"] <= strip["height"] - marked["height"]


def test_more_results(opened, runs):
    page, one = opened(runs["plain"]), runs["plain"]
    page.pick(0)
    page.one(".more").click()
    until(lambda: len(page.results()) > TOPK + 4)
    assert page.results() == rows_of(shown(one, 0, topk=2 * TOPK))
    assert page.focused() in page.all(".photo")
    assert page.checked_ap() == pytest.approx(100 * one.evaluate().per_query["AP"][0], abs=0.0051)
    page.one(".more").click()
    until(lambda: page.results() == rows_of(shown(one, 0, topk=3 * TOPK)))
    assert not page.all(".more"), "the page holds no more"


def test_a_larger_view_with_what_was_looked_at(opened, runs, chromium):
    from selenium.webdriver.common.keys import Keys

    first, match = (
        next(r for r in shown(runs["plain"], 0).itertuples() if r.status == status)
        for status in ("wrong", "match")
    )
    pixel = "UklGRiQAAABXRUJQVlA4IBgAAAAwAQCdASoBAAEAAgA0JaQAA3AA/vuUAAA="
    why = {"maps": {f"q0 g{first.gallery}": [pixel, pixel]}, "map": ["q0"]}
    page = opened(runs["plain"], why=why)
    page.pick(0)
    assert page.one(".asked a").get_attribute("href").endswith("embedding_map.html#q0")
    at = [row for _, _, row in page.results()].index(first.gallery)
    page.all(".enlarge")[at].click()
    figures_of = lambda: [title.text for title in page.all("dialog figure b")]
    expected = ["query", f"✗ result, rank {first.rank}", f"✓ nearest match, rank {match.rank}"]
    assert figures_of() == expected and Path(first.path).name[:2] in page.all("figure")[1].text
    assert all(control.accessible_name for control in page.all("dialog :is(button, input, select)"))
    drawn = lambda: [pixel in image.get_attribute("src") for image in page.all("dialog img")]
    assert drawn() == [True, True, False] and page.all("dialog img")[0].rect["height"] > 300
    page.one("input[name=overlay]").click()
    assert drawn() == [False] * 3
    page.press(Keys.ARROW_RIGHT)
    assert f"result {at + 2} of" in page.text("dialog h2")
    page.press(Keys.ESCAPE)
    assert not page.one("dialog").is_displayed() and page.focused() == page.all(".enlarge")[at]


def test_tags_stay_and_correct_the_data(opened, runs, chromium, tables):
    from selenium.webdriver.support.ui import Select

    page = opened(runs["plain"])
    page.pick(3)
    page.one(".asked summary").click()
    page.one(".asked input[name=tag]").send_keys("blurred\t")
    Select(page.one(".asked select[name=action]")).select_by_value("drop")
    assert page.text(".asked .mark") == page.text("[data-key=q3] .mark") == "⚑ drop, blurred"
    row = page.results()[0][2]
    page.one(".enlarge").click()
    Select(page.one("dialog select[name=action]")).select_by_value("relabel")
    page.one("dialog input[name=pid]").send_keys("12\t")
    chromium.refresh()
    until(lambda: page.all(".statement"))
    assert page.text("[data-key=q3] .mark") == "⚑ drop, blurred", "the browser keeps it"
    root = Path(tables[0]["path"][0]).parent.parent
    file = downloaded(page, ".save-tags", root / "corrections.csv")
    sides = {"query": tables[0].copy(), "gallery": tables[1].copy()}
    fixed = correct(root, sides, notes := [])
    file.unlink()
    assert notes == ["corrections.csv: 1 images left out, 1 relabelled."]
    assert len(fixed["query"]) == 10 and tables[0]["path"][3] not in [*fixed["query"]["path"]]
    assert fixed["gallery"]["pid"][row] == 12
    assert (fixed["gallery"]["pid"] != tables[1]["pid"]).sum() <= 1


def test_a_file_with_some_of_the_queries_says_so(opened, runs):
    page = opened(runs["plain"], queries=3)
    page.one("input[name=search]").send_keys("no such name")
    assert page.picked() == [] and "in this file, which has 3 of 11" in page.text(".picker .note")


def test_long_names_are_cut_and_stay_in_their_place(opened, tables):
    long = "r" * 80
    query, gallery = (table.copy() for table in tables)
    gallery["path"] = [
        str(Path(path).rename(Path(path).with_name(f"{i:02d}{'x' * 200}.png")))
        for i, path in enumerate(shutil.copy(path, f"{path}.copy.png") for path in gallery["path"])
    ]
    page = opened({long: retrieval((query, gallery)), f"{long}2": retrieval((query, gallery), 1)})
    page.choose("order", f"largest loss of AP from {long} to {long}2")
    assert f"largest loss of AP from {long} to {long}2: 11 of" in page.text(".picker .note")
    over = page.driver.execute_script(
        """return [document.documentElement.scrollWidth - document.documentElement.clientWidth,
            ...[...document.querySelectorAll('.picker p, .picker span')].map(
                node => node.scrollWidth - node.clientWidth)]"""
    )
    assert max(over) <= 1, "nothing sticks out"
    file = page.all(".results .file")[0]
    low = file.rect["height"]
    assert len(file.get_attribute("textContent")) > 200 and low < 60
    page.driver.execute_script("arguments[0].focus()", page.all(".photo")[0])
    assert page.all(".results .file")[0].rect["height"] > 2 * low, "in focus, all of it"


def test_by_keyboard_alone(opened, runs, chromium):
    from selenium.webdriver.common.keys import Keys

    page = opened(runs["plain"])
    order = page.picked()
    chromium.execute_script("document.body.tabIndex = -1; document.body.focus()")
    for _ in range(12):
        page.press(Keys.TAB)
        if page.focused().get_attribute("data-key"):
            break
    assert page.focused().get_attribute("data-key") == order[0]
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ENTER)
    assert page.key() == order[1] and page.focused().get_attribute("data-key") == order[1]
    spoken = page.one("[role=status]").get_attribute("textContent")
    assert spoken.startswith("Query: identity") and "AP" in spoken
    for _ in range(12):
        page.press(Keys.TAB)
        if page.focused().get_attribute("class") == "photo":
            break
    page.press(Keys.END, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    row = page.results()[2][2]
    page.press(Keys.TAB)  # the tick of that result is the next stop
    page.press(Keys.SPACE)
    assert "1 result selected" in page.text(".selected")
    chromium.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    page.press(Keys.ENTER)
    until(lambda: chromium.current_url.endswith(f"#g{row}"))
    assert page.focused().tag_name == "h2" and page.focused().text.startswith("Query: ")
    page.press(Keys.BACKSPACE)
    until(lambda: page.key() == order[1] and page.focused().tag_name == "h2")


def test_two_runs_side_by_side(opened, runs, chromium):
    page, (a, b) = opened(runs), runs
    change = runs[b].evaluate().per_query["AP"] - runs[a].evaluate().per_query["AP"]
    for name, by in (("gain", -change), ("loss", change)):
        page.choose("order", f"largest {name} of AP from {a} to {b}")
        assert page.picked() == [f"q{row}" for row in np.argsort(by.to_numpy(), kind="stable")]
    page.choose("order", f"AP of {b}, worst first")
    moved = set()
    for query in (3, 6, 8):
        page.pick(query)
        ranks = [
            dict(zip(found["gallery"], found["rank"], strict=True))
            for found in (one.ranked_list(query, topk=None) for one in runs.values())
        ]
        boxes = page.all(".run")
        assert [box.find_element("css selector", "h3").text for box in boxes] == [a, b]
        assert boxes[0].rect["y"] == boxes[1].rect["y"]
        assert boxes[1].rect["x"] > boxes[0].rect["x"] + 300
        for r in range(2):
            items = boxes[r].find_elements("css selector", "li")
            for item, (_, status, row) in zip(items, page.results(r), strict=True):
                found = item.find_elements("css selector", ".moved")
                assert len(found) == (status == "match")
                if not found:
                    continue
                up, there = ranks[0][row] - ranks[1][row], ranks[1 - r][row]
                moved.add(np.sign(up))
                sign, word = ("▲", "up") if up > 0 else ("▼", "down")
                text = f"{sign} {abs(up)}, {'from' if r else 'to'} {there}" if up else "= same rank"
                assert found[0].text == text
                alt = item.find_element("css selector", "img").get_attribute("alt")
                assert f"rank {there} in {(b, a)[r]}" in alt and (word if up else "same") in alt
            page.checked_ap(r)
    assert len(moved) > 1


def test_the_selection_is_saved_as_csv(opened, runs, tmp_path, tables):
    page = opened(runs)

    def saved():
        file = downloaded(page, ".selection button", tmp_path / "selection.csv")
        rows = pd.read_csv(file, dtype=str, keep_default_na=False)
        file.unlink()
        return rows

    page.pick(2)
    rows = saved()  # nothing ticked: the lists in view
    expected = pd.concat(shown(one, 2) for one in runs.values())
    expected["rank"] = expected["rank"].astype("string").fillna("")
    for column in ("gallery", "status", "rank"):
        assert rows[column].tolist() == expected[column].astype(str).tolist()
    paths = zip(expected["path"], rows["path"], strict=True)
    assert all(path.endswith("/" + name) for path, name in paths)
    assert tables[0]["path"][2].endswith(rows["query_path"][0]) and {*rows["query"]} == {"2"}
    assert [*rows] == [*Browser(runs, topk=TOPK, live=False).selection.columns]
    page.all(".tick input")[1].click()
    first = page.results()[1]
    page.pick(5)
    page.all(".tick input")[-1].click()
    last = page.results(1)[-1]
    rows = saved()[["run", "query", "gallery"]].to_numpy().tolist()
    assert rows == [["plain", "2", str(first[2])], ["<b>better</b> & 2", "5", str(last[2])]]


CONTRAST = """
const parse = colour => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = ([r, g, b]) => {
  const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
};
const out = [];
for (const node of document.querySelectorAll('.ranked-lists *')) {
  if (![...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim())) continue;
  if (!node.getClientRects().length || node.disabled) continue;
  let ground = node;
  while (ground && parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const colours = [getComputedStyle(node).color, getComputedStyle(ground).backgroundColor];
  const pair = colours.map(colour => light(parse(colour)));
  out.push([node.className || node.tagName, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)]);
}
return out;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_can_be_read_and_has_a_name(opened, runs, chromium, theme):
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    page = opened(runs)
    chromium.execute_script("document.querySelectorAll('details').forEach(d => (d.open = true))")
    found = chromium.execute_script(CONTRAST)
    assert len(found) > 100
    assert [pair for pair in found if pair[1] < 4.5] == []
    ground = chromium.find_element("css selector", ".ranked-lists")
    dark = ground.value_of_css_property("background-color").startswith("rgba(22, 24, 27")
    assert dark == (theme == "dark")
    for control in page.all("button:not([hidden]), input, select"):
        inside = control.find_elements("xpath", "ancestor::dialog")
        assert inside or control.accessible_name.strip(), control.get_attribute("outerHTML")
    assert all(image.get_attribute("alt") for image in page.all("img"))
    assert [h.tag_name for h in page.all("h1, h2, h3, h4")][:3] == ["h1", "h2", "h3"]
    assert page.one("nav").accessible_name and page.one("main").accessible_name
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_page_of_nobody_and_a_page_that_cannot_be_followed(opened, runs, tables):
    unlabelled = [table.assign(pid=-1, camid=-1) for table in tables]
    page = opened(retrieval(unlabelled))
    assert "Not scored" in page.text("header")
    assert page.text(".strip button") == Path(tables[0]["path"][int(page.key()[1:])]).name.strip()
    assert page.text(".asked h2").startswith("Query: ") and "unknown" not in page.text(".asked")
    names = [file.get_attribute("textContent") for file in page.all(".file")]
    alts = [image.get_attribute("alt") for image in page.all(".results img")]
    assert all(name.split("/")[-1] in alt for name, alt in zip(names[1:], alts, strict=True))
    text = page.text(".run")
    assert not re.search(r"\bright:|\bwrong:|\bAP \d|✓|✗", text + page.text("header"))
    assert "not known who is asked for" in text
    distances = np.stack([runs["plain"].distances(row) for row in range(11)])
    page = opened(Retrieval.from_distances(distances, *tables))
    before = page.results()
    page.all(".photo")[1].click()
    assert page.results() == before
    assert "no list of this image" in page.one("[role=status]").get_attribute("textContent")
    assert page.all(".photo")[1].get_attribute("aria-disabled") == "true"


NOTEBOOK = """import numpy as np, pandas as pd
from reidlib.look.browser import Browser
from reidlib.evaluation.retrieval import Retrieval
query, gallery = pd.read_csv("query.csv"), pd.read_csv("gallery.csv")
emb = np.load("embeddings.npz")
runs = {name: Retrieval(emb[f"{name}_q"], query, emb[f"{name}_g"], gallery) for name in ("one", "two")}
browser = Browser(runs, topk=6)
browser"""


@pytest.fixture
def lab(tmp_path, tables):
    """JupyterLab itself, on a free port, with a notebook that makes a browser; its address."""
    for table, name in zip(tables, ("query", "gallery"), strict=True):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    arrays = {}
    for seed, name in enumerate(("one", "two")):
        arrays |= dict(zip((f"{name}_q", f"{name}_g"), embeddings(tables, seed), strict=True))
    np.savez(tmp_path / "embeddings.npz", **arrays)
    cells = [NOTEBOOK, 'browser.selection.to_json("selection.json", orient="records")']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "small.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{k}_DIR": str(tmp_path / f".{k}") for k in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={tmp_path}"]
    command += ["--IdentityProvider.token=secret", "--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.news_url="]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    env = os.environ | own | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "lab.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        yield f"http://127.0.0.1:{port}/lab/tree/small.ipynb?token=secret&reset"
        server.terminate()
        server.wait(20)


def test_the_widget_in_jupyterlab(lab, chromium, tables, tmp_path):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.keys import Keys

    def answers():
        try:
            chromium.get(lab)
            return chromium.find_elements("css selector", "#jupyter-config-data")
        except WebDriverException:
            return False

    until(answers, 240)  # a busy machine takes a minute to start it
    ready = """const notebook = window.jupyterapp?.shell?.currentWidget;
        const kernel = notebook?.sessionContext?.session?.kernel;
        return kernel?.status === 'idle' && notebook.content.widgets.length === 2"""
    until(lambda: chromium.execute_script(ready), 120)
    complaints(chromium)
    run = """const app = window.jupyterapp;
        app.shell.currentWidget.content.activeCellIndex = arguments[0];
        app.commands.execute('notebook:run-cell')"""
    chromium.execute_script(run, 0)
    page = Page(chromium)
    until(lambda: page.all(".statement"), 120)
    one = retrieval(tables, 0)
    first = np.argsort(one.evaluate().per_query["AP"].to_numpy(), kind="stable")[0]
    assert page.key() == f"q{first}"
    until(lambda: page.one(".asked img").get_attribute("src"))
    # A result becomes the query, and keys that JupyterLab knows (Enter, arrows) are the widget's own.
    row = page.results()[1][2]
    photo = page.all(".photo")[0]
    chromium.execute_script("arguments[0].focus()", photo)
    page.press(Keys.ARROW_RIGHT, Keys.ENTER)
    until(lambda: "a gallery image, asked as a query" in page.text(".asked"))
    expected = one.ask([row]).ranked_list(0, topk=TOPK, show_missed=True)
    assert [g for _, _, g in page.results()] == expected["gallery"].tolist()
    chromium.execute_script("arguments[0].click()", page.all(".tick input")[2])
    until(lambda: "1 result selected" in page.text(".selected"))
    time.sleep(0.3)  # the change travels to the kernel before the cell does
    chromium.execute_script(run, 1)
    file = tmp_path / "selection.json"
    until(lambda: file.exists() and file.stat().st_size)
    (taken,) = json.loads(file.read_text())
    assert (taken["run"], taken["asked"], taken["query"]) == ("one", "gallery", row)
    assert taken["gallery"] == expected["gallery"][2] and taken["status"] == expected["status"][2]
    assert taken["distance"] == pytest.approx(expected["distance"][2])
    ours = [message for message in complaints(chromium) if "favicon" not in message]
    assert ours == []
