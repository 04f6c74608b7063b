"""Find the modules that a linear map of the channels can replace, and put such maps into the graph."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Literal

from idap.graph.ir import Graph, Node, Ref
from idap.graph.labels import Dim, constant_dim
from idap.graph.rules import Contraction
from idap.graph.rules.flow import arguments, base_name
from idap.structure.blocks import LISTS, Block, Reach, find_blocks, nest_blocks, select_blocks
from idap.structure.groups import Group, Port
from idap.structure.layout import Layout
from idap.structure.replacement import LAYER, PROJECTION, Projected, Remains, alike

Replacement = Literal["identity", "projection", "auto"]

CONVOLUTIONS = tuple(f"conv{'_transpose' * back}{spatial}d" for back in (False, True) for spatial in (1, 2, 3))
PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "einsum")


def find_removable(graph: Graph, layout: Layout, replacement: Replacement) -> tuple[Block, ...]:
    """Find residual branches and blocks, and modules that may become projections, in the order of the network.

    Args:
        graph: the traced model.
        layout: the layout of its units.
        replacement: "identity" lets the stream pass unchanged and finds no other module; "auto" does the same if shapes
            agree and finds projections if they do not; "projection" also turns whole blocks into projections.

    A module may become a projection if
    - it is called once, for one tensor, and nothing inside is read or written outside;
    - it maps (N, C, H, W) to (N, C', H/s, W/s) by convolutions (so in one and three dimensions), or (..., C) to
      (..., C') by linear layers, and only the channels may shrink;
    - it does more than a projection: it has several layers or a kernel of several taps, and more parameters;
    - it is a block in the sense of the architecture: it adds two values, lies in a list, or has siblings of its
      class. A layer of torch is not a block, and neither is a list of several blocks.
    Of nested modules, the largest is found. Modules within a residual branch or block are not found.
    """
    known = find_blocks(graph, layout)
    if replacement == "identity":
        return known
    finder = _Finder(graph, layout)
    if replacement == "projection":
        known = tuple(finder.convert(block) for block in known)
    return nest_blocks(graph, [*known, *finder.find(known)])


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

    def convert(self, block: Block) -> Block:
        """A block as a projection, if it can become one that is smaller; otherwise the block as it is."""
        projected = self._projection(block.name, block.entry, block.exit) if block.kind == "block" else None
        if projected is None:
            return block
        return replace(block, kind=PROJECTION, replaced={block.name: PROJECTION}, projected=projected)

    def find(self, known: Sequence[Block]) -> list[Block]:
        """Find modules whose input and output differ in shape."""
        candidates = [block for path in self._graph.modules for block in self._candidate(path)]
        candidates = select_blocks(self._graph, candidates, list(self._additions))
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
        if not self._remains.is_replaceable(path) or not self._is_block(path):
            return
        (call,) = self._graph.modules[path].calls
        nodes = frozenset(self._remains.inside(path))
        inside = call.output in nodes and call.input not in nodes and call.input in self._reach.before
        if not inside or not self._reach.is_closed(nodes, [call.output]):
            return
        if not self._graph.memory.owners(call.output) <= nodes:
            return
        dims = self._layout.dims
        if alike(dims[call.input][0], dims[call.output][0]):
            return
        projected = self._projection(path, call.input, call.output)
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

    def _projection(self, path: str, entry: str, leave: str) -> Projected | None:
        """The linear map of the channels with the shapes of a module; None if there is none smaller than the module."""
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

    The first and the last layer show which dimension holds the channels; if the shapes agree, the first layer alone.
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


def with_projections(
    graph: Graph, layout: Layout, groups: Sequence[Group], blocks: Iterable[Block]
) -> tuple[Graph, Layout, tuple[Group, ...]]:
    """Replace some modules in the graph by the linear maps that they become.

    The node behind the module keeps its name, its dims and its users. It becomes the layer that reads the node before
    the module, with a weight and a bias whose dims are the channel dims of both nodes. The old node stays in the graph
    under another name, and nothing depends on it.

    Args:
        graph: the graph of the original.
        layout: the layout of the original.
        groups: the groups of the original.
        blocks: the blocks that become projections; none lies in another.
    """
    for block in blocks:
        assert block.projected is not None
        graph, layout, groups = _with_projection(graph, layout, tuple(groups), block, block.projected)
    return graph, layout, tuple(groups)


def former_exit(block: Block) -> str:
    """The new name of the node that was behind a module before a projection replaced the module."""
    return f"{block.exit} before {block.name}.{LAYER}"


def _with_projection(
    graph: Graph, layout: Layout, groups: tuple[Group, ...], block: Block, projected: Projected
) -> tuple[Graph, Layout, tuple[Group, ...]]:
    old, path, aside = block.exit, block.name, former_exit(block)
    layer, weight, bias = _layer(graph, block, projected, path)
    nodes: dict[str, Node] = {}
    for name, node in graph.nodes.items():
        if name == old:
            nodes |= {aside: replace(node, name=aside), weight.name: weight, bias.name: bias, old: layer}
        else:
            nodes[name] = node
    shapes = {**graph.shapes, weight.target: weight.shape, bias.target: bias.shape}
    read, written = _channels(layout, block.entry, projected), _channels(layout, old, projected)
    tensors = {weight.target: (written, read, *(constant_dim(1) for _ in projected.stride)), bias.target: (written,)}
    kind, rank = "conv" if projected.stride else "linear", len(layer.shape)
    contraction = Contraction(old, kind, block.entry, projected.dim % rank, weight.name, 1, 0, projected.dim % rank)
    layout = replace(
        layout,
        dims={
            **layout.dims,
            aside: layout.dims[old],
            weight.name: (tensors[weight.target],),
            bias.name: (tensors[bias.target],),
        },
        tensors={**layout.tensors, **tensors},
        contractions=(*(replace(c, node=aside) if c.node == old else c for c in layout.contractions), contraction),
        sizes=tuple(replace(use, node=aside) if use.node == old else use for use in layout.sizes),
        crossings={aside if name == old else name: what for name, what in layout.crossings.items()},
    )
    port = Port(len(layout.contractions) - 1, old, weight.target)
    joined = tuple(_extend_group(group, layout, (read, written), port, tensors, {old: aside}) for group in groups)
    return replace(graph, nodes=nodes, shapes=shapes), layout, joined


def _layer(graph: Graph, block: Block, projected: Projected, path: str) -> tuple[Node, Node, Node]:
    """The nodes of the layer, of its weight and of its bias."""
    weight, bias = (
        Node(name=name, op="parameter", shapes=(kept.shape,), owner=path, target=name)
        for name, kept in projected.tensors(path).items()
    )
    function = f"conv{len(projected.stride)}d" if projected.stride else "linear"
    given = (Ref(block.entry), Ref(weight.name), Ref(bias.name))
    layer = Node(
        name=block.exit,
        op=f"aten.{function}.default",
        args=(*given, list(projected.stride)) if projected.stride else given,
        shapes=graph.nodes[block.exit].shapes,
        owner=path,
        call=(f"{path}.{LAYER}", function, 0),
    )
    return layer, weight, bias


def _channels(layout: Layout, node: str, projected: Projected) -> Dim:
    return layout.dims[node][0][projected.dim]


def _extend_group(
    group: Group,
    layout: Layout,
    dims: tuple[Dim, Dim],
    port: Port,
    tensors: dict[str, tuple[Dim, ...]],
    renamed: dict[str, str],
) -> Group:
    """The group with the reads and writes of the projection's layer."""
    reads, writes = (group.index in layout.groups_in(dim) for dim in dims)
    moved = {
        side: tuple(replace(p, node=renamed.get(p.node, p.node)) for p in ports)
        for side, ports in (("readers", group.readers), ("writers", group.writers))
    }
    members = [
        (name, place)
        for name, tensor in tensors.items()
        for place, dim in enumerate(tensor)
        if group.index in layout.groups_in(dim)
    ]
    return replace(
        group,
        members=(*group.members, *members),
        readers=(*moved["readers"], *([port] if reads else [])),
        writers=(*moved["writers"], *([port] if writes else [])),
        crosses=tuple(renamed.get(name, name) for name in group.crosses),
    )
