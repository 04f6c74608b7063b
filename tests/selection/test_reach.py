"""A target is met, closely, with few evaluations, and an impossible one says what is possible."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idap.errors import BudgetError
from idap.selection.ranking import ScoredBlock, rank_units
from idap.selection.reach import REPAIRS, reach
from idap.selection.rounding import round_units
from tests.selection.problems import problems

MULTIPLES, SHARES = st.sampled_from([1, 2, 4]), st.floats(0, 1)


def least_and_most(problem, ranking, multiples=1):
    """Cost with all of the ranking gone, and with none."""
    count = len(ranking)
    return (
        problem.cost(round_units(ranking, ranking.keep(count), multiples), ranking.blocks_among(count)),
        problem.cost(round_units(ranking, ranking.keep(0), multiples)),
    )


def target_of(problem, ranking, share, multiples=1):
    least, most = least_and_most(problem, ranking, multiples)
    return least + share * (most - least)


def first_beginning(problem, ranking, target, multiples=1):
    """The first beginning of the ranking that meets a target, by linear search: (keep, removed)."""
    for count in range(len(ranking) + 1):
        found = round_units(ranking, ranking.keep(count), multiples), ranking.blocks_among(count)
        if problem.cost(*found) <= target:
            return found
    raise AssertionError("no beginning meets the target")


@given(problems(), SHARES, MULTIPLES)
def test_without_a_tolerance_to_keep_it_is_the_shortest_beginning(problem, share, multiples):
    ranking = problem.rank()
    target = target_of(problem, ranking, share, multiples)
    choice = reach(ranking, problem.cost, target, multiples=multiples, tolerance=1.0)
    assert (choice.keep, choice.removed) == first_beginning(problem, ranking, target, multiples)


@given(problems(), SHARES, MULTIPLES)
def test_the_target_is_met_and_repairs_only_come_closer(problem, share, multiples):
    ranking = problem.rank()
    target = target_of(problem, ranking, share, multiples)
    choice = reach(ranking, problem.cost, target, multiples=multiples)
    first = first_beginning(problem, ranking, target, multiples)
    assert choice.cost == problem.cost(choice.keep, choice.removed) <= target
    assert choice.cost >= min(problem.cost(*first), 0.99 * target)
    if problem.cost(*first) >= 0.99 * target:
        assert (choice.keep, choice.removed) == first


@given(problems(), SHARES, MULTIPLES)
def test_a_choice_obeys_the_ranking(problem, share, multiples):
    ranking = problem.rank()
    choice = reach(ranking, problem.cost, target_of(problem, ranking, share, multiples), multiples=multiples)
    gone = 0
    for name, units in problem.present.items():
        number = len(units) - len(choice.keep[name])
        gone += number
        assert set(units) - set(choice.keep[name]) == set(ranking.order.get(name, ())[:number])
    assert round_units(ranking, choice.keep, multiples) == choice.keep
    assert choice.count == gone + len(choice.removed)
    assert list(choice.removed) == [name for name in ranking.blocks if name in choice.removed]
    assert "whole" not in choice.removed or choice.removed == ("whole",)


@given(problems(largest=40), SHARES)
def test_it_is_hit_within_one_part(problem, share):
    ranking = problem.rank()
    target = target_of(problem, ranking, share)
    choice = reach(ranking, problem.cost, target, tolerance=0.0)
    largest = max([*problem.costs.values(), *(block.cost for block in problem.blocks.values())])
    assert choice.count == 0 or target - choice.cost < largest


@given(st.lists(st.integers(0, 99), min_size=300, max_size=300), st.floats(0.3, 0.9), st.integers(0, 299))
def test_one_percent_is_hit_though_a_block_is_large(scores, share, block_score):
    values = {"a": [float(score) for score in scores[:200]], "b": [float(score) for score in scores[200:]]}
    present = {"a": tuple(range(200)), "b": tuple(range(100))}
    costs, blocks = {"a": 1.0, "b": 3.0}, {"layer": ScoredBlock(float(block_score), 150.0)}
    ranking = rank_units(values, present, costs, floors={}, blocks=blocks)

    def cost_of(keep, removed):
        return len(keep["a"]) + 3.0 * len(keep["b"]) + 150.0 * (not removed)

    target = 650.0 * share
    assert 0.99 * target - 1e-9 <= reach(ranking, cost_of, target).cost <= target


@given(problems(largest=40), SHARES, MULTIPLES)
def test_evaluations_are_few(problem, share, multiples):
    ranking = problem.rank()
    seen = []

    def cost_of(keep, removed):
        seen.append((tuple(map(len, keep.values())), removed))
        return problem.cost(keep, removed)

    target = target_of(problem, ranking, share, multiples)
    reach(ranking, cost_of, target, multiples=multiples, tolerance=0.0)
    assert len(seen) == len(set(seen)) <= math.ceil(math.log2(len(ranking) + 1)) + 1 + REPAIRS


@given(problems(), MULTIPLES, st.floats(0.01, 10))
def test_an_impossible_target_names_the_smallest_cost_which_is_possible(problem, multiples, short):
    ranking = problem.rank()
    least, _ = least_and_most(problem, ranking, multiples)
    with pytest.raises(
        BudgetError, match=r"lower the floors, raise the caps or round to smaller multiples\.$"
    ) as error:
        reach(ranking, problem.cost, least - short, multiples=multiples)
    named = float(re.search(r"smallest reachable cost is ([\d,.]+)\. Ask", str(error.value)).group(1).replace(",", ""))
    assert named == least
    assert reach(ranking, problem.cost, named, multiples=multiples).cost == least


def test_the_text_for_an_impossible_target():
    ranking = rank_units({"a": [1.0] * 4}, {"a": (0, 1, 2, 3)}, {"a": 1.0}, floors={"a": 3})
    message = (
        "a cost of 2,500 can't be reached: with everything removed that may be removed, the smallest reachable cost is "
        "3,000. Ask for that or more, or lower the floors, raise the caps or round to smaller multiples."
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        reach(ranking, lambda keep, removed: 1000 * len(keep["a"]), 2500)


@given(problems(), SHARES, st.integers(0, 40))
def test_never_more_than_asked(problem, share, most):
    ranking = problem.rank()
    target = target_of(problem, ranking, share)
    choice = reach(ranking, problem.cost, target, most=most)
    allowed = ranking.keep(most)
    assert all(set(choice.keep[name]) >= set(allowed[name]) for name in allowed)
    if problem.cost(allowed, ranking.blocks_among(most)) > target:
        assert (choice.keep, choice.removed) == (allowed, ranking.blocks_among(most))
    else:
        assert choice.cost <= target


def test_a_target_that_is_met_takes_nothing():
    ranking = rank_units({"a": [1.0, 2.0]}, {"a": (0, 1)}, {"a": 1.0}, floors={})
    choice = reach(ranking, lambda keep, removed: len(keep["a"]), 50.0)
    assert (choice.keep, choice.removed, choice.count, choice.cost) == ({"a": (0, 1)}, (), 0, 2)


def ranking_with_block(block_score, unit_scores, block_cost=40.0):
    """100 units of cost 1 and one block."""
    return rank_units(
        {"a": unit_scores},
        {"a": tuple(range(100))},
        {"a": 1.0},
        floors={},
        blocks={"layer": ScoredBlock(block_score, block_cost)},
    )


def cost_with_block(keep, removed):
    return len(keep["a"]) + 40.0 * ("layer" not in removed)


def test_a_block_that_takes_too_much_is_left_for_units_behind_it():
    ranking = ranking_with_block(0.5, [float(score) for score in range(100)])
    choice = reach(ranking, cost_with_block, 120.0)
    assert (len(choice.keep["a"]), choice.removed, choice.cost) == (80, (), 120.0)


def test_a_block_stays_away_where_giving_back_units_costs_less():
    # Behind the block come only units of high scores; before it 30 are cheap, and 20 of those come back.
    ranking = ranking_with_block(5.0, [1.0] * 30 + [900.0] * 70)
    choice = reach(ranking, cost_with_block, 90.0)
    assert (len(choice.keep["a"]), choice.removed, choice.cost) == (90, ("layer",), 90.0)


def test_giving_back_may_leave_the_block_alone():
    ranking = ranking_with_block(5.0, [1.0] * 30 + [900.0] * 70)
    choice = reach(ranking, cost_with_block, 100.0)
    assert (len(choice.keep["a"]), choice.removed, choice.cost) == (100, ("layer",), 100.0)


@pytest.mark.parametrize(("block_score", "left", "removed"), [(45.0, 90, ("layer",)), (70.0, 50, ())])
def test_of_two_repairs_the_one_of_lower_scores_is_taken(block_score, left, removed):
    # Besides the block go 10 units of score 1, or without it 30 of score 1 and 20 of score 2: 70 in all.
    ranking = rank_units(
        {"a": [1.0] * 30 + [2.0] * 70},
        {"a": tuple(range(100))},
        {"a": 1.0},
        floors={},
        power=1.0,
        blocks={"layer": ScoredBlock(block_score, 40.0)},
    )
    choice = reach(ranking, cost_with_block, 90.0)
    assert (len(choice.keep["a"]), choice.removed) == (left, removed)


def test_rounded_groups_are_exchanged_to_come_close():
    scores = {"large": [float(unit) for unit in range(64)], "small": [unit + 0.5 for unit in range(64)]}
    present = {name: tuple(range(64)) for name in scores}
    ranking = rank_units(scores, present, {"large": 10.0, "small": 1.0}, floors={})

    def cost_of(keep, removed):
        return 10 * len(keep["large"]) + len(keep["small"])

    choice = reach(ranking, cost_of, 690.0, multiples=8)
    assert {name: len(units) for name, units in choice.keep.items()} == {"large": 64, "small": 48}
    assert reach(ranking, cost_of, 690.0, multiples=8, tolerance=1.0).cost < 650


def test_a_group_of_costly_units_is_left_as_a_whole():
    scores = {"dear": [float(unit) for unit in range(40)], "cheap": [100.0] * 300}
    present = {name: tuple(range(len(values))) for name, values in scores.items()}
    ranking = rank_units(scores, present, {"dear": 100.0, "cheap": 1.0}, floors={})
    choice = reach(ranking, lambda keep, removed: 100.0 * len(keep["dear"]) + len(keep["cheap"]), 4150.0)
    assert (len(choice.keep["dear"]), len(choice.keep["cheap"])) == (39, 250)


def test_blocks_stay_in_the_order_of_the_ranking_when_units_come_back():
    blocks = {"second": ScoredBlock(5.0, 40.0), "first": ScoredBlock(0.0, 7.0)}
    scores = [1.0] * 30 + [900.0] * 70
    ranking = rank_units({"a": scores}, {"a": tuple(range(100))}, {"a": 1.0}, floors={}, blocks=blocks)

    def cost_of(keep, removed):
        return len(keep["a"]) + sum(block.cost for name, block in blocks.items() if name not in removed)

    choice = reach(ranking, cost_of, 90.0)
    assert (len(choice.keep["a"]), choice.removed) == (90, ("first", "second"))


def test_evaluations_are_few_where_nothing_fits():
    names = [f"group {place}" for place in range(30)]
    steps = {name: math.sqrt(2 + place) for place, name in enumerate(names)}
    scores = {name: [float((7 * unit + place) % 64) for unit in range(64)] for place, name in enumerate(names)}
    ranking = rank_units(scores, dict.fromkeys(names, tuple(range(64))), steps, floors={}, power=0.5)
    seen = []

    def cost_of(keep, removed):
        seen.append(keep)
        return sum(steps[name] * len(units) for name, units in keep.items())

    reach(ranking, cost_of, 4000.0, multiples=8, tolerance=0.0)
    assert REPAIRS // 2 < len(seen) <= math.ceil(math.log2(len(ranking) + 1)) + 1 + REPAIRS


def test_a_step_of_one_group_is_exchanged_for_one_of_another():
    steps = {"a": 13.0, "b": 8.0, "c": 5.0}  # per unit, and units go by eights
    scores = {name: [float(unit) + place / 4 for unit in range(24)] for place, name in enumerate(steps)}
    ranking = rank_units(scores, dict.fromkeys(steps, tuple(range(24))), steps, floors={}, power=1.0)

    def cost_of(keep, removed):
        return sum(steps[name] * len(units) for name, units in keep.items())

    # Skipping and giving back come to 312; 64 more for "b" and 40 less for "c" make up the 24 to the target.
    assert reach(ranking, cost_of, 336.0, multiples=8).cost == 336.0
    assert reach(ranking, cost_of, 312.0, multiples=8).cost == 312.0


@given(problems(), SHARES, st.integers(0, 40))
def test_rounding_takes_nothing_beyond_the_first_parts(problem, share, most):
    ranking = problem.rank()
    choice = reach(ranking, problem.cost, target_of(problem, ranking, share), most=most, multiples=4)
    allowed = ranking.keep(most)
    assert all(set(choice.keep[name]) >= set(allowed[name]) for name in allowed)


def test_two_goals_at_once_as_one_ratio():
    ranking = rank_units({"a": [float(unit) for unit in range(10)]}, {"a": tuple(range(10))}, {"a": 1.0}, floors={})

    def ratio(keep, removed):
        width = len(keep["a"])
        return max(width**2 / 50, width / 8)  # at most 50 multiply-adds and 8 parameters

    assert len(reach(ranking, ratio, 1.0).keep["a"]) == 7
