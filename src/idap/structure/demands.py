"""What a model's code says about sizes: those it gives to operators, those it compares, those that describe tensors."""

from collections.abc import Iterable, Iterator, Mapping, Set

from idap.graph.ir import Attribute, Expression, Extent, Graph, Literal, ModuleInfo, Node, Operation, ints
from idap.graph.provenance import sources
from idap.graph.rules import SizeUse
from idap.graph.rules.flow import arguments, operator
from idap.structure.attributes import Demand
from idap.structure.layout import Dims
from idap.structure.plan import Size

Places = tuple[tuple[str, int], ...]

SHAPES_OF: Mapping[str, Mapping[str, Places]] = {
    "Linear": {"in_features": (("weight", 1),), "out_features": (("weight", 0),)},
    "Bilinear": {
        "in1_features": (("weight", 1),),
        "in2_features": (("weight", 2),),
        "out_features": (("weight", 0),),
    },
    "Conv": {"in_channels": (("weight", 1),), "out_channels": (("weight", 0),)},
    "ConvTranspose": {"in_channels": (("weight", 0),), "out_channels": (("weight", 1),)},
    "BatchNorm": {"num_features": (("weight", 0), ("running_mean", 0))},
    "InstanceNorm": {"num_features": (("weight", 0), ("running_mean", 0))},
    "GroupNorm": {"num_channels": (("weight", 0),)},
    "Embedding": {"num_embeddings": (("weight", 0),), "embedding_dim": (("weight", 1),)},
    "PReLU": {"num_parameters": (("weight", 0),)},
}
"""Class of torch.nn (without its 1d, 2d, 3d) -> ints that describe its tensors -> (tensor, dimension), first found."""

PER_GROUP = {"Conv": "in_channels", "ConvTranspose": "out_channels"}
"""Class of torch.nn -> the int of which the tensor holds only the share of one group."""


def demands_of(graph: Graph, layout: Dims) -> list[Demand]:
    """Everything that the code says about sizes."""
    asked = [*_given(graph, layout.sizes), *_pinned(graph, layout), *_describing(graph)]
    return [*asked, *_compared(graph, layout, set().union(*(demand.attributes for demand in asked)))]


def _given(graph: Graph, uses: Iterable[SizeUse]) -> Iterator[Demand]:
    for use in uses:
        node = graph.nodes[use.node]
        position = size_position(node, use)
        source = Literal(_old(node, use)) if position is None else node.sizes[position]
        argument = use.argument if use.index is None else f"{use.argument}[{use.index}]"
        yield Demand(source, None, use.dim, f"{argument} of {node.where()}", use.sign, node.name, module=node.module)


def _pinned(graph: Graph, layout: Dims) -> Iterator[Demand]:
    """Sizes that must not change, because results depend on them."""
    for pin in layout.pins:
        node = graph.nodes[pin.node]
        why = f"{pin.why}: {node.where()}"
        yield Demand(Literal(pin.dim.shape[1]), None, pin.dim, why, 1, node.name, module=node.module, reason=why)
    for leaf, places in layout.escaped.items():
        for module, place in places.items() if isinstance(leaf, Extent) else ():
            why = f"the code computes another number from this size, at {place}"
            yield Demand(leaf, Literal(leaf.value), None, why, module=module, reason=why)


def _compared(graph: Graph, layout: Dims, changing: Set[Attribute]) -> Iterator[Demand]:
    """What the code found when it compared sizes, of which one may change."""
    for note in graph.comparisons:
        if not any(
            len(layout.dims[leaf.node][0][leaf.dim]) if isinstance(leaf, Extent) else leaf in changing
            for leaf in sources(note.left) | sources(note.right)
        ):
            continue
        place = f"the comparison of {note.left} with {note.right} at {note.source}"
        yield Demand(note.left, note.right, None, place, module=note.module, symbol=note.symbol)


def _describing(graph: Graph) -> Iterator[Demand]:
    nodes = {node.target: node.name for node in graph.nodes.values() if node.op in ("parameter", "buffer")}
    for path, info in graph.modules.items():
        family = info.layer.removeprefix("Lazy").removeprefix("Sync").rstrip("d").rstrip("123")
        for name, places in SHAPES_OF.get(family, {}).items():
            size = _size_of(graph, nodes, info, places)
            held = info.sizes.get(name)
            if size is None or not isinstance(held, int):
                continue
            groups = info.sizes.get("groups", 1)
            if name == PER_GROUP.get(family) and isinstance(groups, int) and groups > 1:
                size = Operation("*", (size, Attribute(path, "groups", None, groups)), size.value * groups)
            attribute = Attribute(path, name, None, held)
            if size.value == held:
                yield Demand(attribute, size, None, f"{name} of module {path!r}", defines=attribute)


def _size_of(graph: Graph, nodes: Mapping[str, str], info: ModuleInfo, places: Places) -> Expression | None:
    for name, dim in places:
        if info.tensors.get(name) in nodes:
            tensor = info.tensors[name]
            return Extent(nodes[tensor], dim, graph.shapes[tensor][dim])
    return None


def size_position(node: Node, use: SizeUse) -> int | None:
    """Which of the ints of the eager call became this argument; None if that can't be told."""
    given = ints((node.args, dict(node.kwargs)))
    place = _place(node, use)
    eager = [size.value for size in node.sizes]
    if place is not None and place < min(len(given), len(eager)) and given[: place + 1] == eager[: place + 1]:
        return place
    candidates = [position for position, size in enumerate(node.sizes) if size.value == _old(node, use)]
    return candidates[0] if len({node.sizes[position] for position in candidates}) == 1 else None


def _old(node: Node, use: SizeUse) -> int:
    old = arguments(node)[use.argument]
    return int(old[use.index] if use.index is not None else old)


def _place(node: Node, use: SizeUse) -> int | None:
    """Position of the argument among all ints of the node's arguments; None if it was left to its default."""
    names = [argument.name for argument in operator(node)._schema.arguments]
    passed = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    before = 0
    for name, value in passed.items():
        if name == use.argument:
            return before + (len(ints(value[: use.index])) if use.index is not None else 0)
        before += len(ints(value))
    return None


def new_values(solved: Mapping[Attribute, int], modules: Mapping[str, ModuleInfo]) -> dict[str, dict[str, Size]]:
    """New values by module and attribute."""
    values: dict[str, dict[str, Size]] = {}
    for leaf, value in solved.items():
        if value == leaf.value:
            continue
        held = values.setdefault(leaf.module, {}).get(leaf.name, modules[leaf.module].sizes[leaf.name])
        if leaf.index is None:
            values[leaf.module][leaf.name] = value
        else:
            assert isinstance(held, tuple)
            values[leaf.module][leaf.name] = (*held[: leaf.index], value, *held[leaf.index + 1 :])
    return values
