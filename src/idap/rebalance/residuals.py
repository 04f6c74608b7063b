"""The correction of a layer that is too wide to be refitted: what it misses on average goes into its bias."""

from dataclasses import dataclass

from torch import Tensor

from idap.memory import Need
from idap.rebalance.moments import Fit, Moments


@dataclass
class Residuals:
    """Sums over rows of what a layer misses as it is; float64.

    Attributes:
        bias: of the layer, shape (parts, outputs).
        count: number of rows.
        total: sum of what is missing, shape (parts, outputs).
        squares: sum of its squares, shape (parts, outputs).
    """

    bias: Tensor
    count: float
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> "Residuals":
        """Sums over a batch.

        Args:
            x: what is read, shape (parts, rows, columns).
            y: what should come out, shape (parts, rows, outputs).
            weight: of the layer, shape (parts, outputs, columns).
            bias: of the layer, shape (parts, outputs).
        """
        missing = (y - x @ weight.to(x.dtype).transpose(1, 2)).double() - bias.unsqueeze(1)
        return cls(bias, float(x.shape[1]), missing.sum(1), missing.square().sum(1))

    def __add__(self, other: "Residuals") -> "Residuals":
        return Residuals(self.bias, self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def parts(self) -> int:
        """Independent parts of a grouped convolution; else 1."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """What is missing on average, shape (parts, outputs)."""
        return self.total / max(1.0, self.count)

    def error(self, _: Tensor, bias: Tensor) -> float:
        """Mean squared error over the rows, summed over the outputs, with the layer's own weight and some bias.

        Args:
            bias: shape (parts, outputs).
        """
        shift = bias - self.bias
        squares = self.squares.sum() - 2 * (shift * self.total).sum() + self.count * shift.square().sum()
        return float(squares.clamp_min(0)) / max(1.0, self.count)


def shift_need(parts: int, columns: int, outputs: int, rows: int) -> Need:
    """Estimate what it takes to correct the bias of a layer; the arguments are those of `fit_need`."""
    weights = columns * outputs
    return Need(solving=(8 + 4) * weights + 3 * 4 * rows * parts * columns + 3 * 8 * rows * outputs)


def fit_shift(learned: Residuals, held_out: Residuals, weight: Tensor, *, shift: bool) -> Fit | None:
    """Shift the bias of a layer by what it misses on average.

    Args:
        learned: rows to learn from.
        held_out: rows of other samples.
        weight: of the layer, shape (parts, outputs, columns).
        shift: whether the layer can add a bias.

    Returns:
        The layer with its weight as it was and its bias fitted on all rows; None if that is not better on the held-out
        samples.
    """
    if not shift or not learned.count or not held_out.count:
        return None
    before, after = (held_out.error(weight, bias) for bias in (learned.bias, learned.bias + learned.mean))
    if not after < before:
        return None
    return Fit(weight, learned.bias + (learned + held_out).mean, before=before, after=after, ridge=float("inf"))


Sums = Moments | Residuals
"""What is summed up of a layer while data go by."""
