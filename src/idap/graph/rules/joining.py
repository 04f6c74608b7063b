"""Operators that put tensors together, take them apart, and look things up by index."""

import itertools
from collections.abc import Sequence

from idap.graph.ir import Node, Ref
from idap.graph.labels import Dim, concat, constant_dim
from idap.graph.rules.flow import Flow, arguments, freeze_all, rule


@rule("cat", "concat", "concatenate")
def cat(flow: Flow, node: Node) -> list[Dim]:
    """Concatenate one dim; the other dims are unified."""
    given = arguments(node)
    tensors = [flow.of(ref) for ref in given["tensors"] if flow.node(ref).shape != (0,)]
    axis = int(given["dim"]) % len(node.shape)
    return [
        concat([dims[place] for dims in tensors])
        if place == axis
        else _unify_all(flow, [dims[place] for dims in tensors])
        for place in range(len(node.shape))
    ]


@rule("hstack", "vstack", "column_stack", "dstack")
def side_by_side(flow: Flow, node: Node) -> list[Dim]:
    """`cat` along the first, second or third dim; a tensor with fewer dims is a row or a column."""
    given, rank = arguments(node), len(node.shape)
    tensors = [flow.of(ref) for ref in given["tensors"]]
    axis = 0 if "vstack" in node.op or rank == 1 else 2 if "dstack" in node.op else 1
    wide = []
    for dims in tensors:
        missing = rank - len(dims)
        before = 0 if "column" in node.op else missing // 2 if "dstack" in node.op else missing
        wide.append([*[constant_dim(1)] * before, *dims, *[constant_dim(1)] * (missing - before)])
    return [
        concat([dims[place] for dims in wide]) if place == axis else _unify_all(flow, [dims[place] for dims in wide])
        for place in range(rank)
    ]


@rule("stack")
def stack(flow: Flow, node: Node) -> list[Dim]:
    """The new dim can't shrink; the other dims are unified."""
    given = arguments(node)
    tensors = [flow.of(ref) for ref in given["tensors"]]
    place = int(given["dim"]) % len(node.shape)
    dims = [_unify_all(flow, [dims[axis] for dims in tensors]) for axis in range(len(node.shape) - 1)]
    return [*dims[:place], constant_dim(len(tensors)), *dims[place:]]


def _unify_all(flow: Flow, dims: Sequence[Dim]) -> Dim:
    for dim in dims[1:]:
        flow.labels.unify(dims[0], dim)
    return flow.labels.resolve(dims[0])


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(flow: Flow, node: Node) -> list[list[Dim]]:
    """Split one dim into consecutive parts; parts whose size is a single number stay equal: they shrink together."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    axis %= len(x)
    edges = [0]
    for shape in node.shapes:
        edges.append(edges[-1] + shape[axis])
    name = next((n for n in ("split_size", "split_sizes") if n in given), "")
    sizes = given.get(name)
    if not isinstance(sizes, tuple | list):
        _tie_parts(flow, x[axis], edges)
    whole = flow.labels.resolve(x[axis])
    parts = [flow.labels.resolve(whole[:, low:high]) for low, high in itertools.pairwise(edges)]
    if isinstance(sizes, tuple | list):
        for index, part in enumerate(parts):
            flow.follows(node, name, index, part)
    elif name:
        flow.follows(node, name, None, parts[0])
    return [[part if place == axis else dim for place, dim in enumerate(flow.of(given["self"]))] for part in parts]


def _tie_parts(flow: Flow, dim: Dim, edges: Sequence[int]) -> None:
    sizes = {high - low for low, high in itertools.pairwise(edges)}
    if len(sizes) > 1:
        flow.freeze([dim], "it is split into unequal parts by one number")
        return
    for low, high in itertools.pairwise(edges):
        now = flow.labels.resolve(dim)
        flow.labels.unify(now[:, : edges[1]], now[:, low:high])


@rule("unbind")
def unbind(flow: Flow, node: Node) -> list[list[Dim]]:
    """One result per slot, so no slot may be removed."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    flow.freeze([x[axis]], "each of its slots is taken on its own")
    axis %= len(x)
    rest = [flow.labels.resolve(dim) for place, dim in enumerate(x) if place != axis]
    return [rest for _ in node.shapes]


@rule("glu")
def glu(flow: Flow, node: Node) -> list[Dim]:
    """The first half times a gate of the second: both shrink together."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    axis %= len(x)
    half = x[axis].shape[1] // 2
    _tie_parts(flow, x[axis], [0, half, 2 * half])
    x = flow.of(given["self"])
    x[axis] = flow.labels.resolve(x[axis][:, :half])
    return x


rule("masked_select", "masked_scatter", "take", "nonzero", "bincount", "unfold", "as_strided", "tril", "triu",
     "diagonal", "affine_grid_generator")(freeze_all)  # fmt: skip

PICKED = "its slots are picked by index"


@rule("embedding")
def embedding(flow: Flow, node: Node) -> list[Dim]:
    """Weight (V, E), indices (...) -> (..., E)."""
    given = arguments(node)
    weight, indices = flow.of(given["weight"]), flow.of(given["indices"])
    flow.freeze([weight[0], *indices], "it is looked up by index")
    return [*indices, flow.labels.resolve(weight[1])]


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
    return [
        [constant_dim(bags[0]), flow.labels.resolve(weight[1])],
        *([constant_dim(size) for size in shape] for shape in others),
    ]


@rule("index_select")
def index_select(flow: Flow, node: Node) -> list[Dim]:
    """The indexed dim can't shrink; the other dims pass."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    if not x:
        return freeze_all(flow, node)[0]
    flow.freeze([x[axis]], PICKED)
    x[axis] = constant_dim(node.shape[axis])
    return [flow.labels.resolve(dim) for dim in x]


