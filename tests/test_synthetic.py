"""Tests of the drawn data set: names, counts, determinism, protocol, and its folder on disk."""

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from reidlib.data import people, synthetic
from reidlib.data.people import Pen, look, paint_person
from reidlib.data.synthetic import draw_dataset, draw_folder, draw_person
from reidlib.data.tables import load

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
# The pattern that datasets know Market-1501's files by.
NAME = re.compile(r"(-1|\d{4})_c([1-6])s(\d)_(\d{6})_(\d{2})\.jpg")
TINY = dict(train_ids=5, test_ids=6, images_per_camera=2, distractors=8, junk=7)
LEAST = dict(train_ids=1, test_ids=1, images_per_camera=1, distractors=0, junk=0)


def rows(root, folder):
    """Return one (pid, camera) a file; fail on a name that is not Market-1501's."""
    names = sorted(path.name for path in (root / folder).iterdir())
    found = [NAME.fullmatch(name) for name in names]
    assert all(found), [n for n, match in zip(names, found, strict=True) if not match]
    return [(int(match[1]), int(match[2])) for match in found]


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "deep" / "set", **TINY)


def test_layout_names_and_counts(root):
    assert sorted(p.name for p in root.iterdir()) == sorted([*FOLDERS, "dataset.json"])
    train, query, gallery = (Counter(rows(root, folder)) for folder in FOLDERS)
    trained, tested = ({pid for pid, _ in split} for split in (train, query))
    assert (len(trained), len(tested)) == (5, 6)
    assert not trained & tested and min(trained | tested) > 0
    assert {*train.values()} == {2} and {*query.values()} == {1}  # of an identity and a camera
    people = {key: count for key, count in gallery.items() if key[0] > 0}
    assert {*people} == {*query} and {*people.values()} == {2}
    others = [sum(n for (p, _), n in gallery.items() if p == pid) for pid in (0, -1)]
    assert others == [8, 7]


def test_pictures_are_different_rgb_jpegs_of_the_asked_size(root, tmp_path):
    small = draw_dataset(tmp_path / "small", **LEAST, size=(64, 48))
    for folder, size in ((root, (64, 128)), (small, (48, 64))):
        paths = [*folder.rglob("*.jpg")]
        assert len({path.read_bytes() for path in paths}) == len(paths)
        for path in paths:
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)


@pytest.mark.parametrize("cameras", [2, 6])
def test_every_query_has_a_match_in_another_camera(cameras, tmp_path):
    root = draw_dataset(tmp_path / "set", **LEAST | dict(test_ids=12, cameras=cameras))
    query, gallery = rows(root, "query"), rows(root, "bounding_box_test")
    assert {camera for _, camera in query} == set(range(1, cameras + 1))
    for pid, camera in query:
        assert any(p == pid and c != camera for p, c in gallery), (pid, camera)


@pytest.mark.slow
def test_pictures_depend_on_the_seed_and_on_nobody_else(root, tmp_path):
    drawn = files(root)
    assert files(draw_dataset(tmp_path / "again", **TINY)) == drawn
    other = files(draw_dataset(tmp_path / "other", **TINY, seed=1))
    assert not {v for k, v in drawn.items() if k.endswith(".jpg")} & set(other.values())
    more = files(draw_dataset(tmp_path / "more", **TINY | dict(train_ids=7, test_ids=8, junk=0)))
    before = {k: v for k, v in drawn.items() if not re.search(r"/-1_|json$", k)}
    assert before.items() <= more.items() and len(more) > len(before)


def test_many_distractors_and_junk_keep_their_own_names(tmp_path, monkeypatch):
    # Without drawing: only the names matter, and one name twice would lose a file in silence.
    monkeypatch.setattr(synthetic, "draw_person", lambda *a, **k: np.zeros((8, 8, 3), np.uint8))
    settings = LEAST | dict(test_ids=3, cameras=2, distractors=600, junk=400)
    root = draw_dataset(tmp_path / "set", **settings)
    pids = Counter(pid for pid, _ in rows(root, "bounding_box_test"))
    assert (pids[0], pids[-1]) == (600, 400)


def test_what_is_there_is_an_error_and_untouched(tmp_path):
    (tmp_path / "folder").mkdir()
    for file in ("file", "folder/thesis.txt"):
        (tmp_path / file).write_text("the only copy")
    before = files(tmp_path)
    for there in tmp_path.iterdir():
        with pytest.raises(FileExistsError, match=f"{there} is there: remove it, or name another"):
            draw_dataset(there, **TINY)
    assert files(tmp_path) == before


@pytest.mark.parametrize("blow", [KeyboardInterrupt, OSError])
def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch, blow):
    real, calls = draw_person, itertools.count()

    def breaks(*args, **kwargs):
        if next(calls) == 5:
            raise blow
        return real(*args, **kwargs)

    monkeypatch.setattr(synthetic, "draw_person", breaks)
    with pytest.raises(blow):
        draw_dataset(tmp_path / "set", **TINY)
    assert next(calls) > 5 and list(tmp_path.iterdir()) == []


def test_two_at_once_give_one_set(tmp_path, monkeypatch):
    # Another process finishes the same set while this one is about to rename its own.
    real = Path.rename

    def late(source, target):
        if not Path(target).exists():
            monkeypatch.setattr(Path, "rename", real)
            draw_dataset(target, **LEAST)
        real(source, target)

    monkeypatch.setattr(Path, "rename", late)
    root = draw_dataset(tmp_path / "set", **LEAST)
    assert list(tmp_path.iterdir()) == [root]
    assert json.loads((root / "dataset.json").read_text())["train_ids"] == 1


