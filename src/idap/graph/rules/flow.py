"""Walk a graph once and give every tensor dimension its labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from idap.errors import StructureError, UnknownOperatorError
from idap.graph.ir import Expression, Graph, Node, Ref
from idap.graph.labels import Dim, Labels, constant_dim
from idap.graph.provenance import sources

Rule = Callable[["Flow", Node], list[Dim] | list[list[Dim]]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by ATen name without overload and without the in-place underscore."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True)
class SizeUse:
    """An int argument of an operator that counts the slots of a dim.

    Attributes:
        node: the operator.
        argument: the argument's name in the operator's schema.
        index: position in the argument if it is a list, otherwise None.
        dim: the dim whose slots are counted.
        sign: -1 if the int counts from the end.
    """

    node: str
    argument: str
    index: int | None
    dim: Dim
    sign: int = 1


@dataclass(frozen=True)
class Pin:
    """A dim whose number of slots must stay, because the operator's result depends on it.

    Attributes:
        node: the operator.
        dim: the dimension.
        why: for messages.
    """

    node: str
    dim: Dim
    why: str


@dataclass(frozen=True)
class Contraction:
    """An operator that sums over a dimension of its input, weighted by a tensor.

    Attributes:
        node: the operator.
        kind: "linear", "conv" or "recurrent".
        input: node that is read; `input_dim` is the dimension summed over.
        weight: node that holds the weights; `read_dim` is summed over, `write_dim` is the result's dimension.
        groups: number of independent parts (convolutions).
        output_dim: the dimension of the result that `write_dim` becomes.
        paired: whether the other dimensions of the result are those of the input, in the same order.
    """

    node: str
    kind: str
    input: str
    input_dim: int
    weight: str
    read_dim: int
    write_dim: int
    output_dim: int
    groups: int = 1
    paired: bool = True


@dataclass
class Flow:
    """What the rules read and write while a graph is walked.

    Attributes:
        graph: the graph.
        labels: the labels of all dims.
        dims: node -> for each tensor it produces, the dims.
        sizes: int arguments that must follow the dims.
        contractions: where channels are written and read.
        crossings: node -> what it computes over a dimension that may shrink ("norm", "softmax", "reduction",
            "contraction" of two activations); only at these nodes does a masked slot differ from an absent one.
        roles: dims known to be "heads" or "head width".
        data: nodes whose values depend on the model's inputs.
        escaped: attributes and shapes whose value the results depend on, each with the modules whose code computes
            with it and the place.
        pins: dims whose number of slots the results depend on without an int argument.
        products: nodes of weights that are multiplied otherwise than by a contraction, each with a description.
    """

    graph: Graph
    labels: Labels = field(default_factory=Labels)
    dims: dict[str, list[list[Dim]]] = field(default_factory=dict)
    sizes: list[SizeUse] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    crossings: dict[str, str] = field(default_factory=dict)
    roles: list[tuple[str, Dim]] = field(default_factory=list)
    data: set[str] = field(default_factory=set)
    escaped: dict[Expression, dict[str, str]] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    products: list[tuple[str, str]] = field(default_factory=list)
    _at: Node = field(default_factory=lambda: Node("", ""))
    _live: set[str] = field(default_factory=set)

    def of(self, value: Any) -> list[Dim]:
        """The dims of a tensor argument, in terms of atomic labels."""
        return [self.labels.resolve(dim) for dim in self.dims[value.name][0]]

    def node(self, value: Ref) -> Node:
        """The node behind a tensor argument."""
        return self.graph.nodes[value.name]

    def enter(self, node: Node) -> None:
        """Record this node as the reason for everything frozen from now on."""
        self._at = node
        self.labels.because(f"it meets a dimension that can't shrink, at {node.where()}")

    def freeze(self, dims: Sequence[Dim], why: str = "") -> None:
        """Keep every slot of these dims; `why` is recorded instead of the general reason of this node."""
        if why:
            self.labels.because(f"{why}, at {self._at.where()}")
        for dim in dims:
            self.labels.freeze_dim(dim)
        if why:
            self.enter(self._at)

    def computes_with(self, node: Node) -> None:
        """Note that the node computes with its int arguments, so that the sizes they come from must not change."""
        for leaf in (leaf for size in node.sizes for leaf in sources(size)):
            self.escaped.setdefault(leaf, {}).setdefault(node.module, node.where())

    def follows(self, node: Node, argument: str, index: int | None, dim: Dim, sign: int = 1) -> None:
        """Note that an int argument of the node counts the slots of `dim`."""
        if len(dim):
            self.sizes.append(SizeUse(node.name, argument, index, dim, sign))

    def crosses(self, node: Node, kind: str, dims: Sequence[Dim]) -> None:
        """Note that the node computes one number from all slots of these dims."""
        if any(len(self.labels.resolve(dim)) for dim in dims):
            self.crossings[node.name] = kind

    def is_used(self, node: Node) -> bool:
        """Whether the model's outputs depend on the values of a node, not only on its shape."""
        if not self._live:
            self._live |= self.graph.live({})
        return node.name in self._live

    def is_weight(self, value: Any) -> bool:
        """Whether a tensor comes from parameters alone."""
        return value.name not in self.data


