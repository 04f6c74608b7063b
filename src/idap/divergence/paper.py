"""The paper's forms (method.md 2.1, D2 to D7): activation times weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from idap.divergence.observe import After, Before, is_result, result_of, tensor_argument, tensors_in
from idap.divergence.ports import Wiring, activation_of
from idap.graph.ir import CallKey
from idap.structure.analysis import Structure
from idap.structure.groups import Group, Port
from idap.structure.layout import Presence, slots


class WriterProbe:
    """D7 for the units that one layer writes: E‖A_u‖ ‖W_u‖ over channels times positions.

    Args:
        structure: of the original model.
        present: labels that the model still has.
        group: whose units are measured.
        port: where they are written.
        wiring: of what the model still has.
    """

    def __init__(self, structure: Structure, present: Presence, group: Group, port: Port, wiring: Wiring) -> None:
        graph, layout = structure.graph, structure.layout
        self._graph = graph
        contraction = layout.contractions[port.contraction]
        self._contraction = contraction
        write = layout.dims[contraction.weight][0][contraction.write_dim]
        self._units = torch.from_numpy(layout.units(write, group.index)[slots(write, present)])
        self._size = group.size
        self._node = graph.nodes[port.node]
        self._end = activation_of(wiring, port.node)
        self._weight_at = tensor_argument(graph, port.node, contraction.weight)
        self._weight: Tensor | None = None
        self._norms = torch.zeros(group.size, dtype=torch.float64)
        self._samples = 0

    @property
    def observable(self) -> bool:
        """Whether the layer is a call of its own."""
        return self._weight_at is not None and is_result(self._graph, self._end)

    @property
    def seen(self) -> bool:
        """Whether anything went by."""
        return self._samples > 0

    def before(self) -> Mapping[CallKey, Before]:
        """See the weight."""
        assert self._node.call is not None
        return {self._node.call: self._see_weight}

    def after(self) -> Mapping[CallKey, After]:
        """See the activation."""
        call = self._graph.nodes[self._end].call
        assert call is not None
        return {call: self._see_activation}

    def scores(self) -> Tensor:
        """D7 of each unit, shape (group.size,); units that the model no longer has get 0."""
        assert self._weight is not None
        weight = self._weight.detach().double().cpu().movedim(self._contraction.write_dim, 0).flatten(1)
        squared = _by_unit(weight.square().sum(1), self._units, self._size)
        return self._norms / max(1, self._samples) * squared.sqrt()

    def _see_weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._weight_at is not None
        self._weight = tensors_in(args, kwargs)[self._weight_at]

    def _see_activation(self, result: Any) -> None:
        value = result_of(self._graph, self._end, result)
        if value is None:
            return
        a = value.detach().float().movedim(self._contraction.output_dim, 1)
        a = a.reshape(len(a), a.shape[1], -1)  # (B, C, positions)
        squared = a.square().sum(2, dtype=torch.float64).cpu()  # (B, C)
        mine = self._units >= 0
        summed = squared.new_zeros(len(a), self._size).index_add_(1, self._units[mine], squared[:, mine])
        self._norms += summed.sqrt().sum(0) / (a.shape[1] * a.shape[2])
        self._samples += len(a)


class HeadProbe:
    """D4: ‖A^h‖_F (‖W_Q^h‖ + ‖W_K^h‖ + ‖W_V^h‖) / n for the heads that one output projection reads.

    Args:
        structure: of the original model.
        present: labels that the model still has.
        group: the heads.
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
        layout = structure.layout
        self._contraction = layout.contractions[port.contraction]
        read = layout.dims[self._contraction.input][0][self._contraction.input_dim]
        original = torch.from_numpy(layout.units(read, group.index))
        self._units = original[torch.from_numpy(slots(read, present))]
        self._size = group.size
        self._node = structure.graph.nodes[port.node]
        self._input = tensor_argument(structure.graph, port.node, self._contraction.input)
        writers = [port for port in group.writers if port.weight and port.node not in wiring.gone]
        width = int((original == 0).sum())
        self._weights = [_norms(structure, present, group, writer, tensors, width) for writer in writers]
        self._norms = torch.zeros(group.size, dtype=torch.float64)
        self._samples = 0

    @property
    def observable(self) -> bool:
        """Whether the projection is a call of its own, and weights that are not computed write the heads."""
        return self._input is not None and bool(self._weights)

    @property
    def seen(self) -> bool:
        """Whether anything went by."""
        return self._samples > 0

    def before(self) -> Mapping[CallKey, Before]:
        """See what the projection reads."""
        assert self._node.call is not None
        return {self._node.call: self._read}

    def after(self) -> Mapping[CallKey, After]:
        """Nothing."""
        return {}

    def scores(self) -> Tensor:
        """D4 of each head, shape (group.size,); heads that the model no longer has get 0."""
        return self._norms / max(1, self._samples) * torch.stack(self._weights).sum(0)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._input is not None
        x = tensors_in(args, kwargs)[self._input].detach().float()
        x = x.movedim(self._contraction.input_dim, 1)
        x = x.reshape(len(x), x.shape[1], -1)  # (B, heads x width, tokens)
        squared = x.square().sum(2, dtype=torch.float64).cpu()
        mine = self._units >= 0
        summed = squared.new_zeros(len(x), self._size).index_add_(1, self._units[mine], squared[:, mine])
        self._norms += summed.sqrt().sum(0) / x.shape[2]
        self._samples += len(x)


def _norms(
    structure: Structure, present: Presence, group: Group, port: Port, tensors: Mapping[str, Tensor], width: int
) -> Tensor:
    """Norms of the rows of each head's query, key and value, as far as one projection writes them, summed; (heads,)."""
    contraction = structure.layout.contractions[port.contraction]
    write = structure.layout.dims[contraction.weight][0][contraction.write_dim]
    units = torch.from_numpy(structure.layout.units(write, group.index))
    starts = _run_starts(units, width)
    runs = (starts.cumsum(0) - 1)[torch.from_numpy(slots(write, present))]
    rows = tensors[port.weight].detach().double().cpu().movedim(contraction.write_dim, 0).flatten(1)
    squared = torch.zeros(int(starts.sum()), dtype=torch.float64).index_add_(0, runs, rows.square().sum(1))
    return _by_unit(squared.sqrt(), units[starts], group.size)


def _run_starts(units: Tensor, width: int) -> Tensor:
    """Where the rows of a head's query, key or value begin in a projection of the original; shape (rows,).

    A fused projection holds all queries, then all keys, then all values, so that each head has three runs of rows; or
    it holds query, key and value of one head after another, so that the run of a head is two or three heads wide.
    """
    places = torch.arange(len(units))
    starts = torch.ones(len(units), dtype=torch.bool)
    starts[1:] = units[1:] != units[:-1]
    within = places - places[starts][starts.cumsum(0) - 1]
    of_first = units == 0
    if int(of_first.sum()) in (2 * width, 3 * width) and int((starts & of_first).sum()) == 1:
        starts |= within % width == 0
    return starts


def _by_unit(values: Tensor, units: Tensor, size: int) -> Tensor:
    mine = units >= 0
    return values.new_zeros(size).index_add_(0, units[mine], values[mine])
