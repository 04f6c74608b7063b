"""What a model's code says about sizes: those it gives to operators, those it compares, those that describe tensors."""

from collections.abc import Iterable, Iterator, Mapping

from idap.graph.ir import Attribute, Expression, Extent, Graph, Literal, ModuleInfo, Node, Operation, ints
from idap.graph.rules import SizeUse
from idap.graph.rules.flow import arguments, operator
from idap.structure.attributes import Demand
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


def demands_of(graph: Graph, uses: Iterable[SizeUse]) -> list[Demand]:
    """Everything that the code says about sizes."""
    return [*_given(graph, uses), *_compared(graph), *_describing(graph)]


def _given(graph: Graph, uses: Iterable[SizeUse]) -> Iterator[Demand]:
    for use in uses:
        node = graph.nodes[use.node]
        source = _source(node, use) or Literal(_old(node, use))
        argument = use.argument if use.index is None else f"{use.argument}[{use.index}]"
        yield Demand(source, None, use.dim, f"{argument} of {node.where()}", use.sign, node.name)


def _compared(graph: Graph) -> Iterator[Demand]:
    for note in graph.comparisons:
        yield Demand(note.left, note.right, None, f"the comparison of {note.left} with {note.right} at {note.source}")


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


def _source(node: Node, use: SizeUse) -> Expression | None:
    """Where the eager code got the int that became this argument; None if that can't be told."""
    given = ints((node.args, dict(node.kwargs)))
    place = _place(node, use)
    eager = [size.value for size in node.sizes]
    if place is not None and place < min(len(given), len(eager)) and given[: place + 1] == eager[: place + 1]:
        return node.sizes[place]
    candidates = {size for size in node.sizes if size.value == _old(node, use)}
    return candidates.pop() if len(candidates) == 1 else None


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
