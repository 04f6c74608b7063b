"""How far a step goes: to a share of the units, or exactly to a target."""

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
"""Costs evaluated at most to repair what the bisection found."""


@dataclass(frozen=True)
class Choice:
    """What goes to meet a target.

    Attributes:
        keep: group name -> units left.
        removed: blocks that go, in the order of the ranking.
        count: number of units and blocks that go.
        cost: of what is left.
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
    """Remove as little of a ranking as meets a target, and not much more.

    The shortest beginning of the ranking that meets the target is found by bisection. Where its last part saves so
    much that the cost falls more than `tolerance` short of the target, repairs are tried: leaving that part (and its
    group) and taking what ranks behind it; keeping to it and giving back what ranks before it; at last, exchanging a
    step of one group for a step of another. Of the choices within the tolerance the one with the lowest sum of scores
    is taken; without any, the one nearest to the target from below.

    Args:
        ranking: from `rank_units` or `rank_uniform`.
        cost_of: cost of what is left, given the units kept and the blocks removed; it falls as parts go. Evaluated
            about log2(len(ranking)) times, and up to `REPAIRS` times more for the repairs.
        target: the cost wanted at most.
        tolerance: share of the target by which the cost may fall short of it without repair.
        multiples: number of units left of each group, see `round_units`; rounding is part of every cost looked at.
        most: only the first `most` parts of the ranking may go. If they don't meet the target, the choice is all of
            them (as far as rounding lets them go), and its cost is above the target.

    Returns:
        The choice; its cost is at most `target` unless `most` forbids it.

    Raises:
        BudgetError: `most` is not given and the target can't be met with everything in the ranking gone.

    Example:
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
                f"a cost of {_number(target)} can't be reached: with everything that may go gone, the smallest "
                f"reachable cost is {_number(full.cost)}. Ask for that or more, or lower the floors, raise the caps or "
                "round to smaller multiples."
            )
        return full
    count = search.bisect([], places)
    choice = search.look(places[:count])
    if count == 0 or search.is_close(choice):
        return choice
    return _repair(search, places, count)


class _Search:
    """Costs of parts of a ranking, each evaluated once, and the best choice among them."""

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
        """Let so many more costs be evaluated, besides what is left from before; until then there is no limit."""
        self._left = (self._left or 0) + evaluations

    def look(self, places: Sequence[int]) -> Choice:
        """The choice that removes the parts at some places; of each group they must be the first ones."""
        parts = [self.ranking.parts[place] for place in sorted(places)]
        numbers = Counter(part.name for part in parts if part.unit is not None)
        return self.choose(numbers, self.ranking.outermost(part.name for part in parts if part.unit is None))

    def choose(self, numbers: Mapping[str, int], removed: tuple[str, ...]) -> Choice:
        """The choice that removes the first units of each group, and some blocks."""
        keep = round_units(self.ranking, self.ranking.without(numbers), self.multiples)
        key = tuple(map(len, keep.values())), removed
        if key not in self._seen:
            if self._left is not None:
                self._left -= 1
            gone = sum(map(len, self.ranking.before.values())) - sum(key[0]) + len(removed)
            self._seen[key] = Choice(keep, removed, gone, self._cost_of(keep, removed))
        return self._seen[key]

    def beside(self, choice: Choice, changes: Mapping[str, int]) -> Choice:
        """The choice that differs in the number of units left of some groups."""
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
        """How many of some places must go besides those taken to meet the target, if all of them do.

        When no evaluation is left, it ends early with a number that is enough.
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
        """Sum of the scores of what goes."""
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
    """The best choice found from the first `count` places, whose last part was too big."""
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
    """Leave the part that was too big, and those of its group behind it, and take what follows instead."""
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
    """Keep to the part that was too big and to its group, and give back what isn't needed besides, last ones first."""
    taken: list[int] = []
    rest = list(places)
    while rest and not search.is_over():
        needed, rest = _apart(search.ranking, rest, rest[-1])
        taken += needed
        rest = rest[: search.bisect(taken, rest)]
        if search.is_close(search.look([*taken, *rest])):
            return


def _exchange(search: _Search, best: Choice) -> None:
    """Let one group keep a step more and another a step less than in the best choice, most promising pair first."""
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
    """The place of a part, with those of its whole group and of groups alike if it is a unit, and the other places."""
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
    """Share of the remaining units that step t removes: rho_0 (1 + t/T)^alpha (docs/method.md#filters).

    Args:
        first: rho_0, in (0, 1).
        step: t, from 0.
        steps: T, at least 1.
        growth: alpha, at least 0.

    Returns:
        The share, below 1.

    Example:
        >>> [round(step_share(0.1, t, 2, 1.0), 3) for t in range(3)]
        [0.1, 0.15, 0.2]
    """
    share: float = first * (1 + step / max(1, steps)) ** growth
    return min(0.9, share)


TRIES = 6
"""Cuts measured at most to come down to a latency."""
TOLERANCE = 0.03
"""How far below the wanted latency a cut may be, as a share of it."""


def come_down(
    latency_at: Callable[[float], float],
    start: tuple[float, float],
    wanted: float,
    *,
    least: float = 0.0,
    tries: int = TRIES,
    tolerance: float = TOLERANCE,
) -> float:
    """Find how far a cost must fall for the latency to fall to what is wanted.

    A bracket is narrowed by interpolation, as latency falls about evenly with the cost but not with all of it, and
    its measurement is noisy.

    Args:
        latency_at: measures the latency of a cut down to a cost.
        start: a cost, and the latency there, above what is wanted.
        wanted: the latency wanted at most.
        least: no lower cost is possible.
        tries: measurements at most.
        tolerance: a latency is near enough if it falls short of the wanted one by no more than this share.

    Returns:
        The highest cost found whose latency is as wanted; without any, the lowest tried.

    Example:
        >>> round(come_down(lambda cost: 0.2 + 0.8 * cost, (1.0, 1.0), 0.6), 2)
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
