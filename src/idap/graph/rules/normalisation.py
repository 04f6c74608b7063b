"""Norms, softmax and everything else that computes one number from many slots."""

from collections.abc import Sequence
from typing import Any

from idap.graph.ir import Node, Ref
from idap.graph.labels import Dim, constant_dim
from idap.graph.rules.flow import RULES, Flow, arguments, broadcast, rule


@rule("batch_norm", "instance_norm")
def batch_norm(flow: Flow, node: Node) -> list[Dim]:
    """X (N, C, ...), and up to four tensors (C)."""
    given = arguments(node)
    x = flow.of(given["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given[name] is not None:
            flow.labels.unify(x[1], flow.of(given[name])[0])
    if given.get("training") or (node.op.startswith("aten.instance_norm") and given.get("use_input_stats")):
        flow.crosses(node, "norm", [x[0], *x[2:]])
    return [flow.labels.resolve(dim) for dim in x]


@rule("layer_norm", "rms_norm")
def layer_norm(flow: Flow, node: Node) -> list[Dim]:
    """X (..., *normalized), weight and bias (*normalized)."""
    given = arguments(node)
    x = flow.of(given["input"])
    count = len(given["normalized_shape"])
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            for mine, theirs in zip(x[-count:], flow.of(given[name]), strict=True):
                flow.labels.unify(mine, theirs)
    x = [flow.labels.resolve(dim) for dim in x]
    for index, dim in enumerate(x[-count:]):
        flow.follows(node, "normalized_shape", index, dim)
    flow.crosses(node, "norm", x[-count:])
    return x


@rule("group_norm")
def group_norm(flow: Flow, node: Node) -> list[Dim]:
    """X (N, C, ...) in `num_groups` parts, weight and bias (C)."""
    given = arguments(node)
    x, groups = flow.of(given["input"]), int(given["num_groups"])
    parts, inner = flow.labels.split(x[1], [groups, x[1].shape[1] // groups])
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            flow.labels.unify(flow.of(given[name])[0], flow.of(given["input"])[1])
    flow.follows(node, "num_groups", None, flow.labels.resolve(parts))
    flow.crosses(node, "norm", [inner, *x[2:]])
    return flow.of(given["input"])


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin")
def softmax(flow: Flow, node: Node) -> list[Dim]:
    """Softmax over one dimension."""
    given = arguments(node)
    x = flow.of(given["self"])
    flow.crosses(node, "softmax", [x[int(given["dim"])]])
    return x


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "prod", "norm", "linalg_vector_norm", "logsumexp", "any", "all",
    "max", "min", "argmax", "argmin", "var_mean", "std_mean", "nansum", "median", "nanmedian",
)  # fmt: skip
def reduction(flow: Flow, node: Node) -> list[Dim] | list[list[Dim]]:
    """Reduce some dimensions, or all."""
    given = arguments(node)
    x = flow.of(given["self"])
    if "other" in given:  # max and min of two tensors
        return RULES["add"](flow, node)
    axes = _axes(given.get("dim"), len(x))
    reduced = [x[axis] for axis in axes]
    flow.crosses(node, "reduction", reduced)
    if _returns_places(flow, node):
        flow.freeze(reduced, "the places of its slots are read")
        x = flow.of(given["self"])
    if given.get("keepdim"):
        result = [constant_dim(1) if axis in axes else dim for axis, dim in enumerate(x)]
    else:
        result = [dim for axis, dim in enumerate(x) if axis not in axes]
    return [result for _ in node.shapes] if len(node.shapes) > 1 else result


@rule("cosine_similarity")
def cosine_similarity(flow: Flow, node: Node) -> list[Dim]:
    """The similarity of two tensors over one dimension."""
    given = arguments(node)
    x, y = flow.of(given["x1"]), flow.of(given["x2"])
    shape = [max(mine.shape[1], theirs.shape[1]) for mine, theirs in zip(x, y, strict=True)]
    met, axis = broadcast(flow, [x, y], shape), int(given["dim"]) % len(x)
    flow.crosses(node, "reduction", [met[axis]])
    return [flow.labels.resolve(dim) for place, dim in enumerate(met) if place != axis]


@rule("_weight_norm")
def weight_norm(flow: Flow, node: Node) -> list[Dim]:
    """V (any shape) divided by its norm along all dims but one, times g of that dim."""
    given = arguments(node)
    v, axis = flow.of(given["v"]), int(given["dim"])
    met = broadcast(flow, [v, flow.of(given["g"])], node.shape)
    flow.crosses(node, "norm", [dim for place, dim in enumerate(met) if place != axis % len(v)])
    return met


@rule("diff")
def diff(flow: Flow, node: Node) -> list[Dim]:
    """Differences of neighbours along one dim, which can't shrink."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    flow.freeze([x[axis]], "the order of its slots matters")
    x = flow.of(given["self"])
    x[axis] = constant_dim(node.shape[axis])
    return x


@rule("cumsum", "cumprod", "flip", "roll", "sort", "argsort", "topk", "msort")
def along_dims(flow: Flow, node: Node) -> list[list[Dim]]:
    """The dims that the operator acts on can't shrink; the other dims pass."""
    given = arguments(node)
    x = flow.of(next(iter(given.values())))
    axes = _axes(given.get("dims", given.get("dim", -1)), len(x))
    flow.freeze([x[axis] for axis in axes], "the order of its slots matters")
    passed = [flow.labels.resolve(dim) for dim in x]
    result = []
    for shape in node.shapes:
        sizes = zip(passed, shape, strict=True)
        result.append([dim if dim.shape[1] == size else dim[:, :size] for dim, size in sizes])
    return result


def _returns_places(flow: Flow, node: Node) -> bool:
    """Whether the model uses the places at which values were found."""
    name = node.op.split(".")[1]
    if name.startswith("arg"):
        return True
    if name not in ("max", "min", "median", "nanmedian") or len(node.shapes) < 2:
        return False
    nodes, outputs = flow.graph.nodes.values(), flow.graph.outputs
    taken = {each.name for each in nodes if each.op == "getitem" and each.args == (Ref(node.name), 1)}
    return not taken.isdisjoint([*outputs, *(read for each in nodes for read in each.inputs())])


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or dim in ((), []):
        return list(range(rank))
    dims: Sequence[int] = dim if isinstance(dim, tuple | list) else (dim,)
    return [int(axis) % rank for axis in dims] if rank else []
