"""`idap list`: list models, data sets, criteria and recipes by name."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from idap.cli.failure import Outcome
from idap.cli.options import Debug, Json, ListKind, ListWords, OnlyNames, Verbose

if TYPE_CHECKING:
    from idap.recipes.catalogue import Entry

EXAMPLES = ("idap list", "idap list models timm resnet", "idap list criteria --json")
DOCUMENT = {
    "name": "the name; the document is a list with one item per name",
    "about": "one line about it",
    "count": "number of names of the kind; only in the list of kinds",
}


def list_command(
    kind: ListKind = None,
    words: ListWords = None,
    *,
    quiet: OnlyNames = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List models, data sets, criteria and recipes by name.

    Words after the kind filter the list: each must occur in the name or in the line about it. Without a kind, the kinds
    are listed, each with its number of names. Models of packages that are not installed are not listed.
    """
    where = " ".join([kind or "everything", *(words or [])])
    outcome = Outcome(command="idap list", where=where, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with outcome.report():
        from idap.recipes.catalogue import LISTS, find_entries  # noqa: PLC0415 - needed when the command runs

        if kind is None:
            counts = {name: len(read()) for name, (read, _) in LISTS.items()}
            outcome.document = [
                {"name": name, "about": LISTS[name][1], "count": count} for name, count in counts.items()
            ]
            if not as_json:
                _show_kinds(outcome.console, outcome.document, quiet=quiet)
        else:
            found = find_entries(kind, words or [])
            outcome.document = [asdict(entry) for entry in found]
            if not as_json:
                _show(outcome.console, kind, found, quiet=quiet)


def _show_kinds(console: Console, kinds: Sequence[dict[str, Any]], *, quiet: bool) -> None:
    if quiet:
        _print_names(console, [kind["name"] for kind in kinds])
        return
    table = _table()
    table.add_column(justify="right")
    for kind in kinds:
        table.add_row(kind["name"], kind["about"], f"{kind['count']:,}")
    console.print(table)
    console.print("List one: idap list models timm resnet", style="dim", markup=False)


def _show(console: Console, kind: str, found: "Sequence[Entry]", *, quiet: bool) -> None:
    if quiet:
        _print_names(console, [entry.name for entry in found])
    elif not found:
        console.print(f"No {kind} with these words.", markup=False)
    elif console.is_terminal:
        table = _table()
        for entry in found:
            table.add_row(entry.name, entry.about)
        console.print(table)
    else:  # one line each, for grep
        width = max(len(entry.name) for entry in found)
        _print_names(console, [f"{entry.name:<{width}}  {entry.about}".rstrip() for entry in found])


def _table() -> Table:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, show_edge=False)
    table.add_column(style="cyan", overflow="fold")
    table.add_column()
    return table


def _print_names(console: Console, names: Sequence[str]) -> None:
    for name in names:
        console.print(Text(name), soft_wrap=True)
