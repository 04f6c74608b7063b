"""How many units are left: multiples and steps that suit the hardware, the same number in groups that are alike."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import lcm
from typing import Protocol

from idap.errors import ConfigError
from idap.selection.ranking import Keep, Part, Ranking


def round_units(ranking: Ranking, keep: Keep, multiples: Mapping[str, int] | int) -> dict[str, tuple[int, ...]]:
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
        >>> from idap.selection.ranking import rank_units
        >>> ranking = rank_units({"a": [float(s) for s in range(20)]}, {"a": tuple(range(20))}, {"a": 1.0}, floors={})
        >>> [len(round_units(ranking, ranking.keep(count), 8)["a"]) for count in (1, 2, 3, 8, 9, 19)]
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
        >>> from idap.selection.ranking import rank_units
        >>> ranking = rank_units({"a": [float(s) for s in range(20)]}, {"a": tuple(range(20))}, {"a": 1.0}, floors={})
        >>> neighbours(ranking, round_units(ranking, ranking.keep(5), 8), 8, ["a"])
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


def tie_units(ranking: Ranking, alike: Sequence[Sequence[str]], multiples: Mapping[str, int] | None = None) -> Ranking:
    """Rank units as bundles, which go as one: those of groups that are alike, and those down to the next multiple.

    A bundle takes the largest groups of a class down by one unit, or to the next multiple: it holds the next units of
    each of them, and stands in the ranking where the mean of their keys does. A group of the class that has no more
    units to give, or none that were ranked, holds the others back. What lies below the last multiple in reach stays.

    Args:
        ranking: from `rank_units` or `rank_uniform`.
        alike: classes of groups of one size, from `alike_groups`; names that the ranking does not know are ignored.
        multiples: of the number of units left of each group; groups that are not named lose a unit at a time.

    Returns:
        The ranking; `rounded`, and so `reach`, lets bundles go as a whole only, given the same multiples.

    Raises:
        ConfigError: a multiple is below 1.

    Example:
        >>> from idap.selection.ranking import rank_units
        >>> scores, both = {"a": [1.0, 9.0, 2.0], "b": [3.0, 4.0, 5.0]}, {"a": (0, 1, 2), "b": (0, 1, 2)}
        >>> ranking = tie_units(rank_units(scores, both, {"a": 1.0, "b": 1.0}, floors={}), [("a", "b")])
        >>> [(part.name, part.unit, part.key) for part in ranking.parts]
        [('a', 0, 2.0), ('b', 0, 2.0), ('a', 2, 3.0), ('b', 1, 3.0)]
        >>> even = tie_units(rank_units(scores, both, {"a": 1.0, "b": 1.0}, floors={}), [], {"a": 2})
        >>> [(part.name, part.unit) for part in even.parts]
        [('a', 0), ('b', 0), ('b', 1)]
    """
    ranking = replace(ranking, alike=tuple(map(tuple, alike)), multiples=dict(multiples or {}))
    free, parts = _free(ranking), []
    for members in ranking.classes:
        key = float("-inf")
        for bundle in _bundles(ranking, free, members):
            key = max(key, sum(part.key for part in bundle) / len(bundle))
            parts += [part._replace(key=key) for part in bundle]
    parts += [part for part in ranking.parts if part.unit is None]
    return replace(ranking, parts=tuple(sorted(parts, key=lambda part: part.key)))


def shortest(ranking: Ranking) -> int:
    """Length of the shortest beginning of a ranking that takes anything: one part, or the first bundle."""
    if not ranking.parts or ranking.parts[0].unit is None:
        return min(1, len(ranking))
    return len(_bundles(ranking, _free(ranking), ranking.class_of(ranking.parts[0].name))[0])


def _free(ranking: Ranking) -> dict[str, list[Part]]:
    """The units of each group that may go, first to last."""
    found: dict[str, list[Part]] = {name: [] for name in ranking.before}
    for part in ranking.parts:
        if part.unit is not None:
            found[part.name].append(part)
    return found


def _bundles(ranking: Ranking, free: Mapping[str, Sequence[Part]], members: Sequence[str]) -> list[tuple[Part, ...]]:
    """What a class of groups loses at a time, first to last."""
    held = {name: len(ranking.before[name]) for name in members}
    most, least = max(held.values()), max(held[name] - len(free[name]) for name in members)
    multiple = common_multiple(ranking.multiples, members)
    stops = [most, *(left for left in range(most - 1, least - 1, -1) if left % multiple == 0)]
    return [
        tuple(free[name][held[name] - left] for left in range(high, low, -1) for name in members if held[name] >= left)
        for high, low in pairwise(stops)
    ]


MULTIPLES = (4, 8, 16, 32, 64)
"""Distances between steps that are looked for."""
BASES = 3
"""Places along the widths where steps are looked for."""
EARLY = 2 / 3
"""Share of a rise that must come with its first unit; of a slope it is at most a quarter."""
CLEAR = 3.0
"""How many times the spread a rise must be."""
WORTH = 0.01
"""Share of the latency that a rise must be."""


class Measured(Protocol):
    """A measured curve, such as `idap.cost.latency.Curve`."""

    @property
    def widths(self) -> Sequence[int]:
        """Ascending."""

    @property
    def seconds(self) -> Sequence[float]:
        """Beside the widths."""

    @property
    def spread(self) -> Sequence[float]:
        """How far each of `seconds` may be off."""


def probes(size: int) -> tuple[int, ...]:
    """The widths at which steps of a group can be told: next to a few multiples, and some in between for the slope.

    Args:
        size: units of the whole group.

    Returns:
        Ascending; the last one is `size`.

    Example:
        >>> probes(32)
        (8, 9, 12, 16, 17, 20, 24, 25, 28, 32)
    """
    found = {max(1, size * share // 4) for share in (1, 2, 3, 4)}
    largest = _largest(size)
    if largest:
        inner = [1, *(multiple for multiple in MULTIPLES if multiple <= largest)]
        found |= {base + more for base in _bases(size, largest) for more in (0, *inner)}
    return tuple(sorted(found))


def _largest(size: int) -> int:
    """The largest multiple that is looked for: with several places for it where the group is large enough."""
    roomy = [multiple for multiple in MULTIPLES if multiple <= size // 4]
    return max(roomy if len(roomy) > 1 else [multiple for multiple in MULTIPLES if multiple <= size // 2], default=0)


def _bases(size: int, multiple: int) -> list[int]:
    """A few multiples from the first to the last one that has another behind it."""
    count = size // multiple - 1
    places = {1, (count + 1) // 2, count} if count > BASES else set(range(1, count + 1))
    return [place * multiple for place in sorted(places)]


def step_of(curve: Measured) -> int:
    """The distance between the steps of a curve: widths between two multiples of it cost as much as the upper one.

    A distance counts where the latency rises from one of its multiples to the next, clearly more than the spread, and
    all widths measured between them already cost most of the rise: so it is where layers are padded, and where widths
    that are no multiple run slower. It must be so at two of three of the places where anything can be told.

    Args:
        curve: seconds by width, such as at `probes`.

    Returns:
        The largest such distance; 1 where there is none, or none that can be told from the spread.

    Example:
        >>> from idap.cost.latency import Curve
        >>> widths = probes(64)
        >>> padded = [1e-3 * -(-width // 16) for width in widths]
        >>> step_of(Curve(widths, tuple(padded), (1e-5,) * len(widths)))
        16
        >>> step_of(Curve(widths, tuple(1e-4 * width for width in widths), (1e-5,) * len(widths)))
        1
    """
    return max((multiple for multiple in MULTIPLES if _is_step(curve, multiple)), default=1)


def _is_step(curve: Measured, multiple: int) -> bool:
    at = {width: (time, off) for width, time, off in zip(curve.widths, curve.seconds, curve.spread, strict=True)}
    told = [
        found
        for base in curve.widths
        if base % multiple == 0 and base + multiple in at and base + 1 in at
        for found in (_steps_at(at, base, multiple),)
        if found is not None
    ]
    return bool(told) and 3 * sum(told) >= 2 * len(told)


def _steps_at(at: dict[int, tuple[float, float]], base: int, multiple: int) -> bool | None:
    """Whether the rise to the next multiple comes at once; None where it can't be told."""
    low, off = at[base]
    high, high_off = at[base + multiple]
    rise = high - low
    if rise <= max(CLEAR * (off + high_off), WORTH * low):
        return None
    between = [at[width] for width in at if base < width < base + multiple]
    return all(time - low >= max(EARLY * rise, off + own) for time, own in between)
