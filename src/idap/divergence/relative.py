"""The relative form (docs/method.md#relative): the relative change of the flow that removing a part would cause."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from idap.divergence.observe import is_result, result_of, tensors_in
from idap.divergence.ports import Stream, factor_in, stream_of
from idap.divergence.scene import Place, Scene, Scorer
from idap.divergence.watch import Argument, ChannelStats, SampleRatio
from idap.graph.ir import Graph, Node, Ref
from idap.graph.rules import Contraction
from idap.graph.rules.flow import arguments, base_name
from idap.linalg.moments import exact, sum_of_rows
from idap.structure.blocks import Block
from idap.structure.groups import Group, Port
from idap.structure.layout import count

WIDEST_UNIT = 512
"""Units with more slots than this (a channel flattened into many features) are measured slot by slot."""


def relative(scene: Scene) -> Scorer:
    """D_u = E‖V_u a_u‖² / E‖x‖², mean over the readers of the unit; for branches and blocks E‖F(x)‖² / E‖x‖²."""
    return RelativeScores(scene, centred=False)


def fluctuation(scene: Scene) -> Scorer:
    """The relative form of a_u - E a_u, since a constant can be moved into a bias."""
    return RelativeScores(scene, centred=True)


class RelativeScores:
    """Scores of the relative form, or of its fluctuation."""

    def __init__(self, scene: Scene, *, centred: bool) -> None:
        self._centred = centred
        self._readers = scene.once("readers", lambda: {group.name: _readers(scene, group) for group in scene.groups})
        self._ratios = block_ratios(scene)

    def units(self) -> Mapping[str, Tensor]:
        """Scores, as means over the readers that were seen."""
        found = {}
        for name, readers in self._readers.items():
            parts = [reader.scores(centred=self._centred) for reader in readers if reader.has_data]
            if parts:
                found[name] = torch.stack(parts).mean(0)
        return found

    def blocks(self) -> Mapping[str, float]:
        """Scores of the branches and blocks that were seen."""
        return {name: ratio.relative for name, ratio in self._ratios.items() if ratio.has_data}


def _readers(scene: Scene, group: Group) -> list["Reader"]:
    found = [reader_of(scene, group, port) for port in scene.alive(group.readers)]
    return [reader for reader in found if reader is not None]


def reader_of(scene: Scene, group: Group, port: Port) -> "Reader | None":
    """Watch what a contraction reads of a group and the stream it feeds; None if one opaque call hides them."""
    place = scene.place(port)
    weight, argument = place.weight(), place.input_at
    stats = scene.watch.channels(place.contraction.input, place.contraction.input_dim, reader=place.reads, means=True)
    flow = flow_behind(place)
    if weight is None or argument is None or stats is None or flow.energy is None:
        return None
    units = scene.units_in(place.input_dim, group)
    order = _by_unit(units) if place.contraction.groups == 1 else None
    reader = Reader(place, units, group.size, stats, weight, flow, order)
    if order is not None and place.node.call is not None:
        scene.watch.at(place.node.call, reader.look)
        scene.watch.sums(reader.sums)
    return reader


@dataclass(frozen=True)
class FlowBehind:
    """Where the output of a contraction enters the flow.

    Attributes:
        stream: the norms and factors on the way, and the addition.
        energy: energy of the stream that the output is added to, or of the output itself if there is no stream.
        channels: number of channels of the contraction's output that are present.
    """

    stream: Stream
    energy: ChannelStats | None
    channels: int

    @property
    def mean_square(self) -> float:
        """E‖x‖² of the flow at one position."""
        assert self.energy is not None
        return max(self.energy.energy(self.channels), 1e-30)

    def scale(self, scene: Scene) -> Tensor | None:
        """The factor that the norms behind the contraction give each output channel, shape (O,); None: 1."""
        total = None
        for name in self.stream.affine:
            scale = affine_scale(scene.structure.graph.nodes[name], scene.structure.graph, scene.tensors)
            total = scale if total is None else total * scale
        return None if total is None else total.expand(self.channels)


def flow_behind(place: Place) -> FlowBehind:
    """Find and watch the flow that a contraction feeds."""
    scene = place.scene
    stream = stream_of(scene.wiring, place.port.node, channels=place.output_dim.shape[1])
    if stream.addition:
        node = list(scene.structure.graph.nodes[stream.addition].inputs())[stream.skip]
        energy = scene.watch.energy(node)
    else:
        energy = scene.watch.energy(stream.end) if is_result(scene.structure.graph, stream.end) else None
    return FlowBehind(stream, energy, count(place.output_dim, scene.present))


class Reader:
    """Second moments of the units that one contraction reads, and the energy of the flow that it feeds.

    It holds O(channels) sums, and O(channels x slots of a unit) for units of several slots.
    """

    def __init__(
        self,
        place: Place,
        units: Tensor,
        size: int,
        stats: ChannelStats,
        weight: Argument,
        flow: FlowBehind,
        order: Tensor | None,
    ) -> None:
        self._place, self._units, self._size = place, units, size
        self._stats, self._weight, self._flow, self._order = stats, weight, flow, order
        self.sums: dict[str, Tensor] = {}

    @property
    def has_data(self) -> bool:
        """Whether any data were seen."""
        return self._stats.has_data and self._flow.energy is not None and self._flow.energy.has_data

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add up the second moments of units of several slots."""
        assert self._order is not None and self._place.input_at is not None
        x = tensors_in(args, kwargs)[self._place.input_at].detach().movedim(self._place.contraction.input_dim, -1)
        x = x if x.dtype == torch.float64 else x.float()
        x = _group_slots(self._place.scene.watch.mask_padding(x).reshape(-1, x.shape[-1]), self._order)
        parts = x.transpose(0, 1)  # (U, rows, w)
        added = (parts.transpose(1, 2) @ parts).double()
        self.sums["moments"] = self.sums["moments"] + added if "moments" in self.sums else added

    def scores(self, *, centred: bool) -> Tensor:
        """E‖V_u a_u‖² / E‖x‖² of each unit, shape (size,); units that the model no longer has get 0."""
        found = torch.zeros(self._size, dtype=torch.float64)
        mean = self._stats.mean
        if self._order is not None:
            moments = self.sums["moments"].cpu() / self._stats.sums["positions"]
            if centred:
                moments = moments - mean[self._order].unsqueeze(2) * mean[self._order].unsqueeze(1)
            found[self._units[self._order[:, 0]]] = (self._weight_products * moments).sum((1, 2))
        else:
            moments = self._stats.square - (mean.square() if centred else 0)
            mine = self._units >= 0
            found.index_add_(0, self._units[mine], (moments * self._weight_products)[mine])
        return found.clamp_min(0) / self._flow.mean_square

    @cached_property
    def _weight_products(self) -> Tensor:
        """V_uᵀ V_u of each unit, (U, w, w), if units have several slots; else ‖V_i‖² of each input channel, (I,)."""
        assert self._weight.value is not None
        contraction = self._place.contraction
        weight = exact(self._weight.value.detach()).cpu()
        scale = self._flow.scale(self._place.scene)
        weight = scale_outputs(weight, contraction, None if scale is None else scale.to(weight.dtype))
        if self._order is None:
            return squared_norms(weight, contraction, self._stats.square.numel())
        rows = weight.movedim(contraction.read_dim, -1).flatten(0, -2)  # (O x taps, I)
        parts = _group_slots(rows, self._order).transpose(0, 1).double()
        return parts.transpose(1, 2) @ parts


