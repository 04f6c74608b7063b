"""Sum up second moments of rows in float64, a piece at a time (docs/method.md#innovation)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

PIECE = 2**19
"""Most numbers whose squares stay in the cache of a CPU."""
BLOCK = 256
"""Number of rows that are added up in their own precision."""
STRIP = 512
"""Columns whose products with all later columns are computed at once."""


def sum_of_rows(rows: Tensor) -> Tensor:
    """Sum rows in float64: Σ_r x_r, the sum of the mean E a (docs/method.md#innovation).

    Blocks of `BLOCK` rows are first added in their own precision. This takes a tenth of the time, and its error is
    small beside that of the rows.

    Args:
        rows: shape (parts, rows, columns).

    Returns:
        The sums, shape (parts, columns), in float64.

    Example:
        >>> sum_of_rows(torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])).tolist()
        [[4.0, 7.0]]
    """
    whole = rows.shape[1] // BLOCK * BLOCK
    blocks = rows[:, :whole].reshape(len(rows), -1, BLOCK, rows.shape[2]).sum(2)
    return blocks.sum(1, dtype=torch.float64) + rows[:, whole:].sum(1, dtype=torch.float64)


def sum_of_squares(x: Tensor, inner: list[int], exact: torch.dtype) -> Tensor:
    """Sum squares over some dimensions of each sample: Σ x², the sum of the energies E‖·‖² (docs/method.md#relative).

    On a CPU, a few samples are squared at a time, in memory that is reused. The squares of a large tensor would leave
    the cache before they are added, and the system would have to provide memory for them; this takes several times
    longer.

    Args:
        x: shape (samples, ..., channels).
        inner: the dimensions to sum over, at least one, without that of the samples.
        exact: the type in which to compute.

    Returns:
        The sums, shape (samples, channels).

    Example:
        >>> sum_of_squares(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), [1], torch.float64).tolist()  # 1 + 9, 4 + 16
        [[10.0, 20.0]]
    """
    few = max(1, PIECE // max(1, x[:1].numel()))
    if x.device.type != "cpu" or len(x) <= few:
        return x.to(exact).square().sum(inner)
    squares = torch.empty_like(x[:few], dtype=exact)
    return torch.cat(
        [torch.square(part.to(exact), out=squares[: len(part)]).sum(inner) for part in torch.split(x, few)]
    )


def add_products(sums: Tensor, rows: Tensor, at: Tensor, rest: Tensor) -> None:
    """Add Σ x xᵀ over rows x, on and above the diagonal, for the second moments of docs/method.md#innovation.

    The rows are given as z = x − p, with p a point near their mean, because products of large numbers lose digits.
    Formula: Σ x xᵀ = Σ z zᵀ + s pᵀ + p sᵀ + n p pᵀ with s = Σ z over n rows. Below the diagonal the products are the
    same; leaving them out saves half of the work where there are many columns. Strips of `STRIP` columns are computed
    at once, so small matrices come out whole.

    Args:
        sums: the sums to add to, in place, shape (parts, columns, columns), float64.
        rows: z, shape (parts, rows, columns).
        at: p, shape (parts, columns), float64.
        rest: s, shape (parts, columns), float64.

    Example:
        Rows x = 3 and 7 about the point 4, so z = -1 and 3, s = 2; 9 + 49 = 58.

        >>> sums = torch.zeros(1, 1, 1, dtype=torch.float64)
        >>> at, rest = torch.tensor([[4.0]]).double(), torch.tensor([[2.0]]).double()
        >>> add_products(sums, torch.tensor([[[-1.0], [3.0]]]), at, rest)
        >>> sums.item()
        58.0
    """
    half = rest + rows.shape[1] / 2 * at
    left, right = torch.stack([half, at], 2), torch.stack([at, half], 1)
    for first in range(0, rows.shape[2], STRIP):
        strip = slice(first, first + STRIP)
        part = sums[:, strip, first:]
        part.add_(rows[:, :, strip].transpose(1, 2) @ rows[:, :, first:])
        part.baddbmm_(left[:, strip], right[:, :, first:])  # in place: these matrices are large


def mirror_(sums: Tensor) -> Tensor:
    """Copy the elements above the diagonal of matrices below it, in place: m_ji ← m_ij for i < j.

    It completes the symmetric matrices of `add_products` (docs/method.md#innovation).

    Args:
        sums: shape (parts, columns, columns).

    Returns:
        The same tensor.

    Example:
        >>> mirror_(torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])).tolist()
        [[[1.0, 2.0], [2.0, 3.0]]]
    """
    for first in range(0, sums.shape[2], STRIP):
        end = first + STRIP
        square = sums[:, first:end, first:end]
        square.copy_(square.triu() + square.triu(1).transpose(1, 2))
        sums[:, end:, first:end] = sums[:, first:end, end:].transpose(1, 2)
    return sums


WAIT = 0.25
"""Rows wait until their number reaches this share of the number of columns, and `BLOCK`."""


@dataclass
class SecondMoments:
    """Sums over rows: the rows, their products, and their number; float64 (docs/method.md#innovation).

    Rows wait until there are so many that multiplying them takes longer than adding the products to the sums.

    Attributes:
        sums: "total", Σ x of shape (parts, columns); "products", Σ x xᵀ of shape (parts, columns, columns), on and
            above the diagonal; and "count". They cover all rows after a call of `flush`.

    Example:
        Rows (1, 2) and (3, 6) lie (-1, -2) and (1, 2) from their mean (2, 4).

        >>> moments = SecondMoments()
        >>> moments.add(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))
        >>> moments.flush()
        >>> moments.sums["total"].tolist(), moments.count
        ([[4.0, 8.0]], 2.0)
        >>> moments.covariance().tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    _waiting: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        """Add rows of shape (parts, rows, columns); they may wait until `flush`."""
        self._waiting.append(rows)
        if sum(part.shape[1] for part in self._waiting) >= max(BLOCK, WAIT * rows.shape[2]):
            self.flush()

    def flush(self) -> None:
        """Add the rows that wait to the sums: Σ x and Σ x xᵀ (docs/method.md#innovation)."""
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
        """Number of rows that were added; 0 at first."""
        self.flush()
        return float(self.sums["count"]) if self.sums else 0.0

    def covariance(self) -> Tensor:
        """Second moments about the mean: H = E[ã ãᵀ] = Σ x xᵀ / n − m mᵀ with m = Σ x / n (docs/method.md#innovation).

        Returns:
            Shape (parts, columns, columns).
        """
        self.flush()
        mean = self.sums["total"] / self.sums["count"].to(self.sums["total"].device)
        moments = mirror_(self.sums["products"] / self.sums["count"].to(self.sums["products"].device))
        return moments.baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1)


