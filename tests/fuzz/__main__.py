"""Fuzz what idap reads, and kill what it writes: `python -m tests.fuzz --help`."""

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.cases import KINDS
from tests.fuzz.known import KNOWN, cause_of
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
        report = run_cases(kinds, numbers, options.seed, processes=options.processes, heard=_tell_first)
        _tell(report, options.seed)
        for pattern in sorted(set(KNOWN) - {_pattern_of(failure) for failure in report.failures}):
            _say(f"known, but not seen in this run: {pattern}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(failure) for failure in report.failures], indent=1))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    _say(
        f"{sum(report.cases.values())} inputs, {len(report.failures)} failures, {time.monotonic() - began:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of processor time"
    )
    return 1 if any(not _cause_of(failure) for failure in report.failures) else 0


def _tell_first(failure: Failure) -> None:
    _say(f"found: {failure.signature} (case {failure.number})")


def _cause_of(failure: Failure) -> str:
    return cause_of(f"{failure.signature} {failure.what}")


def _pattern_of(failure: Failure) -> str:
    cause = _cause_of(failure)
    return next((pattern for pattern, known in KNOWN.items() if known == cause), "")


def _tell(report: Report, seed: int) -> None:
    for kind, outcomes in report.outcomes.items():
        counted = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        _say(f"{kind}: {report.cases[kind]} inputs; {counted}")
    for signature, group in report.grouped().items():
        shortest: Failure = group[0]
        known = _cause_of(shortest)
        _say(f"\n{len(group)} x {signature}{f'   KNOWN: {known}' if known else ''}")
        _say(f"  {shortest.what}\n  {shortest.about}")
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
