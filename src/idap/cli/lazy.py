"""Commands that are imported when they run: the list of all, and the group that finds them."""

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
"""Environment variable by which a shell asks what may come next."""
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
            What the parser calls a command, with its options and its examples, those of the module's `EXAMPLES`.
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
    r"""Join the lines of each paragraph, so that a terminal of any width may break them where it likes.

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
    """The `idap` command: subcommands by name, one way to end, and no import before it is needed."""

    lazy: Sequence[Lazy] = ()

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for each in self.lazy:
            listed = TyperCommand(each.name, help=each.about, rich_help_panel=each.panel)
            self.commands[each.name] = listed  # stands in lists; what runs is loaded

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help, which takes no value."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar = ""
        return option

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is meant, and import it."""
        name, command, rest = super().resolve_command(ctx, args)
        known = next((each for each in self.lazy if each.name == name), None)
        return name, command if known is None else known.load(), rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Ctrl-C before it can report for itself ends it in one line too."""
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
        except SystemExit as end:  # how rich answers a closed pipe while help is printed; or a shell was answered
            code = end.code if COMPLETE in os.environ else NO_READER
        except Exception as error:
            if not hasattr(error, "format_message"):  # no error of the parser
                raise
            code = USER_ERROR
            if type(error).__name__ != "NoArgsIsHelpError":  # that one has shown the help
                report_usage(error, list(sys.argv[1:] if args is None else args))
        if standalone:
            sys.exit(code or 0)
        return code
