"""The relative form (method.md 2.2): the relative change of the flow that removing a part would cause."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from idap.divergence.observe import After, Before, Energy, is_result, result_of, tensor_argument, tensors_in
from idap.divergence.ports import Wiring, factor_in, stream_of
from idap.graph.ir import CallKey, Graph, Node, Ref
from idap.graph.rules import Contraction
from idap.graph.rules.flow import arguments, base_name
from idap.structure.analysis import Structure
from idap.structure.blocks import Block
from idap.structure.groups import Group, Port
from idap.structure.layout import Presence, count, slots

WIDEST_UNIT = 512
"""Units with more slots than this (a channel flattened into many features) are measured slot by slot."""


class ReaderProbe:
    """Second moments of the units that one contraction reads, and the energy of the stream that it feeds.

    Sums O(channels) numbers, for units of several slots O(channels x slots of a unit).

    Args:
        structure: of the original model.
        present: labels that the model still has.
        group: whose units are measured.
        port: where they are read.
        wiring: of what the model still has.
        tensors: parameters and buffers of the model that is run, by canonical name.
    """

    def __init__(
        self,
        structure: Structure,
        present: Presence,
        group: Group,
        port: Port,
        wiring: Wiring,
        tensors: Mapping[str, Tensor],
    ) -> None:
        graph, layout = structure.graph, structure.layout
        self._graph = graph
        self._tensors = tensors
        self._contraction = layout.contractions[port.contraction]
        read = layout.dims[self._contraction.input][0][self._contraction.input_dim]
        written = layout.dims[port.node][0][self._contraction.output_dim]
        self._units = torch.from_numpy(layout.units(read, group.index)[slots(read, present)])
        self._channels = count(written, present)
        self._size = group.size
        self._node = graph.nodes[port.node]
        self._stream = stream_of(wiring, port.node, channels=written.shape[1])
        self._input = tensor_argument(graph, port.node, self._contraction.input)
        self._weight_at = tensor_argument(graph, port.node, self._contraction.weight)
        self._order = _by_unit(self._units) if self._contraction.groups == 1 else None
        self._moments: Tensor | None = None
        self._count = 0
        self._weight: Tensor | None = None
        self._energy = Energy()

    @property
    def observable(self) -> bool:
        """Whether the contraction is a call of its own, and what it feeds can be seen."""
        ends = bool(self._stream.addition) or is_result(self._graph, self._stream.end)
        return self._input is not None and self._weight_at is not None and ends

    @property
    def seen(self) -> bool:
        """Whether anything went by."""
        return self._count > 0 and self._energy.seen

    def before(self) -> Mapping[CallKey, Before]:
        """See what is read, and the stream at the addition."""
        assert self._node.call is not None
        looks: dict[CallKey, Before] = {self._node.call: self._read}
        if self._stream.addition:
            call = self._graph.nodes[self._stream.addition].call
            assert call is not None
            looks[call] = self._see_stream
        return looks

    def after(self) -> Mapping[CallKey, After]:
        """See the contraction's own output where it is added to nothing."""
        call = self._graph.nodes[self._stream.end].call
        if self._stream.addition or call is None:
            return {}
        return {call: self._see_output}

    def scores(self) -> Tensor:
        """E‖V_u a_u‖² / E‖x‖² of each unit, shape (group.size,); units that the model no longer has get 0."""
        assert self._moments is not None and self._weight is not None
        weight = _scaled(self._weight.detach().double().cpu(), self._contraction, self._scale())
        moments = (self._moments / max(1, self._count)).cpu()
        found = torch.zeros(self._size, dtype=torch.float64)
        mine = self._units >= 0
        if self._order is not None:
            rows = weight.movedim(self._contraction.read_dim, -1).flatten(0, -2)  # (O x taps, I)
            parts = rows[:, self._order.ravel()].reshape(len(rows), *self._order.shape)  # (O x taps, U, w)
            energy = torch.einsum("ouw,uwv,ouv->u", parts, moments, parts)
            found[self._units[self._order[:, 0]]] = energy
        else:
            energy = moments * _squared_norms(weight, self._contraction, len(moments))
            found.index_add_(0, self._units[mine], energy[mine])
        return found / max(self._energy.mean, 1e-30)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._input is not None and self._weight_at is not None
        given = tensors_in(args, kwargs)
        self._weight = given[self._weight_at]
        x = given[self._input].detach()
        x = x.movedim(self._contraction.input_dim, -1).reshape(-1, x.shape[self._contraction.input_dim]).float()
        if self._order is None:
            added = x.square().sum(0, dtype=torch.float64)
        else:
            parts = x[:, self._order.ravel().to(x.device)].reshape(len(x), *self._order.shape).permute(1, 2, 0)
            added = (parts @ parts.transpose(1, 2)).double()
        self._moments = added if self._moments is None else self._moments + added
        self._count += len(x)

    def _see_stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._energy.add(tensors_in(args, kwargs)[self._stream.skip].detach(), self._channels)

    def _see_output(self, result: Any) -> None:
        value = result_of(self._graph, self._stream.end, result)
        if value is not None:
            self._energy.add(value.detach(), self._channels)

    def _scale(self) -> Tensor | None:
        """The factor that the norms behind the contraction give each output channel, shape (O,); None: 1."""
        total = None
        for name in self._stream.affine:
            scale = affine_scale(self._graph.nodes[name], self._graph, self._tensors)
            total = scale if total is None else total * scale
        return None if total is None else total.expand(self._channels)


