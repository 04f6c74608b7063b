"""Tables of the result files with places of their own in docs/results.md, from as many rows as there are."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*titles: str) -> list[str]:
    return [line(*titles), line(*["---"] * len(titles))]


def mean(rows: Sequence[Row], value: Callable[[Row], float], digits: int = 2) -> str:
    """The mean over rows that differ in their seed, with the standard deviation where there are several."""
    values = [value(row) for row in rows]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def contest(rows: Sequence[Row]) -> list[str]:
    """One table for each network, cost and protocol: every method that was measured there, the best one first."""
    found: list[str] = []
    keys = ("network", "target", "protocol")
    measured: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["target"] != "original":
            measured.setdefault(tuple(row[key] for key in keys), []).append(row)
    for way in sorted(measured, key=lambda of: (of[0] != "resnet56", of[1:])):
        (network, target, protocol), mine = way, measured[way]
        uncut = [row for row in rows if (row["network"], row["target"]) == (network, "original")]
        whole = next(row["accuracy"] for row in uncut if row["method"] == "original")
        same = (row for row in uncut if row["method"] == "original, trained" and row["protocol"] == protocol)
        trained = next((f" ({row['accuracy']:.2f} % after the recovery of all rows)" for row in same), "")
        _, _, apart = protocol.partition(", ")
        found += [f"#### {network}, {target} of the MACs, original {whole:.2f} %{trained}{apart and f', {apart}'}", ""]
        titles = ("method", "seeds", "MACs", "parameters", "cut", "recovered", "faster, batch 1 / 64")
        found += head(*titles, "cut, s", "recovery, s", "peak, GiB")
        methods = {name: [row for row in mine if row["method"] == name] for name in {row["method"] for row in mine}}
        ordered = sorted(methods, key=lambda name: -statistics.mean(row["after"] for row in methods[name]))
        found += [*(_method(name, methods[name]) for name in ordered), ""]
    return found


def _faster(row: Row, batch: str) -> float:
    """By processor time; on a GPU by wall-clock time."""
    found: float = row["latency_ms"][batch].get("processor_ratio", row["latency_ms"][batch]["ratio"])
    return found


def _seconds(row: Row, part: str) -> float:
    """Processor time; on a GPU wall-clock time."""
    found: float = row[part]["seconds" if row["protocol"] == "gpu" else "processor_s"]
    return found


def _method(name: str, rows: Sequence[Row]) -> str:
    faster = " / ".join(mean(rows, lambda row, b=batch: _faster(row, b)) for batch in ("1", "64"))
    return line(
        name,
        len(rows),
        f"{mean(rows, lambda row: row['macs_ratio'])}x fewer",
        f"{mean(rows, lambda row: row['parameters_ratio'])}x fewer",
        mean(rows, lambda row: row["before"]),
        f"**{mean(rows, lambda row: row['after'])}**",
        faster,
        mean(rows, lambda row: _seconds(row, "compression"), 0),
        mean(rows, lambda row: _seconds(row, "recovery"), 0),
        mean(rows, lambda row: row["compression"]["peak_gib"]),
    )


def ablation(rows: Sequence[Row]) -> list[str]:
    """One table: the defaults first, then the settings of each question."""
    found = head("question", "setting", "seeds", "MACs", "cut", "recovered", "cut, s")
    for question, setting in dict.fromkeys((row["question"], row["setting"]) for row in _by_question(rows)):
        some = [row for row in rows if (row["question"], row["setting"]) == (question, setting)]
        found.append(
            line(
                "" if question == setting else question,
                setting,
                len(some),
                f"{mean(some, lambda row: row['macs_ratio'])}x fewer",
                mean(some, lambda row: row["before"]),
                f"**{mean(some, lambda row: row['after'])}**",
                mean(some, lambda row: row["compression"]["processor_s"], 0),
            )
        )
    return found


def _by_question(rows: Sequence[Row]) -> list[Row]:
    order = list(dict.fromkeys(row["question"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["question"]))


def kinds(rows: Sequence[Row]) -> list[str]:
    """One table: what both stages made of each network."""
    titles = ("network", "accuracy", "cut", "recovered", "MACs", "parameters", "ms, batch 1", "ms, batch 64")
    found = head(*titles, "filters removed", "layers removed")
    for row in rows:
        whole, times = row["original"], row["latency_ms"]
        latency = [
            f"{times[b]['processor']['original']:.2f} → {times[b]['processor']['compressed']:.2f}" for b in ("1", "64")
        ]
        units = row["stages"].get("filters", {}).get("units", {})
        parts = [part for stage in row["stages"].values() for part in stage["parts"]]
        found.append(
            line(
                row["network"],
                f"{whole['accuracy']:.2f}",
                f"{row['before']:.2f}",
                f"**{row['after']:.2f}**",
                f"{whole['macs']:,} → {row['macs']:,}",
                f"{whole['parameters']:,} → {row['parameters']:,}",
                *latency,
                ", ".join(f"{count} {kind}" for kind, count in units.items()) or "none",
                ", ".join(f"`{part}`" for part in parts) or "none",
            )
        )
    return found


def repeated(rows: Sequence[Row]) -> list[str]:
    """Several cuts beside one, from the original's weights or from corrected ones."""
    found = head("criterion", "groups", "steps", "from the original's weights", "from what the last correction left")
    keys = ("criterion", "groups", "schedule")
    for way in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = [row for row in rows if tuple(row[key] for key in keys) == way]
        cells = []
        for weights in ("original", "piled up"):
            some = [row for row in mine if row["weights"] == weights]
            cells.append(mean(some, lambda row: row["accuracy"]) if some else "")
        found.append(line(*way, *cells))
    return [*found, ""]


