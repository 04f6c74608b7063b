"""Units that go as one: those of groups that end with the same number of units, and those down to a multiple.

A configuration with one number for all layers can say it then, and the hardware gets widths that suit it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from idap.selection.rounding import common_multiple
from idap.selection.units import Part, Ranking
from idap.structure.groups import Group

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=[.:#]|$)")


def alike_groups(groups: Iterable[Group], how: Literal["none", "layers", "model"]) -> tuple[tuple[str, ...], ...]:
    """Find the groups that are to end with the same number of units: those of one kind and one size.

    Args:
        groups: of the original.
        how: "layers" asks besides that they lie at the same place of repeated layers, so that their names differ in
            the numbers of a path only; "model" does not; "none" lets every group have a number of its own.

    Returns:
        The names of each class of two groups or more.

    Example:
        >>> names = ["enc.0.fc", "enc.1.fc", "dec.0.fc"]
        >>> groups = [Group(i, name, "neurons", 8, (), (), (), ()) for i, name in enumerate(names)]
        >>> alike_groups(groups, "layers"), alike_groups(groups, "model")
        ((('enc.0.fc', 'enc.1.fc'),), (('enc.0.fc', 'enc.1.fc', 'dec.0.fc'),))
    """
    if how == "none":
        return ()
    found: dict[tuple[str, int, str], list[str]] = {}
    for group in groups:
        # Of two groups of one module, such as heads that share keys and the queries of each, each has its own number.
        place = _NUMBER.sub("*", group.name) if how == "layers" else group.name.partition("#")[2]
        found.setdefault((group.kind, group.size, place), []).append(group.name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


def tied(ranking: Ranking, alike: Sequence[Sequence[str]], multiples: Mapping[str, int] | None = None) -> Ranking:
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
        >>> from idap.selection.units import rank_units
        >>> scores, both = {"a": [1.0, 9.0, 2.0], "b": [3.0, 4.0, 5.0]}, {"a": (0, 1, 2), "b": (0, 1, 2)}
        >>> ranking = tied(rank_units(scores, both, {"a": 1.0, "b": 1.0}, floors={}), [("a", "b")])
        >>> [(part.name, part.unit, part.key) for part in ranking.parts]
        [('a', 0, 2.0), ('b', 0, 2.0), ('a', 2, 3.0), ('b', 1, 3.0)]
        >>> even = tied(rank_units(scores, both, {"a": 1.0, "b": 1.0}, floors={}), [], {"a": 2})
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
