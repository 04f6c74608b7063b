"""Which units of which groups go next: one ranking over all groups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from idap.errors import StructureError

Keep = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Ranking:
    """Units in the order in which they may go, lowest score per cost first.

    Attributes:
        groups: group name of each unit, in the order of removal.
        units: its number in the group.
        scores: its score (not divided by the cost), shape (units,).
        before: group name -> units present before any removal.
    """

    groups: tuple[str, ...]
    units: tuple[int, ...]
    scores: NDArray[np.float64]
    before: Keep

    def __len__(self) -> int:
        return len(self.units)

    def keep(self, count: int) -> dict[str, tuple[int, ...]]:
        """What is left of every group when the first `count` units of the ranking are gone."""
        gone: dict[str, set[int]] = {}
        for name, unit in zip(self.groups[:count], self.units[:count], strict=True):
            gone.setdefault(name, set()).add(unit)
        return {
            name: tuple(unit for unit in units if unit not in gone.get(name, ())) for name, units in self.before.items()
        }


def rank_units(
    scores: Mapping[str, Sequence[float]],
    present: Keep,
    costs: Mapping[str, float],
    *,
    floors: Mapping[str, int],
    power: float = 0.0,
) -> Ranking:
    """Rank the removable units of all groups by score / cost^power.

    Args:
        scores: group name -> score of each of its units, in the original's indices; groups without scores stay whole.
        present: group name -> units that it still has.
        costs: group name -> cost of its next unit, in any unit, above 0 (groups of no cost are never cut).
        floors: group name -> number of units that always stay; at least one stays in any case.
        power: p in [0, 1]: 0 ranks by score alone, 1 by score per cost.

    Returns:
        The ranking; it holds only as many units of each group as may go.

    Raises:
        StructureError: a score of a unit that is present is not a number.

    Example:
        >>> ranking = rank_units({"a": [3.0, 1.0, 2.0]}, {"a": (0, 1, 2)}, {"a": 10.0}, floors={})
        >>> ranking.units, ranking.keep(1)
        ((1, 2), {'a': (0, 2)})
    """
    names: list[str] = []
    units: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float64]] = []
    ranks: list[NDArray[np.float64]] = []
    for name, held in present.items():
        if name not in scores or costs.get(name, 0.0) <= 0:
            continue
        mine = np.asarray(scores[name], dtype=np.float64)[list(held)]
        if not np.isfinite(mine).all():
            raise StructureError(
                f"the divergence of unit {held[int(np.flatnonzero(~np.isfinite(mine))[0])]} of group {name!r} is not a "
                "finite number; look for overflow or NaN in the model's activations."
            )
        free = max(0, len(held) - max(1, floors.get(name, 1)))
        order = np.argsort(mine, kind="stable")[:free]
        names += [name] * len(order)
        units.append(np.asarray(held)[order])
        values.append(mine[order])
        ranks.append(mine[order] / costs[name] ** power)
    if not names:
        return Ranking((), (), np.zeros(0), present)
    order = np.argsort(np.concatenate(ranks), kind="stable")
    return Ranking(
        tuple(names[place] for place in order),
        tuple(int(unit) for unit in np.concatenate(units)[order]),
        np.concatenate(values)[order],
        present,
    )


def fewest_for_target(ranking: Ranking, cost_of: Callable[[Keep], float], target: float, *, most: int) -> int:
    """Find how many units of a ranking must go to come down to a cost.

    Args:
        ranking: from `rank_units`.
        cost_of: cost of what is left; it falls as units go.
        target: the cost wanted.
        most: never more units than this.

    Returns:
        The smallest number whose cost is at most `target`, or `most` if even that is above it.
    """
    low, high = 0, min(most, len(ranking))
    while low < high:
        middle = (low + high) // 2
        if cost_of(ranking.keep(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return low
