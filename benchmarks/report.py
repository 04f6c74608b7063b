"""Write the tables of docs/results.md that come from the results, as far as they are measured.

python benchmarks/report.py
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compression_tables import (
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
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
OF_ROWS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], list[str]]] = {
    "criteria": criteria,
    "exchange": exchange,
    "overhead": overhead,
    "compress_cifar": contest,
    "ablation": ablation,
    "rows": kinds,
    "repeated": repeated,
    "latency": latencies,
    "equal_latency": equal_latency,
    "saving": saving,
    "phases": phases,
    "temperature": temperatures,
}
"""Result file -> what makes its tables of its rows."""


def main() -> None:
    page = PAGE.read_text()
    for name, tables in OF_ROWS.items():
        page = _with_tables(page, name, lambda found, of_rows=tables: of_rows(found["rows"]))
    PAGE.write_text(_with_tables(page, "truth", truth))


def _with_tables(page: str, name: str, tables: Callable[[Any], list[str]]) -> str:
    """The page with the tables of a result file, as it was where there is no such file."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return page
    begin, end = f"<!-- tables of {name}.json: begin -->", f"<!-- end of {name}.json -->"
    return put(page, begin, end, tables(json.loads(file.read_text())))


def put(page: str, begin: str, end: str, lines: Sequence[str]) -> str:
    """Replace what stands between two marks.

    Raises:
        LookupError: the page has no such marks.
    """
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise LookupError(f"docs/results.md needs the marks {begin!r} and {end!r}.")
    return "\n".join([before + begin, "", *lines, *([""] if lines and lines[-1] else []), end]) + after


if __name__ == "__main__":
    main()
