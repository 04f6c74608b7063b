"""Choose the cut of a step of stage 1: the ranking, and how far down it the step goes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite
from typing import NamedTuple

from torch import Tensor

from idap.compress.budget import Budget, Shares, shares_of
from idap.compress.change import CutModel, make_cut
from idap.compress.config import FilterStage
from idap.compress.context import RunContext
from idap.compress.journal import block_removal
from idap.compress.stages.cut import Cut, _down_to_latency, _hardware_steps, calibration_loss, left_after
from idap.compress.state import Keep, State, merge_removed
from idap.divergence.criteria import opener_of
from idap.errors import ConfigError
from idap.selection.ranking import Ranking, ScoredBlock, best_of, rank_uniform, rank_units
from idap.selection.reach import reach
from idap.selection.rounding import common_multiple, round_units, shortest_beginning, tie_units
from idap.steps import Removal
from idap.structure.analysis import Structure
from idap.structure.groups import alike_groups


class Way(NamedTuple):
    """A way to rank.

    Attributes:
        power: p in score / cost^p.
        streams: whether the channels of residual streams may be removed too.
        stepped: whether widths end at the steps of the hardware.
    """

    power: float
    streams: bool
    stepped: bool = False


@dataclass(frozen=True)
class Candidates:
    """What a step may remove.

    Attributes:
        scores: group name -> divergence of each of its units.
        costs: group name -> cost of its next unit, of the kind that is counted.
        blocks: branches and blocks that may be removed too.
    """

    scores: Mapping[str, Tensor]
    costs: Mapping[str, float]
    blocks: Mapping[str, ScoredBlock]

    @classmethod
    def of(
        cls, context: RunContext, state: State, units: Mapping[str, Tensor], blocks: Mapping[str, float]
    ) -> "Candidates":
        """Add the cost of each unit and block to their scores."""
        prices = context.block_costs(state, list(blocks)) if blocks else {}
        scored = {
            name: ScoredBlock(score, prices[name], context.subject.structure.block(name).contains)
            for name, score in blocks.items()
        }
        return cls(units, context.unit_costs(state), scored)


def ways(context: RunContext) -> list[Way]:
    """The ways to rank that are tried: powers of the cost, with and without the streams.

    If seconds are counted, the score per second is tried in addition to the power that suits the criterion.
    """
    config = context.goals.config
    everywhere = config.ranking == "global"
    powers = config.powers if everywhere else (0.0,)
    if everywhere and config.cost_power is None and context.cost_kind == "latency":
        powers = tuple(dict.fromkeys((*powers, 1.0)))
    streams = context.subject.structure.streams
    both = everywhere and streams and len(streams) < len(context.subject.structure.groups)
    choices = {"cut": (True,), "keep": (False,), "auto": (True, False) if both else (True,)}
    return [Way(power, cut) for cut in choices[config.filters.streams] for power in powers]


def rank(context: RunContext, state: State, candidates: Candidates, way: Way) -> Ranking:
    """Rank what may be removed by score / cost^power."""
    floors = least_units(context.subject.structure, context.goals.config.filters)
    if not candidates.scores and context.subject.structure.groups:
        raise ConfigError(
            f"criterion {opener_of(context.goals.config.criterion)[0]!r} could score no group of this model; "
            f"take another."
        )
    costs = candidates.costs
    whole = () if way.streams else context.subject.structure.streams
    plain = {name: values.tolist() for name, values in candidates.scores.items() if name not in whole}
    there = [group for group in context.subject.structure.groups if costs.get(group.name, 0.0) > 0]
    alike = alike_groups(there, context.goals.config.filters.alike)
    multiples = multiples_of(context.subject.structure, context.goals.config.filters)
    if context.goals.config.ranking == "uniform":
        plain = {name: values for name, values in plain.items() if costs.get(name, 0.0) > 0}
        return tie_units(rank_uniform(plain, state.keep, floors=floors), alike, multiples)
    ranking = rank_units(plain, state.keep, costs, floors=floors, power=way.power, blocks=candidates.blocks)
    allowed = set(ranking.blocks[: max(0, context.goals.config.layers.removals - len(state.removed))])
    parts = tuple(part for part in ranking.parts if part.unit is not None or part.name in allowed)
    return tie_units(replace(ranking, parts=parts), alike, multiples)


def multiples_of(structure: Structure, stage: FilterStage, steps: Mapping[str, int] | None = None) -> dict[str, int]:
    """The multiple for the number of units of each group: the one that is set, else these steps of the hardware.

    The setting for all groups does not apply to heads: the width of a layer is a multiple of theirs in any case.
    """
    usual = {group.name: 1 if group.kind == "heads" else stage.multiple for group in structure.groups}
    usual |= steps or {}
    return {name: int(match_name(stage.multiples, name, multiple)) for name, multiple in usual.items()}


def least_units(structure: Structure, stage: FilterStage) -> dict[str, int]:
    """The number of units of each group that are always kept: a multiple if one is set, or the whole group.

    Groups that must have the size of a stream that is kept whole are kept whole as well.

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
    least = {
        group.name: max(1, round(group.size * match_name(stage.keep, group.name, stage.min_keep)))
        for group in structure.groups
    }
    if stage.streams == "keep":
        least |= {name: structure.group(name).size for name in structure.streams}
    multiples, alike = multiples_of(structure, stage), alike_groups(structure.groups, stage.alike)
    found = {}
    for group in structure.groups:
        members = next((names for names in alike if group.name in names), (group.name,))
        multiple = common_multiple(multiples, members)
        found[group.name] = min(group.size, -(-max(least[name] for name in members) // multiple) * multiple)
    return found


def match_name(settings: Mapping[str, float], name: str, default: float) -> float:
    """The setting for a name: that of the last pattern that matches it, or the default.

    >>> match_name({"layer1.*": 0.5, "layer1.0.*": 0.8}, "layer1.0.conv1", 0.1)
    0.8
    """
    return next((value for pattern, value in reversed(list(settings.items())) if fnmatchcase(name, pattern)), default)


class Choice(NamedTuple):
    """The cut that a step makes.

    Attributes:
        ranking: the ranking that it follows.
        cut: what is kept.
        made: the cut model, if it was made to find the loss.
        loss: of that model on the calibration data.
        left: what is left of each of the original's costs, if that was measured.
    """

    ranking: Ranking
    cut: Cut
    made: CutModel | None = None
    loss: float | None = None
    left: Shares | None = None


def best_cut(
    context: RunContext, state: State, candidates: Candidates, aim: Budget, share: float, *, last: bool
) -> Choice:
    """The cut of a step; of several ways to rank, the one with the lowest calibration loss.

    Args:
        context: of the run.
        state: before the step.
        candidates: what may be removed.
        aim: targets of the step.
        share: largest share of the units that may be removed.
        last: the aim is that of the stage, so that widths may end at the steps of the hardware.

    Raises:
        DivergedError: there are several ways, and none of them leaves a finite loss.
    """
    first, *others = ways(context)
    rankings = {way: rank(context, state, candidates, way) for way in (first, *others)}
    cuts = {first: _cut(context, state, rankings[first], aim, share, rankings[first].multiples)}
    may_step = last and context.goals.config.filters.multiple == 1 and "latency" in context.goals.budget.targets
    if not others and not may_step:
        return Choice(rankings[first], cuts[first])
    lefts: dict[Way, Shares] = {first: left_after(context, state, cuts[first])}
    left = lefts[first]
    may_step = may_step and not aim.misses(left)  # steps of the hardware only if the step reaches its aim
    # The others cut as far down as the first, so that their losses can be compared.
    level = replace(aim, targets={name: left[name] for name in aim.targets or ("macs",)})

    def compare(way: Way, multiples: Mapping[str, int]) -> None:
        cut = _cut(context, state, rankings[way], level, 1.0, multiples)
        # If the first cut was measured too slow, an empty cut reaches its level too, and would win with no loss.
        if cut.takes_from(state) and not level.misses(found := left_after(context, state, cut)):
            cuts[way], lefts[way] = cut, found

    trial = _Trial(context, state)
    for way in others:
        compare(way, rankings[way].multiples)
    chosen = best_of(cuts, trial.loss) if len(cuts) > 1 else first
    multiples = rankings[chosen].multiples
    steps = (
        multiples_of(context.subject.structure, context.goals.config.filters, _hardware_steps(context))
        if may_step
        else multiples
    )
    if steps != multiples:
        stepped = chosen._replace(stepped=True)
        rankings[stepped] = rankings[chosen]
        compare(stepped, steps)
        if stepped in cuts:
            chosen = best_of({way: cuts[way] for way in (chosen, stepped)}, trial.loss)
    made, loss = trial.model_of(cuts[chosen]) or (None, None)
    return Choice(rankings[chosen], cuts[chosen], made, loss, lefts[chosen])


class _Trial:
    """Makes cuts to compare their calibration losses, each once, and holds only the best model."""

    def __init__(self, context: RunContext, state: State) -> None:
        self._context, self._state = context, state
        self._losses: list[tuple[Cut, float]] = []
        self._best: tuple[float, Cut, CutModel] | None = None

    def loss(self, cut: Cut) -> float:
        """The calibration loss of the model that a cut makes."""
        known = next((loss for other, loss in self._losses if other == cut), None)
        if known is not None:
            return known
        made = make_cut(self._context, self._state, cut.keep, cut.removed)
        loss = calibration_loss(self._context, made.model)
        self._losses.append((cut, loss))
        if isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = loss, cut, made
        return loss

    def model_of(self, cut: Cut) -> tuple[CutModel, float] | None:
        """The model of a cut and its loss, if it is the best so far."""
        if self._best is None or self._best[1] != cut:
            return None
        return self._best[2], self._best[0]


def _cut(
    context: RunContext, state: State, ranking: Ranking, aim: Budget, share: float, multiples: Mapping[str, int]
) -> Cut:
    """Remove the lowest share of the ranking, but not more than the step aims at.

    Args:
        context: of the run.
        state: before the step.
        ranking: of what may be removed.
        aim: targets of the step.
        share: largest share of the units that may be removed; one bundle of units may be removed in any case.
        multiples: of the number of units of each group: those that are set, or steps of the hardware as well.
    """
    units = sum(len(units) for units in state.keep.values())
    most = min(len(ranking), max(1, round(share * units), shortest_beginning(ranking)))
    if not aim.targets:
        taken = replace(ranking, parts=ranking.parts[:most])  # so that a bundle that is only partly among them is kept
        keep = round_units(taken, taken.keep(most), multiples)
        return Cut(keep, merge_removed(context.subject.structure, state.removed, taken.blocks_among(most)))

    def down_to(targets: Shares) -> Cut:
        wanted = replace(aim, targets=targets)

        def times_the_goal(keep: Keep, removed: tuple[str, ...]) -> float:
            cost = context.subject.costs.cost(keep, merge_removed(context.subject.structure, state.removed, removed))
            return 1 + wanted.shortfall(shares_of(cost, context.subject.whole))

        choice = reach(ranking, times_the_goal, 1.0, multiples=multiples, most=most)
        if choice.cost <= 1 and most < len(ranking) and max(multiples.values(), default=1) > 1:
            # The last bundle may save far too much, and one that ranks further down may come closer.
            choice = reach(ranking, times_the_goal, 1.0, multiples=multiples, most=len(ranking))
        return Cut(choice.keep, merge_removed(context.subject.structure, state.removed, choice.removed))

    if "latency" not in aim.targets:
        return down_to(aim.targets)
    return _down_to_latency(context, state, ranking, aim, down_to)


def removals(context: RunContext, state: State, after: Cut, ranking: Ranking, candidates: Candidates) -> list[Removal]:
    """What a step removes, with the score, the rank and the cost of each unit and block."""
    places = {(part.name, part.unit): (place, part.score) for place, part in enumerate(ranking.parts)}
    found = []
    for name, units in state.keep.items():
        gone = sorted(set(units) - set(after.keep[name]))
        if gone:
            scores = tuple(places[name, unit][1] for unit in gone)
            found.append(
                Removal(
                    name=name,
                    kind=context.subject.structure.group(name).kind,
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
            found.append(block_removal(context.subject.structure.block(name), score, place, cost))
    return found
