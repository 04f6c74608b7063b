"""Write the tables of docs/results.md that come from the results, as far as they are measured.

python benchmarks/report.py
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compression_tables import (
    ablation,
    contest,
    equal_latency,
    head,
    kinds,
    latencies,
    line,
    phases,
    repeated,
    saving,
    temperatures,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- tables of benchmarks/report.py: begin -->", "<!-- end -->"
HALF, THIRD = "inner macs 1/2", "inner macs 1/3"
SQUARES = "least squares"
OWN: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], list[str]]] = {
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
"""Result files whose tables have a place of their own on the page."""
Rows = Sequence[Mapping[str, Any]]


def chosen(rows: Rows, **wanted: object) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def spread(rows: Rows) -> str:
    values = [row["quality"] for row in rows]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def default(rows: Rows) -> list[str]:
    mine = chosen(rows, subject="resnet56", criterion="innovation", ranking="global", corrected=SQUARES, cuts=1)
    found = head("calibration images", "p", "seeds", "half of the MACs", "a third of the MACs")
    for samples in (256, 512, 1024):
        for power in (0.0, 1.0):
            some = chosen(mine, samples=samples, power=power)
            if some:
                cells = [spread(chosen(some, task=task)) for task in (HALF, THIRD)]
                found.append(line(samples, f"{power:g}", len({row["seed"] for row in some}), *cells))
    return found


def peers(rows: Rows) -> list[str]:
    mine = chosen(rows, subject="resnet56", corrected=SQUARES, cuts=1, samples=512, seed=0, power=0.0)
    names = list(dict.fromkeys(row["criterion"] for row in mine if row["criterion"].startswith("torch-pruning")))
    found = head("criterion", "ranking", "half of the MACs", "a third of the MACs")
    for name in ["innovation", *names]:
        for ranking in ("global", "uniform"):
            some = chosen(mine, criterion=name, ranking=ranking)
            cells = [spread(chosen(some, task=task)) for task in (HALF, THIRD)]
            if any(cells):
                found.append(line(f"`{name}` (idap)" if name == "innovation" else name, ranking, *cells))
    return found


def by_criterion(rows: Rows, subject: str, tasks: Sequence[str], base: float) -> list[str]:
    mine = chosen(rows, subject=subject, seed=0, cuts=1)
    names = list(dict.fromkeys(row["criterion"] for row in mine if row["task"] in tasks))
    found = head("criterion", *tasks)
    for name in names:
        cells = []
        for task in tasks:
            some = chosen(mine, criterion=name, task=task)
            plain, corrected = (spread(chosen(some, corrected=kind)) for kind in ("none", SQUARES))
            cells.append(f"{plain} / {corrected}")
        found.append(line(f"`{name}`", *cells))
    found.append(line("untouched", *[f"{base:g}"] * len(tasks)))
    return found


def small(rows: Rows) -> list[str]:
    mine = chosen(rows, subject="resnet20", corrected=SQUARES, cuts=1, samples=512, seed=0)
    if not mine:
        return []
    ways = [("global", 0.0), ("global", 0.5), ("global", 1.0), ("uniform", 0.0)]
    tasks = [task for task in (HALF, THIRD) if chosen(mine, task=task)]
    titles = [
        f"{task.split()[-1]}, {f'p = {power:g}' if ranking == 'global' else ranking}"
        for task in tasks
        for ranking, power in ways
    ]
    found = head("criterion", *titles)
    for name in dict.fromkeys(row["criterion"] for row in mine):
        cells = [
            spread(chosen(mine, criterion=name, task=task, ranking=ranking, power=power))
            for task in tasks
            for ranking, power in ways
        ]
        found.append(line(f"`{name}`", *cells))
    return found


def listed(rows: Rows, keep: Callable[[Mapping[str, Any]], bool], *names: str) -> list[str]:
    found = head(*names, "accuracy", "MACs left")
    for row in rows:
        if keep(row):
            found.append(line(*[row[name] for name in names], f"{row['quality']:.2f}", f"{row['macs']:.1%}"))
    return found


def truth(found: Mapping[str, Any], subject: str) -> list[str]:
    rows = found[subject]["correlations"]
    kinds = ("units plain", "units compensated", "blocks plain", "blocks compensated")
    table = head("criterion", *kinds)
    for name in dict.fromkeys(row["criterion"] for row in rows):
        cells = []
        for kind in kinds:
            values = [row[kind] for row in rows if row["criterion"] == name and row[kind] is not None]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "–")
        table.append(line(f"`{name}`", *cells))
    return table


def overhead(found: Mapping[str, Any]) -> list[str]:
    table = head("model", "plain passes", "all forward criteria", "peak memory", "innovation, 512 images", "its peak")
    for row in found["rows"]:
        table.append(
            line(
                row["model"],
                f"{row['plain_s']:.2f} s for {row['images']} images",
                f"{row['forward_ratio']:.2f}x",
                f"{row['peak_ratio']:.2f}x",
                f"{row['innovation_to_plain_512']:.2f}x",
                f"{row['peak_gib']['innovation']:.2f} GiB",
            )
        )
    return table


def read(name: str) -> Any:
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def main() -> None:
    rows: Rows = read("criteria.json")["rows"]
    parts = ["### ResNet-56, default settings, no training", "", *default(rows), ""]
    parts += ["### The same against Torch-Pruning 1.6.1's criteria, with our corrections", "", *peers(rows), ""]
    if small(rows):
        parts += ["### ResNet-20, every criterion, after least squares", "", *small(rows), ""]
    corrected = listed(
        rows,
        lambda r: r["subject"] == "resnet56" and r["task"] == THIRD and r["corrected"] != SQUARES,
        "criterion", "corrected",
    )  # fmt: skip
    parts += ["### Corrections, ResNet-56 at a third of the MACs", "", *corrected, ""]
    deep = listed(rows, lambda r: r["task"].split()[0] in ("all", "blocks"), "task", "criterion", "power")
    parts += ["### Channels of the stream and blocks as well, ResNet-56", "", *deep, ""]
    again = listed(
        rows,
        lambda r: r["subject"] == "resnet56" and r["task"] == THIRD and (r["cuts"] > 1 or (
            r["cuts"] == 1 and r["corrected"] == SQUARES and r["power"] == 0 and r["samples"] == 512 and r["seed"] == 0
            and r["criterion"] in ("innovation", "relative")
        )),
        "criterion", "cuts",
    )  # fmt: skip
    parts += ["### One cut or three with re-measuring, ResNet-56 at a third of the MACs", "", *again, ""]
    tasks = ("neurons 50 %", "neurons 25 %", "heads 50 %", "heads 25 %")
    parts += ["### CIFAR-10 ViT, share that stays, plain / least squares, accuracy", ""]
    parts += [*by_criterion(rows, "vit", tasks, 73.72), ""]
    tasks = ("neurons 75 %", "neurons 50 %", "heads 75 %", "heads 50 %")
    parts += ["### Small Llama, share that stays, plain / least squares, loss per token on held-out stories", ""]
    parts += [*by_criterion(rows, "llama", tasks, 1.258), "", "Layers removed:", ""]
    parts += [*by_criterion(rows, "llama", ("layers 1", "layers 2"), 1.258), ""]
    for subject in read("truth.json") or ():
        parts += [f"### Truth: Spearman correlation with the real change of the loss, {subject}", ""]
        parts += [*truth(read("truth.json"), subject), ""]
    if read("overhead.json"):
        parts += ["### What measuring costs", "", *overhead(read("overhead.json")), ""]
    page = put(PAGE.read_text(), BEGIN, END, parts)
    for name, tables in OWN.items():
        found = read(f"{name}.json")
        if found is not None:
            page = put(
                page, f"<!-- tables of {name}.json: begin -->", f"<!-- end of {name}.json -->", tables(found["rows"])
            )
    PAGE.write_text(page)


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
