"""What may be removed from a model, and how much each part changes the flow: as plain numbers and as trees."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from idap.cost.count import CostModel
    from idap.divergence.measure import Divergence
    from idap.structure.analysis import Structure
    from idap.structure.groups import Blocked


MOST_SHOWN = 3
"""How many dimensions that can't shrink are listed for each reason; --json lists all."""


@dataclass(frozen=True, kw_only=True)
class GroupView:
    """One group of coupled units.

    Attributes:
        name: name of the group.
        kind: channels, neurons, heads or head width.
        size: number of units.
        macs_share: share of all multiply-adds that scales with the number of its units.
        members: tensors that shrink with it, as `name[dimension]`.
        crosses: norms, softmaxes and reductions over its units.
    """

    name: str
    kind: str
    size: int
    macs_share: float
    members: tuple[str, ...]
    crosses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BlockView:
    """One branch or block that can be removed whole.

    Attributes:
        name: name of the part.
        kind: branch or block.
        macs_share: share of all multiply-adds that is removed with it.
        contains: names of the parts that are removed with it.
    """

    name: str
    kind: str
    macs_share: float
    contains: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StructureView:
    """Everything that `idap inspect` shows.

    Attributes:
        model: class of the model.
        macs: multiply-adds for one sample.
        parameters: number of parameters.
        prunable: share of the parameters that have a dimension that can shrink.
        groups: in the order of the network.
        blocks: in the order of the network.
        blocked: dimensions that can't shrink.
        rewritten: paths of the modules whose forward is rewritten when the groups that they use are cut.
    """

    model: str
    macs: int
    parameters: int
    prunable: float
    groups: tuple[GroupView, ...]
    blocks: tuple[BlockView, ...]
    blocked: tuple["Blocked", ...]
    rewritten: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as dicts and lists."""
        return asdict(self)


def survey(model: str, structure: "Structure", costs: "CostModel") -> StructureView:
    """Collect what may be removed from a model.

    Args:
        model: class of the model.
        structure: from `analyze`.
        costs: the costs of the same structure.

    Returns:
        Plain names and numbers.
    """
    whole = costs.cost()
    units = costs.unit_macs()
    total = max(1, whole.macs)
    return StructureView(
        model=model,
        macs=whole.macs,
        parameters=whole.parameters,
        prunable=structure.prunable,
        groups=tuple(
            GroupView(
                name=group.name,
                kind=group.kind,
                size=group.size,
                macs_share=units[group.name] * group.size / total,
                members=tuple(f"{tensor}[{dim}]" for tensor, dim in group.members),
                crosses=group.crosses,
            )
            for group in structure.groups
        ),
        blocks=tuple(
            BlockView(
                name=block.name,
                kind=block.kind,
                macs_share=costs.block_macs(block.name) / total,
                contains=block.contains,
            )
            for block in structure.blocks
        ),
        blocked=structure.blocked,
        rewritten=structure.rewritten,
    )


def structure_tree(view: StructureView, *, members: bool = False) -> Tree:
    """Draw what may be removed.

    Args:
        view: from `survey`.
        members: list the tensors of each group.

    Returns:
        A rich tree: groups, blocks with the branches in them, and dimensions that can't shrink.
    """
    from idap.structure.groups import by_reason  # noqa: PLC0415 - imports torch

    facts = f"{view.parameters:,} parameters, {view.macs:,} MACs per sample, {view.prunable:.0%} prunable"
    root = Tree(Text.assemble((view.model, "bold"), f": {facts}"))
    _add_groups(root, view.groups, members=members)
    _add_blocks(root, view.blocks)
    if view.rewritten:
        what = f"{_count(len(view.rewritten), 'module')} whose forward is rewritten when its groups are cut"
        root.add(Text(what, style="bold")).add(Text(", ".join(view.rewritten), style="dim"))
    if view.blocked:
        branch = root.add(Text(f"{_count(len(view.blocked), 'dimension')} of weights can't shrink", style="bold"))
        for reason, items in by_reason(view.blocked).items():
            places = [f"{item.tensor}, dimension {item.dim} of size {item.size}" for item in items]
            shown = ", ".join(places[:MOST_SHOWN]) + (
                f" and {len(places) - MOST_SHOWN} more" * (len(places) > MOST_SHOWN)
            )
            branch.add(Text(shown)).add(Text(reason, style="dim"))
    return root


def _add_groups(root: Tree, groups: Sequence[GroupView], *, members: bool) -> None:
    units = sum(group.size for group in groups)
    branch = root.add(
        Text(f"{_count(len(groups), 'group')} with {units:,} units; each unit can be removed", style="bold")
    )
    name = max((len(group.name) for group in groups), default=0)
    kind = max((len(group.kind) for group in groups), default=0)
    size = len(str(max((group.size for group in groups), default=0)))
    for group in groups:
        line = Text.assemble(
            (f"{group.name:<{name}}", "cyan"),
            f"  {group.size:>{size}} {group.kind:<{kind}}  {group.macs_share:>6.1%} of MACs",
            f"  {len(group.members)} tensors",
        )
        added = branch.add(line)
        if members:
            added.add(Text(", ".join(group.members), style="dim"))
        if members and group.crosses:
            added.add(Text(f"crosses {', '.join(group.crosses)}", style="dim"))


def _add_blocks(root: Tree, blocks: Sequence[BlockView]) -> None:
    branch = root.add(Text(f"{_count(len(blocks), 'part')} that can be removed whole", style="bold"))
    parents = _parents(blocks)
    depth = {block.name: _depth(block.name, parents) for block in blocks}
    width = max((len(block.name) + 4 * depth[block.name] for block in blocks), default=0)
    nodes: dict[str, Tree] = {}
    # Larger parts first, so that a parent exists before its children; the order of the network otherwise.
    for block in sorted(blocks, key=lambda block: depth[block.name]):
        line = Text.assemble(
            (f"{block.name:<{width - 4 * depth[block.name]}}", "cyan"),
            f"  {block.kind:<6}  {block.macs_share:>6.1%} of MACs",
        )
        parent = parents.get(block.name)
        nodes[block.name] = (branch if parent is None else nodes[parent]).add(line)


def _parents(blocks: Sequence[BlockView]) -> dict[str, str]:
    """For each part the smallest part that contains it."""
    found: dict[str, str] = {}
    for outer in sorted(blocks, key=lambda block: -len(block.contains)):
        found |= dict.fromkeys(outer.contains, outer.name)
    return found


def _depth(name: str, parents: Mapping[str, str]) -> int:
    return 0 if name not in parents else 1 + _depth(parents[name], parents)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


WIDTH = 20
"""Characters of the longest bar."""


@dataclass(frozen=True, kw_only=True)
class GroupDivergence:
    """The divergence of the units of one group.

    Attributes:
        name: name of the group.
        kind: kind of its units.
        units: score of each unit.
    """

    name: str
    kind: str
    units: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PartDivergence:
    """The divergence of one branch or block.

    Attributes:
        name: name of the part.
        kind: branch or block.
        divergence: divergence of the whole part.
        inside: sum over the units that lie entirely inside it.
    """

    name: str
    kind: str
    divergence: float
    inside: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The divergence of everything, in the order of the network.

    Attributes:
        criterion: the criterion that gave the scores; if it can't score blocks, "relative" scores them.
        batches: number of calibration batches.
        groups: in the order of the network.
        parts: branches and blocks, in the order of the network.
        unmeasured: parts that could not be measured.
        notes: what the scores leave out if a group is too large to be measured whole.
    """

    criterion: str
    batches: int
    groups: tuple[GroupDivergence, ...]
    parts: tuple[PartDivergence, ...]
    unmeasured: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as dicts and lists."""
        return asdict(self)


def profile(structure: "Structure", found: "Divergence", batches: int) -> Profile:
    """Collect a measurement in the order of the network."""
    return Profile(
        criterion=found.criterion,
        batches=batches,
        groups=tuple(
            GroupDivergence(name=group.name, kind=group.kind, units=tuple(found.units[group.name].tolist()))
            for group in structure.groups
            if group.name in found.units
        ),
        parts=tuple(
            PartDivergence(
                name=block.name,
                kind=block.kind,
                divergence=found.blocks[block.name],
                inside=found.inside(structure, block.name),
            )
            for block in structure.blocks
            if block.name in found.blocks
        ),
        unmeasured=found.unmeasured,
        notes=found.notes,
    )


def profile_tree(view: Profile) -> Tree:
    """Draw a profile: a line for each group and each part, with a bar."""
    root = Tree(Text(f"divergence ({view.criterion}), measured on {view.batches} calibration batches", style="bold"))
    branch = root.add(Text("units: lowest, median, highest of each group; the bar is the median", style="bold"))
    middles = [statistics.median(group.units) for group in view.groups]
    _add(
        branch,
        [group.name for group in view.groups],
        [f"{min(g.units):9.2e} {m:9.2e} {max(g.units):9.2e}" for g, m in zip(view.groups, middles, strict=True)],
        middles,
    )
    if view.parts:
        branch = root.add(Text("branches and blocks, over depth", style="bold"))
        shares = [part.divergence for part in view.parts]
        _add(branch, [part.name for part in view.parts], [f"{share:9.2e}" for share in shares], shares)
    if view.unmeasured:
        root.add(Text("could not be measured", style="bold")).add(Text(", ".join(view.unmeasured), style="dim"))
    for note in view.notes:
        root.add(Text(note, style="dim"))
    return root


def _add(branch: Tree, names: Sequence[str], numbers: Sequence[str], lengths: Sequence[float]) -> None:
    width = max(map(len, names), default=0)
    longest = max(lengths, default=0.0) or 1.0
    for name, number, length in zip(names, numbers, lengths, strict=True):
        bar = "█" * round(WIDTH * length / longest) or "▏"
        branch.add(Text.assemble((f"{name:<{width}}", "cyan"), f"  {number}  ", (bar, "magenta")))
