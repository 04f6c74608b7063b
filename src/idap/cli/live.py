"""The status of a run in two lines that are never wrapped, with its divergence over depth as a sparkline."""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from idap.progress import Status

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = ".:-=+*#@"
DECADES = 4
"""How many powers of ten a logarithmic scale shows at most."""


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Draw values as blocks of different heights, on a linear or a logarithmic scale.

    Args:
        values: in order; a value that is not finite leaves a gap.
        width: largest number of characters; if there are more values, a character is the mean of several neighbours.
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
    cells = _resample(values, width)
    heights = _logarithms(cells) if logarithmic(values) else cells
    known = [height for height in heights if math.isfinite(height)]
    low = min([*known, *([] if logarithmic(values) else [0.0])], default=0.0)
    span = max(known, default=0.0) - low
    return "".join(_level(levels, height - low, span) for height in heights)


def logarithmic(values: Sequence[float]) -> bool:
    """Whether values are drawn on a logarithmic scale, since most of them would be in the lowest block of a linear one.

    Example:
        >>> logarithmic([1.0, 2.0, 8.0]), logarithmic([0.001, 0.002, 8.0]), logarithmic([-1.0, 0.0, 9.0])
        (False, True, False)
    """
    known = [value for value in values if math.isfinite(value)]
    if not known or min(known) < 0:
        return False
    return statistics.median(known) < max(known) / len(BLOCKS)


def _resample(values: Sequence[float], width: int) -> list[float]:
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
    return levels[min(len(levels) - 1, int(share * len(levels) + 1e-9))]  # 1e-9 against rounding errors


class RunTracker:
    """Follows one run after another; a run lasts as long as its outermost phase.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open = 0
        self._began = clock()
        self.status: Status | None = None
        self._worked = False  # a phase was opened since the last decision
        self._start = self._last = (0.0, 0.0, 0)  # time, share of the way to the target, decisions

    @property
    def is_running(self) -> bool:
        """Whether any phase is open."""
        return self._open > 0

    def open(self) -> None:
        """Note that a phase begins."""
        if not self.is_running:
            self._began = self._clock()
        self._open += 1
        self._worked = True

    def close(self) -> None:
        """Note that a phase ends; when the outermost one ends, the run is over and its status is cleared."""
        self._open -= 1
        if not self.is_running:
            self.status = None

    def show(self, status: Status) -> None:
        """Store the status of the run."""
        before, self.status = self.status, status
        way = distance_covered(status)
        here = (self._clock(), 0.0 if way is None else way, status.step)
        if before is None:
            self._start = self._last = here
        elif status.step != before.step:
            if not self._worked:  # the decision was read back, so its time is not that of a step
                self._start = here
            self._last, self._worked = here, False

    def seconds(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began

    def seconds_left(self) -> float | None:
        """Estimate the seconds to the target, from the progress that the decisions have made so far.

        Work after the target, such as the final recovery, is not counted.

        Returns:
            Seconds, at least 0; None if there is no target, no progress yet, or the target is reached.
        """
        (began, behind, first), (ended, way, last) = self._start, self._last
        if self.status is None or distance_covered(self.status) is None or way <= behind or way >= 1:
            return None
        total = (ended - began) * (1 - way) / (way - behind)
        one = (ended - began) / (last - first)  # a decision that takes longer than usual is counted as a usual one
        return max(0.0, total - min(self._clock() - ended, one))


def distance_covered(status: Status) -> float | None:
    """The share of the way to the target that is covered; the smallest of several targets; None without a target.

    A target that is not below the original is reached from the start.
    """
    wanted = [(now, target) for now, target in status.costs.values() if target is not None]
    return min(((1 - now) / (1 - target) if target < 1 else 1.0 for now, target in wanted), default=None)


def budget_used(status: Status) -> float | None:
    """The share of the metric's budget that is used; 0 if the metric improved; None if there is no budget."""
    if status.worst is None or status.worst == status.baseline:
        return None
    return max(0.0, (status.baseline - status.metric) / (status.baseline - status.worst))


SEPARATOR = " | "
CURVE = 8
"""Number of characters that are reserved for the curve."""


Form = tuple[int, str | Text]
"""(importance, text): one form of a part of a line; the least important forms are shortened first."""


class StatusView:
    """Draws the status of a run at the width of the console; draws nothing before there is a status."""

    def __init__(self, tracker: RunTracker) -> None:
        self._tracker = tracker

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status, width, ascii_only = self._tracker.status, options.max_width, options.ascii_only
        if status is None:
            return
        first = fit_line(_status_parts(self._tracker, status), width - _curve_width(status))
        yield _crop(_with_curve(first, status, width, ascii_only=ascii_only), width, ascii_only=ascii_only)
        yield _crop(fit_line(numbers(status, ascii_only=ascii_only), width), width, ascii_only=ascii_only)


