"""Where commands write, and what a command does when it ends, well or not."""

import codecs
import errno
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from idap.errors import ConfigError, IdapError, RunFolderError, UncheckedFileWarning
from idap.record import RUN, RunFolder

if TYPE_CHECKING:
    from idap.progress import Progress

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


def null_console() -> Console:
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
    codecs.register_error("idap", _replace)
    for stream in (sys.stdout, sys.stderr):
        change: Any = getattr(stream, "reconfigure", None)
        if change is not None and not _is_unicode(stream):
            change(errors="idap")


def silence(stream: TextIO) -> None:
    """Send what is still to be written nowhere, so that Python does not complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in lost), error.end


_FULL = (errno.ENOSPC, errno.EDQUOT)
OK, GOAL_MISSED, USER_ERROR, UNEXPECTED, STOPPED, NO_READER = 0, 1, 2, 3, 130, 141


@dataclass
class Outcome:
    """What is known about a command while it runs, and how it speaks.

    Attributes:
        command: as the user types it, such as "idap inspect".
        where: what it works on.
        as_json: whether the standard output is one JSON document, of the result or of the error.
        quiet: whether only errors are shown.
        verbose: whether the standard error tells how long each part takes.
        debug: whether tracebacks are shown.
        run_dir: the run folder, once it is known.
        stopped: what is said after an interruption; "" says what the run folder holds.
        document: the result for machines; written when the command ends well and `as_json` is set.
    """

    command: str
    where: str
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    run_dir: Path | None = None
    stopped: str = ""
    document: Any = None
    console: Console = field(init=False)
    errors: Console = field(init=False)

    def __post_init__(self) -> None:
        # With --json, the standard output belongs to the document.
        self.console = terminal(stderr=self.as_json)
        self.errors = terminal(stderr=True)

    def progress(self, *, speaks: bool = True) -> "Progress":
        """Who hears of the work: bars, lines or nobody; with `verbose` also of the seconds of every phase.

        Args:
            speaks: False in all but the first of several processes.
        """
        from idap.cli.progress import Timed, listener  # noqa: PLC0415 - commands that only list need neither

        shown = listener(self.console, quiet=self.quiet or not speaks)
        if not (self.verbose and speaks):
            return shown
        # On a terminal the lines go above the bars; elsewhere the output stays what it is without them.
        return Timed(shown, shown.say if self.console.is_terminal else self._tell)

    def _tell(self, line: str) -> None:
        self.errors.print(printable(line), markup=False, soft_wrap=not self.errors.is_terminal)

    def _warn(self, line: str) -> None:
        if not self.quiet:
            self._tell(line)

    @contextmanager
    def report(self) -> Iterator[None]:
        """Turn every exception into something a person, or a machine, can act on; in the end write the document.

        Raises:
            typer.Exit: with code 2 for the user's errors, 3 for unexpected ones, 130 after Ctrl-C, 141 where nobody
                reads any more.
        """
        began = time.perf_counter()
        try:
            if self.quiet and self.verbose:
                raise ConfigError("--quiet and --verbose contradict each other; leave one out.")
            # What user code or a library prints must not come before the document.
            redirected = redirect_stdout(sys.stderr) if self.as_json else nullcontext()
            with redirected, plain_warnings(self._warn):
                yield
            if self.as_json and self.document is not None:
                typer.echo(json.dumps(self.document, indent=1, default=str))
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            self._stop(self.stopped or state_of(self.run_dir))
            raise typer.Exit(STOPPED) from error
        except BrokenPipeError as error:
            silence(sys.stdout)
            if self.run_dir is not None:
                self._tell(f"Nobody reads any more. {state_of(self.run_dir)}")
            raise typer.Exit(NO_READER) from error
        except SystemExit as error:  # of user code, which may end a script of its own but not a command
            self._show(error, title="User code ended the process", advice="Take its exit() out of what idap calls.")
            raise typer.Exit(UNEXPECTED) from error
        except IdapError as error:
            full = isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
            title = "The disk is full" if full else (type(error).__doc__ or "").strip().rstrip(".")
            self._show(error, title=title, advice=f"Make room. {state_of(self.run_dir)}" if full else "")
            raise typer.Exit(USER_ERROR) from error
        except Exception as error:
            self._show(
                error,
                title="This should not have happened",
                advice="It is a mistake in idap, or in code that idap called. Run again with --debug and report it.",
            )
            raise typer.Exit(UNEXPECTED) from error
        finally:
            if self.verbose and not self.quiet:
                self._sum_up(time.perf_counter() - began)

    def _stop(self, state: str) -> None:
        if self.as_json:
            _write_error("KeyboardInterrupt", f"Stopped. {state}", self.where)
        self._tell(f"\nStopped. {state}")

    def _sum_up(self, seconds: float) -> None:
        libraries = [name for name in ("torch", "torchvision", "timm", "transformers") if name in sys.modules]
        versions = "".join(f", {name} {getattr(sys.modules[name], '__version__', '?')}" for name in libraries)
        python = ".".join(map(str, sys.version_info[:3]))
        self._tell(f"{self.command}: {seconds:.1f} s; Python {python}{versions}.")

    def _show(self, error: BaseException, *, title: str, advice: str) -> None:
        if self.debug:
            self.errors.print(printable("".join(traceback.format_exception(error))), markup=False, soft_wrap=True)
        message = message_of(error)
        rank = os.environ.get("RANK", "0")
        if rank != "0":  # of several processes; most errors are those of all, and the first one shows them
            self.errors.print(printable(f"process {rank}: {message}"), markup=False, soft_wrap=True)
        elif self.as_json:
            _write_error(type(error).__name__, f"{message} {advice}".rstrip(), self.where)
        else:
            show_error(
                self.errors,
                title,
                message,
                advice=advice,
                where=self.where,
                help_line=f"{self.command} --help, or --debug for the traceback",
            )


def show_error(errors: Console, title: str, message: str, *, advice: str, where: str, help_line: str) -> None:
    """Draw the panel: what, where, how to fix.

    Args:
        errors: console of the standard error.
        title: kind of the error.
        message: what was found, what was expected, and the way out.
        advice: one more line; "" for none.
        where: what the command worked on.
        help_line: where more is to be read.
    """
    facts = Table.grid(padding=(0, 2))
    facts.add_row(Text("in", style="dim"), Text(printable(where)))
    facts.add_row(Text("help", style="dim"), Text(help_line))
    parts = Group(Text(printable(message)), *([Text(printable(advice))] if advice else []), Text(""), facts)
    errors.print(Panel(parts, title=Text(title), title_align="left", border_style="red"))


def message_of(error: BaseException) -> str:
    """What an error says; of one that idap did not raise on purpose, with its type."""
    try:
        text = str(error)
    except Exception as failure:  # of foreign errors anything may fail
        text = f"it can't say what is wrong ({type(failure).__name__})"
    return text if isinstance(error, IdapError) else f"{type(error).__name__}: {text}"


def printable(text: str) -> str:
    r"""Text that every terminal can show, and that does nothing else to it: what is no letter is written as its code.

    >>> printable("a\x1b[2J\ud800\n\tb")
    'a\\x1b[2J\\ud800\n\tb'
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def report_usage(error: Any, words: list[str]) -> None:
    """Report words that are no command: the same panel, or the same document, as for every other error.

    Args:
        error: of the parser; knows its message and, mostly, the command.
        words: that were typed after `idap`.
    """
    context = getattr(error, "ctx", None)
    command = "idap" if context is None else context.command_path
    message, where = str(error.format_message()), " ".join(["idap", *words])
    if "--json" in words:
        _write_error("UsageError", message, where)
    else:
        show_error(terminal(stderr=True), "Wrong usage", message, advice="", where=where, help_line=f"{command} --help")


