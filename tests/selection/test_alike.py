"""Groups that are alike end with the same number of units, whatever else holds."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idap.selection.ranking import ScoredBlock, rank_uniform, rank_units
from idap.selection.reach import reach
from idap.selection.rounding import neighbours, round_units, shortest_beginning, tie_units
from idap.structure.groups import Group, alike_groups
from tests.selection.problems import problems
from tests.selection.test_reach import target_of

CLASSES = st.sampled_from([[("a", "b")], [("a", "b", "c")], [("b", "c", "gone")], []])
MULTIPLES, SHARES = st.sampled_from([1, 2, 3]), st.floats(0, 1)


def group(index, name, kind="neurons", size=8):
    return Group(index, name, kind, size, (), (), (), ())


def level(units, common):
    return min(len(units), common)


@given(problems(), CLASSES, MULTIPLES, SHARES)
def test_whatever_goes_they_keep_the_same_number(problem, alike, multiples, share):
    ranking = tie_units(problem.rank(), alike)
    count = round(share * len(ranking))
    for keep in (
        round_units(ranking, ranking.keep(count), multiples),
        reach(ranking, problem.cost, target_of(problem, ranking, share, multiples), multiples=multiples).keep,
        reach(ranking, problem.cost, 0.0, multiples=multiples, most=count).keep,
    ):
        for members in ranking.classes:
            common = max(len(keep[name]) for name in members)
            assert [len(keep[name]) for name in members] == [level(problem.present[name], common) for name in members]


@given(problems(), CLASSES)
def test_units_go_by_the_scores_of_their_own_group(problem, alike):
    plain, ranking = problem.rank(), tie_units(problem.rank(), alike)
    for name, units in ranking.order.items():
        assert units == plain.order[name][: len(units)]
    assert sorted(plain.blocks) == sorted(ranking.blocks)
    assert ranking.before == plain.before


@given(problems(), CLASSES)
def test_floors_and_caps_of_one_group_hold_for_all(problem, alike):
    plain, ranking = problem.rank(), tie_units(problem.rank(), alike)
    least = plain.keep(len(plain))
    most_gone = ranking.keep(len(ranking))
    for members in ranking.classes:
        common = max(len(least[name]) for name in members)
        assert [len(most_gone[name]) for name in members] == [level(problem.present[name], common) for name in members]


@given(problems(), CLASSES)
def test_bundles_stand_together_and_in_the_order_of_their_keys(problem, alike):
    ranking = tie_units(problem.rank(), alike)
    keys = [part.key for part in ranking.parts]
    assert keys == sorted(keys)
    ends = [0]
    for count in range(1, len(ranking) + 1):
        keep = ranking.keep(count)
        if round_units(ranking, keep, 1) == keep:
            ends.append(count)
            taken = ranking.parts[ends[-2] : count]
            assert len({part.key for part in taken}) == 1
            assert len({part.name for part in taken}) == len(taken)
    assert ends[-1] == len(ranking)
    assert shortest_beginning(ranking) == (ends[1] if len(ends) > 1 else 0)


@given(problems())
def test_alone_nothing_changes(problem):
    for ranking in (problem.rank(), problem.rank_uniform()):
        again = tie_units(ranking, [])
        assert [(part.name, part.unit) for part in again.parts] == [(part.name, part.unit) for part in ranking.parts]


@given(problems(largest=40), CLASSES, SHARES)
def test_a_target_is_hit_within_one_bundle(problem, alike, share):
    ranking = tie_units(problem.rank(), alike)
    target = target_of(problem, ranking, share)
    choice = reach(ranking, problem.cost, target, tolerance=0.0)
    bundles = [sum(problem.costs[name] for name in members) for members in ranking.classes]
    largest = max([*bundles, *(block.cost for block in problem.blocks.values())])
    assert choice.cost <= target
    assert choice.count == 0 or target - choice.cost < largest


def test_one_percent_is_hit_by_exchanging_bundles():
    names = [f"layers.{place}.{part}" for place in range(6) for part in ("wide", "narrow")]
    sizes = {name: 96 if name.endswith("wide") else 64 for name in names}
    scores = {name: [float((7 * unit + place) % 31) for unit in range(sizes[name])] for place, name in enumerate(names)}
    costs = {name: 5.0 if name.endswith("wide") else 3.0 for name in names}
    groups = [group(place, name, size=sizes[name]) for place, name in enumerate(names)]
    alike = alike_groups(groups, "layers")
    assert [len(members) for members in alike] == [6, 6]
    present = {name: tuple(range(size)) for name, size in sizes.items()}
    ranking = tie_units(rank_units(scores, present, costs, floors={}), alike)

    def cost_of(keep, removed):
        return sum(costs[name] * len(units) for name, units in keep.items())

    whole = cost_of(present, ())
    for share in (0.3, 0.52, 0.77):
        choice = reach(ranking, cost_of, share * whole)
        assert 0.99 * share * whole <= choice.cost <= share * whole
        for members in alike:
            assert len({len(choice.keep[name]) for name in members}) == 1
    rough = reach(ranking, cost_of, 0.5 * whole, multiples=8)
    assert all(len(units) % 8 == 0 for units in rough.keep.values())


def test_a_bundle_ranks_by_the_mean_of_its_keys():
    scores = {"a": [1.0, 2.0], "b": [7.0, 9.0], "c": [3.9, 6.0]}
    present = dict.fromkeys(scores, (0, 1))
    ranking = tie_units(rank_units(scores, present, dict.fromkeys(scores, 1.0), floors={}), [("a", "b")])
    assert [(part.name, part.unit) for part in ranking.parts] == [("c", 0), ("a", 0), ("b", 0)]
    per_cost = tie_units(
        rank_units(scores, present, {"a": 1.0, "b": 4.0, "c": 2.0}, floors={}, power=1.0), [("a", "b")]
    )
    assert [part.key for part in per_cost.parts] == [(1 + 7 / 4) / 2, (1 + 7 / 4) / 2, 3.9 / 2]


def test_a_group_without_scores_holds_the_others_back():
    present = {"a": (0, 1, 2), "b": (0, 1, 2)}
    ranking = rank_units({"a": [1.0, 2.0, 3.0]}, present, {"a": 1.0, "b": 1.0}, floors={})
    assert len(ranking) == 2
    assert len(tie_units(ranking, [("a", "b")])) == 0
    assert shortest_beginning(tie_units(ranking, [("a", "b")])) == 0


def test_the_larger_of_two_groups_comes_down_first():
    present, scores = {"a": (0, 1, 2, 3), "b": (1, 3)}, {"a": [4.0, 3.0, 2.0, 1.0], "b": [math.nan, 1.0, math.nan, 2.0]}
    ranking = tie_units(rank_uniform(scores, present, floors={}), [("a", "b")])
    assert [(part.name, part.unit) for part in ranking.parts] == [("a", 3), ("a", 2), ("a", 1), ("b", 1)]
    assert round_units(ranking, ranking.keep(3), 1) == {"a": (0, 1), "b": (1, 3)}
    assert neighbours(ranking, ranking.keep(2), 1, ("a", "b")) == ({"a": 3, "b": 2}, {"a": 1, "b": 1})


def test_different_multiples_of_groups_alike_are_met_together():
    present = {"a": tuple(range(24)), "b": tuple(range(24))}
    scores = {name: [float(unit) for unit in range(24)] for name in present}
    ranking = tie_units(rank_units(scores, present, {"a": 1.0, "b": 1.0}, floors={}), [("a", "b")])
    assert {len(units) for units in round_units(ranking, ranking.keep(20), {"a": 4, "b": 6}).values()} == {12}


def test_blocks_rank_between_bundles():
    blocks = {"early": ScoredBlock(0.5, 3.0), "late": ScoredBlock(2.5, 3.0)}
    present, scores = {"a": (0, 1), "b": (0, 1)}, {"a": [1.0, 2.0], "b": [2.0, 3.0]}
    ranking = tie_units(rank_units(scores, present, {"a": 1.0, "b": 1.0}, floors={}, blocks=blocks), [("a", "b")])
    assert [part.name for part in ranking.parts] == ["early", "a", "b", "late"]
    assert shortest_beginning(ranking) == 1


@given(problems(), CLASSES, MULTIPLES, SHARES)
def test_bundles_go_down_to_the_next_multiple(problem, alike, multiple, share):
    multiples = dict.fromkeys(problem.present, multiple)
    plain, ranking = problem.rank(), tie_units(problem.rank(), alike, multiples)
    assert all(units == plain.order[name][: len(units)] for name, units in ranking.order.items())
    ends = [ranking.keep(shortest_beginning(ranking)), ranking.keep(len(ranking))]
    assert not ranking.parts or ranking.parts[0].unit is None or ends[0] != ranking.before
    first = replace(ranking, parts=ranking.parts[: round(share * len(ranking))])
    for keep in (*ends, round_units(first, first.keep(len(first)), multiples)):
        for members in ranking.classes:
            left, before = (max(len(units[name]) for name in members) for units in (keep, ranking.before))
            assert left == before or left % multiple == 0
            assert [len(keep[name]) for name in members] == [level(problem.present[name], left) for name in members]


def test_what_lies_below_the_last_multiple_in_reach_stays():
    ranking = rank_units({"a": [float(unit) for unit in range(20)]}, {"a": tuple(range(20))}, {"a": 1.0}, floors={})
    down_to = tie_units(ranking, [], {"a": 8})
    assert [(part.unit, part.key) for part in down_to.parts] == [
        *((unit, 1.5) for unit in range(4)),
        *((unit, 7.5) for unit in range(4, 12)),
    ]
    assert shortest_beginning(down_to) == 4


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", ()),
        (
            "layers",
            (("enc.0.fc", "enc.1.fc"), ("enc.0.q:heads", "enc.1.q:heads"), ("enc.0.q:heads#2", "enc.1.q:heads#2")),
        ),
        (
            "model",
            (
                ("stem", "pool", "enc.0.fc", "enc.1.fc", "dec.0.fc"),
                ("enc.0.q:heads", "enc.1.q:heads"),
                ("enc.0.q:heads#2", "enc.1.q:heads#2"),
            ),
        ),
    ],
)
def test_what_is_alike(how, expected):
    groups = [group(place, name) for place, name in enumerate(["stem", "pool"])]
    for layer in range(2):
        groups += [group(0, f"enc.{layer}.fc"), group(0, f"enc.{layer}.q:heads", "heads")]
        groups += [
            group(0, f"enc.{layer}.q:heads#2", "heads"),
            group(0, f"enc.{layer}.q:head-width", "head width", 8 + layer),
        ]
    groups.append(group(0, "dec.0.fc"))
    assert alike_groups(groups, how) == expected
