"""Data sets: what is read, what is refused, what is found wrong."""

import os
import re
import shutil
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidlib.data import tables as ds
from reidlib.data.check import check, drop_unreadable
from reidlib.data.layouts import LAYOUTS
from reidlib.data.pixels import read_image
from reidlib.recipes import make_recipe

MARKET_FOLDER = LAYOUTS["market1501"].folder
MARKET = Path(__file__).resolve().parent.parent / "data" / MARKET_FOLDER
needs_market = pytest.mark.skipif(
    not (MARKET / "bounding_box_train").is_dir(), reason=f"Market-1501 is not at {MARKET}"
)


pytestmark = pytest.mark.usefixtures("data")


def picture(path, size=(8, 16), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.name.encode())).integers(
        0, 256, (*size[::-1], 3), np.uint8
    )
    Image.fromarray(noise).convert(mode).save(path, **options)
    return path


def pictures(root, *names):
    """A folder with these pictures."""
    for name in names:
        picture(root / name)
    return root


SMALL = {
    "bounding_box_train": [
        f"{p:04d}_c{c}s1_00000{i}_0{i}.jpg" for p in (2, 7) for c in (1, 2) for i in (1, 2)
    ],
    "query": ["0001_c1s1_000001_00.jpg", "0003_c2s1_000001_00.jpg.jpg"],
    "bounding_box_test": [
        *("-1_c1s1_000401_03.jpg", "0000_c3s1_000451_04.jpg", "0001_c1s1_000011_01.jpg"),
        *("0001_c2s1_000012_01.jpg", "0003_c1s1_000012_01.jpg.jpg"),
    ],
}


def small_market(root):
    return pictures(root, *(f"{folder}/{name}" for folder in SMALL for name in SMALL[folder]))


def table(rows):
    """A table of (path, pid, camid) rows; no files."""
    made = pd.DataFrame(list(rows), columns=["path", "pid", "camid"])
    return made.astype({"path": str, "pid": "int64", "camid": "int64"})


def shots(people):
    """Two images of each of these people in each of two cameras."""
    return table((f"/{p}{c}{i}", p, c) for p in people for c in (1, 2) for i in (1, 2))


def rows(table):
    return [(os.path.basename(p), *row) for p, *row in table[["path", "pid", "camid"]].values]


def refused(message, load=ds.load, *asked, **options):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load(*asked, **options)


# --- Market-1501


@needs_market
def test_real_market_is_complete():
    data = ds.load(str(MARKET))
    assert data.name == "market1501"
    report = check(data, decode=False)
    assert report.ok and not (report.problems.severity == "warning").any(), str(report)
    counts = report.counts
    assert counts.images.to_dict() == LAYOUTS["market1501"].images
    assert counts.identities.to_dict() == {"train": 751, "query": 750, "gallery": 750}
    assert counts.junk["gallery"] == 3819 and counts.distractors["gallery"] == 2798
    assert (counts.cameras == 6).all()
    # The 24 doubled suffixes: all six queries of identity 1488 and 18 of its gallery images.
    double = pd.concat([data.query, data.gallery])
    double = double[double.path.str.endswith(".jpg.jpg")]
    assert len(double) == 24 and (data.query.pid == 1488).sum() == 6
    for table in data.splits.values():
        assert isinstance(table.index, pd.RangeIndex)
        assert table.pid.dtype == table.camid.dtype == np.int64
    assert read_image(data.query.path[0]).shape == (128, 64, 3)


def zipped(archive, source):
    """A zip of all images below a folder, with a stray as macOS leaves them."""
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("__MACOSX/bounding_box_train/._x.jpg", b"resource fork")
        for path in sorted(source.rglob("*")):
            z.write(path, path.relative_to(source.parent))


# fmt: off
PLACES = [
    (f"data/{MARKET_FOLDER}", "market1501"),
    (f"data/market1501/{MARKET_FOLDER}", "market1501"),
    ("Market-1501", "{}/Market-1501"),
    (f"disk/{MARKET_FOLDER}", "{}/disk"),
    (f"source/{MARKET_FOLDER}", "market1501"),
    (f"source/{MARKET_FOLDER}", f"{{}}/data/{MARKET_FOLDER}.zip"),
]
# fmt: on


@pytest.mark.parametrize(("place", "dataset"), PLACES)
def test_market_is_found_wherever_people_put_it(place, dataset, data, tmp_path):
    small_market(tmp_path / place)
    if place.startswith("source"):
        zipped(data / f"{MARKET_FOLDER}.zip", tmp_path / place)
    got, again = (ds.load(dataset.format(tmp_path)) for _ in range(2))  # unpacked once, then found
    assert got.name == "market1501" and ds.fingerprint(got) == ds.fingerprint(again)
    assert rows(got.query) == [("0001_c1s1_000001_00.jpg", 1, 1), (SMALL["query"][1], 3, 2)]
    assert list(got.gallery.pid) == [-1, 0, 1, 1, 3]  # junk and distractors stay
    assert list(got.train.camid) == [1, 1, 2, 2] * 2
    assert all(os.path.isabs(p) and os.path.isfile(p) for p in got.gallery.path)
    assert not list(data.glob(".*"))


