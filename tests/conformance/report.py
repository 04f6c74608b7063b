"""Write docs/coverage.md from benchmarks/results/coverage.json: `make conformance` does it last."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from tests.conformance.run import RESULTS, ROOT

PAGE = ROOT / "docs" / "coverage.md"
LIBRARIES = {
    "timm": "timm: the smallest model of each family",
    "torchvision": "torchvision: classifiers, segmenters, and the networks inside detectors",
    "transformers": "transformers, from configuration, small",
    "diffusers": "diffusers, small",
    "written": "Written in the tests: generators, U-Net, detector, and details that are hard for tools",
}
EXACT = 1e-4

INTRODUCTION = """# Coverage

This page lists the models that were tried, and the results. `make conformance` writes
`benchmarks/results/coverage.json`, one row per model, and then this page. A model of its catalogue that is not listed
here has not been run yet. All models have random weights and run on a batch of two in float32, with one thread per
model; up to three models ran at a time on a machine with two cores, which the seconds include.

For each model, without any hint about it:

- **permuted**: the units of all groups are permuted in every weight, in float64 if the model's own code allows it. The
  number is the largest change of an output, relative to the largest value. It must not exceed rounding.
- **cut**: a random plan removes about 30 % of the units of every group. The number is the difference between the cut
  model and the masked original, which runs as a graph of its own. Where a norm runs over a dimension that shrank, this
  reference computes over the kept units alone.
- **alone**: the difference between the cut model's outputs for one sample alone and for the same sample in a batch of
  two. It shows that the cut model runs at any batch size.
- **wrong list caught**: one index list of the cut is shifted by one slot; the verification must fail.
- **blocks exact**: how many of the residual branches and blocks that can be removed were exact when each was removed on
  its own; random sets of them were tried too.
- **rewritten**: the modules whose own code can't produce the sizes of this cut, so that it was rewritten.
- **Torch-Pruning** 1.6.1, its high-level pruner, removing 50 % of everything but the layers that write the outputs,
  called as in `tests/conformance/peer.py`, with at most 60 s of processor time for each model. Empty: not run yet. It
  gets no hints either. If it is told which layers are attention and how to cut their heads, it runs on more models of
  transformers.
"""


def main() -> None:
    """Write the page."""
    rows = [row for row in json.loads(RESULTS.read_text())["models"] if row["nodes"] or row["failure"]]
    parts = [INTRODUCTION, _totals(rows)]
    for library, title in LIBRARIES.items():
        mine = [row for row in rows if row["model"].startswith(f"{library}:")]
        if mine:
            parts += [f"## {title}\n", _table(mine)]
    parts.append(_blocked(rows))
    PAGE.write_text("\n".join(parts))


def exact(row: dict[str, Any]) -> bool:
    """Whether every check of a model succeeded."""
    errors = [row[name] for name in ("permuted", "cut", "single") if row[name] is not None]
    proved = not row["failure"] and row["cut"] is not None and all(error <= EXACT for error in errors)
    whole = row["blocks"] == row["blocks_exact"] and row["sets_exact"] is not False
    return proved and row["rolled_caught"] is not False and whole


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*titles: str) -> list[str]:
    return [_line(titles), _line(["---"] * len(titles))]


def _totals(rows: Sequence[dict[str, Any]]) -> str:
    lines = _head("library", "models", "analysed", "exact in every check", "median prunable", "median export",
                  "median analysis", "Torch-Pruning runs")  # fmt: skip
    for library in LIBRARIES:
        mine = [row for row in rows if row["model"].startswith(f"{library}:")]
        if not mine:
            continue
        peers = [row["peer"] for row in mine if row["peer"]]
        middle = {name: statistics.median(row[name] for row in mine) for name in ("prunable", "export_s", "analysis_s")}
        counts = [len(mine), sum(bool(row["groups"]) for row in mine), sum(map(exact, mine))]
        times = [f"{middle['export_s']:.2f} s", f"{middle['analysis_s']:.2f} s"]
        peer = f"{sum(peer.startswith('runs') for peer in peers)} of {len(peers)}"
        lines.append(_line([library, *counts, f"{middle['prunable']:.0%}", *times, peer]))
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = _head("model", "parameters", "export s", "analysis s", "groups", "prunable", "permuted", "cut", "alone",
                  "wrong list caught", "blocks exact", "rewritten", "Torch-Pruning")  # fmt: skip
    for row in rows:
        name = [row["model"].partition(":")[2], _millions(row["parameters"])]
        if row["failure"]:
            lines.append(_line([*name, *[""] * 9, row["failure"][:160], row["peer"]]))
            continue
        caught = {True: "yes", False: "**no**", None: "–"}[row["rolled_caught"]]
        code = ", ".join(f"{kind} ×{count}" for kind, count in row["rewritten"].items())
        blocks = f"{row['blocks_exact']}/{row['blocks']}" if row["blocks"] else "–"
        found = [f"{row['export_s']:.1f}", f"{row['analysis_s']:.2f}", row["groups"], f"{row['prunable']:.0%}"]
        errors = [_error(row[kind]) for kind in ("permuted", "cut", "single")]
        lines.append(_line([*name, *found, *errors, caught, blocks, code, row["peer"]]))
    return "\n".join(lines) + "\n"


def _blocked(rows: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        for reason, times in row["blocked"].items():
            models, dims = counts.get(reason, (0, 0))
            counts[reason] = models + 1, dims + times
    lines = ["## Why dimensions of weights can't shrink\n", "| reason | models | dimensions |", "|---|---|---|"]
    for reason, (models, dims) in sorted(counts.items(), key=lambda item: -item[1][1])[:25]:
        lines.append(f"| {reason[:220]} | {models} | {dims} |")
    return "\n".join(lines) + "\n"


def _error(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"


if __name__ == "__main__":
    main()
