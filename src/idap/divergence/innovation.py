"""The innovation form (docs/method.md#innovation): the flow of a unit that the other units cannot replace.

With H the centred second moments of what a layer reads, removing unit u and refitting the layer costs
tr(V_u (H⁻¹_uu)⁻¹ V_uᵀ), the optimal-brain-surgeon error. Units are eliminated one after another, the cheapest first.
A unit's score is the cost accumulated up to its elimination, as a share of the energy of the flow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from idap.divergence.observe import Job, Probe, tensors_in
from idap.divergence.ports import Unfolding
from idap.divergence.relative import FlowBehind, flow_behind
from idap.divergence.scene import Place, Scene, Scorer
from idap.divergence.watch import Look
from idap.errors import StructureError
from idap.linalg.elimination import WIDEST, Piece, Shape, System, divide, eliminate, elimination_need, join
from idap.linalg.moments import STRIP, SecondMoments
from idap.structure.groups import Group
from idap.structure.layout import count

ROWS, PER_SAMPLE = 8192, 32
"""Largest number of rows drawn from one batch, and from one sample."""

DAMPING = 1e-3
"""Smallest ridge, as a share of the mean variance of a column; it is larger if there are few rows for the columns."""


def innovation(scene: Scene, *, widest: int = WIDEST) -> Scorer:
    """Accumulated cost of eliminating units when the layers that read them are refitted, over E‖x‖² of the stream.

    Args:
        scene: the model that is measured.
        widest: if a layer reads more columns of a group, the group is eliminated in pieces; see
            `idap.linalg.elimination`.
    """
    return InnovationScores(scene, widest=widest)


class InnovationScores:
    """Scores by elimination; each group, or piece of a group, has its own job, since second moments take memory.

    Attributes:
        jobs: the jobs, in the order of the groups.
        notes: what the scores leave out, one sentence each.
    """

    def __init__(self, scene: Scene, *, widest: int = WIDEST) -> None:
        self._scores: dict[str, Tensor] = {}
        self._pieces: dict[str, list[Piece]] = {}
        self._sizes = {group.name: group.size for group in scene.groups}
        self.notes: list[str] = []
        self.jobs = [job for group in scene.groups for job in self._jobs(scene, group, widest)]

    def units(self) -> Mapping[str, Tensor]:
        """Scores of the groups whose readers were seen."""
        return self._scores | {name: join(pieces, self._sizes[name]) for name, pieces in self._pieces.items()}

    def blocks(self) -> None:
        """None: the criterion scores no blocks, as no other part replaces the flow of a block."""

    def _jobs(self, scene: Scene, group: Group, widest: int) -> list[Job]:
        readers = [reader for port in scene.alive(group.readers) if (reader := _reader(scene.place(port), group))]
        if not readers:
            return []
        columns = max((reader.columns for reader in readers if reader.planned_parts == 1), default=0)
        left = torch.unique(torch.cat([reader.units[reader.units >= 0] for reader in readers]))
        pieces = divide(left, columns, widest)
        if len(pieces) == 1:

            def keep(systems: Sequence[System]) -> None:
                self._scores[group.name] = eliminate(systems, group.size)

            return [_job(group.name, readers, keep)]
        self.notes.append(
            f"The {len(left):,} units of group {group.name!r} ({columns:,} columns) are measured in {len(pieces)} "
            "pieces, so that none of them counts as replaced by a unit of another piece."
        )
        all_parts = sum(reader.planned_parts for reader in readers if reader.flow.energy is not None)

        def piece_job(piece: Tensor) -> Job:
            def keep(systems: Sequence[System]) -> None:
                scores = eliminate(systems, group.size)[piece] * (len(systems) / all_parts)
                self._pieces.setdefault(group.name, []).append(Piece(piece, scores))

            return _job(group.name, [part for reader in readers if (part := reader.of(piece))], keep)

        return [piece_job(piece) for piece in pieces]


def _job(name: str, readers: Sequence["_Reader"], keep: Callable[[Sequence["System"]], None]) -> Job:
    """A job that measures what readers read, eliminates its units, and passes the systems to `keep`."""

    def finish() -> None:
        systems = [system for reader in readers for system in reader.systems()]
        if systems:
            keep(systems)
        for reader in readers:
            reader.gram.sums.clear()

    def settle() -> None:
        for reader in readers:
            reader.gram.flush()

    need = elimination_need([reader.shape for reader in readers])
    probes = [reader.probe() for reader in readers]
    return Job(name, need, probes, settle, [reader.gram.sums for reader in readers], finish)


@dataclass
class _Reader:
    place: Place
    units: Tensor
    rows: Unfolding
    flow: FlowBehind
    gram: SecondMoments
    weight: Tensor | None = None
    parts: int = 1
    batches: int = 0

    @property
    def slots(self) -> Tensor:
        """Slots of the input that belong to the group."""
        return torch.nonzero(self.units >= 0).ravel()

    @property
    def planned_parts(self) -> int:
        """Number of parts, known before any batch has run."""
        return _parts(self.place, len(self.units))

    @property
    def columns(self) -> int:
        """Columns of the second moments of one part."""
        shape = self.place.scene.structure.graph.nodes[self.place.contraction.weight].shape
        taps = prod(shape[2:]) if self.place.contraction.kind == "conv" else 1
        parts = self.planned_parts
        return (len(self.slots) if parts == 1 else len(self.units) // parts) * taps

    @property
    def shape(self) -> Shape:
        """The sizes from which the memory of the elimination is computed."""
        taps = self.columns * self.planned_parts // (len(self.slots) if self.planned_parts == 1 else len(self.units))
        width = int(torch.bincount(self.units[self.slots]).max()) * taps
        return Shape(self.planned_parts, self.columns, self.flow.channels, width, self.rows.limit)

    def of(self, piece: Tensor) -> "_Reader | None":
        """The same reader restricted to some units; None if it reads none of them."""
        units = torch.where(torch.isin(self.units, piece), self.units, -1)
        return replace(self, units=units, gram=SecondMoments()) if bool((units >= 0).any()) else None

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
        moments = self.gram.covariance().cpu()
        self.gram.sums.pop("products")  # these matrices are large
        if taps > 1:
            order = torch.arange(moments.shape[-1]).reshape(taps, -1).T.ravel()
            moments = moments[:, order]
            moments = moments[..., order]
        return moments

    def systems(self) -> list[System]:
        """The parts of the layer, ready for elimination; empty if no data were seen."""
        if self.weight is None or not self.gram.sums or self.flow.energy is None or not self.flow.energy.has_data:
            return []
        matrix = self.rows.matrix(self.weight, self.parts)
        units, taps = self.units.reshape(self.parts, -1), matrix.shape[-1] * self.parts // len(self.units)
        if self.parts == 1 and len(self.slots) < len(self.units):
            matrix = matrix.reshape(*matrix.shape[:-1], -1, taps)[..., self.slots.to(matrix.device), :].flatten(-2)
            units = units[:, self.slots]
        matrix, scale = matrix.double().cpu(), self.flow.scale(self.place.scene)
        if scale is not None:
            matrix = matrix * scale.reshape(self.parts, -1, 1)
        matrix = matrix / self.flow.mean_square**0.5
        moments = list(self._moments(taps))
        present = [part for part in range(self.parts) if bool((units[part] >= 0).any())]
        return [self._system(matrix[part], moments[part], units[part], taps) for part in present]

    def _system(self, matrix: Tensor, moments: Tensor, units: Tensor, taps: int) -> System:
        if not all(bool(strip.isfinite().all()) for strip in torch.split(moments, STRIP)):
            raise StructureError(
                f"the input of {self.place.node.where()} is not finite; look for NaN or infinite values in the "
                "calibration data and in the model's activations."
            )
        share = max(DAMPING, len(moments) / max(1.0, self.gram.count))
        ridge = share * moments.diagonal().mean().clamp_min(1e-30)
        moments.diagonal().add_(ridge)  # in place: the moments without it are not needed
        factor = torch.linalg.cholesky(moments)
        mine = torch.nonzero(units >= 0).ravel()
        mine = mine[units[mine].argsort(stable=True)]
        counts = torch.bincount(units[mine])
        present = torch.nonzero(counts).ravel()
        width = int(counts[present[0]])
        columns = (mine[:, None] * taps + torch.arange(taps)).reshape(len(present), width * taps)
        return System(torch.cholesky_inverse(factor), matrix.T.contiguous(), present, columns)


def _parts(place: Place, slots: int) -> int:
    """Number of independent parts that a convolution still has, if its input has `slots` slots."""
    scene, contraction = place.scene, place.contraction
    read = scene.structure.layout.dims[contraction.weight][0][contraction.read_dim]
    return slots // max(1, count(read, scene.present)) if contraction.groups > 1 else 1


def _reader(place: Place, group: Group) -> _Reader | None:
    if place.weight_at is None or place.input_at is None or place.node.call is None:
        return None
    rows = Unfolding(place.contraction, place.node, ROWS)
    units = place.scene.units_in(place.input_dim, group)
    if not rows.can_unfold or not len(units):
        return None
    for part in units.reshape(_parts(place, len(units)), -1):  # in each part, all units have equally many slots
        counts = torch.bincount(part[part >= 0])
        if len(set(counts.tolist()) - {0}) != 1:
            return None
    return _Reader(place, units, rows, flow_behind(place), SecondMoments())
