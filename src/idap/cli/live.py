"""Where a run stands, in two lines that are never wrapped."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from idap.cli.course import Course, budget_used
from idap.cli.sparkline import logarithmic, sparkline
from idap.progress import Status

SEPARATOR = " | "
CURVE = 8
"""Characters that are kept for the curve."""


Form = tuple[int, str | Text]
"""A way to put a part of a line, and how much it matters that it is put so."""


class StatusView:
    """Draws where a run stands as wide as the console is; nothing before it is known."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status, width, ascii_only = self._course.status, options.max_width, options.ascii_only
        if status is None:
            return
        first = fitted(_standing(self._course, status), width - _reserved(status))
        yield _cropped(_with_curve(first, status, width, ascii_only=ascii_only), width, ascii_only=ascii_only)
        yield _cropped(fitted(numbers(status, ascii_only=ascii_only), width), width, ascii_only=ascii_only)


def fitted(parts: Sequence[Sequence[Form]], width: int) -> Text:
    """Join parts to a line, shortening what matters least until it fits.

    Args:
        parts: in their order on the line; the forms of each from long to short, "" leaves it out.
        width: most characters of the line.

    Returns:
        The line; wider than `width` if all the last forms together are.

    Example:
        >>> parts = [[(2, "accuracy 0.9"), (0, "0.9")], [(1, "3 accepted"), (3, "3"), (0, "")]]
        >>> [fitted(parts, width).plain for width in (25, 20, 9, 5)]
        ['accuracy 0.9 | 3 accepted', 'accuracy 0.9 | 3', '0.9 | 3', '0.9']
    """
    forms = [list(part) for part in parts]
    line = _joined(forms)
    while line.cell_len > width:
        long = [part for part in forms if len(part) > 1]
        if not long:
            break
        min(long, key=lambda part: part[0][0]).pop(0)
        line = _joined(forms)
    return line


def _joined(parts: Sequence[Sequence[Form]]) -> Text:
    chosen = [part[0][1] for part in parts if part[0][1]]
    line = Text()
    for index, form in enumerate(chosen):
        line.append(SEPARATOR if index else "", style="dim").append(form)
    return line


def numbers(status: Status, *, ascii_only: bool = False) -> list[list[Form]]:
    """The costs and the metric of a run, each with what is wanted of it."""
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
    """The costs and the metric of a run as plain text, for a line among others."""
    return SEPARATOR.join(str(part[0][1]) for part in numbers(status, ascii_only=ascii_only))


def _cost(name: str, now: float, wanted: float | None, *, ascii_only: bool) -> list[Form]:
    if wanted is None:
        return [(1, f"{name} {now:.1%}"), (0, "")]
    share = (f"{now:.1%}", "bold green" if now <= wanted else "bold")
    arrow = "->" if ascii_only else "→"
    return [(9, Text.assemble(f"{name} ", share, f" {arrow} {wanted:.1%}"))]


def _standing(course: Course, status: Status) -> list[list[Form]]:
    parts: list[list[Form]] = [
        [(9, Text(f"{status.stage} {status.step}", style="bold"))],
        [(3, f"{status.accepted} accepted"), (0, "")],
        [(4, duration(course.elapsed())), (0, "")],
    ]
    left = course.left()
    if left is not None:
        parts.append([(1, f"{roughly(left)} to the target"), (2, f"{roughly(left)} left"), (0, "")])
    return parts


def duration(seconds: float) -> str:
    """Time that went by.

    >>> duration(83.4), duration(7324)
    ('1:23', '2:02:04')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def roughly(seconds: float) -> str:
    """An estimated time, no more precise than it is.

    >>> [roughly(seconds) for seconds in (20, 200, 5000, 9000)]
    ['under 1 min', 'about 3 min', 'about 83 min', 'about 2.5 h']
    """
    if seconds < 60:
        return "under 1 min"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _reserved(status: Status) -> int:
    return len(SEPARATOR) + min(len(status.profile), CURVE) if status.profile else 0


def _with_curve(line: Text, status: Status, width: int, *, ascii_only: bool) -> Text:
    """Add the divergence over depth, with words beside it where there is room for them."""
    profile = status.profile
    room = width - line.cell_len - len(SEPARATOR)
    scale = ", log scale" if logarithmic(profile) else ""
    for before, after in (("divergence ", scale), ("divergence ", ""), ("", "")):
        cells = min(len(profile), room - len(before) - len(after))
        if cells >= min(len(profile), 2 * CURVE if before else 1) > 0:
            curve = (sparkline(profile, cells, ascii_only=ascii_only), "magenta")
            return Text.assemble(line, (SEPARATOR, "dim"), before, curve, (after, "dim"))
    return line


def _cropped(line: Text, width: int, *, ascii_only: bool) -> Text:
    line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    line.no_wrap = True
    return line