def _write_error(kind: str, message: str, where: str) -> None:
    typer.echo(json.dumps({"error": {"kind": kind, "message": message, "where": where}}, indent=1))


def state_of(run_dir: Path | None) -> str:
    """Say in one line what a run folder holds after an interruption."""
    if run_dir is None:
        return "Nothing was written."
    try:
        return _describe_folder(run_dir)
    except (OSError, ValueError) as error:  # the path itself can't be looked at
        return f"What {run_dir} holds can't be read: {error}."


def _describe_folder(run_dir: Path) -> str:
    if not (run_dir / RUN).exists() and RunFolder(run_dir).original.exists():
        return f"{run_dir} holds the trained original. Go on with the same command and --run-dir {run_dir} --resume."
    if not (run_dir / RUN).exists():
        return f"Nothing was written to {run_dir}."
    from idap.report.reading import read_progress  # noqa: PLC0415 - its checks are slow to import

    try:
        steps = read_progress(run_dir)
    except RunFolderError as error:
        return f"It came in the middle of writing: {error}"
    again = f"Go on with: idap resume {run_dir}"
    if not steps:
        return f"{run_dir} holds the settings of the run and no finished step. {again}"
    accepted = [step for step in steps if step.accepted]
    counted = f"{len(steps)} finished {'step' if len(steps) == 1 else 'steps'}, {len(accepted)} accepted"
    kept = RunFolder(run_dir).checkpoint(accepted[-1].index) if accepted else None
    last = f"; the last accepted model is in {kept}" if kept is not None and kept.exists() else ""
    return f"{run_dir} holds {counted}{last}. {again}"
