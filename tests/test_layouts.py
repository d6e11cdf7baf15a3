"""Data sets by their names, several at once, and a tracker's crops, on trees that the library draws.

None of the originals but Market-1501 can be had here: their layouts and names are drawn, small.
"""

import itertools
import json
import os
import shutil
from functools import lru_cache
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidlib.__main__ import main
from reidlib.data import tables as ds
from reidlib.data.check import check
from reidlib.data.layouts import LAYOUTS
from reidlib.data.pixels import image_sizes, load_images, read_image
from reidlib.data.synthetic import draw_person
from reidlib.model.stored import read_embeddings
from reidlib.model.weights import build_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.recipes import DATA_SETS, located, make_recipe
from reidlib.runs import read_json, write_json

pytestmark = pytest.mark.usefixtures("data")


@lru_cache
def drawn(pid, camera, n, kind):
    file = BytesIO()
    Image.fromarray(draw_person(pid + 1, camera, n, seed=0, size=(32, 16))).save(file, kind)
    return file.getvalue()


# How each calls its pictures, and the people of training and of test.
MARKET = "{p:04d}_c{c}s1_{n:06d}_00.jpg", [2, 7], [1, 3]
DUKE = "{p:04d}_c{c}_f{n:07d}.jpg", [1, 5], [2, 6]
MSMT = "{p:04d}/{p:04d}_{n:03d}_{c:02d}_0303morning_{n:04d}_0.jpg", [0, 1], [0, 1]
CUHK = "{p:04d}_c{c}_{n}.png", [4, 8], [3, 9]
VERI = "{p:04d}_c{c:03d}_{n:08d}_0.jpg", [1, 4], [2, 5]
NAMES = {"market": MARKET, "dukemt": DUKE, "occlud": DUKE, "cuhk03": CUHK, "msmt17": MSMT}


