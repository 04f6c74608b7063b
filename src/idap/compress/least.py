"""What is left of each cost when all goes that may go: targets below that are out of reach."""

from collections.abc import Sequence

from torch import nn

from idap.compress.budget import shares_of
from idap.compress.config import Config
from idap.compress.latencies import least_share
from idap.compress.ranking import least_units
from idap.cost.count import CostModel
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan
from idap.training.batch import Inputs


def least_shares(
    original: nn.Module,
    structure: Structure,
    costs: CostModel,
    config: Config,
    removable: Sequence[str],
    timed: Inputs,
    latency: float | None,
) -> dict[str, float]:
    """What is left of each cost when all goes that the settings let go; latency only where it is a goal.

    Args:
        original: is not changed.
        structure: of it.
        costs: of it.
        config: of the run.
        removable: blocks that may go.
        timed: inputs whose latency counts.
        latency: as it was measured before, in a run that goes on.
    """
    keep = {group.name: tuple(range(group.size)) for group in structure.groups}
    whole = costs.cost(keep)
    if config.filters.steps:
        keep = {name: tuple(range(count)) for name, count in least_units(structure, config.filters).items()}
    removed: list[str] = []
    if config.layers.removals:
        blocks = [structure.block(name) for name in removable]
        inside = {inner for block in blocks for inner in block.contains}
        for block in blocks:  # a projection may cost more than a narrow block
            free = block.projected is None or costs.block_macs(block.name, keep, removed) > 0
            removed += [block.name] if free and block.name not in inside else []
    found = shares_of(costs.cost(keep, removed), whole)
    if config.latency is None:
        return found
    if latency is None:
        smallest = apply_plan(original, structure.plan(keep, removed))
        latency = least_share(original, smallest, timed, config.latency)
    return {**found, "latency": latency}
