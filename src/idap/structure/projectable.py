"""Modules that a linear map of the channels can stand in for, found in the graph."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Literal

from idap.graph.ir import Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.structure.blocks import LISTS, Block, Reach, find_blocks, layers_of, nested
from idap.structure.layout import Layout
from idap.structure.projected import LAYER, PROJECTION, Projected
from idap.structure.remains import Remains, alike

Replacement = Literal["identity", "projection", "auto"]

CONVOLUTIONS = tuple(f"conv{'_transpose' * back}{spatial}d" for back in (False, True) for spatial in (1, 2, 3))
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "einsum")


def removable(graph: Graph, layout: Layout, replacement: Replacement) -> tuple[Block, ...]:
    """Residual branches and blocks, and modules that may become projections, in the order of the network.

    Args:
        graph: traced.
        layout: where units lie.
        replacement: "identity" lets the stream pass unchanged and offers no other module; "auto" does so where shapes
            agree and offers projections where they don't; "projection" makes projections of whole blocks too.

    A module may become a projection if
    - it is called once, for one tensor, and nothing inside is read or written outside;
    - it maps (N, C, H, W) to (N, C', H/s, W/s) by convolutions (so in one and three dimensions), or (..., C) to
      (..., C') by linear layers, and only the channels may shrink;
    - it does more than a projection does: several layers or a kernel of several taps, and more parameters;
    - it is a block in the sense of the architecture: it adds two values, or lies in a list, or has siblings of its
      class. Layers of torch are no blocks, and a list of several blocks is none.
    Of modules that lie in each other the largest is offered; none that lies in a residual branch or block.
    """
    known = find_blocks(graph, layout)
    if replacement == "identity":
        return known
    finder = _Finder(graph, layout)
    if replacement == "projection":
        known = tuple(finder.converted(block) for block in known)
    return nested(graph, [*known, *finder.found(known)])


class _Finder:
    def __init__(self, graph: Graph, layout: Layout) -> None:
        self._graph, self._layout = graph, layout
        self._reach, self._remains = Reach(graph), Remains(graph, layout)
        self._additions = dict.fromkeys(node.name for node in graph.nodes.values() if self._adds(node)).keys()
        self._alike = Counter((path.rpartition(".")[0], info.kind) for path, info in graph.modules.items() if path)
        self._learned = {node.target for node in graph.nodes.values() if node.op == "parameter"}

    def _adds(self, node: Node) -> bool:
        given = [arg.name for arg in node.args[:2] if isinstance(arg, Ref)]
        return base_name(node.op) == "add" and len(given) == 2 and all(name in self._reach.before for name in given)

    def converted(self, block: Block) -> Block:
        """A block as a projection, if it can be one and that is smaller; else as it is."""
        projected = self._projected(block.name, block.entry, block.exit) if block.kind == "block" else None
        if projected is None:
            return block
        return replace(block, kind=PROJECTION, replaced={block.name: PROJECTION}, projected=projected)

    def found(self, known: Sequence[Block]) -> list[Block]:
        """Modules whose input and output differ in shape."""
        candidates = [block for path in self._graph.modules for block in self._candidate(path)]
        candidates = layers_of(self._graph, candidates, list(self._additions))
        parts = [block.nodes for block in (*known, *candidates)]
        chosen = [
            block
            for block in candidates
            if self._graph.modules[block.name].layer not in LISTS
            or sum(part < block.nodes and not any(part < other < block.nodes for other in parts) for part in parts) < 2
        ]
        outer = [block.nodes for block in (*known, *chosen)]
        return [block for block in chosen if not any(block.nodes < nodes for nodes in outer)]

    def _candidate(self, path: str) -> Iterator[Block]:
        if not self._remains.replaceable(path) or not self._is_block(path):
            return
        (call,) = self._graph.modules[path].calls
        nodes = frozenset(self._remains.inside(path))
        inside = call.output in nodes and call.input not in nodes and call.input in self._reach.before
        if not inside or not self._reach.closed(nodes, [call.output]):
            return
        if not self._graph.memory.written(call.output) <= nodes:
            return
        dims = self._layout.dims
        if alike(dims[call.input][0], dims[call.output][0]):
            return
        projected = self._projected(path, call.input, call.output)
        if projected is not None:
            replaced = {path: PROJECTION}
            yield Block(path, PROJECTION, call.input, call.output, "", "", nodes, replaced, projected=projected)

    def _is_block(self, path: str) -> bool:
        modules, info = self._graph.modules, self._graph.modules[path]
        if info.layer not in ("", *LISTS):
            return False
        parent = path.rpartition(".")[0]
        adds = not self._additions.isdisjoint(self._remains.inside(path))
        siblings = self._alike[parent, info.kind] > 1 and not info.kind.startswith("torch.")
        return adds or siblings or modules[parent].layer in LISTS

    def _projected(self, path: str, entry: str, leave: str) -> Projected | None:
        """The linear map of the channels that maps the shapes of a module, if it is less than the module."""
        graph, dims = self._graph, self._layout.dims
        layers = [graph.nodes[name] for name in self._remains.inside(path) if self._is_layer(graph.nodes[name])]
        before, after = graph.nodes[entry].shape, graph.nodes[leave].shape
        if f"{path}.{LAYER}" in graph.modules or graph.nodes[leave].op == "getitem" or len(before) != len(after):
            return None
        if not layers or (len(layers) == 1 and not self._has_taps(layers[0])):
            return None
        stride = _stride(before, after, layers)
        if stride is None:
            return None
        at = 1 if stride else len(before) - 1
        others = [dim for name in (entry, leave) for place, dim in enumerate(dims[name][0]) if place != at]
        if any(self._layout.groups_in(dim) for dim in others):
            return None
        inputs, outputs = before[at], after[at]
        held = sum(prod(graph.shapes[name]) for name in self._learned if name.startswith(f"{path}."))
        if held <= inputs * outputs + outputs:
            return None
        return Projected(tuple(range(inputs)), tuple(range(outputs)), (outputs, inputs), stride)

    def _is_layer(self, node: Node) -> bool:
        """Whether a node applies weights to data."""
        if base_name(node.op) not in (*CONVOLUTIONS, *PRODUCTS) or node.name not in self._reach.before:
            return False
        return any(name not in self._reach.before for name in node.inputs())

    def _has_taps(self, node: Node) -> bool:
        if base_name(node.op) not in CONVOLUTIONS:
            return False
        weight = arguments(node)["weight"]
        return prod(self._graph.nodes[weight.name].shape[2:]) > 1


def _stride(before: Sequence[int], after: Sequence[int], layers: Sequence[Node]) -> tuple[int, ...] | None:
    """The stride of the convolution that maps one shape to the other, () for a linear layer; None if neither can.

    The first and the last layer tell which dimension holds the channels; where shapes agree, the first alone.
    """
    ends = layers[:1] if tuple(before) == tuple(after) else (layers[0], layers[-1])
    kinds = {base_name(node.op) for node in ends}
    if kinds <= set(PRODUCTS):
        return () if len(before) > 1 and before[:-1] == after[:-1] else None
    spatial = len(before) - 2
    if not kinds <= {f"conv{spatial}d", f"conv_transpose{spatial}d"} or before[0] != after[0]:
        return None
    steps = tuple(-(-size // left) for size, left in zip(before[2:], after[2:], strict=True))
    fits = all(-(-size // step) == left for size, left, step in zip(before[2:], after[2:], steps, strict=True))
    return steps if fits else None
