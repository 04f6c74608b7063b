"""The structure of a model: what may be removed, what the removal requires, and what can't be removed and why."""

import gc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from idap.errors import PlanError, StructureError
from idap.graph.ir import Graph
from idap.graph.rules import flow_of
from idap.structure.blocks import Block
from idap.structure.code.repair import CodeChanges, expressible, renumber, repair_code
from idap.structure.code.rewrite import Rewriter
from idap.structure.code.sizes import Demand, new_values
from idap.structure.groups import Blocked, Group, blocked_dims, obstacles
from idap.structure.layout import Layout, Presence, slots
from idap.structure.plan import CallForm, Plan
from idap.structure.projections import Replacement, find_removable, with_projections
from idap.structure.replacement import PROJECTION, Projected

Named = TypeVar("Named", Group, Block)


@dataclass(frozen=True, repr=False)
class Structure:
    """Groups of coupled units and removable blocks of one model; it holds only names, numbers and index arrays.

    Attributes:
        graph: the traced model.
        groups: in the order of the network.
        blocks: residual branches and blocks, in the order of the network.
        blocked: dimensions of weights that can't shrink, with reasons.
        layout: where the units lie in every tensor.
        demands: what the code requires of sizes.
        rewriter: rewrites the code of modules that can't follow a cut.
        rewritten: paths of the modules whose code is rewritten if all groups are cut.
        standing: names of the blocks that are projections in this graph; see `after`.
    """

    graph: Graph
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    blocked: tuple[Blocked, ...]
    layout: Layout = field(compare=False)
    demands: tuple[Demand, ...] = field(compare=False)
    rewriter: Rewriter = field(compare=False)
    rewritten: tuple[str, ...] = ()
    standing: tuple[str, ...] = ()

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        return (
            f"Structure({len(self.groups)} groups with {units} units, {len(self.blocks)} blocks and branches, "
            f"{self.prunable:.0%} of the parameters prunable)"
        )

    def _repr_html_(self) -> str:
        """The table that a notebook shows: the groups, and the branches and blocks."""
        from idap.report.page import table_display  # noqa: PLC0415 - needed in notebooks only

        rows = [
            (group.name, group.kind, f"{group.size:,}", "stream" if group.name in self.streams else "")
            for group in self.groups
        ]
        rows += [(block.name, block.kind, "", "") for block in self.blocks]
        note = f"{len(self.blocked)} dimensions of weights can't shrink; structure.blocked says why."
        return table_display(repr(self), ("name", "kind", "units", ""), rows, note=note if self.blocked else "")

    def group(self, name: str) -> Group:
        """The group of this name.

        Raises:
            StructureError: no group has this name.
        """
        return _by_name("group", name, self.groups)

    def block(self, name: str) -> Block:
        """The branch or block of this name.

        Raises:
            StructureError: no branch or block has this name.
        """
        return _by_name("block or branch", name, self.blocks)

    def groups_inside(self, block: str) -> tuple[Group, ...]:
        """The groups that lie entirely within a branch or block: only its operators write and read them."""
        nodes = self.block(block).nodes
        ports = [{port.node for port in (*group.writers, *group.readers)} for group in self.groups]
        return tuple(group for group, used in zip(self.groups, ports, strict=True) if used and used <= nodes)

    @cached_property
    def streams(self) -> frozenset[str]:
        """Names of the groups whose units residual streams carry, so that they enter a branch or block."""
        dims = [dim for block in self.blocks for dim in self.layout.dims[block.entry][0]]
        carried = {index for dim in dims for index in self.layout.groups_in(dim)}
        return frozenset(group.name for group in self.groups if group.index in carried)

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
        """Which labels are present if the named groups keep only these units."""
        return self.layout.presence({self.group(name).index: units for name, units in keep.items()})

    def after(self, removed: Iterable[str]) -> "Structure":
        """The structure with projections in place of the removed blocks that become projections.

        The projections are ordinary layers of its graph, with dims of the same labels. Use it to examine a model from
        which these blocks were removed; plans are made by the structure of the original.
        """
        blocks = [self.block(name) for name in removed]
        inner = {name for block in blocks for name in block.contains}
        new = {b.name for b in blocks if b.projected is not None} - inner - set(self.standing)
        names = tuple(block.name for block in self.blocks if block.name in new)
        if not names:
            return self
        if names not in self._after:
            chosen = [self.block(name) for name in names]
            graph, layout, groups = with_projections(self.graph, self.layout, self.groups, chosen)
            standing = (*self.standing, *names)
            self._after[names] = replace(self, graph=graph, layout=layout, groups=groups, standing=standing)
        return self._after[names]

    @cached_property
    def _after(self) -> "dict[tuple[str, ...], Structure]":
        return {}

    def skips(self, removed: Iterable[str]) -> dict[str, str]:
        """Node -> node whose value it takes, for removed branches and blocks that leave the stream unchanged."""
        blocks = [self.block(name) for name in removed]
        inner = {name for block in blocks if block.projected is not None for name in block.contains}
        return {b.exit: b.entry for b in blocks if b.projected is None and b.name not in inner}

    def dead_nodes(self, removed: Collection[str]) -> set[str]:
        """Nodes of `after` that nothing depends on once these branches and blocks are removed."""
        graph = self.after(removed).graph
        return set(graph.nodes) - graph.live(self.skips(removed))

    def plan(self, keep: Mapping[str, Sequence[int]], removed: Sequence[str] = ()) -> Plan:
        """Work out everything that has to change so that only these parts are kept.

        Args:
            keep: group name -> units to keep; groups that are not named stay whole. If no unit of a group is kept, the
                branch or block that contains the whole group is removed.
            removed: names of branches and blocks to remove.

        Raises:
            StructureError: a name is unknown.
            PlanError: a group would lose all units and no branch or block contains it, a unit to keep does not exist,
                or the code can't express the sizes.
        """
        empty = [self.group(name) for name, units in keep.items() if not len(units)]
        removed = tuple(dict.fromkeys([*removed, *(self._holder(group) for group in empty)]))
        kept = {name: _check_units(self.group(name), units) for name, units in keep.items() if len(units)}
        kept = {name: units for name, units in kept.items() if len(units) < self.group(name).size}
        present = self.presence(kept)
        replaced = {path: kind for name in removed for path, kind in self.block(name).replaced.items()}
        outer = {path: kind for path, kind in replaced.items() if not any(path.startswith(f"{o}.") for o in replaced)}
        sketch = Plan(kept, tuple(removed), self._slices(present), self.graph.shapes, replaced=outer)
        settled = self._code_changes(present, sketch)
        attributes = new_values(settled.values.solved, self.graph.modules)
        for path, numbers in renumber(self.graph.modules, sketch.removes).items() if outer else ():
            attributes[path] = {**attributes.get(path, {}), **numbers}
        return replace(
            sketch,
            tensors={name: dims for name, dims in sketch.tensors.items() if not sketch.removes(name)},
            attributes={path: values for path, values in attributes.items() if not sketch.removes(path)},
            called={path: called for path in outer if (called := self._call_form(path)) is not None},
            programs=settled.programs,
            aliases=self.graph.aliases,
            unsaved=self.graph.unsaved,
            projections={path: self.projection_of(path, present) for path, kind in outer.items() if kind == PROJECTION},
        )

    def projection_of(self, name: str, present: Presence) -> Projected:
        """The linear map that a block becomes, with the channels that are present at its entry and exit.

        Raises:
            StructureError: no block has this name, or it does not become a projection.
        """
        block = self.block(name)
        if block.projected is None:
            raise StructureError(f"{block.kind} {name!r} is removed and not replaced by a projection")
        inputs, outputs = (
            tuple(np.flatnonzero(slots(self.layout.dims[node][0][block.projected.dim], present)).tolist())
            for node in (block.entry, block.exit)
        )
        return replace(block.projected, inputs=inputs, outputs=outputs)

    def _holder(self, group: Group) -> str:
        """The smallest branch or block in which all of a group's units are written and read.

        Raises:
            PlanError: there is none.
        """
        ports = {port.node for port in (*group.writers, *group.readers)}
        holders = [block for block in self.blocks if ports and ports <= block.nodes and block.projected is None]
        if not holders:
            raise PlanError(
                f"group {group.name!r} would lose all its {group.size} units, and no residual branch contains the "
                "whole group and could be removed instead; keep at least one unit"
            )
        return min(holders, key=lambda block: len(block.nodes)).name

    def _call_form(self, path: str) -> CallForm | None:
        """How a module that is to be replaced is called; None for the ordinary way."""
        (call,) = self.graph.modules[path].calls
        called = CallForm(call.takes, call.gives)
        return None if called == CallForm(0, ("stream",)) else called

    def _code_changes(self, present: Presence, sketch: Plan) -> CodeChanges:
        """How the code follows the cut; code in a replaced module makes no demands.

        Raises:
            PlanError: a demand of the code can't be met.
        """
        gone = {name for name, node in self.graph.nodes.items() if node.owner and sketch.removes(node.owner)}
        demands = [
            demand
            for demand in self.demands
            if demand.node not in gone
            and not (demand.defines and sketch.removes(demand.defines.module))
            and not (demand.module and sketch.removes(demand.module))
        ]
        settled = repair_code(demands, self.layout, present, self.rewriter, sketch.removes)
        for demand in settled.unmet:
            cut = sorted({index for dim in demand.dims(self.layout) for index in self.layout.groups_in(dim)})
            raise PlanError(
                f"the model's code can't run with this cut: {demand.why(settled.values, settled.closed)} "
                f"(groups {', '.join(self.groups[index].name for index in cut)}); keep these groups whole."
            )
        return settled

    def _slices(self, present: Presence) -> dict[str, dict[int, tuple[int, ...]]]:
        found: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, dims in self.layout.tensors.items():
            for place, dim in enumerate(dims):
                stays = slots(dim, present) if len(dim) else None
                if stays is not None and not stays.all():
                    found.setdefault(name, {})[place] = tuple(np.flatnonzero(stays).tolist())
        return found