def about_mean(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract a point near their mean from rows: z = x − p, for the ã = a − E a of docs/method.md#innovation.

    Rows far from zero would lose digits when they are multiplied. The point p is the mean of about `BLOCK` of the rows,
    evenly spaced; with fewer rows than twice `BLOCK` it is the mean of all of them.

    Args:
        rows: shape (parts, rows, columns).

    Returns:
        z, in the precision of the rows; p, and Σ z over the rows, both of shape (parts, columns) and in float64.

    Example:
        >>> moved, point, total = about_mean(torch.tensor([[[1.0], [3.0], [8.0]]]))
        >>> moved.tolist(), point.tolist(), total.tolist()
        ([[[-3.0], [-1.0], [4.0]]], [[4.0]], [[0.0]])
    """
    some = rows[:, :: max(1, rows.shape[1] // BLOCK)]
    at = some.sum(1) / max(1, some.shape[1])
    rows = rows - at.unsqueeze(1)
    return rows, at.double(), sum_of_rows(rows)


def exact(x: Tensor) -> Tensor:
    """Convert a tensor to a precision that is fit for products, as for the energies of docs/method.md#relative.

    Formula: x → x, in float64 where it is float64 already, in float32 otherwise.

    Example:
        >>> exact(torch.tensor([1.5], dtype=torch.float16)).dtype, exact(torch.zeros(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return x if x.dtype == torch.float64 else x.float()
