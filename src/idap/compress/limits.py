"""Find out what can be cut, by trying cuts on the real model, and how small the costs can become."""

from collections.abc import Sequence
from dataclasses import replace
from glob import escape

from torch import nn

from idap.compress.budget import shares_of
from idap.compress.config import Config
from idap.compress.latency_table import least_share
from idap.compress.stages.choice import least_units
from idap.cost.count import CostModel
from idap.errors import PlanError, VerificationError
from idap.progress import Progress
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan
from idap.surgery.stand_ins import trial_map
from idap.surgery.verify import training_failure, verify
from idap.training.batch import Inputs


def smallest_shares(
    original: nn.Module,
    structure: Structure,
    costs: CostModel,
    config: Config,
    removable: Sequence[str],
    timed: Inputs,
    latency: float | None,
) -> dict[str, float]:
    """What is left of each cost when all that the settings allow is removed; latency only if it is a goal.

    Args:
        original: is not changed.
        structure: of it.
        costs: of it.
        config: of the run.
        removable: blocks that may be removed.
        timed: inputs whose latency counts.
        latency: of that model, as measured before the run was stopped; None: it is measured if it is a goal.
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


class TrainingFailure(VerificationError):  # noqa: N818 - the cut is right
    """A cut is what was planned, but code that only training runs fails on the cut model."""


def verify_cuts(
    original: nn.Module, structure: Structure, example: Inputs, progress: Progress, config: Config
) -> tuple[list[str], Config]:
    """Verify a cut of all groups at once, and the removal of each block by itself.

    Code that only training runs is not in the structure. Groups whose cut makes it fail stay whole, and are reported.

    Returns:
        The branches and blocks that may be removed, of the kinds that are wanted, and the settings, with groups that
        must stay whole. Blocks whose removal could not be verified are reported.

    Raises:
        VerificationError: a group's cut is not what was planned; names the group.
    """
    trial = _Trial(original, structure, example)
    halves = {group.name: tuple(range(0, group.size, 2)) for group in structure.groups}
    whole = []
    try:
        trial.cut(halves, ())
    except (VerificationError, PlanError):
        for name, units in halves.items():
            try:
                trial.cut({name: units}, ())
            except TrainingFailure as error:
                progress.say(f"Group {name} stays whole: {error}")
                whole.append(name)
        if not whole:
            raise
        trial.cut({name: units for name, units in halves.items() if name not in whole}, ())
    removable = []
    for block in structure.blocks:
        if config.layers.parts == "blocks" and block.kind == "branch":
            continue
        try:
            trial.cut({}, (block.name,))
            removable.append(block.name)
        except (VerificationError, PlanError) as error:
            progress.say(f"{block.kind} {block.name} is kept: {error}")
    return removable, _keep_whole(config, whole)


class _Trial:
    """Tries cuts, and throws the cut models away."""

    def __init__(self, original: nn.Module, structure: Structure, example: Inputs) -> None:
        self._original, self._structure, self._example = original, structure, example
        self._trains = not training_failure(original, *example)

    def cut(self, keep: dict[str, tuple[int, ...]], removed: tuple[str, ...]) -> None:
        """Verify a cut, and run the cut model in training mode if the original runs there.

        Raises:
            VerificationError, PlanError: the cut is not what was planned.
            TrainingFailure: it is what was planned, but code that only training runs fails.
        """
        plan = self._structure.plan(keep, removed)
        maps = {path: trial_map(projected) for path, projected in plan.projections.items()}
        small = apply_plan(self._original, plan, maps)
        verify(self._structure, self._original, small, plan, self._example, maps=maps)
        failure = training_failure(small, *self._example) if self._trains else ""
        if failure:
            raise TrainingFailure(f"the cut model fails in training, where its code does more: {failure}")


def _keep_whole(config: Config, groups: Sequence[str]) -> Config:
    """The settings with groups of which nothing may be removed."""
    keep = {**config.filters.keep, **{escape(name): 1.0 for name in groups}}
    return replace(config, filters=replace(config.filters, keep=keep)) if groups else config
