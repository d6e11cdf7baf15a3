"""A threshold for a run: chosen on some people, tried on others, and what it promises in words."""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from reidlib.data.tables import load
from reidlib.evaluation import verify
from reidlib.evaluation.pairs import Pairs, halves, pair_distances
from reidlib.evaluation.retrieval import Retrieval
from reidlib.evaluation.scoring import OpenRun, open_run, trained_on
from reidlib.runs import write_json

MIN_FALSE_MATCHES = 30  # the rule of 30, see `verify.true_match_rate`


class Groups(NamedTuple):
    """Two groups of people: one to choose a threshold on, the other to report it on.

    Attributes:
        choosing, testing: queries against a gallery.
        chosen_on, reported_on: who they are, in words.
        note: what to think of it.
    """

    choosing: Retrieval
    testing: Retrieval
    chosen_on: str
    reported_on: str
    note: str


def two_groups(
    run: OpenRun, *, flip: bool = False, precision: str = "float32", seed: int = 0
) -> Groups:
    """Return the held-out people and the test split; or, if nobody was held out, halves of the latter.

    `run` is opened on the test split; `flip` and `precision` are those of `OpenRun.embeddings`.

    Raises:
        ValueError: the training images are not those that the run was trained on; or queries of one
            person alone, and nobody held out: what its pairs say is written before.
    """
    testing, recipe = run.retrieval(flip=flip, precision=precision), run.recipe
    if not recipe.hold_out:
        if testing.query["pid"].nunique() == 1:
            pairs, file = pair_distances(testing), run.place(precision) / "verification.json"
            found = {"AUC": verify.auc(pairs), "EER": verify.equal_error_rate(pairs)}
            counts = {"genuine_pairs": len(pairs.genuine), "impostor_pairs": pairs.impostors}
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"evaluated_on": run.data.name} | found | counts)
            raise ValueError(
                f"All queries of {run.data.name} show one person, so nobody is left to try a threshold "
                f"on. There are {pairs}. The area under the ROC curve is {found['AUC']:.2%}, written to "
                f"{file}. Train with hold_out, and the threshold is chosen on others."
            )
        parts = halves(testing, seed=seed)
        whose = (
            f"{which} half of the test identities of `{run.data.name}` "
            f"({part.query['pid'].nunique():,} with queries)"
            for which, part in zip(("one", "the other"), parts, strict=True)
        )
        note = (
            "**This run held out nobody, so the test split serves for both:** its people were drawn "
            f"into halves (seed {seed}). The numbers below are of one half, with half the gallery: "
            "never compare them with those of a whole test split. Better: train with `hold_out`."
        )
        return Groups(*parts, *whose, note)
    if not trained_on(run.folder, recipe, load(recipe.dataset, pattern=recipe.pattern)):
        raise ValueError(
            f"{run.folder.name} was trained on other images of {recipe.dataset}, so nobody can say "
            "whom it has not seen: restore them, or train again."
        )
    options = {"unreadable": recipe.unreadable, "device": str(run.device)}
    held_out = open_run(run.folder, split="held_out", **options)
    return Groups(
        held_out.retrieval(flip=flip, precision=precision),
        testing,
        f"{held_out.query['pid'].nunique():,} held-out identities of `{recipe.dataset}`",
        f"the whole test split of `{run.data.name}`",
        "The network was trained on neither; that was compared with the run's manifest.",
    )


class Threshold(NamedTuple):
    """A threshold that was chosen at a false-match rate, and what it gave where it was chosen.

    Attributes:
        value: the threshold.
        asked: the false-match rate that was asked for.
        rate: the one that it was chosen at: higher, where too few false matches are behind `asked`.
        pairs: impostor pairs that it was chosen on.
        there: the row of `true_match_rate`.
    """

    value: float
    asked: float
    rate: float
    pairs: int
    there: pd.Series

    def in_words(self) -> list[str]:
        """Say what was chosen, how, and what it gives on the very people it was chosen on."""
        raised = (
            f"**Not at the FMR that was asked for.** {self.pairs:,} impostor pairs put only "
            f"{self.asked * self.pairs:.1f} false matches behind an FMR of {per_cent(self.asked)}. The "
            f"threshold is chosen at {per_cent(self.rate)} instead, where there are {MIN_FALSE_MATCHES}. "
            "Hold out more identities to choose at a lower one."
        )
        chosen = (
            "**Same person where the distance is at most {threshold:.3f}** (95 % interval "
            "{threshold_low:.3f} to {threshold_high:.3f}). On the people it was chosen on it accepts "
            "{TMR:.1%} of the genuine pairs ({TMR_low:.1%} to {TMR_high:.1%}) and "
            "{false_matches:,.0f} impostor pairs, which come from {people_pairs:,.0f} different "
            "pairs of people."
        ).format(**self.there)
        return [raised, chosen] if self.rate > self.asked else [chosen]


def per_cent(rate: float) -> str:
    """Return a rate with two digits, however small.

    >>> per_cent(0.01), per_cent(0.00001), per_cent(0.123)
    ('1%', '0.001%', '12%')
    """
    return f"{np.format_float_positional(100 * rate, 2, fractional=False, trim='-')}%"


def check_rate(fmr: float) -> None:
    """Raise a ValueError if no threshold can be chosen at a false-match rate."""
    if not 0 < fmr <= 0.5:
        raise ValueError(f"fmr = {fmr}: give a rate above 0 and up to 0.5, such as 0.001.")


