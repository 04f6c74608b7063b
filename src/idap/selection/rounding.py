"""Choose numbers of units: multiples, steps of the hardware, equal numbers in groups alike (docs/method.md#ranking)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import lcm
from typing import Protocol

from idap.errors import ConfigError
from idap.selection.ranking import Keep, Part, Ranking


def round_units(ranking: Ranking, keep: Keep, multiples: Mapping[str, int] | int) -> dict[str, tuple[int, ...]]:
    """Round the number of units left of each group to the nearest multiple (docs/method.md#ranking).

    Of two nearest multiples, the upper one is taken. A whole group may stay whole whatever its size, so a group no
    larger than its multiple is never cut. A group that was cut before to a number that is no multiple is rounded too.
    Floors and caps hold, since only units of the ranking are removed; if they allow no multiple, the group stays as it
    is in `ranking.before`.

    Groups that are alike get the multiple nearest to the largest of their numbers; a group that had fewer units before
    any removal keeps all of them.

    Args:
        ranking: the order in which units are removed inside their group.
        keep: group name -> units left, from `ranking.keep`.
        multiples: the multiple of each group, or of all; groups that are not named are not rounded.

    Returns:
        Group name -> units left.

    Raises:
        ConfigError: a multiple is below 1.

    Example:
        From 20 units, 19 are rounded to 20, which is whole, 18 and 17 to 20 and 16, 12 up to 16, 11 to 8, and 1 to 8.

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
    """The next larger and the next smaller number of units that a group, or groups alike, may keep.

    These are the steps that are exchanged for each other in docs/method.md#target.

    Args:
        ranking: the order in which units are removed inside their group.
        keep: group name -> units left, from `round_units`.
        multiples: as for `round_units`.
        members: the group, or a class of groups that are alike.

    Returns:
        Group name -> number of units left, for all members; first more units, then fewer, as far as there are such.

    Example:
        Five of 20 units are removed, so 15 are left and rounded to 16. More would be 20, fewer 8.

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
    """Least common multiple of the multiples of groups that are alike (docs/method.md#ranking).

    Args:
        multiples: as for `round_units`.
        members: names of the groups.

    Raises:
        ConfigError: a multiple is below 1.

    Example:
        >>> common_multiple({"a": 4, "b": 6}, ["a", "b", "c"])
        12
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
    """Rank units in bundles, each of which is removed as a whole (docs/method.md#ranking).

    A bundle takes the largest groups of a class down by one unit, or to the next multiple: it holds the next units of
    each of them. Its key is the mean of their keys, or that of the bundle before it, if that is higher. A group of the
    class of which no more units may be removed keeps the others from going below its number. Units below the last
    multiple that can be reached stay.

    Args:
        ranking: from `rank_units` or `rank_uniform`.
        alike: classes of groups of one size, from `alike_groups`; names that the ranking does not know are ignored.
        multiples: multiples for the number of units left of each group; groups that are not named lose one unit at a
            time.

    Returns:
        The ranking. With the same multiples, `round_units`, and so `reach`, removes bundles only as a whole.

    Raises:
        ConfigError: a multiple is below 1.

    Example:
        Unit 0 of both has the keys 1 and 3, with the mean 2; then follow unit 2 of `a` and unit 1 of `b` with 2 and 4.

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


def shortest_beginning(ranking: Ranking) -> int:
    """Number of parts that the first removal takes: 1, or the size of the first bundle (docs/method.md#ranking).

    It is 0 for an empty ranking.

    Example:
        >>> from idap.selection.ranking import rank_units
        >>> ranking = rank_units({"a": [1.0, 2.0, 3.0, 4.0]}, {"a": (0, 1, 2, 3)}, {"a": 1.0}, floors={})
        >>> shortest_beginning(ranking), shortest_beginning(tie_units(ranking, [], {"a": 2}))  # 4 units to 3, or to 2
        (1, 2)
    """
    if not ranking.parts or ranking.parts[0].unit is None:
        return min(1, len(ranking))
    return len(_bundles(ranking, _free(ranking), ranking.class_of(ranking.parts[0].name))[0])


def _free(ranking: Ranking) -> dict[str, list[Part]]:
    """The units of each group that may be removed, first to last."""
    found: dict[str, list[Part]] = {name: [] for name in ranking.before}
    for part in ranking.parts:
        if part.unit is not None:
            found[part.name].append(part)
    return found


def _bundles(ranking: Ranking, free: Mapping[str, Sequence[Part]], members: Sequence[str]) -> list[tuple[Part, ...]]:
    """The bundles of a class of groups, first to last."""
    held = {name: len(ranking.before[name]) for name in members}
    most, least = max(held.values()), max(held[name] - len(free[name]) for name in members)
    multiple = common_multiple(ranking.multiples, members)
    stops = [most, *(left for left in range(most - 1, least - 1, -1) if left % multiple == 0)]
    return [
        tuple(free[name][held[name] - left] for left in range(high, low, -1) for name in members if held[name] >= left)
        for high, low in pairwise(stops)
    ]


MULTIPLES = (4, 8, 16, 32, 64)
"""Distances between steps that are tested."""
BASES = 3
"""Most places along the widths where a distance is tested."""
EARLY = 2 / 3
"""Share of a rise that must come with its first unit; on a slope, at most a quarter does."""
CLEAR = 3.0
"""A rise must be at least this many times the spread."""
WORTH = 0.01
"""A rise must be at least this share of the latency."""


class Measured(Protocol):
    """A measured curve, such as `idap.cost.latency.Curve`."""

    @property
    def widths(self) -> Sequence[int]:
        """Numbers of units, ascending."""

    @property
    def seconds(self) -> Sequence[float]:
        """Latency at each width."""

    @property
    def spread(self) -> Sequence[float]:
        """How far each of `seconds` may be wrong."""


def probes(size: int) -> tuple[int, ...]:
    """The widths at which a group is measured to find steps (docs/compress.md#goals).

    They are the quarters of the size; and, from up to `BASES` multiples b of the largest of `MULTIPLES` that fits, b,
    b + 1, and b plus each of the `MULTIPLES` up to that one.

    Args:
        size: number of units of the whole group.

    Returns:
        The widths, ascending; the last one is `size`.

    Example:
        The quarters are 8, 16, 24 and 32. The largest multiple is 8, so 1, 4 and 8 are added to 8, 16 and 24.

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
    """The largest multiple that is tested: at several places if the group is large enough; 0 if none fits."""
    roomy = [multiple for multiple in MULTIPLES if multiple <= size // 4]
    return max(roomy if len(roomy) > 1 else [multiple for multiple in MULTIPLES if multiple <= size // 2], default=0)


def _bases(size: int, multiple: int) -> list[int]:
    """A few multiples, from the first to the last but one that fit into the size."""
    count = size // multiple - 1
    places = {1, (count + 1) // 2, count} if count > BASES else set(range(1, count + 1))
    return [place * multiple for place in sorted(places)]


def step_of(curve: Measured) -> int:
    """The distance between the steps of a latency curve (docs/compress.md#goals).

    Widths between two multiples of this distance cost as much as the upper multiple: layers are padded, or widths that
    are no multiple run slower. Formula: with t(w) the latency at width w, m is a distance if at two thirds or more of
    the measured multiples b of m where t(b + m) − t(b) exceeds both `CLEAR` times the sum of the spreads and
    `WORTH` t(b), all widths w measured between them have t(w) − t(b) ≥ `EARLY` (t(b + m) − t(b)), and no less than the
    sum of the spreads.

    Args:
        curve: seconds by width, such as at `probes`.

    Returns:
        The largest of `MULTIPLES` that is a distance; 1 if there is none that stands out from the spread.

    Example:
        First ⌈w / 16⌉ ms, then w / 10 ms.

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
    """Whether the rise to the next multiple comes with its first unit; None if the rise does not stand out."""
    low, off = at[base]
    high, high_off = at[base + multiple]
    rise = high - low
    if rise <= max(CLEAR * (off + high_off), WORTH * low):
        return None
    between = [at[width] for width in at if base < width < base + multiple]
    return all(time - low >= max(EARLY * rise, off + own) for time, own in between)
