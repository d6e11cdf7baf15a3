"""A threshold, chosen on some people and tried on others, and the sentences that tell of it."""

import numpy as np
import pandas as pd
import pytest

from reidlib.evaluation import thresholds
from reidlib.evaluation.pairs import pair_distances
from reidlib.evaluation.thresholds import choose_threshold, try_threshold
from reidlib.evaluation.verify import camera_rates, true_match_rate


def people(seed, shift=0.0, ids=30):
    """Queries and gallery of some people, whose images lie `shift` closer to other people's."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(ids + 1, 8)) * (1 - shift)
    sides = []
    for images in (2, 6):
        pid = np.repeat(np.arange(1, ids + 1), images)
        table = pd.DataFrame({"pid": pid, "camid": np.tile(np.arange(images), ids)})
        sides += [centres[pid] + 0.3 * rng.normal(size=(len(pid), 8)), table]
    return pair_distances(*sides)


CHOSEN, SAME, HARDER = people(0), people(1), people(2, shift=0.8)
HOW = {"draws": 60, "seed": 0}


def test_a_threshold_gives_the_rate_it_was_chosen_at_where_it_was_chosen():
    threshold = choose_threshold(CHOSEN, 0.02, **HOW)
    accepted = (CHOSEN.impostor["distance"] <= threshold.value).mean()
    assert threshold.rate == threshold.asked == 0.02
    assert 0.02 - 1 / CHOSEN.impostors <= accepted <= 0.02
    (said,) = threshold.in_words()
    assert f"at most {threshold.value:.3f}" in said and f"{threshold.there['TMR']:.1%}" in said


def test_a_rate_with_too_few_false_matches_behind_it_is_raised_and_told():
    threshold = choose_threshold(CHOSEN, 1e-5, **HOW)
    assert threshold.rate == 30 / CHOSEN.impostors > threshold.asked
    told, _ = threshold.in_words()
    assert "Not at the FMR that was asked for" in told and "FMR of 1e-05" in told
    with pytest.raises(ValueError, match="too few to choose a threshold on"):
        choose_threshold(people(0, ids=2), 0.01, **HOW)
    for wrong in (0, 0.6, -1):
        with pytest.raises(ValueError, match="above 0 and up to 0.5"):
            choose_threshold(CHOSEN, wrong, **HOW)


def test_a_promise_holds_on_people_like_those_and_not_on_harder_ones():
    threshold = choose_threshold(CHOSEN, 0.02, **HOW)
    alike, harder = (try_threshold(threshold, pairs, **HOW) for pairs in (SAME, HARDER))
    assert list(alike.rates) == ["promised", "value", "low", "high", "accepted", "pairs"]
    assert "holds" in alike.verdict or "no more than other people" in alike.verdict
    assert harder.verdict.startswith("more false matches than promised")
    for trial in (alike, harder):
        assert trial.verdict in trial.in_words()
        assert f"{trial.rates.loc['FMR', 'value']:.3%}" in trial.in_words()
    far = try_threshold(threshold, people(3, shift=-3), **HOW)
    assert far.verdict.startswith("fewer") and far.rates.loc["FMR", "value"] == 0


def test_rates_that_cannot_be_measured_are_named():
    at = true_match_rate(CHOSEN, [0.1, 0.001, 1e-6])
    said = thresholds.measurable_in_words(CHOSEN, at)
    assert f"{CHOSEN.impostors:,} impostor pairs" in said
    assert "Rates of 1e-06 are below that" in said and "Behind 0.001 stand fewer than 30" in said
    assert "below that" not in thresholds.measurable_in_words(CHOSEN, at[:1])


def test_camera_rates_in_words():
    cameras = camera_rates(CHOSEN, float(CHOSEN.genuine["distance"].median()))
    said = thresholds.camera_rates_in_words(cameras)
    assert "From camera" in said and "hardly makes strangers look more alike" in said
    within = cameras["query_camid"] == cameras["gallery_camid"]
    biased = cameras.assign(FMR=np.where(within, 0.5, 0.1))
    assert "20% of that" in thresholds.camera_rates_in_words(biased)
    assert "cannot be compared" in thresholds.camera_rates_in_words(cameras[:1])


@pytest.mark.parametrize(
    ("fmr", "tmr", "wanted"),
    [
        (0.0, 0.0, "Nothing at all"),
        (0.0, 0.5, "100.0% of the accepted"),
        (0.1, 0.5, "= 5 strangers"),
    ],
)
def test_alarms_in_words(fmr, tmr, wanted):
    said = thresholds.alarms_in_words(CHOSEN, 60, fmr, tmr, 0.25)
    assert wanted in said and "25.0% of the queries" in said
    assert ("more often wrong" in said) == bool(fmr)


def test_a_row_for_json_has_no_nan():
    row = pd.Series({"a": 1.5, "b": np.nan})
    assert thresholds.as_json(row) == {"a": 1.5, "b": None}
