"""Second moments of rows, summed up in float64 a piece at a time: faster, and as exact as what is added."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

PIECE = 2**19
"""Numbers whose squares stay in the cache of a CPU."""
BLOCK = 256
"""Rows that are added up in their own precision."""
STRIP = 512
"""Columns whose products with all that follow are computed at once."""


def sum_of_rows(rows: Tensor) -> Tensor:
    """Σ over rows in float64, shape (parts, columns).

    Blocks of rows are added in their own precision first: a tenth of the time, and an error that is small beside that
    of the rows.

    Args:
        rows: shape (parts, rows, columns).
    """
    whole = rows.shape[1] // BLOCK * BLOCK
    blocks = rows[:, :whole].reshape(len(rows), -1, BLOCK, rows.shape[2]).sum(2)
    return blocks.sum(1, dtype=torch.float64) + rows[:, whole:].sum(1, dtype=torch.float64)


def sum_of_squares(x: Tensor, inner: list[int], exact: torch.dtype) -> Tensor:
    """Σ x² over some dimensions of each sample, shape (samples, channels).

    On a CPU a few samples at a time, in memory that is used again: the squares of a large tensor leave the cache before
    they are added, and its memory has to be fetched from the system, which takes several times longer.

    Args:
        x: shape (samples, ..., channels).
        inner: the dimensions between.
        exact: in which to compute.
    """
    few = max(1, PIECE // max(1, x[:1].numel()))
    if x.device.type != "cpu" or len(x) <= few:
        return x.to(exact).square().sum(inner)
    squares = torch.empty_like(x[:few], dtype=exact)
    return torch.cat(
        [torch.square(part.to(exact), out=squares[: len(part)]).sum(inner) for part in torch.split(x, few)]
    )


def add_products(sums: Tensor, rows: Tensor, at: Tensor, rest: Tensor) -> None:
    """Add Σ x xᵀ over rows x that were moved to a point near their mean, on and above the diagonal only.

    What is below would be computed a second time; without it, half of the work is left where there are many columns.

    Args:
        sums: what is added to, shape (parts, columns, columns), float64.
        rows: x - at, shape (parts, rows, columns).
        at: the point, shape (parts, columns), float64.
        rest: sum over the moved rows, shape (parts, columns), float64.
    """
    half = rest + rows.shape[1] / 2 * at
    left, right = torch.stack([half, at], 2), torch.stack([at, half], 1)
    for first in range(0, rows.shape[2], STRIP):
        strip = slice(first, first + STRIP)
        part = sums[:, strip, first:]
        part.add_(rows[:, :, strip].transpose(1, 2) @ rows[:, :, first:])
        part.baddbmm_(left[:, strip], right[:, :, first:])  # in place: these matrices are large


def mirror_(sums: Tensor) -> Tensor:
    """Copy what is above the diagonal of matrices of shape (parts, columns, columns) below it, in place."""
    for first in range(0, sums.shape[2], STRIP):
        end = first + STRIP
        square = sums[:, first:end, first:end]
        square.copy_(square.triu() + square.triu(1).transpose(1, 2))
        sums[:, end:, first:end] = sums[:, first:end, end:].transpose(1, 2)
    return sums


WAIT = 0.25
"""As many rows as this share of the columns are multiplied at once."""


@dataclass
class SecondMoments:
    """Sums over rows: the rows, their products, and their number; float64.

    Rows wait until there are enough for their products to cost more than adding these up.

    Attributes:
        sums: "total" of shape (parts, columns), "products" of shape (parts, columns, columns), on and above the
            diagonal, "count"; of all rows once `flush` was called.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    _waiting: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        """Add rows of shape (parts, rows, columns)."""
        self._waiting.append(rows)
        if sum(part.shape[1] for part in self._waiting) >= max(BLOCK, WAIT * rows.shape[2]):
            self.flush()

    def flush(self) -> None:
        """Add up the rows that wait."""
        if not self._waiting:
            return
        rows = torch.cat(self._waiting, 1) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        count = rows.shape[1]
        rows, shift, rest = about_mean(rows)
        if not self.sums:
            size = (len(rows), rows.shape[2])
            self.sums["total"] = shift.new_zeros(size)
            self.sums["products"] = shift.new_zeros((*size, size[1]))
            self.sums["count"] = torch.tensor(0.0, dtype=torch.float64)
        self.sums["total"] += rest + count * shift
        self.sums["count"] += count
        add_products(self.sums["products"], rows, shift, rest)

    @property
    def count(self) -> float:
        """Number of rows."""
        self.flush()
        return float(self.sums["count"]) if self.sums else 0.0

    def covariance(self) -> Tensor:
        """Second moments about the mean, shape (parts, columns, columns)."""
        self.flush()
        mean = self.sums["total"] / self.sums["count"].to(self.sums["total"].device)
        moments = mirror_(self.sums["products"] / self.sums["count"].to(self.sums["products"].device))
        return moments.baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1)


def about_mean(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move rows to a point near their mean, which would eat up the digits of their products.

    Args:
        rows: shape (parts, rows, columns).

    Returns:
        The moved rows, in their own precision; the point and the sum over the moved rows, (parts, columns) in float64.
    """
    some = rows[:, :: max(1, rows.shape[1] // BLOCK)]
    at = some.sum(1) / max(1, some.shape[1])
    rows = rows - at.unsqueeze(1)
    return rows, at.double(), sum_of_rows(rows)


def exact(x: Tensor) -> Tensor:
    """The tensor in a precision that is fit for products."""
    return x if x.dtype == torch.float64 else x.float()
