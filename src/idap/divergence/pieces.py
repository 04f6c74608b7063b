"""Groups whose second moments are too large to be solved whole are eliminated in pieces.

Of units in different pieces the second moments across are left out: a unit is replaced by those of its own piece alone.
Where these moments are zero, the scores are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
