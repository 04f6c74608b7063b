"""How much each part of a network changes the flow, as plain numbers and as a profile over depth."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from idap.divergence.measure import Divergence
    from idap.structure.analysis import Structure

WIDTH = 20
"""Characters of the longest bar."""


@dataclass(frozen=True, kw_only=True)
class GroupDivergence:
    """The divergence of the units of one group.

    Attributes:
        name: of the group.
        kind: of its units.
        units: score of each unit.
    """

    name: str
    kind: str
    units: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PartDivergence:
    """The divergence of one branch or block.

    Attributes:
        name: of the part.
        kind: branch or block.
        divergence: of the whole part.
        inside: sum over the units that it holds whole.
    """

    name: str
    kind: str
    divergence: float
    inside: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The divergence of everything, in the order of the network.

    Attributes:
        criterion: that was measured; blocks of a criterion that knows none are measured as "relative".
        batches: number of calibration batches.
        groups: in the order of the network.
        parts: branches and blocks, in the order of the network.
        unmeasured: what nothing could be seen of.
        notes: what the scores leave out where a group is too large to be measured whole.
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
        root.add(Text("nothing could be seen of", style="bold")).add(Text(", ".join(view.unmeasured), style="dim"))
    for note in view.notes:
        root.add(Text(note, style="dim"))
    return root


def _add(branch: Tree, names: Sequence[str], numbers: Sequence[str], lengths: Sequence[float]) -> None:
    width = max(map(len, names), default=0)
    longest = max(lengths, default=0.0) or 1.0
    for name, number, length in zip(names, numbers, lengths, strict=True):
        bar = "█" * round(WIDTH * length / longest) or "▏"
        branch.add(Text.assemble((f"{name:<{width}}", "cyan"), f"  {number}  ", (bar, "magenta")))
