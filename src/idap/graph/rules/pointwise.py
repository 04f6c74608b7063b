"""Operators that work element by element, pass a tensor on, or make one from sizes alone."""

from idap.graph.ir import Node, Ref, leaves
from idap.graph.labels import Dim, constant_dim
from idap.graph.rules.flow import Flow, arguments, broadcast, rule


@rule(
    "add",
    "leaky_relu",  # torch 2.11 does not mark these two as pointwise
    "rrelu",
    "relu6",
    "selu",
    "celu",
    "hardtanh",
    "hardswish",
    "silu",
    "log_sigmoid",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "clone",
    "contiguous",
    "detach",
    "detach_copy",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "to",
    "_to_copy",
    "type_as",
    "float",
    "square",
    "where",
    "zero",
    "fill",
    "masked_fill",
    "rsub",
    "floor_divide",
    "float_power",
    "true_divide",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "__and__",
    "__or__",
    "__xor__",
    "real",
    "imag",
    "complex",
    "polar",
    "_conj",
    "resolve_conj",
    "resolve_neg",
)
def elementwise(flow: Flow, node: Node) -> list[Dim]:
    """Dims that meet become one dimension."""
    flow.computes_with(node)  # as in x / self.head_dim
    tensors = [flow.of(leaf) for leaf in leaves((node.args, dict(node.kwargs))) if isinstance(leaf, Ref)]
    return broadcast(flow, tensors, node.shape)


@rule("prelu")
def prelu(flow: Flow, node: Node) -> list[Dim]:
    """One slope per channel, or one for all."""
    given = arguments(node)
    x, weight = flow.of(given["self"]), flow.of(given["weight"])
    if weight and weight[0].shape[1] > 1:
        flow.labels.unify(x[1], weight[0])
    return x


@rule("copy")
def copy(flow: Flow, node: Node) -> list[Dim]:
    """Write one tensor into another of the same shape."""
    given = arguments(node)
    return broadcast(flow, [flow.of(given["self"]), flow.of(given["src"])], node.shape)


@rule("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")
def fill(flow: Flow, node: Node) -> list[Dim]:
    """Every slot is the same (or independent noise), so any slot may be removed."""
    given = arguments(node)
    if "fill_value" in given:
        flow.computes_with(node)
        return [constant_dim(size) for size in node.shape]
    dims = [flow.labels.fresh_dim(size) for size in node.shape]
    for index, dim in enumerate(dims):
        flow.follows(node, "size", index, dim)
    return dims


@rule("arange", "linspace", "scalar_tensor", "eye", "tril_indices", "triu_indices", "randint", "one_hot")
def count_slots(flow: Flow, node: Node) -> list[Dim]:
    """The values count slots, so no slot may be removed."""
    flow.computes_with(node)
    for leaf in node.args:
        if isinstance(leaf, Ref):
            flow.freeze(flow.of(leaf), "its slots are counted")
    return [constant_dim(size) for size in node.shape]
