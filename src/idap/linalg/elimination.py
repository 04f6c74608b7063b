"""Elimination of units one after another, the cheapest first (docs/method.md#innovation).

With H the centred second moments of what a consumer reads, removing unit u and refitting the consumer costs
tr(V_u (H⁻¹_uu)⁻¹ V_uᵀ), the optimal-brain-surgeon error.

Groups whose second moments are too large to be solved whole are eliminated in pieces:
of units in different pieces the moments across are left out, and a unit is replaced by those of its own piece alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idap.memory import Need

COMPACT = 0.8
"""Columns that are gone are dropped from the matrices once less than this share of them is left."""

GATHERED = 2**24
"""Numbers that are gathered at once to compute costs, unless a single unit takes more."""


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
        width = self.columns.shape[1]
        few = max(1, GATHERED // max(1, width * max(width, self.weights.shape[1])))
        return torch.cat([self._costs(cols) for cols in torch.split(self.columns, few)])

    def _costs(self, cols: Tensor) -> Tensor:
        """Cost of some units with these columns, shape (units,)."""
        blocks = self.inverse[cols.unsqueeze(2), cols.unsqueeze(1)]  # (U, w, w)
        weights = self.weights[cols]  # (U, w, O)
        # tr(V_u (H⁻¹_uu)⁻¹ V_uᵀ) through V_uᵀ V_u, which is as small as the block, however many outputs there are.
        costs: Tensor = (torch.linalg.inv(_sound_(blocks)) * (weights @ weights.transpose(1, 2))).sum((1, 2))
        return costs.clamp_min(0)

    def remove(self, gone: Tensor) -> None:
        """Eliminate units, those of the mask of shape (units here,), and refit the others."""
        cols = self.columns[gone].ravel()
        part = self.inverse[cols]  # (k, columns)
        gain = torch.linalg.solve(_sound_(part[:, cols]), part)
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


def _sound_(blocks: Tensor) -> Tensor:
    """Keep the diagonal of blocks of H⁻¹ away from zero, where rounding has eaten it up; in place."""
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(1e-9 * diagonal.abs().amax(-1, keepdim=True))
    return blocks.add_(1e-30)


@dataclass(frozen=True)
class Shape:
    """Sizes of what one consumer reads of a group.

    Attributes:
        parts: independent parts of a grouped convolution; else 1.
        columns: of the second moments of each part.
        outputs: of the consumer.
        width: columns of a unit.
        rows: that are drawn from one batch at most.
    """

    parts: int
    columns: int
    outputs: int
    width: int
    rows: int


def elimination_need(shapes: Sequence[Shape]) -> Need:
    """Estimate what second moments and elimination of a group, or of a piece of one, take.

    Args:
        shapes: of the consumers, which are eliminated together. The rows that a batch gives are counted as drawn,
            with those that waited, and moved to their mean; float32. All else is float64.
    """
    moments = [8 * shape.parts * shape.columns**2 for shape in shapes]
    weights = [8 * shape.columns * shape.outputs for shape in shapes]
    rows = [3 * 4 * shape.rows * shape.parts * shape.columns for shape in shapes]
    gathered = [6 * 8 * max(min(GATHERED, shape.columns * shape.width), shape.width**2) for shape in shapes]
    # Beside the inverses: moments and factor, or what is gathered; the weights as given, scaled and transposed.
    beside = [max(2 * m, g) + 3 * w for m, g, w in zip(moments, gathered, weights, strict=True)]
    return Need(
        held=sum(moments) + max(moments) // 8,  # rows that wait
        solving=max(*moments, *rows),
        on_cpu=sum(moments) + sum(weights) + max(beside),
    )


WIDEST = 8192
"""A group of which a layer reads more columns than this is eliminated in pieces.

It is a constant, not what happens to be free: a run that goes on must decide as it would have done before.
"""

PIECE = 2048
"""Most columns of a piece, where a unit has no more. Second moments are taken of a few thousand rows at most, and those
of more columns than rows are noise that the ridge damps anyway; the work grows with the square of this number.
"""


@dataclass(frozen=True)
class Piece:
    """A piece of a group once it is eliminated.

    Attributes:
        units: of the piece, ascending.
        scores: cost accumulated within the piece when each of them went, shape (units,).
    """

    units: Tensor
    scores: Tensor


def divide(units: Tensor, columns: int, widest: int) -> list[Tensor]:
    """Divide the units of a group into contiguous pieces of about the same size.

    Args:
        units: that are left, ascending.
        columns: that a layer reads of all of them.
        widest: most columns of a group that stays whole.

    Example:
        >>> divide(torch.arange(5), 10, 4)
        [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    """
    if columns <= widest:
        return [units]
    return list(torch.tensor_split(units, min(len(units), -(-columns // min(widest, PIECE)))))


def join(pieces: Sequence[Piece], size: int) -> Tensor:
    """Scores of a whole group, as if its pieces had been eliminated together, the cheapest unit of all first.

    Args:
        pieces: of the group.
        size: number of units of the group.

    Returns:
        Cost accumulated when each unit went, shape (size,); 0 for units of no piece.
    """
    orders = [piece.scores.argsort(stable=True) for piece in pieces]
    steps = [piece.scores[order] for piece, order in zip(pieces, orders, strict=True)]
    costs = [step.diff(prepend=step.new_zeros(1)) for step in steps]
    # In each piece the order is fixed; a unit that comes after a dear one goes no earlier than that.
    turns = torch.cat([cost.cummax(0).values for cost in costs]).argsort(stable=True)
    units = torch.cat([piece.units[order] for piece, order in zip(pieces, orders, strict=True)])
    scores = torch.zeros(size, dtype=torch.float64)
    scores[units[turns]] = torch.cat(costs)[turns].cumsum(0)
    return scores


STEPS = 96
"""A group is eliminated in at most about so many steps; a wide one several units at a time."""


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
