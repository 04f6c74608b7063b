"""Eliminate units one after another, the cheapest first (docs/method.md#innovation).

H is the matrix of centred second moments of what a consumer reads. Removing unit u and refitting the consumer costs
tr(V_u [(H⁻¹)_uu]⁻¹ V_uᵀ), the error of the Optimal Brain Surgeon.

A group whose second moments are too large to be inverted whole is eliminated in pieces: moments between units of
different pieces count as zero, so a unit is replaced by units of its own piece alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idap.memory import Need

COMPACT = 0.8
"""The matrices are compacted once less than this share of their columns is left."""

GATHERED = 2**24
"""Most numbers that are gathered at once to compute costs, unless a single unit takes more."""


@dataclass
class System:
    """One consumer, or one part of a grouped convolution, while units are eliminated from it.

    Attributes:
        inverse: H⁻¹ over the columns, shape (columns, columns); updated in place after each removal.
        weights: Vᵀ, refitted after each removal, shape (columns, outputs); divided by the root mean square of the
            stream that the consumer feeds, so that costs are shares of its energy.
        units: unit of each row of `columns`, shape (units here,).
        columns: the columns of each unit, shape (units here, columns of a unit).

    Example:
        Two units with H = [[2, 1], [1, 2]], so H⁻¹ = [[2, -1], [-1, 2]] / 3, and V = [1, 2]:

        >>> inverse = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64) / 3
        >>> weights = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> system = System(inverse, weights, units=torch.tensor([0, 1]), columns=torch.tensor([[0], [1]]))
        >>> [round(cost, 3) for cost in system.costs().tolist()]  # 1² / (2/3) and 2² / (2/3)
        [1.5, 6.0]
        >>> system.remove(torch.tensor([True, False]))
        >>> [round(cost, 3) for cost in system.costs().tolist()]  # V = 2 + 1/2 and H⁻¹ = 1/2, so 2.5² / (1/2)
        [12.5]
    """

    inverse: Tensor
    weights: Tensor
    units: Tensor
    columns: Tensor

    def costs(self) -> Tensor:
        """Cost of removing each unit that is left: tr(V_u [(H⁻¹)_uu]⁻¹ V_uᵀ), shape (units here,); at least 0.

        Formula: docs/method.md#innovation.
        """
        width = self.columns.shape[1]
        few = max(1, GATHERED // max(1, width * max(width, self.weights.shape[1])))
        return torch.cat([self._costs(cols) for cols in torch.split(self.columns, few)])

    def _costs(self, cols: Tensor) -> Tensor:
        """Cost of the units with these columns, shape (units,)."""
        blocks = self.inverse[cols.unsqueeze(2), cols.unsqueeze(1)]  # (U, w, w)
        weights = self.weights[cols]  # (U, w, O)
        # The trace of [(H⁻¹)_uu]⁻¹ times V_uᵀ V_u, which is as small as the block however many outputs there are.
        costs: Tensor = (torch.linalg.inv(_sound_(blocks)) * (weights @ weights.transpose(1, 2))).sum((1, 2))
        return costs.clamp_min(0)

    def remove(self, gone: Tensor) -> None:
        """Remove units and refit the others, in place.

        Formula (docs/method.md#innovation): V ← V − V_u [(H⁻¹)_uu]⁻¹ (H⁻¹)_u· and
        H⁻¹ ← H⁻¹ − (H⁻¹)_·u [(H⁻¹)_uu]⁻¹ (H⁻¹)_u·.

        Args:
            gone: mask of the units to remove, shape (units here,).
        """
        cols = self.columns[gone].ravel()
        part = self.inverse[cols]  # (k, columns)
        gain = torch.linalg.solve(_sound_(part[:, cols]), part)
        self.weights.addmm_(gain.T, self.weights[cols], alpha=-1)
        self.inverse.addmm_(part.T, gain, alpha=-1)
        self.units, self.columns = self.units[~gone], self.columns[~gone]
        if self.columns.numel() < COMPACT * len(self.inverse):
            self._compact()

    def _compact(self) -> None:
        """Drop the columns of removed units, so that later removals don't update them."""
        live = self.columns.ravel()
        self.inverse, self.weights = self.inverse[live][:, live], self.weights[live]
        self.columns = torch.arange(len(live), device=live.device).reshape(self.columns.shape)


def _sound_(blocks: Tensor) -> Tensor:
    """Keep the diagonal of blocks of H⁻¹ away from zero, which rounding may have made of it; in place."""
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(1e-9 * diagonal.abs().amax(-1, keepdim=True))
    return blocks.add_(1e-30)


@dataclass(frozen=True)
class Shape:
    """Sizes of what one consumer reads of a group.

    Attributes:
        parts: number of independent parts of a grouped convolution; 1 for other layers.
        columns: number of columns of the second moments of each part.
        outputs: number of outputs of the consumer.
        width: number of columns of a unit.
        rows: most rows that are drawn from one batch.
    """

    parts: int
    columns: int
    outputs: int
    width: int
    rows: int


def elimination_need(shapes: Sequence[Shape]) -> Need:
    """Estimate the memory that second moments and elimination of a group, or of a piece of one, take.

    Formula, in bytes, with p parts, c columns, o outputs, w columns of a unit and r rows of each consumer: the moments
    take m = 8 p c², the weights v = 8 c o (both float64), the rows 12 r p c (float32: as drawn, joined with those that
    wait, and moved to their mean), and the costs g = 48 max(min(`GATHERED`, c w), w²). The group holds Σ m and an
    eighth of the largest m for waiting rows; a batch takes the largest m or 12 r p c; elimination takes Σ (m + v) and
    the largest max(2 m, g) + 3 v. The moments are those of docs/method.md#innovation.

    Args:
        shapes: of the consumers, which are eliminated together.

    Returns:
        The bytes held, the bytes while a batch is added, and the bytes on the CPU for the elimination.

    Example:
        >>> need = elimination_need([Shape(parts=1, columns=10, outputs=2, width=1, rows=5)])  # m = 800, v = 160
        >>> need.held, need.solving, need.on_cpu  # 800 + 800 / 8; 800; 800 + 160 + max(1600, 480) + 480
        (900, 800, 3040)
    """
    moments = [8 * shape.parts * shape.columns**2 for shape in shapes]
    weights = [8 * shape.columns * shape.outputs for shape in shapes]
    rows = [3 * 4 * shape.rows * shape.parts * shape.columns for shape in shapes]
    gathered = [6 * 8 * max(min(GATHERED, shape.columns * shape.width), shape.width**2) for shape in shapes]
    # Beside the inverses: moments and factor, or what is gathered; and the weights as given, scaled and transposed.
    beside = [max(2 * m, g) + 3 * w for m, g, w in zip(moments, gathered, weights, strict=True)]
    return Need(
        held=sum(moments) + max(moments) // 8,  # and the rows that wait
        solving=max(*moments, *rows),
        on_cpu=sum(moments) + sum(weights) + max(beside),
    )


WIDEST = 8192
"""A group of which a layer reads more columns than this is eliminated in pieces.

It is a constant and does not depend on the free memory: a resumed run must decide as the interrupted run would have.
"""

PIECE = 2048
"""Most columns of a piece, unless a single unit has more. Second moments are taken from a few thousand rows at most.
With more columns than rows they are noise, which the ridge damps anyway. The work grows with the square of this number.
"""


@dataclass(frozen=True)
class Piece:
    """A piece of a group after its elimination.

    Attributes:
        units: units of the piece, ascending.
        scores: cost accumulated within the piece up to the removal of each unit, shape (units,).
    """

    units: Tensor
    scores: Tensor


def divide(units: Tensor, columns: int, widest: int) -> list[Tensor]:
    """Divide the units of a group into contiguous pieces of about the same size (docs/method.md#innovation).

    Formula: a group of more than `widest` columns becomes ⌈columns / min(widest, `PIECE`)⌉ pieces, but at most one for
    each unit.

    Args:
        units: units that are left, ascending.
        columns: number of columns that a layer reads of all of them.
        widest: most columns of a group that stays whole.

    Returns:
        The units of each piece.

    Example:
        >>> divide(torch.arange(5), 10, 4)  # 10 / 4, rounded up: 3 pieces
        [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    """
    if columns <= widest:
        return [units]
    return list(torch.tensor_split(units, min(len(units), -(-columns // min(widest, PIECE)))))


def join(pieces: Sequence[Piece], size: int) -> Tensor:
    """Score a whole group as if its pieces had been eliminated together, the cheapest unit of all first.

    Formula: the cost of a unit is the difference between its score and that of the unit removed before it in its piece.
    Units are ordered by the running maximum of these costs within their piece, and their costs are summed up in this
    order. Where the second moments between pieces are zero, the result is that of the whole group
    (docs/method.md#innovation).

    Args:
        pieces: pieces of the group.
        size: number of units of the group.

    Returns:
        Cost accumulated up to the removal of each unit, shape (size,); 0 for units of no piece.

    Example:
        Unit 0 costs 1, unit 2 then 4 - 1 = 3, unit 1 costs 2: the order is 0, 1, 2.

        >>> one = Piece(torch.tensor([0, 2]), torch.tensor([1.0, 4.0], dtype=torch.float64))
        >>> other = Piece(torch.tensor([1]), torch.tensor([2.0], dtype=torch.float64))
        >>> join([one, other], 3).tolist()
        [1.0, 3.0, 6.0]
    """
    orders = [piece.scores.argsort(stable=True) for piece in pieces]
    steps = [piece.scores[order] for piece, order in zip(pieces, orders, strict=True)]
    costs = [step.diff(prepend=step.new_zeros(1)) for step in steps]
    # The order within each piece is fixed: a unit that follows an expensive one is removed no earlier than that one.
    turns = torch.cat([cost.cummax(0).values for cost in costs]).argsort(stable=True)
    units = torch.cat([piece.units[order] for piece, order in zip(pieces, orders, strict=True)])
    scores = torch.zeros(size, dtype=torch.float64)
    scores[units[turns]] = torch.cat(costs)[turns].cumsum(0)
    return scores


STEPS = 96
"""About the most steps in which a group is eliminated; a wide group loses several units in each step."""


def eliminate(systems: Sequence[System], size: int) -> Tensor:
    """Eliminate all units of a group from all its consumers, the cheapest first.

    Formula (docs/method.md#innovation): in each step the unit with the lowest cost, mean over the consumers, is
    removed from all of them, and its score is the sum of the costs so far. The highest score is therefore tr(V H Vᵀ),
    mean over the consumers, as long as each step removes one unit. A group of n units loses max(1, ⌊n / `STEPS`⌋) units
    in each step.

    Args:
        systems: the consumers; changed in place until no unit is left.
        size: number of units of the group.

    Returns:
        Mean over the consumers of the cost accumulated up to the removal of each unit, shape (size,).

    Example:
        H = [[2, 1], [1, 2]] and V = [1, 2], as in `System`: unit 0 costs 1.5, unit 1 then 12.5; V H Vᵀ = 14.

        >>> inverse = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64) / 3
        >>> weights = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> system = System(inverse, weights, units=torch.tensor([0, 1]), columns=torch.tensor([[0], [1]]))
        >>> [round(score, 3) for score in eliminate([system], 2).tolist()]
        [1.5, 14.0]
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
