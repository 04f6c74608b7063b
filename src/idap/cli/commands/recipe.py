"""`idap recipe`: list the recipes that come with idap, show one, or write a new one."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from idap.cli.failure import Outcome
from idap.cli.lazy import CONTEXT, add_command
from idap.cli.options import Debug, Json, WeightsPath
from idap.errors import ConfigError
from idap.files import write_bytes
from idap.recipes.catalogue import shipped_recipes, summary

NewData = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME:PATH", help="Such as digits, imagefolder:PATH, csv:PATH, text:PATH."),
]
NewModel = Annotated[
    str | None,
    typer.Option("--model", metavar="SPEC", help="Such as torchvision:NAME, hf:FOLDER, python:FILE.py:NAME."),
]
NewDrop = Annotated[
    str | None,
    typer.Option("--max-drop", metavar="NUMBER", help="How much worse the metric may get: 0.02, 2% or none."),
]
NewMacs = Annotated[
    str | None, typer.Option("--macs", metavar="SHARE", help="Share of the multiply-adds that may stay: 0.5 or 50%.")
]
NewFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write; it must not exist.")]
RecipeName = Annotated[
    str, typer.Argument(metavar="NAME", help="A name that idap recipe list shows.", show_default=False)
]

EXAMPLES = (
    "idap recipe new",
    "idap recipe new --data imagefolder:pets --model timm:resnet18 --macs 50% --out pets.toml",
    "idap recipe list",
    "idap recipe show digits_resnet",
)
DOCUMENT = {
    "recipe": "`new`: the file that was written",
    "NAME": "`list`: the name of each recipe, with one line about it",
    "name, text": "`show`: the name, and the text of the file",
}


def new_command(
    *,
    data: NewData = None,
    model: NewModel = None,
    weights: WeightsPath = None,
    max_drop: NewDrop = None,
    macs: NewMacs = None,
    out: NewFile = Path("recipe.toml"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a commented recipe: from the answers to five questions, or from the options if any is given."""
    outcome = Outcome(command="idap recipe new", where=str(out), as_json=as_json, debug=debug)
    given = {
        "data": data,
        "model": model,
        "weights": None if weights is None else str(weights),
        "max_drop": max_drop,
        "macs": macs,
    }
    given = {name: value for name, value in given.items() if value is not None}
    with outcome.report():
        if out.exists():
            raise ConfigError(f"{out} exists already; name another file with --out.")
        from idap.recipes.new import Answers, compose_recipe  # noqa: PLC0415 - imports torch

        if given and data is None:
            raise ConfigError("--data is missing: name the data, or give no option at all to be asked for everything.")
        answers = Answers(**(given or _ask()))
        write_bytes(out, compose_recipe(answers, out).encode())
        outcome.document = {"recipe": str(out)}
        if not as_json:
            outcome.console.print(f"Wrote {out}. Run it: idap compress {out}", markup=False, soft_wrap=True)


def list_command(*, as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come with idap; `idap compress NAME` runs one."""
    outcome = Outcome(command="idap recipe list", where="idap", as_json=as_json, debug=debug)
    with outcome.report():
        found = {name: summary(file) for name, file in shipped_recipes().items()}
        outcome.document = found
        if not as_json:
            table = Table("recipe", "what it does", box=None, pad_edge=False)
            for name, what in found.items():
                table.add_row(name, what)
            outcome.console.print(table)


def show_command(name: RecipeName, *, as_json: Json = False, debug: Debug = False) -> None:
    """Print a recipe that comes with idap, as a start for your own."""
    outcome = Outcome(command="idap recipe show", where=name, as_json=as_json, debug=debug)
    with outcome.report():
        found = shipped_recipes()
        if name not in found:
            raise ConfigError(f"idap has no recipe {name!r}; its recipes are {', '.join(found)}.")
        text = found[name].read_text(encoding="utf-8")
        outcome.document = {"name": name, "text": text}
        if not as_json:
            typer.echo(text, nl=False)


def _ask() -> dict[str, str]:
    """Ask the five questions."""
    from idap.recipes.new import MODELS, Answers  # noqa: PLC0415 - imports torch
    from idap.recipes.sources import SOURCES, parse_data  # noqa: PLC0415 - as above

    usual = Answers()
    listed = "\n".join(f"  {name}{':PATH' if source.path else '':<6} {source.what}" for name, source in SOURCES.items())
    typer.echo(f"Data by name:\n{listed}\n  python:FILE.py:FUNCTION   data of your own")
    try:
        data = str(typer.prompt("1. Which data", default=usual.data))
        kind = str((parse_data(data) or {}).get("name"))
        model = str(typer.prompt("2. Which model", default=MODELS.get(kind)))
        weights = str(typer.prompt("3. A file of weights (empty: none)", default="", show_default=False))
        drop = str(typer.prompt("4. How much worse may the metric get", default=usual.max_drop))
        macs = str(typer.prompt("5. Which share of the multiply-adds may stay", default=usual.macs))
    except typer.Abort as error:
        if sys.stdin.isatty():
            raise
        raise ConfigError("no answer was given; use --data, --model, --weights, --max-drop and --macs.") from error
    answers = {"data": data, "model": model, "weights": weights, "max_drop": drop, "macs": macs}
    return {name: value for name, value in answers.items() if value}


recipe_app = typer.Typer(
    help="Recipes: TOML files that say what is compressed, on which data, to which goals, and how.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
for _name, _function in (("new", new_command), ("list", list_command), ("show", show_command)):
    add_command(recipe_app, _name, _function, [line for line in EXAMPLES if line.split()[2] == _name])
