"""Format numbers for people, and compute the axes of charts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"


def count(number: float) -> str:
    r"""Format a large count with three digits and a letter.

    >>> count(40_813_184), count(999), count(1_000_000_000)
    ('40.8\xa0M', '999', '1.00\xa0G')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{_digits(number / size)}{SPACE}{letter}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    r"""Format a number of bytes.

    >>> size(1_081_000), size(512)
    ('1.08\xa0MB', '512\xa0bytes')
    """
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{_digits(number / unit)}{SPACE}{letter}"
    return f"{number:,.0f}{SPACE}bytes"


def time(seconds: float) -> str:
    r"""Format a duration in seconds.

    >>> time(0.0042), time(0.5), time(12.34), time(125), time(7260)
    ('4.20\xa0ms', '0.50\xa0s', '12.3\xa0s', '2\xa0min 05\xa0s', '2\xa0h 01\xa0min')
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.1:
        return f"{_digits(seconds * 1000)}{SPACE}ms" if seconds else f"0{SPACE}s"
    if seconds < 59.95:
        return f"{seconds:.2f}{SPACE}s" if seconds < 1 else f"{_digits(seconds)}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02d}{SPACE}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{SPACE}h {minutes:02d}{SPACE}min"


def share(value: float, digits: int = 1) -> str:
    r"""Format a share as percent.

    >>> share(0.5032), share(-0.25, 0)
    ('50.3\xa0%', '−25\xa0%')
    """
    return f"{value * 100:.{digits}f}{SPACE}%".replace("-", MINUS) if math.isfinite(value) else "?"


def change(before: float, after: float) -> str:
    r"""Format the relative change of a number.

    >>> change(100, 49.8), change(0, 1)
    ('−50.2\xa0%', '')
    """
    if not before:
        return ""
    by = after / before - 1
    return ("+" if by > 0 else "") + share(by)


def metric(name: str, value: float) -> str:
    r"""Format a metric: an accuracy as percent, anything else with four digits.

    >>> metric("accuracy", 0.9722), metric("perplexity", 20.1234), metric("val_accuracy", 97.2)
    ('97.22\xa0%', '20.12', '97.2')
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else str(value).replace("-", MINUS)
    return share(value, 2) if is_percent(name, value) else f"{value:.4g}".replace("-", MINUS)


def metric_change(name: str, before: float, after: float) -> str:
    """Format the change of a metric: of an accuracy in points.

    >>> metric_change("accuracy", 0.97, 0.96), metric_change("loss", 1.0, 1.5)
    ('−1.00 points', '+0.5')
    """
    by = after - before
    if not by:
        return "unchanged"
    text = f"{by * 100:+.2f} points" if is_percent(name, before) else f"{by:+.3g}"
    return text.replace("-", MINUS)


def is_percent(name: str, value: float) -> bool:
    """Whether a metric is shown as percent."""
    return "accuracy" in name.lower() and 0 <= value <= 1


def small(value: float) -> str:
    """Format a score of any magnitude.

    >>> small(0.0312), small(3.1e-7), small(0)
    ('0.0312', '3.1e−7', '0')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "?"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}".replace("-", MINUS)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def _digits(number: float) -> str:
    """Format a number with three digits."""
    return f"{number:.{max(0, 2 - int(math.log10(max(number, 1e-9))) if number >= 1 else 2)}f}"


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        low: the number at the start.
        high: the number at the end, above `low`.
        ticks: the numbers that are marked, between `low` and `high`.
        logarithmic: whether the scale is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The position of a number, 0 at the start and 1 at the end; numbers outside are at the edge."""
        if self.logarithmic:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def linear(values: Sequence[float], *, most: int = 5, room: float = 0.0, whole: bool = False) -> Axis:
    """An axis that contains all values, with ticks at round numbers.

    Args:
        values: values on the axis; those that are not finite are ignored.
        most: the approximate maximum of ticks.
        room: margin at either end, as a share of the span.
        whole: whether only whole numbers are marked.

    Example:
        >>> linear([0, 97]).ticks
        (0.0, 20.0, 40.0, 60.0, 80.0)
    """
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    low, high = low - room * (high - low), high + room * (high - low)
    step = _round_step((high - low) / most)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    ticks = [number * step for number in range(first, first + 4 * most) if number * step <= high + 1e-9 * step]
    return Axis(low, high, tuple(float(f"{tick:.12g}") for tick in ticks))


def logarithmic(values: Sequence[float], *, most_decades: int = 6) -> Axis:
    """An axis for positive values of different magnitudes, with ticks at powers of ten; the lowest decades may be cut.

    >>> logarithmic([0.002, 3.0]).ticks
    (0.01, 0.1, 1.0)
    """
    known = [value for value in values if math.isfinite(value) and value > 0] or [0.1, 1.0]
    high = max(known) * 1.3
    low = max(min(known) / 1.3, high / 10**most_decades)
    low = min(low, high / 3)
    ticks = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    if len(ticks) < 2:
        ticks = [m * 10.0**p for p in range(-30, 30) for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return Axis(low, high, tuple(float(f"{tick:.12g}") for tick in ticks), logarithmic=True)


def _round_step(smallest: float) -> float:
    """The smallest round number that is not below a number."""
    power = 10.0 ** math.floor(math.log10(smallest))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= smallest * (1 - 1e-9))