@rule("select_scatter", "slice_scatter")
def write_part(flow: Flow, node: Node) -> list[Dim]:
    """Write a slot or a range of slots of one dim; the other dims are unified with those of the source."""
    given = arguments(node)
    x, part, axis = flow.of(given["self"]), flow.of(given["src"]), int(given["dim"]) % len(node.shape)
    if len(part) < len(x):
        part.insert(axis, constant_dim(1))
    flow.freeze([x[axis], part[axis]], PICKED)
    for place, (mine, theirs) in enumerate(zip(x, part, strict=True)):
        if place != axis:
            flow.labels.unify(mine, theirs)
    return [flow.labels.resolve(dim) for dim in x]


@rule("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill",
      "index_reduce")  # fmt: skip
def along_one(flow: Flow, node: Node) -> list[Dim]:
    """Slots of one dim are picked or written by index; the dims that all tensors share pass."""
    given = arguments(node)
    if "index_" in node.op:  # the indices are a vector; each holds for all slots of the other dims
        flow.freeze(flow.of(given.pop("index")), "it says which slots are picked")
    tensors = [flow.of(value) for value in given.values() if isinstance(value, Ref)]
    tensors = [dims for dims in tensors if dims]  # a single number has no dims
    if given["dim"] is None or not node.shape or any(len(dims) != len(node.shape) for dims in tensors):
        return freeze_all(flow, node)[0]
    axis = int(given["dim"]) % len(node.shape)
    result = []
    for place, size in enumerate(node.shape):
        met = [dims[place] for dims in tensors]
        if "take_along" in node.op and place != axis:  # one index may hold for all slots
            met = [dim for dim in met if dim.shape[1] == size] or met
        if place == axis or any(dim.shape[1] != size for dim in met):
            flow.freeze(met, PICKED if place == axis else "only some of its slots are picked")
        for dim in met[1:] if place != axis else ():
            if dim.shape[1] == met[0].shape[1]:
                flow.labels.unify(met[0], dim)
        result.append(met[0] if met[0].shape[1] == size else constant_dim(size))
    return [flow.labels.resolve(dim) for dim in result]


@rule("index", "_unsafe_index")
def index(flow: Flow, node: Node) -> list[Dim]:
    """``x[i, :, j]``: dims indexed by tensors are replaced by those of the indices, broadcast together."""
    given = arguments(node)
    x, indices = flow.of(given["self"]), _by_axis(flow, given["indices"])
    if any(len(shape) == 0 for shape in indices.values()):
        return freeze_all(flow, node)[0]
    rest = _freeze_index(flow, x, given["indices"], list(indices))
    place = _place(list(indices))
    made = [constant_dim(size) for size in node.shape[place : place + len(node.shape) - len(rest)]]
    return [*rest[:place], *made, *rest[place:]]


@rule("index_put")
def index_put(flow: Flow, node: Node) -> list[Dim]:
    """``x[i, :, j] = values``: the dims of the values are unified with the dims of x that are not indexed.

    An index may also be a mask over several dims. Its shape alone does not tell, so both meanings are allowed for.
    """
    given = arguments(node)
    x, indices = flow.of(given["self"]), _by_axis(flow, given["indices"])
    values = _without_leading_ones(flow.of(given["values"]))
    several = [
        axis
        for axis, shape in indices.items()
        if len(shape) > 1 and shape == tuple(dim.shape[1] for dim in x[axis : axis + len(shape)])
    ]
    if any(len(shape) == 0 for shape in indices.values()) or (several and len(indices) > 1):
        return freeze_all(flow, node)[0]
    if several:
        end = several[0] + len(indices[several[0]])
        met: list[Dim | None] = [*x[end:]]
        if len(values) > len(met):
            return freeze_all(flow, node)[0]
        _freeze_index(flow, x, given["indices"], range(several[0], end))
    else:
        rest, place = _freeze_index(flow, x, given["indices"], list(indices)), _place(list(indices))
        met = [*rest[:place], *[None] * max(map(len, indices.values())), *rest[place:]]
    for theirs, mine in zip(reversed(values), reversed(met), strict=False):
        if mine is not None and mine.shape[1] == theirs.shape[1]:
            flow.labels.unify(mine, theirs)
        else:
            flow.freeze([theirs])
    return [flow.labels.resolve(dim) for dim in x]


def _by_axis(flow: Flow, indices: Sequence[Ref | None]) -> dict[int, tuple[int, ...]]:
    """The shapes of the indices, by the axis that each indexes."""
    return {axis: flow.node(item).shape for axis, item in enumerate(indices) if item is not None}


def _without_leading_ones(dims: list[Dim]) -> list[Dim]:
    first = next((place for place, dim in enumerate(dims) if dim.shape[1] != 1), len(dims))
    return dims[first:]


def _place(indexed: Sequence[int]) -> int:
    """Where the dims of the indices stand in the result: at the indexed axes if these are adjacent, otherwise first."""
    return indexed[0] if list(indexed) == list(range(indexed[0], indexed[-1] + 1)) else 0


def _freeze_index(flow: Flow, x: list[Dim], indices: Sequence[Ref | None], indexed: Sequence[int]) -> list[Dim]:
    """Freeze the indexed dims and the indices; returns the other dims of x."""
    flow.freeze([x[axis] for axis in indexed], PICKED)
    for ref in indices:
        if ref is not None:
            flow.freeze(flow.of(ref))
    return [flow.labels.resolve(dim) for axis, dim in enumerate(x) if axis not in indexed]
