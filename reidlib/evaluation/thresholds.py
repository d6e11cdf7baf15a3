"""A threshold for a run: chosen on some people, tried on others, and what it promises in words."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from reidlib import runs
from reidlib.data.pixels import load_training_images
from reidlib.data.tables import fingerprint, hold_out, load
from reidlib.evaluation.pairs import Pairs, halves
from reidlib.evaluation.scoring import OpenRun, open_run
from reidlib.evaluation.verify import at_threshold, match_probability, true_match_rate

MIN_FALSE_MATCHES = 30  # the rule of 30, see `verify.true_match_rate`


class Groups(NamedTuple):
    """Two groups of people: one to choose a threshold on, the other to report it on."""

    choosing: tuple
    """embeddings and table of the queries, embeddings and table of the gallery"""
    testing: tuple
    """the same"""
    chosen_on: str
    """who they are, in words"""
    reported_on: str
    """who they are, in words"""
    note: str
    """what to think of it"""


def two_groups(
    run: OpenRun, *, flip: bool = False, precision: str = "float32", seed: int = 0
) -> Groups:
    """Return the held-out people and the test split; or, if nobody was held out, halves of the latter.

    Args:
        run: opened on the test split.
        flip, precision: of the embeddings, see `OpenRun.embeddings`.
        seed: of the halves.

    Raises:
        ValueError: the training images are not those that the run was trained on, so nobody can say
            whom it has not seen.
    """
    testing = _sides(run, flip, precision)
    recipe, (q_emb, query, g_emb, gallery) = run.recipe, testing
    if recipe.hold_out:
        _check_training_images(run)
        held_out = open_run(run.folder, split="held_out", device=str(run.device))
        choosing = _sides(held_out, flip, precision)
        return Groups(
            choosing,
            testing,
            f"{choosing[1]['pid'].nunique():,} held-out identities of `{recipe.dataset}`",
            f"the whole test split of `{run.data.name}`",
            "The network was trained on neither; that was compared with the run's manifest.",
        )
    parts = [
        (q_emb[q], query.iloc[q].reset_index(drop=True))
        + (g_emb[g], gallery.iloc[g].reset_index(drop=True))
        for q, g in halves(query, gallery, seed=seed)
    ]
    whose = [
        f"{who} half of the test identities of `{run.data.name}` ({part[1]['pid'].nunique():,} with queries)"
        for who, part in zip(("one", "the other"), parts, strict=True)
    ]
    return Groups(
        *parts,
        *whose,
        "**This run held out nobody, so the test split had to serve for both:** its people were "
        f"drawn into halves (seed {seed}). The numbers below are of one half, with a gallery half "
        "as large, and do not compare with those of a whole test split, here or in papers. The "
        "proper way: train with `hold_out`.",
    )


def _sides(run: OpenRun, flip: bool, precision: str) -> tuple:
    query_emb, gallery_emb = run.embeddings(flip=flip, precision=precision)
    return query_emb, run.query, gallery_emb, run.gallery


def _check_training_images(run: OpenRun) -> None:
    recipe = run.recipe
    rest, *_ = hold_out(load(recipe.dataset).train, recipe.hold_out, seed=0)
    trained_on = runs.read_json(run.folder / "manifest.json")["train_data"]
    if fingerprint(load_training_images(rest, recipe)[1]) != trained_on:
        raise ValueError(
            f"The images of {recipe.dataset} are not those that {run.folder.name} was trained on, "
            "so nobody can say whom it has not seen: restore them, or train again."
        )


class Threshold(NamedTuple):
    """A threshold that was chosen at a false-match rate, and what it gave where it was chosen."""

    value: float
    asked: float
    """the false-match rate that was asked for"""
    rate: float
    """the one that it was chosen at: higher, where too few false matches are behind the former"""
    pairs: int
    """impostor pairs that it was chosen on"""
    there: pd.Series
    """the row of `true_match_rate`"""

    def in_words(self) -> list[str]:
        """Say what was chosen, how, and what it gives on the very people it was chosen on."""
        there, said = self.there, []
        if self.rate > self.asked:
            said.append(
                f"**Not at the FMR that was asked for.** {self.pairs:,} impostor pairs put only "
                f"{self.asked * self.pairs:.1f} false matches behind an FMR of {self.asked:g}. The "
                f"threshold is chosen at {self.rate:.2g} instead, where there are "
                f"{MIN_FALSE_MATCHES}. Hold out more identities to choose at a lower one."
            )
        said.append(
            f"**Same person where the distance is at most {self.value:.3f}** (95 % interval "
            f"{there['threshold_low']:.3f} to {there['threshold_high']:.3f}). On the people it was "
            f"chosen on it accepts {there['TMR']:.1%} of the genuine pairs ({there['TMR_low']:.1%} "
            f"to {there['TMR_high']:.1%}) and {there['false_matches']:,.0f} impostor pairs, which "
            f"come from {there['people_pairs']:,.0f} different pairs of people."
        )
        return said


def choose_threshold(
    pairs: Pairs, fmr: float = 0.001, *, draws: int = 500, seed: int = 0
) -> Threshold:
    """Choose the largest distance at which the false-match rate is not above `fmr`.

    Where fewer than 30 false matches would be behind that rate, it is chosen where there are 30.

    Args:
        pairs: of the people to choose on.
        fmr: false-match rate, above 0 and up to 0.5.
        draws: of people, for the intervals.
        seed: of the draws.

    Raises:
        ValueError: a rate out of range, or too few impostor pairs for any.
    """
    if not 0 < fmr <= 0.5:
        raise ValueError(
            f"fmr = {fmr}: give a false-match rate above 0 and up to 0.5, such as 0.001."
        )
    rate = fmr
    if int(fmr * pairs.impostors) < MIN_FALSE_MATCHES:
        rate = MIN_FALSE_MATCHES / pairs.impostors
    if rate > 0.5:
        raise ValueError(
            f"{pairs.impostors} impostor pairs are too few to choose a threshold on: hold out more."
        )
    there = true_match_rate(pairs, [rate], draws=draws, seed=seed).iloc[0]
    return Threshold(float(there["threshold"]), fmr, rate, pairs.impostors, there)


class Trial(NamedTuple):
    """What a threshold gives on people that it was not chosen on."""

    rates: pd.DataFrame
    """rows FMR and TMR: `promised`, and the columns of `at_threshold`"""
    least: pd.Series
    """the FMR at the low end of the threshold's interval, a row of `at_threshold`"""
    most: pd.Series
    """the FMR at its high end"""

    @property
    def verdict(self) -> str:
        """Whether the promise holds, in words."""
        promised, found, low, high = self.rates.loc["FMR", ["promised", "value", "low", "high"]]
        if low <= promised <= high:
            return "the promise holds, within what other test people would change"
        if self.least["low"] <= promised <= self.most["high"]:
            return "off, but no more than other people to choose on, or to test on, would explain"
        word = "more" if found > promised else "fewer"
        return f"{word} false matches than promised, beyond what other people would explain"

    def in_words(self) -> str:
        """Say what was promised, what it gives, and how sure both are."""
        fmr, tmr = self.rates.loc["FMR"], self.rates.loc["TMR"]
        return (
            f"On people that it was not chosen on, the threshold gives an FMR of {fmr['value']:.3%} "
            f"({fmr['low']:.3%} to {fmr['high']:.3%}), {fmr['value'] / fmr['promised']:.2g} times the "
            f"{fmr['promised']:.3%} it was chosen for: {self.verdict}. The TMR is {tmr['value']:.1%}, after "
            f"{tmr['promised']:.1%}. The choice itself is uncertain, too: at the two ends of the threshold's "
            f"interval the FMR here would be {self.least['value']:.3%} and {self.most['value']:.3%}."
        )


