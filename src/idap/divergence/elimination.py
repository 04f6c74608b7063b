"""The matrices of one consumer while its units are eliminated, and the memory that this takes."""

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
