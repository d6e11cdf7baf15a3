"""Single steps: what a margin and what each step to the recipe and away from it is worth."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from reidlib.evaluation.intervals import Spread, difference, holm
from reidlib.evaluation.metrics import score_values
from reidlib.workbook.results import Results, last_held_out
from reidlib.workbook.variants import MARGINS, Gain
from reidlib.workbook.verdicts import SURE, Pairs, differences


def margin_table(results: Results, grid: Mapping, split: str) -> pd.DataFrame:
    """Return the mAP in per cent over margins, a column for each loss and for its held-out people.

    Columns are (loss, "test" or the split it is), of losses with two margins or more.
    """
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for (loss, margin), key in grid.items():
        if key not in results.tables:
            continue
        mAP = 100 * score_values(results.tables[key])["mAP"].mean()
        cells.setdefault((loss, split), {})[str(margin)] = mAP
        held = last_held_out(results.histories[key]) if split == "test" else None
        if held is not None:
            cells.setdefault((loss, "held_out"), {})[str(margin)] = held
    several = {column: values for column, values in cells.items() if len(values) > 1}
    return pd.DataFrame(several, index=[str(m) for m in MARGINS], dtype=float)


def margins_in_words(
    results: Results, grid: Mapping, table: pd.DataFrame, split: str, spread: Spread
) -> list[str]:
    """Say which margin to choose for each loss, and which are worse beyond luck."""
    said = [
        _margin_in_words(results, grid, table, loss, split, spread)
        for loss in dict.fromkeys(loss for loss, _ in table.columns)
    ]
    seed = (
        f"Each point is one seed; another would move it by {100 * spread.deviation:.1f} points (standard "
        "deviation, section 4), which the comparisons above count in."
        if spread.freedom
        else "Each point is one seed, and what another would give is not known: the comparisons above are "
        "about these very networks."
    )
    return (
        [*said, seed]
        if said
        else ["The grid of margins was not asked for, or its rows are missing."]
    )


def _margin_in_words(
    results: Results, grid: Mapping, table: pd.DataFrame, loss: str, split: str, spread: Spread
) -> str:
    scores = table[loss, split].dropna()
    held = (
        table[loss, "held_out"].dropna()
        if (loss, "held_out") in table and split == "test"
        else None
    )
    chosen, top = (scores if held is None else held).idxmax(), scores.idxmax()
    runs_ = {
        str(m): results.tables[key]
        for (its, m), key in grid.items()
        if its == loss and key in results.tables
    }
    against = {
        margin: difference([runs_[chosen]], [other], spread=spread)
        for margin, other in runs_.items()
        if margin != chosen
    }
    luck = dict(zip(against, holm([d.p for d in against.values()]), strict=True))
    worse = [m for m, d in against.items() if luck[m] < SURE and d.value > 0]
    better = [m for m, d in against.items() if luck[m] < SURE and d.value < 0]
    said = f"**{loss.replace('_', '-')}**: the margins lie between {scores.min():.1f} and "
    said += f"{scores.max():.1f} %. "
    if held is None:
        said += f"The highest is {chosen}"
    else:
        said += (
            f"Held-out people choose {chosen}, which gives {scores[chosen]:.1f} % on the test split"
        )
        more = scores[top] - scores[chosen]
        if more > 0:
            gap = against[top]
            said += (
                f"; {top} would have given {more:.1f} points more (95 % interval {-100 * gap.high:+.1f} to "
                f"{-100 * gap.low:+.1f}), but to choose it by that would be to tune on the test split"
            )
    said += f". Worse than {chosen} beyond luck: {', '.join(worse) or 'none of the others'}"
    return said + (f"; better: {', '.join(better)}." if better else ".")


# --- what makes the numbers


class Step(NamedTuple):
    """One step with its two sides, as per-query tables of one or more seeds."""

    label: str
    after: list[pd.DataFrame]
    before: list[pd.DataFrame]
    what: str
    seeded: bool = True
    """False where both sides are one network, as with flips: there the seed is no luck"""


def steps_of(
    results: Results, gains: list[Gain], flipped: pd.DataFrame | None = None
) -> list[Step]:
    """Return the steps whose rows are there; `flipped`: the per-query table with test-time flips."""
    tables, base = results.tables, ("batch-hard soft", 0)
    steps = [
        Step(g.label, [tables[g.after]], [tables[g.before]], g.what)
        for g in gains
        if g.after in tables and g.before in tables
    ]
    if flipped is not None and base in tables:
        what = "the mirror image at test time too"
        steps.append(Step(f"test-time flips ({base[0]})", [flipped], [tables[base]], what, False))
    hard, chance = results.of("batch-hard soft"), results.of("random soft")
    if gains and hard and chance:
        what = "mining: each anchor's hardest triplet, not a random one"
        steps.append(Step("batch-hard, not random", hard, chance, what))
    return steps


class Ladder(NamedTuple):
    """The gains of all steps, and p-values for claiming all of them at once."""

    gains: pd.DataFrame
    """points: `value`, `low`, `high`"""
    table: pd.DataFrame
    """for people"""
    sure: list[str]
    """steps that hold, all claimed together, the largest gain first"""


def ladder_of(steps: list[Step], spread: Spread) -> Ladder:
    """Compare the two sides of each step on the same queries."""
    found = [difference(s.after, s.before, spread=spread if s.seeded else None) for s in steps]
    adjusted = holm([d.p for d in found])
    gains = differences(found, [step.label for step in steps])
    columns = {
        "mAP, %": [100 * np.mean([score_values(t)["mAP"].mean() for t in s.after]) for s in steps],
        "gain": gains["value"].to_list(),
        "95 % interval": [
            f"{low:+.1f} to {high:+.1f}" for low, high in gains[["low", "high"]].to_numpy()
        ],
        "p, Holm": adjusted,
        "what it is, or how its lack shows": [step.what for step in steps],
    }
    ordered = gains["value"].sort_values(ascending=False).index
    sure = {step.label for step, p in zip(steps, adjusted, strict=True) if p < SURE}
    return Ladder(
        gains, pd.DataFrame(columns, index=gains.index), [name for name in ordered if name in sure]
    )


def ladder_in_words(ladder: Ladder, results: Results, pairs: Pairs) -> str:
    """Say which step brings most, and which hold."""
    if not len(ladder.gains):
        return "What makes the numbers was not asked for, or its rows are missing."
    order = ladder.gains["value"].sort_values(ascending=False)
    said = "No step gains anything here."
    if order.iloc[0] > 0:
        said = f"The largest gain is **{order.index[0]}**, {order.iloc[0]:+.1f} points."
    if ("plain", 0) in results.tables:
        plain = 100 * score_values(results.tables["plain", 0])["mAP"].mean()
        said += f" The plain recipe alone has {plain:.1f} % mAP."
    sure = "; ".join(f"{name} ({order[name]:+.1f})" for name in ladder.sure) or "none"
    said += f" Gains or losses that hold, all claimed together: {sure}."
    if len(ladder.sure) < len(order):
        said += f" The others are within what {pairs.luck} do by chance."
    return said


def best_step_in_words(ladder: Ladder) -> str:
    """Say which single step brings most; "" where none brings anything."""
    order = ladder.gains["value"].sort_values(ascending=False)
    if not len(order) or order.iloc[0] <= 0:
        return ""
    return f"Of the single steps, {order.index[0]} brings most: {order.iloc[0]:+.1f} points."


def scale_in_words(ladder: Ladder) -> str:
    """Say what the rows show that change little but the scale of the loss; "" if none is there."""
    value = ladder.gains["value"]
    scaled = [name for name in value.index if name.startswith("sum")]
    faded = [name for name in value.index if name.startswith("mean over")]
    if not scaled:
        return ""
    moved = [name for name in scaled if name in ladder.sure]
    said = f"A row that changes nothing but the scale of the loss: {scaled[0]} "
    said += f"{value[scaled[0]]:+.1f} points. "
    said += "Adam divides each gradient by its own running size, so that a sum should change no more than "
    said += "another seed does. "
    said += (
        "Here it did change more: the scale is not all."
        if moved
        else "Nor does it here, beyond luck."
    )
    said += " With SGD or weight decay that is not so."
    if faded:
        said += f" The mean over all triplets ({value[faded[0]]:+.1f}) is more than a scale: as fewer of "
        said += "them are active, its gradient fades."
    return said
