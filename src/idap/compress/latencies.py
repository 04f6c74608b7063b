"""What a unit costs in seconds on this machine: the time that half of its group saves, divided by the units."""

from collections.abc import Mapping, Sequence

from torch import nn

from idap.cost.latency import measure_latency
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan
from idap.training.batch import Inputs

REPEATS = 15


def unit_latencies(
    original: nn.Module,
    structure: Structure,
    example: Inputs,
    keep: Mapping[str, Sequence[int]],
    removed: Sequence[str],
    *,
    repeats: int = REPEATS,
) -> dict[str, float]:
    """Time one forward pass with each group in turn cut to half of what it has.

    Args:
        original: is not changed; its copies are cut and timed.
        structure: of the original.
        example: inputs for one pass.
        keep: group name -> units that it has.
        removed: branches and blocks that are gone.
        repeats: timed passes of each variant.

    Returns:
        Group name -> seconds that one unit of it takes; a thousandth of the mean where no difference can be measured.
    """
    args, kwargs = example
    whole = apply_plan(original, structure.plan(keep, removed))
    found = {}
    for group in structure.groups:
        units = list(keep.get(group.name, range(group.size)))
        half = units[: max(1, len(units) // 2)]
        gone = len(units) - len(half)
        if not gone:
            continue
        smaller = apply_plan(original, structure.plan({**keep, group.name: half}, removed))
        times = measure_latency({"whole": whole, "half": smaller}, args, kwargs, repeats=repeats)
        found[group.name] = (times["whole"].median - times["half"].median) / gone
    mean = sum(max(0.0, seconds) for seconds in found.values()) / max(1, len(found))
    return {name: max(seconds, mean / 1000, 1e-12) for name, seconds in found.items()}
