"""Where units are written and read: the stream they end in, their activation, and rows of what a contraction reads.

A row is what the weights are multiplied by at one position. For a convolution it is an unfolded patch: the inputs under
all taps of the kernel. The matrix of all rows is never held in memory; some rows are drawn from each batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from idap.divergence.observe import is_result, tensors_given
from idap.graph.ir import CallKey, Graph, Node, Ref
from idap.graph.rules import Contraction
from idap.graph.rules.flow import arguments, base_name
from idap.linalg.moments import exact
from idap.structure.analysis import Structure

PASSING = ("dropout", "view", "reshape", "flatten", "permute", "transpose", "contiguous", "clone", "detach", "alias")
"""Operators between a layer and the addition it feeds that change neither values nor their energy."""

CONTRACTIONS = ("linear", "matmul", "conv1d", "conv2d", "conv3d")
"""Operators that may keep the shape of their input and yet are not activations."""


class Wiring:
    """The nodes that read each value in a network without some of its branches and blocks.

    Args:
        structure: the structure of the original.
        removed: the branches and blocks that are removed.

    Attributes:
        graph: the graph of the original, with projections in their places.
        gone: nodes that are no longer computed, or whose result is no longer needed.
        users: node -> the nodes that read its value, also through removed nodes.
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
        """The node that makes the value which readers of `name` receive."""
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
    """Where a value can be seen in the running model.

    Attributes:
        node: the node that holds it.
        call: the eager call that is given the value or returns it.
        argument: position of the value among the tensors given to the call; None: the call returns it.
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
        skip: position of the stream among the tensors given to the addition.
        end: the last node that is the contraction's own contribution.
    """

    affine: tuple[str, ...]
    addition: str
    skip: int
    end: str


def stream_of(wiring: Wiring, name: str, *, channels: int) -> Stream:
    """Follow a contraction's output, which has `channels` channels, to the addition where it joins the stream."""
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


class _Side(NamedTuple):
    """How a kernel moves along one spatial dimension.

    Attributes:
        taps: number of taps of the kernel.
        stride: distance from one position to the next.
        apart: distance from one tap to the next.
        padding: padding before and after the input.
        positions: number of positions of the output.
    """

    taps: int
    stride: int
    apart: int
    padding: tuple[int, int]
    positions: int


