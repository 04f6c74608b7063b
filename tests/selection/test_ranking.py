"""One ranking: caps, orders, blocks among units, and all groups in step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idap.errors import ConfigError, StructureError
from idap.selection.ranking import ScoredBlock, rank_uniform, rank_units
from tests.selection.problems import problems

BOTH = pytest.mark.parametrize("uniform", [False, True], ids=["global", "uniform"])


def rank(problem, uniform):
    return problem.rank_uniform() if uniform else problem.rank()


@BOTH
@given(problem=problems())
def test_floors_and_caps_hold_and_nothing_else_stays(uniform, problem):
    left = rank(problem, uniform).keep(10**6)
    for name, units in problem.present.items():
        floor, size = max(1, problem.floors[name]), len(problem.scores[name])
        cap = problem.caps.get(name, size)
        assert len(left[name]) >= min(len(units), floor)
        assert size - len(left[name]) <= max(cap, problem.number_removed_before(name))
        at_a_limit = len(left[name]) <= floor or size - len(left[name]) >= cap
        assert at_a_limit


@BOTH
@given(problem=problems())
def test_inside_a_group_units_go_by_score_and_ties_in_order(uniform, problem):
    ranking = rank(problem, uniform)
    for name, units in problem.present.items():
        expected = sorted(units, key=lambda unit: (problem.scores[name][unit], unit))
        order = ranking.order.get(name, ())
        assert list(order) == expected[: len(order)]


@BOTH
@given(problem=problems())
def test_more_parts_leave_less(uniform, problem):
    ranking = rank(problem, uniform)
    for count in range(len(ranking)):
        less, more = ranking.keep(count), ranking.keep(count + 1)
        unit = ranking.parts[count].unit
        assert all(set(more[name]) <= set(less[name]) for name in less)
        assert sum(map(len, less.values())) - sum(map(len, more.values())) == (unit is not None)


@given(problems())
def test_blocks_and_units_share_one_order(problem):
    parts = problem.rank().parts
    price = {name: block.cost for name, block in problem.blocks.items()}
    values = [
        part.score / (price[part.name] if part.unit is None else problem.costs[part.name]) ** problem.power
        for part in parts
    ]
    assert values == sorted(values)
    assert sorted(part.name for part in parts if part.unit is None) == sorted(problem.blocks)


@given(problems())
def test_blocks_leave_the_order_of_the_units_alone(problem):
    mixed, plain = problem.rank(), problem.rank(blocks={})
    assert (mixed.groups, mixed.units, mixed.scores.tolist()) == (plain.groups, plain.units, plain.scores.tolist())
    assert plain.blocks == plain.blocks_among(len(plain)) == ()


@given(problems())
def test_no_block_is_removed_twice(problem):
    ranking = problem.rank()
    for count in range(len(ranking) + 1):
        among = {part.name for part in ranking.parts[:count] if part.unit is None}
        removed = ranking.blocks_among(count)
        assert set(removed) == ({"whole"} if "whole" in among else among)
        assert [name for name in ranking.blocks if name in removed] == list(removed)


def test_a_block_of_a_groups_name_is_not_the_group():
    blocks = {"a": ScoredBlock(0.5, 1.0)}
    ranking = rank_units({"a": [1.0, 2.0]}, {"a": (0, 1)}, {"a": 1.0}, floors={}, blocks=blocks)
    assert (ranking.keep(1), ranking.blocks_among(1)) == ({"a": (0, 1)}, ("a",))
    assert (ranking.keep(2), ranking.blocks_among(2)) == ({"a": (1,)}, ("a",))


def test_power_weighs_a_block_against_units():
    scores, present, blocks = {"a": [3.0, 9.0]}, {"a": (0, 1)}, {"layer": ScoredBlock(30.0, 100.0)}
    first = [
        rank_units(scores, present, {"a": 1.0}, floors={}, power=power, blocks=blocks).parts[0].name
        for power in (0.0, 0.25, 1.0)
    ]
    assert first == ["a", "a", "layer"]


def test_what_does_harm_goes_the_earlier_the_more_it_costs():
    scores = {"cheap": [-1.0, 2.0], "dear": [-1.0, -2.0]}
    ranking = rank_units(scores, dict.fromkeys(scores, (0, 1)), {"cheap": 1.0, "dear": 9.0}, floors={}, power=1.0)
    assert [(part.name, part.unit) for part in ranking.parts] == [("dear", 1), ("cheap", 0)]
    blocks = {"small": ScoredBlock(-1.0, 2.0), "large": ScoredBlock(-1.0, 3.0)}
    assert rank_units({}, {}, {}, floors={}, power=0.5, blocks=blocks).blocks == ("large", "small")


def test_a_block_of_no_cost_never_goes():
    ranking = rank_units({}, {"a": (0, 1)}, {}, floors={}, blocks={"free": ScoredBlock(0.0, 0.0)})
    assert len(ranking) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_whose_score_is_no_number_is_named(bad):
    with pytest.raises(StructureError, match=r"^the divergence of block 'layer' is not a finite number; look"):
        rank_units({}, {}, {}, floors={}, blocks={"layer": ScoredBlock(bad, 1.0)})


@given(st.permutations(range(6)), st.lists(st.integers(0, 9), min_size=6, max_size=6), st.sets(st.integers(0, 5)))
def test_a_given_order_holds_whatever_the_scores(order, scores, gone):
    present = {"a": tuple(unit for unit in range(6) if unit not in gone or unit == 0), "b": (0, 1)}
    values = {"a": [float(score) for score in scores], "b": [4.0, 5.0]}
    for ranking in (
        rank_units(values, present, {"a": 1.0, "b": 1.0}, floors={}, orders={"a": order}),
        rank_uniform(values, present, floors={}, orders={"a": order}),
    ):
        expected = [unit for unit in order if unit in present["a"]]
        assert list(ranking.order.get("a", ())) == expected[:-1]


def test_a_unit_ranks_no_earlier_than_those_before_it_in_its_order():
    scores = {"a": [1.0, 6.0, 2.0, 0.0], "b": [3.0, 7.0, 9.0]}
    present = {"a": (0, 1, 2, 3), "b": (0, 1, 2)}
    ranking = rank_units(scores, present, {"a": 1.0, "b": 1.0}, floors={}, orders={"a": (0, 1, 2, 3)})
    assert [(part.name, part.unit) for part in ranking.parts] == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1)]
    assert ranking.scores.tolist() == [1.0, 3.0, 6.0, 2.0, 7.0]


def test_an_order_must_hold_every_unit():
    with pytest.raises(StructureError, match=r"^the order of group 'a' misses unit 2; it must hold every unit that"):
        rank_units({"a": [1.0] * 4}, {"a": (0, 2, 3)}, {"a": 1.0}, floors={}, orders={"a": (0, 1, 3)})


@pytest.mark.parametrize("power", [-0.1, 1.5, math.nan])
def test_the_power_is_between_0_and_1(power):
    with pytest.raises(ConfigError, match=r"^power must be in \[0, 1\], got (-0.1|1.5|nan); 0 ranks by score alone"):
        rank_units({}, {}, {}, floors={}, power=power)


@given(problems())
def test_uniform_shrinks_all_groups_in_step(problem):
    ranking = problem.rank_uniform()
    for count in range(1, len(ranking) + 1):
        kept = ranking.keep(count)
        gone = {
            name: problem.number_removed_before(name) + len(problem.present[name]) - len(kept[name]) for name in kept
        }
        sizes = {name: len(problem.scores[name]) for name in kept}
        furthest = max(gone[name] / sizes[name] for name in kept if len(kept[name]) < len(problem.present[name]))
        waiting = [
            name for name in kept if len(problem.present[name]) - len(kept[name]) < len(ranking.order.get(name, ()))
        ]
        assert all((gone[name] + 1) / sizes[name] >= furthest for name in waiting)


@given(problems(with_blocks=False), st.sampled_from([0.0, 0.5, 1.0]))
def test_uniform_heeds_no_scale(problem, factor):
    first = next(iter(problem.scores))
    scaled = problem.scores | {first: [score * 2.0 ** (10 * factor) for score in problem.scores[first]]}
    other = rank_uniform(scaled, problem.present, floors=problem.floors, caps=problem.caps)
    ranking = problem.rank_uniform()
    assert (other.groups, other.units) == (ranking.groups, ranking.units)


def test_uniform_names_a_score_that_is_no_number():
    with pytest.raises(StructureError, match=r"^the divergence of unit 1 of group 'a' is not a finite number"):
        rank_uniform({"a": [1.0, math.nan]}, {"a": (0, 1)}, floors={})
