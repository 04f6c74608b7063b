"""Widths at the steps of the hardware: found in a measured curve, noise apart. Pure."""

from collections.abc import Sequence
from typing import Protocol

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
    """A measured curve, such as `idap.cost.table.Curve`."""

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
        >>> from idap.cost.table import Curve
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
