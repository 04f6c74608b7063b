"""What a command does when it fails: one panel, or one JSON document, and an exit code."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from idap.errors import IdapError, RunFolderError
from idap.record import RUN, RunFolder, read_steps

OK, GOAL_MISSED, USER_ERROR, UNEXPECTED, STOPPED = 0, 1, 2, 3, 130


@dataclass
class Outcome:
    """What is known about a command while it runs, for the case that it fails.

    Attributes:
        command: as the user types it, such as "idap inspect".
        where: what it works on.
        as_json: whether errors are a JSON document on the standard output.
        debug: whether tracebacks are shown.
        run_dir: the run folder, once it is known.
        stopped: what is said after an interruption; "" says what the run folder holds.
        errors: the console for errors.
    """

    command: str
    where: str
    as_json: bool = False
    debug: bool = False
    run_dir: Path | None = None
    stopped: str = ""
    errors: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turn every exception into something a person, or a machine, can act on.

        Raises:
            typer.Exit: with code 2 for the user's errors, 3 for unexpected ones, 130 after Ctrl-C.
        """
        try:
            yield
        except typer.Exit:
            raise
        except KeyboardInterrupt as error:
            self.errors.print(f"\nStopped. {self.stopped or state_of(self.run_dir)}", markup=False, soft_wrap=True)
            raise typer.Exit(STOPPED) from error
        except IdapError as error:
            self._show(error, title=(type(error).__doc__ or "").strip().rstrip("."), advice="")
            raise typer.Exit(USER_ERROR) from error
        except Exception as error:
            self._show(
                error,
                title="This should not have happened",
                advice="It is a mistake in idap, or in code that idap called. Run again with --debug and report it.",
            )
            raise typer.Exit(UNEXPECTED) from error

    def _show(self, error: Exception, *, title: str, advice: str) -> None:
        if self.debug:
            self.errors.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
        message = str(error) if isinstance(error, IdapError) else f"{type(error).__name__}: {error}"
        rank = os.environ.get("RANK", "0")
        if rank != "0":  # of several processes; most errors are those of all, and the first one shows them
            self.errors.print(f"process {rank}: {message}", markup=False, soft_wrap=True)
            return
        if self.as_json:
            document = {"error": {"kind": type(error).__name__, "message": message, "where": self.where}}
            typer.echo(json.dumps(document, indent=1))
            return
        facts = Table.grid(padding=(0, 2))
        facts.add_row(Text("in", style="dim"), Text(self.where))
        facts.add_row(Text("help", style="dim"), Text(f"{self.command} --help, or --debug for the traceback"))
        parts = Group(Text(message), *([Text(advice)] if advice else []), Text(""), facts)
        self.errors.print(Panel(parts, title=Text(title), title_align="left", border_style="red"))


def state_of(run_dir: Path | None) -> str:
    """Say in one line what a run folder holds after an interruption."""
    if run_dir is None:
        return "Nothing was written."
    if not (run_dir / RUN).exists():
        return f"Nothing was written to {run_dir}."
    try:
        steps = read_steps(run_dir)
    except RunFolderError as error:
        return f"It came in the middle of writing: {error}."
    again = f"Go on with the same command and --run-dir {run_dir} --resume."
    if not steps:
        return f"{run_dir} holds the settings of the run and no finished step. {again}"
    accepted = [step for step in steps if step["accepted"]]
    counted = f"{len(steps)} finished {'step' if len(steps) == 1 else 'steps'}, {len(accepted)} accepted"
    kept = RunFolder(run_dir).checkpoint(accepted[-1]["index"]) if accepted else None
    last = f"; the last accepted model is in {kept}" if kept is not None and kept.exists() else ""
    return f"{run_dir} holds {counted}{last}. {again}"
