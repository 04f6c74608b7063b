"""The paper's forms (docs/method.md#paper, D2 to D8): activation times weight, and the activation alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from idap.divergence.ports import activation_of
from idap.divergence.relative import block_ratios
from idap.divergence.scene import Scene, Scorer
from idap.divergence.watch import Argument, ChannelStats, UnitNorms
from idap.structure.groups import Group, Port
from idap.structure.layout import slots


def paper(scene: Scene) -> Scorer:
    """D7 for channels and neurons, D4 for heads, summed over the layers that write them; D6 and D1b for blocks.

    The divergences of the heads and neurons of a transformer block add up to that of the block (D5, see
    `Divergence.inside`).
    """
    return PaperScores(scene)


def share(scene: Scene) -> Scorer:
    """D8: the paper's divergence as a share of the sum over the group, or over all branches and blocks."""
    return ShareScores(scene)


def activation(scene: Scene) -> Scorer:
    """Root mean square of a unit's activation, mean over the layers that write it."""
    return ActivationScores(scene)


class PaperScores:
    """Scores of the paper's forms."""

    def __init__(self, scene: Scene) -> None:
        self._writers = scene.once("writers", lambda: _all_writers(scene))
        self._ratios = block_ratios(scene)

    def units(self) -> Mapping[str, Tensor]:
        """Scores, summed over the writing layers that were seen."""
        found = {}
        for name, writers in self._writers.items():
            parts = [writer.scores() for writer in writers if writer.has_data]
            if parts:
                found[name] = torch.stack(parts).sum(0)
        return found

    def blocks(self) -> Mapping[str, float]:
        """Scores of the branches and blocks that were seen."""
        return {name: ratio.paper for name, ratio in self._ratios.items() if ratio.has_data}


class ShareScores:
    """Scores of the paper's forms, as shares."""

    def __init__(self, scene: Scene) -> None:
        self._paper = PaperScores(scene)

    def units(self) -> Mapping[str, Tensor]:
        """Share of each unit in its group."""
        return {name: scores / scores.sum().clamp_min(1e-30) for name, scores in self._paper.units().items()}

    def blocks(self) -> Mapping[str, float]:
        """Share of each branch or block in the sum over all of them."""
        found = self._paper.blocks()
        total = max(sum(found.values()), 1e-30)
        return {name: score / total for name, score in found.items()}


class ActivationScores:
    """Root mean squares of the activations of units."""

    def __init__(self, scene: Scene) -> None:
        self._parts: dict[str, list[tuple[Tensor, ChannelStats]]] = {group.name: [] for group in scene.groups}
        self._sizes = {group.name: group.size for group in scene.groups}
        for group in scene.groups:
            heads = group.kind == "heads"  # the output of a head is what its projection reads
            for port in scene.alive(group.readers if heads else group.writers):
                place = scene.place(port)
                dim = place.contraction.input_dim if heads else place.contraction.output_dim
                node = place.contraction.input if heads else activation_of(scene.wiring, port.node)
                stats = scene.watch.channels(node, dim, reader=place.reads if heads else (None, None))
                if stats is not None:
                    units = scene.units_in(place.input_dim if heads else place.output_dim, group)
                    self._parts[group.name].append((units, stats))

    def units(self) -> Mapping[str, Tensor]:
        """Scores, as means over the writing layers that were seen."""
        found = {}
        for name, parts in self._parts.items():
            size = self._sizes[name]
            rows = [
                by_unit(stats.square, units, size) / by_unit(torch.ones_like(stats.square), units, size).clamp_min(1)
                for units, stats in parts
                if stats.has_data
            ]
            if rows:
                found[name] = torch.stack(rows).mean(0).sqrt()
        return found

    def blocks(self) -> None:
        """None: the criterion scores no blocks."""


@dataclass(frozen=True)
class _Writer:
    """D7 for the units that one layer writes: E‖A_u‖ ‖W_u‖ over channels times positions."""

    units: Tensor
    size: int
    write_dim: int
    weight: Argument
    norms: UnitNorms
    stats: ChannelStats

    @property
    def has_data(self) -> bool:
        return self.stats.has_data and self.weight.value is not None

    def scores(self) -> Tensor:
        assert self.weight.value is not None
        weight = self.weight.value.double().cpu().movedim(self.write_dim, 0)
        parts = len(self.units) // len(weight)  # more than one: a grouped transposed convolution, (O / parts, I, ...)
        by_slot = weight.square().reshape(len(weight), parts, -1).sum(2).T.ravel()
        squared = by_unit(by_slot, self.units, self.size)
        return self.norms.sums["norms"] / self.stats.samples * squared.sqrt()


