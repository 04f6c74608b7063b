"""Round what is left of each group to a multiple that suits the hardware."""

from collections.abc import Mapping

from idap.errors import ConfigError
from idap.selection.units import Keep, Ranking


def rounded(ranking: Ranking, keep: Keep, multiples: Mapping[str, int] | int) -> dict[str, tuple[int, ...]]:
    """Bring the number of units left of each group to the nearest multiple, up if there are two.

    A whole group stays whole whatever its size, so a group no larger than its multiple is never cut. A group that was
    cut before to a number that is no multiple is rounded too. Floors and caps hold, since only units of the ranking
    go; where they leave no multiple to choose, the group stays as it is in `ranking.before`.

    Args:
        ranking: the order in which units go and come back inside their group.
        keep: what is left, from `ranking.keep`.
        multiples: of each group; groups that are not named are not rounded.

    Returns:
        Group name -> units left.

    Raises:
        ConfigError: a multiple is below 1.

    Example:
        >>> from idap.selection.units import rank_units
        >>> ranking = rank_units({"a": [float(s) for s in range(20)]}, {"a": tuple(range(20))}, {"a": 1.0}, floors={})
        >>> [len(rounded(ranking, ranking.keep(count), 8)["a"]) for count in (1, 2, 3, 8, 9, 19)]
        [20, 20, 16, 16, 8, 8]
    """
    if multiples == 1:
        return dict(keep)
    numbers = {}
    for name, units in ranking.before.items():
        multiple = multiples if isinstance(multiples, int) else multiples.get(name, 1)
        if multiple < 1:
            raise ConfigError(f"the multiple of group {name!r} must be at least 1, got {multiple}.")
        numbers[name] = len(units) - _nearest(ranking, name, len(keep[name]), multiple)
    return ranking.without(numbers)


def neighbours(ranking: Ranking, keep: Keep, multiples: Mapping[str, int] | int, name: str) -> tuple[int, ...]:
    """The numbers of units that one group may have next to what a rounded `keep` leaves of it: more, then fewer.

    Example:
        >>> from idap.selection.units import rank_units
        >>> ranking = rank_units({"a": [float(s) for s in range(20)]}, {"a": tuple(range(20))}, {"a": 1.0}, floors={})
        >>> neighbours(ranking, rounded(ranking, ranking.keep(5), 8), 8, "a")
        (20, 8)
    """
    multiple = multiples if isinstance(multiples, int) else multiples.get(name, 1)
    held, left = len(ranking.before[name]), len(keep[name])
    least = held - len(ranking.order.get(name, ()))
    found = []
    for wanted in (range(left + 1, held + 1), range(left - 1, least - 1, -1)):
        numbers = (_nearest(ranking, name, number, multiple) for number in wanted)
        found += [next((number for number in numbers if number != left), left)]
    return tuple(number for number in found if number != left)


def _nearest(ranking: Ranking, name: str, left: int, multiple: int) -> int:
    """The allowed number of units of a group that is nearest to `left`."""
    held = len(ranking.before[name])
    least = held - len(ranking.order.get(name, ()))
    below, above = left // multiple * multiple, -(-left // multiple) * multiple
    allowed = [number for number in (above, below) if least <= number <= held]
    if held == ranking.sizes.get(name, held) or not allowed:
        allowed.insert(0, held)
    return min(allowed, key=lambda number: abs(number - left))
