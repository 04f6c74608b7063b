"""Tables of docs/results.md about criteria and corrections: criteria.json, exchange.json, truth.json, overhead.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.compression_tables import Row, head, line, mean

HALF, THIRD = "inner macs 1/2", "inner macs 1/3"
SHARES = {HALF: "half of the MACs", THIRD: "a third of the MACs"}
RESNETS = {"resnet56": "ResNet-56", "resnet20": "ResNet-20"}
SQUARES = "least squares"
WAYS = {
    "p = 0": {"ranking": "global", "power": 0.0},
    "p = 0.5": {"ranking": "global", "power": 0.5},
    "p = 1": {"ranking": "global", "power": 1.0},
    "uniform": {"ranking": "uniform", "power": 0.0},
}
CALIBRATION = (256, 512, 1024)


def chosen(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows with these values; a tuple stands for any of its values."""
    return [
        row
        for row in rows
        if all(row[name] in value if isinstance(value, tuple) else row[name] == value for name, value in wanted.items())
    ]


def quality(rows: Sequence[Row]) -> str:
    """Mean and deviation over seeds, nothing where nothing was measured."""
    return mean(rows, lambda row: row["quality"]) if rows else ""


def names(rows: Sequence[Row]) -> list[str]:
    """Criteria in the order in which they were measured."""
    return list(dict.fromkeys(row["criterion"] for row in rows))


def criteria(rows: Sequence[Row]) -> list[str]:
    """All tables of criteria.json that have rows."""
    parts: dict[str, list[str]] = {}
    for subject, title in RESNETS.items():
        mine = chosen(rows, subject=subject)
        once = chosen(mine, cuts=1)
        parts |= {
            f"{title}, default settings, by calibration": defaults(once),
            f"{title}, Torch-Pruning 1.6.1's criteria with our corrections": peers(once),
            f"{title}, every criterion, after least squares": cross(once),
            f"{title}, by calibration images: mean and spread over seeds": draws(once),
            f"{title}, corrections": corrections(once),
            f"{title}, channels of the stream and blocks as well": depth(mine),
            f"{title}, one cut or three with re-measuring, each corrected, a third of the MACs": repeated(mine),
        }
    tasks = ("neurons 50 %", "neurons 25 %", "heads 50 %", "heads 25 %")
    title = "CIFAR-10 ViT, share that stays, plain / least squares, accuracy"
    parts[title] = plain_and_corrected(chosen(rows, subject="vit"), tasks, 73.72)
    llama = chosen(rows, subject="llama")
    tasks = ("neurons 75 %", "neurons 50 %", "heads 75 %", "heads 50 %")
    title = "Small Llama, share that stays, plain / least squares, loss per token on held-out stories"
    parts[title] = plain_and_corrected(llama, tasks, 1.258)
    parts["Small Llama, layers removed, likewise"] = plain_and_corrected(llama, ("layers 1", "layers 2"), 1.258)
    return [text for title, table in parts.items() if len(table) > 2 for text in (f"### {title}", "", *table, "")]


def defaults(rows: Sequence[Row]) -> list[str]:
    """The default criterion by calibration images and power."""
    found = head("calibration images", "p", "seeds", *SHARES.values())
    mine = chosen(rows, criterion="innovation", ranking="global", corrected=SQUARES)
    for samples in CALIBRATION:
        for power in (0.0, 1.0):
            some = chosen(mine, samples=samples, power=power, task=tuple(SHARES))
            if len({row["seed"] for row in some}) > 1:
                cells = [quality(chosen(some, task=task)) for task in SHARES]
                found.append(line(samples, f"{power:g}", len({row["seed"] for row in some}), *cells))
    return found


def peers(rows: Sequence[Row]) -> list[str]:
    """Ours beside theirs; nothing where theirs weren't measured."""
    mine = chosen(rows, corrected=SQUARES, samples=512, seed=0, power=0.0)
    theirs = [name for name in names(mine) if name.startswith("torch-pruning")]
    found = head("criterion", "ranking", *SHARES.values())
    for name in ["innovation", *theirs] if theirs else []:
        for ranking in ("global", "uniform"):
            cells = [quality(chosen(mine, criterion=name, ranking=ranking, task=task)) for task in SHARES]
            if any(cells) and (name in theirs or ranking == "global"):
                found.append(line(f"`{name}` (idap)" if name == "innovation" else name, ranking, *cells))
    return found


def cross(rows: Sequence[Row]) -> list[str]:
    """Criteria by power and ranking at both costs."""
    mine = chosen(rows, corrected=SQUARES, samples=512, seed=0, task=tuple(SHARES))
    own = [name for name in names(mine) if not name.startswith("torch-pruning")]
    found = head("criterion", *(f"{task.split()[-1]}, {way}" for task in SHARES for way in WAYS))
    for name in own:
        cells = [quality(chosen(mine, criterion=name, task=task, **way)) for task in SHARES for way in WAYS.values()]
        found.append(line(f"`{name}`", *cells))
    return found


