"""The structure of a model: what may be removed, what that takes, and what can't go and why."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from idap.errors import PlanError, StructureError
from idap.graph.ir import Graph
from idap.graph.rules import Flow, flow_of
from idap.graph.run import live_nodes
from idap.structure.attributes import Conflict, collect, solve_attributes
from idap.structure.blocks import Block, find_blocks
from idap.structure.groups import Blocked, Group, blocked_dims, build_groups
from idap.structure.layout import Layout, Presence, slots
from idap.structure.plan import Plan

Named = TypeVar("Named", Group, Block)


@dataclass(frozen=True, repr=False)
class Structure:
    """Groups of coupled units and removable blocks of one model; holds names, numbers and index arrays only.

    Attributes:
        graph: the traced model.
        groups: in the order of the network.
        blocks: residual branches and blocks, in the order of the network.
        blocked: dimensions of weights that can't shrink, with reasons.
        layout: where the units lie in every tensor.
    """

    graph: Graph
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    blocked: tuple[Blocked, ...]
    layout: Layout = field(compare=False)

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        return (
            f"Structure({len(self.groups)} groups with {units} units, {len(self.blocks)} blocks and branches, "
            f"{self.prunable:.0%} of the parameters prunable)"
        )

    def group(self, name: str) -> Group:
        """The group of this name.

        Raises:
            StructureError: there is none.
        """
        return _by_name("group", name, self.groups)

    def block(self, name: str) -> Block:
        """The branch or block of this name.

        Raises:
            StructureError: there is none.
        """
        return _by_name("block or branch", name, self.blocks)

    @property
    def prunable(self) -> float:
        """Share of all parameters that have at least one dimension that can shrink, in [0, 1]."""
        sizes = {
            name: int(np.prod(self.graph.shapes[name]))
            for name in {node.target for node in self.graph.nodes.values() if node.op == "parameter"}
        }
        free = sum(size for name, size in sizes.items() if any(map(self.layout.groups_in, self.layout.tensors[name])))
        return free / max(1, sum(sizes.values()))

    def presence(self, keep: Mapping[str, Sequence[int]]) -> Presence:
        """Which labels stay when the named groups keep only these units."""
        return self.layout.presence({self.group(name).index: units for name, units in keep.items()})

    def skips(self, removed: Iterable[str]) -> dict[str, str]:
        """Node -> node whose value it takes, for the removed branches and blocks."""
        return {self.block(name).exit: self.block(name).entry for name in removed}

    def dead_nodes(self, removed: Iterable[str]) -> set[str]:
        """Nodes that nothing depends on once these branches and blocks are removed."""
        return set(self.graph.nodes) - live_nodes(self.graph, self.skips(removed))

    def plan(self, keep: Mapping[str, Sequence[int]], removed: Sequence[str] = ()) -> Plan:
        """Work out everything that a decision takes.

        Args:
            keep: group name -> units to keep; groups that are not named stay whole.
            removed: names of branches and blocks to remove.

        Raises:
            StructureError: a name is unknown.
            PlanError: a group would lose all units or keeps one it doesn't have, or the code can't express the sizes.
        """
        kept = {name: _checked(self.group(name), units) for name, units in keep.items()}
        kept = {name: units for name, units in kept.items() if len(units) < self.group(name).size}
        present = self.presence(kept)
        solved, conflicts = solve_attributes(self.graph.nodes, self.layout, present, self.dead_nodes(removed))
        if conflicts:
            raise PlanError(
                f"the model's code can't run with this cut: {conflicts[0].reason()} "
                f"(groups {self._groups_in(conflicts[0])}); keep these groups whole."
            )
        replaced = {path: kind for name in removed for path, kind in self.block(name).replaced.items()}
        outer = {path: kind for path, kind in replaced.items() if not any(path.startswith(f"{o}.") for o in replaced)}
        plan = Plan(
            keep=kept, removed=tuple(removed), tensors=self._slices(present), shapes=self.graph.shapes, replaced=outer
        )
        shapes = {name: plan.shape_after(name) for name in self.graph.shapes}
        return Plan(
            keep=kept,
            removed=tuple(removed),
            tensors={name: dims for name, dims in plan.tensors.items() if not plan.gone(name)},
            shapes=self.graph.shapes,
            attributes={
                path: values
                for path, values in collect(solved, self.graph.modules, shapes).items()
                if not plan.gone(path)
            },
            replaced=outer,
        )

    def _slices(self, present: Presence) -> dict[str, dict[int, tuple[int, ...]]]:
        found: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, dims in self.layout.tensors.items():
            for place, dim in enumerate(dims):
                stays = slots(dim, present) if len(dim) else None
                if stays is not None and not stays.all():
                    found.setdefault(name, {})[place] = tuple(np.flatnonzero(stays).tolist())
        return found

    def _groups_in(self, conflict: Conflict) -> list[str]:
        return [self.groups[index].name for index in sorted(self.layout.groups_in(conflict.use.dim))]


def analyze(
    graph: Graph, *, contracts: Sequence[str] | None = None, freeze_unknown: bool = False, required: bool = True
) -> Structure:
    """Find what may be removed from a traced model.

    Args:
        graph: from `trace`.
        contracts: nodes whose shape must not change; None means all that the model returns.
        freeze_unknown: leave alone what an operator without a rule touches, instead of raising.
        required: raise where there is nothing to prune; False returns the empty structure with its reasons.

    Raises:
        UnknownOperatorError: an operator has no rule.
        StructureError: nothing can be pruned; the message says why.

    Example:
        >>> from torch import nn, zeros
        >>> from idap.graph.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> structure = analyze(trace(net, (zeros(1, 4),)))
        >>> [(group.name, group.kind, group.size) for group in structure.groups]
        [('0', 'neurons', 8)]
    """
    flow = flow_of(graph, freeze_unknown=freeze_unknown, contracts=contracts)
    groups, layout = build_groups(flow)
    while conflicts := _conflicts(flow, groups, layout):
        for conflict in conflicts:
            flow.labels.because(conflict.reason())
            for use in (conflict.use, *conflict.related):
                flow.labels.freeze_dim(use.dim)
        groups, layout = build_groups(flow)
    structure = Structure(graph, groups, find_blocks(graph), blocked_dims(flow, layout), layout)
    if required and not groups and not structure.blocks:
        reasons = "\n".join(f"  {b.tensor}, dimension {b.dim}: {b.reason}" for b in structure.blocked[:8])
        raise StructureError(
            "nothing can be pruned: the model has no group of units and no residual block that may go."
            + (f" What stands in the way:\n{reasons}" if reasons else " It has no layer between two others.")
        )
    return structure


def _conflicts(flow: Flow, groups: Sequence[Group], layout: Layout) -> list[Conflict]:
    """Cut every group on trial, evenly and unevenly, and see which sizes the code can't follow."""
    for seed in range(2):
        random = np.random.default_rng(seed)
        kept = {
            group.index: np.sort(random.permutation(group.size)[: max(1, round(group.size * share))])
            for group in groups
            for share in [float(random.uniform(0.4, 0.9))]
        }
        _, conflicts = solve_attributes(flow.graph.nodes, layout, layout.presence(kept), ())
        if conflicts:
            return conflicts
    return []


def _checked(group: Group, units: Sequence[int]) -> tuple[int, ...]:
    kept = tuple(sorted({int(unit) for unit in units}))
    if not kept:
        raise PlanError(f"group {group.name!r} would lose all its {group.size} units; keep at least one of them")
    if kept[0] < 0 or kept[-1] >= group.size:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise PlanError(f"group {group.name!r} has units 0 to {group.size - 1}, asked to keep unit {wrong}")
    return kept


def _by_name(what: str, name: str, items: Sequence[Named]) -> Named:
    for item in items:
        if item.name == name:
            return item
    known = ", ".join(item.name for item in items[:12])
    raise StructureError(f"there is no {what} named {name!r}; there are: {known}{' …' if len(items) > 12 else ''}")
