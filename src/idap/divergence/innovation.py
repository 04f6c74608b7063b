"""The innovation form (method.md 2.3): the flow of a unit that the other units cannot replace.

With H the centred second moments of what a consumer reads, removing unit u and refitting the consumer costs
tr(V_u (H⁻¹_uu)⁻¹ V_uᵀ), the optimal-brain-surgeon error. Units are eliminated one after another, the cheapest first,
and a unit's score is the cost accumulated when it goes, as a share of the energy of the flow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from idap.divergence.gram import Gram, Rows
from idap.divergence.jobs import Job
from idap.divergence.observe import Probe, tensors_in
from idap.divergence.relative import FlowBehind, flow_behind, scaled
from idap.divergence.scene import Place, Scene, Scorer
from idap.divergence.watch import Look
from idap.errors import StructureError
from idap.structure.groups import Group
from idap.structure.layout import count

ROWS, PER_SAMPLE = 8192, 32
"""Most rows drawn from one batch, and from one sample."""

DAMPING = 1e-3
"""Least ridge, as a share of the mean variance of a column; more where there are few rows for the columns."""

STEPS = 96
"""A group is eliminated in at most about so many steps; a wide one several units at a time."""

COMPACT = 0.8
"""Columns that are gone are dropped from the matrices once less than this share of them is left."""


def innovation(scene: Scene) -> Scorer:
    """Accumulated cost of eliminating units when the layers that read them are refitted, over E‖x‖² of the stream."""
    return InnovationScores(scene)


class InnovationScores:
    """Scores by elimination; one job per group, since second moments take memory."""

    def __init__(self, scene: Scene) -> None:
        self._scores: dict[str, Tensor] = {}
        self.jobs = [job for group in scene.groups if (job := self._job(scene, group)) is not None]

    def units(self) -> Mapping[str, Tensor]:
        """Groups whose readers were seen."""
        return self._scores

    def blocks(self) -> None:
        """Nothing: a block's flow is all innovation."""

    def _job(self, scene: Scene, group: Group) -> Job | None:
        readers = [reader for port in scene.alive(group.readers) if (reader := _reader(scene.place(port), group))]
        if not readers:
            return None

        def finish() -> None:
            systems = [system for reader in readers for system in reader.systems()]
            if systems:
                self._scores[group.name] = eliminate(systems, group.size)
            for reader in readers:
                reader.gram.sums.clear()

        def settle() -> None:
            for reader in readers:
                reader.gram.settle()

        size, probes = sum(reader.size for reader in readers), [reader.probe() for reader in readers]
        return Job(size, probes, settle, [reader.gram.sums for reader in readers], finish)


@dataclass
class System:
    """One consumer, or one part of a grouped convolution, on the way of elimination.

    Attributes:
        inverse: H⁻¹ on the columns, shape (columns, columns); downdated in place.
        weights: Vᵀ, refitted as units go, shape (columns, outputs); in units of flow (divided by its root mean square).
        units: unit of each row of `columns`, shape (units here,).
        columns: the columns of each unit, shape (units here, columns of a unit).
    """

    inverse: Tensor
    weights: Tensor
    units: Tensor
    columns: Tensor

    def costs(self) -> Tensor:
        """Cost of each unit that is left, shape (units here,)."""
        cols = self.columns
        blocks = self.inverse[cols.unsqueeze(2), cols.unsqueeze(1)]  # (U, w, w)
        weights = self.weights[cols]  # (U, w, O)
        # tr(V_u (H⁻¹_uu)⁻¹ V_uᵀ) through V_uᵀ V_u, which is as small as the block, however many outputs there are.
        costs: Tensor = (torch.linalg.inv(_sound(blocks)) * (weights @ weights.transpose(1, 2))).sum((1, 2))
        return costs.clamp_min(0)

    def remove(self, gone: Tensor) -> None:
        """Eliminate units, those of the mask of shape (units here,), and refit the others."""
        cols = self.columns[gone].ravel()
        part = self.inverse[cols]  # (k, columns)
        gain = torch.linalg.solve(_sound(part[:, cols]), part)
        self.weights.addmm_(gain.T, self.weights[cols], alpha=-1)
        self.inverse.addmm_(part.T, gain, alpha=-1)
        self.units, self.columns = self.units[~gone], self.columns[~gone]
        if self.columns.numel() < COMPACT * len(self.inverse):
            self._compact()

    def _compact(self) -> None:
        """Forget the columns that no unit has any longer, so that further steps don't update them."""
        live = self.columns.ravel()
        self.inverse, self.weights = self.inverse[live][:, live], self.weights[live]
        self.columns = torch.arange(len(live), device=live.device).reshape(self.columns.shape)


