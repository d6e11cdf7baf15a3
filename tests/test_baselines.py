"""What a score must beat, and what is said of it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from reidlib.evaluation.baselines import (
    colour_histogram,
    gain_in_words,
    lead_in_words,
    without_camera,
)


def test_colour_histogram_is_the_loop():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 9, 3)).astype(np.uint8)
    pixels[0, 3:6] = (255, 0, 40)  # the whole second stripe: stripes begin at 0, 3, 6, 10, 13, 16
    found = colour_histogram(pixels).reshape(3, 6, 3, 8)
    for i, s, c, b in np.ndindex(found.shape):
        stripe = pixels[i, s * 20 // 6 : (s + 1) * 20 // 6, 2:7, c]  # the middle half of 9 columns
        assert found[i, s, c, b] == np.float32(np.sqrt(np.float32((stripe // 32 == b).mean())))
    assert np.argwhere(found[0, 1] == 1).tolist() == [[0, 7], [1, 0], [2, 1]]


def test_without_camera_is_the_loop_over_cameras():
    emb = np.random.default_rng(0).normal(size=(9, 4))
    cameras = np.array([1, 2, 1, 2, 1, 3, 3, 2, 2])
    wanted = emb.copy()
    for camera in (1, 2, 3):
        wanted[cameras == camera] -= emb[cameras == camera].mean(axis=0)
    tables = [pd.DataFrame({"camid": part}) for part in (cameras[:4], cameras[4:])]
    found = without_camera(emb[:4], tables[0], emb[4:], tables[1])
    assert np.abs(np.concatenate(found) - wanted).max() < 1e-12


COLOURS = {"colours_without_camera": 0.09}


@pytest.mark.parametrize(
    ("mAP", "baselines", "wanted"),
    [
        (0.5, {}, "No baselines were scored"),
        (0.5, COLOURS | {"untrained": 0.03}, "is 50.0%, before it 3.0%. Colours, each camera's"),
        (0.5, COLOURS | {"pretrained": 0.07}, "the features that it started from have 7.0%"),
        (0.5, COLOURS, "is 50.0%. Colours, each camera's mean taken off, reach 9.0%"),
        (0.05, COLOURS | {"untrained": 0.03}, "**Colours without camera does at least as well"),
        (0.0, {"colours_without_camera": 0.0}, "does not show"),  # hopeless, both
    ],
)
def test_what_training_added_in_words(mAP, baselines, wanted):
    scored = {name: SimpleNamespace(scores={"mAP": value}) for name, value in baselines.items()}
    said = gain_in_words(mAP, scored)
    assert wanted in said
    assert ("does not show" in said) == (mAP <= 0.09 and bool(baselines))


HIGH, LOW, SAME = [0.9, 0.8, 0.9, 0.8], [0.2, 0.1, 0.2, 0.1], [1.0, 1.0, np.nan]
LEAD = " points of mAP above the best of the others, no net (difference "


@pytest.mark.parametrize(
    ("trained", "untrained", "wanted"),
    [
        (HIGH, LOW, f"70.0{LEAD}70.0, with other people 70.0 to 70.0). **That is more than luck"),
        (LOW, HIGH, "**What never learnt from these pictures is"),
        ([0.9, 0.1, 0.9, 0.1], [0.1, 0.9, 0.1, 0.8], "**That may be luck"),
        ([1.0], [1.0], "one person cannot say whether the network is better than no net."),
        (SAME, SAME, f"0.0{LEAD}"),
    ],
)
def test_the_lead_over_what_cost_nothing_in_words(trained, untrained, wanted):
    def table(aps):
        who = {"query": range(len(aps)), "pid": range(len(aps))}
        return pd.DataFrame(who | {"AP": aps, "matches": 1})

    others = {"no_net": untrained, "worse": [0.05] * len(untrained)}
    others = {
        name: SimpleNamespace(scores={"mAP": np.nanmean(aps)}, per_query=table(aps))
        for name, aps in others.items()
    }
    assert wanted in lead_in_words(table(trained), others)