def _group_slots(rows: Tensor, order: Tensor) -> Tensor:
    """Rows of shape (rows, slots) by unit, shape (rows, units, slots of a unit)."""
    flat = order.ravel()
    if len(flat) != rows.shape[1] or not torch.equal(flat, torch.arange(len(flat))):
        rows = rows[:, flat.to(rows.device)]
    return rows.reshape(len(rows), *order.shape)


def block_ratios(scene: Scene) -> dict[str, SampleRatio]:
    """Watch what each branch adds to the stream and how much each block changes it, as far as they can be seen."""
    return scene.once("block ratios", lambda: _block_ratios(scene))


def _block_ratios(scene: Scene) -> dict[str, SampleRatio]:
    found = {}
    for block in scene.blocks:
        ratio = _branch(scene, block) if block.kind == "branch" else _block(scene, block)
        if ratio is not None:
            found[block.name] = ratio
            scene.watch.sums(ratio.sums)
    return found


def _branch(scene: Scene, block: Block) -> SampleRatio | None:
    node = scene.structure.graph.nodes[block.addition]
    operands = [name for name in node.inputs() if scene.wiring.source(name) != scene.wiring.source(block.branch)]
    branch = scene.watch.energy(block.branch)
    stream = scene.watch.energy(operands[0]) if len(operands) == 1 else None
    if node.call is None or branch is None or stream is None:
        return None
    ratio = SampleRatio()

    def compare(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        assert branch is not None and stream is not None
        if branch.latest is not None and stream.latest is not None:
            ratio.add(branch.latest, stream.latest)

    scene.watch.at(node.call, compare)
    return ratio


def _block(scene: Scene, block: Block) -> SampleRatio | None:
    """Watch the change of a block: its output minus its input."""
    graph = scene.structure.graph
    entry, leave = scene.wiring.sight(block.entry), graph.nodes[block.exit]
    if entry is None or leave.call is None or not is_result(graph, block.exit):
        return None
    ratio, held = SampleRatio(), list[Tensor | None]()

    def compare(result: Any) -> None:
        value = result_of(graph, block.exit, result)
        before = held.pop() if held else None
        if value is not None and before is not None:
            counted = scene.watch.mask_padding
            ratio.add(_sample_energy(counted(value.detach() - before)), _sample_energy(counted(before)))

    # No copy is needed: a block that overwrites the stream it is given can't be removed, so it is not in the scene.
    place = entry.argument
    if place is None:
        scene.watch.result(entry.call, lambda result: held.append(result_of(graph, entry.node, result)))
    else:
        scene.watch.at(entry.call, lambda args, kwargs: held.append(tensors_in(args, kwargs)[place].detach()))
    scene.watch.result(leave.call, compare)
    return ratio


def _sample_energy(x: Tensor) -> Tensor:
    """Squared norm of each sample."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=exact)
    return norms.square()


def affine_scale(node: Node, graph: Graph, tensors: Mapping[str, Tensor]) -> Tensor:
    """The number by which a batch norm in evaluation, or a multiplication, scales each channel; shape (C,) or (1,).

    A batch norm scales by weight / sqrt(running variance + eps).
    """

    def tensor_of(value: Any) -> Tensor:
        return tensors[graph.nodes[value.name].target].detach().double().cpu().ravel()

    if base_name(node.op) == "mul":
        factor = factor_in(graph, node)
        return tensor_of(factor) if isinstance(factor, Ref) else torch.tensor([float(factor)], dtype=torch.float64)
    given = arguments(node)
    scale = (tensor_of(given["running_var"]) + float(given["eps"])).rsqrt()
    return scale if given["weight"] is None else scale * tensor_of(given["weight"])


def _by_unit(units: Tensor) -> Tensor | None:
    """Slots ordered by unit, shape (units, slots of a unit).

    None if units have one slot each, too many slots, or different numbers of slots.
    """
    mine = torch.nonzero(units >= 0).ravel()
    counts = torch.bincount(units[mine])
    counts = counts[counts > 0]
    width = int(counts[0]) if len(counts) else 0
    if width <= 1 or width > WIDEST_UNIT or bool((counts != width).any()):
        return None
    return mine[units[mine].argsort(stable=True)].reshape(-1, width)


def scale_outputs(weight: Tensor, contraction: Contraction, scale: Tensor | None) -> Tensor:
    """The weight with each output channel multiplied by a factor."""
    if scale is None:
        return weight
    write = contraction.write_dim
    parts = len(scale) // weight.shape[write]
    if parts > 1:  # a grouped transposed convolution, (I, O / parts, ...): each part of its inputs has its own outputs
        by_input = scale.reshape(parts, -1).repeat_interleave(len(weight) // parts, 0)
        return weight * by_input.reshape([*by_input.shape, *[1] * (weight.dim() - 2)])
    return weight * scale.reshape([-1 if dim == write else 1 for dim in range(weight.dim())])


def squared_norms(weight: Tensor, contraction: Contraction, channels: int) -> Tensor:
    """‖V_i‖² of each input channel i, over output channels and kernel taps; shape (I,), float64."""
    squared = weight.square().movedim((contraction.write_dim, contraction.read_dim), (0, 1))
    squared = squared.flatten(2).sum(2) if weight.dim() > 2 else squared  # over the taps
    parts = channels // squared.shape[1]  # of a grouped convolution; fewer than were traced, if some were cut
    return sum_of_rows(squared.reshape(parts, -1, squared.shape[1])).ravel()
