"""A curve in one line of text."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = ".:-=+*#@"
DECADES = 4
"""What a logarithmic scale shows at most."""


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Draw values as blocks of different heights, on the scale that suits them.

    Args:
        values: in their order; where one is not finite there is a gap.
        width: most characters; neighbours share one, by their mean, if there are more values.
        ascii_only: draw with ASCII characters of rising weight.

    Returns:
        At most `width` characters, and at most one per value.

    Example:
        >>> sparkline([1, 2, 3, 4, 3, 2, 8], 20)
        '▂▃▄▅▄▃█'
        >>> sparkline([1e-4, 1e-4, 1e-3, 1e-2, 1e-1], 20, ascii_only=True)
        '..-*@'
    """
    levels = ASCII if ascii_only else BLOCKS
    cells = _resampled(values, width)
    heights = _logarithms(cells) if logarithmic(values) else cells
    known = [height for height in heights if math.isfinite(height)]
    low = min([*known, *([] if logarithmic(values) else [0.0])], default=0.0)
    span = max(known, default=0.0) - low
    return "".join(_level(levels, height - low, span) for height in heights)


def logarithmic(values: Sequence[float]) -> bool:
    """Whether values are drawn by their logarithms: a linear scale would press most of them into the lowest block.

    Example:
        >>> logarithmic([1.0, 2.0, 8.0]), logarithmic([0.001, 0.002, 8.0]), logarithmic([-1.0, 0.0, 9.0])
        (False, True, False)
    """
    known = [value for value in values if math.isfinite(value)]
    if not known or min(known) < 0:
        return False
    return statistics.median(known) < max(known) / len(BLOCKS)


def _resampled(values: Sequence[float], width: int) -> list[float]:
    count = min(len(values), max(0, width))
    edges = [index * len(values) // count for index in range(count + 1)] if count else [0]
    return [_mean(values[start:end]) for start, end in pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def _logarithms(values: Sequence[float]) -> list[float]:
    floor = max((value for value in values if math.isfinite(value)), default=0.0) / 10**DECADES
    return [math.log10(max(value, floor)) if floor > 0 and math.isfinite(value) else value for value in values]


def _level(levels: str, height: float, span: float) -> str:
    if not math.isfinite(height):
        return " "
    share = height / span if span else 0.0
    return levels[min(len(levels) - 1, int(share * len(levels) + 1e-9))]  # where rounding would miss a border
