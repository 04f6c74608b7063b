"""Try the structure on the real model before hours of work, so that what can't be cut is known before it is chosen."""

from collections.abc import Sequence
from dataclasses import replace
from glob import escape

from torch import nn

from idap.compress.config import Config
from idap.errors import PlanError, VerificationError
from idap.progress import Progress
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan
from idap.surgery.bypass import trial_map
from idap.surgery.training import training_failure
from idap.surgery.verify import verify
from idap.training.batch import Inputs


class TrainingFailure(VerificationError):  # noqa: N818 - the cut is right
    """A cut is what was planned, but code that only training runs fails with it."""


def proved(
    original: nn.Module, structure: Structure, example: Inputs, progress: Progress, config: Config
) -> tuple[list[str], Config]:
    """Cut every group at once, and remove every block singly.

    Code that only training runs is not in the structure. What makes it fail stays whole, and is reported.

    Returns:
        The branches and blocks that may be removed, of the kinds that are wanted, and the settings, with groups that
        must stay whole. Blocks whose removal could not be proved are reported.

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
            progress.say(f"{block.kind} {block.name} stays: {error}")
    return removable, _keeping_whole(config, whole)


class _Trial:
    """Cuts that are tried and thrown away."""

    def __init__(self, original: nn.Module, structure: Structure, example: Inputs) -> None:
        self._original, self._structure, self._example = original, structure, example
        self._trains = not training_failure(original, *example)

    def cut(self, keep: dict[str, tuple[int, ...]], removed: tuple[str, ...]) -> None:
        """Prove a cut, and run it in training mode where the original runs there.

        Raises:
            VerificationError, PlanError: it is not what was planned.
            TrainingFailure: it is, but code that only training runs fails.
        """
        plan = self._structure.plan(keep, removed)
        maps = {path: trial_map(projected) for path, projected in plan.projections.items()}
        small = apply_plan(self._original, plan, maps)
        verify(self._structure, self._original, small, plan, self._example, maps=maps)
        failure = training_failure(small, *self._example) if self._trains else ""
        if failure:
            raise TrainingFailure(f"the smaller model fails in training, where its code does more: {failure}")


def _keeping_whole(config: Config, groups: Sequence[str]) -> Config:
    """The settings with groups of which nothing may go."""
    keep = {**config.filters.keep, **{escape(name): 1.0 for name in groups}}
    return replace(config, filters=replace(config.filters, keep=keep)) if groups else config
