"""Looking things up by index: the dimension that is indexed can't shrink, the others pass."""

from collections.abc import Sequence

from numpy import broadcast_shapes

from idap.graph.ir import Node, Ref
from idap.graph.labels import Dim, fixed
from idap.graph.rules.flow import Flow, arguments, broadcast, freeze_all, rule

rule("masked_select", "nonzero", "bincount", "unfold", "as_strided", "tril", "triu", "diagonal",
     "affine_grid_generator")(freeze_all)  # fmt: skip

PICKED = "its slots are picked by index"


@rule("embedding")
def embedding(flow: Flow, node: Node) -> list[Dim]:
    """Weight (V, E), indices (...) -> (..., E)."""
    given = arguments(node)
    weight, indices = flow.of(given["weight"]), flow.of(given["indices"])
    flow.freeze([weight[0], *indices], "it is looked up by index")
    return [*indices, flow.labels.settled(weight[1])]


@rule("embedding_bag", "_embedding_bag")
def embedding_bag(flow: Flow, node: Node) -> list[list[Dim]]:
    """Weight (V, E), indices in bags -> (bags, E), and three tensors that count."""
    given = arguments(node)
    weight = flow.of(given.pop("weight"))
    for other in given.values():
        if isinstance(other, Ref):
            flow.freeze(flow.of(other))
    flow.freeze([weight[0]], "it is looked up by index")
    bags, *others = node.shapes
    return [[fixed(bags[0]), flow.labels.settled(weight[1])], *([fixed(size) for size in shape] for shape in others)]


@rule("index_select")
def index_select(flow: Flow, node: Node) -> list[Dim]:
    """Other dims pass."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    flow.freeze([x[axis]], PICKED)
    x[axis] = fixed(node.shape[axis])
    return [flow.labels.settled(dim) for dim in x]


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill",
      "index_reduce")  # fmt: skip
def along_one(flow: Flow, node: Node) -> list[Dim]:
    """Slots of one dim are picked or written by index; the dims that all tensors share pass."""
    given = arguments(node)
    if "index_" in node.op:  # the indices are a vector, each of all slots beside it
        flow.freeze(flow.of(given.pop("index")), "it says which slots are picked")
    tensors = [flow.of(value) for value in given.values() if isinstance(value, Ref)]
    tensors = [dims for dims in tensors if dims]  # a value that is one number meets nothing
    if given["dim"] is None or any(len(dims) != len(node.shape) for dims in tensors):
        return freeze_all(flow, node)[0]
    axis = int(given["dim"]) % len(node.shape)
    result = []
    for place, size in enumerate(node.shape):
        met = [dims[place] for dims in tensors]
        if "take_along" in node.op and place != axis:  # one index for all slots
            met = [dim for dim in met if dim.shape[1] == size] or met
        if place == axis or any(dim.shape[1] != size for dim in met):
            flow.freeze(met, PICKED if place == axis else "only some of its slots are picked")
        for dim in met[1:] if place != axis else ():
            if dim.shape[1] == met[0].shape[1]:
                flow.labels.unify(met[0], dim)
        result.append(met[0] if met[0].shape[1] == size else fixed(size))
    return [flow.labels.settled(dim) for dim in result]


@rule("index")
def index(flow: Flow, node: Node) -> list[Dim]:
    """``x[i, :, j]``: dims indexed by tensors are replaced by those of the indices, broadcast together."""
    given = arguments(node)
    found = _picked(flow, flow.of(given["self"]), given["indices"], node.shape)
    return freeze_all(flow, node)[0] if found is None else found


@rule("index_put")
def index_put(flow: Flow, node: Node) -> list[Dim]:
    """``x[i, :, j] = values``: the values meet what is picked. An index may be a mask, also of several dims at once."""
    given = arguments(node)
    x, values, indices = flow.of(given["self"]), flow.of(given["values"]), given["indices"]
    one_number = all(dim.shape[1] == 1 for dim in values)
    shapes = {axis: flow.node(item).shape for axis, item in enumerate(indices) if item is not None}
    masks = [
        axis for axis, shape in shapes.items() if shape == tuple(dim.shape[1] for dim in x[axis : axis + len(shape)])
    ]
    several = [axis for axis in masks if len(shapes[axis]) > 1]
    if (masks and not one_number) or any(axis != max(shapes) for axis in several):
        return freeze_all(flow, node)[0]  # how many slots a mask picks depends on values
    for axis in several:
        flow.freeze(x[axis : axis + len(shapes[axis])], PICKED)
    made = broadcast_shapes(*shapes.values())
    passed = [dim.shape[1] for axis, dim in enumerate(x) if axis not in shapes]
    place = _place(list(shapes))
    shape = [*passed[:place], *made, *passed[place:]]
    picked = _picked(flow, x, indices, shape)
    if picked is None:
        return freeze_all(flow, node)[0]
    if not one_number:
        broadcast(flow, [picked, values], shape)
    return [flow.labels.settled(dim) for dim in flow.of(given["self"])]


def _place(indexed: Sequence[int]) -> int:
    """Where the dims of the indices come to lie: in place of those that are indexed, if these are neighbours."""
    return indexed[0] if list(indexed) == list(range(indexed[0], indexed[-1] + 1)) else 0


def _picked(flow: Flow, x: list[Dim], indices: Sequence[Ref | None], shape: Sequence[int]) -> list[Dim] | None:
    """The dims of what indices pick from x; None if too little is known of an index."""
    given = list(indices) + [None] * (len(x) - len(indices))
    indexed = [axis for axis, item in enumerate(given) if item is not None]
    refs = [item for item in given if item is not None]
    if any(ref.name and flow.node(ref).shape == () for ref in refs):
        return None
    flow.freeze([x[axis] for axis in indexed], PICKED)
    for ref in refs:
        flow.freeze(flow.of(ref))
    passed = [flow.labels.settled(dim) for axis, dim in enumerate(x) if axis not in indexed]
    place = _place(indexed)
    made = [fixed(size) for size in shape[place : place + len(shape) - len(passed)]]
    return [*passed[:place], *made, *passed[place:]]