def eliminate(systems: Sequence[System], size: int) -> Tensor:
    """Eliminate all units of a group from all its consumers, the cheapest first.

    Args:
        systems: the consumers; used up.
        size: number of units of the group.

    Returns:
        Mean over the consumers of the cost accumulated when each unit went, shape (size,); the last one to go gets what
        is left.
    """
    left = torch.nonzero(torch.bincount(torch.cat([system.units for system in systems]))).ravel()
    step = max(1, len(left) // STEPS)
    scores = torch.zeros(size, dtype=torch.float64)
    total = 0.0
    while len(left):
        costs = torch.zeros(size, dtype=torch.float64)
        for system in systems:
            costs.index_add_(0, system.units, system.costs().cpu())
        costs = costs[left] / len(systems)
        order = costs.argsort(stable=True)[:step]
        chosen = left[order]
        scores[chosen] = total + costs[order].cumsum(0)
        total = float(scores[chosen[-1]])
        for system in systems:
            gone = torch.isin(system.units, chosen)
            if gone.any():
                system.remove(gone)
        left = left[~torch.isin(left, chosen)]
    return scores


def _sound(blocks: Tensor) -> Tensor:
    """Keep the diagonal of blocks of H⁻¹ away from zero, where rounding has eaten it up."""
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    return blocks + torch.diag_embed((1e-9 * diagonal.abs().amax(-1, keepdim=True)).expand_as(diagonal) + 1e-30)


@dataclass
class _Reader:
    place: Place
    units: Tensor
    rows: Rows
    flow: FlowBehind
    gram: Gram
    weight: Tensor | None = None
    parts: int = 1
    batches: int = 0

    @property
    def slots(self) -> Tensor:
        """Slots of the input that belong to the group."""
        return torch.nonzero(self.units >= 0).ravel()

    @property
    def size(self) -> int:
        """Bytes of the second moments."""
        shape = self.place.scene.structure.graph.nodes[self.place.contraction.weight].shape
        taps = 1
        if self.place.contraction.kind == "conv":
            for extent in shape[2:]:
                taps *= extent
        parts = _parts(self.place, len(self.units))
        return 9 * parts * (len(self.slots) // parts * taps) ** 2  # an eighth are rows that wait

    def probe(self) -> Probe:
        call = self.place.node.call
        assert call is not None
        return Look(call, self._look)

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tensors_in(args, kwargs)
        assert self.place.input_at is not None and self.place.weight_at is not None
        x, self.weight = given[self.place.input_at].detach(), given[self.place.weight_at].detach()
        self.parts = x.shape[1] // self.weight.shape[1] if self.rows.contraction.kind == "conv" else 1
        rows = replace(self.rows, limit=min(self.rows.limit, PER_SAMPLE * len(x)))
        chosen = rows.choose(x, self.weight, self.place.scene.watch.valid, self.batches)
        self.batches += 1
        if self.parts == 1 and len(self.slots) < len(self.units):
            x = x.index_select(self.place.contraction.input_dim, self.slots.to(x.device))
        self.gram.add(rows.by_tap(x, self.weight, chosen))

    def _moments(self, taps: int) -> Tensor:
        """Second moments about the mean, with the taps of a channel side by side as in the flat weight."""
        moments = self.gram.centred().cpu()
        order = torch.arange(moments.shape[-1]).reshape(taps, -1).T.ravel()
        return moments[:, order][..., order]

    def systems(self) -> list[System]:
        """The consumer's parts, ready for elimination."""
        if self.weight is None or not self.gram.sums or self.flow.energy is None or not self.flow.energy.seen:
            return []
        contraction = self.place.contraction
        weight = scaled(self.weight.double().cpu(), contraction, self.flow.scale(self.place.scene))
        matrix = self.rows.matrix(weight, self.parts) / self.flow.mean_square**0.5
        units, taps = self.units.reshape(self.parts, -1), matrix.shape[-1] * self.parts // len(self.units)
        moments = self._moments(taps)
        if self.parts == 1:
            matrix, units = (
                matrix.reshape(*matrix.shape[:-1], -1, taps)[..., self.slots, :].flatten(-2),
                units[:, self.slots],
            )
        return [self._system(matrix[part], moments[part], units[part], taps) for part in range(self.parts)]

    def _system(self, matrix: Tensor, moments: Tensor, units: Tensor, taps: int) -> System:
        if not bool(moments.isfinite().all()):
            raise StructureError(
                f"what {self.place.node.where()} reads is not finite; look for NaN or infinite values in the "
                "calibration data and in the model's activations."
            )
        share = max(DAMPING, len(moments) / max(1.0, self.gram.count))
        ridge = share * moments.diagonal().mean().clamp_min(1e-30)
        factor = torch.linalg.cholesky(moments + ridge * torch.eye(len(moments), dtype=moments.dtype))
        mine = torch.nonzero(units >= 0).ravel()
        mine = mine[units[mine].argsort(stable=True)]
        counts = torch.bincount(units[mine])
        present = torch.nonzero(counts).ravel()
        width = int(counts[present[0]])
        columns = (mine[:, None] * taps + torch.arange(taps)).reshape(len(present), width * taps)
        return System(torch.cholesky_inverse(factor), matrix.T.contiguous(), present, columns)


def _parts(place: Place, slots: int) -> int:
    """Independent parts of a convolution that are left; the input has so many slots."""
    scene, contraction = place.scene, place.contraction
    read = scene.structure.layout.dims[contraction.weight][0][contraction.read_dim]
    return slots // max(1, count(read, scene.present)) if contraction.groups > 1 else 1


def _reader(place: Place, group: Group) -> _Reader | None:
    if place.weight_at is None or place.input_at is None or place.node.call is None:
        return None
    rows = Rows(place.contraction, place.node, ROWS)
    units = place.scene.units_in(place.read, group)
    if not rows.known or not len(units):
        return None
    for part in units.reshape(_parts(place, len(units)), -1):  # of each part all units are blocks of one size
        counts = torch.bincount(part[part >= 0])
        if len(set(counts.tolist()) - {0}) != 1:
            return None
    return _Reader(place, units, rows, flow_behind(place), Gram())