def test_market_that_is_not_there_says_where_to_get_it(data):
    small_market(data / f".{MARKET_FOLDER}.77.part")  # another process is unpacking
    pictures(data, "Market-1501/1.jpg")  # of this name, but no Market-1501
    refused(f"is not in {data}: .*Liang Zheng.*Kaggle")


FLAT = ["ann_cam1_x.jpg", "ann_cam2_x.jpg", "bob_cam1_x.jpg", "bob_cam2_x.jpg"]
# What lies in the folder `x` (pictures, or a list of this text), what is asked for, what is said.
# fmt: off
REFUSED = [
    ([], dict(dataset="no"), "no 'no'.*one of the names synthetic, market1501,"),
    ([], dict(dataset=""), "no ''"),
    ([], dict(dataset="market1501", pattern="x"), "are for your own data"),
    ([], dict(dataset="synthetic", image_root="x"), "are for your own data"),
    ([], {}, "holds no images"),
    (["a.jpg"], dict(dataset="x/a.jpg"), "neither a folder"),
    (["train/a/1.jpg", "gallery/a/1.jpg"], {}, "lacks a folder for query"),
    (["a/bounding_box_train/1.jpg", "b/bounding_box_train/1.jpg"], {}, "holds several data sets"),
    (["a/1.jpg", "b/1.jpg"], {}, "too few identities to split"),
    (["a/1.jpg"], dict(image_root="x"), "image_root goes with CSV lists"),
    (FLAT, {}, "no sub-folder for each identity: .*give pattern"),
    (FLAT, dict(pattern="("), "no regular expression"),
    (FLAT, dict(pattern=r"\d"), "neither a group"),
    (FLAT, dict(pattern="(?P<pid>ann)"), "2 of 4 image names.*bob_cam1_x.jpg"),
    (FLAT, dict(pattern="(?P<pid>[a-z]+)(?P<camid>8)?"), "4 of 4 image names"),
    (["train.csv", "duke_train.csv"], {}, "duke_train.*are all lists for train"),
    (["query.csv"], {}, "query and gallery go together.*only .*query.csv"),
    (["own/train/a/1.jpg", "own/test/a/1.jpg"], {}, "for a folder of people, and holds own/test, own/train:"),
    (["train_1/a/1.jpg", "train_2/a/1.jpg"], {}, "may all be for train"),
    (["train/a/1.jpg"], {}, "lacks a folder for query.*x/train by itself is split in halves"),
    (["train.csv", "a/bounding_box_train/1.jpg"], {}, "holds the lists .*train.csv and the folder"),
    (["query.csv", "gallery.csv", "train/a/1.jpg"], {}, "holds the lists .* and the folder .*train"),
    (["train.csv"], dict(dataset="x/train.csv"), r"train.csv is no CSV in UTF-8 \("),
    ("path,who\na.jpg,ann\n", {}, "line 1: expected pid,path, got 'path,who'. A header"),
    ("file,who\na.jpg,ann\n", {}, "line 1: expected pid,path, got 'file,who'. A header"),
    ("1,a.jpg\n".encode("utf-16"), {}, r"train.csv is no CSV in UTF-8 \("),
    ("Jürgen,a.jpg\n".encode("latin-1"), {}, r"train.csv is no CSV in UTF-8 \("),
    ("", {}, "lists no images"),
    ("pid,path\n", {}, "lists no images"),
    ("1,a.jpg\n\n2\n", {}, "line 3: expected pid,path, got '2'"),
    ("1;a.jpg\n", {}, "line 1: expected pid,path, got '1;a.jpg'"),
    ("1,a.jpg,3\n2,a.jpg,\n", {}, "line 2: expected pid,path,camid"),
    ("path\na.jpg", {}, "line 1: expected pid,path, got 'path'"),  # to train on, labels are needed
    ("-7,a.jpg\n", {}, "identities below -1"),
    ("1,a.jpg,-1\n1,a.jpg,2\n", {}, "1 of 2 images in training have a camera"),
    ("1,a.jpg\n1,b.jpg\n", {}, "1 of 2 images in .* do not exist: .*b.jpg. Is image_root right"),
]
# fmt: on


@pytest.mark.parametrize(("there", "asked", "message"), REFUSED)
def test_what_is_no_data_set_is_refused(there, asked, message, data):
    (data / "x").mkdir()
    if not isinstance(there, list):
        pictures(data / "x", "a.jpg")
        whole = there if isinstance(there, bytes) else there.encode()
        (data / "x" / "train.csv").write_bytes(whole)
    for name in there if isinstance(there, list) else []:
        picture(data / "x" / name, format="jpeg")
    refused(message, **{"dataset": "x"} | asked)


