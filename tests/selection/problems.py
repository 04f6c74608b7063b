"""Random rankings, as a stage in the middle of a run would have them."""

import math
from dataclasses import dataclass

from hypothesis import strategies as st

from idap.selection.ranking import ScoredBlock, rank_uniform, rank_units

GROUPS, BLOCKS = ("a", "b", "c"), ("early", "late", "whole")


@dataclass(frozen=True)
class Problem:
    """What a ranking is made of, and the cost of what it leaves: a sum, so that any test can follow it."""

    scores: dict
    present: dict
    costs: dict
    floors: dict
    caps: dict
    blocks: dict
    power: float

    def rank(self, **changes):
        given = {name: getattr(self, name) for name in ("floors", "caps", "blocks", "power")}
        return rank_units(self.scores, self.present, self.costs, **(given | changes))

    def rank_uniform(self):
        return rank_uniform(self.scores, self.present, floors=self.floors, caps=self.caps)

    def cost(self, keep, removed=()):
        """Cost of units and of the blocks that are neither removed nor part of a removed one."""
        gone = set(removed) | {name for outer in removed for name in self.blocks[outer].contains}
        units = sum(self.costs[name] * len(held) for name, held in keep.items())
        return units + sum(self.own(name) for name in self.blocks if name not in gone)

    def own(self, name):
        """Cost of a block without the blocks that it contains."""
        return self.blocks[name].cost - sum(self.blocks[inner].cost for inner in self.blocks[name].contains)

    def number_removed_before(self, name):
        return len(self.scores[name]) - len(self.present[name])


@st.composite
def problems(draw, largest=12, with_blocks=True):
    """Groups of few units, floors, caps and perhaps blocks, of which one contains the others."""
    scores, present, costs, floors, caps = {}, {}, {}, {}, {}
    for name in GROUPS[: draw(st.integers(1, 3))]:
        size = draw(st.integers(1, largest))
        # Few values, so that there are ties; steps of a quarter, so that sums are exact.
        scores[name] = [draw(st.integers(0, 40)) / 4 for _ in range(size)]
        present[name] = tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
        costs[name] = draw(st.integers(1, 64)) / 4
        floors[name] = draw(st.integers(0, size + 1))
        if draw(st.booleans()):
            caps[name] = draw(st.integers(0, size))
        for unit in set(range(size)) - set(present[name]):
            scores[name][unit] = math.nan  # gone: measured by nobody
    blocks = {}
    if with_blocks and draw(st.booleans()):
        first, second, rest = (draw(st.integers(1, 400)) / 4 for _ in BLOCKS)
        values = [draw(st.integers(0, 400)) / 4 for _ in BLOCKS]
        blocks = {
            "early": ScoredBlock(values[0], first),
            "late": ScoredBlock(values[1], second),
            "whole": ScoredBlock(values[2], first + second + rest, ("early", "late")),
        }
    return Problem(scores, present, costs, floors, caps, blocks, draw(st.sampled_from([0.0, 0.5, 1.0])))
