"""Rankings, bundles, steps and searches against the same written plainly, with numpy in float64, on random numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idap.cost.latency import Curve
from idap.selection.ranking import ScoredBlock, best_of, rank_uniform, rank_units
from idap.selection.reach import cost_at_latency
from idap.selection.rounding import (
    BASES,
    CLEAR,
    EARLY,
    MULTIPLES,
    WORTH,
    common_multiple,
    neighbours,
    probes,
    round_units,
    shortest_beginning,
    step_of,
    tie_units,
)
from tests.selection.problems import problems

SEEDS = range(20)


def groups(seed, names="abc"):
    """Scores of some groups, partly below 0; all units are present, and all floors are 1."""
    draw = np.random.default_rng(seed)
    scores = {name: draw.standard_normal(draw.integers(2, 12)) + 0.5 for name in names}
    present = {name: tuple(range(len(values))) for name, values in scores.items()}
    return (
        scores,
        present,
        {name: float(cost) for name, cost in zip(names, draw.uniform(1, 9, len(names)), strict=True)},
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_keys_are_scores_per_cost(seed, power):
    scores, present, costs = groups(seed)
    block = ScoredBlock(score=float(np.random.default_rng(seed).uniform(0, 3)), cost=20.0)
    ranking = rank_units(scores, present, costs, floors={}, power=power, blocks={"block": block})
    values = [(name, unit, score) for name in scores for unit, score in enumerate(scores[name])]
    own = np.array([score for *_, score in values] + [block.score])
    price = np.array([costs[name] for name, *_ in values] + [block.cost]) ** power
    keys = np.where(own >= 0, own / price, own * price)
    last = {(name, int(np.argmax(scores[name]))) for name in scores}  # the best unit of each group stays
    order = [place for place in np.argsort(keys) if place == len(values) or values[place][:2] not in last]
    expected = [
        (*values[place][:2], keys[place]) if place < len(values) else ("block", None, keys[-1]) for place in order
    ]
    assert [(part.name, part.unit) for part in ranking.parts] == [part[:2] for part in expected]
    np.testing.assert_allclose([part.key for part in ranking.parts], [part[2] for part in expected], rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_keys_are_shares_of_the_group(seed):
    scores, present, _ = groups(seed)
    present = {name: held[seed % len(held) :] or held for name, held in present.items()}  # some units went before
    ranking = rank_uniform(scores, present, floors={})
    for name, held in present.items():
        order = np.array(held)[np.argsort(np.asarray(scores[name])[list(held)])][:-1]
        mine = [part for part in ranking.parts if part.name == name]
        assert [part.unit for part in mine] == order.tolist()
        gone = len(scores[name]) - len(held)
        np.testing.assert_allclose([part.key for part in mine], (gone + 1 + np.arange(len(mine))) / len(scores[name]))
    assert [part.key for part in ranking.parts] == sorted(part.key for part in ranking.parts)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_is_that_of_numpy(seed):
    losses = np.random.default_rng(seed).standard_normal(8)
    losses[seed % 8] = np.nan
    assert best_of({place: place for place in range(8)}, lambda place: losses[place]) == np.nanargmin(losses)


@given(problems(with_blocks=False), st.integers(1, 5))
def test_neighbours_are_the_next_numbers_that_rounding_gives(problem, multiple):
    ranking = problem.rank()
    for name, units in problem.present.items():
        possible = {
            len(ranking.keep(len(ranking))[name]) + more for more in range(len(ranking.order.get(name, ())) + 1)
        }
        rounded = {
            len(round_units(ranking, ranking.without({name: len(units) - number}), {name: multiple})[name])
            for number in possible
        }
        for left in sorted(rounded):
            keep = ranking.without({name: len(units) - left})
            more, fewer = sorted(n for n in rounded if n > left), sorted(n for n in rounded if n < left)
            expected = [*more[:1], *fewer[-1:]]
            assert [each[name] for each in neighbours(ranking, keep, multiple, [name])] == expected


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_common_multiple_is_that_of_numpy(multiples):
    names = [str(place) for place in range(len(multiples))]
    assert common_multiple(dict(zip(names, multiples, strict=True)), names) == np.lcm.reduce(multiples)
    assert common_multiple(multiples[0], names) == multiples[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_of_bundles_are_running_maxima_of_means(seed):
    """Groups alike of one size, so that bundles hold as many units of each."""
    draw, multiple = np.random.default_rng(seed), 1 + seed % 3
    scores = {name: draw.standard_normal(9) + 0.5 for name in "ab"}
    present, costs = dict.fromkeys("ab", tuple(range(9))), dict.fromkeys("ab", 1.0)
    ranking = tie_units(rank_units(scores, present, costs, floors={}), [("a", "b")], {"a": multiple})
    keys = np.stack([np.sort(scores[name]) for name in "ab"])  # places x groups in the order of removal
    stops = [0] + [9 - left for left in range(8, 0, -1) if left % multiple == 0]
    means = [keys[:, first:stop].mean() for first, stop in pairwise(stops)]
    expected = np.repeat(np.maximum.accumulate(means), 2 * np.diff(stops))
    np.testing.assert_allclose([part.key for part in ranking.parts], expected, rtol=1e-12)
    assert shortest_beginning(ranking) == 2 * stops[1]


@given(st.integers(1, 3000))
def test_probes_are_quarters_and_multiples_with_what_follows_them(size):
    expected = {max(1, size * quarter // 4) for quarter in (1, 2, 3, 4)}
    some = [m for m in MULTIPLES if 4 * m <= size]
    some = some if len(some) > 1 else [m for m in MULTIPLES if 2 * m <= size]
    if some:
        bases = np.arange(max(some), size - max(some) + 1, max(some))
        if len(bases) > BASES:
            bases = bases[[0, (len(bases) + 1) // 2 - 1, -1]]
        inner = [0, 1, *(m for m in MULTIPLES if m <= max(some))]
        expected |= {int(base) + more for base in bases for more in inner}
    assert probes(size) == tuple(sorted(expected))


@pytest.mark.parametrize("seed", range(60))
def test_steps_of_random_curves_are_those_of_the_definition(seed):
    draw = np.random.default_rng(seed)
    size = int(draw.choice([32, 64, 100, 256, 1000]))
    widths = np.array(probes(size))
    stairs, slope = int(draw.choice(MULTIPLES)), draw.choice([0.0, 0.01, 0.3])
    seconds = 1 + -(-widths // stairs) * stairs * (1 - slope) + slope * widths
    spread = np.full(len(widths), draw.choice([1e-6, 0.3, 2.0])) * draw.random(len(widths))
    seconds = seconds + spread * draw.uniform(-1, 1, len(widths))
    at = {int(w): place for place, w in enumerate(widths)}
    expected = 1
    for multiple in MULTIPLES:
        told = []
        for base in (w for w in at if w % multiple == 0 and {w + 1, w + multiple} <= at.keys()):
            low, high = at[base], at[base + multiple]
            rise = seconds[high] - seconds[low]
            if rise > max(CLEAR * (spread[low] + spread[high]), WORTH * seconds[low]):
                inside = (widths > base) & (widths < base + multiple)
                early = seconds[inside] - seconds[low] >= np.maximum(EARLY * rise, spread[low] + spread[inside])
                told.append(early.all())
        if told and np.mean(told) >= 2 / 3 - 1e-9:
            expected = multiple
    assert step_of(Curve(tuple(at), tuple(seconds.tolist()), tuple(spread.tolist()))) == expected


@given(st.floats(0, 0.5), st.floats(0.5, 2), st.floats(0.3, 0.95))
def test_the_cost_at_a_latency_is_that_of_the_line(constant, slope, share):
    """A latency of constant + slope · cost is found to within the tolerance."""
    wanted = constant + share * slope
    found = cost_at_latency(lambda cost: constant + slope * cost, (1.0, constant + slope), wanted)
    assert wanted * 0.97 <= constant + slope * found <= wanted
    assert (wanted - constant) / slope - 0.03 * wanted / slope - 1e-12 <= found <= (wanted - constant) / slope + 1e-12
