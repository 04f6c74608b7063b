"""Which groups the code of a model can follow: what it can't express is tied or frozen."""

from collections.abc import Sequence

import numpy as np

from idap.graph.rules import Flow
from idap.structure.attributes import Demand, tied_dims
from idap.structure.demands import demands_of
from idap.structure.groups import Group, build_groups
from idap.structure.layout import Layout
from idap.structure.rewrite import Rewriter
from idap.structure.settle import Settled, settle

TRIALS = 4
"""How many random cuts must be expressible: one of all groups at once, the others of about half of them."""


def expressible(
    flow: Flow, rewriter: Rewriter
) -> tuple[tuple[Group, ...], Layout, tuple[Demand, ...], tuple[str, ...]]:
    """Groups, of which every cut can be expressed by the code: what it can't express is tied or frozen.

    Returns:
        The groups, where their units lie, what the code demands, and the modules that get new code.
    """
    given_up: set[tuple[str, str]] = set()
    flow.labels.because("the code counts it with a number that also counts something else")
    for one, other in list(tied_dims(demands_of(flow.graph, flow), flow)):
        flow.labels.unify(one, other)
    while True:
        groups, layout = build_groups(flow)
        demands = [d for d in demands_of(flow.graph, layout) if (d.node, d.place) not in given_up]
        unmet, rewritten = _try_cuts(demands, groups, layout, rewriter)
        if not unmet:
            return groups, layout, tuple(demands), rewritten
        for demand, reason in unmet.items():
            flow.labels.because(reason)
            shared = [other for other in demands if other.attributes & demand.attributes]
            for dim in [dim for other in (demand, *shared) for dim in other.dims(layout)]:
                flow.labels.freeze_dim(dim)
        given_up |= {(demand.node, demand.place) for demand in unmet}


def _try_cuts(
    demands: Sequence[Demand], groups: Sequence[Group], layout: Layout, rewriter: Rewriter
) -> tuple[dict[Demand, str], tuple[str, ...]]:
    """Cut on trial and see which demands the code can't meet, and why; and which modules get new code."""
    rewritten: dict[str, None] = {}
    for seed in range(TRIALS):
        random = np.random.default_rng(seed)
        kept = {
            group.index: random.permutation(group.size)[: random.integers(1, max(2, group.size))]
            for group in groups
            if seed == 0 or random.random() < 0.5
        }
        settled = settle(demands, layout, layout.presence(kept), rewriter, known=rewritten)
        if settled.unmet:
            return {demand: _why(demand, settled, rewriter) for demand in settled.unmet}, ()
        rewritten |= dict.fromkeys(settled.programs)
    return {}, tuple(rewritten)


def _why(demand: Demand, settled: Settled, rewriter: Rewriter) -> str:
    """Why the code can't follow, and why it can't be written anew either: one line."""
    why = demand.why(settled.values, settled.closed)
    refusal = None if demand.defines else rewriter.refused.get(demand.module)
    return f"{why}; the code can't be written anew: {refusal}" if refusal else why
