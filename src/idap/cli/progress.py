"""Show progress: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text
from rich.theme import Theme

from idap.progress import Progress, Silent, Status

HEARTBEAT = 30.0
"""Seconds between two signs of life where there are no bars."""


def listener(console: Console, *, quiet: bool = False) -> Progress:
    """Choose how progress is shown.

    Args:
        console: where it is shown.
        quiet: show nothing.

    Returns:
        Bars on a terminal, plain lines elsewhere.
    """
    if quiet:
        return Silent()
    return Bars(console) if console.is_terminal else Lines(console)


class Verdicts(RegexHighlighter):
    """Colours what was decided, and the first words of a line."""

    base_style = "idap."
    highlights = (r"(?P<accepted>\baccepted\b)", r"(?P<rejected>\brolled back\b|\bstays\b)", r"^(?P<step>\w+ \d+:)")
    theme = Theme({"idap.accepted": "green", "idap.rejected": "yellow", "idap.step": "bold"})


class Bars:
    """A bar for each open phase; lines appear above the bars and stay."""

    def __init__(self, console: Console) -> None:
        console.push_theme(Verdicts.theme)
        self._console = console
        self._verdicts = Verdicts()
        self._bars = RichProgress(
            TextColumn("{task.description}", table_column=Column(min_width=22, no_wrap=True)),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
            refresh_per_second=5,
        )
        self._open = 0

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator["_Bar"]:
        """Open a phase with a bar of its own; the bar goes when the phase ends."""
        if self._open == 0:
            self._bars.start()
        self._open += 1
        task = self._bars.add_task(title, total=total, note="")
        try:
            yield _Bar(self._bars, task)
        finally:
            self._bars.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._bars.stop()

    def say(self, line: str) -> None:
        """Print one line above the bars; one that is too wide is broken after its first part."""
        head, bar, rest = line.partition(" | ")
        wide = bar and cell_len(line) > self._console.width
        self._console.print(self._verdicts(Text(f"{head}\n    {rest}" if wide else line)))

    def show(self, status: Status) -> None:
        """Nothing yet."""


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, note: str = "") -> None:
        """Move the bar by one step."""
        self._bars.update(self._task, advance=1, note=note)


class Lines:
    """Plain lines for files and pipes: decisions, and a sign of life now and then.

    Args:
        console: where lines go; they are never wrapped.
        clock: gives the time in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._last = clock()

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator["_Count"]:
        """Open a phase, which is heard of only if it takes long."""
        yield _Count(self, title, total)

    def say(self, line: str) -> None:
        """Print one line."""
        self._last = self._clock()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, status: Status) -> None:
        """Nothing: the decisions' own lines say it."""

    def pulse(self, line: str) -> None:
        """Print a line if nothing was printed for a while."""
        if self._clock() - self._last >= HEARTBEAT:
            self.say(line)


class _Count:
    def __init__(self, lines: Lines, title: str, total: int | None) -> None:
        self._lines, self._title, self._total = lines, title, total
        self._done = 0

    def advance(self, note: str = "") -> None:
        """Count one step."""
        self._done += 1
        of = "" if self._total is None else f"/{self._total}"
        self._lines.pulse(f"{self._title}: {self._done}{of}{f', {note}' if note else ''}")
