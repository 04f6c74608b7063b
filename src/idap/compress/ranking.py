"""How a step of stage 1 ranks what may go: what is scored, what it costs, what always stays."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from idap.compress.config import FilterStage
from idap.compress.state import Setting, State
from idap.divergence.criteria import opener_of
from idap.errors import ConfigError
from idap.selection.alike import alike_groups, tied
from idap.selection.rounding import common_multiple
from idap.selection.units import Ranking, ScoredBlock, rank_uniform, rank_units
from idap.structure.analysis import Structure


class Way(NamedTuple):
    """How to rank.

    Attributes:
        power: p in score / cost^p.
        streams: whether the channels of residual streams may go too.
        stepped: whether widths end at the steps of the hardware.
    """

    power: float
    streams: bool
    stepped: bool = False


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


def ways(setting: Setting) -> list[Way]:
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
    multiples = multiples_of(setting.structure, setting.config.filters)
    if setting.config.ranking == "uniform":
        plain = {name: values for name, values in plain.items() if costs.get(name, 0.0) > 0}
        return tied(rank_uniform(plain, state.keep, floors=floors), alike, multiples)
    ranking = rank_units(plain, state.keep, costs, floors=floors, power=way.power, blocks=candidates.blocks)
    allowed = set(ranking.blocks[: max(0, setting.config.layers.removals - len(state.removed))])
    parts = tuple(part for part in ranking.parts if part.unit is not None or part.name in allowed)
    return tied(replace(ranking, parts=parts), alike, multiples)


def multiples_of(structure: Structure, stage: FilterStage, steps: Mapping[str, int] | None = None) -> dict[str, int]:
    """What the number of units of each group is a multiple of: as set, else where these steps of the hardware are.

    What is set for all groups does not count for heads: the width of a layer is a multiple of theirs in any case.
    """
    usual = {group.name: 1 if group.kind == "heads" else stage.multiple for group in structure.groups}
    usual |= steps or {}
    return {name: int(matching(stage.multiples, name, multiple)) for name, multiple in usual.items()}


def least_units(structure: Structure, stage: FilterStage) -> dict[str, int]:
    """The number of units that always stay of each group: a multiple if one is set, or the whole group.

    Streams that are to be left whole hold back the groups that are to stay alike with them.

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
    if stage.streams == "keep":
        least |= {name: structure.group(name).size for name in structure.streams}
    multiples, alike = multiples_of(structure, stage), alike_groups(structure.groups, stage.alike)
    found = {}
    for group in structure.groups:
        members = next((names for names in alike if group.name in names), (group.name,))
        multiple = common_multiple(multiples, members)
        found[group.name] = min(group.size, -(-max(least[name] for name in members) // multiple) * multiple)
    return found


def matching(settings: Mapping[str, float], name: str, default: float) -> float:
    """What is set for a name by the last pattern that matches it.

    >>> matching({"layer1.*": 0.5, "layer1.0.*": 0.8}, "layer1.0.conv1", 0.1)
    0.8
    """
    return next((value for pattern, value in reversed(list(settings.items())) if fnmatchcase(name, pattern)), default)
