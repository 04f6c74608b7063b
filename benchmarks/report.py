"""Write the tables of docs/results.md and of its appendix from the results, as far as they are measured.

python benchmarks/report.py
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import headline
from benchmarks.compression_tables import (
    Row,
    ablation,
    contest,
    equal_latency,
    kinds,
    latencies,
    phases,
    repeated,
    saving,
    temperatures,
)
from benchmarks.criteria_tables import criteria, exchange, overhead, truth

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, APPENDIX = ROOT / "docs" / "results.md", ROOT / "docs" / "results-appendix.md"


@dataclass(frozen=True)
class Table:
    """Tables between two marks of a page.

    Attributes:
        page: where they stand.
        name: of the marks.
        file: the results, without the ending.
        lines: makes them of what the file holds.
    """

    page: Path
    name: str
    file: str
    lines: Callable[[Any], list[str]]


def _of_rows(lines: Callable[[Sequence[Row]], list[str]]) -> Callable[[Any], list[str]]:
    return lambda found: lines(found["rows"])


def _contest(*, earlier: bool) -> Callable[[Any], list[str]]:
    """The contest by today's protocols, or by the one before them."""

    def lines(found: Mapping[str, Any]) -> list[str]:
        rows = found["rows"]
        return contest([row for row in rows if (row["protocol"] == headline.EARLIER) == earlier or "accuracy" in row])

    return lines


TABLES = (
    Table(PAGE, "headline of compress_cifar.json", "compress_cifar", _of_rows(headline.headline)),
    Table(PAGE, "tables of compress_cifar.json", "compress_cifar", _contest(earlier=False)),
    Table(PAGE, "summary of criteria.json", "criteria", _of_rows(headline.criteria)),
    Table(PAGE, "corrections of criteria.json", "criteria", _of_rows(headline.corrections)),
    Table(PAGE, "tables of ablation.json", "ablation", _of_rows(ablation)),
    Table(PAGE, "tables of repeated.json", "repeated", _of_rows(repeated)),
    Table(PAGE, "tables of temperature.json", "temperature", _of_rows(temperatures)),
    Table(PAGE, "tables of phases.json", "phases", _of_rows(phases)),
    Table(PAGE, "tables of overhead.json", "overhead", _of_rows(overhead)),
    Table(PAGE, "tables of latency.json", "latency", _of_rows(latencies)),
    Table(PAGE, "tables of equal_latency.json", "equal_latency", _of_rows(equal_latency)),
    Table(PAGE, "tables of saving.json", "saving", _of_rows(saving)),
    Table(PAGE, "tables of rows.json", "rows", _of_rows(kinds)),
    Table(APPENDIX, "earlier tables of compress_cifar.json", "compress_cifar", _contest(earlier=True)),
    Table(APPENDIX, "tables of criteria.json", "criteria", _of_rows(criteria)),
    Table(APPENDIX, "tables of exchange.json", "exchange", _of_rows(exchange)),
    Table(APPENDIX, "tables of truth.json", "truth", truth),
)


def main() -> None:
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Each page with its tables; a table whose results are missing stays as it was."""
    found = {page: page.read_text(encoding="utf-8") for page in (PAGE, APPENDIX)}
    for table in TABLES:
        file = RESULTS / f"{table.file}.json"
        if file.exists():
            lines = table.lines(json.loads(file.read_text(encoding="utf-8")))
            begin, end = f"<!-- {table.name}: begin -->", f"<!-- {table.name}: end -->"
            found[table.page] = put(found[table.page], begin, end, lines)
    return found


def put(page: str, begin: str, end: str, lines: Sequence[str]) -> str:
    """Replace what stands between two marks.

    Raises:
        LookupError: the page has no such marks.
    """
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise LookupError(f"the page needs the marks {begin!r} and {end!r}.")
    return "\n".join([before + begin, "", *lines, *([""] if lines and lines[-1] else []), end]) + after


if __name__ == "__main__":
    main()