def tree(root, name):
    """Draw a data set in its layout: each person twice in two cameras, of whom one is a query."""
    layout = LAYOUTS[name]
    form, *people = NAMES.get(name[:6], VERI)
    for split, (word, folders) in enumerate(layout.folders.items()):
        names = []
        for folder in folders.split("+"):
            who = [0] if folder == "images" else people[split > 0]
            numbers = [(1, 2), (1,), (2,)][split]
            for p, c, n in itertools.product(who, (1, 2), numbers):
                names.append(form.format(p=p, c=c, n=n))
                path = root / layout.below / folder / names[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = path.suffix.replace("jpg", "jpeg")[1:]
                path.write_bytes(drawn(p + 10 * bool(split), c, n, kind))
        files = layout.lists.get(word, "").split("+")
        for file, part in zip(files, np.array_split(names, len(files)), strict=True):
            if file:
                (root / file).write_text("".join(f"{n} {int(n[:4])}\n" for n in part))
    return root


OF_THE_TABLE = [name for name in LAYOUTS if name != "msmt17_v1"]  # which is msmt17 itself


@pytest.mark.parametrize("name", OF_THE_TABLE)
def test_data_sets_are_loaded_by_name_and_by_path(name, data):
    assert {"synthetic", *LAYOUTS} == {*DATA_SETS}
    layout = LAYOUTS[name]
    assert {*vars(layout)} == {*vars(LAYOUTS["market1501"])}, "a fact is misspelt"
    root = tree(data / layout.folder, name) / layout.below
    got = ds.load(name)
    assert got.name == name and got.root.samefile(root)
    sizes = [len(table) for table in got.splits.values()]
    assert sizes == [8, 4, 6 if "+500k" in name else 4]
    assert {*got.query.pid} == {*got.gallery.pid} - {0} and not {*got.query.pid} & {*got.train.pid}
    assert all({*table.camid} == {1, 2} for table in got.splits.values())
    assert layout.said in (*got.notes, "")
    report = check(got)
    assert report.ok and (report.problems.severity == "warning").sum() == 3
    for (split, wanted), found in zip(layout.images.items(), sizes, strict=True):
        assert f"{split} has {found} images, {layout.title} has {wanted:,}" in str(report)
    if "+" not in name:
        for place in {root, data / layout.folder, data}:
            again = ds.load(place)
            assert again.name == name and ds.fingerprint(again) == ds.fingerprint(got)


def test_msmt17_says_which_version_it_is(data):
    tree(data / "msmt17" / "MSMT17_V2", "msmt17_v2")
    got = ds.load("msmt17")
    assert got.name == "msmt17_v2" and "MSMT17 V2, with faces masked" in " ".join(got.notes)
    assert got.train.pid.tolist() == [3] * 4 + [4] * 4
    assert {*got.query.label} == {"test 0000", "test 0001"}
    tree(data / "msmt17" / "MSMT17_V1", "msmt17")
    assert [ds.load(name).name for name in ("msmt17", "msmt17_v2")] == ["msmt17", "msmt17_v2"]
    with pytest.raises(ValueError, match="holds several data sets, give one: .*V1.*V2"):
        ds.load(data / "msmt17")
    shutil.copytree(data / "msmt17" / "MSMT17_V1", data / "mine" / "train_test")
    assert ds.load(data / "mine" / "train_test").name == "msmt17"  # its lists say so
    shutil.rmtree(data / "msmt17" / "MSMT17_V2")
    with pytest.raises(FileNotFoundError, match="MSMT17_V1 is MSMT17 V1: ask for msmt17"):
        ds.load("msmt17_v2")
    assert ds.load("msmt17_v1").name == "msmt17"
    shutil.move(data / "msmt17" / "MSMT17_V1", data.parent)
    tree(data / "MSMT17_V1", "msmt17_v2")  # in the wrong folder
    with pytest.raises(FileNotFoundError, match="MSMT17_V1 is MSMT17 V2: ask for msmt17_v2"):
        ds.load("msmt17_v1")


def moved(old, new):
    return lambda root: shutil.move(root / old, root / new)


def removed(name):
    return lambda root: (shutil.rmtree if (root / name).is_dir() else os.remove)(root / name)


def emptied(name):
    return lambda root: (root / name).write_text("\n")


# fmt: off
WRONG = [
    ("msmt17", removed("list_val.txt"), "MSMT17 V1 in .*MSMT17_V1 lacks list_val.txt: there is "),
    ("msmt17", emptied("list_query.txt"), "list_query.txt names no image"),
    ("msmt17", moved("test", "probe"), "MSMT17_V1 lacks test: there is .*probe"),
    ("msmt17", moved("train", "training"), "called like MSMT17 V1, and has no folder train .*training"),
    ("msmt17", removed("train/0000"), "train lacks 4 of the 8 images of its list: 0000/0000_001"),
    ("msmt17_v2", moved("mask_test_v2", "test"), "MSMT17 V2 in .* lacks mask_test_v2: .*test"),
    ("veri776", removed("name_test.txt"), "VeRi-776 in .* lacks name_test.txt"),
    ("veri776", moved("image_train", "train"), "called like VeRi-776, .* no folder image_train .*train"),
    ("veri776", removed("image_query/0002_c001_00000001_0.jpg"), "image_query lacks 1 of the 4 images"),
    ("dukemtmcreid", removed("query"), "DukeMTMC-reID in .* lacks query: there is bounding_box_test"),
    ("dukemtmcreid", moved("query", "bounding_box_train/1"), "lacks query"),
    ("occluded_duke", moved("bounding_box_test", "gallery"), "Occluded-Duke in .* lacks bounding_box_test"),
    ("cuhk03", moved("detected/query", "detected/probe"), "detected lacks query: there is .*probe"),
    ("market1501+500k", removed("images"), "Market-1501.500k in .* lacks images: there is "),
    ("dukemtmcreid", moved("query/0002_c1_f0000001.jpg", "query/me.jpg"), "1 of 4 image names .* me.jpg"),
]
# fmt: on


@pytest.mark.parametrize(("name", "damage", "message"), WRONG)
def test_what_is_wrong_in_a_layout_is_named(name, damage, message, data):
    damage(root := tree(data / LAYOUTS[name].folder, name))
    for asked in (name, root):
        if asked != root or "+" not in name:
            with pytest.raises((FileNotFoundError, ValueError), match=message):
                ds.load(asked)


@pytest.mark.parametrize("name", ["msmt17", "veri776", "cuhk03", "dukemtmcreid"])
def test_capitals_an_extra_level_and_a_zip_are_no_matter(name, data):
    layout = LAYOUTS[name]
    root = tree(data / "up" / layout.folder, name)
    deep = shutil.move(root, data / layout.folder / "inner" / layout.folder)
    for path in sorted(deep.rglob("*"), reverse=True):
        if (path.is_dir() or path.suffix == ".txt") and not path.name.isdigit():
            path.rename(path.with_name(path.name.upper()))
    got = ds.load(name)
    assert len(got.train) == 8 and got.root.is_relative_to(deep)
    shutil.make_archive(data / layout.folder, "zip", data / layout.folder)
    shutil.rmtree(data / layout.folder)
    assert ds.fingerprint(ds.load(name)) == ds.fingerprint(got)


def refused(message, asked, **options):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        ds.load(asked, **options)


def test_what_is_not_there_is_told(data):
    refused("not in .*its authors withdrew it, so no download is", "dukemtmcreid")
    refused("no 'msmt71'.*veri776; did you mean 'msmt17'", "msmt71")
    refused("are for your own data, not for 'veri776'", "veri776", pattern="x")
    tree(data / "cuhk03-np", "cuhk03_labeled")
    refused(r"labeled is CUHK03 .*labelled\): ask for cuhk03_labeled", "cuhk03")
    tree(data / "Occluded_Duke", "occluded_duke")
    duke = tree(data / "duke" / "DukeMTMC-reID", "dukemtmcreid")
    assert ds.load("dukemtmcreid").root == duke
    many = ds.load("occluded_duke")
    many = ds.replace(many, train=many.train.iloc[np.zeros(16522, int)].reset_index(drop=True))
    assert "Occluded-Duke has 15,618: scores" in " ".join(str(check(many, decode=False)).split())
    assert "DukeMTMC-reID has so many: is it that?" in str(check(many, decode=False))


# --- tables of wildlife-datasets


def table(root, text, name="metadata.csv"):
    root.mkdir(exist_ok=True)
    for n in range(8):
        (root / f"{n}.jpg").write_bytes(drawn(n // 2, 1, n, "jpeg"))
    (root / name).write_text(text)
    return root


PLAIN = "identity,path\n" + "".join(f"{n // 2},{n}.jpg\n" for n in range(8))


def rows(*cells):
    return ",image_id,identity,path,date,split\n" + "\n".join(
        f"{n},{n},{who},{n}.jpg,2024-01-01,{split}" for n, (who, split) in enumerate(cells)
    )


def test_wildlife_tables_are_taken_as_they_come(data):
    told = [("Dan", "train"), ("Dan", "train"), ("Eva", "train"), ("unknown", "train")]
    told += [("Rex", "test"), ("Rex", "test"), ("", "test"), ("Ida", "val")]
    root = table(data / "wild", rows(*told))
    for asked in (root, root / "metadata.csv"):
        got = ds.load(asked)
        assert [len(t) for t in got.splits.values()] == [3, 1, 2] and got.name == "wild"
        assert {*got.train.label} == {"Dan", "Eva"} and sorted(got.gallery.pid)[0] == -1
        assert "2 rows are left out, of split 'train', 'val'" in " ".join(got.notes)
    both = [("a", "database"), ("b", "database"), ("a", "query"), ("b", "query")]
    got = ds.load(table(data / "asked", rows(*both)))
    assert [len(t) for t in got.splits.values()] == [0, 2, 2]
    blind = [("a", "database"), ("b", "database"), ("", "query")]
    assert len(ds.load(table(data / "blind", rows(*blind))).train) == 2
    whole = ds.load(table(data / "whole", PLAIN))
    assert "split in halves" in " ".join(whole.notes) and len(whole.train) == 4


def test_boxes_of_wildlife_tables_are_cut(data):
    lines = [f'{n // 2},{n}.jpg,"[{n}, -2.0, 6.5, 20]"' for n in range(8)]
    lines.append('9,0.jpg,"[8, 2, 6, 20]"')  # two animals in one picture
    got = ds.load(table(data / "wild", "\n".join(["identity,path,bbox", *lines])))
    assert any("9 images are cut to their bbox" in note for note in got.notes)
    path = next(p for p in got.train.path if "0,0,7,18" not in p and ",0," in p)
    left = int(os.path.basename(path)[0])
    whole = read_image(path.split("#")[0])
    assert np.array_equal(read_image(path), whole[0:18, left : left + 7])
    assert check(got).decoded and not check(got).unreadable


ONE = rows(("a", "train"))
TOO_LITTLE = {
    rows(("a", "fold1"), ("b", "fold2")): "split says fold1, fold2: it must say train, test",
    rows(("a", "train"), ("b", "query")): "column split says query, train",
    ONE + "\n1,1,b,gone.jpg,2024-01-01,train": "1 of 2 images in .* do not exist",
    ONE + "\n1,1,b": "line 3: expected",
}


@pytest.mark.parametrize("text", TOO_LITTLE)
def test_a_wildlife_table_that_says_too_little_is_refused(text, data):
    refused(TOO_LITTLE[text], table(data / "wild", text))


# --- several at once


@pytest.fixture
def both(data):
    tree(data / "Market-1501-v15.09.15", "market1501")
    tree(data / "MSMT17_V1", "msmt17")
    return "market1501,msmt17"


def test_people_and_cameras_of_several_data_sets_are_kept_apart(both, data):
    one, other, got = ds.load("market1501"), ds.load("msmt17"), ds.load("market1501, msmt17")
    assert got.name == "market1501+msmt17" and [*got.parts] == ["market1501", "msmt17"]
    for split, table in got.splits.items():
        mine, theirs = table[table.dataset == "market1501"], table[table.dataset == "msmt17"]
        assert mine.pid.tolist() == one.splits[split].pid.tolist() and {*theirs.camid} == {4, 5}
        assert (theirs.pid - 7).tolist() == other.splits[split].pid.tolist()
    said = " ".join(str(check(got)).split())
    assert "train has 8 images, Market-1501 has 12,936" in said and "MSMT17 V1 has 82,161" in said
    assert "8 train, 4 query, 4 gallery; numbers of people are 7 higher here, those of cam" in said
    assert check(got).ok
    before = ds.fingerprint(got), ds.fingerprint(got.train)
    shutil.move(data / "MSMT17_V1", data.parent / "MSMT17_V1")
    again = ds.load(f"market1501,{data.parent / 'MSMT17_V1'}")
    assert (ds.fingerprint(again), ds.fingerprint(again.train)) == before


def test_data_sets_that_do_not_go_together_are_refused(both, data):
    table(data / "wild", PLAIN)
    refused("no .. in", "market1501,")
    refused("two have one name, or the same people", "market1501,market1501")
    refused("wild: no cameras, and others have them", "market1501,wild")
    refused("did you mean", "market1501,msmt71")
    tree(data / "Market-1501-v15.09.15", "market1501+500k")
    refused("or the same people", "market1501,market1501+500k")


def test_settings_keep_the_place_of_each_data_set(data, monkeypatch):
    monkeypatch.chdir(data)
    table(data / "own, mine", "")
    table(data / "market1501", "")
    recipe = make_recipe("demo", dataset="market1501,own, mine")
    assert located(recipe).dataset == "market1501,own,mine"  # nothing of this name is there
    table(data / "own", "")
    assert located(recipe).dataset == f"market1501,{data / 'own'},mine"
    assert located(make_recipe("demo", dataset="own, mine")).dataset == str(data / "own, mine")


@pytest.mark.slow
def test_a_run_on_several_is_scored_on_each(both, data, monkeypatch, capsys):
    from reidlib.evaluation.scoring import open_run, score_run
    from reidlib.training.loop import train
    from reidlib.workbook.scores import scores_text

    monkeypatch.setenv("REID_CACHE", str(data / ".cache"))
    small = dict(hold_out=0, height=32, width=16, p=4, k=2, dim=8, steps=1, precision="float32")
    run = train(make_recipe("demo", dataset=both, **small), show_progress=False)
    assert run.name == "market1501+msmt17_batchhard_softplus"
    assert main(["score", run.name, "--no-baselines"]) == 0
    each = json.loads(capsys.readouterr().out)["by_data_set"]
    assert each == read_json(run / "metrics.json")["by_data_set"] and len(each) == 2
    opened = open_run(run, show_progress=False)
    assert opened.own and len(opened.query) == 8
    for name, scores in each.items():
        alone = score_run(run, name, baselines=False, show_progress=False)
        assert alone.scores == scores and alone.place.name.startswith(f"on_{name}_")
        assert f"is one of the data sets that {run.name} was trained on" in alone.run.notes[-1]
    text = scores_text([run])
    assert "market1501 by itself" in text and "msmt17 by itself" in text and "  on_msmt17_" in text


# --- crops of a tracker


BOXES = ["1,1,2,3,10,20,1,1,1", "1,2,20,-4,10,20,1,1,1", "2,1,4,3,10,20,1,1,0.5"]


def sequence(root, lines=BOXES, name="gt", frames=(1, 2)):
    noise = np.random.default_rng(0)
    for number in frames:
        path = root / "img1" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    (root / name).mkdir(exist_ok=True)
    (root / name / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_boxes_of_a_tracker_are_cut_as_they_are_read(data):
    root = sequence(data / "MOT17-02")
    got = ds.image_list(root)
    assert got.pid.tolist() == [1, 2, 1] and {*got.camid} == {-1}
    whole = read_image(root / "img1" / "000001.png")
    assert np.array_equal(read_image(got.path[0]), whole[3:23, 2:12])
    assert np.array_equal(read_image(got.path[1]), whole[0:16, 20:30])
    assert image_sizes([*got.path]) == [(20, 10), (16, 10), (20, 10)]
    assert "1 boxes reach over the edge" in ds.ignored_files(root)
    pixels, _ = load_images(got, make_recipe("demo"), show_progress=False)
    assert len(pixels) == 3 and ds.fingerprint(got, mtime=True) != ds.fingerprint(got.assign(pid=9))
    sequence(root, ["2,-1,1,1,5,5,0.3"], "det")  # MOT17's detections: seven columns
    assert ds.image_list(root).equals(got)  # gt.txt goes first
    assert ds.image_list(root / "det" / "det.txt").pid.tolist() == [-1]
    assert ds.image_list(data / "MOT17-02" / "..").equals(got)  # one level up: there is but one
    sequence(data / "MOT17-04")
    with pytest.raises(ValueError, match="several sequences, give one: .*MOT17-02, .*MOT17-04"):
        ds.image_list(data)
    refused("is a tracker's sequence. `embed --crops FOLDER", root)


def test_what_is_not_to_be_looked_at_is_left_out_with_a_word(data):
    more = ["1,3,2,3,0,20,1", "2,4,50,50,9,9,1", "1,7,2,3,10,20,0,8,1"]
    more += ["2,0,1,1,5.5,5.5,1,-1,-1,-1"]
    root = sequence(data / "seq", [*BOXES, *more])
    assert ds.image_list(root).pid.tolist() == [2, 3, 2, 1]
    said = ds.ignored_files(root)
    assert "2 boxes have no size or lie outside of it and are left out, lines 4, 5." in said
    assert "1 are not to be looked at" in said and "identities begin at 0" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,1,2,3,10", "gt.txt, line 4: expected frame,identity,left,.* got '1,1,2,3,10'"),
        ("1,1,2,3,10,20,1,1,1,1,1", "line 4: expected"),
        ("1 1 2 3 10 20 1", "line 4: expected .* commas between them"),
        ("1,1,2,nan,10,20", "line 4: expected"),
        ("1.5,1,2,3,10,20", "line 4: expected"),
        ("1,-7,2,3,10,20", "line 4: expected"),
        ("9,1,2,3,10,20", "img1 lacks 1 frames that .*gt.txt is of: 9"),
    ],
)
def test_boxes_that_cannot_be_used_are_named(line, message, data):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ds.image_list(sequence(data / "seq", [*BOXES, line]))


def test_a_sequence_that_lacks_a_part_is_told(data):
    root = sequence(data / "seq", ["1,1,90,90,5,5,1"])
    with pytest.raises(ValueError, match="gt.txt has no box that can be cut out. .*lines 1"):
        ds.image_list(root)
    (root / "img1" / "000001.png").write_bytes(b"no")
    with pytest.raises(OSError, match="cannot identify image file .*000001.png"):
        ds.image_list(root)
    shutil.rmtree(root / "gt")
    with pytest.raises(ValueError, match="has frames in img1, and no gt/gt.txt or det/det.txt"):
        ds.image_list(root)
    shutil.rmtree(sequence(root) / "img1")
    with pytest.raises(FileNotFoundError, match="goes with frames in .*img1, which is not there"):
        ds.image_list(root)


def test_search_and_embed_take_a_sequence(data, capsys, monkeypatch):
    monkeypatch.setenv("REID_CACHE", str(data / ".cache"))
    recipe = make_recipe("demo", height=32, width=16, dim=8)
    model = outputs_dir() / "mine" / "weights.safetensors"
    model.parent.mkdir(parents=True)
    save_weights(model, build_model(recipe), recipe)
    write_json(model.with_name("config.json"), recipe.model_dump())
    root, out = sequence(data / "seq"), data / "crops.h5"
    line = f"embed --model {model} --images {root} --out {out} --device cpu".split()
    assert main([*line, "--crops", str(data / "crops")]) == 0
    assert "1 boxes reach over the edge" in capsys.readouterr().err
    assert read_embeddings(out)[1].pid.tolist() == [1, 2, 1]
    crops = sorted(str(p.relative_to(data / "crops")) for p in (data / "crops").rglob("*.jpg"))
    assert crops == ["1/000001_000000.jpg", "1/000002_000002.jpg", "2/000001_000001.jpg"]
    for gallery in (root, out):
        line = f"search --model {model} --query {root} --gallery {gallery} --device cpu"
        assert main(line.split()) == 0
        found = pd.read_csv(BytesIO(capsys.readouterr().out.encode()))
        assert found.status.value_counts().to_dict() == {"wrong": 4, "query itself": 3, "match": 2}
    assert main(["evaluate", "--query", str(out), "--gallery", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["queries_without_match"] == 1
