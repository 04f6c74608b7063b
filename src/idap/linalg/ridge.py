"""Least squares from sums: what a layer reads, what it should give, and the ridge that held-out samples prefer.

Of a layer that is too wide to be refitted, what it misses on average goes into its bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idap.linalg.moments import STRIP, about_mean, add_products, mirror_
from idap.memory import Need

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, as shares of the mean variance of a column."""


@dataclass
class Moments:
    """Sums over rows x of what is read and y of what should come out; float64.

    Attributes:
        count: number of rows.
        x: sum of rows, shape (parts, columns).
        y: sum of targets, shape (parts, outputs).
        xx: shape (parts, columns, columns).
        xy: shape (parts, columns, outputs).
        yy: sum of squares of the targets, shape (parts, outputs).
    """

    count: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Moments":
        """Sums over a batch.

        Args:
            x: shape (parts, rows, columns).
            y: shape (parts, rows, outputs).
        """
        count = x.shape[1]
        (x, at_x, sum_x), (y, at_y, sum_y) = about_mean(x), about_mean(y)
        products = sum_x.new_zeros((*sum_x.shape, sum_x.shape[1]))
        add_products(products, x, at_x, sum_x)
        crossed = sum_x.unsqueeze(2) * at_y.unsqueeze(1) + at_x.unsqueeze(2) * (sum_y + count * at_y).unsqueeze(1)
        return cls(
            float(count),
            sum_x + count * at_x,
            sum_y + count * at_y,
            mirror_(products),
            (x.transpose(1, 2) @ y).double() + crossed,
            y.square().sum(1, dtype=torch.float64) + (2 * sum_y + count * at_y) * at_y,
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def parts(self) -> int:
        """Independent parts of a grouped convolution; else 1."""
        return len(self.x)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of a layer over the rows, summed over the outputs.

        Args:
            weight: shape (parts, outputs, columns).
            bias: shape (parts, outputs).
        """
        through = self.xx @ weight.transpose(1, 2)  # (parts, columns, outputs)
        total = self.yy.sum() - 2 * (self.xy * weight.transpose(1, 2)).sum() + (through * weight.transpose(1, 2)).sum()
        total += 2 * ((weight @ self.x.unsqueeze(2)).squeeze(2) * bias).sum() - 2 * (self.y * bias).sum()
        total += self.count * bias.square().sum()
        return float(total.clamp_min(0)) / max(1.0, self.count)  # rounding may bring it below 0

    def central_moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Second moments about the means, those across, and the means of x and y."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count
        for first in range(0, xx.shape[1], STRIP):
            strip = slice(first, first + STRIP)
            xx[:, strip] -= mean_x[:, strip].unsqueeze(2) * mean_x.unsqueeze(1)
        xy = self.xy / self.count - mean_x.unsqueeze(2) * mean_y.unsqueeze(1)
        return xx, xy, mean_x, mean_y


def fit_need(parts: int, columns: int, outputs: int, rows: int) -> Need:
    """Estimate what it takes to refit a layer.

    Args:
        parts: independent parts of a grouped convolution; else 1.
        columns: that each part reads.
        outputs: of the layer.
        rows: that are drawn from a batch at most; counted as drawn, as part of a batch, and moved; float32.
    """
    # Two sums of moments; besides, the centred moments and their factor, or the sum of both, centred, and its factor.
    xx, xy = 8 * parts * columns**2, 8 * columns * outputs
    return Need(held=2 * (xx + xy), solving=max(3 * xx + 7 * xy, 2 * xx + 2 * xy + 3 * 4 * rows * parts * columns))


@dataclass(frozen=True)
class Fit:
    """A corrected layer.

    Attributes:
        weight: shape (parts, outputs, columns).
        bias: what is added to the outputs, shape (parts, outputs).
        before: error of the old layer on held-out samples.
        after: error of the new one there.
        ridge: that was chosen; infinite where only the bias was fitted.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float
    ridge: float


def fit(
    learned: Moments, held_out: Moments, weight: Tensor, bias: Tensor, *, ridges: Sequence[float], shift: bool
) -> Fit | None:
    """Refit a layer; the ridge is the one that held-out samples prefer, and pulls towards the old weights.

    Args:
        learned: rows to learn from.
        held_out: rows of other samples.
        weight: of the layer, shape (parts, outputs, columns).
        bias: of the layer, shape (parts, outputs).
        ridges: tried; none: only the bias is fitted.
        shift: whether the layer can add a bias.

    Returns:
        The new layer, fitted on all rows; None if nothing is better on the held-out samples than what there is.
    """
    if not learned.count or not held_out.count:
        return None
    old = held_out.error(weight, bias)
    best: tuple[float, float] = (old, float("nan"))
    for ridge in (*ridges, float("inf")):
        tried = _solve(learned, weight, bias, ridge, shift)
        error = old if tried is None else held_out.error(*tried)
        if error < best[0]:
            best = (error, ridge)
    if best[1] != best[1]:
        return None
    found = _solve(learned + held_out, weight, bias, best[1], shift)
    return None if found is None else Fit(*found, before=old, after=best[0], ridge=best[1])


def _solve(moments: Moments, weight: Tensor, bias: Tensor, ridge: float, shift: bool) -> tuple[Tensor, Tensor] | None:
    """Weights near the old ones and a bias that minimise the error on the rows; None if they can't be found."""
    if shift:
        xx, xy, mean_x, mean_y = moments.central_moments()
    else:
        xx, xy = moments.xx / moments.count, moments.xy / moments.count
        xy = xy - (moments.x / moments.count).unsqueeze(2) * bias.unsqueeze(1)
    if ridge < float("inf"):
        missing = xy - xx @ weight.transpose(1, 2)
        diagonal = xx.diagonal(dim1=1, dim2=2)
        diagonal.add_(ridge * diagonal.mean(1, keepdim=True).clamp_min(1e-30))  # in place: these matrices are large
        factor, failed = torch.linalg.cholesky_ex(xx)
        if bool(failed.any()):
            return None
        weight = weight + torch.cholesky_solve(missing, factor).transpose(1, 2)
    if shift:
        bias = mean_y - (weight @ mean_x.unsqueeze(2)).squeeze(2)
    return weight, bias


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
