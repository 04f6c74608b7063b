"""What a reader of docs/results.md sees first: each method's accuracy by network and cost, as cut and as recovered."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.compression_tables import Row, head, line
from benchmarks.criteria_tables import RESNETS, SHARES, SQUARES, chosen, names, quality
from idap.compress.config import PER_COST

TARGETS = ("1/2.1", "1/3")
PROTOCOL, EARLIER = "cpu", "cpu, no average"
"""The protocol of today, and the one before the average of weights was judged too."""
METHODS = {
    "idap: defaults": "idap, defaults",
    "idap: filters": "idap, filters alone",
    "idap: layers": "idap, layers alone",
    "torch-pruning fpgm": "Torch-Pruning, FPGM",
    "torch-pruning magnitude_l2": "Torch-Pruning, L2",
    "torch-pruning taylor": "Torch-Pruning, Taylor",
    "torch-pruning bn_scale": "Torch-Pruning, norm scales",
    "uniform L2": "L2, the same share of each layer",
    "random": "random channels",
    "small: narrow": "narrow network from random weights",
}
"""Method in compress_cifar.json -> what a reader calls it."""


@dataclass(frozen=True)
class Point:
    """One method at one cost, mean over its seeds.

    Attributes:
        macs_ratio: how many times fewer multiply-adds are left.
        cut: accuracy before any training, in percent.
        recovered: accuracy after the recovery.
        seeds: how many.
        earlier: whether only the earlier protocol has it.
    """

    macs_ratio: float
    cut: float
    recovered: float
    seeds: int
    earlier: bool


def point(rows: Sequence[Row], network: str, target: str, method: str) -> Point | None:
    """A method at a cost by today's protocol, else by the earlier one; None if neither has it."""
    for protocol in (PROTOCOL, EARLIER):
        found = chosen(rows, network=network, target=target, method=method, protocol=protocol)
        if found:
            means = [statistics.mean(row[name] for row in found) for name in ("macs_ratio", "before", "after")]
            return Point(*means, seeds=len(found), earlier=protocol == EARLIER)
    return None


def original(rows: Sequence[Row], network: str) -> float:
    """Accuracy of the network before the cut."""
    found: float = chosen(rows, network=network, method="original")[0]["accuracy"]
    return found


def headline(rows: Sequence[Row]) -> list[str]:
    """One table: a line for each method, a column for each network and cost."""
    places = [(network, target) for network in RESNETS for target in TARGETS]
    found = head("method", *(f"{RESNETS[network]}, {target} of the MACs" for network, target in places))
    for method, title in METHODS.items():
        points = [point(rows, network, target, method) for network, target in places]
        found.append(line(title, *(cell(each) for each in points)))
    return [*found, line("original", *(f"{original(rows, network):.1f}" for network, _ in places)), ""]


def cell(of: Point | None) -> str:
    """Accuracy as cut and as recovered."""
    return "–" if of is None else f"{of.cut:.1f} → **{of.recovered:.1f}**{' †' if of.earlier else ''}"


def criteria(rows: Sequence[Row], theirs: int = 4) -> list[str]:
    """Own criteria as they rank by default, and the best of Torch-Pruning's, all corrected by least squares."""
    same = chosen(rows, corrected=SQUARES, samples=512, cuts=1, task=tuple(SHARES), subject=tuple(RESNETS))
    places = [{"subject": subject, "task": task} for subject in RESNETS for task in SHARES]
    titles = [f"{RESNETS[place['subject']]}, {place['task'].split()[-1]}" for place in places]
    found = head("criterion", "ranking", *titles)
    mine = chosen(same, ranking="global", criterion=tuple(n for n in names(same) if not n.startswith("torch-pruning")))
    own = [name for name in names(mine) if _defaults(mine, name)]
    for name in sorted(own, key=lambda name: -_mean(_defaults(mine, name), places)):
        power = "score per MAC" if name in PER_COST else "score"
        found.append(line(f"`{name}`", power, *(quality(chosen(_defaults(mine, name), **place)) for place in places)))
    rivals = {name: chosen(same, criterion=name) for name in names(same) if name.startswith("torch-pruning")}
    complete = {name: some for name, some in rivals.items() if all(chosen(some, **place) for place in places)}
    for name in sorted(complete, key=lambda name: -_best(complete[name], places))[:theirs]:
        cells = [max(row["quality"] for row in chosen(complete[name], **place)) for place in places]
        found.append(line(name, "the better of two", *(f"{value:.2f}" for value in cells)))
    return [*found, ""]


def _defaults(rows: Iterable[Row], name: str) -> list[Row]:
    return chosen(list(rows), criterion=name, power=1.0 if name in PER_COST else 0.0)


def _mean(rows: Sequence[Row], places: Sequence[Mapping[str, str]]) -> float:
    return sum(statistics.mean(row["quality"] for row in chosen(rows, **place)) for place in places)


def _best(rows: Sequence[Row], places: Sequence[Mapping[str, str]]) -> float:
    return sum(max(row["quality"] for row in chosen(rows, **place)) for place in places)


def corrections(rows: Sequence[Row], criterion: str = "innovation") -> list[str]:
    """One criterion by what was corrected after the cut."""
    same = chosen(rows, criterion=criterion, ranking="global", power=0.0, samples=512, seed=0, cuts=1)
    places = [{"subject": subject, "task": task} for subject in RESNETS for task in SHARES]
    found = head("corrected", *(f"{RESNETS[place['subject']]}, {place['task'].split()[-1]}" for place in places))
    kinds = [kind for kind in dict.fromkeys(row["corrected"] for row in same) if kind != SQUARES]
    for kind in (*kinds, SQUARES):
        found.append(line(kind, *(quality(chosen(same, corrected=kind, **place)) for place in places)))
    return [*found, ""]
