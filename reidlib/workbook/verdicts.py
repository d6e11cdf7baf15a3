"""Which differences between the rows are real, and the sentences that say so.

Pairs of variants, margins and single steps are judged alike: subtracted query by query, and corrected
for how many are claimed at once (`claims`).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from reidlib.evaluation.intervals import (
    TABLES,
    Difference,
    Spread,
    confidence_interval,
    difference,
    holm,
    seed_spread,
)
from reidlib.evaluation.metrics import score_values
from reidlib.training.watched import BROKEN
from reidlib.workbook.results import Runs, compared, highest, summary, tables_of
from reidlib.workbook.variants import BASE, MARGINS, PLAIN, Gain

SURE = 0.05
# Claims as tables for people head them.
HEADINGS = {"value": "difference", "low": "from", "high": "to", "people": "error: people"}
HEADINGS |= {"seeds": "error: seeds", "p": "p alone", "holm": "p of all", "holds": "holds"}
HEADINGS |= {"mAP": "mAP with it", "what": "what it is, or how its lack shows"}


def intervals(found: Runs) -> pd.DataFrame:
    """Return each variant's scores, all seeds together, with 95 % intervals over people, in per cent.

    Columns are pairs of a score and `value`, `low` or `high`.
    """
    tables = {
        name: pd.concat(tables_of(found, name), ignore_index=True) for name in compared(found)
    }
    scores = {name: confidence_interval(table, by="pid") for name, table in tables.items()}
    return 100 * pd.DataFrame({name: score.stack() for name, score in scores.items()}).T


def steady(found: Runs) -> list[str]:
    """Return the variants of which no run went wrong: its spread says nothing of the others."""
    broken = {name for (name, _), run in found.items() if BROKEN & {*run.findings}}
    return [name for name in compared(found) if name not in broken]


def spread_of(found: Runs) -> Spread:
    """Return how far the seed moves the mAP of the steady variants."""
    return seed_spread({name: tables_of(found, name) for name in steady(found)})


def luck_in_words(found: Runs, spread: Spread, scores: pd.DataFrame) -> str:
    """Say how far other people and another seed would move a score; `scores`: of `intervals`."""
    reach = (scores["mAP", "high"] - scores["mAP", "low"]).mean() / 2
    several = [name for name in steady(found) if len(tables_of(found, name)) > 1]
    rows = "all rows" if several == compared(found) else ", ".join(several)
    said = f"With other people each mAP would move by about ±{reach:.1f} points."
    if not spread.freedom:
        return f"{said} One seed says nothing of another: what follows is about these networks."
    return (
        f"{said} From seed to seed the mAP of a row has a standard deviation of "
        f"{100 * spread.deviation:.1f} points ({spread.freedom} degrees of freedom, from {rows})."
    )


# --- claims


def claims(
    sides: Mapping[str, tuple[TABLES, TABLES]], spread: Spread, one_network: Iterable[str] = ()
) -> pd.DataFrame:
    """Subtract the mAP of two sides, first minus second, for each of several claims.

    Args:
        sides: by label, two rows' per-query tables, one for each seed.
        spread: of the seeds.
        one_network: labels of which both sides are one network: there the seed is no luck.

    Returns:
        In points `value`, its 95 % interval `low` to `high`, its errors from `people` and `seeds`;
        `p` of each alone, `holm` corrected for claiming all of them at once, and whether it `holds`.
    """
    found = [
        difference(*its, spread=None if label in one_network else spread)
        for label, its in sides.items()
    ]
    table = pd.DataFrame(found, list(sides), Difference._fields, dtype=float)
    p = table.pop("p")
    adjusted = holm(p)
    return (100 * table).assign(p=p, holm=adjusted, holds=adjusted < SURE)


def luck(table: pd.DataFrame) -> str:
    """Return in words what claims account for."""
    known = table["seeds"].notna().any()
    return "other people " + ("and another seed" if known else "(not another seed)")


def chance(p: float) -> str:
    """Return a p-value with what stands before it, unbroken: `= 0.012`, or `< 0.001`."""
    return "<\xa00.001" if p < 0.0005 else f"=\xa0{p:.3f}"


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """Return claims under plain headings, in whole tenths of points, without what is unknown."""
    points = ["value", "low", "high", "people", "seeds", *(["mAP"] if "mAP" in table else [])]
    table = table.assign(**table[points].round(1) + 0.0)  # + 0.0: there is no -0.0
    table["holds"] = np.where(table["holds"], "✓", "–")
    for p in ("p", "holm"):
        table[p] = [chance(value).removeprefix("=\xa0") for value in table[p]]
    known = [key for key in HEADINGS if key in table and table[key].notna().any()]
    return table[known].rename(columns=HEADINGS)


# --- pairs of variants


def pairs_of(found: Runs, spread: Spread) -> pd.DataFrame:
    """Compare all variants with each other: `claims`, with the columns `higher` and `lower`.

    The higher stands first, and the largest difference on top.
    """
    best_first = summary(found)["mAP"].sort_values(ascending=False, kind="stable").index
    tables = {name: tables_of(found, name) for name in best_first}
    pairs = list(itertools.combinations(tables, 2))
    table = claims({f"{a} − {b}": (tables[a], tables[b]) for a, b in pairs}, spread)
    table = table.assign(higher=[a for a, _ in pairs], lower=[b for _, b in pairs])
    return table.sort_values("value", ascending=False, kind="stable")


def pairs_in_words(pairs: pd.DataFrame) -> Iterator[str]:
    """Say which differences hold, which might, and which cannot be told."""

    def beats(table: pd.DataFrame) -> str:
        return "; ".join(
            f"{d.higher} beats {d.lower} by {abs(d.value):.1f} points (p {chance(d.holm)})"
            for d in table.itertuples()
        )

    hold, rest = pairs[pairs["holds"]], pairs[pairs["p"] >= SURE]
    alone = pairs[(pairs["p"] < SURE) & ~pairs["holds"]]
    if len(hold):
        yield f"**These differences hold**, with {luck(pairs)}, all claimed together: {beats(hold)}."
    elif len(pairs):
        yield f"**No difference holds**, with {luck(pairs)}, when all are claimed together."
    if len(alone):
        yield f"**Only if that pair had been the one question** of {len(pairs)}: {beats(alone)}."
    if len(rest):
        least = (rest["high"] - rest["low"]).mean() / 2
        yield (
            f"**Not told apart**: {'; '.join(f'{d.higher} and {d.lower}' for d in rest.itertuples())}. "
            "That does not make them equal: these queries and seeds show no difference below about "
            f"{least:.1f} points, and a larger one only where it is claimed alone."
        )


def conclusion(pairs: pd.DataFrame, table: pd.DataFrame) -> str:
    """Say which variant is best, as far as it can be said, and how many differences are real."""
    best, *equal = highest(table)
    if pairs.empty:
        return f"There is one row alone, {best}: nothing to compare it with."
    hold = pairs[pairs["holds"]]
    beaten = [*hold["lower"][hold["higher"] == best]]
    level = [name for name in table.index if name not in (best, *beaten)]
    if beaten:
        apart = f"{', '.join(beaten)}, and is not told apart from {', '.join(level)}"
        said = f"{best} has the highest mAP. It beats {apart if level else 'each of the others'}."
    else:
        best = " and ".join([best, *equal])
        said = f"None is shown to be best: no row is told apart from {best}, the highest."
    if pairs["seeds"].isna().all():
        said += " It is about these very networks: other seeds may turn it round."
    return (
        f"{said} Of {len(pairs)} differences between the rows {len(hold)} hold when all are claimed "
        f"together, with {luck(pairs)}."
    )


# --- margins


def margin_table(found: Runs, grid: Mapping, split: str) -> pd.DataFrame:
    """Return the mAP in per cent over margins, a column for each loss and for its held-out people.

    Columns are (loss, "test" or the split it is), of losses with two margins or more.
    """
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for (loss, margin), run in ((place, found[key]) for place, key in grid.items() if key in found):
        cells.setdefault((loss, split), {})[str(margin)] = 100 * run.scores["mAP"]
        if split == "test" and not np.isnan(run.held_out):
            cells.setdefault((loss, "held_out"), {})[str(margin)] = run.held_out
    several = {column: values for column, values in cells.items() if len(values) > 1}
    return pd.DataFrame(several, index=[str(m) for m in MARGINS], dtype=float)


def margins_in_words(
    found: Runs, grid: Mapping, table: pd.DataFrame, split: str, spread: Spread
) -> Iterator[str]:
    """Say which margin to choose for each loss, and which are worse beyond luck."""
    if table.empty:
        yield "The grid of margins was not asked for, or its rows are missing."
    for loss in dict.fromkeys(loss for loss, _ in table.columns):
        scores = table[loss]
        on = "held_out" if "held_out" in scores else split
        chosen, top = scores[on].idxmax(), scores[split].idxmax()
        tables = {
            str(margin): [found[key].per_query]
            for (its, margin), key in grid.items()
            if its == loss and key in found
        }
        against = tables.pop(chosen)
        others = claims({m: (its, against) for m, its in tables.items()}, spread)
        said = f"The highest is {chosen}"
        if on != split:
            said = f"Held-out people choose {chosen}, with {scores[split][chosen]:.1f} % on the test split"
        if others["value"].get(top, 0) > 0:
            gap = others.loc[top]
            said += (
                f"; {top} would have given {gap.value:.1f} points more (95 % interval {gap.low:+.1f} to "
                f"{gap.high:+.1f}), but to choose it by that would be to tune on the test split"
            )
        real = others["value"][others["holds"]]
        worse, better = (", ".join(its.index) or "none" for its in (real[real < 0], real[real > 0]))
        yield (
            f"**{loss.replace('_', '-')}**: {said}. Beyond luck, all claimed together, worse than {chosen}: "
            f"{worse}; better: {better}."
        )


# --- what makes the numbers


def ladder_of(
    found: Runs, gains: list[Gain], spread: Spread, flipped: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Compare the two sides of each step whose rows are there.

    Args:
        found: the runs.
        gains: the steps.
        spread: of the seeds.
        flipped: the per-query table of the base with test-time flips, to make them a step, too.

    Returns:
        `claims`, with the columns `mAP` (per cent, with the step) and `what`.
    """
    sides = {
        gain.label: ([found[gain.after].per_query], [found[gain.before].per_query])
        for gain in gains
        if gain.after in found and gain.before in found
    }
    mining, flips = "batch-hard, not random", f"test-time flips ({BASE})"
    hard, chance = tables_of(found, BASE), tables_of(found, "random soft")
    if gains and hard and chance:
        sides[mining] = (hard, chance)
    if flipped is not None:
        sides[flips] = ([flipped], [found[BASE, 0].per_query])
    what = {mining: "mining: each anchor's hardest triplet, not a random one"}
    what |= {flips: "the mirror image at test time too"} | {gain.label: gain.what for gain in gains}
    return claims(sides, spread, one_network=[flips]).assign(
        mAP=[100 * score_values(pd.concat(after))["mAP"].mean() for after, _ in sides.values()],
        what=[what[label] for label in sides],
    )


