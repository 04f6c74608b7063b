"""What `--verbose` adds: the seconds of every phase, and what happens in the libraries."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from idap.progress import Phase, Progress, Status


class Timed:
    """Hands everything on to a listener, and says how long each phase took when it ends.

    Args:
        shown: the listener.
        tell: takes a line about time.
        clock: gives the time in seconds.

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
        """Open a phase; when it ends without an error, its seconds are printed, those inside another one indented."""
        began = self._clock()
        self._depth += 1
        try:
            with self._shown.phase(title, total) as phase:
                yield phase
        finally:
            self._depth -= 1
        self._tell(f"{'  ' * self._depth}{title}: {self._clock() - began:.2f} s")

    def say(self, line: str) -> None:
        """Hand one line on."""
        self._shown.say(line)

    def show(self, status: Status) -> None:
        """Hand on where the run stands."""
        self._shown.show(status)
