"""The `idap` command and its subcommands; the module of a command, and torch, are imported only when it runs."""

import os
from typing import Annotated

import typer

from idap.cli.lazy import COMPLETE, CONTEXT, Lazy, LazyGroup

EXIT_CODES = {
    0: "done",
    1: "a goal was not reached",
    2: "wrong input",
    3: "unexpected error",
    130: "stopped with Ctrl-C",
    141: "the reader closed the output",
}

START, WORK, RESULT, KNOW = "Begin here", "Compress", "Use the result", "Look up"

COMMANDS = (
    Lazy(
        "demo",
        "idap.cli.commands.demo:demo_command",
        "Train two small networks on handwritten digits, compress them, and show what happened.",
        START,
    ),
    Lazy(
        "inspect",
        "idap.cli.commands.inspect:inspect_command",
        "Show what can be removed from a model, what can't and why, and what each part costs.",
        START,
    ),
    Lazy(
        "compress",
        "idap.cli.commands.compress:compress_command",
        "Compress a trained model: remove filters, then layers, within a budget of accuracy.",
        WORK,
    ),
    Lazy(
        "recipe",
        "idap.cli.commands.recipe:recipe_app",
        "Write a recipe, list the recipes that come with idap, or show one of them.",
        WORK,
    ),
    Lazy("resume", "idap.cli.commands.resume:resume_command", "Go on with a run that was stopped or killed.", WORK),
    Lazy(
        "evaluate",
        "idap.cli.commands.evaluate:evaluate_command",
        "Measure the metric of a compressed model and of its original.",
        RESULT,
    ),
    Lazy(
        "bench",
        "idap.cli.commands.bench:bench_command",
        "Time a compressed model and its original in turn, on this machine.",
        RESULT,
    ),
    Lazy(
        "export",
        "idap.cli.commands.export:export_command",
        "Write a compressed model as ONNX, as a torch.export program, as plain weights or as a folder of transformers.",
        RESULT,
    ),
    Lazy(
        "apply",
        "idap.cli.commands.apply:apply_command",
        "Cut a checkpoint on disk as a plan says, without building the model.",
        RESULT,
    ),
    Lazy(
        "report",
        "idap.cli.commands.report:report_command",
        "Draw a run as one HTML page that opens offline.",
        RESULT,
    ),
    Lazy(
        "compare",
        "idap.cli.commands.compare:compare_command",
        "Show several runs side by side, and say where they can't be compared.",
        RESULT,
    ),
    Lazy(
        "list", "idap.cli.commands.listing:list_command", "List models, data sets, criteria and recipes by name.", KNOW
    ),
    Lazy(
        "completion",
        "idap.cli.commands.completion:completion_command",
        "Print the script that completes commands, options and names in a shell.",
        KNOW,
    ),
)


class IdapGroup(LazyGroup):
    """All commands of idap."""

    lazy = COMMANDS


app = typer.Typer(
    name="idap",
    cls=IdapGroup,
    help="Make trained neural networks smaller and faster by removing what their information flow does not need.",
    epilog="Begin with [bold]idap demo[/bold].  Exit codes: "
    + " · ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()),
    no_args_is_help=True,
    add_completion=False,  # `idap completion` does it, and completes names with a colon
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=CONTEXT,
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow to import

    try:
        typer.echo(f"idap {version('idap')}")
    except PackageNotFoundError:
        typer.echo("idap, not installed")
    raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Show the version and stop.", is_eager=True, callback=_show_version),
    ] = False,
) -> None: ...


def run() -> None:
    """Run the command; the entry point of the installed script."""
    if COMPLETE in os.environ:
        from idap.cli.commands.completion import prepare  # noqa: PLC0415 - only a shell asks

        prepare()
    app(prog_name="idap")
