"""Tensors made from sizes alone: their dims are free until they meet others."""

from idap.graph.ir import Node, Ref
from idap.graph.labels import Dim, fixed
from idap.graph.rules.flow import Flow, arguments, rule


@rule("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty")
def filled(flow: Flow, node: Node) -> list[Dim]:
    """Every slot is the same (or independent noise), so any may go."""
    given = arguments(node)
    if "fill_value" in given:
        flow.computes_with(node)
        return [fixed(size) for size in node.shape]
    dims = [flow.labels.fresh_dim(size) for size in node.shape]
    for index, dim in enumerate(dims):
        flow.follows(node, "size", index, dim)
    return dims


@rule("arange", "linspace", "scalar_tensor", "eye", "tril_indices", "triu_indices", "randint", "one_hot")
def counted(flow: Flow, node: Node) -> list[Dim]:
    """The values count slots, so none may go."""
    flow.computes_with(node)
    for leaf in node.args:
        if isinstance(leaf, Ref):
            flow.freeze(flow.of(leaf), "its slots are counted")
    return [fixed(size) for size in node.shape]
