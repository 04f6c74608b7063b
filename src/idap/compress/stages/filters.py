"""Stage 1, filters: remove the units of lowest divergence step by step within the budget (docs/method.md#filters).

The size of each step (`Pace`), and whether it is accepted, are decided here; which units it removes, in `choice`.
"""

from collections.abc import Collection, Sequence

from idap.compress.budget import Budget, Shares
from idap.compress.change import next_state
from idap.compress.config import FilterStage
from idap.compress.context import RunContext
from idap.compress.journal import Decision, Journal
from idap.compress.stages.choice import Candidates, best_cut, removals
from idap.compress.state import State
from idap.divergence.criteria import WITH_BLOCKS
from idap.errors import ConfigError
from idap.selection.reach import step_share


class Pace:
    """Determines how far the next step goes, and halves it after a step was rolled back.

    Args:
        stage: settings of stage 1.
        goal: targets of the stage.
    """

    def __init__(self, stage: FilterStage, goal: Budget) -> None:
        self._stage, self._goal = stage, goal
        self._factor = 1.0
        self.step = 0

    def next(self, shares: Shares) -> tuple[Budget, float]:
        """The aim of the next step.

        Args:
            shares: what is left of the original's costs.

        Returns:
            The targets of the step, and the largest share of the units that it may remove.
        """
        if self._stage.schedule == "growing":
            return self._goal, self._units()
        return self._goal.part_way(shares, self._part()), 1.0

    def accept(self) -> None:
        """Count a step that was accepted."""
        self.step += 1

    def reject(self, shares: Shares, taken: int, units: int) -> str:
        """Halve the next step, since this one was rolled back.

        Args:
            shares: what is left of the original's costs.
            taken: number of units that the step removed; its goal may have needed fewer than its share allowed.
            units: number of units before the step.

        Returns:
            The size of the next step in words; "" if it would be too small to be worth trying.
        """
        if self._stage.schedule == "growing":
            self._factor *= min(1.0, taken / max(1, round(self._units() * units))) / 2
            smaller = self._units()
        else:
            self._factor /= 2
            smaller = self._part() * max(shares[name] - end for name, end in self._goal.targets.items())
        of = "the units" if self._stage.schedule == "growing" else "the cost"
        return "" if smaller < self._stage.min_share else f"{smaller:.1%} of {of}"

    def _units(self) -> float:
        return self._factor * step_share(self._stage.first_share, self.step, self._stage.steps, self._stage.growth)

    def _part(self) -> float:
        steps_left = 1 if self._stage.schedule == "one-shot" else max(1, self._stage.steps - self.step)
        return self._factor / steps_left


def filter_stage(
    context: RunContext, state: State, goal: Budget, journal: Journal, *, blocks: Sequence[str] = ()
) -> State:
    """Cut width until the goal is reached, nothing more is accepted, or the steps are used up.

    Args:
        context: of the run.
        state: where to start; it is not changed.
        goal: targets of this stage and the accuracy budget.
        journal: gets one entry per decision.
        blocks: branches and blocks that are ranked together with the units; with any, the stage is "interleaved".

    Returns:
        The last accepted state.
    """
    journal.begin()
    stage, pace = _stage(blocks), Pace(context.goals.config.filters, goal)
    rejected: State | None = None
    while pace.step < context.goals.config.filters.steps and not goal.is_reached(context.shares(state)):
        if journal.is_stage_over(stage):
            break
        aim, share = pace.next(context.shares(state))
        found = journal.recall(stage, state)
        found = found or _candidate(context, state, goal, aim, share, journal, blocks, rejected)
        if found is None:
            break
        candidate = found.state
        if candidate.within(goal):
            journal.note(stage, found, accepted=True, reason="within the budget")
            state, rejected = candidate, None
            pace.accept()
            continue
        rejected = candidate
        units = sum(map(len, state.keep.values()))
        taken = units - sum(map(len, candidate.keep.values()))
        smaller = pace.reject(context.shares(state), taken, units)
        why = candidate.fault or "outside the budget"
        reason = f"{why}; {f'next step {smaller}' if smaller else 'no smaller step is worth trying'}"
        journal.note(stage, found, accepted=False, reason=reason)
        if not smaller:
            break
    return state


def _stage(blocks: Sequence[str]) -> str:
    """The name of the stage in the record."""
    return "interleaved" if blocks else "filters"


def _candidate(
    context: RunContext,
    state: State,
    goal: Budget,
    aim: Budget,
    share: float,
    journal: Journal,
    blocks: Sequence[str],
    rejected: State | None,
) -> Decision | None:
    """Measure, rank, cut and recover; None if nothing more may be removed, or only what was just rolled back."""
    stage, number = _stage(blocks), len(journal.steps)
    found = context.divergence(state, blocks=bool(blocks) or journal.is_at_start, title=f"{stage} {number}: measure")
    journal.show(stage, state, found)
    if blocks and not found.blocks:
        raise ConfigError(
            f"order='interleaved' compares units with blocks, and criterion {found.criterion!r} scored no block of "
            f"this model; take one of {', '.join(map(repr, WITH_BLOCKS))}, or let blocks() of your own "
            "criterion give scores."
        )
    with context.services.clock.on("selection"):
        free = {name: found.blocks[name] for name in _free(context, state, found.blocks, blocks)}
        candidates = Candidates.of(context, state, found.units, free)
        choice = best_cut(context, state, candidates, aim, share, last=aim == goal)
        cut = choice.cut
    if not cut.takes_from(state):
        return None
    if rejected is not None and not cut.takes_from(rejected):
        context.services.progress.say(f"{stage} {number}: no smaller step is possible; units are removed in bundles.")
        return None
    candidate = next_state(context, state, cut.keep, cut.removed, f"{stage} {number}: recovery", made=choice.made)
    return Decision(candidate, removals(context, state, cut, choice.ranking, candidates))


def _free(context: RunContext, state: State, scored: Collection[str], blocks: Sequence[str]) -> list[str]:
    """The blocks that have a score and are not removed yet."""
    taken = {inner for name in state.removed for inner in (name, *context.subject.structure.block(name).contains)}
    return [name for name in blocks if name in scored and name not in taken]
