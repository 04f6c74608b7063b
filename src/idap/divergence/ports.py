"""What the graph says about the places where units are written and read: the stream they end in, their activation."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from idap.divergence.observe import is_result, tensors_given
from idap.graph.ir import CallKey, Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.structure.analysis import Structure

PASSING = ("dropout", "view", "reshape", "flatten", "permute", "transpose", "contiguous", "clone", "detach", "alias")
"""Operators between a layer and the addition it feeds that change neither values nor their energy."""

CONTRACTIONS = ("linear", "matmul", "conv1d", "conv2d", "conv3d")
"""Operators that may return the shape they were given and yet are no activation."""


class Wiring:
    """Who reads whose value in a network that some branches and blocks are gone from.

    Args:
        structure: of the original.
        removed: the branches and blocks that are gone.

    Attributes:
        graph: of the original, with projections in their places.
        gone: nodes that are no longer computed, or whose result is no longer needed.
        users: node -> the nodes that read its value, also through what is gone.
    """

    def __init__(self, structure: Structure, removed: Sequence[str] = ()) -> None:
        structure = structure.after(removed)
        self.graph = structure.graph
        self._skips = structure.skips(removed)
        self.gone = structure.dead_nodes(removed) | set(self._skips)
        self._data = self.graph.data_nodes()
        self.users: dict[str, list[str]] = {name: [] for name in self.graph.nodes}
        for node in self.graph.nodes.values():
            if node.name not in self.gone:
                for used in dict.fromkeys(map(self.source, node.inputs())):
                    self.users[used].append(node.name)

    def source(self, name: str) -> str:
        """The node that makes the value which a reader of `name` gets."""
        while name in self._skips:
            name = self._skips[name]
        return name

    def sight(self, name: str) -> "Sight | None":
        """Where the value of a node can be seen while the model runs; None if one opaque call hides it."""
        name = self.source(name)
        call = self.graph.nodes[name].call
        if call is not None and is_result(self.graph, name):
            return Sight(name, call, None)
        for user in self.users[name]:  # an input of the model, or one of several values made by one call
            call, given = self.graph.nodes[user].call, tensors_given(self.graph, user)
            if call is not None and given is not None and name in map(self.source, given):
                return Sight(name, call, list(map(self.source, given)).index(name))
        return None

    def stream_beside(self, node: Node, end: str) -> int | None:
        """Which tensor given to an addition is the stream that `end` is added to; None if there is no such stream."""
        given = tensors_given(self.graph, node.name)
        if base_name(node.op) != "add" or node.call is None or given is None or len(given) != 2:
            return None
        operands = [self.source(name) for name in given]
        same = self.graph.nodes[given[0]].shape == self.graph.nodes[given[1]].shape
        if not same or operands[0] == operands[1] or end not in operands or not self._data.issuperset(operands):
            return None
        return 1 - operands.index(end)


@dataclass(frozen=True)
class Sight:
    """Where a value passes by in the running model.

    Attributes:
        node: the node that holds it.
        call: the eager call.
        argument: which of the tensors given to the call it is; None: it is what the call returns.
    """

    node: str
    call: CallKey
    argument: int | None


@dataclass(frozen=True)
class Stream:
    """Where the output of a contraction enters the flow.

    Attributes:
        affine: the norms and factors that it passes first, each with a fixed scale per channel.
        addition: the node where it is added to another tensor, "" if it isn't.
        skip: which of the tensors given to the addition is the stream.
        end: the last node that is the contraction's own contribution.
    """

    affine: tuple[str, ...]
    addition: str
    skip: int
    end: str


def stream_of(wiring: Wiring, name: str, *, channels: int) -> Stream:
    """Follow a contraction's output, which has so many channels, to the addition where it joins the stream."""
    affine: tuple[str, ...] = ()
    end = name
    while len(wiring.users[end]) == 1:
        node = wiring.graph.nodes[wiring.users[end][0]]
        skip = wiring.stream_beside(node, end)
        if skip is not None:
            return Stream(affine, node.name, skip, end)
        if _is_affine(wiring, node, channels):
            affine += (node.name,)
        elif base_name(node.op) not in PASSING:
            break
        end = node.name
    return Stream(affine, "", 0, affine[-1] if affine else name)


def _is_affine(wiring: Wiring, node: Node, channels: int) -> bool:
    """Whether a node scales each channel by a number that depends on no input."""
    kind = base_name(node.op)
    if kind == "batch_norm":
        given = arguments(node)
        return given["running_var"] is not None and not given["training"]
    factor = factor_in(wiring.graph, node) if kind == "mul" else None
    return factor is not None and (
        not isinstance(factor, Ref) or prod(wiring.graph.nodes[factor.name].shape) in (1, channels)
    )


def factor_in(graph: Graph, node: Node) -> Any:
    """The number, or the reference to a parameter or buffer, that a multiplication applies; None if there is none."""
    given = arguments(node)
    for value in (given["self"], given["other"]):
        if not isinstance(value, Ref) or graph.nodes[value.name].op in ("parameter", "buffer"):
            return value
    return None


def activation_of(wiring: Wiring, name: str) -> str:
    """The node that holds a layer's output after its norm and its activation (A in docs/method.md#notation)."""
    graph = wiring.graph
    found = end = name
    while len(wiring.users[end]) == 1:
        node = graph.nodes[wiring.users[end][0]]
        data = [used for used in node.inputs() if graph.nodes[used].op not in ("parameter", "buffer", "constant")]
        kind = base_name(node.op)
        if node.shapes != graph.nodes[end].shapes or len(data) != 1 or kind in CONTRACTIONS:
            break
        if kind in ("softmax", "log_softmax", *PASSING[1:]):
            break
        end = node.name
        found = end if is_result(graph, end) else found
    return found