def try_threshold(threshold: Threshold, pairs: Pairs, *, draws: int = 500, seed: int = 0) -> Trial:
    """Try a threshold on the pairs of other people; the arguments are those of `choose_threshold`."""
    how, there = {"draws": draws, "seed": seed}, threshold.there
    promised = pd.DataFrame({"promised": [threshold.rate, there["TMR"]]}, index=["FMR", "TMR"])
    ends = (
        at_threshold(pairs, float(there[f"threshold_{end}"]), **how).loc["FMR"]
        for end in ("low", "high")
    )
    return Trial(promised.join(at_threshold(pairs, threshold.value, **how)), *ends)


def measurable_in_words(pairs: Pairs, at: pd.DataFrame) -> str:
    """Say which false-match rates have a number, given the rows of `true_match_rate`."""
    said = [
        f"The curve of the test people lies on {pairs.impostors:,} impostor pairs, so it ends on "
        f"the left at {1 / pairs.impostors:.3g}: no smaller rate can be measured."
    ]
    none = [f"{f:g}" for f in at.index[at["TMR"].isna()]]
    thin = at["TMR"].notna() & (at["false_matches"] < MIN_FALSE_MATCHES)
    thin = [f"{f:g}" for f in at.index[thin]]
    if none:
        said.append(f"Rates of {', '.join(none)} are below that, and have no number here.")
    if thin:
        said.append(
            f"Behind {', '.join(thin)} stand fewer than {MIN_FALSE_MATCHES} false matches: such a "
            "rate may easily be a third more or less (the rule of 30)."
        )
    return " ".join(said)


