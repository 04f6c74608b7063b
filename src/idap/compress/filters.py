"""Stage 1, filters: remove the units of lowest divergence step by step within the budget (method.md 3.1)."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from idap.compress.budget import Budget
from idap.compress.config import FilterStage
from idap.compress.journal import Journal
from idap.compress.layers import calibration_loss
from idap.compress.state import Keep, Setting, State
from idap.divergence.criteria import opener_of
from idap.errors import ConfigError
from idap.record import Removal
from idap.selection.power import best_power
from idap.selection.reach import reach
from idap.selection.schedule import step_share
from idap.selection.units import Ranking, rank_uniform, rank_units
from idap.structure.analysis import Structure


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
        found = journal.recall("filters", state) or _candidate(setting, state, goal, share, floor, len(journal.steps))
        if found is None:
            break
        candidate, removed = found
        if goal.holds(candidate.metric):
            journal.note("filters", candidate, removed, accepted=True, reason="within the budget")
            state, step = candidate, step + 1
            continue
        # The goal may have asked for less than the share: half of what was really taken is the next try.
        units = sum(map(len, state.keep.values()))
        taken = units - sum(map(len, candidate.keep.values()))
        factor *= taken / max(1, round(share * units)) / 2
        smaller = factor * step_share(stage.first_share, step, stage.steps, stage.growth)
        last = smaller < stage.min_share
        reason = "outside the budget" + ("; no smaller step is worth trying" if last else f"; next step {smaller:.1%}")
        journal.note("filters", candidate, removed, accepted=False, reason=reason)
        if last:
            break
    return state


def _candidate(
    setting: Setting, state: State, goal: Budget, share: float, floor: float, number: int
) -> tuple[State, list[Removal]] | None:
    """Measure, rank, cut and recover; None if nothing more may go."""
    with setting.progress.phase(f"filters {number}: measure", None):
        scores = setting.divergence(state, blocks=False).units
    ranking, keep = _best(setting, state, scores, goal, share, floor)
    if keep == dict(state.keep):
        return None
    candidate = setting.next_state(state, keep, state.removed, f"filters {number}: recovery")
    return candidate, removals(setting, state, keep, ranking)


def _best(
    setting: Setting, state: State, scores: Mapping[str, Tensor], goal: Budget, share: float, floor: float
) -> tuple[Ranking, Keep]:
    """The ranking, and what stays after a step; of several powers of the cost that with the lowest calibration loss."""
    powers = setting.config.powers if setting.config.ranking == "global" else (0.0,)
    rankings = {power: rank(setting, state, scores, floor, power) for power in powers}
    choices = {power: _cut(setting, state, ranking, goal, share) for power, ranking in rankings.items()}
    if len(choices) == 1:
        return rankings[powers[0]], choices[powers[0]]

    def loss(keep: Keep) -> float:
        model, _, _ = setting.cut(state, keep, state.removed)
        return calibration_loss(setting, model)

    chosen = best_power(choices, loss)
    return rankings[chosen], choices[chosen]


def least_units(structure: Structure, stage: FilterStage, floor: float | None = None) -> dict[str, int]:
    """The number of units that always stay of each group.

    Raises:
        ConfigError: a pattern of the settings fits no group.
    """
    names = [group.name for group in structure.groups]
    for setting, patterns in (("keep", stage.keep), ("multiples", stage.multiples)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"filters.{setting} names {pattern!r}, which fits no group of this model; there are "
                    f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
                )
    general = stage.min_keep if floor is None else floor
    return {
        group.name: max(1, round(group.size * matching(stage.keep, group.name, general))) for group in structure.groups
    }


def rank(setting: Setting, state: State, scores: Mapping[str, Tensor], floor: float, power: float) -> Ranking:
    """Rank the units of a state by score / cost^power."""
    floors = least_units(setting.structure, setting.config.filters, floor)
    if not scores and setting.structure.groups:
        raise ConfigError(
            f"criterion {opener_of(setting.config.criterion)[0]!r} could score no group of this model; take another."
        )
    costs = setting.unit_costs(state)
    plain = {name: values.tolist() for name, values in scores.items()}
    if setting.config.ranking == "uniform":
        plain = {name: values for name, values in plain.items() if costs.get(name, 0.0) > 0}
        return rank_uniform(plain, state.keep, floors=floors)
    return rank_units(plain, state.keep, costs, floors=floors, power=power)


def matching(settings: Mapping[str, float], name: str, default: float) -> float:
    """What is set for a name by the last pattern that matches it.

    >>> matching({"layer1.*": 0.5, "layer1.0.*": 0.8}, "layer1.0.conv1", 0.1)
    0.8
    """
    return next((value for pattern, value in reversed(list(settings.items())) if fnmatchcase(name, pattern)), default)


def _cut(setting: Setting, state: State, ranking: Ranking, goal: Budget, share: float) -> Keep:
    """Take the lowest share of the ranking, but not more than the goal asks for."""
    stage = setting.config.filters
    units = sum(len(units) for units in state.keep.values())
    most = min(len(ranking), max(1, round(share * units)))
    if goal.macs is None and goal.parameters is None:
        return ranking.keep(most)

    def times_the_goal(keep: Keep, _removed: tuple[str, ...]) -> float:
        return 1 + goal.shortfall(setting.costs.cost(keep, state.removed))

    choice = reach(ranking, times_the_goal, 1.0, most=most)
    multiples = {
        group.name: int(matching(stage.multiples, group.name, stage.multiple)) for group in setting.structure.groups
    }
    if choice.cost <= 1 and max(multiples.values()) > 1:  # only the step that gets there is rounded
        return reach(ranking, times_the_goal, 1.0, multiples=multiples, most=len(ranking)).keep
    return choice.keep


def removals(setting: Setting, state: State, after: Keep, ranking: Ranking) -> list[Removal]:
    """What a step takes from each group, with the score, the rank and the cost of each unit."""
    costs = setting.unit_costs(state)
    places = {(part.name, part.unit): (place, part.score) for place, part in enumerate(ranking.parts)}
    found = []
    for name, units in state.keep.items():
        gone = sorted(set(units) - set(after[name]))
        if gone:
            group = setting.structure.group(name)
            scores = tuple(places[name, unit][1] for unit in gone)
            found.append(
                Removal(
                    name=name,
                    kind=group.kind,
                    units=tuple(gone),
                    left=len(after[name]),
                    divergence=(min(scores), max(scores)),
                    scores=scores,
                    ranks=tuple(places[name, unit][0] for unit in gone),
                    cost=costs[name],
                )
            )
    return found
