"""The decisions of a run: told to whoever listens, written down, and recalled when a stopped run goes on."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from idap.compress.state import Setting, State
from idap.cost.count import Cost
from idap.errors import RunFolderError
from idap.record import Removal, Step
from idap.saving.checkpoint import load, save


class Journal:
    """Tells the decisions of a run to whoever listens, and writes them down.

    A run that goes on takes the same way again, since everything random in it is seeded; where it comes to a decision
    that was taken before, it recalls it instead of measuring, cutting and training anew.

    Args:
        setting: of the run.
        start: cost of the original.
        past: decisions taken before the run was stopped, in order.
    """

    def __init__(self, setting: Setting, start: Cost, past: Sequence[Mapping[str, Any]] = ()) -> None:
        self._setting = setting
        self._start = start
        self._since = time.monotonic()
        self._past = list(past)
        self.steps: list[Step] = []

    def recall(self, stage: str, state: State) -> tuple[State, list[Removal]] | None:
        """The next decision, if it was taken before the run was stopped.

        Args:
            stage: which asks.
            state: from which the decision was taken.

        Returns:
            The candidate of then and what it lost; None if the decision is yet to be taken. The model of a candidate
            that was rejected is that of `state`: it is not needed.

        Raises:
            RunFolderError: an earlier decision does not fit the run.
            CheckpointError: the accepted model can't be read.
        """
        index = len(self.steps)
        if index >= len(self._past) or self._past[index]["stage"] != stage:
            return None
        found = self._past[index]
        removed = [_removal(item) for item in found["removed"]]
        setting = self._setting
        gone = {item.name: set(item.units) for item in removed if item.units}
        unknown = sorted(set(gone) - set(state.keep))
        if unknown or found["index"] != index:
            why = f"there is no group {unknown[0]!r}" if unknown else f"it is number {found['index']}, not {index}"
            raise RunFolderError(f"a decision of the run does not fit it: {why}. Begin anew in another folder.")
        keep = {
            name: tuple(unit for unit in units if unit not in gone.get(name, ())) for name, units in state.keep.items()
        }
        parts = list(state.removed)
        for item in removed:
            if not item.units:
                parts = [name for name in parts if name not in setting.structure.block(item.name).contains]
                parts.append(item.name)
        plan = setting.structure.plan(keep, tuple(parts))
        model = state.model
        if found["accepted"]:
            assert setting.folder is not None
            model = load(setting.folder.checkpoint(index), setting.original)
        cost = setting.costs.cost(keep, parts)
        return State(model, keep, tuple(parts), plan, cost, found["metric"], found["error"]), removed

    def note(self, stage: str, state: State, removed: Sequence[Removal], *, accepted: bool, reason: str) -> None:
        """Record one decision; an accepted state is saved before the decision is written."""
        now = time.monotonic()
        index = len(self.steps)
        recalled = index < len(self._past)
        step = Step(
            index=index,
            stage=stage,
            removed=tuple(removed),
            macs=state.cost.macs,
            parameters=state.cost.parameters,
            metric=state.metric,
            accepted=accepted,
            reason=reason,
            error=state.error,
            seconds=self._past[index]["seconds"] if recalled else now - self._since,
        )
        self._since = now
        folder = self._setting.folder
        if folder is not None and not recalled:
            if accepted:
                save(folder.checkpoint(step.index), state.model, state.plan)
            folder.add(step)
        self.steps.append(step)
        told = describe(step, self._start, self._setting.task.metric_name)
        self._setting.progress.say(f"{told} (recalled)" if recalled else told)


def _removal(found: Mapping[str, Any]) -> Removal:
    lists = {name: tuple(found[name]) for name in ("units", "divergence", "scores", "ranks")}
    return Removal(**{**found, **lists})


def describe(step: Step, start: Cost, metric_name: str) -> str:
    """One line for people: what went, its divergence, the cost, the metric, the decision."""
    if not step.removed:
        what = "nothing removed"
    elif step.stage == "layers":
        what = f"removed {step.removed[0].kind} {step.removed[0].name}"
    else:
        counts: dict[str, int] = {}
        for removal in step.removed:
            counts[removal.kind] = counts.get(removal.kind, 0) + len(removal.units)
        parts = [f"{count} {kind}" for kind, count in counts.items()]
        what = f"removed {' + '.join(parts)} in {len(step.removed)} groups"
    if step.removed:
        low = min(removal.divergence[0] for removal in step.removed)
        high = max(removal.divergence[1] for removal in step.removed)
        what += f", divergence {low:.2g}" if low == high else f", divergence {low:.2g} to {high:.2g}"
    verdict = "accepted" if step.accepted else "rolled back"
    return (
        f"{step.stage} {step.index}: {what} | MACs {step.macs / start.macs:.1%} | "
        f"parameters {step.parameters / start.parameters:.1%} | {metric_name} {step.metric:.4f} | "
        f"{verdict}: {step.reason}"
    )
