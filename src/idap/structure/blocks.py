"""Find the residual branches and blocks of a graph: the parts that can be removed as a whole."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from idap.graph.ir import Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.structure.layout import Layout
from idap.structure.replacement import IDENTITY, Projected, Remains, alike

LISTS = ("Sequential", "ModuleList", "ModuleDict")
_COPIES = ("to", "_to_copy", "clone", "contiguous", "alias", "detach", "float", "type_as")


@dataclass(frozen=True)
class Block:
    """A part of the network whose removal lets the flow pass unchanged, or through a linear map.

    Attributes:
        name: path of the removed module, or the range of modules for a branch that spreads over several.
        kind: "branch" (what is added to the stream), "block" (a module that maps the stream to itself) or
            "projection" (a module that becomes a linear map of the channels).
        entry: node that holds the stream before it.
        exit: node that holds the stream behind it; if the part is removed, it takes the value of `entry` or of the
            linear map.
        addition: for a branch, the node of the addition (equal to `exit`); for a block, that of its last addition.
        branch: for a branch, the node added to the stream; "" otherwise.
        nodes: all nodes that are removed with it.
        replaced: module path -> "identity", "zero" or "projection", what the module becomes.
        contains: names of the branches and blocks that are removed with it.
        projected: for a projection, the linear map of all channels that it becomes; None otherwise.
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
    projected: Projected | None = None


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
            for used in graph.dependencies[name]:
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

    def is_closed(self, nodes: frozenset[str], exits: Iterable[str]) -> bool:
        """Whether these nodes affect others only through the exits: by values that are read, and by writes."""
        inner = nodes - set(exits)
        read = any(user not in nodes for name in inner for user in self.users[name])
        written = any(not self.graph.memory.owners(name) <= nodes for name in inner)
        return not read and not written and not inner & set(self.graph.ends)

    def _names(self, bits: int) -> Iterable[str]:
        while bits:
            low = bits & -bits
            yield self.names[low.bit_length() - 1]
            bits ^= low


@dataclass(frozen=True)
class _Branch:
    """An addition of two values of the same shape, one of which depends on the other."""

    entry: str
    branch: str
    addition: str
    nodes: frozenset[str]
    block: Block | None = None


def find_blocks(graph: Graph, layout: Layout) -> tuple[Block, ...]:
    """Residual branches and blocks of a graph, in the order of the network.

    A branch ends in an addition of two values of the same shape, one of which depends on the other; it holds a
    parameter, and nothing outside reads its values. A block is a module that maps one tensor to one of the same shape
    and that holds at least one branch. Both are found only if their modules can be replaced by stand-ins, so that the
    code around them still runs and the stand-ins add nothing.
    """
    reach, remains = Reach(graph), Remains(graph, layout)
    residuals = [_branch_at(graph, reach, remains, node) for node in graph.nodes.values()]
    branches = [residual for residual in residuals if residual is not None]
    modules = [_block_at(graph, reach, remains, path, branches) for path in graph.modules]
    blocks = select_blocks(graph, [block for block in modules if block is not None], [b.addition for b in branches])
    whole = {block.nodes & frozenset(b.addition for b in branches) for block in blocks}
    found = [b.block for b in branches if b.block is not None and frozenset([b.addition]) not in whole] + blocks
    return nest_blocks(graph, found)