def test_strays_are_noted_and_wrong_names_refused(data):
    root = small_market(data / "set")
    (root / "query" / "Thumbs.db").write_bytes(b"x")
    (root / "query" / "._0001_c1s1_000001_00.jpg").write_bytes(b"x")
    pictures(root / "query", ".ipynb_checkpoints/1.jpg", "0001_c4s1_1_0.JPG", "0001_c5s1_1_0.png")
    got = ds.load("set")
    assert got.name == "set" and list(got.query.camid) == [1, 4, 5, 2]
    assert "images: ._0001_c1s1_000001_00.jpg, .ipynb_checkpoints/, Thumbs.db." in got.notes[0]
    pictures(root / "query", "holiday.jpg")
    refused(r"1 of 5 image names in .*query do not fit.*holiday\.jpg", ds.load, "set")


def test_built_in_data_is_drawn_once_and_refused_of_another_version(data, monkeypatch):
    from reidlib.data import synthetic

    drawn, draw = [], synthetic.draw_dataset

    def draw_few(root):
        drawn.append(root)
        return draw(root, train_ids=2, test_ids=2, images_per_camera=1, distractors=1, junk=1)

    monkeypatch.setattr(synthetic, "draw_dataset", draw_few)
    assert ds.load("synthetic").name == ds.load("synthetic").name == "synthetic"
    assert drawn == [data / "synthetic"]
    for text in ('{"version": 0}', "[]", "{", None, "a pipe"):
        marker = data / "synthetic" / "dataset.json"
        marker.write_text(text) if text not in (None, "a pipe") else marker.unlink(True)
        _ = text == "a pipe" and os.mkfifo(marker)
        refused("not of this version of reidlib: remove it", ds.load, "synthetic")


# --- zips


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg", "link"],
)
def test_zip_that_leaves_its_folder_is_refused(name, data):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16 if name == "link" else 0
    with zipfile.ZipFile(data / "set.zip", "w") as z:
        z.writestr("bounding_box_train/0002_c1s1_000451_03.jpg", b"good")
        z.writestr(member, "/etc")
    refused(f"is refused: {re.escape(name)} would leave the folder", ds.load, "set.zip")
    assert sorted(p.name for p in data.parent.rglob("*")) == ["data", "set.zip"]


@pytest.mark.parametrize("damage", ["short", "flipped", "text"])
def test_broken_zip_is_named_and_leaves_nothing(damage, data):
    archive = data / f"{MARKET_FOLDER}.zip"
    zipped(archive, small_market(data.parent / "source"))
    whole, middle = archive.read_bytes(), archive.stat().st_size // 2
    flipped = whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 20])
    flipped += whole[middle + 20 :]
    changed = {"short": whole[:-200], "flipped": flipped, "text": b"<html>please sign in</html>"}
    archive.write_bytes(changed[damage])
    refused(f"cannot unpack {archive}.*Download it again", ds.load, "market1501")
    assert os.listdir(data) == [archive.name]


