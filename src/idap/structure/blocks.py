"""Residual branches and whole blocks, found in the graph: what may vanish without leaving a hole."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from idap.graph.ir import Graph, Node, Ref
from idap.graph.rules.flow import base_name

IDENTITY, ZERO = "identity", "zero"


@dataclass(frozen=True)
class Block:
    """A part of the network whose removal lets the flow pass unchanged.

    Attributes:
        name: path of the module that goes, or the range of modules for a branch spread over several.
        kind: "branch" (what is added to the stream) or "block" (a module that maps the stream to itself).
        entry: node that holds the stream before it.
        exit: node that holds the stream behind it; it takes the value of `entry` when the part is removed.
        addition: for a branch the node of the addition (equal to `exit`); for a block that of its last addition.
        branch: node added to the stream; "" for a block.
        nodes: all nodes that vanish.
        replaced: module path -> "identity" or "zero", what the module becomes.
        contains: names of the branches and blocks that vanish with it.
    """

    name: str
    kind: str
    entry: str
    exit: str
    addition: str
    branch: str
    nodes: frozenset[str]
    replaced: Mapping[str, str]
    contains: tuple[str, ...] = ()


class Reach:
    """Which nodes come before and after each node, as bit sets over the nodes that carry data."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        data = graph.data_nodes()
        self.names = [name for name in graph.nodes if name in data]
        self._place = {name: place for place, name in enumerate(self.names)}
        self.before: dict[str, int] = {}
        for name in self.names:
            bits = 0
            for used in graph.nodes[name].inputs():
                if used in self._place:
                    bits |= self.before[used] | (1 << self._place[used])
            self.before[name] = bits
        self.users = {
            name: [user for user in users if user in self._place]
            for name, users in graph.users().items()
            if name in self._place
        }
        self.after: dict[str, int] = {}
        for name in reversed(self.names):
            bits = 0
            for user in self.users[name]:
                bits |= self.after[user] | (1 << self._place[user])
            self.after[name] = bits

    def is_before(self, one: str, other: str) -> bool:
        """Whether the value of `other` depends on that of `one`."""
        return bool(self.before[other] >> self._place[one] & 1)

    def between(self, start: str, end: str) -> frozenset[str]:
        """Nodes that depend on `start` and that `end` depends on, `end` included."""
        bits = self.after[start] & (self.before[end] | (1 << self._place[end]))
        return frozenset(self._names(bits))

    def _names(self, bits: int) -> Iterable[str]:
        while bits:
            low = bits & -bits
            yield self.names[low.bit_length() - 1]
            bits ^= low


def find_blocks(graph: Graph) -> tuple[Block, ...]:
    """Residual branches and blocks of a graph, in the order of the network.

    A branch ends in an addition of two values of one shape, one of which the other depends on; it holds a parameter,
    and nothing outside reads its values. A block is a module that maps one tensor to one of the same shape and
    that holds at least one branch.
    """
    reach = Reach(graph)
    modules = _nodes_by_module(graph, reach)
    branches = [b for node in graph.nodes.values() if (b := _branch_at(graph, reach, node, modules)) is not None]
    blocks = [b for path in modules if (b := _block_at(graph, reach, path, modules, branches)) is not None]
    blocks = _outermost_of_equals(blocks)
    found = [*_without_twins(branches, blocks), *blocks]
    order = {name: place for place, name in enumerate(graph.nodes)}
    found.sort(key=lambda block: (order[block.exit], len(block.nodes)))
    return tuple(_unique_names(found))