def best_step_in_words(ladder: pd.DataFrame) -> str:
    """Say which single step brings most; "" where none brings anything."""
    value = ladder["value"]
    if not (value > 0).any():
        return ""
    return f"Of the single steps, **{value.idxmax()}** brings most: {value.max():+.1f} points."


def ladder_in_words(ladder: pd.DataFrame, found: Runs) -> str:
    """Say which step brings most, and which hold."""
    if ladder.empty:
        return "What makes the numbers was not asked for, or its rows are missing."
    said = best_step_in_words(ladder) or "No step gains anything here."
    if PLAIN in found:
        said += f" The plain recipe alone has {100 * found[PLAIN].scores['mAP']:.1f} % mAP."
    hold = ladder["value"][ladder["holds"]].sort_values(ascending=False)
    words = "; ".join(f"{name} ({value:+.1f})" for name, value in hold.items()) or "none"
    said += f" Gains or losses that hold, all claimed together: {words}."
    if len(hold) < len(ladder):
        said += f" The others are within what {luck(ladder)} do by chance."
    return said


def disputed_in_words(aps: pd.DataFrame, shown: int) -> str:
    """Say how much rows disagree: APs (queries × rows), the most disputed query first."""
    gaps = np.mean([(aps[a] - aps[b]).abs().mean() for a, b in itertools.combinations(aps, 2)])
    widest, apart = np.ptp(aps.iloc[0]), np.ptp(aps.mean())
    first = aps.iloc[:20]
    winners = first.eq(first.max(axis=1), axis=0).sum().sort_values(ascending=False)
    best = ", ".join(f"{name} answers {count} best" for name, count in winners.items())
    hides = " So a mean hides whom each row finds." if gaps > apart else ""
    return (
        f"On these {min(shown, len(aps))} queries the AP differs by up to {100 * widest:.0f} points. Of "
        f"the {len(first)} most disputed, {best} (equal ones count for each). Over all {len(aps):,} "
        f"queries the AP of two rows differs by {100 * gaps:.0f} points on average, either way; their "
        f"means differ by at most {100 * apart:.0f}.{hides}"
    )
