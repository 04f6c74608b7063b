"""Report and record the decisions of a run, and replay them when the run is resumed."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from idap.compress.context import RunContext
from idap.compress.folder import profile_of
from idap.compress.state import Keep, State
from idap.divergence.measure import Divergence
from idap.errors import PlanError, RunFolderError, StructureError
from idap.progress import Status
from idap.record import BEFORE, STEPS, RunFolder, remedy
from idap.saving.checkpoint import load, save
from idap.steps import Contest, Curve, Removal, Step, numbers_of
from idap.structure.blocks import Block
from idap.structure.replacement import PROJECTION
from idap.training.processes import on_main

COST_NAMES = {"macs": "MACs", "parameters": "parameters", "size": "file size", "latency": "latency"}
"""The names of costs in messages."""


class Decision(NamedTuple):
    """The candidate that a decision accepts or rolls back.

    Attributes:
        state: the state that the step came to.
        removed: what the step removed.
        contest: of a layer with filters; None if they were not compared.
    """

    state: State
    removed: Sequence[Removal]
    contest: Contest | None = None


class Journal:
    """Reports the decisions of a run, and writes them to its folder.

    A run that goes on comes to the same decisions again, since everything random in it is seeded. A decision that was
    taken before the run was stopped is recalled, instead of measuring, cutting and training again.

    Args:
        context: of the run.
        baseline: metric of the original.
        past: decisions taken before the run was stopped, in order.
        preparation: seconds by kind of work before the first decision.
    """

    def __init__(
        self,
        context: RunContext,
        baseline: float,
        past: Sequence[Step] = (),
        preparation: Mapping[str, float] | None = None,
    ) -> None:
        self.preparation = dict(preparation or {})
        self._context = context
        self._baseline = baseline
        self._profile: tuple[float, ...] = ()
        self._past = list(past)
        self._turn = -1
        self._recalled = False
        self.steps: list[Step] = []

    def begin(self) -> None:
        """Begin a turn of a stage. Turns are counted, since a turn without decisions leaves no record."""
        self._turn += 1

    def is_stage_over(self, stage: str) -> bool:
        """Whether the stopped run took no more decisions in this turn: its next one is from a later turn or stage."""
        index = len(self.steps)
        if index >= len(self._past):
            return False
        return (self._past[index].stage, self._past[index].turn) != (stage, self._turn)

    def recall(self, stage: str, state: State) -> Decision | None:
        """The next decision, if it was taken before the run was stopped.

        Args:
            stage: the stage that takes the decision.
            state: the state from which the decision was taken.

        Returns:
            The recorded decision; None if it was not taken yet. A candidate that was rolled back has the model of
            `state`, since its own is not needed.

        Raises:
            RunFolderError: an earlier decision does not fit the run.
            CheckpointError: the accepted model can't be read.
        """
        index = len(self.steps)
        if index >= len(self._past) or self.is_stage_over(stage):
            return None
        found, context = self._past[index], self._context
        assert context.services.folder is not None
        try:
            keep, parts = self._replay(found, state)
            plan = context.subject.structure.plan(keep, parts)
        except (PlanError, StructureError) as error:
            file = context.services.folder.path / STEPS
            raise RunFolderError(
                f"line {index + 1} of {file} is a decision that does not fit the run: {error}. {remedy(file)}"
            ) from error
        model = self._load_model(context.services.folder.checkpoint(index)) if found.accepted else state.model
        cost, latency = context.subject.costs.cost(keep, parts), found.shares.get("latency")
        then = State(model, keep, parts, plan, cost, found.metric, found.error, latency, found.fault)
        self._recalled = True
        return Decision(then, found.removed, found.contest)

    def _load_model(self, checkpoint: Path) -> nn.Module:
        try:
            return load(checkpoint, self._context.subject.original)
        except PlanError as error:
            raise RunFolderError(
                f"the accepted state {checkpoint} does not fit the run: {error}. Delete its line and all after it "
                f"from {STEPS} to have those decisions taken again, or begin again in another folder."
            ) from error

    def _replay(self, found: Step, state: State) -> tuple[Keep, tuple[str, ...]]:
        """The units and the removed parts that a recorded decision came to from a state.

        Raises:
            PlanError, StructureError: it removes what the state does not have.
        """
        keep, parts = dict(state.keep), list(state.removed)
        for item in found.removed:
            if item.units:
                lacking = sorted(set(item.units) - set(keep.get(item.name, ())))
                if lacking:
                    raise PlanError(f"group {item.name!r} has no unit {lacking[0]} that could be removed")
                keep[item.name] = tuple(unit for unit in keep[item.name] if unit not in item.units)
            else:
                inside = self._context.subject.structure.block(item.name).contains
                parts = [*(name for name in parts if name not in inside), item.name]
        return keep, tuple(parts)

    def note(self, stage: str, decision: Decision, *, accepted: bool, reason: str) -> None:
        """Record one decision; an accepted state is saved before the decision is written.

        Raises:
            RunFolderError: the stopped run took another decision here.
        """
        index, state = len(self.steps), decision.state
        recalled, self._recalled = self._recalled, False
        if index < len(self._past) and not recalled:
            raise RunFolderError(
                f"decision {index} of the run is one of stage {self._past[index].stage!r}, and the run now comes to "
                f"one of stage {stage!r} there: the folder was changed, or written by another version. Begin again "
                "in another folder."
            )
        phases = self._past[index].phases if recalled else self._context.services.clock.take()
        step = Step(
            index=index,
            stage=stage,
            removed=tuple(decision.removed),
            macs=state.cost.macs,
            parameters=state.cost.parameters,
            metric=state.metric,
            fault=state.fault,
            accepted=accepted,
            reason=reason,
            error=state.error,
            seconds=self._past[index].seconds if recalled else sum(phases.values()),
            shares=self._context.shares(state),
            phases=phases,
            curve=self._past[index].curve if recalled else self._curve(),
            contest=decision.contest,
            turn=self._turn,
        )
        folder = self._context.services.folder
        if folder is not None and not recalled:
            on_main(partial(_write, folder, step, state))
        self.steps.append(step)
        shown = (
            "macs",
            "parameters",
            *(name for name in self._context.goals.budget.targets if name in ("size", "latency")),
        )
        told = describe(step, self._context.subject.task.metric_name, shown)
        self._context.services.progress.say(f"{told} (recalled)" if recalled else told)
        if accepted:
            self.show(stage, state)

    @property
    def is_at_start(self) -> bool:
        """Whether the next measurement is of the original and goes into the record of the run: it covers everything."""
        return self._context.services.folder is not None and not self.steps and not self._past

    def _curve(self) -> Curve | None:
        found = self._context.services.curves
        last = found[-1] if found else None
        found.clear()
        return last

    def show(self, stage: str, state: State, measured: Divergence | None = None) -> None:
        """Report where the run stands.

        Args:
            stage: the current stage.
            state: the last accepted one.
            measured: the divergence of `state`, if it was just measured.
        """
        context, budget = self._context, self._context.goals.budget
        if measured is not None and self.is_at_start:
            assert context.services.folder is not None
            profile = profile_of(measured, context.subject.structure, state.keep)
            on_main(partial(context.services.folder.keep, BEFORE, profile))
        if measured is not None and measured.units:
            order = [group.name for group in context.subject.structure.groups if group.name in measured.units]
            self._profile = tuple(float(measured.units[name][list(state.keep[name])].mean()) for name in order)
        shares = context.shares(state)
        shown = budget.targets or ("macs", "parameters")
        context.services.progress.show(
            Status(
                stage=stage,
                step=len(self.steps),
                accepted=sum(step.accepted for step in self.steps),
                profile=self._profile,
                costs={COST_NAMES[name]: (shares[name], budget.targets.get(name)) for name in shown},
                metric=state.metric,
                metric_name=context.subject.task.metric_name,
                baseline=self._baseline,
                worst=budget.worst,
                higher_is_better=budget.higher_is_better,
            )
        )


def _write(folder: RunFolder, step: Step, state: State) -> None:
    if step.accepted:
        save(folder.checkpoint(step.index), state.model, state.plan, exact=True)
    folder.add(step)


def block_removal(block: Block, score: float, rank: int, cost: float) -> Removal:
    """The record of a branch or block that a step removes."""
    return Removal(
        name=block.name,
        kind=block.kind,
        units=(),
        left=0,
        divergence=(score, score),
        scores=(score,),
        ranks=(rank,),
        cost=cost,
    )


def describe(step: Step, metric_name: str, costs: Sequence[str] = ("macs", "parameters")) -> str:
    """One line for people: what was removed, its divergence, some costs, the metric, the decision."""
    what = f"removed {_what(step.removed)}" if step.removed else "nothing removed"
    if step.removed:
        low = min(removal.divergence[0] for removal in step.removed)
        high = max(removal.divergence[1] for removal in step.removed)
        what += f", divergence {low:.2g}" if low == high else f", divergence {low:.2g} to {high:.2g}"
    left = " | ".join(f"{COST_NAMES[name]} {step.shares[name]:.1%}" for name in costs)
    verdict = "accepted" if step.accepted else "rolled back"
    return f"{step.stage} {step.index}: {what} | {left} | {metric_name} {step.metric:.4f} | {verdict}: {step.reason}"


def _what(removed: Sequence[Removal]) -> str:
    counts: dict[str, int] = {}
    parts = [
        f"block {removal.name} (now a projection)" if removal.kind == PROJECTION else f"{removal.kind} {removal.name}"
        for removal in removed
        if not removal.units
    ]
    groups = [removal for removal in removed if removal.units]
    for removal in groups:
        counts[removal.kind] = counts.get(removal.kind, 0) + len(removal.units)
    if groups:
        units = " + ".join(f"{count} {numbers_of(kind, count)}" for kind, count in counts.items())
        parts.insert(0, f"{units} in {len(groups)} {'group' if len(groups) == 1 else 'groups'}")
    return ", ".join(parts)