def draws(rows: Sequence[Row]) -> list[str]:
    """Criteria of which several seeds were measured with the same power, by calibration images."""
    found = head("criterion", "p", *(f"{share.split()[-1]}, {samples}" for share in SHARES for samples in CALIBRATION))
    mine = chosen(rows, corrected=SQUARES, ranking="global", task=tuple(SHARES))
    for name, power in dict.fromkeys((row["criterion"], row["power"]) for row in mine if row["seed"] > 0):
        some = chosen(mine, criterion=name, power=power)
        cells = [quality(chosen(some, task=task, samples=samples)) for task in SHARES for samples in CALIBRATION]
        found.append(line(f"`{name}`", f"{power:g}", *cells))
    return found


def corrections(rows: Sequence[Row]) -> list[str]:
    """Criteria, and what was corrected, at both costs."""
    mine = chosen(rows, ranking="global", samples=512, seed=0, task=tuple(SHARES))
    kinds = list(dict.fromkeys(row["corrected"] for row in mine if row["corrected"] != SQUARES))
    found = head("criterion", "MACs", *kinds, SQUARES)
    for name, power in dict.fromkeys((row["criterion"], row["power"]) for row in mine if row["corrected"] in kinds):
        for task in SHARES:
            some = chosen(mine, criterion=name, power=power, task=task)
            cells = [quality(chosen(some, corrected=kind)) for kind in (*kinds, SQUARES)]
            found.append(line(f"`{name}`, p = {power:g}", task.split()[-1], *cells))
    return found


def depth(rows: Sequence[Row]) -> list[str]:
    """Cuts that may take channels of the residual stream, and blocks."""
    found = head("may go", "criterion", "p", "1/2", "1/3")
    for kind, title in (("all", "all channels"), ("blocks", "all channels and blocks")):
        tasks = (f"{kind} macs 1/2", f"{kind} macs 1/3")
        mine = chosen(rows, task=tasks)
        for name, power in dict.fromkeys((row["criterion"], row["power"]) for row in mine):
            some = chosen(mine, criterion=name, power=power)
            found.append(line(title, f"`{name}`", f"{power:g}", *(quality(chosen(some, task=task)) for task in tasks)))
    return found


def repeated(rows: Sequence[Row]) -> list[str]:
    """One cut against several, over the seeds that were measured with both."""
    mine = chosen(rows, task=THIRD, corrected=SQUARES, ranking="global", power=0.0, samples=512)
    found = head("criterion", "seeds", "1 cut", "3 cuts")
    for name in names(chosen(mine, cuts=3)):
        some = chosen(mine, criterion=name)
        seeds = {row["seed"] for row in chosen(some, cuts=3)} & {row["seed"] for row in chosen(some, cuts=1)}
        cells = [quality(chosen(some, cuts=cuts, seed=tuple(seeds))) for cuts in (1, 3)]
        found.append(line(f"`{name}`", len(seeds), *cells))
    return found


def exchange(rows: Sequence[Row]) -> list[str]:
    """Ways to divide a cut among the groups, over seeds."""
    found = head("network", "divided by", "p", "seeds", *SHARES.values(), "more processor time, s")
    keys = ("subject", "divided by", "power")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        mine = chosen(rows, **dict(zip(keys, key, strict=True)))
        cells = [quality(chosen(mine, task=task)) for task in SHARES]
        subject, way, power = key
        seeds = len({row["seed"] for row in mine})
        found.append(line(RESNETS[subject], way, f"{power:g}", seeds, *cells, mean(mine, lambda row: row["more_s"], 0)))
    return found


def plain_and_corrected(rows: Sequence[Row], tasks: Sequence[str], base: float) -> list[str]:
    """Criteria by task, without corrections and after least squares."""
    mine = chosen(rows, seed=0, cuts=1, task=tuple(tasks))
    found = head("criterion", *tasks)
    for name in names(mine):
        some = chosen(mine, criterion=name)
        kinds = [[quality(chosen(some, task=task, corrected=kind)) for kind in ("none", SQUARES)] for task in tasks]
        found.append(line(f"`{name}`", *(" / ".join(cells) for cells in kinds)))
    if mine:
        found.append(line("untouched", *[f"{base:g}"] * len(tasks)))
    return found


def truth(found: Mapping[str, Any]) -> list[str]:
    """Correlations of each network by criterion, then of single units by calibration images."""
    kinds = ("units plain", "units compensated", "blocks plain", "blocks compensated")
    lines: list[str] = []
    for subject, of in found.items():
        rows = of["correlations"]
        table, sizes = head("criterion", *kinds), sorted({row["samples"] for row in rows})
        by_size = head("criterion", *(f"{size} images" for size in sizes))
        for name in names(rows):
            mine = chosen(rows, criterion=name)
            table.append(line(f"`{name}`", *(_range(mine, kind) for kind in kinds)))
            by_size.append(line(f"`{name}`", *(_range(chosen(mine, samples=size), kinds[0]) for size in sizes)))
        lines += [f"### Truth: Spearman correlation with the real change of the loss, {subject}", "", *table, ""]
        lines += [f"### The same for units, plain, by calibration images, {subject}", "", *by_size, ""]
    return lines


def _range(rows: Sequence[Row], kind: str) -> str:
    values = [row[kind] for row in rows if row[kind] is not None]
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "–"


def overhead(rows: Sequence[Row]) -> list[str]:
    """What measuring costs beside the plain passes."""
    table = head("model", "plain passes", "all forward criteria", "peak memory", "innovation, 512 images", "its peak")
    for row in rows:
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