@dataclass(frozen=True)
class Unfolding:
    """Draws rows of the matrix that a contraction multiplies by its weights.

    Attributes:
        contraction: the contraction.
        node: its operator.
        limit: largest number of rows drawn from one batch.
    """

    contraction: Contraction
    node: Node
    limit: int

    @property
    def can_unfold(self) -> bool:
        """Whether this kind of contraction can be unfolded; transposed convolutions and single samples can't."""
        kind, place = self.contraction.kind, self.contraction.input_dim
        return kind == "linear" or (place == 1 and base_name(self.node.op) in ("conv1d", "conv2d", "conv3d"))

    @property
    def keeps_order(self) -> bool:
        """Whether the rows of the output are in the order of the rows of the input; an einsum may exchange them."""
        return self.can_unfold and self.contraction.paired

    def choose(self, x: Tensor, weight: Tensor, valid: Callable[[Tensor], Tensor | None], seed: int) -> Tensor:
        """Draw positions of a batch: all of them, or a random choice without repetition, in order.

        Args:
            x: the input.
            weight: the weight as the call receives it.
            valid: returns the flat positions that are not padding, for a tensor with its channels last; None: all are
                valid.
            seed: seed of the draw.
        """
        if self.contraction.kind == "linear":
            last = x.movedim(self.contraction.input_dim, -1)
            return self._draw(valid(last), last.numel() // max(1, last.shape[-1]), seed)
        return self._draw(None, len(x) * self._extent(x, weight), seed)

    def choose_outputs(self, y: Tensor, valid: Callable[[Tensor], Tensor | None], seed: int) -> Tensor:
        """Draw positions of a batch as `choose` does, from the output instead of the input."""
        last = y.movedim(self.contraction.output_dim, -1)
        counted = valid(last) if self.contraction.kind == "linear" else None
        return self._draw(counted, last.numel() // max(1, last.shape[-1]), seed)

    def _draw(self, counted: Tensor | None, count: int, seed: int) -> Tensor:
        """All `count` positions, or all those in `counted`; a random choice of them if they exceed the limit."""
        if counted is not None:
            count = len(counted)
        chosen = torch.arange(count)
        if count > self.limit:
            draw = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(count, generator=draw)[: self.limit].sort().values
        return chosen if counted is None else counted[chosen]

    def of(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """The rows at chosen positions, shape (parts, rows, columns); columns in the order of the flat weight."""
        rows = self.by_tap(x, weight, chosen)
        if self.contraction.kind == "linear":
            return rows
        apart = rows.reshape(*rows.shape[:2], prod(weight.shape[2:]), -1)
        return apart.transpose(2, 3).flatten(2)

    def by_tap(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """The same rows with the columns of each kernel tap side by side, which takes one copy less of all rows.

        Args:
            x: the input; for a contraction in one part, some of its channels suffice.
            weight: the weight as the call receives it.
            chosen: the drawn positions.
        """
        if self.contraction.kind == "linear":
            flat = x.movedim(self.contraction.input_dim, -1)
            return exact(flat.reshape(-1, flat.shape[-1])[chosen.to(x.device)]).unsqueeze(0)
        sides = self._sides(x, weight)
        padded = F.pad(
            x, [pad for side in reversed(sides) for pad in side.padding]
        )  # F.pad takes the last dimension first
        flat = padded.movedim(1, -1).reshape(-1, x.shape[1])  # one row per place, as whole rows are copied fast
        places = torch.unravel_index(chosen.to(x.device), (len(x), *(side.positions for side in sides)))
        first, taps = places[0], torch.zeros(1, dtype=torch.long, device=x.device)
        for side, extent, place in zip(sides, padded.shape[2:], places[1:], strict=True):
            first = first * extent + place * side.stride
            within = side.apart * torch.arange(side.taps, device=x.device)
            taps = (taps.unsqueeze(1) * extent + within).ravel()
        taken = exact(flat[(first.unsqueeze(1) + taps).ravel()])
        parts = max(1, x.shape[1] // weight.shape[1])
        return taken.reshape(len(chosen), len(taps), parts, -1).permute(2, 0, 1, 3).flatten(2)

    def _extent(self, x: Tensor, weight: Tensor) -> int:
        """Number of positions in the output for one sample of a convolution."""
        return prod(side.positions for side in self._sides(x, weight))

    def outputs(self, y: Tensor, chosen: Tensor) -> Tensor:
        """The outputs at the drawn positions, shape (rows, outputs)."""
        flat = y.movedim(self.contraction.output_dim, -1)
        return exact(flat.reshape(-1, flat.shape[-1])[chosen.to(y.device)])

    def matrix(self, weight: Tensor, parts: int) -> Tensor:
        """The weight as matrices, shape (parts, outputs of a part, columns)."""
        flat = weight.movedim(self.contraction.write_dim, 0)
        flat = flat if self.contraction.kind == "conv" else flat.reshape(len(flat), -1)
        return flat.reshape(parts, len(flat) // parts, -1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Matrices back in the shape of the weight."""
        first = like.movedim(self.contraction.write_dim, 0)
        return matrix.reshape(first.shape).movedim(0, self.contraction.write_dim)

    def _sides(self, x: Tensor, weight: Tensor) -> list["_Side"]:
        """How the kernel moves along each spatial dimension of the input."""
        given = arguments(self.node)
        kernel = weight.shape[2:]
        stride, dilation = (_each(given[name], len(kernel)) for name in ("stride", "dilation"))
        padding = _padding(given["padding"], kernel, dilation)
        sides = []
        for extent, taps, step, apart, pads in zip(x.shape[2:], kernel, stride, dilation, padding, strict=True):
            room = extent + sum(pads) - (taps - 1) * apart
            sides.append(_Side(taps, step, apart, pads, (room - 1) // step + 1))
        return sides


def _each(value: Any, count: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * count if len(values) == 1 else values


def _padding(given: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after each dimension."""
    if given == "same":
        totals = [apart * (size - 1) for size, apart in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in ([0] * len(kernel) if given == "valid" else _each(given, len(kernel)))]
