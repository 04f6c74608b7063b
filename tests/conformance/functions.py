"""Note which functions of torch the modules of every architecture call: `python -m tests.conformance.functions`.

What is found stands in `benchmarks/results/functions.json`, a row per architecture, so that a run that was stopped goes
on. `tests/structure/code/test_vocabulary.py` holds it against the list of functions that a plan may call.
"""

import argparse
import fnmatch
import json
import sys
import warnings
from pathlib import Path

from idap.errors import IdapError
from idap.files import write_json
from idap.graph.ir import Graph

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "functions.json"


def functions_of(graph: Graph) -> list[str]:
    """The functions that a model's own code calls, by name."""
    steps = (step for calls in graph.frames.values() for frames in calls for frame in frames for step in frame.steps)
    return sorted({step.function for step in steps if step.function})


def main() -> None:
    """Trace what is asked for and was not traced yet, and note what it calls."""
    from idap.graph.trace import trace
    from tests.conformance.catalogue import CASES
    from tests.conformance.run import versions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="patterns such as timm:* or *swin*; all by default")
    parser.add_argument("--again", action="store_true", help="also what was traced before")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    for case in CASES:
        wanted = any(fnmatch.fnmatch(case.name, pattern) for pattern in arguments.names)
        if not wanted or (case.name in rows and not arguments.again):
            continue
        model, args, kwargs = case.made()
        try:
            rows[case.name] = functions_of(trace(model, args, kwargs))
        except IdapError as error:
            sys.stderr.write(f"{case.name}: {error}\n")
            continue
        command = "python -m tests.conformance.functions"
        write_json(RESULTS, {"command": command, "versions": versions(), "models": dict(sorted(rows.items()))})


if __name__ == "__main__":
    main()