def arguments(node: Node) -> dict[str, Any]:
    """The node's arguments by their names in the operator's schema, defaults included."""
    schema = operator(node)._schema
    given: dict[str, Any] = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    given |= node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema.arguments}


def operator(node: Node) -> Any:
    """The torch operator that a node calls."""
    return _operator(node.op)


@cache
def _operator(op: str) -> Any:
    namespace, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def base_name(op: str) -> str:
    """ATen name without namespace, overload and in-place underscore: ``aten.relu_.default`` -> ``relu``.

    >>> base_name("aten.add_.Tensor"), base_name("aten.__and__.Tensor")
    ('add', '__and__')
    """
    name = op.split(".")[1] if op.count(".") >= 2 else op
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def flow_of(graph: Graph, *, freeze_unknown: bool = False, contracts: Sequence[str] | None = None) -> Flow:
    """Give every dimension of every tensor in a graph its labels.

    Args:
        graph: from `trace`.
        freeze_unknown: freeze every dim that an operator without a rule touches, instead of raising.
        contracts: outputs whose shape must not change, such as ``logits``; None means all that the model returns.

    Raises:
        UnknownOperatorError: an operator has no rule.
        StructureError: the model returns nothing of that name.
    """
    escaped = {leaf: dict(places) for leaf, places in graph.escaped.items()}
    flow = Flow(graph, data=graph.data_nodes(), escaped=escaped)
    shared: dict[str, list[Dim]] = {}
    for node in graph.nodes.values():
        flow.enter(node)
        flow.dims[node.name] = _dims_of(flow, node, shared, freeze_unknown)
    for name in _contract_nodes(graph, contracts):
        flow.enter(graph.nodes[name])
        for dims in flow.dims[name]:
            flow.freeze(dims, "the model returns it")
    return flow


def _contract_nodes(graph: Graph, contracts: Sequence[str] | None) -> list[str]:
    """The nodes of the named outputs; ``hidden_states`` also stands for ``hidden_states.0`` and so on."""
    if contracts is None:
        return list(graph.outputs)
    found = []
    for wanted in contracts:
        named = zip(graph.returned, graph.outputs, strict=True)
        mine = [node for name, node in named if name == wanted or name.startswith(f"{wanted}.")]
        if not mine:
            known = ", ".join(graph.returned)
            raise StructureError(f"the model returns nothing named {wanted!r}; it returns {known or 'no tensor'}")
        found += mine
    return found


