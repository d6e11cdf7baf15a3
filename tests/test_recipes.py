"""Recipes: the design's settings, and errors that name what is wrong."""

import pytest
from pydantic import ValidationError

from reidlib.recipes import Recipe, located, make_recipe, stored_recipe


def test_trinet_is_the_papers():
    r = make_recipe("trinet")
    assert (r.backbone, r.weights, r.hidden, r.dim) == ("resnet50", "imagenet", 1024, 128)
    assert (round(r.height * r.enlarge), round(r.width * r.enlarge)) == (288, 144)
    assert (r.height, r.width, r.flip, r.normalise) == (256, 128, True, "imagenet")
    assert (r.p, r.k, r.loss, r.margin) == (18, 4, "batch_hard", "soft")
    assert (r.steps, r.lr) == (25_000, 3e-4)
    rates = [r.learning_rate(t, 25_000) for t in (0, 15_000, 25_000)]
    assert rates == pytest.approx([3e-4, 3e-4, 3e-7])


def test_plain_is_the_small_repositories():
    r = make_recipe("plain")
    assert (r.height, r.width, r.enlarge, r.flip, r.normalise) == (128, 64, 1.0, True, "unit")
    assert (r.lr, r.epochs, r.steps, r.margin, r.p, r.k) == (3e-5, 50, None, 0.2, 18, 4)
    assert r.learning_rate(0, 100) == r.learning_rate(100, 100) == 3e-5


def test_recipes_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe("demo").lr = 1.0


def test_changes_and_none():
    r = make_recipe("plain", loss="batch_all", margin="soft", lr=None, steps=100)
    assert (r.loss, r.margin, r.lr, r.steps, r.epochs) == ("batch_all", "soft", 3e-5, 100, None)
    assert make_recipe("trinet", epochs=3).steps is None
    assert make_recipe("trinet", margin=1).margin == 1.0


@pytest.mark.parametrize("loss", ["batch_all", "batch_hard"])
def test_the_variants_have_the_names_their_users_know(loss):
    name = loss.replace("_", "")
    assert make_recipe("trinet", loss=loss, margin=0.2).variant == name
    assert make_recipe("trinet", loss=loss, margin="soft").variant == f"{name}_softplus"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr="1e-3"), r"lr = '1e-3'.*came as text; write the number as 0\.001"),
        (dict(margin="hard"), "margin = 'hard': should be a valid number or 'soft'"),
        (dict(margin=True), "margin = True"),
        (dict(margin=-0.1), "margin = -0.1: should be greater than or equal to 0"),
        (dict(marginn=1), "Unknown setting 'marginn': there are dataset,"),
        (dict(p=2.5), "p = 2.5: should be a valid integer"),
        (dict(flip="yes"), "flip = 'yes'"),
        (dict(lr=float("nan")), "lr = nan: should be a finite number"),
        (dict(steps=1, epochs=1), "either steps or epochs"),
        (dict(steps=0), "steps = 0"),
        (dict(backbone=50), "backbone = 50: should be a valid string"),
        (dict(dim=10**20), "dim = 1.*: should be less than 2147483648"),
        (dict(hold_out=""), "hold_out = .*should be"),
    ],
)
def test_errors_name_the_setting(changes, message):
    with pytest.raises(ValueError, match=message):
        make_recipe("demo", **changes)


def test_all_errors_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)p = 2\.5.*k = 1.*Unknown setting 'x'"):
        make_recipe("demo", p=2.5, k=1, x=3)
    message = "Unknown recipe 'best': choose one of plain, trinet, strong, id, demo"
    with pytest.raises(ValueError, match=message):
        make_recipe("best")


def test_every_setting_is_described():
    assert all(field.description for field in Recipe.model_fields.values())


def test_retired_settings_are_dropped_where_they_changed_nothing_and_refused_elsewhere():
    settings = Recipe().model_dump()
    assert stored_recipe(settings | {"small": 0.0}) == Recipe()
    with pytest.raises(ValueError, match="older version with small = 0.8"):
        stored_recipe(settings | {"small": 0.8})
    with pytest.raises(ValueError, match="Unknown setting 'smal'"):
        stored_recipe(settings | {"smal": 0.0})


def test_paths_are_whole_and_names_stay(tmp_path, monkeypatch):
    for name in ("mine", "w.pth", "held.txt", "market1501", "imagenet"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    here = located(make_recipe("demo", dataset="mine", weights="w.pth", hold_out="held.txt"))
    monkeypatch.chdir("/")
    found = [here.dataset, here.weights, here.hold_out]
    assert found == [str(tmp_path / name) for name in ("mine", "w.pth", "held.txt")]
    assert located(here) == here
    monkeypatch.chdir(tmp_path)
    for names in ({"dataset": "market1501", "weights": "imagenet"}, {"dataset": "elsewhere"}):
        assert located(make_recipe("demo", **names)) == make_recipe("demo", **names)
