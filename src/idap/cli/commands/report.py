"""`idap report`: draw a run as one HTML page."""

import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from idap.cli.failure import Outcome
from idap.cli.options import Debug, Json, OneRun, OpenPage, PageFile, PdfFile, PngFile, Quiet, Verbose
from idap.errors import ReportError
from idap.files import write_bytes

if TYPE_CHECKING:
    from idap.report.reading import Run

EXAMPLES = (
    "idap report runs/digits_resnet --open",
    "idap report runs/digits_resnet --out resnet.html --pdf resnet.pdf",
)
DOCUMENT = {
    "state": "reached, missed or unfinished",
    "message": "the state in one sentence",
    "goals": "for each goal what was `wanted`, what was `found`, and its `state`: good, bad or open",
    "numbers": "for each number its `name`, `before`, `after`, `change` and, for a cost, the share that is `left`",
    "decisions": "number of decisions",
    "accepted": "number of steps that were accepted",
    "widths": "for each group the number of units in the original and now",
    "removed": "branches and blocks that were removed, and how: removed, projection or inside",
    "files": "the files that were written",
}
PAGE = "report.html"


def report_command(  # noqa: PLR0913 - one argument per option
    run: OneRun,
    *,
    out: PageFile = None,
    opened: OpenPage = False,
    pdf: PdfFile = None,
    png: PngFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a run as one HTML page that opens offline.

    The page shows the result, the trade-off of all steps, the divergence over depth, the widths of the network, each
    decision, how the time was spent, and the commands that reproduce the run. It can also show an unfinished run.
    """
    outcome = Outcome(command="idap report", where=str(run), as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with outcome.report():
        from idap.report.page import run_page  # noqa: PLC0415 - slow to import
        from idap.report.printing import print_pdf, print_png  # noqa: PLC0415 - as above
        from idap.report.reading import read_run  # noqa: PLC0415 - as above

        found = read_run(run)
        page = write_page(run / PAGE if out is None else out, run_page(found))
        for file, printed in ((pdf, print_pdf), (png, print_png)):
            if file is not None:
                printed(page, file)
        if opened:
            webbrowser.open(page.resolve().as_uri())
        made = [str(file) for file in (page, pdf, png) if file is not None]
        outcome.document = _document(found, made)
        if not (as_json or quiet):
            outcome.console.print(outcome.document["message"], markup=False, soft_wrap=True)
            outcome.console.print(f"The report is in {', '.join(made)}.", markup=False, soft_wrap=True)


def write_page(file: Path, text: str) -> Path:
    """Write a page whole or not at all.

    Raises:
        ReportError: the page can't be written.
    """
    try:
        write_bytes(file, text.encode())
    except OSError as error:
        raise ReportError(f"cannot write the page {file}: {error}") from error
    return file


def _document(run: "Run", made: list[str]) -> dict[str, object]:
    from idap.report.headline import facts, goals, verdict  # noqa: PLC0415 - slow to import

    state, _, sentence = verdict(run)
    return {
        "state": {"good": "reached", "bad": "missed", "open": "unfinished"}[state],
        "message": sentence,
        "goals": [asdict(goal) for goal in goals(run)],
        "numbers": [asdict(fact) for fact in facts(run)],
        "decisions": len(run.steps),
        "accepted": len(run.accepted),
        "widths": {name: [group.size, run.widths[name]] for name, group in run.settings.groups.items()},
        "removed": run.removed,
        "files": made,
    }
