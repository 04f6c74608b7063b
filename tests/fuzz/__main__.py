"""Fuzz what idap reads, and kill what it writes: `python -m tests.fuzz --help`."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.cases import KINDS
from tests.fuzz.pool import Failure, Report, run_cases, run_one


def main() -> int:
    """Run what the command line says; 1 if a promise was broken."""
    options = _options()
    kinds = options.only or list(KINDS)
    began = time.monotonic()
    if options.case is not None:
        report = run_one(kinds[0], options.case, options.seed, options.keep)
        for failure in report.failures:
            _say(f"{failure.action}: {failure.what}\n  {failure.about}")
    else:
        numbers = range(options.first, options.first + options.cases)
        report = run_cases(kinds, numbers, options.seed, processes=options.processes)
        _tell(report, options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(failure) for failure in report.failures], indent=1))
    _say(f"{sum(report.cases.values())} inputs, {len(report.failures)} failures, {time.monotonic() - began:.0f} s")
    return 1 if report.failures else 0


def _tell(report: Report, seed: int) -> None:
    for kind, outcomes in report.outcomes.items():
        counted = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        _say(f"{kind}: {report.cases[kind]} inputs; {counted}")
    for signature, group in report.grouped().items():
        shortest: Failure = group[0]
        _say(f"\n{len(group)} x {signature}\n  {shortest.what}\n  {shortest.about}")
        _say(f"  again: python -m tests.fuzz --only {shortest.kind} --seed {seed} --case {shortest.number}")


def _say(line: str) -> None:
    sys.stdout.write(line.encode("ascii", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=200, help="inputs of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="kinds of inputs; all if left out")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--keep", type=Path, help="folder for the input of that case")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the failures there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
