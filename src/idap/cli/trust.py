"""Whether code that a run folder from elsewhere names may run: --trust, or a question on the terminal."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import typer

from idap.cli.failure import Outcome
from idap.errors import TrustError


def check_code(outcome: Outcome, folder: Path, replaced: Mapping[str, str | Path | None], *, trust: bool) -> None:
    """Let nobody's code run unasked; called before any of it is imported.

    Args:
        outcome: of the command.
        folder: of the run whose recipe is followed.
        replaced: `section.key` -> what the command line says instead of the recipe.
        trust: whether the user said --trust.

    Raises:
        TrustError: the run was not made here, its recipe names code, and the user has not agreed to run it.
    """
    from idap.zoo.foreign import foreign_code  # noqa: PLC0415 - torch is slow to import

    found = foreign_code(folder, replaced)
    if found is None:
        return
    if trust:
        if not outcome.quiet:
            outcome.errors.print(f"{found}\n(--trust)", markup=False, soft_wrap=not outcome.errors.is_terminal)
        return
    if not _can_ask(outcome):
        raise TrustError(f"{found}\nRead that code. If you trust it, run the same command with --trust.")
    outcome.errors.print(str(found), markup=False)
    try:
        agreed = typer.confirm("Run it?", default=False, err=True)
    except typer.Abort as error:  # Ctrl-C, or the end of the input
        raise KeyboardInterrupt from error
    if not agreed:
        raise TrustError(f"The code that {folder} names was not run, as you said.")


def _can_ask(outcome: Outcome) -> bool:
    """Whether somebody sits at a terminal; one of several processes has none for itself."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone and not outcome.as_json and sys.stdin.isatty() and outcome.errors.is_terminal