def fit_line(parts: Sequence[Sequence[Form]], width: int) -> Text:
    """Join parts into a line, and shorten the least important ones until it fits.

    Args:
        parts: in the order of the line; of each its forms, from long to short; "" leaves the part out.
        width: largest number of characters in the line.

    Returns:
        The line; wider than `width` if even the shortest forms do not fit.

    Example:
        >>> parts = [[(2, "accuracy 0.9"), (0, "0.9")], [(1, "3 accepted"), (3, "3"), (0, "")]]
        >>> [fit_line(parts, width).plain for width in (25, 20, 9, 5)]
        ['accuracy 0.9 | 3 accepted', 'accuracy 0.9 | 3', '0.9 | 3', '0.9']
    """
    forms = [list(part) for part in parts]
    line = _join(forms)
    while line.cell_len > width:
        long = [part for part in forms if len(part) > 1]
        if not long:
            break
        min(long, key=lambda part: part[0][0]).pop(0)
        line = _join(forms)
    return line


def _join(parts: Sequence[Sequence[Form]]) -> Text:
    chosen = [part[0][1] for part in parts if part[0][1]]
    line = Text()
    for index, form in enumerate(chosen):
        line.append(SEPARATOR if index else "", style="dim").append(form)
    return line


def numbers(status: Status, *, ascii_only: bool = False) -> list[list[Form]]:
    """The costs and the metric of a run, each with its target or its limit."""
    parts = [_cost(name, now, wanted, ascii_only=ascii_only) for name, (now, wanted) in status.costs.items()]
    found = Text.assemble(f"{status.metric_name} ", (f"{status.metric:.4f}", "bold"))
    if status.worst is None:
        return [*parts, [(9, found)]]
    word = "at least" if status.higher_is_better else "at most"
    sign = {(True, True): ">=", (True, False): "≥", (False, True): "<=", (False, False): "≤"}
    short = Text.assemble(found, f" {sign[status.higher_is_better, ascii_only]} {status.worst:.4f}")
    parts.append([(3, Text.assemble(found, f", {word} {status.worst:.4f}")), (5, short), (9, found)])
    used = budget_used(status)
    if used is not None:
        parts.append([(2, f"{used:.0%} of the budget used"), (4, f"{used:.0%} used"), (0, "")])
    return parts


def in_brief(status: Status, *, ascii_only: bool = False) -> str:
    """The costs and the metric of a run as plain text, to be added to a line."""
    return SEPARATOR.join(str(part[0][1]) for part in numbers(status, ascii_only=ascii_only))


def _cost(name: str, now: float, wanted: float | None, *, ascii_only: bool) -> list[Form]:
    if wanted is None:
        return [(1, f"{name} {now:.1%}"), (0, "")]
    share = (f"{now:.1%}", "bold green" if now <= wanted else "bold")
    arrow = "->" if ascii_only else "→"
    return [(9, Text.assemble(f"{name} ", share, f" {arrow} {wanted:.1%}"))]


def _status_parts(tracker: RunTracker, status: Status) -> list[list[Form]]:
    parts: list[list[Form]] = [
        [(9, Text(f"{status.stage} {status.step}", style="bold"))],
        [(3, f"{status.accepted} accepted"), (0, "")],
        [(4, duration(tracker.seconds())), (0, "")],
    ]
    left = tracker.seconds_left()
    if left is not None:
        parts.append([(1, f"{roughly(left)} to the target"), (2, f"{roughly(left)} left"), (0, "")])
    return parts


def duration(seconds: float) -> str:
    """Elapsed time as text.

    >>> duration(83.4), duration(7324)
    ('1:23', '2:02:04')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def roughly(seconds: float) -> str:
    """An estimated time as text, rounded as an estimate deserves.

    >>> [roughly(seconds) for seconds in (20, 200, 5000, 9000)]
    ['under 1 min', 'about 3 min', 'about 83 min', 'about 2.5 h']
    """
    if seconds < 60:
        return "under 1 min"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _curve_width(status: Status) -> int:
    return len(SEPARATOR) + min(len(status.profile), CURVE) if status.profile else 0


def _with_curve(line: Text, status: Status, width: int, *, ascii_only: bool) -> Text:
    """Add the divergence over depth, with a label if there is room for it."""
    profile = status.profile
    room = width - line.cell_len - len(SEPARATOR)
    scale = ", log scale" if logarithmic(profile) else ""
    for before, after in (("divergence ", scale), ("divergence ", ""), ("", "")):
        cells = min(len(profile), room - len(before) - len(after))
        if cells >= min(len(profile), 2 * CURVE if before else 1) > 0:
            curve = (sparkline(profile, cells, ascii_only=ascii_only), "magenta")
            return Text.assemble(line, (SEPARATOR, "dim"), before, curve, (after, "dim"))
    return line


def _crop(line: Text, width: int, *, ascii_only: bool) -> Text:
    line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    line.no_wrap = True
    return line
