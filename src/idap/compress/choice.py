"""What a step of stage 1 takes: the ranking, how far down it the step goes, and what is written about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import NamedTuple

from torch import nn

from idap.compress.budget import Budget, Shares, shares_of
from idap.compress.change import Made, make_cut
from idap.compress.journal import block_removal
from idap.compress.latencies import come_down
from idap.compress.ranking import Candidates, Way, multiples_of, rank, ways
from idap.compress.state import Keep, Setting, State, joined
from idap.compress.trial import calibration_loss
from idap.errors import DivergedError
from idap.selection.alike import shortest
from idap.selection.best import best_of
from idap.selection.reach import reach
from idap.selection.rounding import rounded
from idap.selection.units import Ranking
from idap.steps import Removal
from idap.surgery.apply import apply_plan


@dataclass(frozen=True)
class Cut:
    """What is left after a step.

    Attributes:
        keep: group name -> units that stay.
        removed: branches and blocks that are gone.
    """

    keep: Keep
    removed: tuple[str, ...]

    def takes_from(self, state: State) -> bool:
        """Whether it leaves less than a state has."""
        return dict(self.keep) != dict(state.keep) or self.removed != state.removed


class Choice(NamedTuple):
    """The cut that a step takes.

    Attributes:
        ranking: that it follows.
        cut: what stays.
        made: the model that the cut makes, where it was made to find the loss.
        loss: of that model on the calibration data.
        left: of each of the original's costs, where that was measured.
    """

    ranking: Ranking
    cut: Cut
    made: Made | None = None
    loss: float | None = None
    left: Shares | None = None


def best_cut(
    setting: Setting, state: State, candidates: Candidates, aim: Budget, share: float, *, last: bool
) -> Choice:
    """What a step takes; of several ways to rank, that with the lowest calibration loss.

    Args:
        setting: of the run.
        state: before the step.
        candidates: what may go.
        aim: targets of the step.
        share: of the units that may go at most.
        last: the aim is that of the stage, so that widths may end at the steps of the hardware.

    Raises:
        DivergedError: there are several ways, and none of them leaves a finite loss.
    """
    first, *others = ways(setting)
    rankings = {way: rank(setting, state, candidates, way) for way in (first, *others)}
    cuts = {first: _cut(setting, state, rankings[first], aim, share, rankings[first].multiples)}
    may_step = last and setting.config.filters.multiple == 1 and "latency" in setting.budget.targets
    if not others and not may_step:
        return Choice(rankings[first], cuts[first])
    lefts: dict[Way, Shares] = {first: left_after(setting, state, cuts[first])}
    left = lefts[first]
    may_step = may_step and not aim.missed(left)  # steps of the hardware only where the step gets to its aim
    # The others go as far down as the first, so that their losses can be compared.
    level = replace(aim, targets={name: left[name] for name in aim.targets or ("macs",)})

    def compare(way: Way, multiples: Mapping[str, int]) -> None:
        cut = _cut(setting, state, rankings[way], level, 1.0, multiples)
        # A first cut that was measured too slow asks for nothing, and doing nothing loses nothing.
        if cut.takes_from(state) and not level.missed(found := left_after(setting, state, cut)):
            cuts[way], lefts[way] = cut, found

    trial = _Trial(setting, state)
    for way in others:
        compare(way, rankings[way].multiples)
    chosen = best_of(cuts, trial.loss) if len(cuts) > 1 else first
    multiples = rankings[chosen].multiples
    steps = multiples_of(setting.structure, setting.config.filters, _hardware_steps(setting)) if may_step else multiples
    if steps != multiples:
        stepped = chosen._replace(stepped=True)
        rankings[stepped] = rankings[chosen]
        compare(stepped, steps)
        if stepped in cuts:
            chosen = best_of({way: cuts[way] for way in (chosen, stepped)}, trial.loss)
    made, loss = trial.made_of(cuts[chosen]) or (None, None)
    return Choice(rankings[chosen], cuts[chosen], made, loss, lefts[chosen])


def filters_instead(setting: Setting, state: State, aim: Budget, title: str) -> float | None:
    """The calibration loss that filters alone leave when they come down to an aim.

    Returns:
        The loss of the model that was cut and corrected; None if filters don't come there, or leave no finite loss.
    """
    if aim.shortfall(setting.shares(state)) <= 0:  # a layer that saves nothing of what counts has to beat doing nothing
        return calibration_loss(setting, state.model)
    found = setting.divergence(state, blocks=False, title=title)
    with setting.clock.on("selection"):
        candidates = Candidates.of(setting, state, found.units, {})
        try:
            choice = best_cut(setting, state, candidates, aim, 1.0, last=False)
        except DivergedError:  # so the layer has nothing to beat
            return None
        cut, loss = choice.cut, choice.loss
        if not cut.takes_from(state) or aim.missed(choice.left or left_after(setting, state, cut)):
            return None
    if loss is None:
        made = choice.made or make_cut(setting, state, cut.keep, cut.removed)
        with setting.clock.on("trial"):
            loss = calibration_loss(setting, made.model)
    return loss if isfinite(loss) else None


class _Trial:
    """Cuts that are made to compare their calibration losses; each once, and only the best model is held."""

    def __init__(self, setting: Setting, state: State) -> None:
        self._setting, self._state = setting, state
        self._losses: list[tuple[Cut, float]] = []
        self._best: tuple[float, Cut, Made] | None = None

    def loss(self, cut: Cut) -> float:
        """The calibration loss of the model that a cut makes."""
        known = next((loss for other, loss in self._losses if other == cut), None)
        if known is not None:
            return known
        made = make_cut(self._setting, self._state, cut.keep, cut.removed)
        loss = calibration_loss(self._setting, made.model)
        self._losses.append((cut, loss))
        if isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = loss, cut, made
        return loss

    def made_of(self, cut: Cut) -> tuple[Made, float] | None:
        """The model of a cut and its loss, if it is the best so far."""
        if self._best is None or self._best[1] != cut:
            return None
        return self._best[2], self._best[0]


def left_after(setting: Setting, state: State, cut: Cut, model: nn.Module | None = None) -> dict[str, float]:
    """What a cut leaves of each of the original's costs; latency, where it is a goal, as measured now.

    Args:
        setting: of the run.
        state: before the cut.
        cut: what stays.
        model: that the cut makes, if it was made.
    """
    found = shares_of(setting.costs.cost(cut.keep, cut.removed), setting.whole)
    if "latency" not in setting.budget.targets:
        return found
    latency = setting.latency_of(_applied(setting, state, cut) if model is None else model)
    assert latency is not None  # it is a goal
    return {**found, "latency": latency}


def _applied(setting: Setting, state: State, cut: Cut) -> nn.Module:
    """A state's model after a cut, for the clock only: projections are not fitted."""
    plan = setting.structure.plan(cut.keep, cut.removed).since(state.plan)
    return apply_plan(state.model, plan)


