"""What a score must beat, and what is said of it."""

from types import SimpleNamespace

import pytest

from reidlib.evaluation.baselines import gain_in_words


def scored(mAP):
    return SimpleNamespace(scores={"mAP": mAP})


@pytest.mark.parametrize(
    ("mAP", "baselines", "wanted"),
    [
        (0.5, {}, "No baselines were scored"),
        (0.5, {"untrained": 0.03, "colour_histogram": 0.09}, "to 50.0%, from 3.0%. Colour alone"),
        (0.5, {"colour_histogram": 0.09}, "to 50.0%. Colour alone reaches 9.0%"),
        (0.05, {"untrained": 0.03, "colour_histogram": 0.09}, "it has learnt nothing that helps"),
    ],
)
def test_what_training_added_in_words(mAP, baselines, wanted):
    said = gain_in_words(mAP, {name: scored(value) for name, value in baselines.items()})
    assert wanted in said
    assert ("learnt nothing" in said) == (mAP < 0.09 and bool(baselines))
