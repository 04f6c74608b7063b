"""Round what is left of each group: to a multiple that suits the hardware, and to what groups alike have in common."""

from collections.abc import Mapping, Sequence
from math import lcm

from idap.errors import ConfigError
from idap.selection.units import Keep, Ranking


def rounded(ranking: Ranking, keep: Keep, multiples: Mapping[str, int] | int) -> dict[str, tuple[int, ...]]:
    """Bring the number of units left of each group to the nearest multiple, up if there are two.

    A whole group stays whole whatever its size, so a group no larger than its multiple is never cut. A group that was
    cut before to a number that is no multiple is rounded too. Floors and caps hold, since only units of the ranking
    go; where they leave no multiple to choose, the group stays as it is in `ranking.before`.

    Groups that are alike get the number that is nearest to the largest of theirs; one that has fewer units before any
    removal keeps these.

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
    if multiples == 1 and not ranking.alike:
        return dict(keep)
    numbers: dict[str, int] = {}
    for members in ranking.classes:
        multiple = common_multiple(multiples, members)
        left = _nearest(ranking, members, max(len(keep[name]) for name in members), multiple)
        numbers |= {name: max(0, len(ranking.before[name]) - left) for name in members}
    return ranking.without(numbers)


def neighbours(
    ranking: Ranking, keep: Keep, multiples: Mapping[str, int] | int, members: Sequence[str]
) -> tuple[dict[str, int], ...]:
    """The numbers of units that a group, or groups alike, may have next to a rounded `keep`: more, then fewer.

    Returns:
        Group name -> number of units left, for all members of the class.

    Example:
        >>> from idap.selection.units import rank_units
        >>> ranking = rank_units({"a": [float(s) for s in range(20)]}, {"a": tuple(range(20))}, {"a": 1.0}, floors={})
        >>> neighbours(ranking, rounded(ranking, ranking.keep(5), 8), 8, ["a"])
        ({'a': 20}, {'a': 8})
    """
    multiple = common_multiple(multiples, members)
    least, held = _range(ranking, members)
    left = max(len(keep[name]) for name in members)
    found = []
    for wanted in (range(left + 1, held + 1), range(left - 1, least - 1, -1)):
        numbers = (_nearest(ranking, members, number, multiple) for number in wanted)
        found += [next((number for number in numbers if number != left), left)]
    return tuple(
        {name: min(number, len(ranking.before[name])) for name in members} for number in found if number != left
    )


def common_multiple(multiples: Mapping[str, int] | int, members: Sequence[str]) -> int:
    """What the number of units of groups alike must be a multiple of.

    Raises:
        ConfigError: a multiple is below 1.
    """
    each = {name: multiples if isinstance(multiples, int) else multiples.get(name, 1) for name in members}
    for name, multiple in each.items():
        if multiple < 1:
            raise ConfigError(f"the multiple of group {name!r} must be at least 1, got {multiple}.")
    return lcm(*each.values())


def _range(ranking: Ranking, members: Sequence[str]) -> tuple[int, int]:
    """The fewest and the most units that the largest of some groups alike may have."""
    held = {name: len(ranking.before[name]) for name in members}
    return max(held[name] - len(ranking.order.get(name, ())) for name in members), max(held.values())


def _nearest(ranking: Ranking, members: Sequence[str], left: int, multiple: int) -> int:
    """The allowed number of units of a group, or of groups alike, that is nearest to `left`."""
    least, held = _range(ranking, members)
    below, above = left // multiple * multiple, -(-left // multiple) * multiple
    allowed = [number for number in (above, below) if least <= number <= held]
    if held == max(ranking.sizes.get(name, held) for name in members) or not allowed:
        allowed.insert(0, held)
    return min(allowed, key=lambda number: abs(number - left))
