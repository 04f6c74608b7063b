"""What a step of stage 1 takes: the ranking, how far down it the step goes, and what is written about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite
from typing import NamedTuple

from torch import Tensor, nn

from idap.compress.budget import Budget, Shares, shares_of
from idap.compress.change import Made, make_cut
from idap.compress.config import FilterStage
from idap.compress.journal import block_removal
from idap.compress.latencies import come_down
from idap.compress.layers import calibration_loss, joined
from idap.compress.state import Keep, Setting, State
from idap.divergence.criteria import opener_of
from idap.errors import ConfigError
from idap.record import LATENCY_NOISE, Removal
from idap.selection.alike import alike_groups, shortest, tied
from idap.selection.best import best_of
from idap.selection.reach import reach
from idap.selection.rounding import rounded
from idap.selection.units import Ranking, ScoredBlock, rank_uniform, rank_units
from idap.structure.analysis import Structure
from idap.surgery.apply import apply_plan


class Way(NamedTuple):
    """How to rank.

    Attributes:
        power: p in score / cost^p.
        streams: whether the channels of residual streams may go too.
    """

    power: float
    streams: bool


@dataclass(frozen=True)
class Candidates:
    """What may go in a step.

    Attributes:
        scores: group name -> divergence of each of its units.
        costs: group name -> cost of its next unit, in what is counted.
        blocks: branches and blocks that may go too.
    """

    scores: Mapping[str, Tensor]
    costs: Mapping[str, float]
    blocks: Mapping[str, ScoredBlock]

    @classmethod
    def of(
        cls, setting: Setting, state: State, units: Mapping[str, Tensor], blocks: Mapping[str, float]
    ) -> "Candidates":
        """Add what each unit and block costs."""
        prices = setting.block_costs(state, list(blocks)) if blocks else {}
        scored = {
            name: ScoredBlock(score, prices[name], setting.structure.block(name).contains)
            for name, score in blocks.items()
        }
        return cls(units, setting.unit_costs(state), scored)


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


def best_cut(
    setting: Setting, state: State, candidates: Candidates, aim: Budget, share: float, *, last: bool
) -> tuple[Ranking, Cut, Made | None]:
    """The ranking, and what stays after a step; of several ways to rank, that with the lowest calibration loss.

    Args:
        setting: of the run.
        state: before the step.
        candidates: what may go.
        aim: targets of the step.
        share: of the units that may go at most.
        last: the aim is that of the stage, so that widths are rounded where the step gets there.

    Returns:
        The ranking, the cut, and the model that it makes where it was made to find the loss.
    """
    ways = _ways(setting)
    rankings = {way: rank(setting, state, candidates, way) for way in ways}
    cuts = {ways[0]: _cut(setting, state, rankings[ways[0]], aim, share, last=last)}
    if len(ways) == 1:
        return rankings[ways[0]], cuts[ways[0]], None
    named = aim.targets or ("macs",)
    # The others go as far down as the first, so that their losses can be compared.
    level = replace(aim, targets={n: share for n, share in _left(setting, state, cuts[ways[0]]).items() if n in named})
    for way in ways[1:]:
        cut = _cut(setting, state, rankings[way], level, 1.0, last=last)
        if not cut.takes_from(state):
            continue  # a first cut that was measured too slow asks for nothing, and doing nothing loses nothing
        if level.shortfall(_left(setting, state, cut)) <= (LATENCY_NOISE if "latency" in level.targets else 0):
            cuts[way] = cut
    if len(cuts) == 1:
        return rankings[ways[0]], cuts[ways[0]], None
    made: list[tuple[float, Cut, Made]] = []

    def loss(tried: Cut) -> float:
        one = make_cut(setting, state, tried.keep, tried.removed)
        found = calibration_loss(setting, one.model)
        if isfinite(found) and (not made or found < made[0][0]):
            made[:] = [(found, tried, one)]  # only the best model so far is held
        return found

    chosen = best_of(cuts, loss)
    best = next((one for _, tried, one in made if tried == cuts[chosen]), None)
    return rankings[chosen], cuts[chosen], best


def _left(setting: Setting, state: State, cut: Cut) -> dict[str, float]:
    """What a cut leaves of each of the original's costs; latency, where it is a goal, as measured now."""
    found = shares_of(setting.costs.cost(cut.keep, cut.removed), setting.whole)
    latency = setting.latency_of(_applied(setting, state, cut))
    return found if latency is None else {**found, "latency": latency}


def _applied(setting: Setting, state: State, cut: Cut) -> nn.Module:
    """A state's model after a cut, for the clock only: projections are not fitted."""
    plan = setting.structure.plan(cut.keep, cut.removed).since(state.plan)
    return apply_plan(state.model, plan)


