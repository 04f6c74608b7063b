"""How long work tells the outside what it is doing, without knowing who listens.

Nothing below `cli/` prints. Work that takes time is given a `Progress`; the default says nothing.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Phase(Protocol):
    """One stretch of work with a known number of steps."""

    def advance(self, note: str = "") -> None:
        """One step is done; `note` is shown beside the bar."""


class Progress(Protocol):
    """Listens to phases and to lines worth keeping."""

    def phase(self, title: str, total: int | None) -> AbstractContextManager[Phase]:
        """Open a phase of `total` steps (None: not known)."""

    def say(self, line: str) -> None:
        """Report one finished decision as one line of plain text."""


class Silent:
    """A `Progress` that says nothing."""

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Phase]:
        """Open a phase that nobody hears of."""
        yield self

    def advance(self, note: str = "") -> None:
        """Ignore one step."""

    def say(self, line: str) -> None:
        """Ignore one line."""