def _cut(
    setting: Setting, state: State, ranking: Ranking, aim: Budget, share: float, multiples: Mapping[str, int]
) -> Cut:
    """Take the lowest share of the ranking, but not more than the step aims at.

    Args:
        setting: of the run.
        state: before the step.
        ranking: of what may go.
        aim: targets of the step.
        share: of the units that may go at most; where units go in bundles, one bundle may go in any case.
        multiples: of the number of units of each group: those that are set, or steps of the hardware besides.
    """
    units = sum(len(units) for units in state.keep.values())
    most = min(len(ranking), max(1, round(share * units), shortest(ranking)))
    if not aim.targets:
        taken = replace(ranking, parts=ranking.parts[:most])  # so that a bundle that is not all among them stays
        keep = rounded(taken, taken.keep(most), multiples)
        return Cut(keep, joined(setting.structure, state.removed, taken.removed(most)))

    def down_to(targets: Shares) -> Cut:
        wanted = replace(aim, targets=targets)

        def times_the_goal(keep: Keep, removed: tuple[str, ...]) -> float:
            cost = setting.costs.cost(keep, joined(setting.structure, state.removed, removed))
            return 1 + wanted.shortfall(shares_of(cost, setting.whole))

        choice = reach(ranking, times_the_goal, 1.0, multiples=multiples, most=most)
        if choice.cost <= 1 and most < len(ranking) and max(multiples.values(), default=1) > 1:
            # The last bundle may save much too much, and one that ranks further behind come closer.
            choice = reach(ranking, times_the_goal, 1.0, multiples=multiples, most=len(ranking))
        return Cut(choice.keep, joined(setting.structure, state.removed, choice.removed))

    if "latency" not in aim.targets:
        return down_to(aim.targets)
    return _down_to_latency(setting, state, ranking, aim, down_to)


def _hardware_steps(setting: Setting) -> Mapping[str, int]:
    """Where the latency of each group has steps."""
    with setting.clock.on("latency"):
        return setting.layer_times.steps


def _down_to_latency(
    setting: Setting, state: State, ranking: Ranking, aim: Budget, down_to: Callable[[Shares], Cut]
) -> Cut:
    """Find the multiply-adds at which the measured latency is as wanted, and the other targets are met."""
    others = {name: share for name, share in aim.targets.items() if name != "latency"}
    shares = setting.shares(state)
    cuts: dict[float, Cut] = {}

    def at(macs: float) -> Cut:
        if macs not in cuts:
            cuts[macs] = down_to({**others, "macs": min(macs, others.get("macs", 1.0))})
        return cuts[macs]

    def latency_at(macs: float) -> float:
        found = setting.latency_of(_applied(setting, state, at(macs)))
        assert found is not None  # it is a goal
        return found

    everything = setting.costs.cost(ranking.keep(len(ranking)), state.removed)
    least = shares_of(everything, setting.whole)["macs"]
    start = (shares["macs"], shares["latency"])
    if start[1] <= aim.targets["latency"]:
        return down_to(others)
    return at(come_down(latency_at, start, aim.targets["latency"], least=least))


def removals(setting: Setting, state: State, after: Cut, ranking: Ranking, candidates: Candidates) -> list[Removal]:
    """What a step takes, with the score, the rank and the cost of each unit and block."""
    places = {(part.name, part.unit): (place, part.score) for place, part in enumerate(ranking.parts)}
    found = []
    for name, units in state.keep.items():
        gone = sorted(set(units) - set(after.keep[name]))
        if gone:
            scores = tuple(places[name, unit][1] for unit in gone)
            found.append(
                Removal(
                    name=name,
                    kind=setting.structure.group(name).kind,
                    units=tuple(gone),
                    left=len(after.keep[name]),
                    divergence=(min(scores), max(scores)),
                    scores=scores,
                    ranks=tuple(places[name, unit][0] for unit in gone),
                    cost=candidates.costs[name],
                )
            )
    for name in after.removed:
        if name not in state.removed:
            place, score = places[name, None]
            cost = candidates.blocks[name].cost
            found.append(block_removal(setting.structure.block(name), score, place, cost))
    return found
