"""Numbers of units are multiples, and nothing else is broken for it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idap.errors import ConfigError
from idap.selection.ranking import rank_units
from idap.selection.rounding import round_units
from tests.selection.problems import problems

MULTIPLES = st.integers(1, 6)


def make_ranking(size, *, gone=0, floor=1, name="a"):
    scores = {name: [float(unit) for unit in range(size)]}
    return rank_units(scores, {name: tuple(range(gone, size))}, {name: 1.0}, floors={name: floor})


def lengths(ranking, multiples):
    return [len(round_units(ranking, ranking.keep(count), multiples)["a"]) for count in range(len(ranking) + 1)]


@given(problems(), MULTIPLES)
def test_numbers_are_the_nearest_that_are_allowed(problem, multiple):
    ranking = problem.rank()
    for count in range(len(ranking) + 1):
        keep = ranking.keep(count)
        result = round_units(ranking, keep, multiple)
        for name, units in problem.present.items():
            least = len(ranking.keep(len(ranking))[name])
            allowed = [number for number in range(least, len(units) + 1) if number % multiple == 0]
            if problem.number_removed_before(name) == 0 or not allowed:
                allowed.append(len(units))  # whole, or nothing to choose from
            wanted = len(keep[name])
            assert len(result[name]) == min(allowed, key=lambda number: (abs(number - wanted), -number))


@given(problems(), MULTIPLES)
def test_units_go_and_come_back_in_the_order_of_the_ranking(problem, multiple):
    ranking = problem.rank()
    for count in range(len(ranking) + 1):
        for name, units in round_units(ranking, ranking.keep(count), multiple).items():
            gone = len(problem.present[name]) - len(units)
            expected = set(problem.present[name]) - set(ranking.order.get(name, ())[:gone])
            assert list(units) == sorted(expected)


@given(problems(), st.dictionaries(st.sampled_from("abc"), MULTIPLES))
def test_more_parts_leave_no_more_after_rounding(problem, multiples):
    ranking = problem.rank()
    results = [round_units(ranking, ranking.keep(count), multiples) for count in range(len(ranking) + 1)]
    for less, more in pairwise(results):
        assert all(set(more[name]) <= set(less[name]) for name in less)
    for name in set(problem.present) - set(multiples):
        assert [result[name] for result in results] == [ranking.keep(count)[name] for count in range(len(ranking) + 1)]


def test_a_whole_group_stays_whole_and_a_cut_one_is_rounded():
    assert lengths(make_ranking(20), 8) == [20] * 3 + [16] * 6 + [8] * 11
    assert lengths(make_ranking(20, gone=1), 8)[0] == 16


def test_a_group_no_larger_than_its_multiple_stays_whole():
    assert set(lengths(make_ranking(8), 8)) == set(lengths(make_ranking(8), 32)) == {8}
    assert set(lengths(make_ranking(6), 8)) == {6}


def test_a_floor_between_two_multiples_keeps_the_upper_one():
    assert lengths(make_ranking(32, floor=10), 8)[-1] == 16
    assert set(lengths(make_ranking(31, gone=2, floor=25), 8)) == {29}


@pytest.mark.parametrize("multiples", [0, {"a": -8}])
def test_a_multiple_is_at_least_1(multiples):
    with pytest.raises(ConfigError, match=r"^the multiple of group 'a' must be at least 1, got (0|-8)\.$"):
        round_units(make_ranking(4), {"a": (0, 1)}, multiples)