def latencies(rows: Sequence[Row]) -> list[str]:
    """Multiply-adds and latency that are left, and their quotient."""
    found = head("network", "batch", "ranked by", "MACs left", "latency left", "efficiency", "original, ms", "cut, ms")
    for row in rows:
        shares = [f"{row[name]:.2f}" for name in ("macs", "latency", "efficiency")]
        found.append(line(row["network"], row["batch"], row["ranking"], *shares, row["original_ms"], row["cut_ms"]))
    for ranking in dict.fromkeys(row["ranking"] for row in rows):
        values = [row["efficiency"] for row in rows if row["ranking"] == ranking]
        found += ["", f"Median efficiency, ranked by {ranking}: {statistics.median(values):.2f} ({len(values)} rows)."]
    return [*found, ""]


def equal_latency(rows: Sequence[Row]) -> list[str]:
    """What is kept at one latency, by what units are counted in."""
    ways = list(dict.fromkeys(way for row in rows for way in row["kept"]))
    found = head("network", "batch", "latency", "kept is", "original", *ways)
    for row in rows:
        digits = 2 if row["measure"] == "accuracy" else 4
        kept = [f"{row['kept'][way]:.{digits}f}" if way in row["kept"] else "" for way in ways]
        original = f"{row['original']:.{digits}f}"
        found.append(line(row["network"], row["batch"], f"{row['share']:g}", row["measure"], original, *kept))
    ahead = sum(max(kept for way, kept in row["kept"].items() if way != "macs") > row["kept"]["macs"] for row in rows)
    return [*found, "", f"A way with the latency table keeps more in {ahead} of {len(rows)} rows.", ""]


def saving(rows: Sequence[Row]) -> list[str]:
    """Seconds to save and to load."""
    names = ("megabytes", "save_s", "load_s", "save_and_load_s", "load_meta_s", "build_s")
    titles = ("network", "MB", "save", "load", "both", "load on meta", "build the original")
    return [*head(*titles), *(line(row["network"], *(row[name] for name in names)) for row in rows), ""]


def phases(rows: Sequence[Row]) -> list[str]:
    """Shares of a run's time by kind of work."""
    kinds_of_work = list(dict.fromkeys(kind for row in rows for kind in row["seconds"]))
    found = head("recovery after each change", "seconds", *kinds_of_work, "work of our own")
    for row in rows:
        whole = sum(row["seconds"].values())
        shares = [f"{100 * row['seconds'].get(kind, 0.0) / whole:.1f} %" for kind in kinds_of_work]
        title = f"{row['images']:,} images" if row["images"] else "none"
        found.append(line(title, f"{whole:.0f}", *shares, f"**{100 * row['own_share']:.1f} %**"))
    return [*found, ""]


def temperatures(rows: Sequence[Row]) -> list[str]:
    """Accuracy after a recovery by temperature, for each method."""
    values = list(dict.fromkeys(row["temperature"] for row in rows))
    found = head("method", "cut", *(f"T = {value:g}" for value in values))
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [[row for row in mine if row["temperature"] == value] for value in values]
        recovered = [mean(some, lambda row: row["after"]) if some else "" for some in cells]
        found.append(line(method, mean(mine[:1], lambda row: row["before"]), *recovered))
    return [*found, ""]
