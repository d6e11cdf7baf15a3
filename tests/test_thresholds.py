"""A threshold, chosen on some people and tried on others, and the sentences that tell of it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from reidlib.evaluation import thresholds
from reidlib.evaluation.pairs import pair_distances
from reidlib.evaluation.retrieval import Retrieval
from reidlib.evaluation.thresholds import choose_threshold, try_threshold
from reidlib.evaluation.verify import camera_rates, true_match_rate
from reidlib.records import read_json


def people(seed, shift=0.0, ids=30):
    """Queries and gallery of some people, whose images lie `shift` closer to other people's."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(ids + 1, 8)) * (1 - shift)
    sides = []
    for images in (2, 6):
        pid = np.repeat(np.arange(1, ids + 1), images)
        table = pd.DataFrame({"pid": pid, "camid": np.tile(np.arange(images), ids)})
        sides += [centres[pid] + 0.3 * rng.normal(size=(len(pid), 8)), table]
    return pair_distances(Retrieval(*sides))


HOW = {"draws": 60, "seed": 0}
CHOSEN = people(0)
THRESHOLD = choose_threshold(CHOSEN, 0.02, **HOW)


def test_a_threshold_gives_the_rate_it_was_chosen_at_where_it_was_chosen():
    accepted = (CHOSEN.impostor["distance"] <= THRESHOLD.value).mean()
    assert THRESHOLD.rate == THRESHOLD.asked == 0.02
    assert 0.02 - 1 / CHOSEN.impostors <= accepted <= 0.02
    (said,) = THRESHOLD.in_words()
    assert f"at most {THRESHOLD.value:.3f}" in said and f"{THRESHOLD.there['TMR']:.1%}" in said


def test_a_rate_with_too_few_false_matches_behind_it_is_raised_and_told():
    enough = 30 / CHOSEN.impostors
    assert choose_threshold(CHOSEN, 1.001 * enough, **HOW).rate == 1.001 * enough
    threshold = choose_threshold(CHOSEN, 1e-5, **HOW)
    assert threshold.rate == enough > threshold.asked and threshold.there["false_matches"] == 30
    told, _ = threshold.in_words()
    assert "Not at the FMR that was asked for" in told and "FMR of 0.001%" in told


def test_queries_of_one_person_leave_nobody_to_try_on_and_their_pairs_are_written(tmp_path):
    query, gallery = ({"pid": [1, 1], "camid": [1, 1]}, {"pid": [1, 2, 0], "camid": [2, 2, 2]})
    tables = [[0.0], [1.0]], pd.DataFrame(query), [[0.5], [9.0], [8.0]], pd.DataFrame(gallery)
    run = SimpleNamespace(
        retrieval=lambda **_: Retrieval(*tables), place=lambda _: tmp_path / "new"
    )
    run.recipe, run.data = SimpleNamespace(hold_out=0), SimpleNamespace(name="few")
    with pytest.raises(ValueError, match="show one person.*Train with hold_out"):
        thresholds.two_groups(run)
    found = read_json(tmp_path / "new" / "verification.json")
    assert (found["AUC"], found["genuine_pairs"], found["impostor_pairs"]) == (1, 2, 4)


@pytest.mark.parametrize(
    ("ids", "fmr", "message"),
    [(2, 0.01, "24 impostor pairs are too few"), *((30, f, "up to 0.5") for f in (0, 0.6, -1))],
)
def test_rates_that_nothing_can_be_chosen_at(ids, fmr, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(people(0, ids=ids), fmr, **HOW)


PROMISES = [(1, 0.0, "no more than other people"), (2, 0.0, "holds")]
PROMISES += [(2, 0.8, "more false matches than promised"), (3, -3, "fewer")]


@pytest.mark.parametrize(("seed", "shift", "verdict"), PROMISES)
def test_a_promise_holds_on_people_like_those_and_not_on_others(seed, shift, verdict):
    trial = try_threshold(THRESHOLD, people(seed, shift), **HOW)
    assert list(trial.rates) == ["promised", "value", "low", "high", "accepted", "pairs"]
    assert verdict in trial.verdict and trial.verdict in trial.in_words()
    found = trial.rates.loc["FMR", "value"]
    assert f"{found:.3%}" in trial.in_words() and (found == 0) == (shift < 0)


def test_rates_that_cannot_be_measured_are_named():
    at = true_match_rate(CHOSEN, [0.1, 0.001, 1e-6])
    said = thresholds.measurable_in_words(CHOSEN, at)
    assert f"{CHOSEN.impostors:,} impostor pairs" in said
    assert "Rates of 0.0001% are below that" in said and "Behind 0.1% stand fewer than 30" in said
    assert "below that" not in thresholds.measurable_in_words(CHOSEN, at[:1])


def test_camera_rates_in_words():
    cameras = camera_rates(CHOSEN, float(CHOSEN.genuine["distance"].median()))
    said = thresholds.camera_rates_in_words(cameras)
    assert "finds from" in said and "hardly makes strangers look more alike" in said
    within = cameras["query_camid"] == cameras["gallery_camid"]
    biased = cameras.assign(FMR=np.where(within, 0.5, 0.1))
    assert "may make strangers look alike" in thresholds.camera_rates_in_words(biased)
    assert "cannot be compared" in thresholds.camera_rates_in_words(cameras[:1])


def test_alarms_in_words():
    for fmr, tmr, wanted in (
        (0.0, 0.0, "Nothing at all"),
        (0.0, 0.5, "100.0% of the accepted"),
        (0.1, 0.5, "Beyond 5 strangers"),
    ):
        said = thresholds.alarms_in_words(CHOSEN, 60, fmr, tmr, 0.25)
        assert wanted in said and "25.0% of the queries" in said
        assert ("images are wrong" in said) == bool(fmr)


def test_a_row_for_json_has_no_nan():
    row = pd.Series({"a": 1.5, "b": np.nan})
    assert thresholds.as_json(row) == {"a": 1.5, "b": None}
