"""Operators that put tensors together, and take them apart."""

import itertools
from collections.abc import Sequence

from idap.graph.ir import Node
from idap.graph.labels import Dim, concat, fixed
from idap.graph.rules.flow import Flow, arguments, rule


@rule("cat", "concat", "concatenate")
def cat(flow: Flow, node: Node) -> list[Dim]:
    """One dim after the other; the others meet."""
    given = arguments(node)
    tensors = [flow.of(ref) for ref in given["tensors"] if flow.node(ref).shape != (0,)]
    axis = int(given["dim"]) % len(node.shape)
    return [
        concat([dims[place] for dims in tensors]) if place == axis else _met(flow, [dims[place] for dims in tensors])
        for place in range(len(node.shape))
    ]


@rule("hstack", "vstack", "column_stack", "dstack")
def side_by_side(flow: Flow, node: Node) -> list[Dim]:
    """`cat` along the first, second or third dim; what has fewer dims is a row, or a column."""
    given, rank = arguments(node), len(node.shape)
    tensors = [flow.of(ref) for ref in given["tensors"]]
    axis = 0 if "vstack" in node.op or rank == 1 else 2 if "dstack" in node.op else 1
    wide = []
    for dims in tensors:
        missing = rank - len(dims)
        before = 0 if "column" in node.op else missing // 2 if "dstack" in node.op else missing
        wide.append([*[fixed(1)] * before, *dims, *[fixed(1)] * (missing - before)])
    return [
        concat([dims[place] for dims in wide]) if place == axis else _met(flow, [dims[place] for dims in wide])
        for place in range(rank)
    ]


@rule("stack")
def stack(flow: Flow, node: Node) -> list[Dim]:
    """A new dim that can't shrink; the others meet."""
    given = arguments(node)
    tensors = [flow.of(ref) for ref in given["tensors"]]
    place = int(given["dim"]) % len(node.shape)
    dims = [_met(flow, [dims[axis] for dims in tensors]) for axis in range(len(node.shape) - 1)]
    return [*dims[:place], fixed(len(tensors)), *dims[place:]]


def _met(flow: Flow, dims: Sequence[Dim]) -> Dim:
    for dim in dims[1:]:
        flow.labels.unify(dims[0], dim)
    return flow.labels.settled(dims[0])


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(flow: Flow, node: Node) -> list[list[Dim]]:
    """Parts one after the other. Parts asked for by one number stay equal, so they shrink together."""
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
    whole = flow.labels.settled(x[axis])
    parts = [flow.labels.settled(whole[:, low:high]) for low, high in itertools.pairwise(edges)]
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
        now = flow.labels.settled(dim)
        flow.labels.unify(now[:, : edges[1]], now[:, low:high])


@rule("unbind")
def unbind(flow: Flow, node: Node) -> list[list[Dim]]:
    """One result per slot, so none may go."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    flow.freeze([x[axis]], "each of its slots is taken on its own")
    axis %= len(x)
    rest = [flow.labels.settled(dim) for place, dim in enumerate(x) if place != axis]
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
    x[axis] = flow.labels.settled(x[axis][:, :half])
    return x