def analyze(
    graph: Graph,
    *,
    contracts: Sequence[str] | None = None,
    swap: bool = True,
    replacement: Replacement = "identity",
    freeze_unknown: bool = False,
    required: bool = True,
) -> Structure:
    """Find what may be removed from a traced model.

    Args:
        graph: from `trace`.
        contracts: outputs whose shape must not change, such as ``logits``; None means all that the model returns.
        swap: rewrite the code of a module if it can't reach the sizes of a cut; False keeps the groups whole that
            would need this.
        replacement: what replaces removed blocks. "identity" offers only blocks that map the stream to itself. "auto"
            also offers blocks whose input and output differ in shape; these become linear maps of the channels.
            "projection" turns all blocks into such maps; branches still become the identity.
        freeze_unknown: keep every dimension that an operator without a rule touches, instead of raising.
        required: raise if nothing can be pruned; False returns the empty structure with its reasons.

    Raises:
        UnknownOperatorError: an operator has no rule.
        StructureError: nothing can be pruned (the message says why), or the model has no output of a given name.

    Example:
        >>> from torch import nn, zeros
        >>> from idap.graph.trace import trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> structure = analyze(trace(net, (zeros(1, 4),)))
        >>> [(group.name, group.kind, group.size) for group in structure.groups]
        [('0', 'neurons', 8)]
    """
    with _pause_collector():
        flow = flow_of(graph, freeze_unknown=freeze_unknown, contracts=contracts)
        rewriter = Rewriter(graph, enabled=swap)
        groups, layout, demands, rewritten = expressible(flow, rewriter)
        blocks = find_removable(graph, layout, replacement)
        blocked = blocked_dims(flow, layout)
    structure = Structure(graph, groups, blocks, blocked, layout, demands, rewriter, rewritten)
    if required and not groups and not blocks:
        reasons = "\n".join(f"  {line}" for line in obstacles(structure.blocked))
        raise StructureError(
            "nothing can be pruned: the model has no group of units and no residual block that may be removed."
            + (f" What stands in the way:\n{reasons}" if reasons else " It has no layer between two others.")
        )
    return structure


@contextmanager
def _pause_collector() -> Iterator[None]:
    """Pause the garbage collector while many lasting objects are made, as it would walk over all of them."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def _check_units(group: Group, units: Sequence[int]) -> tuple[int, ...]:
    kept = tuple(sorted({int(unit) for unit in units}))
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
