"""What a comparison says of its rows, over the shapes that its data can have; no row is trained."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reidlib.recipes import make_recipe
from reidlib.workbook import gains, results, verdicts
from reidlib.workbook.compare import Made
from reidlib.workbook.results import Results
from reidlib.workbook.variants import VARIANTS, comparison

WINNER = dict(zip(VARIANTS, (0.3, 0.31, 0.32, 0.6, 0.1), strict=True))
HARD, ALL = "batch-hard soft", "batch-all soft"


def per_query(level, noise, seed, people=20, each=3):
    count = people * each
    ap = np.clip(level + noise * np.random.default_rng(seed).standard_normal(count), 0, 1)
    table = pd.DataFrame({"query": range(count), "pid": np.repeat(range(people), each)})
    scores = {"AP": ap, "AP_market": ap, "first_rank": np.where(ap > 0.5, 1, 4), "INP": ap / 2}
    return table.assign(matches=2, **scores)


def history(held=None):
    columns = {"active": 0.4, "positive_p50": 2.0, "negative_p50": 5.0, "norm": 7.0}
    table = pd.DataFrame({"step": range(8)}).assign(loss=0.5, **columns)
    return table if held is None else table.assign(held_out_mAP=[np.nan] * 7 + [held])


def rows_of(levels, seeds=1, noise=0.05, findings=None, held=None):
    """Rows of about these mAPs; the variants with so many seeds."""
    tables = {
        (name, s): per_query(level + 0.004 * (s - (seeds - 1) / 2), noise, 100 * i + s)
        for i, (name, level) in enumerate(levels.items())
        for s in range(seeds if name in VARIANTS else 1)
    }
    return Results(
        folders={key: Path(f"{key[0]}_{key[1]}") for key in tables},
        tables=tables,
        histories={key: history((held or {}).get(key[0])) for key in tables},
        minutes=dict.fromkeys(tables, 2.0),
        findings={key: (findings or {}).get(key[0], []) for key in tables},
    )


def judged(found):
    """The table, the spread and the pairs of a comparison."""
    spread = verdicts.spread_of(found)
    return results.summary(found), spread, verdicts.pairs_of(found, spread)


def test_one_row_alone_is_compared_with_nothing():
    found = rows_of({HARD: 0.6})
    table, spread, pairs = judged(found)
    assert results.table_in_words(table).startswith(f"**{HARD}** has the highest mAP, 60.")
    assert verdicts.pairs_in_words(pairs) == [] and len(verdicts.pairs_table(pairs)) == 0
    alone = f"There is one row alone, {HARD}: nothing to compare it with."
    assert verdicts.conclusion(pairs, table) == alone
    assert verdicts.real_in_words(pairs, table) == f"Is it real? {alone}"
    (said,) = gains.margins_in_words(
        found, {}, gains.margin_table(found, {}, "test"), "test", spread
    )
    assert said == "The grid of margins was not asked for, or its rows are missing."
    ladder = gains.ladder_of(gains.steps_of(found, []), spread)
    said = gains.ladder_in_words(ladder, found, pairs)
    assert said == "What makes the numbers was not asked for, or its rows are missing."
    assert gains.scale_in_words(ladder) == gains.best_step_in_words(ladder) == ""


def test_rows_that_are_all_equal():
    found = rows_of(dict.fromkeys(VARIANTS, 0.5), noise=0)
    table, _, pairs = judged(found)
    assert results.best_of(table) == ("batch-all 0.2", list(VARIANTS)[1:])
    assert "random soft** have the highest mAP, 50.0 %" in results.table_in_words(table)
    none, apart = verdicts.pairs_in_words(pairs)
    assert none.startswith("**No difference holds**, with other people (not another seed)")
    assert apart.count(" and ") >= 10 and "That does not make them equal" in apart
    assert "None is shown to be best" in verdicts.conclusion(pairs, table)
    assert set(verdicts.pairs_table(pairs)["p, Holm"]) == {1.0}
    aps = pd.DataFrame({name: found.tables[name, 0]["AP"] for name in VARIANTS})
    said = verdicts.disputed_in_words(aps, 2)
    assert "differs by up to 0 points" in said and "a mean hides" not in said


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_clear_winner(seeds):
    found = rows_of(WINNER, seeds)
    table, spread, pairs = judged(found)
    assert spread.freedom == 5 * (seeds - 1)
    conclusion = verdicts.conclusion(pairs, table)
    assert conclusion.startswith(f"{HARD} is best: it beats each of the others.")
    assert conclusion.endswith("other seeds may turn it round.") == (seeds == 1)
    hold = verdicts.pairs_in_words(pairs)[0]
    luck = "other people and another seed" if seeds > 1 else "other people (not another seed)"
    assert hold.startswith(f"**These differences hold**, with {luck}, all claimed together: ")
    assert f"{HARD} beats batch-all 0.2 by " in hold and f"beats {HARD}" not in hold
    value = 100 * (found.of(HARD)[0]["AP"] - found.of("random soft")[0]["AP"]).mean()
    if seeds == 1:
        assert f"{HARD} beats random soft by {value:.1f} points (p < 0.001)" in hold
    said = verdicts.real_in_words(pairs, table)
    assert f"Of 10 differences between the rows {len(pairs.hold)} hold" in said
    assert ("error: seeds" in verdicts.pairs_table(pairs)) == (seeds > 1)
    luck = verdicts.luck_in_words(found, spread, verdicts.intervals(found))
    told = f"deviation of {100 * spread.deviation:.1f} points (10 degrees of freedom, all rows"
    assert (told if seeds > 1 else "One seed each says nothing") in luck
    shown = results.for_people(table)
    assert ("±" in shown["mAP"][HARD]) == (seeds > 1)
    worth = table["mAP"][HARD] - table["mAP"]["random soft"]
    assert f"{HARD} {worth:+.1f}, {ALL} " in results.table_in_words(table)


def test_the_highest_may_be_told_apart_from_some_only():
    table, _, pairs = judged(rows_of(WINNER | {"batch-hard 0.2": 0.6}))
    best, other = sorted((HARD, "batch-hard 0.2"), key=table["mAP"].get, reverse=True)
    assert verdicts.conclusion(pairs, table).startswith(
        f"{best} has the highest mAP. It beats batch-all 0.2, {ALL}, random soft, "
        f"and is not told apart from {other}."
    )


def test_a_difference_may_be_claimed_alone_and_not_with_the_others():
    gap = 0.012  # p is some 0.01 for one pair; ten pairs of four rows more take it away
    levels = dict.fromkeys(VARIANTS, 0.5) | {HARD: 0.5 + gap}
    _, _, pairs = judged(rows_of(levels, noise=0.03))
    maybe = [p for p in pairs.found if pairs.found[p].p < 0.05 <= pairs.adjusted[p]]
    assert maybe, "or this shows nothing"
    said = next(line for line in verdicts.pairs_in_words(pairs) if line.startswith("**Only if"))
    assert "not one of 10" in said and said.count(" beats ") == len(maybe)


def test_without_random_rows_mining_is_not_valued():
    table, *_ = judged(rows_of({name: WINNER[name] for name in list(VARIANTS)[:4]}))
    assert "Random triplets" not in results.table_in_words(table)


def test_a_run_that_went_wrong_says_nothing_of_the_luck_of_seeds():
    found = rows_of(WINNER, 2, findings={"batch-all 0.2": ["collapsed"], ALL: ["slow"]})
    table, spread, _ = judged(found)
    assert verdicts.steady(found) == list(VARIANTS)[1:] and spread.freedom == 4
    said = verdicts.luck_in_words(found, spread, verdicts.intervals(found))
    assert (
        f"({spread.freedom} degrees of freedom, {', '.join(list(VARIANTS)[1:])} together)" in said
    )
    assert list(table["health"]) == ["collapsed", "slow", "", "", ""]
    assert results.for_people(table)["health"][HARD] == "no finding"


def test_all_scores_have_intervals_for_people():
    table = verdicts.intervals_table(verdicts.intervals(rows_of(WINNER)))
    assert list(table) == list(results.SCORES.values()) and list(table.index) == list(VARIANTS)
    value, low, high = map(float, re.findall(r"[\d.]+", table["mAP"][HARD]))
    assert 0 < low < value < high < 100


# --- margins and steps


@pytest.fixture(scope="module")
def compared():
    return comparison(make_recipe("demo"), seeds=1)


def names(compared, level=0.5):
    return {name: level for name, _ in compared.rows}


def test_rows_are_the_variants_the_grid_the_path_and_the_departures(compared):
    assert len(compared.rows) == 5 + 6 + 6 + 5
    assert {*compared.grid.values()} <= compared.rows.keys() and len(compared.grid) == 10
    ways = [gain for gain in compared.gains if gain.label.startswith("+")]
    assert ways[0].before == ("plain", 0) and ways[-1].after == (HARD, 0)
    assert all(a.after == b.before for a, b in zip(ways, ways[1:], strict=False)), "one path"
    for gain in compared.gains:
        after, before = (compared.rows[key].recipe for key in (gain.after, gain.before))
        differ = {k for k, v in after.model_dump().items() if v != getattr(before, k)}
        assert differ and (len(differ) == 1 or differ == {"height", "width"}), gain.label
    few = comparison(make_recipe("demo"), seeds=2, margins=False, ladder=False)
    assert len(few.rows) == 10 and not few.grid and not few.gains
    assert {row.recipe.seed for row in few.rows.values()} == {0, 1}
    assert few.rows[HARD, 1].tag == "compare_s1"
    same = comparison(make_recipe("demo", last_stride=1, epoch="images"), seeds=1)
    assert {"last stride 1", "epochs of images"}.isdisjoint(name for name, _ in same.rows)


def test_margins_are_chosen_on_held_out_people(compared):
    held = dict.fromkeys(names(compared), 0.4) | {"batch-hard 1.0": 0.45}
    found = rows_of(names(compared) | {"batch-hard 0.5": 0.7}, held=held)
    spread = verdicts.spread_of(found)
    table = gains.margin_table(found, compared.grid, "test")
    losses = ("batch_all", "batch_hard")
    assert {*table.columns} == {(loss, where) for loss in losses for where in ("test", "held_out")}
    _, hard, seed = gains.margins_in_words(found, compared.grid, table, "test", spread)
    chosen, top = table["batch_hard", "test"][["1.0", "0.5"]]
    assert f"Held-out people choose 1.0, which gives {chosen:.1f} % on the test split; 0.5" in hard
    assert f"would have given {top - chosen:.1f} points more" in hard and "tune on the test" in hard
    assert hard.endswith("beyond luck: none of the others; better: 0.5.")
    assert "what another would give is not known" in seed

    several = verdicts.spread_of(rows_of(WINNER, 3))
    said = gains.margins_in_words(found, compared.grid, table, "test", several)[-1]
    assert f"another would move it by {100 * several.deviation:.1f} points" in said
    # On held-out people alone there is one column, and nothing is chosen on it for the test split.
    table = gains.margin_table(found, compared.grid, "held_out")
    assert {where for _, where in table.columns} == {"held_out"}
    _, hard, _ = gains.margins_in_words(found, compared.grid, table, "held_out", spread)
    assert (
        "The highest is 0.5" in hard and "Worse than 0.5 beyond luck: 0.1, 0.2, 1.0, soft." in hard
    )
    # A loss of which one margin alone is there has no curve.
    few = rows_of({name: 0.5 for name in names(compared) if "hard" in name or name == ALL})
    assert {loss for loss, _ in gains.margin_table(few, compared.grid, "test")} == {"batch_hard"}


def climbed(compared, levels, noise=0.02, flipped=None):
    found = rows_of(levels, noise=noise)
    spread = verdicts.spread_of(found)
    ladder = gains.ladder_of(gains.steps_of(found, compared.gains, flipped), spread)
    return ladder, gains.ladder_in_words(ladder, found, verdicts.pairs_of(found, spread))


def test_the_step_that_brings_most_is_named(compared):
    flipped = per_query(0.6, 0.02, 1)
    ladder, said = climbed(compared, names(compared) | {"plain": 0.3}, flipped=flipped)
    first = "+ normalise as ImageNet"
    gain = ladder.gains["value"][first]
    assert f"The largest gain is **{first}**, {gain:+.1f} points. The plain recipe alone" in said
    assert ladder.sure == [first, f"test-time flips ({HARD})"]
    assert said.endswith("The others are within what other people (not another seed) do by chance.")
    assert gains.best_step_in_words(ladder) == (
        f"Of the single steps, {first} brings most: {gain:+.1f} points."
    )
    assert "batch-hard, not random" in ladder.table.index
    said = gains.scale_in_words(ladder)
    assert "Nor does it here, beyond luck" in said and "its gradient fades" in said
    scaled, _ = climbed(compared, names(compared) | {"sum, not mean": 0.8})
    assert "Here it did change more: the scale is not all" in gains.scale_in_words(scaled)


def test_nothing_above_plain(compared):
    order = [gain.after[0] for gain in compared.gains if gain.label.startswith("+")]
    falls = {name: 0.5 - 0.02 * (i + 1) for i, name in enumerate(order)}
    levels = names(compared, 0.2) | falls | {"plain": 0.5, "random soft": 0.6}
    ladder, said = climbed(compared, levels, noise=0)
    assert said.startswith("No step gains anything here. The plain recipe alone has 50.0 % mAP.")
    assert gains.best_step_in_words(ladder) == ""
    assert "(-2.0)" in said, "losses that hold are told too"


def test_steps_whose_rows_are_missing_are_left_out(compared):
    levels = {name: 0.5 for name in names(compared) if name not in ("plain", "no head")}
    ladder, said = climbed(compared, levels, noise=0)
    assert "plain recipe" not in said and said.endswith(
        "all claimed together: none. The others are "
        "within what other people (not another seed) do by chance."
    )
    missing = {"+ normalise as ImageNet", f"no head ({HARD})"}
    assert missing.isdisjoint(ladder.table.index)
    assert f"last stride 1 ({HARD})" in ladder.table.index


def test_trainings_are_ordered_by_where_they_ended():
    low, high = history(), history().assign(active=0.9, norm=1.0)
    active, _, _, norm = verdicts.ends_in_words({"low": low, "high": high})
    assert active.startswith("**Active share**: high 90.0%, low 40.0%. ")
    assert norm == "**Norm**: low 7.0, high 1.0."


def test_rows_that_were_made_are_counted():
    made = {("a", 0): Made(Path("a"), trained=True), ("b", 0): Made(Path("b"))}
    said = results.made_in_words(made, 1.25)
    assert said == "1 of 2 rows were made now, in 1.2 minutes; 1 were there before."
    said = results.made_in_words(made | {("c", 0): Made(None, "no memory")}, 0)
    assert said.endswith("1 were there before; missing: 1, see below.")
    with pytest.raises(RuntimeError, match="No row of the variants is there"):
        results.read_results({("plain", 0): Made(Path("a"))})