def choose_threshold(
    pairs: Pairs, fmr: float = 0.001, *, draws: int = 500, seed: int = 0
) -> Threshold:
    """Choose the largest distance at which the false-match rate is not above `fmr`.

    Where fewer than 30 false matches would be behind that rate, it is chosen where there are 30.

    Raises:
        ValueError: a rate that is not above 0 and up to 0.5, or too few impostor pairs for any.
    """
    check_rate(fmr)
    rate = max(fmr, MIN_FALSE_MATCHES / pairs.impostors)
    if rate > 0.5:
        raise ValueError(
            f"{pairs.impostors} impostor pairs are too few to choose on: hold out more."
        )
    there = verify.true_match_rate(pairs, [rate], draws=draws, seed=seed).iloc[0]
    return Threshold(float(there["threshold"]), fmr, rate, pairs.impostors, there)


class Trial(NamedTuple):
    """What a threshold gives on people that it was not chosen on.

    Attributes:
        rates: rows FMR and TMR: `promised`, and the columns of `at_threshold`.
        least, most: the FMR at the two ends of the threshold's interval, rows of `at_threshold`.
    """

    rates: pd.DataFrame
    least: pd.Series
    most: pd.Series

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
            f"({fmr['low']:.3%} to {fmr['high']:.3%}), where it was chosen for {fmr['promised']:.3%}: "
            f"{self.verdict}. The TMR is "
            f"{tmr['value']:.1%}, after {tmr['promised']:.1%}. At both ends of the threshold's interval the "
            f"FMR here would be {self.least['value']:.3%} and {self.most['value']:.3%}."
        )


def try_threshold(threshold: Threshold, pairs: Pairs, *, draws: int = 500, seed: int = 0) -> Trial:
    """Try a threshold on the pairs of other people; the arguments are those of `choose_threshold`."""
    there = threshold.there
    values = [threshold.value, there["threshold_low"], there["threshold_high"]]
    found, least, most = (verify.at_threshold(pairs, v, draws=draws, seed=seed) for v in values)
    found.insert(0, "promised", [threshold.rate, there["TMR"]])
    return Trial(found, least.loc["FMR"], most.loc["FMR"])


def measurable_in_words(pairs: Pairs, at: pd.DataFrame) -> str:
    """Say which false-match rates have a number, given the rows of `true_match_rate`."""
    none = at["TMR"].isna()
    thin = ~none & (at["false_matches"] < MIN_FALSE_MATCHES)
    none, thin = (", ".join(map(per_cent, at.index[rows])) for rows in (none, thin))
    said = (
        f"The curve of the test people ends on the left at one false match in {pairs.impostors:,} "
        "impostor pairs: no smaller rate can be measured."
    )
    if none:
        said += f" Rates of {none} are below that, and have no number here."
    if thin:
        said += (
            f" Behind {thin} stand fewer than {MIN_FALSE_MATCHES} false matches: such a rate may "
            "easily be a third more or less (the rule of 30)."
        )
    return said


def camera_rates_in_words(cameras: pd.DataFrame) -> str:
    """Say how far one threshold's rates move between cameras, given what `camera_rates` returned."""
    if cameras[["genuine", "impostor"]].gt(0).sum().min() < 2:
        return "Only one pair of cameras is known, or none, so cameras cannot be compared here."
    sides = zip(cameras["query_camid"], cameras["gallery_camid"], strict=True)
    cameras = cameras.assign(pair=[f"{query:.0f} to {gallery:.0f}" for query, gallery in sides])
    worst, best = (cameras.loc[i] for i in cameras["TMR"].agg(["idxmin", "idxmax"]))
    least, most = (cameras.loc[i] for i in cameras["FMR"].agg(["idxmin", "idxmax"]))
    within = cameras["query_camid"] == cameras["gallery_camid"]
    inside, across = (
        (cameras["FMR"] * cameras["impostor"])[rows].sum() / max(1, cameras["impostor"][rows].sum())
        for rows in (within, ~within)
    )
    said = (
        f"The threshold finds from {worst['TMR']:.1%} (camera {worst['pair']}, {worst['genuine']:,} genuine "
        f"pairs) to {best['TMR']:.1%} ({best['pair']}, {best['genuine']:,} pairs). The FMR goes from "
        f"{least['FMR']:.3%} ({least['pair']}) to {most['FMR']:.3%} ({most['pair']}). Strangers seen by one "
        f"camera are accepted at {inside:.3%}, strangers seen by two at {across:.3%}"
    )
    if inside > 1.25 * across:
        return f"{said}: a shared background and light may make strangers look alike."
    return f"{said}: here a shared camera hardly makes strangers look more alike."


def alarms_in_words(pairs: Pairs, queries: int, fmr: float, tmr: float, alarmed: float) -> str:
    """Say what a threshold's rates on some pairs mean to their queries, and which share is alarmed."""
    strangers, genuine = pairs.impostors / queries, len(pairs.genuine) / queries
    right = verify.match_probability(genuine / (genuine + strangers), tmr, fmr)
    said = (
        f"A query here meets {strangers:,.0f} strangers, so expect "
        f"{fmr * strangers:,.1f} false alarms; {alarmed:.1%} of the queries have at least one. "
        "Top-1 and mAP never show that: in their **closed set** the person is always there."
    )
    if math.isnan(right):
        return f"{said} Nothing at all is accepted at this threshold."
    said += (
        f" With the {genuine:.1f} genuine images a query has here, {right:.1%} of the accepted "
        "images are right. Were there only one, it would be "
        f"{verify.match_probability(1 / (strangers + 1), tmr, fmr):.1%}."
    )
    if fmr:
        said += f" Beyond {tmr / fmr:,.0f} strangers (TMR / FMR) most accepted images are wrong."
    return said


def as_json(row: pd.Series) -> dict[str, float | None]:
    """Return a row for JSON, which has no NaN: None."""
    return {name: None if pd.isna(value) else float(value) for name, value in row.items()}
