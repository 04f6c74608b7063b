"""Fit the linear maps that replace modules, in closed form (docs/method.md#projections)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from idap.divergence.observe import MEMORY, Pass, Probe, is_result, observe, result_of, sum_over_processes, tensors_in
from idap.divergence.ports import Sight, Wiring
from idap.divergence.watch import Look, Note, valid_positions
from idap.errors import StructureError
from idap.graph.ir import Graph
from idap.linalg.moments import exact
from idap.linalg.ridge import RIDGES, Moments, fit, fit_need
from idap.memory import Need, Room, pack
from idap.structure.analysis import Structure
from idap.structure.blocks import Block
from idap.structure.layout import Presence, count, slots
from idap.structure.replacement import Projected
from idap.surgery.stand_ins import LinearMap
from idap.training.batch import device_of

HELD_OUT = 0.25
"""Share of held-out rows, which choose the ridge and give the residual: the last rows of each batch."""


@dataclass(frozen=True)
class FittedMap:
    """The linear map P that comes closest to a module.

    Attributes:
        map: weight and bias for all channels of the original; zero for channels that the model lacks.
        residual: E‖y - P(x)‖² / E‖y‖² on held-out rows, with x the input and y the output of the module.
        ridge: the ridge that the held-out rows chose; infinite if a constant was best.
    """

    map: LinearMap
    residual: float
    ridge: float


@torch.no_grad()
def fit_projections(
    model: nn.Module,
    structure: Structure,
    passes: Iterable[Pass],
    names: Iterable[str],
    *,
    present: Presence,
    removed: Sequence[str] = (),
) -> dict[str, FittedMap]:
    """Fit the maps of several blocks in one pass over the calibration data (docs/method.md#projections).

    Only sums are kept, no activations. If the sums of all blocks don't fit into memory at once, several passes
    are made.

    Weights and bias minimise E‖y - W x - b‖² + ridge ‖W‖². Where the map has stride s, x is taken at every s-th
    position. The ridge is the one of `RIDGES` with the lowest error on held-out rows; with few samples it is larger.

    Args:
        model: the original, or a model cut from it; not changed.
        structure: structure of the original.
        passes: the calibration batches.
        names: names of blocks that the model still has and that may become projections.
        present: labels of the units that the model has.
        removed: names of the branches and blocks that were removed from it.

    Returns:
        The maps by name of the block. Blocks that run inside one opaque call, or whose last part is removed, have none.

    Raises:
        StructureError: the model does not run on this data as it was traced.
        InsufficientMemoryError: a single block takes more memory than is allowed; raised before any data are read.
    """
    structure = structure.after(removed)
    wiring = Wiring(structure, removed)
    pairs = [pair for name in names if (pair := _pair(wiring, structure, structure.block(name), present)) is not None]
    if not pairs:
        return {}
    room = Room.now(device_of(model))
    for pair in pairs:
        room.check(
            pair.need,
            what=f"fitting a projection in place of block {pair.block.name!r}",
            way_out='Let blocks become the identity alone (layers.replacement="identity").',
        )
    rounds = pack(pairs, MEMORY, room)
    if len(rounds) > 1:
        passes = list(passes)
    found = {}
    for some in rounds:
        _sum_up(model, some, passes)
        for pair in some:
            if pair.sums:
                found[pair.block.name] = pair.fit_map(structure, present)
                pair.sums.clear()
    return found


def _sum_up(model: nn.Module, pairs: Sequence["_Pair"], passes: Iterable[Pass]) -> None:
    """Run the model on the data, and add up the sums of all processes."""

    def begin(each: Pass) -> None:
        for pair in pairs:
            pair.padding = each.padding

    observe(model, [probe for pair in pairs for probe in pair.probes()], passes, begin=begin)
    for pair in pairs:
        sums = [{**vars(moments), "count": torch.tensor([moments.count])} for moments in pair.sums]
        sum_over_processes(sums)
        for moments, total in zip(pair.sums, sums, strict=True):
            moments.count = float(total["count"])


def _pair(wiring: Wiring, structure: Structure, block: Block, present: Presence) -> "_Pair | None":
    entry, leave = wiring.sight(block.entry), wiring.graph.nodes[block.exit]
    seen = entry is not None and leave.call is not None and is_result(wiring.graph, block.exit)
    if block.projected is None or entry is None or not seen or block.exit in wiring.gone:
        return None
    dims, at = structure.layout.dims, block.projected.dim
    outputs, inputs = (count(dims[node][0][at], present) for node in (block.exit, block.entry))
    return _Pair(wiring.graph, block, block.projected, entry, fit_need(1, inputs, outputs, rows=0))


@dataclass
class _Pair:
    """Sums over the inputs and outputs of a module, and the memory that they need."""

    graph: Graph
    block: Block
    projected: Projected
    entry: Sight
    need: Need
    padding: Tensor | None = None
    sums: list[Moments] = field(default_factory=list)
    _seen: int = 0
    _entered: Tensor | None = None

    def probes(self) -> list[Probe]:
        """The probes that observe the module's input and output."""
        leave = self.graph.nodes[self.block.exit].call
        assert leave is not None  # see `_pair`
        return [self._at_entry(), Note(leave, self._left)]

    def _at_entry(self) -> Probe:
        place = self.entry.argument
        if place is None:
            return Note(self.entry.call, lambda result: self._enter(result_of(self.graph, self.entry.node, result)))
        return Look(self.entry.call, lambda args, kwargs: self._enter(tensors_in(args, kwargs)[place]))

    def _enter(self, x: Tensor | None) -> None:
        self._entered = (
            None if x is None else x.detach()
        )  # no copy: modules that overwrite their input get no projection

    def _left(self, result: Any) -> None:
        y, x = result_of(self.graph, self.block.exit, result), self._entered
        self._entered = None
        if x is None or y is None:
            return
        x, y = self._last(x[self._places]), self._last(y.detach())
        if x.shape[:-1] != y.shape[:-1]:
            raise StructureError(
                f"module {self.block.name!r} gives {tuple(y.shape[1:-1])} positions for samples of which a linear map "
                f"with stride {self.projected.stride} gives {tuple(x.shape[1:-1])}; trace the model on inputs like the "
                "calibration data."
            )
        counted = valid_positions(self.padding, x)
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        if counted is not None:
            x, y = x[counted.to(x.device)], y[counted.to(y.device)]
        self._add(x, y)

    @property
    def _places(self) -> tuple[slice, ...]:
        """Every s-th position of each spatial dimension."""
        return (slice(None), slice(None), *(slice(None, None, step) for step in self.projected.stride))

    def _last(self, x: Tensor) -> Tensor:
        return exact(x.movedim(self.projected.dim, -1))

    def _add(self, x: Tensor, y: Tensor) -> None:
        """Add rows to the sums to learn from, and the last of them to the held-out sums."""
        before, self._seen = self._seen, self._seen + len(x)
        # A share of all rows so far: of batches with one row, some are held out whole.
        judge = ceil(self._seen * HELD_OUT - 1e-9) - ceil(before * HELD_OUT - 1e-9)
        cut = len(x) - judge
        new = [Moments.of(a.unsqueeze(0), b.unsqueeze(0)) for a, b in ((x[:cut], y[:cut]), (x[cut:], y[cut:]))]
        self.sums = [old + more for old, more in zip(self.sums, new, strict=True)] if self.sums else new

    def fit_map(self, structure: Structure, present: Presence) -> FittedMap:
        """Fit the map from the sums over all data."""
        learned, held_out = self.sums
        outputs, inputs = learned.y.shape[1], learned.x.shape[1]
        weight, bias = learned.x.new_zeros(1, outputs, inputs), learned.x.new_zeros(1, outputs)
        found = fit(learned, held_out, weight, bias, ridges=RIDGES, shift=True)
        if found is None:
            return FittedMap(self._full(structure, present, weight[0], bias[0]), 1.0, float("nan"))
        residual = found.after / max(found.before, 1e-30)
        return FittedMap(self._full(structure, present, found.weight[0], found.bias[0]), residual, found.ridge)

    def _full(self, structure: Structure, present: Presence, weight: Tensor, bias: Tensor) -> LinearMap:
        """Extend weight and bias to all channels of the original, with zeros for those that the model lacks."""
        dims, at = structure.layout.dims, self.projected.dim
        rows, columns = (
            torch.from_numpy(np.flatnonzero(slots(dims[node][0][at], present))).to(weight.device)
            for node in (self.block.exit, self.block.entry)
        )
        outputs, inputs = self.projected.sizes
        wide = weight.new_zeros(len(weight), inputs).index_copy(1, columns, weight)
        return LinearMap(
            weight.new_zeros(outputs, inputs).index_copy(0, rows, wide),
            bias.new_zeros(outputs).index_copy(0, rows, bias),
        )
