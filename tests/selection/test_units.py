"""The ranking: pure functions of numbers, so properties over random numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idap.errors import StructureError
from idap.selection.ranking import rank_units

NAMES = ("a", "b", "c")


@st.composite
def problems(draw):
    """Scores, units present, costs, floors and a power, as a stage in the middle of a run would have them."""
    scores, present, costs, floors = {}, {}, {}, {}
    for name in NAMES[: draw(st.integers(1, 3))]:
        size = draw(st.integers(1, 8))
        scores[name] = draw(st.lists(st.floats(0, 100, width=32), min_size=size, max_size=size))
        present[name] = tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
        costs[name] = draw(st.floats(0.5, 1000, width=32))
        floors[name] = draw(st.integers(0, 9))
        for unit in set(range(size)) - set(present[name]):
            scores[name][unit] = math.nan  # gone: measured by nobody
    return scores, present, costs, floors, draw(st.sampled_from([0.0, 0.5, 1.0]))


def rank(problem):
    scores, present, costs, floors, power = problem
    return rank_units(scores, present, costs, floors=floors, power=power)


@given(problems())
def test_floors_hold_and_at_least_one_unit_stays(problem):
    _, present, _, floors, _ = problem
    ranking = rank(problem)
    assert ranking.keep(0) == present
    left = ranking.keep(len(ranking))
    for name, units in present.items():
        assert len(left[name]) == min(len(units), max(1, floors[name]))


@given(problems())
def test_the_order_is_that_of_score_per_cost(problem):
    scores, _, costs, _, power = problem
    ranking = rank(problem)
    places = list(zip(ranking.groups, ranking.units, strict=True))
    values = [scores[name][unit] / costs[name] ** power for name, unit in places]
    assert values == sorted(values)
    assert len(set(places)) == len(places)
    assert ranking.scores.tolist() == [scores[name][unit] for name, unit in places]


@given(problems())
def test_what_stays_in_a_group_is_never_worse_than_what_goes(problem):
    scores, present, _, _, _ = problem
    ranking = rank(problem)
    for count in range(len(ranking) + 1):
        kept = ranking.keep(count)
        assert sum(map(len, kept.values())) == sum(map(len, present.values())) - count
        for name, units in present.items():
            assert list(kept[name]) == sorted(kept[name])
            gone = set(units) - set(kept[name])
            assert max((scores[name][u] for u in gone), default=-1) <= min(scores[name][u] for u in kept[name])


def test_power_weighs_the_cost():
    scores, present, costs = {"cheap": [2.0, 5.0], "dear": [3.0, 9.0]}, {"cheap": (0, 1), "dear": (0, 1)}, {}
    costs = {"cheap": 1.0, "dear": 4.0}
    by_score = rank_units(scores, present, costs, floors={})
    by_cost = rank_units(scores, present, costs, floors={}, power=1.0)
    assert (by_score.groups, by_cost.groups) == (("cheap", "dear"), ("dear", "cheap"))


def test_the_floor_keeps_the_best():
    ranking = rank_units({"a": [4.0, 1.0, 3.0, 2.0]}, {"a": (0, 1, 2, 3)}, {"a": 1.0}, floors={"a": 3})
    assert ranking.keep(len(ranking)) == {"a": (0, 2, 3)}


def test_groups_without_scores_or_without_cost_stay_whole():
    scores = {"free": [1.0, 2.0], "paid": [1.0, 2.0]}
    present = {"free": (0, 1), "paid": (0, 1), "unseen": (0, 1)}
    ranking = rank_units(scores, present, {"free": 0.0, "paid": 1.0, "unseen": 1.0}, floors={})
    assert ranking.groups == ("paid",)
    assert ranking.keep(1) == {"free": (0, 1), "paid": (1,), "unseen": (0, 1)}


def test_nothing_to_rank():
    ranking = rank_units({}, {"a": (0, 1)}, {}, floors={})
    assert len(ranking) == 0
    assert ranking.keep(5) == {"a": (0, 1)}


def test_equal_scores_go_in_the_order_of_the_network():
    ranking = rank_units(
        {"b": [1.0] * 3, "a": [1.0] * 3}, {"b": (0, 1, 2), "a": (0, 1, 2)}, {"a": 1, "b": 1}, floors={}
    )
    assert list(zip(ranking.groups, ranking.units, strict=True)) == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_names_unit_and_group(bad):
    scores = {"conv": np.array([1.0, bad, 2.0, bad])}
    with pytest.raises(StructureError, match=r"^the divergence of unit 3 of group 'conv' is not a finite number; look"):
        rank_units(scores, {"conv": (0, 2, 3)}, {"conv": 1.0}, floors={})
    assert rank_units(scores, {"conv": (0, 2)}, {"conv": 1.0}, floors={}).units == (0,)