def camera_rates_in_words(cameras: pd.DataFrame) -> str:
    """Say how far one threshold's rates move between cameras, given what `camera_rates` returned."""
    if cameras[["genuine", "impostor"]].gt(0).sum().min() < 2:
        return "Only one pair of cameras is known, or none, so cameras cannot be compared here."

    def pair(row: pd.Series) -> str:
        return f"{row['query_camid']:.0f} to {row['gallery_camid']:.0f}"

    known = cameras.dropna(subset=["TMR"]).sort_values("TMR", kind="stable")
    false = cameras.dropna(subset=["FMR"]).sort_values("FMR", kind="stable")
    worst, best, least, most = known.iloc[0], known.iloc[-1], false.iloc[0], false.iloc[-1]
    within = cameras["query_camid"] == cameras["gallery_camid"]
    accepted = cameras["FMR"].fillna(0) * cameras["impostor"]
    inside, across = (
        accepted[rows].sum() / max(1, cameras["impostor"][rows].sum()) for rows in (within, ~within)
    )
    said = (
        f"From camera {pair(worst)} the threshold finds {worst['TMR']:.1%} of "
        f"{worst['genuine']:,.0f} genuine pairs, from {pair(best)} {best['TMR']:.1%} of "
        f"{best['genuine']:,.0f}. The FMR goes from {least['FMR']:.3%} ({pair(least)}) to "
        f"{most['FMR']:.3%} ({pair(most)}). Strangers seen by one camera are accepted at "
        f"{inside:.3%}, strangers seen by two at {across:.3%}"
    )
    if across and inside > 1.25 * across:
        return f"{said}, {across / inside:.0%} of that: a shared background and light would do so."
    return f"{said}: here a shared camera hardly makes strangers look more alike."


def alarms_in_words(pairs: Pairs, queries: int, fmr: float, tmr: float, alarmed: float) -> str:
    """Say what a threshold's rates mean in a whole gallery.

    Args:
        pairs: of the people it was tried on.
        queries: how many queries they have.
        fmr, tmr: the threshold's rates there.
        alarmed: share of the queries with a false alarm.
    """
    strangers, genuine = pairs.impostors / queries, len(pairs.genuine) / queries
    said = (
        f"A query of this test split meets {strangers:,.0f} strangers, so expect "
        f"{fmr * strangers:,.1f} false alarms; {alarmed:.1%} of the queries have at least one. "
        "That is the price of an open set. Top-1 and mAP never show it: they are measured on a "
        "**closed set**, where the person is always there."
    )
    right = match_probability(genuine / (genuine + strangers), tmr, fmr)
    if math.isnan(right):
        return f"{said} Nothing at all is accepted at this threshold."
    one = match_probability(1 / (strangers + 1), tmr, fmr)
    said += (
        f" With the {genuine:.1f} genuine images a query has here, {right:.1%} of the accepted "
        f"images are right. Were there only one, it would be {one:.1%}."
    )
    if fmr:
        said += f" Beyond TMR / FMR = {tmr / fmr:,.0f} strangers, an accepted image is more often wrong "
        said += "than right."
    return said


def as_json(row: pd.Series) -> dict[str, float | None]:
    """Return a row for JSON, which has no NaN: None."""
    return {
        name: None if pd.isna(value) else float(np.float64(value)) for name, value in row.items()
    }
