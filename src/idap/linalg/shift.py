"""Correct the bias of layers that are too wide to be refitted, by their mean residual (docs/method.md#rebalancing)."""

from dataclasses import dataclass

from torch import Tensor

from idap.linalg.ridge import Fit
from idap.memory import Need


@dataclass
class Residuals:
    """Sums over rows of the residuals e = y − W x − b of a layer as it is; float64 (docs/method.md#rebalancing).

    Attributes:
        bias: b, shape (parts, outputs).
        count: n, the number of rows.
        total: Σ e, shape (parts, outputs).
        squares: Σ e² of each output, shape (parts, outputs).

    Example:
        The layer x gives 1 and 3 for x = 1 and 3, where 2 and 6 are wanted: e = 1 and 3.

        >>> import torch
        >>> x, y = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [6.0]]])
        >>> found = Residuals.of(x, y, weight=torch.ones(1, 1, 1), bias=torch.zeros(1, 1).double())
        >>> found.count, found.total.item(), found.squares.item(), found.mean.item()
        (2.0, 4.0, 10.0, 2.0)
        >>> (found + found).squares.item()
        20.0
    """

    bias: Tensor
    count: float
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> "Residuals":
        """Sum up a batch: n, Σ e and Σ e² with e = y − W x − b (docs/method.md#rebalancing).

        Args:
            x: rows that are read, shape (parts, rows, columns).
            y: their targets, shape (parts, rows, outputs).
            weight: W of the layer, shape (parts, outputs, columns).
            bias: b of the layer, shape (parts, outputs).
        """
        missing = (y - x @ weight.to(x.dtype).transpose(1, 2)).double() - bias.unsqueeze(1)
        return cls(bias, float(x.shape[1]), missing.sum(1), missing.square().sum(1))

    def __add__(self, other: "Residuals") -> "Residuals":
        """The sums over the rows of both, for a layer with the same bias."""
        return Residuals(self.bias, self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def parts(self) -> int:
        """Number of independent parts of a grouped convolution; 1 for other layers."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean residual E e = Σ e / n (docs/method.md#rebalancing), shape (parts, outputs)."""
        return self.total / max(1.0, self.count)

    def error(self, _: Tensor, bias: Tensor) -> float:
        """Mean squared error over the rows, summed over the outputs, with the layer's own weight and another bias.

        Formula: E‖y − W x − b'‖² = (Σ e² − 2 d Σ e + n d²) / n with d = b' − b (docs/method.md#rebalancing).

        Args:
            bias: b', shape (parts, outputs).

        Returns:
            The error, at least 0.

        Example:
            Residuals 1 and 3 become -1 and 1 with a bias of 2.

            >>> import torch
            >>> x, y = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [6.0]]])
            >>> found = Residuals.of(x, y, weight=torch.ones(1, 1, 1), bias=torch.zeros(1, 1).double())
            >>> found.error(torch.ones(1, 1, 1), torch.tensor([[2.0]]).double())
            1.0
        """
        shift = bias - self.bias
        squares = self.squares.sum() - 2 * (shift * self.total).sum() + self.count * shift.square().sum()
        return float(squares.clamp_min(0)) / max(1.0, self.count)


def shift_need(parts: int, columns: int, outputs: int, rows: int) -> Need:
    """Estimate the memory that correcting the bias of a layer takes; the arguments are those of `fit_need`.

    Formula, in bytes, with p parts, c columns, o outputs and r rows: the weight takes 12 c o (float64 and float32), the
    rows 12 r p c (float32: as drawn, as part of a batch, and moved), the residuals 24 r o (float64). They are the
    residuals of docs/method.md#rebalancing.

    Returns:
        The bytes needed for a while.

    Example:
        >>> shift_need(parts=1, columns=10, outputs=2, rows=5).solving  # 240 + 600 + 240
        1080
    """
    weights = columns * outputs
    return Need(solving=(8 + 4) * weights + 3 * 4 * rows * parts * columns + 3 * 8 * rows * outputs)


def fit_shift(learned: Residuals, held_out: Residuals, weight: Tensor, *, shift: bool) -> Fit | None:
    """Shift the bias of a layer by its mean residual: b = b_old + E e (docs/method.md#rebalancing).

    Args:
        learned: sums over the rows to learn from.
        held_out: sums over rows of other samples, which decide whether the layer is changed.
        weight: weight of the layer, shape (parts, outputs, columns).
        shift: whether the layer can add a bias.

    Returns:
        The layer with its old weight, and with its bias fitted on all rows; None if the bias that was learned does not
        lower the error on the held-out rows.

    Example:
        The layer x misses 1 and 3 of the learned rows, so b = 2, and 2 of the held-out row; over all rows, b = 6 / 3.

        >>> import torch
        >>> weight, bias = torch.ones(1, 1, 1), torch.zeros(1, 1).double()
        >>> learned = Residuals.of(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [6.0]]]), weight, bias)
        >>> held_out = Residuals.of(torch.tensor([[[2.0]]]), torch.tensor([[[4.0]]]), weight, bias)
        >>> found = fit_shift(learned, held_out, weight, shift=True)
        >>> found.bias.item(), found.before, found.after
        (2.0, 4.0, 0.0)
    """
    if not shift or not learned.count or not held_out.count:
        return None
    before, after = (held_out.error(weight, bias) for bias in (learned.bias, learned.bias + learned.mean))
    if not after < before:
        return None
    return Fit(weight, learned.bias + (learned + held_out).mean, before=before, after=after, ridge=float("inf"))
