"""Stage 1, filters: remove the units of lowest divergence step by step within the budget (method.md 3.1)."""

from collections.abc import Mapping

from torch import Tensor

from idap.compress.budget import Budget
from idap.compress.state import Journal, Keep, Setting, State
from idap.record import Removal
from idap.selection.schedule import step_share
from idap.selection.units import Ranking, fewest_for_target, rank_units


def filter_stage(
    setting: Setting, state: State, goal: Budget, journal: Journal, *, floor: float | None = None
) -> State:
    """Cut width until the goal is reached, nothing more is accepted, or the steps are used up.

    Args:
        setting: of the run.
        state: where to start; it is not changed.
        goal: targets of this stage and the accuracy budget.
        journal: gets one entry per decision.
        floor: share of each group that always stays; None takes the configured one.

    Returns:
        The last accepted state.
    """
    stage, factor, step = setting.config.filters, 1.0, 0
    floor = stage.min_keep if floor is None else floor
    while step < stage.steps and not goal.reached(state.cost):
        share = factor * step_share(stage.first_share, step, stage.steps, stage.growth)
        with setting.progress.phase(f"filters {len(journal.steps)}: measure", None):
            scores = setting.divergence(state).units
        ranking = rank(setting, state, scores, floor)
        keep = _cut(setting, state, ranking, goal, share)
        if keep == dict(state.keep):
            break
        candidate = setting.next_state(state, keep, state.removed, f"filters {len(journal.steps)}: recovery")
        removed = removals(setting, state.keep, keep, scores)
        if goal.holds(candidate.metric):
            journal.note("filters", candidate, removed, accepted=True, reason="within the budget")
            state, step = candidate, step + 1
            continue
        # The goal may have asked for less than the share: half of what was really taken is the next try.
        units = sum(map(len, state.keep.values()))
        taken = units - sum(map(len, keep.values()))
        factor *= taken / max(1, round(share * units)) / 2
        smaller = factor * step_share(stage.first_share, step, stage.steps, stage.growth)
        last = smaller < stage.min_share
        reason = "outside the budget" + ("; no smaller step is worth trying" if last else f"; next step {smaller:.1%}")
        journal.note("filters", candidate, removed, accepted=False, reason=reason)
        if last:
            break
    return state


def rank(setting: Setting, state: State, scores: Mapping[str, Tensor], floor: float) -> Ranking:
    """Rank the units of a state by score per cost; cost is parameters where only parameters are a goal."""
    config = setting.config
    only_parameters = config.parameters is not None and config.macs is None
    unit_costs = (
        setting.costs.unit_parameters(state.keep, state.removed)
        if only_parameters
        else setting.costs.unit_macs(state.keep, state.removed)
    )
    floors = {group.name: max(1, round(group.size * floor)) for group in setting.structure.groups}
    plain = {name: values.tolist() for name, values in scores.items()}
    return rank_units(plain, state.keep, unit_costs, floors=floors, power=config.power)


def _cut(setting: Setting, state: State, ranking: Ranking, goal: Budget, share: float) -> Keep:
    """Take the lowest share of the ranking, but not more than the goal asks for."""
    units = sum(len(units) for units in state.keep.values())
    most = min(len(ranking), max(1, round(share * units)))
    if goal.macs is None and goal.parameters is None:
        return ranking.keep(most)

    def above(keep: Keep) -> float:
        return goal.shortfall(setting.costs.cost(keep, state.removed))

    return ranking.keep(fewest_for_target(ranking, above, 0.0, most=most))


def removals(setting: Setting, before: Keep, after: Keep, scores: Mapping[str, Tensor]) -> list[Removal]:
    """What a step took from each group."""
    found = []
    for name, units in before.items():
        gone = sorted(set(units) - set(after[name]))
        if gone:
            values = scores[name][gone]
            group = setting.structure.group(name)
            found.append(
                Removal(
                    name=name,
                    kind=group.kind,
                    units=tuple(gone),
                    left=len(after[name]),
                    divergence=(float(values.min()), float(values.max())),
                )
            )
    return found
