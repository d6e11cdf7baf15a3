"""What a score must beat, and what is said of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from reidlib.evaluation.baselines import colour_histogram, gain_in_words


def test_colour_histogram_is_the_loop():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 9, 3)).astype(np.uint8)
    pixels[0, 3:6] = (255, 0, 40)  # the whole second stripe: stripes begin at 0, 3, 6, 10, 13, 16
    found = colour_histogram(pixels).reshape(3, 6, 3, 8)
    for i, s, c, b in np.ndindex(found.shape):
        stripe = pixels[i, s * 20 // 6 : (s + 1) * 20 // 6, 2:7, c]  # the middle half of 9 columns
        assert found[i, s, c, b] == np.float32(np.sqrt(np.float32((stripe // 32 == b).mean())))
    assert np.argwhere(found[0, 1] == 1).tolist() == [[0, 7], [1, 0], [2, 1]]


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
    scored = {name: SimpleNamespace(scores={"mAP": value}) for name, value in baselines.items()}
    said = gain_in_words(mAP, scored)
    assert wanted in said
    assert ("learnt nothing" in said) == (mAP < 0.09 and bool(baselines))