WRONG = {"cameras": (1, 7), "test_ids": (0, 5000), "train_ids": (0, 5000), "size": ((31, 32), 64)}
WRONG |= {"junk": (-1,), "distractors": (-1,), "seed": (-1,), "images_per_camera": (0,)}
WRONG |= {"people": (3,)}


@pytest.mark.parametrize("setting", WRONG)
def test_settings_that_make_no_data_set(tmp_path, setting):
    for bad in WRONG[setting]:
        with pytest.raises(ValueError, match=setting):
            draw_dataset(tmp_path / "set", **TINY | {setting: bad})
    assert list(tmp_path.iterdir()) == []


def test_identities_share_colours_and_differ_otherwise():
    outfits = Counter((who.top, who.bottom) for who in map(look, range(1, 101)))
    assert len(outfits) <= 13 and min(outfits.values()) >= 4  # 13 blocks of 8, the last one cut
    assert len({str(look(pid)) for pid in range(1, 101)}) == 100
    for block in range(1, 12):
        family = [look(pid) for pid in range(8 * block, 8 * block + 8)]
        assert len({(who.top, who.bottom) for who in family}) == 1
        assert {who.pattern for who in family} == set(people.TOLD["patterns"])


def test_draw_person_depends_on_each_of_its_arguments():
    same = dict(pid=2, camera=1, frame=0, seed=0, size=(128, 64))
    picture = draw_person(**same)
    assert picture.shape == (128, 64, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, draw_person(**same))
    assert draw_person(**same | dict(size=(96, 40))).shape == (96, 40, 3)
    for other in (dict(pid=3), dict(camera=2), dict(frame=1), dict(seed=1), dict(bad=True)):
        assert not np.array_equal(picture, draw_person(**same | other)), other


VIEWS = {"front": 0, "right": 90, "back": 180, "left": -90}  # degrees of yaw


def painted(view, **changes):
    """One person on an empty canvas, (128, 64, 3), with changes of its look."""
    plain = dict(cut="tshirt", pattern="plain", hat="", bag="", legs="trousers")
    who = SimpleNamespace(**vars(look(2)) | plain | changes)
    image = Image.new("RGB", (64, 128), (128, 128, 128))
    draw, yaw = ImageDraw.Draw(image, "RGBA"), math.radians(VIEWS[view])
    paint_person(Pen(draw, synthetic.CAMERAS[1], yaw, 32, 5, 1.18), who, 1.0)
    return np.asarray(image)


def test_a_backpack_is_worn_behind():
    def yellow(view, columns):
        worn = dict(bag="backpack", bag_colour=(222, 196, 84), top=(40, 44, 52))
        picture = painted(view, **worn, cut="long", hair_style="short")
        r, g, b = picture[36:58, columns].mean((0, 1))
        return (r + g) / 2 - b

    middle, left, right = slice(24, 40), slice(10, 27), slice(37, 54)
    assert yellow("back", middle) > yellow("front", middle) + 40
    assert yellow("right", left) > yellow("right", right) + 20  # it walks right, the bag trails
    assert yellow("left", right) > yellow("left", left) + 20


@pytest.mark.parametrize("view", VIEWS)
def test_every_appearance_can_be_drawn_from_every_side(view):
    # Every value of a field changes the picture, but for what the body hides: from behind an open
    # jacket is a shirt, from the front a ponytail is short hair.
    hidden = {("cut", "back"): 1, ("hair_style", "front"): 1}
    for field, values in dict(
        pattern=people.TOLD["patterns"],
        hat=("", "cap", "beanie"),
        cut=("tank", "tshirt", "long", "jacket", "hoodie", "coat", "dress"),
        legs=("slim", "trousers", "wide", "shorts", "skirt"),
        hair_style=("short", "bald", "bob", "long", "ponytail", "bun"),
        bag=("", "backpack", "shoulder", "handbag"),
    ).items():
        drawn = {painted(view, **{field: value}).tobytes() for value in values}
        assert len(drawn) == len(values) - hidden.get((field, view), 0), field


def test_cameras_differ_more_than_pictures_of_one_camera():
    drawn = [draw_person(p, c, 0, 0, (128, 64)) for c in synthetic.CAMERAS for p in range(1, 7)]
    means = np.mean(drawn, axis=(1, 2)).reshape(-1, 6, 3)  # (cameras, pictures, 3)
    hue = means / means.sum(-1, keepdims=True)
    assert hue.mean(1).std(0).max() > hue.std(1).mean()


def test_a_folder_of_people_is_read_as_it_is_drawn_and_drawn_once(tmp_path):
    root = draw_folder(tmp_path / "people", 4)
    data = load(root, pattern=r"camera(?P<camid>\d)")
    people = [{*table["label"]} for table in (data.train, data.query)]
    assert set.union(*people) == {f"person_{i:03d}" for i in range(1, 5)}
    assert len(data.train) == 18 and len(data.query) == 6 and len(data.gallery) == 12
    assert {*data.train.groupby("pid")["camid"].nunique()} == {3}
    first = files(root)
    (root / "person_001" / "mine.jpg").write_bytes(b"")
    assert draw_folder(root, 9) == root and len(files(root)) == len(first) + 1
