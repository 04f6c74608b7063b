"""The graph once projections stand in for modules: they are layers of it like any other."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from idap.graph.ir import Graph, Node, Ref
from idap.graph.labels import Dim, fixed
from idap.graph.rules import Contraction
from idap.structure.blocks import Block
from idap.structure.groups import Group, Port
from idap.structure.layout import Layout
from idap.structure.projected import LAYER, Projected


def with_projections(
    graph: Graph, layout: Layout, groups: Sequence[Group], blocks: Iterable[Block]
) -> tuple[Graph, Layout, tuple[Group, ...]]:
    """Put the linear maps that some modules become in their places.

    The node behind the module keeps its name, its dims and those that read it; it becomes the layer that reads the
    node before the module, with a weight and a bias whose dims are those of the channels of both. What it was stays in
    the graph under another name, and nothing depends on it.

    Args:
        graph: of the original.
        layout: likewise.
        groups: likewise.
        blocks: that become projections; none lies in another.
    """
    for block in blocks:
        assert block.projected is not None
        graph, layout, groups = _with_projection(graph, layout, tuple(groups), block, block.projected)
    return graph, layout, tuple(groups)


def former(block: Block) -> str:
    """The name of the node that was behind a module before a projection took its place."""
    return f"{block.exit} before {block.name}.{LAYER}"


def _with_projection(
    graph: Graph, layout: Layout, groups: tuple[Group, ...], block: Block, projected: Projected
) -> tuple[Graph, Layout, tuple[Group, ...]]:
    old, path, aside = block.exit, block.name, former(block)
    layer, weight, bias = _layer(graph, block, projected, path)
    nodes: dict[str, Node] = {}
    for name, node in graph.nodes.items():
        if name == old:
            nodes |= {aside: replace(node, name=aside), weight.name: weight, bias.name: bias, old: layer}
        else:
            nodes[name] = node
    shapes = {**graph.shapes, weight.target: weight.shape, bias.target: bias.shape}
    read, written = _channels(layout, block.entry, projected), _channels(layout, old, projected)
    tensors = {weight.target: (written, read, *(fixed(1) for _ in projected.stride)), bias.target: (written,)}
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
    joined = tuple(_joined(group, layout, (read, written), port, tensors, {old: aside}) for group in groups)
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


def _joined(
    group: Group,
    layout: Layout,
    dims: tuple[Dim, Dim],
    port: Port,
    tensors: dict[str, tuple[Dim, ...]],
    renamed: dict[str, str],
) -> Group:
    """The group with what the layer reads and writes of it."""
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
