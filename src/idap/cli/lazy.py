"""Commands that are imported when they run, and the group that finds them."""

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from idap.cli.failure import NO_READER, STOPPED, USER_ERROR, report_usage, settle_streams, silence, terminal

COMPLETE = "_IDAP_COMPLETE"
"""Environment variable that the completion script of a shell sets to ask for completions."""
OUTPUT = "Output"
"""Heading of the options that every command has."""
CONTEXT = {"help_option_names": ["-h", "--help"]}


@dataclass(frozen=True)
class Lazy:
    """One command, known before its module is imported.

    Attributes:
        name: as it is typed.
        place: `module:attribute`, of a function, or of a `typer.Typer` with commands of its own.
        about: first sentence of its help.
        panel: heading under which `idap --help` lists it.
    """

    name: str
    place: str
    about: str
    panel: str

    def load(self) -> Any:
        """Import the command.

        Returns:
            A command of the parser, with its options, and with the examples in `EXAMPLES` of its module.
        """
        module = importlib.import_module(self.place.partition(":")[0])
        found = getattr(module, self.place.partition(":")[2])
        app = found if isinstance(found, typer.Typer) else _app_of(self.name, found, examples_of(module))
        command = typer.main.get_command(app)
        command.name = self.name
        return command


def examples_of(module: Any) -> tuple[str, ...]:
    """The command lines that the help of a command shows."""
    found: tuple[str, ...] = module.EXAMPLES
    return found


def _app_of(name: str, function: Any, examples: Sequence[str]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    add_command(app, name, function, examples)
    return app


def add_command(app: typer.Typer, name: str, function: Any, examples: Sequence[str]) -> None:
    """Add a command whose help is its docstring, and examples."""
    lines = "\n".join(f"  [bold]{escape(example)}[/bold]" for example in examples)
    title = "Example:" if len(examples) == 1 else "Examples:"
    about = escape(reflow(inspect.getdoc(function) or ""))
    app.command(name, help=about, epilog=f"{title}\n{lines}", context_settings=CONTEXT, cls=Command)(function)


def reflow(text: str) -> str:
    r"""Join the lines of each paragraph, so that the text can be wrapped to any width.

    >>> reflow("One sentence.\n\nAnother one\nin two lines.")
    'One sentence.\n\nAnother one in two lines.'
    """
    return "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in text.split("\n\n"))


class Command(TyperCommand):
    """One command; its help lists --help beside the other switches."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help, which takes no value."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar, option.rich_help_panel = "", OUTPUT
        return option


class LazyGroup(TyperGroup):
    """The `idap` command: finds subcommands by name, imports only the one that runs, and reports errors in one way."""

    lazy: Sequence[Lazy] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for each in self.lazy:
            listed = TyperCommand(each.name, help=each.about, rich_help_panel=each.panel)
            self.commands[each.name] = listed  # for lists; resolve_command loads the one that runs

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help, which takes no value."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar = ""
        return option

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command by its name, and import it."""
        name, command, rest = super().resolve_command(ctx, args)
        known = next((each for each in self.lazy if each.name == name), None)
        return name, command if known is None else known.load(), rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Ctrl-C before the command handles it also ends in a message of one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            terminal(stderr=True).print("\nStopped. Nothing was written.")
            raise typer.Exit(STOPPED) from error

    def main(self, *words: Any, **settings: Any) -> Any:
        """Parse and run; ends the process with the exit code unless `standalone_mode` is off."""
        settle_streams()
        args = words[0] if words else settings.get("args")
        standalone = settings.pop("standalone_mode", True)
        try:
            code = super().main(*words, **settings | {"standalone_mode": False})
            sys.stdout.flush()
        except BrokenPipeError:
            silence(sys.stdout)
            code = NO_READER
        except typer.Abort:
            code = STOPPED
        except SystemExit as end:  # rich exits if the pipe is closed during help; completion exits too
            code = end.code if COMPLETE in os.environ else NO_READER
        except Exception as error:
            if not hasattr(error, "format_message"):  # not an error of the parser
                raise
            code = USER_ERROR
            if type(error).__name__ != "NoArgsIsHelpError":  # that error has shown the help
                report_usage(error, list(sys.argv[1:] if args is None else args))
        if standalone:
            sys.exit(code or 0)
        return code
