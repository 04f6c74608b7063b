"""Show progress: bars on a terminal, plain lines elsewhere, seconds of every phase with `--verbose`."""

import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text
from rich.theme import Theme

from idap.cli.live import RunTracker, StatusView, in_brief
from idap.progress import Phase, Progress, Silent, Status


class Timed:
    """Passes everything on to a listener, and reports at the end of each phase how long it took.

    Args:
        shown: the listener.
        tell: receives a line for each phase.
        clock: returns the time in seconds.

    Example:
        >>> from idap.progress import Silent
        >>> with Timed(Silent(), print, iter([0.0, 2.5]).__next__).phase("train", 3):
        ...     pass
        train: 2.50 s
    """

    def __init__(
        self, shown: Progress, tell: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._shown, self._tell, self._clock = shown, tell, clock
        self._depth = 0

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Phase]:
        """Open a phase; when it ends without an error, its seconds are printed, indented if it is inside another."""
        began = self._clock()
        self._depth += 1
        try:
            with self._shown.phase(title, total) as phase:
                yield phase
        finally:
            self._depth -= 1
        self._tell(f"{'  ' * self._depth}{title}: {self._clock() - began:.2f} s")

    def say(self, line: str) -> None:
        """Pass one line on."""
        self._shown.say(line)

    def show(self, status: Status) -> None:
        """Pass the status of the run on."""
        self._shown.show(status)


HEARTBEAT = 30.0
"""Seconds without output after which a line is printed, where there are no bars."""
INDENT = 4
"""Spaces before the continuation of a broken line."""
TITLE = 22
"""Smallest width of the column of titles, in characters."""


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
    """Colours the decision and the first words of a line."""

    base_style = "idap."
    highlights = (r"(?P<accepted>\baccepted\b)", r"(?P<rejected>\brolled back\b|\bstays\b)", r"^(?P<step>\w+ \d+:)")
    theme = Theme({"idap.accepted": "green", "idap.rejected": "yellow", "idap.step": "bold"})


class Bars:
    """Shows the status of the run and a bar for each open phase; lines are printed above them and stay.

    Args:
        console: a terminal.
        clock: returns the time in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        console.push_theme(Verdicts.theme)
        self._console = console
        self._verdicts = Verdicts()
        self._tracker = RunTracker(clock)
        self._bars = _Area(console, StatusView(self._tracker), clock)

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator["_Bar"]:
        """Open a phase with its own bar; the bar disappears with the phase, and the status with the outermost one."""
        if not self._tracker.is_running:
            self._bars.start()
        self._tracker.open()
        task = self._bars.add_task(title, total=total, note="")
        try:
            yield _Bar(self._bars, task)
        finally:
            self._bars.remove_task(task)
            self._tracker.close()
            if not self._tracker.is_running:
                self._bars.stop()

    def say(self, line: str) -> None:
        """Print one line above the bars; `break_line` breaks it if it is too wide."""
        self._console.print(self._verdicts(Text(break_line(_encodable(self._console, line), self._console.width))))

    def show(self, status: Status) -> None:
        """Show the status of the run until its outermost phase ends."""
        self._tracker.show(status)


class _Area(RichProgress):
    """The area that is redrawn: the status of the run, and the bars."""

    def __init__(self, console: Console, status: StatusView, clock: Callable[[], float]) -> None:
        cut: Literal["crop", "ellipsis"] = "crop" if console.options.ascii_only else "ellipsis"
        self._target, self._status, self._bar = console, status, BarColumn()
        super().__init__(
            TextColumn("{task.description}", table_column=Column(min_width=TITLE, no_wrap=True, overflow=cut)),
            self._bar,
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow=cut)),
            console=console,
            transient=True,
            refresh_per_second=5,
            get_time=clock,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The status of the run, then the bars."""
        yield self._status
        yield self.make_tasks_table(self.tasks)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """The bars; a phase of unknown length has none while another phase is open inside it."""
        shown = list(tasks)
        self._bar.bar_width = max(8, min(24, self._target.width - TITLE - 32))
        return super().make_tasks_table([task for task in shown if task.total is not None or task is shown[-1]])


def break_line(line: str, width: int) -> str:
    """Break a line that is too wide: after its first part, then between other parts, then between words.

    Args:
        line: parts with " | " between them.
        width: largest number of characters in a line.

    Returns:
        The line, or several lines, of which all but the first are indented.

    Example:
        >>> print(break_line("layers 3: removed branch b.1 | MACs 86.1% | accuracy 0.9 | accepted", 30))
        layers 3: removed branch
            b.1
            MACs 86.1% | accuracy 0.9
            accepted
    """
    if cell_len(line) <= width or "\n" in line:
        return line
    head, *rest = line.split(" | ")
    lines: list[str] = []
    for part in rest:
        if lines and cell_len(f"{lines[-1]} | {part}") <= width - INDENT:
            lines[-1] = f"{lines[-1]} | {part}"
        else:
            lines.append(part)
    words = textwrap.TextWrapper(max(1, width - INDENT), break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * INDENT}".join(chain.from_iterable(words.wrap(each) for each in [head, *lines]))


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, note: str = "") -> None:
        """Move the bar by one step."""
        self._bars.update(self._task, advance=1, note=note)


class Lines:
    """Prints plain lines for files and pipes: the decisions, and the progress of a phase that takes long.

    Args:
        console: where lines are printed; they are never wrapped.
        clock: returns the time in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._tracker = RunTracker(clock)
        self._last = clock()

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator["_Count"]:
        """Open a phase; its progress is printed only if it takes long."""
        self._tracker.open()
        try:
            yield _Count(self, title, total)
        finally:
            self._tracker.close()

    def say(self, line: str) -> None:
        """Print one line."""
        self._last = self._clock()
        self._console.print(_encodable(self._console, line), markup=False, highlight=False, soft_wrap=True)

    def show(self, status: Status) -> None:
        """Store the status of the run for the next line of progress; the lines of the decisions show it too."""
        self._tracker.show(status)

    def pulse(self, line: str) -> None:
        """Print a line with the status of the run if nothing was printed for `HEARTBEAT` seconds."""
        if self._clock() - self._last < HEARTBEAT:
            return
        status = self._tracker.status
        self.say(
            line if status is None else f"{line} | {in_brief(status, ascii_only=self._console.options.ascii_only)}"
        )


class _Count:
    def __init__(self, lines: Lines, title: str, total: int | None) -> None:
        self._lines, self._title, self._total = lines, title, total
        self._done = 0

    def advance(self, note: str = "") -> None:
        """Count one step."""
        self._done += 1
        of = "" if self._total is None else f"/{self._total}"
        self._lines.pulse(f"{self._title}: {self._done}{of}{f', {note}' if note else ''}")


def _encodable(console: Console, line: str) -> str:
    """Replace the characters of a line that the console's encoding lacks, so that they do not end a run."""
    return line.encode(console.encoding, "replace").decode(console.encoding)
