"""Rank units and blocks over all groups, and choose the best of several cuts (docs/method.md#ranking)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from idap.errors import ConfigError, DivergedError, StructureError

Keep = Mapping[str, tuple[int, ...]]


class Part(NamedTuple):
    """A part that is removed on its own: a unit of a group, or a block.

    Attributes:
        name: name of the group, or of the block.
        unit: index of the unit in its group; None for a block.
        score: its score, not divided by the cost.
        key: the key by which it is ranked; the part with the lowest key is removed first.
    """

    name: str
    unit: int | None
    score: float
    key: float = 0.0


@dataclass(frozen=True)
class ScoredBlock:
    """A block that may be removed.

    Attributes:
        score: its score, on the scale of the units' scores.
        cost: the cost that its removal saves, in the unit of the units' costs; a block of cost 0 is never removed.
        contains: names of the blocks inside it, at any depth, which are removed with it.
    """

    score: float
    cost: float
    contains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """Units and blocks in the order in which they may be removed (docs/method.md#ranking).

    Inside a group, this order never changes.

    Attributes:
        parts: the parts in the order of removal; of each group only as many units as floors and caps allow.
        before: group name -> units present before any removal.
        sizes: group name -> number of units of the original, for the groups that have scores.
        contains: block name -> names of the blocks inside it.
        alike: classes of groups that keep the same number of units, see `tie_units`.
        multiples: group name -> the number of units that is left is a multiple of this, see `tie_units`; 1 for groups
            that are not named.

    Example:
        >>> parts = Part("a", 1, 1.0), Part("block", None, 5.0), Part("a", 0, 2.0)
        >>> ranking = Ranking(parts, before={"a": (0, 1, 2)})
        >>> ranking.groups, ranking.units, ranking.blocks, ranking.order
        (('a', 'a'), (1, 0), ('block',), {'a': (1, 0)})
        >>> ranking.keep(3), ranking.without({"a": 1}), ranking.blocks_among(2)
        ({'a': (2,)}, {'a': (0, 2)}, ('block',))
    """

    parts: tuple[Part, ...]
    before: Keep
    sizes: Mapping[str, int] = field(default_factory=dict)
    contains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alike: tuple[tuple[str, ...], ...] = ()
    multiples: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.parts)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Group of each unit in the order of removal; blocks are left out."""
        return tuple(part.name for part in self.parts if part.unit is not None)

    @cached_property
    def units(self) -> tuple[int, ...]:
        """Index of each unit in its group, in the order of `groups`."""
        return tuple(part.unit for part in self.parts if part.unit is not None)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Score of each unit, in the order of `groups`, shape (units,)."""
        return np.array([part.score for part in self.parts if part.unit is not None], dtype=np.float64)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The blocks, in the order of removal."""
        return tuple(part.name for part in self.parts if part.unit is None)

    @cached_property
    def order(self) -> dict[str, tuple[int, ...]]:
        """Group name -> its units that may be removed, first to last."""
        found: dict[str, list[int]] = {}
        for name, unit in zip(self.groups, self.units, strict=True):
            found.setdefault(name, []).append(unit)
        return {name: tuple(units) for name, units in found.items()}

    @cached_property
    def classes(self) -> tuple[tuple[str, ...], ...]:
        """All groups, in classes of groups that are alike."""
        return tuple(dict.fromkeys(map(self.class_of, self.before)))

    def class_of(self, name: str) -> tuple[str, ...]:
        """The class of a group: the group and those that are alike."""
        members = next((names for names in self.alike if name in names), (name,))
        return tuple(other for other in members if other in self.before)

    def keep(self, count: int) -> dict[str, tuple[int, ...]]:
        """Units left of every group after the removal of the first `count` parts of the ranking."""
        return self.without(Counter(part.name for part in self.parts[:count] if part.unit is not None))

    def without(self, numbers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Units left of every group after the removal of the first `numbers[name]` units of its `order`."""
        left = {}
        for name, units in self.before.items():
            gone = set(self.order.get(name, ())[: numbers.get(name, 0)])
            left[name] = tuple(unit for unit in units if unit not in gone) if gone else units
        return left

    def blocks_among(self, count: int) -> tuple[str, ...]:
        """Blocks among the first `count` parts, without those inside another of them."""
        return self.outermost(part.name for part in self.parts[:count] if part.unit is None)

    def outermost(self, blocks: Iterable[str]) -> tuple[str, ...]:
        """These blocks, without those inside another of them."""
        names = tuple(blocks)
        inner = {name for outer in names for name in self.contains.get(outer, ())}
        return tuple(name for name in names if name not in inner)


def rank_units(
    scores: Mapping[str, Sequence[float]],
    present: Keep,
    costs: Mapping[str, float],
    *,
    floors: Mapping[str, int],
    power: float = 0.0,
    caps: Mapping[str, int] | None = None,
    blocks: Mapping[str, ScoredBlock] | None = None,
    orders: Mapping[str, Sequence[int]] | None = None,
) -> Ranking:
    """Rank the removable units of all groups, and blocks among them, by score / cost^p (docs/method.md#ranking).

    The key of a score below 0, whose unit does harm, is score · cost^p, so that a high cost ranks it early as well.

    Args:
        scores: group name -> score of each of its units, in the original's indices; groups without scores stay whole.
        present: group name -> units that it still has.
        costs: group name -> cost of its next unit (multiply-adds, parameters or seconds); groups of cost 0 stay whole.
        floors: group name -> number of units that always stay; at least one stays in any case.
        power: p in [0, 1]: 0 ranks by score alone, 1 by score per cost.
        caps: group name -> most units of the original that may be removed, including those removed before.
        blocks: block name -> its score and cost.
        orders: group name -> its units in the order of removal, if that is not the order of their scores; the key of a
            unit is then at least that of the units before it.

    Returns:
        The ranking. Parts with equal keys stand in the order of `present`, units before blocks.

    Raises:
        StructureError: a score of a unit that is present or of a block is not finite, or an order misses a unit.
        ConfigError: `power` is outside [0, 1].

    Example:
        By score per cost, the block has 30 / 200 = 0.15, which lies between the 1 / 10 of unit 1 and the 2 / 10 of 2.

        >>> given = {"a": [3.0, 1.0, 2.0]}, {"a": (0, 1, 2)}, {"a": 10.0}
        >>> ranking = rank_units(*given, floors={})
        >>> ranking.units, ranking.keep(1)
        ((1, 2), {'a': (0, 2)})
        >>> mixed = rank_units(*given, floors={}, power=1.0, blocks={"layer": ScoredBlock(score=30.0, cost=200.0)})
        >>> mixed.keep(2), mixed.blocks_among(2)
        ({'a': (0, 2)}, ('layer',))
    """
    if not 0 <= power <= 1:
        raise ConfigError(f"power must be in [0, 1], got {power:g}; 0 ranks by score alone, 1 by score per cost.")
    paid = {name: values for name, values in scores.items() if costs.get(name, 0.0) > 0}
    parts: list[Part] = []
    keys: list[float] = []
    for name, mine in _removable(paid, present, floors, caps or {}, orders or {}):
        parts += mine
        keys += np.maximum.accumulate([_per_cost(part.score, costs[name], power) for part in mine]).tolist()
    for name, block in (blocks or {}).items():
        if not np.isfinite(block.score):
            raise StructureError(_not_finite(f"block {name!r}"))
        if block.cost > 0:
            parts.append(Part(name, None, block.score))
            keys.append(_per_cost(block.score, block.cost, power))
    contains = {name: block.contains for name, block in (blocks or {}).items()}
    return _sort(parts, keys, present, scores, contains)


def rank_uniform(
    scores: Mapping[str, Sequence[float]],
    present: Keep,
    *,
    floors: Mapping[str, int],
    caps: Mapping[str, int] | None = None,
    orders: Mapping[str, Sequence[int]] | None = None,
) -> Ranking:
    """Rank units so that all groups lose the same share of their original units (docs/method.md#ranking).

    Scores only order the units inside a group. Formula: the key of a unit is the share of its group that is removed
    once it is, (removed before + place) / size, with its place counted from 1.

    Args:
        scores: as for `rank_units`; groups without scores stay whole.
        present: as for `rank_units`.
        floors: as for `rank_units`; a group at its floor loses no more, while the others do.
        caps: as for `rank_units`.
        orders: as for `rank_units`.

    Returns:
        The ranking.

    Raises:
        StructureError: a score of a unit that is present is not finite, or an order misses a unit.

    Example:
        The units of `a` have the keys 1/4, 2/4 and 3/4 (one stays), the unit of `b` has 1/2.

        >>> scores = {"a": [9.0, 8.0, 7.0, 6.0], "b": [1.0, 2.0]}
        >>> rank_uniform(scores, {"a": (0, 1, 2, 3), "b": (0, 1)}, floors={}).keep(3)
        {'a': (0, 1), 'b': (1,)}
    """
    parts: list[Part] = []
    keys: list[float] = []
    for name, mine in _removable(scores, present, floors, caps or {}, orders or {}):
        size = len(scores[name])
        gone = size - len(present[name])
        parts += mine
        keys += [(gone + place + 1) / size for place in range(len(mine))]
    return _sort(parts, keys, present, scores, {})


def _removable(
    scores: Mapping[str, Sequence[float]],
    present: Keep,
    floors: Mapping[str, int],
    caps: Mapping[str, int],
    orders: Mapping[str, Sequence[int]],
) -> list[tuple[str, list[Part]]]:
    """Group name and units that may be removed, first to last, of each group."""
    found = []
    for name, held in present.items():
        if name not in scores:
            continue
        values = np.asarray(scores[name], dtype=np.float64)
        mine = values[list(held)]
        if not np.isfinite(mine).all():
            bad = held[int(np.flatnonzero(~np.isfinite(mine))[0])]
            raise StructureError(_not_finite(f"unit {bad} of group {name!r}"))
        order = [held[place] for place in np.argsort(mine, kind="stable")]
        if name in orders:
            still = set(held)
            order = [unit for unit in dict.fromkeys(orders[name]) if unit in still]
            if len(order) < len(held):
                missing = min(still.difference(order))
                raise StructureError(
                    f"the order of group {name!r} misses unit {missing}; it must hold every unit that is present."
                )
        gone = len(values) - len(held)
        free = min(len(held) - max(1, floors.get(name, 1)), caps.get(name, len(values)) - gone)
        found.append((name, [Part(name, unit, float(values[unit])) for unit in order[: max(0, free)]]))
    return found


def _per_cost(score: float, cost: float, power: float) -> float:
    """The key: low if a removal costs little accuracy and saves much, also for scores below 0."""
    weight: float = cost**power
    return score / weight if score >= 0 else score * weight


def _sort(
    parts: Sequence[Part],
    keys: Sequence[float],
    present: Keep,
    scores: Mapping[str, Sequence[float]],
    contains: Mapping[str, tuple[str, ...]],
) -> Ranking:
    order = np.argsort(np.asarray(keys, dtype=np.float64), kind="stable")
    sizes = {name: len(values) for name, values in scores.items()}
    return Ranking(tuple(parts[place]._replace(key=keys[place]) for place in order), present, sizes, contains)


def _not_finite(what: str) -> str:
    return f"the divergence of {what} is not a finite number; look for overflow or NaN in the model's activations."


Way = TypeVar("Way")
Candidate = TypeVar("Candidate")


def best_of(candidates: Mapping[Way, Candidate], loss: Callable[[Candidate], float]) -> Way:
    """Choose the way whose candidate has the lowest loss: argmin over ways of loss(candidate).

    This is `cost_power="auto"` of docs/method.md#ranking.

    Args:
        candidates: way, such as a power of the cost -> the candidate that it leads to; of equal candidates only the
            first is measured.
        loss: gives the loss of a candidate on calibration data.

    Returns:
        The way; the first of those with the lowest loss. One with a loss that is not finite is never chosen.

    Raises:
        DivergedError: no candidate has a finite loss.

    Example:
        The losses are 3 - 1 and 3 - 2.

        >>> best_of({0.0: {"a": (0, 1)}, 1.0: {"a": (0, 2)}}, lambda keep: 3.0 - sum(keep["a"]))
        1.0
    """
    measured: list[tuple[Way, Candidate, float]] = []
    for way, candidate in candidates.items():
        if all(candidate != other for _, other, _ in measured):
            measured.append((way, candidate, loss(candidate)))
    finite = [(value, way) for way, _, value in measured if isfinite(value)]
    if not finite:
        raise DivergedError(
            f"none of the cuts {', '.join(map(str, candidates))} leaves a finite calibration loss; "
            "remove less, or look for overflow in the model."
        )
    return min(finite, key=lambda pair: pair[0])[1]
