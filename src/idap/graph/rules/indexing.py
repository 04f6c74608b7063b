"""Looking things up by index: the dimension that is indexed can't shrink."""

from idap.graph.ir import Node
from idap.graph.labels import Dim, fixed
from idap.graph.rules.flow import Flow, arguments, freeze_all, rule

rule("gather", "scatter", "scatter_add", "index_put", "index_add", "masked_select", "nonzero", "bincount",
     "take_along_dim", "unfold", "as_strided", "tril", "triu", "diagonal")(freeze_all)  # fmt: skip


@rule("embedding")
def embedding(flow: Flow, node: Node) -> list[Dim]:
    """Weight (V, E), indices (...) -> (..., E)."""
    given = arguments(node)
    weight, indices = flow.of(given["weight"]), flow.of(given["indices"])
    flow.freeze([weight[0], *indices], "it is looked up by index")
    return [*indices, flow.labels.settled(weight[1])]


@rule("index_select")
def index_select(flow: Flow, node: Node) -> list[Dim]:
    """Other dims pass."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    flow.freeze([x[axis]], "its slots are picked by index")
    x[axis] = fixed(node.shape[axis])
    return [flow.labels.settled(dim) for dim in x]


@rule("index")
def index(flow: Flow, node: Node) -> list[Dim]:
    """``x[i, :, j]``: dims indexed by tensors are replaced by those of the indices, broadcast together."""
    given = arguments(node)
    x = flow.of(given["self"])
    given_indices = list(given["indices"]) + [None] * (len(x) - len(given["indices"]))
    indexed = [axis for axis, item in enumerate(given_indices) if item is not None]
    if any(given_indices[axis].name and flow.node(given_indices[axis]).shape == () for axis in indexed):
        return freeze_all(flow, node)[0]
    flow.freeze([x[axis] for axis in indexed], "its slots are picked by index")
    for axis in indexed:
        flow.freeze(flow.of(given_indices[axis]))
    passed = [flow.labels.settled(dim) for axis, dim in enumerate(x) if axis not in indexed]
    made = [fixed(size) for size in _made(node, len(passed), indexed)]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    place = indexed[0] if adjacent else 0
    return [*passed[:place], *made, *passed[place:]]


def _made(node: Node, passed: int, indexed: list[int]) -> tuple[int, ...]:
    count = len(node.shape) - passed
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    start = indexed[0] if adjacent else 0
    return node.shape[start : start + count]