@dataclass(frozen=True)
class _Heads:
    """D4: ‖A^h‖_F (‖W_Q^h‖ + ‖W_K^h‖ + ‖W_V^h‖) / n for the heads that one output projection reads."""

    weights: Tensor
    norms: UnitNorms
    stats: ChannelStats

    @property
    def has_data(self) -> bool:
        return self.stats.has_data

    def scores(self) -> Tensor:
        return self.norms.sums["norms"] / self.stats.samples * self.weights


def _all_writers(scene: Scene) -> "dict[str, list[_Writer | _Heads]]":
    return {group.name: _writers(scene, group) for group in scene.groups}


def _writers(scene: Scene, group: Group) -> "list[_Writer | _Heads]":
    heads = group.kind == "heads"
    found = [
        _heads(scene, group, port) if heads else _writer(scene, group, port)
        for port in scene.alive(group.readers if heads else group.writers)
    ]
    return [writer for writer in found if writer is not None]


def _writer(scene: Scene, group: Group, port: Port) -> "_Writer | None":
    place = scene.place(port)
    weight = place.weight()
    stats = scene.watch.channels(activation_of(scene.wiring, port.node), place.contraction.output_dim)
    if weight is None or stats is None:
        return None
    units = scene.units_in(place.output_dim, group)
    norms = scene.watch.norms(stats, units, group.size, per_channel=True)
    return _Writer(units, group.size, place.contraction.write_dim, weight, norms, stats)


def _heads(scene: Scene, group: Group, port: Port) -> "_Heads | None":
    place = scene.place(port)
    writers = [writer for writer in scene.alive(group.writers) if writer.weight]
    stats = scene.watch.channels(place.contraction.input, place.contraction.input_dim, reader=place.reads)
    if stats is None or not writers:
        return None
    original = torch.from_numpy(scene.structure.layout.units(place.input_dim, group.index))
    width = int((original == 0).sum())
    weights = torch.stack([_norms(scene, group, writer, width) for writer in writers]).sum(0)
    norms = scene.watch.norms(stats, scene.units_in(place.input_dim, group), group.size, per_channel=False)
    return _Heads(weights, norms, stats)


def _norms(scene: Scene, group: Group, port: Port, width: int) -> Tensor:
    """Sum of the norms of each head's query, key and value rows that one projection writes, shape (heads,)."""
    place = scene.place(port)
    units = torch.from_numpy(scene.structure.layout.units(place.weight_dim, group.index))
    starts = _run_starts(units, width)
    runs = (starts.cumsum(0) - 1)[torch.from_numpy(slots(place.weight_dim, scene.present))]
    weight = scene.tensors[port.weight].detach().double().cpu()
    rows = weight.movedim(place.contraction.write_dim, 0).flatten(1)
    squared = torch.zeros(int(starts.sum()), dtype=torch.float64).index_add_(0, runs, rows.square().sum(1))
    return by_unit(squared.sqrt(), units[starts], group.size)


def _run_starts(units: Tensor, width: int) -> Tensor:
    """Where the rows of a head's query, key or value begin in a projection of the original; shape (rows,).

    A fused projection either holds all queries, then all keys, then all values, so that each head has three runs of
    rows; or it holds query, key and value of one head after another, so that the run of a head is two or three heads
    wide.
    """
    places = torch.arange(len(units))
    starts = torch.ones(len(units), dtype=torch.bool)
    starts[1:] = units[1:] != units[:-1]
    within = places - places[starts][starts.cumsum(0) - 1]
    of_first = units == 0
    if int(of_first.sum()) in (2 * width, 3 * width) and int((starts & of_first).sum()) == 1:
        starts |= within % width == 0
    return starts


def by_unit(values: Tensor, units: Tensor, size: int) -> Tensor:
    """Sum of the values of each unit's slots, shape (size,)."""
    mine = units >= 0
    return values.new_zeros(size).index_add_(0, units[mine], values[mine])