def _nodes_by_module(graph: Graph, reach: Reach) -> dict[str, set[str]]:
    """Module path -> every node with data that runs in it or below it."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes.values():
        path = node.owner if node.name in reach.before and node.shapes else ""
        while path:
            found.setdefault(path, set()).add(node.name)
            path = path.rpartition(".")[0]
    return found


def _branch_at(graph: Graph, reach: Reach, node: Node, modules: Mapping[str, set[str]]) -> Block | None:
    if base_name(node.op) != "add" or len(node.shape) < 2:
        return None
    operands = [arg.name for arg in node.args[:2] if isinstance(arg, Ref)]
    if len(operands) != 2 or any(name not in reach.before for name in operands):
        return None
    if graph.nodes[operands[0]].shape != graph.nodes[operands[1]].shape:
        return None
    for entry, branch in (operands, operands[::-1]):
        if reach.is_before(entry, branch):
            return _branch(graph, reach, node, entry, branch, modules)
    return None


def _branch(
    graph: Graph, reach: Reach, node: Node, entry: str, branch: str, modules: Mapping[str, set[str]]
) -> Block | None:
    nodes = reach.between(entry, branch)
    allowed = nodes | {node.name}
    if any(user not in allowed for name in nodes for user in reach.users[name]):
        return None
    if any(name in nodes for name in graph.outputs) or not _parameters_read(graph, nodes):
        return None
    inside = _maximal_modules(graph, nodes, modules, node.owner)
    zeroed = next((path for path in reversed(inside) if _has_parameters(graph, path)), None)
    if zeroed is None:
        return None
    replaced = {path: IDENTITY for path in inside if _has_parameters(graph, path)} | {zeroed: ZERO}
    return Block(_span(list(replaced)), "branch", entry, node.name, node.name, branch, nodes, replaced)


def _parameters_read(graph: Graph, nodes: Iterable[str]) -> set[str]:
    return {
        graph.nodes[used].target
        for name in nodes
        for used in graph.nodes[name].inputs()
        if graph.nodes[used].op == "parameter"
    }


def _has_parameters(graph: Graph, path: str) -> bool:
    return any(
        info.tensors for other, info in graph.modules.items() if other == path or other.startswith(f"{path}.")
    )


def _maximal_modules(
    graph: Graph, nodes: frozenset[str], modules: Mapping[str, set[str]], owner: str
) -> list[str]:
    """Modules all of whose data nodes lie in a branch, largest only, in the order in which they run."""
    inside = {path for path, names in modules.items() if names <= nodes}
    below = f"{owner}." if owner else ""
    maximal = [path for path in inside if path.rpartition(".")[0] not in inside and path.startswith(below)]
    order = {name: place for place, name in enumerate(graph.nodes)}
    return sorted(maximal, key=lambda path: min(order[name] for name in modules[path]))


def _span(paths: Sequence[str]) -> str:
    """One name for one or several modules: ``block.attn`` or ``block.conv1…bn2``."""
    if len(paths) == 1:
        return paths[0]
    parent = paths[0].rpartition(".")[0]
    if all(path.rpartition(".")[0] == parent for path in paths):
        return f"{paths[0]}…{paths[-1].rpartition('.')[2]}"
    return f"{paths[0]}…{paths[-1]}"


def _block_at(
    graph: Graph, reach: Reach, path: str, modules: Mapping[str, set[str]], branches: Sequence[Block]
) -> Block | None:
    """The module as a block, if it maps one tensor to one of the same shape and is made of branches."""
    nodes = frozenset(name for name in modules[path] if name in reach.before)
    inner = [branch for branch in branches if branch.exit in nodes and branch.nodes <= nodes]
    if not inner:
        return None
    entries = {used for name in nodes for used in graph.nodes[name].inputs() if used in reach.before and used not in nodes}
    exits = [
        name
        for name in nodes
        if name in graph.outputs or any(user not in nodes for user in reach.users[name])
    ]
    if len(entries) != 1 or len(exits) != 1 or exits[0] in graph.outputs:
        return None
    entry = entries.pop()
    if graph.nodes[entry].shapes != graph.nodes[exits[0]].shapes or not _stream_runs_through(graph, inner, entry, nodes):
        return None
    return Block(
        path, "block", entry, exits[0], inner[-1].exit, "", nodes, {path: IDENTITY}, tuple(b.name for b in inner)
    )


def _stream_runs_through(graph: Graph, inner: Sequence[Block], entry: str, nodes: frozenset[str]) -> bool:
    """Whether the first branch starts at the module's input, perhaps behind an operator without parameters."""
    place = inner[0].entry
    while place != entry:
        if place not in nodes:
            return False
        data = [name for name in graph.nodes[place].inputs() if graph.nodes[name].op not in ("parameter", "buffer")]
        if len(data) != 1 or len(data) != len(graph.nodes[place].inputs()):
            return False
        place = data[0]
    return True


def _outermost_of_equals(blocks: Sequence[Block]) -> list[Block]:
    """Of modules that hold the same nodes only the outermost; of a chain of blocks only the single ones."""
    kept = []
    for block in blocks:
        twin = [other for other in blocks if other is not block and other.nodes == block.nodes]
        if any(len(other.name) < len(block.name) for other in twin):
            continue
        inside = [other for other in blocks if other.nodes < block.nodes]
        if not inside:
            kept.append(block)
    return kept


def _without_twins(branches: Sequence[Block], blocks: Sequence[Block]) -> list[Block]:
    """Branches that are not already the whole of a block."""
    whole = {block.contains[0] for block in blocks if len(block.contains) == 1}
    return [branch for branch in branches if branch.name not in whole]


def _unique_names(blocks: Sequence[Block]) -> Iterable[Block]:
    seen: dict[str, int] = {}
    for block in blocks:
        seen[block.name] = seen.get(block.name, 0) + 1
        if seen[block.name] == 1:
            yield block
