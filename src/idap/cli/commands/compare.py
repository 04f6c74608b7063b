"""`idap compare`: show several runs side by side."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from idap.cli.commands.report import write_page
from idap.cli.failure import Outcome
from idap.cli.options import ComparisonFile, Debug, Json, Quiet, RunFolders, Verbose

if TYPE_CHECKING:
    from idap.report.reading import Run


EXAMPLES = ("idap compare runs/net runs/net-2 --html both.html",)
DOCUMENT = {
    "comparable": "whether the numbers can be compared",
    "obstacles": "the reasons why they can't be compared, one sentence each",
    "runs": "for each run its `folder`, `name`, whether its goals were `reached`, and its numbers `before` and `after`",
    "settings": "the settings that differ: the key, and its value in each run",
}


def compare_command(
    runs: RunFolders,
    *,
    html: ComparisonFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show several runs side by side, and say where they can't be compared.

    Runs with different models, data or metrics are shown, but their numbers can't be compared.
    """
    where = ", ".join(map(str, runs))
    outcome = Outcome(command="idap compare", where=where, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with outcome.report():
        from idap.report.comparing import check_runs, compare_page, comparison_data  # noqa: PLC0415 - slow to import
        from idap.report.reading import read_run  # noqa: PLC0415 - as above

        found = [read_run(run) for run in runs]
        check_runs(found)
        if html is not None:
            write_page(html, compare_page(found))
        outcome.document = comparison_data(found)
        if not (as_json or quiet):
            _show(outcome.console, found)
            if html is not None:
                outcome.console.print(f"The page is {html}.", markup=False, soft_wrap=True)


def _show(console: Console, runs: "list[Run]") -> None:
    from idap.report.comparing import obstacles, rows, setting_differences  # noqa: PLC0415 - slow to import

    head, *lines = rows(runs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="right" if place else "left")
    for line in lines:
        table.add_row(*map(Text, line))
    changed = setting_differences(runs)
    if changed:
        table.add_section()
        for values in changed:
            table.add_row(*(Text(cell, style="dim") for cell in values))
    console.print(table)
    for why in obstacles(runs):
        console.print(Text.assemble(("Not comparable: ", "bold yellow"), why))
