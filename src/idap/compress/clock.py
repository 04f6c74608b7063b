"""Where the time of a run goes: seconds by kind of work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by kind of work; work inside other work counts once, as what it is itself.

    Args:
        now: gives the time in seconds.

    Example:
        >>> ticks = iter([0.0, 1.0, 3.0, 7.0, 7.5, 8.0])
        >>> clock = Clock(lambda: next(ticks))
        >>> with clock.on("training"):
        ...     with clock.on("judging"):
        ...         pass
        >>> clock.take()
        {'other': 1.5, 'training': 2.5, 'judging': 4.0}
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since = now()
        self._kinds = ["other"]
        self._seconds: dict[str, float] = {}

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Count what happens inside as `kind`."""
        self._book()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._book()
            self._kinds.pop()

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last call; what belongs to no kind is "other"."""
        self._book()
        taken, self._seconds = self._seconds, {}
        return taken

    def _book(self) -> None:
        now = self._now()
        kind = self._kinds[-1]
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._since
        self._since = now
