"""The layers next to a removed block, which take over what it did."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from idap.graph.ir import Node
from idap.structure.analysis import Structure
from idap.structure.blocks import Block, Reach


def neighbours(structure: Structure, block: Block, removed: Sequence[str]) -> frozenset[str]:
    """Names of the weights next to a block: those of the nearest layers before and behind it, and of norms between.

    Those of the projection that takes its place are among them.

    Where the stream is a sum, the nearest layer is the last one of the branch that was added.

    Args:
        structure: of the original.
        block: the branch or block that goes.
        removed: all that is gone, the block included.

    Returns:
        Canonical names of parameters; empty if the block lies between an input and an output.
    """
    made = block.projected.tensors(block.name) if block.projected is not None else ()
    structure = structure.after(removed)
    graph, reach = structure.graph, Reach(structure.graph)
    dead, skips, users = structure.dead_nodes(removed), structure.skips(removed), graph.users()

    def apart(node: Node) -> tuple[str, str] | None:
        """Skip and branch of an addition of two values of which one depends on the other."""
        data = [name for name in dict.fromkeys(node.inputs()) if name in reach.before]
        for skip, branch in (data, data[::-1]) if len(data) == 2 else ():
            if reach.is_before(skip, branch):
                return skip, branch
        return None

    def backward(node: Node) -> Iterator[str]:
        sides = apart(node)
        for name in (sides[1],) if sides is not None else node.inputs():
            yield skips.get(name, name)

    def forward(node: Node) -> Iterator[str]:
        for exit_ in (name for name, entry in skips.items() if entry == node.name and name != block.exit):
            yield from forward(graph.nodes[exit_])
        for name in users[node.name]:
            if name in dead or name in block.nodes or name in skips:
                continue
            sides = apart(graph.nodes[name])
            if sides is None or sides[0] != node.name:
                yield name

    before = _nearest(structure, [skips.get(block.entry, block.entry)], backward)
    behind = _nearest(structure, list(forward(graph.nodes[block.exit])), forward)
    return before | behind | set(made)


def _nearest(structure: Structure, start: list[str], onward: Callable[[Node], Iterator[str]]) -> frozenset[str]:
    """The parameters of the first layers with a matrix on every way, and of what lies before them."""
    graph = structure.graph
    found: set[str] = set()
    seen: set[str] = set()
    queue = list(start)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        node = graph.nodes[name]
        parameters = [graph.nodes[used] for used in node.inputs() if graph.nodes[used].op == "parameter"]
        found |= {parameter.target for parameter in parameters}
        if not any(len(parameter.shape) > 1 for parameter in parameters):
            queue += onward(node)
    return frozenset(found)


@contextmanager
def only_training(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Let only some parameters of a model be trained for a while."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in names)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
