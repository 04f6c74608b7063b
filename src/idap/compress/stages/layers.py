"""Stage 2, layers: remove the branches and blocks that change the flow least (docs/method.md#layers)."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from math import inf, isfinite

from idap.compress.budget import Budget, Shares, shares_of
from idap.compress.change import CutModel, make_cut, neighbours, next_state
from idap.compress.context import RunContext
from idap.compress.journal import Decision, Journal, block_removal
from idap.compress.stages.choice import Candidates, best_cut
from idap.compress.stages.cut import Cut, calibration_loss, left_after, loss_without
from idap.compress.state import State, merge_removed
from idap.errors import DivergedError
from idap.steps import Contest

STAGE = "layers"


def layer_stage(
    context: RunContext,
    state: State,
    goal: Budget,
    journal: Journal,
    removable: Sequence[str],
    *,
    contested: bool = False,
    alone: bool = False,
) -> State:
    """Remove layers until the goal is reached, the removals are used up, or all that is left is essential.

    Args:
        context: of the run.
        state: where to start; it is not changed.
        goal: targets and the accuracy budget.
        journal: gets one entry per decision.
        removable: branches and blocks whose removal was verified on the original.
        contested: end as soon as cutting filters instead of the next layer would lose less.
        alone: filters can't reach the goal any more, so a layer may save much more than is needed.

    Returns:
        The last accepted state.
    """
    stage = context.goals.config.layers
    journal.begin()
    essential: set[str] = set()
    rejected, accepted = 0, sum(step.stage == STAGE and step.accepted for step in journal.steps)
    while accepted < stage.removals and rejected < stage.patience and not goal.is_reached(context.shares(state)):
        if journal.is_stage_over(STAGE):
            break
        found = journal.recall(STAGE, state)
        allowed = set(removable) - essential
        found = found or _candidate(context, state, goal, allowed, journal, contested=contested, alone=alone)
        if found is None:
            break
        if found.contest is not None and found.contest.is_lost:
            journal.note(STAGE, found, accepted=False, reason=_verdict(found.contest))
            break
        if found.state.within(goal):
            reason = "within the budget" if found.contest is None else f"within the budget; {_verdict(found.contest)}"
            journal.note(STAGE, found, accepted=True, reason=reason)
            state, rejected, accepted = found.state, 0, accepted + 1
        else:
            essential.add(found.removed[0].name)
            rejected += 1
            why = found.state.fault or "outside the budget"
            journal.note(STAGE, found, accepted=False, reason=f"{why}: the layer is essential")
    return state


def _candidate(
    context: RunContext,
    state: State,
    goal: Budget,
    allowed: Set[str],
    journal: Journal,
    *,
    contested: bool,
    alone: bool,
) -> Decision | None:
    """Measure, try the lowest few, remove the best of them and recover; None if nothing more may be removed.

    A layer that loses its contest is judged as it was cut, without recovery.
    """
    if not allowed:
        return None
    number = len(journal.steps)
    measured = context.divergence(state, units=journal.is_at_start, title=f"{STAGE} {number}: measure")
    journal.show(STAGE, state, measured)
    scores = measured.blocks
    left = [name for name in scores if name in allowed and not _saves_nothing(context, state, name)]
    left = [name for name in left if alone or not _overshoots(context, state, goal, name)]
    found = _choose_layer(context, state, sorted(left, key=lambda name: scores[name]), f"{STAGE} {number}")
    if found is None:
        return None
    chosen, saving = found
    block = context.subject.structure.block(chosen)
    removed = merge_removed(context.subject.structure, state.removed, [chosen])
    rank = sorted(scores, key=lambda name: scores[name]).index(chosen)
    removal = block_removal(block, scores[chosen], rank, saving)
    made = contest = None
    if contested:
        made, saved, contest = _contest(context, state, goal, removed, f"{STAGE} {number}: measure filters")
        if contest.is_lost:
            with context.services.clock.on("judging"):
                metric, fault = context.judge(made.model)
            cost, error = context.subject.costs.cost(state.keep, removed), max(state.error, made.error)
            beaten = State(made.model, state.keep, removed, made.plan, cost, metric, error, saved.get("latency"), fault)
            return Decision(beaten, [removal], contest)
    tuned = frozenset[str]()
    if context.goals.config.layers.tune == "neighbours":
        tuned = neighbours(context.subject.structure, block, removed)
    candidate = next_state(context, state, state.keep, removed, f"{STAGE} {number}: recovery", tuned=tuned, made=made)
    return Decision(candidate, [removal], contest)


def _choose_layer(context: RunContext, state: State, names: Sequence[str], title: str) -> tuple[str, float] | None:
    """The best of the first few layers and what it saves; if no loss is finite, the next few are tried.

    Args:
        context: of the run.
        state: before the removal.
        names: of layers, in the order in which they are tried.
        title: of the decision.

    Returns:
        The name of the layer and the cost that it saves; None if no layer leaves a finite loss.
    """
    few = context.goals.config.layers.short_list
    for tried in (names[place : place + few] for place in range(0, len(names), few)):
        costs = context.block_costs(state, tried)
        with context.services.clock.on("trial"):
            best = _cheapest(context, state, tried, costs)
        if best is not None:
            return best, costs[best]
        context.services.progress.say(f"{title}: without {' or '.join(tried)} the loss is not finite.")
    return None


def _contest(
    context: RunContext, state: State, goal: Budget, removed: tuple[str, ...], title: str
) -> tuple[CutModel, Shares, Contest]:
    """Compare the loss without some layers to the loss without filters that save as much, but not more than needed.

    Returns:
        The model without the layers, what it leaves of each cost, and the comparison.
    """
    made = make_cut(context, state, state.keep, removed)
    with context.services.clock.on("trial"):
        loss = calibration_loss(context, made.model)
    left = left_after(context, state, Cut(state.keep, removed), made.model)
    level = {name: max(left[name], wanted) for name, wanted in goal.targets.items()}
    rival = filters_instead(context, state, replace(goal, targets=level), title)
    return made, left, Contest(loss if isfinite(loss) else None, rival)


def _verdict(contest: Contest) -> str:
    if contest.filters is None:
        return "filters can't save as much"
    verdict = "less" if contest.is_lost else "as much" if contest.layer == contest.filters else "more"
    layer = "no finite loss" if contest.layer is None else f"{contest.layer:.4g}"
    return f"cutting filters instead would lose {verdict} ({contest.filters:.4g} against {layer} on calibration data)"


def _overshoots(context: RunContext, state: State, goal: Budget, name: str) -> bool:
    """Whether removing a layer saves more than twice what is still needed: filters come closer, and lose less."""
    if not goal.targets or not context.goals.config.filters.steps:
        return False
    now = context.shares(state)
    without = shares_of(context.subject.costs.cost(state.keep, [*state.removed, name]), context.subject.whole)
    if "latency" in goal.targets:  # not measured for each layer, but estimated from the multiply-adds
        without["latency"] = now["latency"] * without["macs"] / now["macs"]
    return all(now[cost] - without[cost] > 2 * (now[cost] - wanted) for cost, wanted in goal.targets.items())


def _saves_nothing(context: RunContext, state: State, name: str) -> bool:
    """Whether a block would become a projection that costs at least as much."""
    projected = context.subject.structure.block(name).projected is not None
    return projected and context.subject.costs.block_macs(name, state.keep, state.removed) <= 0


def _cheapest(context: RunContext, state: State, names: Sequence[str], costs: Mapping[str, float]) -> str | None:
    """The candidate whose removal costs least calibration loss for what it saves; None if no loss is finite."""
    maps = {name: fitted.map for name, fitted in context.projections(state, names).items()}
    with context.services.progress.phase(f"{STAGE}: trial", len(names) + 1) as phase:
        before = calibration_loss(context, state.model)
        before = before if isfinite(before) else 0.0  # then any layer without which it is finite may be removed
        phase.advance()
        price: dict[str, float] = {}
        for name in names:
            loss = loss_without(context, state, context.subject.structure.block(name), maps.get(name))
            saved = max(1e-12, costs[name])
            more = loss - before if isfinite(loss) else inf
            price[name] = more / saved if more > 0 else more * saved
            phase.advance(name)
    best = min(names, key=lambda name: price[name])
    return best if isfinite(price[best]) else None


def filters_instead(context: RunContext, state: State, aim: Budget, title: str) -> float | None:
    """The calibration loss after filters alone are cut down to an aim.

    Returns:
        The loss of the model that was cut and corrected; None if filters don't reach the aim, or leave no finite loss.
    """
    if aim.shortfall(context.shares(state)) <= 0:  # the layer saves none of the targets' costs: compare with no cut
        return calibration_loss(context, state.model)
    found = context.divergence(state, blocks=False, title=title)
    with context.services.clock.on("selection"):
        candidates = Candidates.of(context, state, found.units, {})
        try:
            choice = best_cut(context, state, candidates, aim, 1.0, last=False)
        except DivergedError:  # so there is nothing to compare the layer with
            return None
        cut, loss = choice.cut, choice.loss
        if not cut.takes_from(state) or aim.misses(choice.left or left_after(context, state, cut)):
            return None
    if loss is None:
        made = choice.made or make_cut(context, state, cut.keep, cut.removed)
        with context.services.clock.on("trial"):
            loss = calibration_loss(context, made.model)
    return loss if isfinite(loss) else None