def _dims_of(flow: Flow, node: Node, shared: dict[str, list[Dim]], freeze_unknown: bool) -> list[list[Dim]]:
    if node.op in ("parameter", "buffer"):
        if node.target not in shared:
            shared[node.target] = [flow.labels.fresh_dim(size) for size in node.shape]
        return [shared[node.target]]
    if node.op in ("input", "constant"):
        return [[constant_dim(size) for size in shape] for shape in node.shapes]
    if node.op == "getitem":
        source, index = node.args
        return [flow.dims[source.name][index]]
    if not node.shapes:
        return []  # an assertion, a side effect
    if node.op.count(".") != 2:
        raise UnknownOperatorError(
            f"{node.where()} is not an operator but control flow or a transform such as torch.vmap, which can't be "
            "followed: write that part of the forward with ordinary operators, or compress a part of the model that "
            "does not contain it."
        )
    found = rule_of(node)
    if found is None:
        if not freeze_unknown:
            raise UnknownOperatorError(
                f"no rule for operator {node.where()}: it is not known how channels pass through it. Write a rule "
                "with @idap.graph.rules.flow.rule, or keep every dimension that the operator touches: "
                "freeze_unknown=True in Config or analyze, --set compress.freeze_unknown=true in a command."
            )
        found = freeze_all
    dims = found(flow, node)
    nested = dims if dims and isinstance(dims[0], list) else [dims]
    _check(node, nested)
    return nested  # type: ignore[return-value]


def rule_of(node: Node) -> Rule | None:
    """The rule for an operator: its own, or the rule of all operators that torch marks as pointwise."""
    by_tag = RULES["add"] if torch.Tag.pointwise in operator(node).tags else None
    return RULES.get(base_name(node.op), by_tag)


def freeze_all(flow: Flow, node: Node) -> list[list[Dim]]:
    """The rule for operators through which nothing may shrink."""
    for name in node.inputs():
        for dims in flow.dims[name]:
            flow.freeze(dims, "no dimension may shrink at this operator")
    return [[constant_dim(size) for size in shape] for shape in node.shapes]


def _check(node: Node, dims: Sequence[Any]) -> None:
    shapes = tuple(tuple(dim.shape[1] for dim in tensor) for tensor in dims)
    if shapes != node.shapes:
        raise AssertionError(f"the rule for {node.where()} returned shapes {shapes}, the operator has {node.shapes}")


def broadcast(flow: Flow, tensors: Sequence[list[Dim]], shape: Sequence[int]) -> list[Dim]:
    """The dims of tensors combined element by element: dims that meet become one dimension."""
    result: list[Dim] = []
    for place, size in enumerate(shape):
        met = [dims[place - len(shape)] for dims in tensors if len(dims) >= len(shape) - place]
        flow.freeze([dim for dim in met if dim.shape[1] == 1])
        full = [dim for dim in met if dim.shape[1] == size and size != 1]
        for dim in full[1:]:
            flow.labels.unify(full[0], dim)
        result.append(flow.labels.resolve(full[0]) if full else constant_dim(size))
    return result


def regroup(flow: Flow, dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """The dims after a reshape in row-major order."""
    if 0 in shape:
        flow.freeze(dims)
        return [constant_dim(size) for size in shape]
    found: list[Dim] = []
    taken = made = 0
    while taken < len(dims) or made < len(shape):
        before, after = [*dims[taken : taken + 1]], [*shape[made : made + 1]]
        while _size(before) != _size_of(after):
            if _size(before) < _size_of(after):
                before.append(dims[taken + len(before)])
            else:
                after.append(shape[made + len(after)])
        taken, made = taken + len(before), made + len(after)
        if len(before) == len(after) == 1:
            found.append(before[0])
        else:
            found += flow.labels.split(flow.labels.merge(before), after) if before else [constant_dim(1) for _ in after]
    return found


def _size(dims: Sequence[Dim]) -> int:
    return _size_of([dim.shape[1] for dim in dims])


def _size_of(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