class BranchProbe:
    """D6 squared: energy of what a branch adds over that of the stream it is added to; and D6 itself."""

    def __init__(self, graph: Graph, addition: str, branch: str) -> None:
        self._call = graph.nodes[addition].call
        operand = tensor_argument(graph, addition, branch)
        self.observable = self._call is not None and operand is not None
        self._branch = operand or 0
        self._added = 0.0
        self._stream = 0.0
        self._ratios = 0.0
        self._samples = 0

    def before(self) -> Mapping[CallKey, Before]:
        """See both operands of the addition."""
        assert self._call is not None
        return {self._call: self._see}

    def after(self) -> Mapping[CallKey, After]:
        """Nothing."""
        return {}

    def _see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tensors_in(args, kwargs)
        self.note(given[self._branch], given[1 - self._branch])

    def note(self, change: Tensor, stream: Tensor) -> None:
        """Add a batch: what removing the part would change, and the stream before it."""
        changed = change.detach().float().flatten(1).square().sum(1).double()
        whole = stream.detach().float().flatten(1).square().sum(1).double()
        self._added += float(changed.sum())
        self._stream += float(whole.sum())
        self._ratios += float((changed.sqrt() / (whole.sqrt() + 1e-6)).sum())
        self._samples += len(changed)

    @property
    def seen(self) -> bool:
        """Whether anything went by."""
        return self._samples > 0

    @property
    def relative(self) -> float:
        """E‖F(x)‖² / E‖x‖²."""
        return self._added / max(self._stream, 1e-30)

    @property
    def paper(self) -> float:
        """E[‖F(x)‖ / (‖x‖ + ε)] (D6; for blocks D1b)."""
        return self._ratios / max(1, self._samples)


class BlockProbe(BranchProbe):
    """The same for a whole block: its change is its output less its input."""

    def __init__(self, wiring: Wiring, block: Block) -> None:
        super().__init__(wiring.graph, block.exit, block.exit)
        self._graph, self._exit = wiring.graph, wiring.graph.nodes[block.exit]
        self._entry = wiring.sight(block.entry)
        self.observable = self._entry is not None and is_result(self._graph, block.exit)
        self._before: Tensor | None = None

    def before(self) -> Mapping[CallKey, Before]:
        """See the stream before the block where it is given to a call."""
        assert self._entry is not None
        place = self._entry.argument
        if place is None:
            return {}
        return {self._entry.call: lambda args, kwargs: self._remember(tensors_in(args, kwargs)[place])}

    def after(self) -> Mapping[CallKey, After]:
        """See the stream before the block where a call returns it, and behind the block."""
        entry = self._entry
        assert entry is not None and self._exit.call is not None
        found: dict[CallKey, After] = {self._exit.call: self._compare}
        if entry.argument is None:
            found[entry.call] = lambda result: self._remember(result_of(self._graph, entry.node, result))
        return found

    def _remember(self, stream: Tensor | None) -> None:
        # No copy: a block that overwrote the stream it is given could not be removed, and is not offered.
        self._before = stream.detach() if stream is not None else None

    def _compare(self, result: Any) -> None:
        value = result_of(self._graph, self._exit.name, result)
        if value is not None and self._before is not None:
            self.note(value - self._before, self._before)
        self._before = None


def affine_scale(node: Node, graph: Graph, tensors: Mapping[str, Tensor]) -> Tensor:
    """What an evaluated batch norm or a factor multiplies each channel by, shape (C,) or (1,).

    A batch norm multiplies by weight / sqrt(running variance + eps).
    """

    def held(value: Any) -> Tensor:
        return tensors[graph.nodes[value.name].target].detach().double().cpu().ravel()

    if base_name(node.op) == "mul":
        factor = factor_in(graph, node)
        return held(factor) if isinstance(factor, Ref) else torch.tensor([float(factor)], dtype=torch.float64)
    given = arguments(node)
    scale = (held(given["running_var"]) + float(given["eps"])).rsqrt()
    return scale if given["weight"] is None else scale * held(given["weight"])


def _by_unit(units: Tensor) -> Tensor | None:
    """Slots ordered by unit, shape (units, slots of a unit); None where units have one slot, too many, or unequally."""
    mine = torch.nonzero(units >= 0).ravel()
    counts = torch.bincount(units[mine])
    counts = counts[counts > 0]
    width = int(counts[0]) if len(counts) else 0
    if width <= 1 or width > WIDEST_UNIT or bool((counts != width).any()):
        return None
    return mine[units[mine].argsort(stable=True)].reshape(-1, width)


def _scaled(weight: Tensor, contraction: Contraction, scale: Tensor | None) -> Tensor:
    """The weight with each output channel multiplied by a factor."""
    if scale is None:
        return weight
    return weight * scale.reshape([-1 if dim == contraction.write_dim else 1 for dim in range(weight.dim())])


def _squared_norms(weight: Tensor, contraction: Contraction, channels: int) -> Tensor:
    """‖V_i‖² of each input channel i, over output channels and kernel taps; shape (I,)."""
    squared = weight.square().movedim((contraction.read_dim, contraction.write_dim), (0, 1))  # (I, O, ...)
    parts = channels // len(squared)  # of a grouped convolution; fewer than were traced, if some were cut
    return squared.reshape(len(squared), parts, -1).sum(2).T.ravel()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])
