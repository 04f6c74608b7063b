"""The `idap` command and its subcommands. Torch is imported when a command runs, not to show help."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from idap.cli.apply import apply_command
from idap.cli.bench import bench_command
from idap.cli.compress import compress_command
from idap.cli.demo_command import demo_command
from idap.cli.export import export_command
from idap.cli.inspect import inspect_command
from idap.cli.recipe import recipe_app

_EXIT_CODES = "Exit codes: 0 done · 1 a goal was not reached · 2 wrong input · 3 unexpected error · 130 stopped."

app = typer.Typer(
    name="idap",
    help="Make trained neural networks smaller and faster by removing what their information flow does not need.",
    epilog=f"Begin with [bold]idap demo[/bold].  {_EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo", epilog="Example: [bold]idap demo --fast[/bold]")(demo_command)
app.command(
    "inspect",
    epilog="Examples: [bold]idap inspect idap:digits_vit[/bold]  ·  "
    "[bold]idap inspect python:net.py:build --input-shape 1,3,32,32[/bold]",
)(inspect_command)
app.command(
    "compress",
    epilog="Examples: [bold]idap compress recipes/digits_resnet.toml --set goals.macs=40%[/bold]  ·  "
    "[bold]idap compress --model python:net.py:build --task python:net.py:task --max-drop 0.01 --macs 0.5[/bold]",
)(compress_command)
app.command(
    "export",
    epilog="Examples: [bold]idap export runs/net --model net.toml --out net.onnx[/bold]  ·  "
    "[bold]idap export small --model idap:digits_vit --to pt2 --finalize --out small.pt2[/bold]",
)(export_command)
app.command(
    "bench",
    epilog="Examples: [bold]idap bench runs/net --model net.toml --batch 1 --batch 16[/bold]  ·  "
    "[bold]idap bench small --model idap:digits_vit --engine eager --engine onnxruntime[/bold]",
)(bench_command)
app.command(
    "apply",
    epilog="Example: [bold]idap apply runs/resnet/model/plan.json --checkpoint original/ --out small/ "
    "--max-shard-size 2GB[/bold]",
)(apply_command)
app.add_typer(recipe_app, name="recipe")


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
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
    app(prog_name="idap")
