"""Where commands write: consoles that survive a closed pipe and an encoding without arrows."""

import codecs
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from rich.console import Console

from idap.errors import UncheckedFileWarning

_PLAIN: Mapping[str, str] = {
    "−": "-",
    "–": "-",
    "→": ">",
    "·": "|",
    "…": ".",
    "≤": "<",
    "≥": ">",
    "×": "x",
    "─": "-",
    "│": "|",
}
"""What stands for a letter that an encoding lacks; one for one, so that columns stay columns."""


class Terminal(Console):
    """A console that tells of a reader who went away, instead of ending the process by itself."""

    def on_broken_pipe(self) -> NoReturn:
        """Hand the error on.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError


def terminal(*, stderr: bool = False) -> Terminal:
    """Make a console for the standard output, or for the standard error."""
    return Terminal(stderr=stderr, highlight=False)


def nowhere() -> Console:
    """Make a console that prints nothing."""
    return Console(quiet=True)


@contextmanager
def plain_warnings(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell warnings of idap in one line each, without a place in its code; others stay as Python shows them."""
    shown: Any = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UncheckedFileWarning):
            tell(f"Warning: {message}.")
        else:
            shown(message, category, *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def settle_streams() -> None:
    """Let no letter that the encoding of the terminal lacks end a command."""
    codecs.register_error("idap", _replaced)
    for stream in (sys.stdout, sys.stderr):
        change: Any = getattr(stream, "reconfigure", None)
        if change is not None and not _is_unicode(stream):
            change(errors="idap")


def silence(stream: TextIO) -> None:
    """Send what is still to be written nowhere, so that Python does not complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in lost), error.end
