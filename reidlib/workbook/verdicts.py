"""Which differences between the variants are real, and the sentences that say so."""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from reidlib.evaluation.intervals import (
    Difference,
    Spread,
    confidence_interval,
    difference,
    holm,
    seed_spread,
)
from reidlib.evaluation.metrics import SCORES
from reidlib.workbook.results import Results, best_of

# A run that went wrong has a spread of its own, which says nothing of the others.
BROKEN = {"diverging", "collapsed", "near collapse", "not learning"}
SURE = 0.05


def intervals(results: Results) -> dict[str, pd.DataFrame]:
    """Return each variant's scores with 95 % intervals over people; all seeds in one table."""
    joined = {name: pd.concat(results.of(name), ignore_index=True) for name in results.compared}
    return {name: confidence_interval(table, by="pid") for name, table in joined.items()}


def intervals_table(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return all scores with their 95 % intervals in per cent, for people."""
    return pd.DataFrame.from_dict(
        {
            name: {
                heading: "{value:.1f} ({low:.1f} to {high:.1f})".format(**100 * table.loc[key])
                for key, heading in SCORES.items()
            }
            for name, table in found.items()
        },
        orient="index",
    )


def steady(results: Results) -> list[str]:
    """Return the variants of which no run went wrong."""
    broken = {name for (name, _), found in results.findings.items() if BROKEN & {*found}}
    return [name for name in results.compared if name not in broken]


def spread_of(results: Results) -> Spread:
    """Return how far the seed moves the mAP of the steady variants."""
    return seed_spread({name: results.of(name) for name in steady(results)})


def luck_in_words(results: Results, spread: Spread, found: Mapping[str, pd.DataFrame]) -> str:
    """Say how far other people and another seed would move a score; `found`: of `intervals`."""
    ends = [table.loc["mAP", "high"] - table.loc["mAP", "low"] for table in found.values()]
    sure = steady(results)
    rows = "all rows" if len(sure) == len(results.compared) else ", ".join(sure)
    seeds = (
        f"From seed to seed the mAP of a row has a standard deviation of {100 * spread.deviation:.1f} "
        f"points ({spread.freedom} degrees of freedom, {rows} together)."
        if spread.freedom
        else "One seed each says nothing of the luck of the seed, and what follows leaves it out: it is "
        "about these very networks."
    )
    return (
        f"With other people each mAP would move by about ±{50 * np.mean(ends):.1f} points. {seeds} "
        "Intervals that overlap do not mean that two rows are equal. Both rows answered *the same "
        "queries*, so what is hard for one is hard for the other, and most of the luck cancels in their "
        "difference."
    )


class Pairs(NamedTuple):
    """All pairs of variants: their differences, and p-values for claiming all of them at once."""

    found: dict[tuple[str, str], Difference]
    adjusted: dict[tuple[str, str], float]
    spread: Spread

    @property
    def luck(self) -> str:
        """What the differences account for, in words."""
        seed = "another seed" if self.spread.freedom else "(not another seed)"
        return f"other people and {seed}" if self.spread.freedom else f"other people {seed}"

    @property
    def hold(self) -> list[tuple[str, str]]:
        """Pairs that are told apart, all claimed together."""
        return [pair for pair in self.found if self.adjusted[pair] < SURE]


def pairs_of(results: Results, spread: Spread) -> Pairs:
    """Compare all variants with each other on the same queries."""
    pairs = list(itertools.combinations(results.compared, 2))
    found = {(a, b): difference(results.of(a), results.of(b), spread=spread) for a, b in pairs}
    adjusted = dict(zip(pairs, holm([d.p for d in found.values()]), strict=True))
    return Pairs(found, adjusted, spread)


def differences(found: Iterable[Difference], labels: list[str]) -> pd.DataFrame:
    """Return differences in points: columns `value`, `low` and `high`, a row for each label."""
    rows = [100 * np.array(d[:3]) for d in found]
    return pd.DataFrame(rows, index=labels, columns=["value", "low", "high"], dtype=float)


def pairs_table(pairs: Pairs) -> pd.DataFrame:
    """Return the pairs for people: difference with its interval, errors, and p-values."""
    found, labels = pairs.found.values(), [f"{a} − {b}" for a, b in pairs.found]
    table = differences(found, labels).rename(columns={"value": "mAP, points"})
    table["error: people"] = [100 * d.people for d in found]
    if pairs.spread.freedom:
        table["error: seeds"] = [100 * d.seeds for d in found]
    return table.assign(p=[d.p for d in found], **{"p, Holm": [*pairs.adjusted.values()]})


def pairs_in_words(pairs: Pairs) -> list[str]:
    """Say which differences hold, which might, and which cannot be told."""

    def verdict(pair: tuple[str, str]) -> str:
        a, b = pair if pairs.found[pair].value > 0 else pair[::-1]
        p = pairs.adjusted[pair]
        said = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        return f"{a} beats {b} by {100 * abs(pairs.found[pair].value):.1f} points ({said})"

    found, hold, lines = pairs.found, pairs.hold, []
    maybe = [pair for pair in found if found[pair].p < SURE <= pairs.adjusted[pair]]
    rest = [pair for pair in found if found[pair].p >= SURE]
    if hold:
        lines.append(
            f"**These differences hold**, with {pairs.luck}, all claimed together: "
            f"{'; '.join(map(verdict, hold))}."
        )
    elif found:
        lines.append(f"**No difference holds**, with {pairs.luck}, when all are claimed together.")
    if maybe:
        lines.append(
            f"**Only if that pair had been the one question**, not one of {len(found)}: "
            f"{'; '.join(map(verdict, maybe))}."
        )
    if rest:
        least = 100 * np.mean([(found[pair].high - found[pair].low) / 2 for pair in rest])
        lines.append(
            f"**Not told apart**: {'; '.join(f'{a} and {b}' for a, b in rest)}. That does not make "
            f"them equal. With these queries and seeds you cannot see a difference of less than about "
            f"{least:.1f} points, and a larger one only where it is claimed alone."
        )
    return lines


def conclusion(pairs: Pairs, table: pd.DataFrame) -> str:
    """Say which variant is best, as far as it can be said."""
    best, equal = best_of(table)
    if not pairs.found:
        return f"There is one row alone, {best}: nothing to compare it with."
    beaten = [name for name in table.index if {name, best} in [{*pair} for pair in pairs.hold]]
    level = [name for name in table.index if name not in (best, *beaten)]
    if not beaten:
        highest = " and ".join([best, *equal])
        return f"None is shown to be best: no row is told apart from {highest}, the highest."
    said = f"{best} is best: it beats each of the others."
    if level:
        said = f"{best} has the highest mAP. It beats {', '.join(beaten)}, "
        said += f"and is not told apart from {', '.join(level)}."
    if not pairs.spread.freedom:
        said += " It is about these very networks: other seeds may turn it round."
    return said


def real_in_words(pairs: Pairs, table: pd.DataFrame) -> str:
    """Say in two sentences whether the differences are real."""
    said = f"Is it real? {conclusion(pairs, table)}"
    if pairs.found:
        said += (
            f" Of {len(pairs.found)} differences between the rows {len(pairs.hold)} hold when all "
        )
        said += f"are claimed together, with {pairs.luck}."
    return said


# --- learning


def ends_in_words(histories: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say where trainings ended, from the highest to the lowest: medians of the last quarter."""
    ends = {name: h.iloc[-max(1, len(h) // 4) :].median() for name, h in histories.items()}

    def ordered(form: str, value) -> str:
        values = {name: value(end) for name, end in ends.items()}
        return ", ".join(
            f"{n} {values[n]:{form}}" for n in sorted(values, key=values.get, reverse=True)
        )

    apart = ordered(".1f", lambda e: e["negative_p50"] / max(e["positive_p50"], 1e-9))
    return [
        f"**Active share**: {ordered('.1%', lambda e: e['active'])}. Under a margin an inactive triplet "
        "teaches nothing. Under the soft one a triplet is called active when the stranger is no farther "
        "than the same person; the others still push, the less the farther apart they are. Batch-hard "
        "counts the worst triplet of each anchor alone, batch-all every one.",
        f"**Strangers**, median distance: {ordered('.2f', lambda e: e['negative_p50'])}. A margin stops "
        "pushing where it is reached, the soft one never does. Scale is no merit: what counts is the gap "
        "between the bands.",
        f"**Strangers over the same person**, medians: {apart}.",
        f"**Norm**: {ordered('.1f', lambda e: e['norm'])}.",
    ]


def disputed_in_words(aps: pd.DataFrame, shown: int) -> str:
    """Say how much rows disagree: APs (queries × rows), the most disputed query first."""
    gaps = [(aps[a] - aps[b]).abs().mean() for a, b in itertools.combinations(aps, 2)]
    first, means = aps.iloc[:20], aps.mean()
    winners = first.eq(first.max(axis=1), axis=0).sum().sort_values(ascending=False)
    widest = 100 * (aps.iloc[0].max() - aps.iloc[0].min())
    best = ", ".join(f"{name} answers {count} best" for name, count in winners.items())
    said = (
        f"On these {min(shown, len(aps))} queries the AP differs by up to {widest:.0f} points. Of the "
        f"{len(first)} most disputed, {best} (equal ones count for each). Over all {len(aps):,} queries "
        f"the AP of two rows differs by {100 * np.mean(gaps):.0f} points on average, either way; their "
        f"means differ by at most {100 * (means.max() - means.min()):.0f}."
    )
    if np.mean(gaps) > means.max() - means.min():
        said += " So a mean hides how much rows disagree about whom they find."
    return said