def _ways(setting: Setting) -> list[Way]:
    """The ways to rank that are tried: powers of the cost, with and without the streams.

    Where seconds are counted, the score per second is tried besides what suits the criterion.
    """
    config = setting.config
    everywhere = config.ranking == "global"
    powers = config.powers if everywhere else (0.0,)
    if everywhere and config.cost_power is None and setting.counted == "latency":
        powers = tuple(dict.fromkeys((*powers, 1.0)))
    streams = setting.structure.streams
    both = everywhere and streams and len(streams) < len(setting.structure.groups)
    choices = {"cut": (True,), "keep": (False,), "auto": (True, False) if both else (True,)}
    return [Way(power, cut) for cut in choices[config.filters.streams] for power in powers]


def least_units(structure: Structure, stage: FilterStage) -> dict[str, int]:
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
    least = {
        group.name: max(1, round(group.size * matching(stage.keep, group.name, stage.min_keep)))
        for group in structure.groups
    }
    for members in alike_groups(structure.groups, stage.alike):
        least |= dict.fromkeys(members, max(least[name] for name in members))
    return least


def rank(setting: Setting, state: State, candidates: Candidates, way: Way) -> Ranking:
    """Rank what may go by score / cost^power."""
    floors = least_units(setting.structure, setting.config.filters)
    if not candidates.scores and setting.structure.groups:
        raise ConfigError(
            f"criterion {opener_of(setting.config.criterion)[0]!r} could score no group of this model; take another."
        )
    costs = candidates.costs
    whole = () if way.streams else setting.structure.streams
    plain = {name: values.tolist() for name, values in candidates.scores.items() if name not in whole}
    there = [group for group in setting.structure.groups if costs.get(group.name, 0.0) > 0]
    alike = alike_groups(there, setting.config.filters.alike)
    if setting.config.ranking == "uniform":
        plain = {name: values for name, values in plain.items() if costs.get(name, 0.0) > 0}
        return tied(rank_uniform(plain, state.keep, floors=floors), alike)
    ranking = rank_units(plain, state.keep, costs, floors=floors, power=way.power, blocks=candidates.blocks)
    allowed = set(ranking.blocks[: max(0, setting.config.layers.removals - len(state.removed))])
    parts = tuple(part for part in ranking.parts if part.unit is not None or part.name in allowed)
    return tied(replace(ranking, parts=parts), alike)


def matching(settings: Mapping[str, float], name: str, default: float) -> float:
    """What is set for a name by the last pattern that matches it.

    >>> matching({"layer1.*": 0.5, "layer1.0.*": 0.8}, "layer1.0.conv1", 0.1)
    0.8
    """
    return next((value for pattern, value in reversed(list(settings.items())) if fnmatchcase(name, pattern)), default)


def _cut(setting: Setting, state: State, ranking: Ranking, aim: Budget, share: float, *, last: bool) -> Cut:
    """Take the lowest share of the ranking, but not more than the step aims at.

    Args:
        setting: of the run.
        state: before the step.
        ranking: of what may go.
        aim: targets of the step.
        share: of the units that may go at most; where groups are alike, one bundle may go in any case.
        last: the aim is that of the stage, so that widths are rounded where the step gets there.
    """
    units = sum(len(units) for units in state.keep.values())
    most = min(len(ranking), max(1, round(share * units), shortest(ranking)))
    if not aim.targets:
        keep = rounded(ranking, ranking.keep(most), 1)
        return Cut(keep, joined(setting.structure, state.removed, ranking.removed(most)))
    multiples = _multiples(setting)

    def down_to(targets: Shares) -> Cut:
        wanted = replace(aim, targets=targets)

        def times_the_goal(keep: Keep, removed: tuple[str, ...]) -> float:
            cost = setting.costs.cost(keep, joined(setting.structure, state.removed, removed))
            return 1 + wanted.shortfall(shares_of(cost, setting.whole))

        choice = reach(ranking, times_the_goal, 1.0, most=most)
        if last and choice.cost <= 1 and max(multiples.values(), default=1) > 1:
            choice = reach(ranking, times_the_goal, 1.0, multiples=multiples, most=len(ranking))
        return Cut(choice.keep, joined(setting.structure, state.removed, choice.removed))

    if "latency" not in aim.targets:
        return down_to(aim.targets)
    return _down_to_latency(setting, state, ranking, aim, down_to)


def _multiples(setting: Setting) -> dict[str, int]:
    """What the number of units of each group is a multiple of in the end: as set, else where the latency has steps."""
    stage = setting.config.filters
    steps: Mapping[str, int] = {}
    if stage.multiple == 1 and "latency" in setting.budget.targets:
        with setting.clock.on("latency"):
            steps = setting.layer_times.steps
    return {
        group.name: int(matching(stage.multiples, group.name, steps.get(group.name, stage.multiple)))
        for group in setting.structure.groups
    }


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
