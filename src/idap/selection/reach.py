"""Choose how much a step removes: a share of the units, or what meets a target (docs/method.md#target)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from idap.errors import BudgetError
from idap.selection.ranking import Keep, Ranking
from idap.selection.rounding import neighbours, round_units

CostOf = Callable[[Keep, tuple[str, ...]], float]
REPAIRS = 50
"""Most costs that are evaluated to improve what the bisection found."""


@dataclass(frozen=True)
class Choice:
    """What is removed to meet a target.

    Attributes:
        keep: group name -> units left.
        removed: names of the blocks that are removed, in the order of the ranking.
        count: number of units and blocks that are removed.
        cost: cost of what is left.
    """

    keep: dict[str, tuple[int, ...]]
    removed: tuple[str, ...]
    count: int
    cost: float


def reach(
    ranking: Ranking,
    cost_of: CostOf,
    target: float,
    *,
    tolerance: float = 0.01,
    multiples: Mapping[str, int] | int = 1,
    most: int | None = None,
) -> Choice:
    """Remove as little of a ranking as meets a target, and not much more (docs/method.md#target).

    Bisection finds the smallest k for which the cost after removal of the first k parts is at most the target. If the
    last of these parts saves so much that the cost is below (1 − `tolerance`) · target, exchanges are tried: keep that
    part and its group, and remove parts behind it; or remove it, and keep parts before it; at last, remove fewer units
    of one group and more of another. Of the choices within the tolerance, the one with the lowest sum of scores is
    taken; if there is none, the one with the highest cost that meets the target.

    Args:
        ranking: from `rank_units` or `rank_uniform`.
        cost_of: gives the cost of what is left for the units kept and the blocks removed; removals lower it. It is
            evaluated about log2(len(ranking)) times, and at most `REPAIRS` times more for the exchanges.
        target: the highest cost wanted.
        tolerance: share of the target by which the cost may be below it without exchanges.
        multiples: multiples for the number of units left of each group, see `round_units`; every cost is that of the
            rounded numbers.
        most: only the first `most` parts of the ranking may be removed. If this does not meet the target, all of them
            are removed (as far as rounding allows), and the cost is above the target.

    Returns:
        The choice; its cost is at most `target` unless `most` prevents this.

    Raises:
        BudgetError: `most` is None, and removing all of the ranking does not meet the target.

    Example:
        Four units cost 10 each. The target 25 allows two of them, so the two with the lowest scores are removed.

        >>> from idap.selection.ranking import rank_units
        >>> ranking = rank_units({"a": [3.0, 1.0, 2.0, 4.0]}, {"a": (0, 1, 2, 3)}, {"a": 10.0}, floors={})
        >>> reach(ranking, lambda keep, removed: 10.0 * len(keep["a"]), 25.0)
        Choice(keep={'a': (0, 3)}, removed=(), count=2, cost=20.0)
    """
    if most is not None:
        ranking = replace(ranking, parts=ranking.parts[:most])
    places = range(len(ranking))
    search = _Search(ranking, cost_of, target, tolerance, multiples)
    full = search.look(places)
    if full.cost > target:
        if most is None:
            raise BudgetError(
                f"a cost of {_number(target)} can't be reached: with everything removed that may be removed, the "
                f"smallest reachable cost is {_number(full.cost)}. Ask for that or more, or lower the floors, raise "
                "the caps or round to smaller multiples."
            )
        return full
    count = search.bisect([], places)
    choice = search.look(places[:count])
    if count == 0 or search.is_close(choice):
        return choice
    return _repair(search, places, count)


class _Search:
    """The choices that were evaluated, each once, and the best of them."""

    def __init__(
        self,
        ranking: Ranking,
        cost_of: CostOf,
        target: float,
        tolerance: float,
        multiples: Mapping[str, int] | int,
    ) -> None:
        self.target = target
        self.ranking, self.multiples = ranking, multiples
        self._left: int | None = None
        self._cost_of = cost_of
        self._enough = target - tolerance * abs(target)
        self._seen: dict[tuple[tuple[int, ...], tuple[str, ...]], Choice] = {}

    def allow(self, evaluations: int) -> None:
        """Allow this many more evaluations, besides those left from before; without a call there is no limit."""
        self._left = (self._left or 0) + evaluations

    def look(self, places: Sequence[int]) -> Choice:
        """The choice that removes the parts at these places; of each group they must be the first ones."""
        parts = [self.ranking.parts[place] for place in sorted(places)]
        numbers = Counter(part.name for part in parts if part.unit is not None)
        return self.choose(numbers, self.ranking.outermost(part.name for part in parts if part.unit is None))

    def choose(self, numbers: Mapping[str, int], removed: tuple[str, ...]) -> Choice:
        """The choice that removes these numbers of units of the groups, first ones first, and these blocks."""
        keep = round_units(self.ranking, self.ranking.without(numbers), self.multiples)
        key = tuple(map(len, keep.values())), removed
        if key not in self._seen:
            if self._left is not None:
                self._left -= 1
            gone = sum(map(len, self.ranking.before.values())) - sum(key[0]) + len(removed)
            self._seen[key] = Choice(keep, removed, gone, self._cost_of(keep, removed))
        return self._seen[key]

    def beside(self, choice: Choice, changes: Mapping[str, int]) -> Choice:
        """The choice that differs from this one in the number of units left of some groups."""
        numbers = {
            name: len(units) - changes.get(name, len(choice.keep[name])) for name, units in self.ranking.before.items()
        }
        return self.choose(numbers, choice.removed)

    def is_met(self, places: Sequence[int]) -> bool:
        return self.look(places).cost <= self.target

    def is_close(self, choice: Choice) -> bool:
        return self._enough <= choice.cost <= self.target

    def is_over(self) -> bool:
        return self._left is not None and self._left <= 0

    def bisect(self, taken: Sequence[int], places: Sequence[int]) -> int:
        """Find how many of the places must be removed besides those taken, if removing all of them meets the target.

        Without evaluations left, the search ends early with a number that is enough.
        """
        low, high = 0, len(places)
        while low < high and not self.is_over():
            middle = (low + high) // 2
            if self.is_met([*taken, *places[:middle]]):
                high = middle
            else:
                low = middle + 1
        return high

    def best(self) -> Choice:
        met = [choice for choice in self._seen.values() if choice.cost <= self.target]
        close = [choice for choice in met if self.is_close(choice)]
        return min(close, key=self._loss) if close else max(met, key=lambda choice: choice.cost)

    def _loss(self, choice: Choice) -> float:
        """Sum of the scores of what is removed."""
        ranking = self.ranking
        lost = sum(part.score for part in ranking.parts if part.unit is None and part.name in choice.removed)
        for name, sums in self._sums.items():
            lost += sums[len(ranking.before[name]) - len(choice.keep[name])]
        return lost

    @cached_property
    def _sums(self) -> dict[str, list[float]]:
        """Group name -> sum of the scores of its first 0, 1, 2, ... units."""
        scores: dict[str, list[float]] = {}
        for part in self.ranking.parts:
            if part.unit is not None:
                scores.setdefault(part.name, []).append(part.score)
        return {name: list(accumulate(values, initial=0.0)) for name, values in scores.items()}


def _repair(search: _Search, places: Sequence[int], count: int) -> Choice:
    """Improve the choice of the first `count` places, of which the last part saves too much."""
    search.allow(2 * REPAIRS // 5)
    _skip(search, places, count)
    search.allow(2 * REPAIRS // 5)
    _give_back(search, places[:count])
    search.allow(REPAIRS // 5)
    best = None
    while best is not search.best() and not search.is_close(search.best()):
        best = search.best()
        _exchange(search, best)
    return search.best()


def _skip(search: _Search, places: Sequence[int], count: int) -> None:
    """Keep the part that saves too much, and those of its group behind it, and remove what follows instead."""
    taken, rest = list(places[: count - 1]), list(places[count - 1 :])
    while not search.is_over():
        _, rest = _apart(search.ranking, rest, rest[0])
        if not search.is_met([*taken, *rest]):
            return
        number = search.bisect(taken, rest)
        if search.is_close(search.look([*taken, *rest[:number]])):
            return
        taken, rest = taken + rest[: number - 1], rest[number - 1 :]


def _give_back(search: _Search, places: Sequence[int]) -> None:
    """Remove the part that saves too much, with its group, and keep other parts that may be kept, last ones first."""
    taken: list[int] = []
    rest = list(places)
    while rest and not search.is_over():
        needed, rest = _apart(search.ranking, rest, rest[-1])
        taken += needed
        rest = rest[: search.bisect(taken, rest)]
        if search.is_close(search.look([*taken, *rest])):
            return


def _exchange(search: _Search, best: Choice) -> None:
    """Let one group keep a step more and another a step less than in the best choice, the best-fitting pair first."""
    more: list[tuple[float, dict[str, int]]] = []
    fewer: list[tuple[float, dict[str, int]]] = []
    for members in search.ranking.classes:
        for numbers in neighbours(search.ranking, best.keep, search.multiples, members):
            if search.is_over():
                return
            change = search.beside(best, numbers).cost - best.cost
            grows = any(number > len(best.keep[name]) for name, number in numbers.items())
            (more if grows else fewer).append((change, numbers))
    room = search.target - best.cost
    pairs = [
        (costs + saves, up | down)
        for costs, up in more
        for saves, down in fewer
        if not up.keys() & down.keys() and 0 < costs + saves <= room
    ]
    for _, changes in sorted(pairs, key=lambda pair: -pair[0]):
        if search.is_over() or search.is_close(search.beside(best, changes)):
            return


def _apart(ranking: Ranking, places: Sequence[int], chosen: int) -> tuple[list[int], list[int]]:
    """Split off the place of a block, or the places of all units of a unit's group and of groups that are alike."""
    parts = ranking.parts
    part = parts[chosen]
    if part.unit is None:
        return [chosen], [place for place in places if place != chosen]
    names = ranking.class_of(part.name)
    mine = {place for place in places if parts[place].unit is not None and parts[place].name in names}
    return sorted(mine), [place for place in places if place not in mine]


def _number(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 1e6 else f"{cost:,.10g}"


def step_share(first: float, step: int, steps: int, growth: float) -> float:
    """Share of the remaining units that step t removes: ρ_0 (1 + t/T)^α, at most 0.9 (docs/method.md#filters).

    Args:
        first: ρ_0, in (0, 1).
        step: t, from 0.
        steps: T, at least 1.
        growth: α, at least 0.

    Returns:
        The share.

    Example:
        For T = 2 and α = 1, the shares are 0.1 (1 + 0), 0.1 (1 + 1/2) and 0.1 (1 + 1).

        >>> [round(step_share(0.1, t, 2, 1.0), 3) for t in range(3)]
        [0.1, 0.15, 0.2]
    """
    share: float = first * (1 + step / max(1, steps)) ** growth
    return min(0.9, share)


TRIES = 6
"""Most cuts that are measured to reach a latency."""
TOLERANCE = 0.03
"""Share of the wanted latency by which that of a cut may be below it."""


def cost_at_latency(
    latency_at: Callable[[float], float],
    start: tuple[float, float],
    wanted: float,
    *,
    least: float = 0.0,
    tries: int = TRIES,
    tolerance: float = TOLERANCE,
) -> float:
    """Find the cost to which a model must be cut for its latency to fall to the wanted one (docs/compress.md#goals).

    Latency is about linear in the cost, plus a constant, and its measurement is noisy. So the first try is the cost
    c = c_0 · wanted / t_0, with t_0 the latency at the start. Until a latency is low enough, the line through the start
    and the last try gives the next cost; from then on, the line between the two tries around the wanted latency does.
    Both aim at wanted · (1 − tolerance / 2).

    Args:
        latency_at: measures the latency of a model cut down to a cost.
        start: c_0 and t_0: a cost, and the latency there, which is above the wanted one.
        wanted: the highest latency wanted.
        least: the lowest cost that is possible.
        tries: most measurements.
        tolerance: a latency is close enough if it is at most this share below the wanted one.

    Returns:
        The highest cost found with a latency of at most `wanted`; if there is none, the lowest cost tried.

    Example:
        The latency is 0.2 + 0.8 c. At c = 0.6 it is 0.68, and the slope from (1, 1) is 0.8. The aim of
        0.6 (1 - 0.03 / 2) = 0.591 lies 0.089 lower, so c = 0.6 - 0.089 / 0.8 = 0.489 is next; its latency is 0.591.

        >>> round(cost_at_latency(lambda cost: 0.2 + 0.8 * cost, (1.0, 1.0), 0.6), 2)
        0.49
    """
    high, low, cost = start, None, max(least, start[0] * wanted / start[1])
    lowest = cost
    for _ in range(tries):
        found, lowest = latency_at(cost), min(lowest, cost)
        if found <= wanted:
            low = (cost, found)
            if found >= wanted * (1 - tolerance):
                break
        else:
            high = (cost, found)
        if low is None:
            if cost <= least:
                break
            slope = max(start[1] - found, 1e-9) / (start[0] - cost)
            step = max((found - wanted * (1 - tolerance / 2)) / slope, 0.05 * cost)
            cost = max(least, cost - min(step, cost / 2))
        else:
            share = (wanted * (1 - tolerance / 2) - low[1]) / max(high[1] - low[1], 1e-9)
            cost = low[0] + (high[0] - low[0]) * min(0.9, max(0.1, share))
    return low[0] if low is not None else lowest
