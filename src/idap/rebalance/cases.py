"""One layer on the way through a correction: what it reads, what it should give, and the sums so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from idap.divergence.observe import Pass
from idap.divergence.watch import valid_positions
from idap.graph.ir import CallKey
from idap.rebalance.consumers import Consumer
from idap.rebalance.moments import Moments
from idap.rebalance.residuals import Residuals, Sums


@dataclass(frozen=True)
class Correction:
    """What became of one layer.

    Attributes:
        weight: canonical name of its weight.
        before: error against the original's output on held-out samples, before the correction.
        after: and after it; equal to `before` where the layer kept its old weights.
        ridge: that held-out samples preferred; infinite where only the bias changed, NaN where nothing did.
        too_wide: it reads more columns than `Rebalance.columns`, so only its bias could change.
    """

    weight: str
    before: float
    after: float
    ridge: float
    too_wide: bool = False


@dataclass
class Case:
    """A layer while it is corrected.

    Attributes:
        consumer: the layer.
        kept: the outputs that it still has, in the original's indices.
        through: whether it makes up for the whole sum that it is added to.
        chosen: batch by batch, the positions drawn.
        targets: batch by batch, what the original gives there.
        learned: sums over the rows to learn from.
        held_out: and over those that judge.
        seen: number of rows in both.
        again: makes the call that is running once more.
        output: what that call gave.
        read: the rows it has read, shape (parts, rows, columns).
        layer: its weight and bias, shapes (parts, outputs, columns) and (parts, outputs), where it is too wide to be
            refitted: then sums are kept of what it misses, and only its bias is corrected.
    """

    consumer: Consumer
    kept: Tensor
    through: bool
    chosen: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    learned: Sums | None = None
    held_out: Sums | None = None
    seen: int = 0
    again: Callable[[], Tensor] = torch.empty
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    read: Tensor = field(default_factory=lambda: torch.empty(0))
    layer: tuple[Tensor, Tensor] | None = None

    def choose(self, given: Sequence[Tensor], each: Pass, number: int) -> None:
        """Draw positions from a batch, where the layer's call in the original is given these tensors."""
        rows, at = self.consumer.rows, self.consumer.input_at
        weight = next(tensor for i, tensor in enumerate(given) if i != at and tensor.dim() > 1)
        self.chosen.append(rows.choose(given[at], weight, lambda x: valid_positions(each.padding, x), number))

    def choose_outputs(self, result: Tensor, each: Pass, number: int) -> None:
        """Draw positions from a batch, of what the original gives where this layer stands in for other code."""
        self.chosen.append(
            self.consumer.rows.choose_outputs(result, lambda x: valid_positions(each.padding, x), number)
        )

    def add(self, targets: Tensor, share: float) -> None:
        """Add the rows that were read and their targets, shape (rows, outputs), to the sums; hold this share out."""
        parts, rows = self.read.shape[:2]
        y = targets.reshape(rows, parts, -1).transpose(0, 1)
        before, self.seen = self.seen, self.seen + rows
        judge = _up(self.seen * share) - _up(before * share)  # of batches of one row, some judge and others don't
        places = slice(0, rows - judge), slice(rows - judge, rows)  # rows are in the order of samples
        for name, part in zip(("learned", "held_out"), places, strict=True):
            x = self.read[:, part]
            sums = Moments.of(x, y[:, part]) if self.layer is None else Residuals.of(x, y[:, part], *self.layer)
            held = getattr(self, name)
            setattr(self, name, sums if held is None else held + sums)
        self.read = torch.empty(0)

    def sums(self) -> tuple[Sums, Sums]:
        """Take the sums over the rows to learn from and over those that judge; nothing is held any longer."""
        learned, held_out = self.learned, self.held_out
        assert learned is not None and held_out is not None
        self.learned = self.held_out = None
        self.targets, self.chosen, self.layer = [], [], None
        return learned, held_out


def by_call(cases: Sequence[Case]) -> dict[CallKey, Case]:
    """The cases by the calls of their layers."""
    return {case.consumer.call: case for case in cases}


def by_original(cases: Sequence[Case]) -> dict[CallKey, Case]:
    """The cases by the calls of the original that give what they should."""
    return {case.consumer.original: case for case in cases}


def by_addition(cases: Sequence[Case]) -> dict[CallKey, Case]:
    """Those that make up for a whole sum, by the calls that add."""
    return {case.consumer.addition: case for case in cases if case.through and case.consumer.addition is not None}


def _up(share: float) -> int:
    return ceil(share - 1e-9)