def nest_blocks(graph: Graph, blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Blocks of different names in the order of the network, each with those that are removed with it."""
    order = {name: place for place, name in enumerate(graph.nodes)}
    found = sorted(blocks, key=lambda block: (order[block.exit], len(block.nodes)))
    unique = list(_unique_names(found))
    return tuple(replace(block, contains=tuple(_blocks_inside(block, unique))) for block in unique)


def _blocks_inside(block: Block, others: Sequence[Block]) -> Iterator[str]:
    """Names of the branches and blocks that are removed with a block."""
    for other in others:
        if other.exit in block.nodes and other.nodes < block.nodes:
            yield other.name


def _branch_at(graph: Graph, reach: Reach, remains: Remains, node: Node) -> _Branch | None:
    if base_name(node.op) != "add" or len(node.shape) < 2 or arguments(node).get("alpha", 1) != 1:
        return None
    operands = [arg.name for arg in node.args[:2] if isinstance(arg, Ref)]
    if len(operands) != 2 or any(name not in reach.before for name in operands):
        return None
    for skip, branch in (operands, operands[::-1]):
        for entry in _sources(graph, skip):
            if graph.nodes[entry].shape == graph.nodes[branch].shape and reach.is_before(entry, branch):
                return _branch(graph, reach, remains, node, entry, branch)
    return None


def _sources(graph: Graph, name: str) -> Iterator[str]:
    """A node, and the nodes that it is a cast or a copy of."""
    yield name
    while base_name(graph.nodes[name].op) in _COPIES:
        name = graph.nodes[name].inputs()[0]
        yield name


def _branch(graph: Graph, reach: Reach, remains: Remains, node: Node, entry: str, branch: str) -> _Branch | None:
    nodes = reach.between(entry, branch)
    if any(user not in nodes | {node.name} for user in reach.users[branch]) or not reach.is_closed(nodes, [branch]):
        return None
    if branch in graph.ends or not graph.memory.owners(branch) <= nodes or not _reads_parameters(graph, nodes):
        return None
    found = _Branch(entry, branch, node.name, nodes)
    replaced = remains.stand_ins(nodes, entry, branch)
    if not replaced:
        return found
    name = _span(list(replaced))
    block = Block(name, "branch", entry, node.name, node.name, branch, nodes, replaced)
    return replace(found, block=block)


def _reads_parameters(graph: Graph, nodes: Iterable[str]) -> bool:
    return any(graph.nodes[used].op == "parameter" for name in nodes for used in graph.nodes[name].inputs())


def _span(paths: Sequence[str]) -> str:
    """One name for one or several modules: ``block.attn`` or ``block.conv1…bn2``."""
    if len(paths) == 1:
        return paths[0]
    parent = paths[0].rpartition(".")[0]
    if all(path.rpartition(".")[0] == parent for path in paths):
        return f"{paths[0]}…{paths[-1].rpartition('.')[2]}"
    return f"{paths[0]}…{paths[-1]}"


def _block_at(graph: Graph, reach: Reach, remains: Remains, path: str, branches: Sequence[_Branch]) -> Block | None:
    """The module as a block, if it maps one tensor to one of the same shape and consists of branches."""
    if not remains.is_replaceable(path):
        return None
    (call,) = graph.modules[path].calls
    nodes = frozenset(remains.inside(path))
    inner = [branch for branch in branches if branch.addition in nodes and branch.nodes <= nodes]
    if not inner or call.output not in nodes or call.input in nodes or not reach.is_closed(nodes, [call.output]):
        return None
    same = alike(remains.layout.dims[call.input][0], remains.layout.dims[call.output][0])
    if not same or not _stream_runs_through(graph, inner[0].entry, call.input, nodes):
        return None
    return Block(
        path,
        "block",
        call.input,
        call.output,
        inner[-1].addition,
        "",
        nodes,
        {path: IDENTITY},
    )


def _stream_runs_through(graph: Graph, place: str, entry: str, nodes: frozenset[str]) -> bool:
    """Whether the first branch starts at the module's input, possibly behind operators without parameters."""
    while place != entry:
        needed = graph.dependencies[place]
        if place not in nodes or len(needed) != 1 or graph.nodes[needed[0]].op in ("parameter", "buffer"):
            return False
        place = needed[0]
    return True


def select_blocks(graph: Graph, blocks: Sequence[Block], additions: Sequence[str]) -> list[Block]:
    """Select the blocks that are neither duplicates nor stages.

    Of modules that hold the same nodes, only the outermost is kept. A stage, which repeats blocks of one class, is no
    block itself.
    """
    kept = []
    for block in blocks:
        twins = [other for other in blocks if other is not block and other.nodes == block.nodes]
        if any(len(other.name) < len(block.name) for other in twins):
            continue
        parts = {_part_of(graph, block.name, addition) for addition in additions if addition in block.nodes} - {""}
        listed = graph.modules[block.name].layer in LISTS and len(parts) > 1
        if not listed and len({graph.modules[part].kind for part in parts}) == len(parts):
            kept.append(block)
    return kept


def _part_of(graph: Graph, path: str, node: str) -> str:
    """The module directly below `path` in which a node lies, skipping lists of modules; "" if it is `path` itself."""
    found = path
    for name in graph.nodes[node].owner.removeprefix(path).lstrip(".").split("."):
        found = f"{found}.{name}" if name else found
        if graph.modules[found].layer not in LISTS:
            break
    return "" if found == path else found


def _unique_names(blocks: Sequence[Block]) -> Iterable[Block]:
    seen: set[str] = set()
    for block in blocks:
        if block.name not in seen:
            seen.add(block.name)
            yield block
