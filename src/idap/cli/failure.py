"""The consoles of the commands, and how a command reports its result or its error."""

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
"""Character -> what replaces it in an encoding that lacks it; one for one, so that columns stay aligned."""


class Terminal(Console):
    """A console that raises an error when the reader has closed the output, instead of ending the process."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error again.

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
    """Show an `UncheckedFileWarning` in one line, without a place in the code; others stay as Python shows them.

    Args:
        tell: prints a line.
    """
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
    """Replace characters that the encoding of the terminal lacks, so that they do not end a command."""
    codecs.register_error("idap", _replace)
    for stream in (sys.stdout, sys.stderr):
        change: Any = getattr(stream, "reconfigure", None)
        if change is not None and not _is_unicode(stream):
            change(errors="idap")


def silence(stream: TextIO) -> None:
    """Send the output that is still buffered to the null device, so that Python reports no error at exit."""
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
    """The state of a command while it runs, and how it reports.

    Attributes:
        command: as the user types it, such as "idap inspect".
        where: what it works on.
        as_json: whether the standard output is one JSON document, with the result or with the error.
        quiet: whether only errors are shown.
        verbose: whether the time that each part takes is shown on the standard error.
        debug: whether tracebacks are shown.
        run_dir: the run folder, once it is known.
        stopped: message after an interruption; "": the message says what the run folder holds.
        document: the result as JSON data; written when the command succeeds and `as_json` is set.
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

    def progress(self, *, is_main: bool = True) -> "Progress":
        """The listener that receives progress: bars, lines or nothing; with `verbose` also the seconds of every phase.

        Args:
            is_main: whether this is process 0; the others of a multi-process run show nothing.
        """
        from idap.cli.progress import Timed, listener  # noqa: PLC0415 - commands that only list need neither

        shown = listener(self.console, quiet=self.quiet or not is_main)
        if not (self.verbose and is_main):
            return shown
        # On a terminal the lines go above the bars; elsewhere to stderr, so that the output does not change.
        return Timed(shown, shown.say if self.console.is_terminal else self._tell)

    def _tell(self, line: str) -> None:
        self.errors.print(printable(line), markup=False, soft_wrap=not self.errors.is_terminal)

    def _warn(self, line: str) -> None:
        if not self.quiet:
            self._tell(line)

    @contextmanager
    def report(self) -> Iterator[None]:
        """Turn every exception into a message, or with `as_json` a document; at the end write the document.

        Raises:
            typer.Exit: with code 2 for the user's errors, 3 for unexpected ones, 130 after Ctrl-C, 141 if the reader
                has closed the output.
        """
        began = time.perf_counter()
        try:
            if self.quiet and self.verbose:
                raise ConfigError("--quiet and --verbose contradict each other; leave one out.")
            # The output of user code or of a library must not come before the document.
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
                self._tell(f"The output was closed by its reader. {state_of(self.run_dir)}")
            raise typer.Exit(NO_READER) from error
        except SystemExit as error:  # of user code, which may end a script of its own but not a command
            advice = "Remove exit() from the code that idap calls."
            self._show(error, title="User code ended the process", advice=advice)
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
                advice="It is a bug in idap, or in code that idap called. Run again with --debug and report it.",
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
        if rank != "0":  # most errors occur in all processes of a run, and process 0 shows them in full
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
        help_line: where to read more.
    """
    facts = Table.grid(padding=(0, 2))
    facts.add_row(Text("in", style="dim"), Text(printable(where)))
    facts.add_row(Text("help", style="dim"), Text(help_line))
    parts = Group(Text(printable(message)), *([Text(printable(advice))] if advice else []), Text(""), facts)
    errors.print(Panel(parts, title=Text(title), title_align="left", border_style="red"))


def message_of(error: BaseException) -> str:
    """The message of an error; with its type if idap did not raise it on purpose."""
    try:
        text = str(error)
    except Exception as failure:  # an error of foreign code may have any fault
        text = f"its message can't be read ({type(failure).__name__})"
    return text if isinstance(error, IdapError) else f"{type(error).__name__}: {text}"


def printable(text: str) -> str:
    r"""Text that any terminal can show and that can't control it: characters that don't print are written as codes.

    >>> printable("a\x1b[2J\ud800\n\tb")
    'a\\x1b[2J\\ud800\n\tb'
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def report_usage(error: Any, words: list[str]) -> None:
    """Report a wrong command line in the same panel, or the same document, as every other error.

    Args:
        error: error of the parser; has the message and, mostly, the command.
        words: the words after `idap`.
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
    except (OSError, ValueError) as error:  # the path itself can't be accessed
        return f"The contents of {run_dir} can't be read: {error}."


def _describe_folder(run_dir: Path) -> str:
    if not (run_dir / RUN).exists() and RunFolder(run_dir).original.exists():
        return f"{run_dir} holds the trained original. Go on with the same command and --run-dir {run_dir} --resume."
    if not (run_dir / RUN).exists():
        return f"Nothing was written to {run_dir}."
    from idap.report.reading import read_progress  # noqa: PLC0415 - its checks are slow to import

    try:
        steps = read_progress(run_dir)
    except RunFolderError as error:
        return f"The interruption came in the middle of writing: {error}"
    again = f"Go on with: idap resume {run_dir}"
    if not steps:
        return f"{run_dir} holds the settings of the run and no finished step. {again}"
    accepted = [step for step in steps if step.accepted]
    counted = f"{len(steps)} finished {'step' if len(steps) == 1 else 'steps'}, {len(accepted)} accepted"
    kept = RunFolder(run_dir).checkpoint(accepted[-1].index) if accepted else None
    last = f"; the last accepted model is in {kept}" if kept is not None and kept.exists() else ""
    return f"{run_dir} holds {counted}{last}. {again}"
