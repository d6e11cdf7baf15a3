"""What a comparison says of its rows, over the shapes that its data can have; no row is trained."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reidlib.evaluation.intervals import confidence_interval, difference, holm
from reidlib.recipes import make_recipe
from reidlib.workbook import results, verdicts
from reidlib.workbook.compare import Made
from reidlib.workbook.results import SCORES, Run
from reidlib.workbook.variants import PLAIN, VARIANTS, comparison

WINNER = dict(zip(VARIANTS, (0.3, 0.31, 0.32, 0.6, 0.1), strict=True))
HARD, ALL = "batch-hard soft", "batch-all soft"
COMPARED = comparison(make_recipe("demo"), seeds=1)
PATH = [gain for gain in COMPARED.gains if gain.label.startswith("+")]
LEVEL = {name: 0.5 for name, _ in COMPARED.rows}  # all rows are equal


def per_query(level, noise, seed, people=20, each=3):
    count = people * each
    ap = np.clip(level + noise * np.random.default_rng(seed).standard_normal(count), 0, 1)
    table = pd.DataFrame({"query": range(count), "pid": np.repeat(range(people), each)})
    scores = {"AP": ap, "AP_market": ap, "first_rank": np.where(ap > 0.5, 1, 4), "INP": ap / 2}
    return table.assign(matches=2, **scores)


def rows_of(levels, seeds=1, noise=0.05, findings=None, held=None):
    """Rows of about these mAPs; the variants with so many seeds."""
    found = {}
    for i, (name, level) in enumerate(levels.items()):
        for s in range(seeds if name in VARIANTS else 1):
            table = per_query(level + 0.004 * (s - (seeds - 1) / 2), noise, 100 * i + s)
            mAP = [np.nan] * 7 + [(held or {}).get(name, np.nan)]
            history = pd.DataFrame({"step": range(8), "held_out_mAP": mAP})
            run = Run(Path(f"{name}_{s}"), table, history, 2.0, (findings or {}).get(name, []))
            found[name, s] = run
    return found


def judged(found):
    """The table, the spread and the pairs of a comparison."""
    spread = verdicts.spread_of(found)
    return results.summary(found), spread, verdicts.pairs_of(found, spread)


def test_one_row_alone_is_compared_with_nothing():
    found = rows_of({HARD: 0.6})
    table, spread, pairs = judged(found)
    said = results.table_in_words(table, {})
    assert said.startswith(f"Highest mAP: **{HARD}**, 60.") and "Random triplets" not in said
    assert not len(pairs) and not [*verdicts.pairs_in_words(pairs)]
    alone = f"There is one row alone, {HARD}: nothing to compare it with."
    assert verdicts.conclusion(pairs, table) == alone
    grid, ladder = verdicts.margin_table(found, {}, "test"), verdicts.ladder_of(found, [], spread)
    (margins,) = verdicts.margins_in_words(found, {}, grid, "test", spread)
    said = margins, verdicts.ladder_in_words(ladder, found)
    lacks = " was not asked for, or its rows are missing."
    assert said == (f"The grid of margins{lacks}", f"What makes the numbers{lacks}")
    assert verdicts.best_step_in_words(ladder) == ""


def test_rows_that_are_all_equal():
    found = rows_of(dict.fromkeys(VARIANTS, 0.5), noise=0)
    table, _, pairs = judged(found)
    assert results.highest(table) == list(VARIANTS)
    assert "random soft**, 50.0 %" in results.table_in_words(table, {})
    none, apart = verdicts.pairs_in_words(pairs)
    assert none.startswith("**No difference holds**, with other people (not another seed)")
    assert apart.count(" and ") >= 10 and "That does not make them equal" in apart
    assert "None is shown to be best" in verdicts.conclusion(pairs, table)
    assert set(pairs["holm"]) == {1.0}
    aps = pd.DataFrame({name: found[name, 0].per_query["AP"] for name in VARIANTS})
    said = verdicts.disputed_in_words(aps, 2)
    assert "differs by up to 0 points" in said and "a mean hides" not in said
    said = verdicts.disputed_in_words(aps.assign(**{HARD: 1 - 0.5 * (aps.index % 2)}), 2)
    assert "up to 50 points. Of the 20 most disputed, batch-hard soft answers 20 best" in said
    assert "differs by 10 points on average" in said and "at most 25." in said


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_clear_winner(seeds):
    found = rows_of(WINNER, seeds)
    table, spread, pairs = judged(found)
    assert spread.freedom == 5 * (seeds - 1)
    luck = "other people and another seed" if seeds > 1 else "other people (not another seed)"
    conclusion = verdicts.conclusion(pairs, table)
    assert conclusion.startswith(f"{HARD} has the highest mAP. It beats each of the others.")
    assert ("other seeds may turn it round." in conclusion) == (seeds == 1)
    count = sum(pairs["holm"] < 0.05)
    assert (
        f"Of 10 differences between the rows {count} hold when" in conclusion and luck in conclusion
    )
    hold = next(verdicts.pairs_in_words(pairs))
    assert hold.startswith(f"**These differences hold**, with {luck}, all claimed together: ")
    assert hold.count(" beats ") == count and f"beats {HARD}" not in hold
    said = verdicts.luck_in_words(found, spread, verdicts.intervals(found))
    told = f"deviation of {100 * spread.deviation:.1f} points (10 degrees of freedom, from all rows"
    assert (told if seeds > 1 else "One seed says nothing") in said
    assert ("±" in results.for_people(table, {})["mAP"][HARD]) == (seeds > 1)
    worth = table["mAP"][HARD] - table["mAP"]["random soft"]
    assert f"{HARD} {worth:+.1f}, {ALL} " in results.table_in_words(table, {})
    pairs.loc[pairs.index[0], "low"] = -0.04  # no column is empty, and there is no -0.0
    shown = verdicts.for_people(pairs)
    assert ("error: seeds" in shown) == (seeds > 1) and not shown.isna().any(axis=None)
    assert {"difference", "from", "to", "holds"} < {*shown} and "higher" not in shown
    assert str(shown["from"].iloc[0]) == "0.0" and {*shown["holds"]} <= {"✓", "–"}


def test_claims_are_the_differences_in_points_corrected_together():
    found = rows_of(WINNER, 2)
    _, spread, pairs = judged(found)
    sides = [results.tables_of(found, name) for name in (HARD, ALL)]
    slow = difference(*sides, spread=spread)
    row = pairs.loc[f"{HARD} − {ALL}"]
    assert pairs["value"].is_monotonic_decreasing and (pairs["value"] > 0).all()
    said = f"{HARD} beats {ALL} by {100 * slow.value:.1f} points (p {verdicts.chance(row['holm'])})"
    assert said in next(verdicts.pairs_in_words(pairs))
    assert (row["higher"], row["lower"]) == (HARD, ALL)
    wanted = [100 * slow.value, 100 * slow.low, 100 * slow.high, slow.p]
    assert list(row[["value", "low", "high", "p"]]) == pytest.approx(wanted)
    assert list(row[["people", "seeds"]]) == pytest.approx([100 * slow.people, 100 * slow.seeds])
    assert list(pairs["holm"]) == list(holm(pairs["p"]))
    assert list(pairs["holds"]) == [p < 0.05 for p in pairs["holm"]]
    once = verdicts.claims({"a": sides, "b": sides}, spread, one_network=["b"])
    assert list(once["seeds"].isna()) == [False, True]
    assert list(once["p"]) == [slow.p, difference(*sides).p] and slow.p != difference(*sides).p


def test_the_highest_may_be_told_apart_from_some_only():
    table, _, pairs = judged(rows_of(WINNER | {"batch-hard 0.2": 0.6}))
    best, other = sorted((HARD, "batch-hard 0.2"), key=table["mAP"].get, reverse=True)
    assert verdicts.conclusion(pairs, table).startswith(
        f"{best} has the highest mAP. It beats random soft, batch-all 0.2, {ALL}, "
        f"and is not told apart from {other}."
    )


def test_a_difference_may_be_claimed_alone_and_not_with_the_others():
    gap = 0.012  # p is some 0.01 for one pair; ten pairs of four rows more take it away
    levels = dict.fromkeys(VARIANTS, 0.5) | {HARD: 0.5 + gap}
    _, _, pairs = judged(rows_of(levels, noise=0.03))
    alone = sum((pairs["p"] < 0.05) & (pairs["holm"] >= 0.05))
    assert alone, "or this shows nothing"
    said = next(line for line in verdicts.pairs_in_words(pairs) if line.startswith("**Only if"))
    assert "the one question** of 10: " in said and said.count(" beats ") == alone


def test_a_run_that_went_wrong_says_nothing_of_the_luck_of_seeds():
    found = rows_of(WINNER, 2, findings={"batch-all 0.2": ["collapsed"], ALL: ["slow"]})
    table, spread, _ = judged(found)
    assert verdicts.steady(found) == list(VARIANTS)[1:] and spread.freedom == 4
    said = verdicts.luck_in_words(found, spread, verdicts.intervals(found))
    assert f"(4 degrees of freedom, from {', '.join(list(VARIANTS)[1:])})" in said
    assert list(table["health"]) == ["collapsed", "slow", "", "", ""]
    # What needs no training stands under the rows, the highest first.
    shown = results.for_people(table, {"a_b": dict.fromkeys(SCORES, 0.125)})
    assert list(shown.index) == [HARD, "batch-hard 0.2", ALL, "batch-all 0.2", "random soft", "a b"]
    assert list(shown.loc["a b", ["seeds", "mAP", "health"]]) == ["–", "12.5", "–"]
    assert "held-out mAP" not in shown and shown["health"][HARD] == "no finding"


def test_all_scores_have_intervals_over_people():
    found = rows_of(WINNER, 2)
    both = pd.concat(results.tables_of(found, HARD), ignore_index=True)
    value, low, high = 100 * confidence_interval(both, by="pid").loc["mAP"]
    intervals = verdicts.intervals(found)
    assert list(intervals["mAP"].loc[HARD]) == [value, low, high] and low < value < high
    assert {*intervals.columns.levels[0]} == {*SCORES} and [*intervals.index] == [*VARIANTS]


# --- margins and steps


def test_rows_are_the_variants_the_grid_the_path_and_the_departures():
    rows = COMPARED.rows
    assert len(rows) == 5 + 6 + 6 + 5
    assert {*COMPARED.grid.values()} <= rows.keys() and len(COMPARED.grid) == 10
    assert PATH[0].before == PLAIN and PATH[-1].after == (HARD, 0)
    assert all(a.after == b.before for a, b in zip(PATH, PATH[1:], strict=False)), "one path"
    for gain in COMPARED.gains:
        after, before = (rows[key].recipe.model_dump() for key in (gain.after, gain.before))
        differ = {name for name in after if after[name] != before[name]}
        assert differ and (len(differ) == 1 or differ == {"height", "width"}), gain.label
    few = comparison(make_recipe("demo"), seeds=2, margins=False, ladder=False)
    assert len(few.rows) == 10 and not few.grid and not few.gains
    assert {row.recipe.seed for row in few.rows.values()} == {0, 1}
    assert few.rows[HARD, 1].tag == "compare_s1"
    same = comparison(make_recipe("demo", last_stride=1, epoch="images"), seeds=1)
    assert {"last stride 1", "epochs of images"}.isdisjoint(name for name, _ in same.rows)


def margins(found, split):
    table = verdicts.margin_table(found, COMPARED.grid, split)
    spread = verdicts.spread_of(found)
    return table, [*verdicts.margins_in_words(found, COMPARED.grid, table, split, spread)]


def test_margins_are_chosen_on_held_out_people():
    held = dict.fromkeys(LEVEL, 0.4) | {"batch-hard 1.0": 0.45}
    found = rows_of(LEVEL | {"batch-hard 0.5": 0.7}, held=held)
    assert list(results.for_people(results.summary(found), {})["held-out mAP"]) == ["40.0"] * 5
    table, (_, hard) = margins(found, "test")
    losses = ("batch_all", "batch_hard")
    assert {*table.columns} == {(loss, where) for loss in losses for where in ("test", "held_out")}
    chosen, top = table["batch_hard", "test"][["1.0", "0.5"]]
    assert f"Held-out people choose 1.0, with {chosen:.1f} % on the test split; 0.5" in hard
    assert f"would have given {top - chosen:.1f} points more" in hard and "tune on the test" in hard
    assert hard.endswith("Beyond luck, all claimed together, worse than 1.0: none; better: 0.5.")
    # On held-out people alone there is one column, and nothing is chosen on it for the test split.
    table, (_, hard) = margins(found, "held_out")
    assert {where for _, where in table.columns} == {"held_out"}
    said = "The highest is 0.5. Beyond luck, all claimed together, worse than 0.5: 0.1, 0.2, 1.0"
    assert hard.partition(": ")[2] == f"{said}, soft; better: none."
    # A loss of which one margin alone is there has no curve.
    table, _ = margins(rows_of({n: 0.5 for n in LEVEL if "hard" in n or n == ALL}), "test")
    assert {*table.columns} == {("batch_hard", "test")}


def climbed(levels, noise=0.02, flipped=None):
    found = rows_of(levels, noise=noise)
    ladder = verdicts.ladder_of(found, COMPARED.gains, verdicts.spread_of(found), flipped)
    return ladder, verdicts.ladder_in_words(ladder, found)


def test_the_step_that_brings_most_is_named():
    ladder, said = climbed(LEVEL | {"plain": 0.3}, flipped=per_query(0.6, 0.02, 1))
    first, flips = "+ normalise as ImageNet", f"test-time flips ({HARD})"
    best = f"Of the single steps, **{first}** brings most: {ladder['value'][first]:+.1f} points."
    assert verdicts.best_step_in_words(ladder) == best
    assert said.startswith(f"{best} The plain recipe alone has 30.")
    assert list(ladder.index[ladder["holds"]]) == [first, flips]
    assert f"{first} ({ladder['value'][first]:+.1f}); {flips} (+" in said
    assert said.endswith("The others are within what other people (not another seed) do by chance.")
    assert ladder["what"]["batch-hard, not random"].startswith("mining")
    assert ladder["mAP"][flips] == pytest.approx(60, abs=1)


def test_nothing_above_plain_and_steps_whose_rows_are_missing():
    falls = {gain.after[0]: 0.5 - 0.02 * i for i, gain in enumerate(PATH, 1)}
    levels = dict.fromkeys(LEVEL, 0.2) | falls | {"plain": 0.5, "random soft": 0.6}
    _, said = climbed(levels, noise=0)
    assert said.startswith("No step gains anything here. The plain recipe alone has 50.0 % mAP.")
    assert "(-2.0)" in said, "losses that hold are told too"
    levels = {name: 0.5 for name in LEVEL if name not in ("plain", "no head")}
    ladder, said = climbed(levels, noise=0)
    assert "plain recipe" not in said and "all claimed together: none. The others" in said
    assert {"+ normalise as ImageNet", f"no head ({HARD})"}.isdisjoint(ladder.index)
    assert f"last stride 1 ({HARD})" in ladder.index


def test_rows_that_were_made_are_counted():
    made = {("a", 0): Made(Path("a"), trained=True), ("b", 0): Made(Path("b"))}
    said = results.made_in_words(made, 1.25)
    assert said == "1 of 2 rows were made now, in 1.2 minutes; 1 were there before; missing: 0."
    said = results.made_in_words(made | {("c", 0): Made(None, "no memory")}, 0)
    assert said.endswith("1 were there before; missing: 1.")
    with pytest.raises(RuntimeError, match="No row of the variants is there"):
        results.read({PLAIN: Made(Path("a"))})