def test_zip_that_unpacks_to_more_than_pictures_do_is_refused(data):
    with zipfile.ZipFile(data / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for number in range(4):
            z.writestr(f"1/{number}.bmp", bytes(30_000_000))
    refused("bomb.zip is refused: it unpacks to 120 MB.* 102 at most", ds.load, "bomb.zip")
    assert os.listdir(data) == ["bomb.zip"]


@pytest.mark.parametrize("asked", ["market1501", f"{MARKET_FOLDER}.zip"])
def test_zip_that_was_replaced_is_unpacked_anew(asked, data):
    archive, source = data / f"{MARKET_FOLDER}.zip", small_market(data.parent / "source")
    zipped(archive, source)
    before = ds.load(asked)
    pictures(source, "query/0003_c3s1_000001_00.jpg")
    zipped(archive, source)
    after, again = ds.load(asked), ds.load(asked)
    assert (len(before.query), len(after.query), len(again.query)) == (2, 3, 3)
    (aside,) = data.glob("*.replaced-*")  # with whatever was changed in it by hand
    assert len(ds.load(aside).query) == 2


# --- folders


NAMED, NUMBERS = "cameras are names and were numbered", r"^(?P<pid>\d+)_c(?P<camid>\d)"
# Pictures in a folder `own`, the pattern, what is read (pid:camid of each split), and a note.
# fmt: off
READ = [
    *((f"{a}/1_c1.jpg {b}/2_c2.jpg {c}/3_c3.jpg 2/2_c2.jpg", NUMBERS, "1:1|2:2|3:3",
       "In own/ not read, no part of the split: 2.")
      for a, b, c in (("Train", "QUERY", "Gallery"), ("image_train", "image_query", "image_test"),
                      ("TrainingSet", "probe", "testing"), ("bounding_box_train", "Query", "TEST"))),
    ("train/5-left.png train/5-door.png query/5-left.png gallery/5-left.png gallery/5-door.png",
     r"(?P<pid>\d+)-(?P<camid>\w+)", "5:1 5:2|5:2|5:1 5:2", f"The {NAMED}: door = 1, left = 2."),
    # identity from the folder, camera by name
    ("train/0007/x_c3.jpg query/12/x_c3.jpg test/12/x_c3.jpg test/-1/x_c3.jpg test/0000/x_c3.jpg",
     r"_c(?P<camid>\d)", "7:3|12:3|-1:3 0:3 12:3", ""),
    (" ".join(f"{folder}/0005_c2_f0046182.jpg" for folder in SMALL), NUMBERS, "5:2|5:2|5:2", ""),
    # One map for all splits, sorted by name, from 1: 0 means distractor.
    ("train/bo/1.jpg train/cy/deep/2.JPEG query/al/1.jpg gallery/al/2.jpg gallery/di/1.jpg", None,
     "2:-1 3:-1|1:-1|1:-1 4:-1",
     "The identities are names and were numbered: al = 1, bo = 2, cy = 3, di = 4."),
]
# fmt: on


@pytest.mark.parametrize(("names", "pattern", "expected", "note"), READ)
def test_folders_are_read(names, pattern, expected, note, data):
    pictures(data / "own", *names.split())
    got = ds.load("own", pattern=pattern)
    shown = [" ".join(f"{r.pid}:{r.camid}" for r in t.itertuples()) for t in got.splits.values()]
    assert "|".join(shown) == expected and note in (*got.notes, "")
    assert ("label" in got.train) == ("identities are names" in note)
    blind = (got.train.camid == -1).all()
    assert ("No camera is known: camid is -1 everywhere." in got.notes) == blind
    assert ("warning: Without cameras nothing is excluded" in str(check(got))) == blind


def test_queries_are_drawn_from_a_test_that_has_none_a_list_or_a_folder(data):
    names = [f"{s}/{p}{i}.jpg" for s in ("train", "test") for p in ["ab/", "cd/"] for i in "12"]
    names.append("test/0/1.jpg")  # among names no number, so a distractor
    root = pictures(data / "own", *names)
    folders, again = ds.load("own"), ds.load("own")
    assert ds.fingerprint(folders) == ds.fingerprint(again) and len(folders.train) == 4
    assert len(folders.query) == folders.query.pid.nunique() == 2 and len(folders.gallery) == 3
    for split in ("train", "test"):
        rows = [f"{name.split('/')[1]},{name}" for name in names if name.startswith(split)]
        (root / f"{split}.csv").write_text("\n".join(rows))
    got = ds.load("own")
    assert got.query["path"].tolist() == folders.query["path"].tolist()
    assert "No queries are given: 2 were drawn from the test with seed 0." in got.notes
    (root / "test.csv").rename(root / "gallery.csv")  # which has had queries
    (root / "test").rename(root / "images")
    refused("query and gallery go together", ds.load, "own")


def test_each_real_picture_is_read_once(data):
    root = pictures(data / "own", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", ".store/c/1.jpg")
    pictures(data.parent / "far", "1.jpg", "2.jpg")
    links = {"a/loop": "..", "a/same.jpg": "1.jpg", "b/other": "../a", "c": ".store/c"}
    links |= {"d": "../../far", "d2": "../../far", "b/away.jpg": "../../../far/1.jpg"}
    for link, to in (links | {"b/gone.jpg": "nowhere.jpg"}).items():
        (root / link).symlink_to(to)
    names = [os.path.relpath(path, root) for path in ds.image_list(root).path]
    assert names[:4] == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]
    assert names[4:] == ["b/away.jpg", "b/gone.jpg", "c/1.jpg", "d/2.jpg"]


def test_names_that_are_no_utf8_are_told(data):
    root = pictures(data / "own", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    stray = os.fsencode(root / "a") + b"/\xdf.txt"
    open(stray, "w").close()
    assert "\\udcdf.txt" in ds.load("own").notes[0].encode().decode()
    os.rename(stray, stray.replace(b"txt", b"jpg"))
    refused(r"1 names in .*own are no UTF-8: a/\\udcdf.jpg. Rename", ds.load, "own")


def test_a_query_does_not_find_copies_of_itself(data):
    people = pictures(data / "own", "train/a/1.jpg", "train/b/1.jpg") / "gallery"
    pictures(people, *(f"{p}/{i}.jpg" for p in "cd" for i in "12"))
    for person in "cd":
        (data / "own/query" / person).mkdir(parents=True)
        shutil.copy(people / person / "1.jpg", data / "own/query" / person / "new.jpg")
    got = ds.load("own")
    assert got.query.path.tolist() == [str(people / p / "1.jpg") for p in "cd"]
    assert "2 queries are copies of gallery images, which are left out for them." in got.notes
    assert "error: 2 queries are in the gallery too" in " ".join(str(check(got)).split())


def test_patterns_see_folders_and_make_splits_of_flat_ones(data):
    pictures(data / "deep", *(f"p{p}/cam{c}/{i}.jpg" for p in "1234" for c in "12" for i in "34"))
    got = ds.load("deep", pattern=r"cam(?P<camid>\d)/")
    assert set(pd.concat(got.splits.values()).camid) == {1, 2}
    assert set(got.train.label) < {"p1", "p2", "p3", "p4"}
    pictures(data / "flat", *FLAT)
    got = ds.load("flat", pattern=r"^(?P<pid>[a-z]+)_cam(?P<camid>\d)")
    assert [len(table) for table in got.splits.values()] == [2, 1, 1]
    assert got.query.camid[0] != got.gallery.camid[0]


def test_unsplit_folder_is_split_in_halves(data):
    shots = [f"c{cam}_{shot}.jpg" for cam in (1, 2) for shot in range(3)]
    pictures(data / "own", *(f"p{person}/{shot}" for person in range(1, 8) for shot in shots))
    pictures(data / "own", "solo/c1_0.jpg", "-1/c1_0.jpg", "0000/c1_1.jpg")
    got, again = (ds.load("own", pattern=r"^c(?P<camid>\d)") for _ in range(2))
    assert ds.fingerprint(got) == ds.fingerprint(again)
    assert got.query.pid.nunique() == 4 and got.train.pid.nunique() == 4  # 8 people in halves
    assert not set(got.train.pid) & set(got.gallery.pid)
    assert "solo" in set(got.train.label)  # nobody could match it
    assert not got.query.duplicated(["pid", "camid"]).any() and len(got.query) == 8
    assert sorted(got.gallery.pid)[:2] == [-1, 0]
    everything = pd.concat(got.splits.values()).path
    assert len(everything) == everything.nunique() == 7 * 2 * 3 + 3
    assert check(got).ok and any("halves with seed 0" in note for note in got.notes)
    picture(data / "own" / "preview.jpg")
    blind = ds.load("own")  # without cameras: one query each
    assert len(blind.query) == blind.query.pid.nunique() == 4
    assert any("in no identity's folder: preview.jpg" in note for note in blind.notes)


@pytest.mark.slow
def test_a_pattern_goes_with_the_run(data, tmp_path, monkeypatch):
    from reidlib.evaluation.scoring import open_run
    from reidlib.training.loop import train

    monkeypatch.setenv("REID_OUTPUTS", str(tmp_path / "outputs"))
    pictures(data / "flat", *(f"{p}_cam{c}_{i}.jpg" for p in "abcd" for c in "12" for i in "12"))
    small = dict(hold_out=0, height=32, width=16, p=2, k=2, dim=8, steps=1, precision="float32")
    recipe = make_recipe("demo", dataset="flat", pattern=r"^(?P<pid>\w)_cam(?P<camid>\d)", **small)
    opened = open_run(train(recipe, show_progress=False), show_progress=False)
    assert opened.query.camid.tolist() == [1, 2] * 2 and opened.own
    again = open_run(opened.folder, data / "flat", pattern=recipe.pattern, show_progress=False)
    assert again.own and again.query.equals(opened.query)


# --- lists


def lists(root, header="", pid=lambda name: name.split("_")[0], extra=lambda name: ""):
    """Lists as triplet-reid writes them, beside a folder of images."""
    for folder, word in zip(SMALL, ("train", "query", "test"), strict=True):
        pictures(root / "images", *SMALL[folder])
        lines = [header] + [f"{pid(n)},images/{n}{extra(n)}" for n in SMALL[folder]]
        (root / f"market1501_{word}.csv").write_text("\n".join(lines))
    return root


PEOPLE = {"-1": "-1", "0000": "0000", "0001": "zoe", "0002": "al", "0003": "bo", "0007": "cy"}


def test_triplet_reid_lists(data):
    lists(data / "lists")
    got, named = ds.load("lists"), ds.load("lists", pattern="market1501")
    assert got.name == "lists" and list(got.gallery.pid) == [-1, 0, 1, 1, 3]
    assert (got.gallery.camid == -1).all()  # never guessed, but said
    assert any('pattern="market1501" would read' in note for note in got.notes)
    assert list(named.gallery.camid) == [1, 3, 1, 2, 1] and list(named.query.camid) == [1, 2]
    assert not named.notes
    third = lists(data / "third", extra=lambda name: ",9")  # the third column is the camera
    assert set(ds.load(third).query.camid) == {9}
    headed = lists(
        data / "headed",
        header="\ufeffpid,path,camid,remark",
        pid=lambda name: PEOPLE[name.split("_")[0]],
        extra=lambda name: f",{re.search('c([0-9])', name)[1]},",
    )
    got = ds.load(str(headed))
    assert list(got.gallery.pid) == [-1, 0, 4, 4, 2] and list(got.query.pid) == [4, 2]
    assert list(got.gallery.label) == ["-1", "0000", "zoe", "zoe", "bo"]
    assert list(got.gallery.camid) == [1, 3, 1, 2, 1] and check(got).ok


NUMBERED = {
    "of pandas": ("7.0 -1.0 0.0 8.00", [7, -1, 0, 8]),
    "from 0": ("0 1 2 10", [1, 2, 3, 11]),
    "with junk": ("0 1 2 -1", [0, 1, 2, -1]),
    "long": ("20261127000000001 20261127000000002 0 -1", [1, 2, 0, -1]),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_identities_of_a_list_stay_apart(case, data):
    pids, expected = NUMBERED[case]
    pictures(data / "own" / "deep", *(f"{i}.jpg" for i in range(4)))
    lines = [f"{pid},deep\\{i}.jpg,{i}.0" for i, pid in enumerate(pids.split())]  # Windows wrote it
    (data / "own" / "train.csv").write_text("\n".join(lines))
    got = ds.load("own").train
    assert got.pid.tolist() == expected and got.camid.tolist() == [0, 1, 2, 3]


TWICE = {
    "pid,path,Path\n1,a.jpg,b.jpg\n": "two.csv, line 2: expected pid,path,path, .*each once",
    "1,a.jpg\n1,b.jpg\n2,a.jpg\n": "two.csv gives images to several identities: .*/a.jpg",
}


@pytest.mark.parametrize("text", TWICE)
def test_what_is_there_twice_in_a_list_is_refused(text, data):
    (data / "two.csv").write_text(text)
    refused(TWICE[text], ds.load, "two.csv")


def test_lists_go_before_folders_and_notes_are_no_lists(data):
    root = lists(data / "lists")
    (root / "test_notes.csv").write_text("date,weather\n2026-11-01,cloudy\n")
    small_market(root / "images")
    (root / "market1501_query.csv").write_text("1,images/query/0001_c1s1_000001_00.jpg\n")
    assert len(ds.load("lists").query) == 1
    (small_market(data / "set") / "test_notes.csv").write_text("date,weather\n")
    assert len(ds.load("set").gallery) == 5


def test_some_lists_alone(data):
    root = lists(data / "lists")
    got = ds.load(str(root / "market1501_train.csv"), pattern="market1501")
    assert len(got.train) == 8 and len(got.query) == len(got.gallery) == 0
    assert got.query.pid.dtype == np.int64 and list(got.query) == ["path", "pid", "camid"]
    assert "No list for query and gallery was given: this data set can train" in got.notes[0]
    assert check(got).ok and check(got).counts.images["query"] == 0
    refused("has no test: 0 queries and 0 gallery images", lambda: got.test)
    (root / "market1501_train.csv").unlink()
    assert "for train was given: this data set can test, not train." in ds.load("lists").notes[0]


def test_image_root_and_lists_elsewhere(data, tmp_path):
    root, csv = lists(data / "root"), str(tmp_path / "csv")
    shutil.copytree(root, csv, ignore=lambda *_: ["images"])
    refused("image_root goes with CSV lists", ds.image_list, root, image_root=str(root))
    refused("8 of 8 images in .* do not exist.*image_root", ds.load, csv)
    got = ds.load(csv, image_root=str(root))
    assert got.root == root and len(got.gallery) == 5


def test_image_list_of_folder_and_csv(data):
    root, list_file = lists(data / "lists"), data / "lists" / "list.csv"
    plain = ds.image_list(root / "images")
    assert set(plain.pid) == set(plain.camid) == {-1} and len(plain) == 15
    named = ds.image_list(root / "images", pattern="market1501")
    assert list(named.pid)[:4] == [-1, 0, 1, 1] and list(named.camid)[:4] == [1, 3, 1, 1]
    assert list(ds.image_list(root / "market1501_query.csv").pid) == [1, 3]
    names = plain.path.tolist()
    for text in ("\n".join(["path", *names]), "\n".join(f"{row},x" for row in ["path", *names])):
        list_file.write_text(text)
        unlabelled = ds.image_list(list_file)
        assert unlabelled.path.tolist() == names
        assert set(unlabelled.pid) == set(unlabelled.camid) == {-1}
    list_file.write_text(f"ann,images/{SMALL['query'][0]}\n")
    refused("names its identities", ds.image_list, list_file)
    (data / "empty").mkdir()
    refused("holds no images", ds.image_list, data / "empty")


# --- images


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    kinds = {"L": "jpg", "CMYK": "jpg", "P": "png", "RGBA": "png", "1": "png", "LA": "png"}
    for mode, suffix in (kinds | {"RGB": "webp"}).items():
        pixels = read_image(picture(tmp_path / f"{mode}.{suffix}", mode=mode))
        assert pixels.shape == (16, 8, 3) and pixels.dtype == np.uint8, mode
        if mode in ("L", "1", "LA"):
            assert (pixels[..., 0] == pixels[..., 2]).all() and pixels.std() > 0
    Image.fromarray(np.array([[0, 256 * 7, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 1].tolist() == [0, 7, 255]
    Image.fromarray(np.array([[0, 16 * 7, 4095]], np.uint16)).save(tmp_path / "twelve.png")
    assert read_image(tmp_path / "twelve.png")[0, :, 1].tolist() == [0, 7, 255]
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "red.jpg").astype(int) - [255, 0, 0]).max() < 12


def test_exif_orientation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (16, 8), (255, 255, 255)), Image.Exif()
    image.paste((0, 0, 0), (0, 0, 8, 8))  # the left half is black
    exif[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = read_image(tmp_path / "turned.jpg")
    assert pixels.shape == (16, 8, 3)
    assert pixels[:6].mean() < 30 and pixels[-6:].mean() > 225  # left has gone up


BROKEN = {
    "cut.jpg": (lambda whole: whole[: len(whole) // 2], "image file is truncated"),
    "start.jpg": (lambda whole: whole[:20], "."),
    "text.jpg": (lambda whole: b"<html>sign in</html>", "no image format that Pillow knows"),
    "head.png": (lambda whole: b"\x89PNG\r\n\x1a\n", "."),
    "gone.jpg": (None, "there is no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named_with_the_cause(name, tmp_path):
    path, (change, cause) = picture(tmp_path / name, size=(64, 128)), BROKEN[name]
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {cause}") as caught:
        read_image(path)
    assert str(caught.value).count(str(tmp_path)) == 1


def test_numbers_that_are_no_photograph_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    refused("mode F", read_image, tmp_path / "float.tiff")


# --- checks


def test_check_finds_nothing_in_a_good_set_and_names_unreadable_images(data):
    root = small_market(data / "set")
    good = check(ds.load("set"))
    assert good.ok and good.problems.empty and good.unreadable == {}
    counts = {"images": 5, "identities": 2, "cameras": 3, "junk": 1, "distractors": 1}
    assert good.counts.loc["gallery"].to_dict() == counts
    assert "15 of 15 images decoded." in str(good)
    assert str(good).endswith("OK (errors: 0, warnings: 0, notes: 0).")
    for i in range(12):
        (root / "query" / f"0001_c{i}s2_000001_00.jpg").write_bytes(b"")
    got = ds.load("set")
    seen = []
    report = check(got, progress=lambda items, total: seen.append(total) or items)
    assert seen == [27] and not report.ok and len(report.unreadable) == 12
    assert re.search("error:   12 images cannot be read.* and 2 more.*drop_unread", str(report))
    assert str(report).count(".jpg (no image format") == 10 and "NOT OK (errors: 1" in str(report)
    mended = drop_unreadable(got, report)
    assert rows(mended.query) == [("0001_c1s1_000001_00.jpg", 1, 1), (SMALL["query"][1], 3, 2)]
    assert isinstance(mended.query.index, pd.RangeIndex) and len(mended.gallery) == 5
    assert "12 unreadable images left out" in mended.notes[-1]
    assert check(mended).ok and check(got, decode=False).ok  # not looked at
    for path in (root / "query").iterdir():
        path.write_bytes(b"")
    refused("no image of query", drop_unreadable, got, check(got))


WRONG_COUNTS = [
    ("query", 3362, r"3,362 .*6 files that end in \.jpg\.jpg are lost"),
    ("gallery", 19714, r"19,714 .*18 files that end in \.jpg\.jpg are lost"),
    ("gallery", 15913, "15,913 .*The junk images are left out; scores stay"),
    ("train", 8, "8 images, Market-1501 has 12,936: .*Unpack the original"),
]


@pytest.mark.parametrize(("split", "size", "cause"), WRONG_COUNTS)
def test_check_compares_market_with_its_counts(split, size, cause, data):
    few = ds.load(small_market(data / MARKET_FOLDER))
    many = few.splits[split].iloc[np.zeros(size, int)].reset_index(drop=True)
    report = check(replace(few, **{split: many}), decode=False)
    assert check(few).ok  # a part of Market-1501 is still a data set
    assert re.search(f"warning: {split} has {cause}", str(report))


TRAIN = [(f"/t{p}{i}", p, 1 + i % 2) for p in (1, 2, 3) for i in range(4)]
FEW = [("/a", 4, 1), ("/b", 5, 1), ("/c", 5, 1), ("/c", 5, 1), ("/j", -1, 1), ("/d", 0, 2)]
QUERY = [("/q7", 7, 1), ("/q8", 8, 1), ("/q9", 9, 2)]
GALLERY = [("/g7", 7, 1), ("/g8", 8, 1), ("/g8b", 8, 3), ("/g0", 0, 1)]


def blind(rows):
    return [(path, pid, -1) for path, pid, _ in rows]


OVERLAP = [TRAIN, [("/q", 3, 1)], [("/g", 3, 2), ("/h", 0, 1)]]
# fmt: off
CHECKED = {
    "nothing": ([TRAIN], []),
    "one person": ([TRAIN[:4]], ["error: training has fewer than two identities"]),
    "few images": ([TRAIN + FEW], [
        "error: 1 images in train have pid -1, junk",
        "warning: 1 images are listed twice in train: /c.",
        "warning: 1 images in train have pid 0, distractor",
        "warning: 1 training identities have one image: 4.",
        "note: 1 training identities have fewer than K = 4 images: 5."]),
    "overlap": (OVERLAP, ["error: 1 identities are in training and in test: 3."]),
    "some lost": ([TRAIN, QUERY, GALLERY], [
        "warning: 2 of 3 queries have no match in another camera; identities: 7, 9."]),
    "all lost": ([TRAIN, QUERY[:1], GALLERY], [
        "error: 1 of 1 queries have no match in another camera; identities: 7."]),
    "blind": ([TRAIN, blind(QUERY), blind(GALLERY)], [
        "warning: Without cameras nothing is excluded",
        "warning: 1 of 3 queries have no match in the gallery; identities: 9."]),
    "found again": ([TRAIN, blind(QUERY), blind(QUERY + GALLERY)], [
        "error: 3 queries are in the gallery too: /q7, /q8, /q9.",
        "warning: Without cameras nothing is excluded"]),
}
# fmt: on


@pytest.mark.parametrize("case", CHECKED)
def test_check_says_what_is_wrong_and_nothing_else(case):
    splits, lines = CHECKED[case]
    made = ds.Dataset("made", Path("/made"), *map(table, [*splits, [], []][:3]))
    problems = check(made, k=4, decode=False).problems
    said = [f"{r.severity}: {r.problem}" for r in problems.itertuples()]  # errors first
    assert len(said) == len(lines) and problems.advice.all(), said
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True)), said


# --- hold out, fingerprint


def test_hold_out_gives_every_query_a_match_and_touches_nothing_else():
    rng = np.random.default_rng(0)
    train = table((f"/{i}", rng.integers(-1, 40), rng.integers(1, 4)) for i in range(150))
    train = train.sample(frac=1, random_state=1)  # an index out of order
    before = train.copy()
    for seed in range(20):
        rest, query, gallery = ds.hold_out(train, 20, seed=seed)
        assert query.pid.nunique() == 20 and (query.pid > 0).all()
        assert not set(rest.pid) & set(query.pid) and set(gallery.pid) == set(query.pid)
        assert sorted([*rest.path, *query.path, *gallery.path]) == sorted(train.path)
        assert not query.duplicated(["pid", "camid"]).any()
        for pid, camid in zip(query.pid, query.camid, strict=True):
            assert ((gallery.pid == pid) & (gallery.camid != camid)).any()
        again = ds.hold_out(train, 20, seed=seed)
        assert all(a.equals(b) for a, b in zip((rest, query, gallery), again, strict=True))
    assert not again[1].equals(ds.hold_out(train, 20, seed=99)[1])
    pd.testing.assert_frame_equal(train, before)


def test_hold_out_takes_one_query_a_camera_as_market_does():
    _, query, gallery = ds.hold_out(shots([1, 2]), 1)
    assert sorted(query.camid) == sorted(gallery.camid) == [1, 2]
    _, query, gallery = ds.hold_out(shots([1, 2]).assign(camid=-1), 1)
    assert len(query) == 1 and len(gallery) == 3


@pytest.mark.parametrize("identities", [0, -1, 2, 3])
def test_hold_out_of_too_many_is_refused(identities):
    train = table([("/a", 1, 1), ("/b", 1, 2), ("/c", 2, 1), ("/d", 2, 1)])
    refused(f"cannot hold out {identities} of 2.*: 1 have images", ds.hold_out, train, identities)


def test_a_file_names_the_held_out_identities(tmp_path):
    train, file = shots([1, 2, 3]), tmp_path / "mine.txt"
    file.write_text("# two people\n3\n1  # and one more\n")
    rest, query, gallery = ds.hold_out(train, str(file))
    assert set(rest.pid) == {2} and set(query.pid) == set(gallery.pid) == {1, 3}
    wrong = {"7": "names 1 identities, first 7", "x": "one identity", "1\n1": "twice"}
    wrong |= {"# none": "no identity", "1\n2\n3": "cannot hold out 3"}
    for text, message in wrong.items():
        file.write_text(text)
        refused(message, ds.hold_out, train, str(file))
    os.mkfifo(tmp_path / "pipe")
    refused("nowhere", ds.hold_out, train, "nowhere")
    refused("names no identity", ds.hold_out, train, str(tmp_path / "pipe"))


def test_the_split_of_market1501_is_fixed():
    pids = ds.split_file("market1501")
    assert (len(pids), pids.min(), pids.max(), pids.sum()) == (101, 10, 1496, 75903)


@needs_market
def test_the_split_of_market1501_gives_the_same_images_everywhere():
    train = ds.load(MARKET).train
    rest, query, gallery = ds.hold_out(train, "market1501")
    assert (len(rest), rest.pid.nunique(), len(query), len(gallery)) == (11265, 650, 380, 1291)
    assert ds.fingerprint(query).startswith("9cb2cb45c873365e")


def test_fingerprint_compares_across_machines_and_sees_changes(data):
    one, two = (ds.load(small_market(data / place)) for place in ("one", "two/deeper"))
    table, path, see = one.train, Path(one.train.path[0]), ds.fingerprint
    assert see(one) == see(two) and see(table) == see(two.train) != see(one.query)
    before, dated = see(table), see(table, mtime=True)
    assert re.fullmatch("[0-9a-f]{64}", before)
    others = [table.assign(**{column: table[column] + 1}) for column in ("pid", "camid")]
    assert len({before, dated, *map(see, [table[::-1], *others])}) == 5  # order counts
    os.utime(path, ns=(1, 1))
    assert see(table) == before and see(table, mtime=True) != dated
    path.write_bytes(path.read_bytes() + b"x")
    assert see(table) != before
