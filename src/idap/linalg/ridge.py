"""Refit layers by least squares from sums, with the ridge that held-out rows prefer (docs/method.md#rebalancing)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idap.linalg.moments import STRIP, about_mean, add_products, mirror_
from idap.memory import Need

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, as multiples of the mean variance of a column."""


@dataclass
class Moments:
    """Sums over rows x that a layer reads and their targets y; float64 (docs/method.md#rebalancing).

    Attributes:
        count: n, the number of rows.
        x: Σ x, shape (parts, columns).
        y: Σ y, shape (parts, outputs).
        xx: Σ x xᵀ, shape (parts, columns, columns).
        xy: Σ x yᵀ, shape (parts, columns, outputs).
        yy: Σ y² of each output, shape (parts, outputs).

    Example:
        Rows x = 1 and 3 with the targets y = 2 and 4:

        >>> found = Moments.of(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [4.0]]]))
        >>> found.count, found.x.item(), found.y.item(), found.xx.item(), found.xy.item(), found.yy.item()
        (2.0, 4.0, 6.0, 10.0, 14.0, 20.0)
        >>> (found + found).xx.item()
        20.0
    """

    count: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Moments":
        """Sum up a batch: n, Σ x, Σ y, Σ x xᵀ, Σ x yᵀ and Σ y² (docs/method.md#rebalancing).

        Args:
            x: rows that are read, shape (parts, rows, columns).
            y: their targets, shape (parts, rows, outputs).
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
        """The sums over the rows of both."""
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def parts(self) -> int:
        """Number of independent parts of a grouped convolution; 1 for other layers."""
        return len(self.x)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of a layer over the rows, summed over the outputs: E‖y − W x − b‖².

        Source: docs/method.md#rebalancing; here it is expanded, so that it follows from the sums.

        Args:
            weight: W, shape (parts, outputs, columns).
            bias: b, shape (parts, outputs).

        Returns:
            The error, at least 0.

        Example:
            The layer 2 x gives 2 and 6 for x = 1 and 3, where 2 and 4 are wanted: (0² + 2²) / 2.

            >>> sums = Moments.of(torch.tensor([[[1.0], [3.0]]]).double(), torch.tensor([[[2.0], [4.0]]]).double())
            >>> sums.error(torch.tensor([[[2.0]]]).double(), torch.tensor([[0.0]]).double())
            2.0
        """
        through = self.xx @ weight.transpose(1, 2)  # (parts, columns, outputs)
        total = self.yy.sum() - 2 * (self.xy * weight.transpose(1, 2)).sum() + (through * weight.transpose(1, 2)).sum()
        total += 2 * ((weight @ self.x.unsqueeze(2)).squeeze(2) * bias).sum() - 2 * (self.y * bias).sum()
        total += self.count * bias.square().sum()
        return float(total.clamp_min(0)) / max(1.0, self.count)  # rounding may make it negative

    def central_moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Second moments about the means, for the least squares of docs/method.md#rebalancing.

        Returns:
            E[x̃ x̃ᵀ] of shape (parts, columns, columns) and E[x̃ ỹᵀ] of shape (parts, columns, outputs) with x̃ = x − E x
            and ỹ = y − E y; then E x, shape (parts, columns), and E y, shape (parts, outputs).

        Example:
            Rows x = 1 and 3 with the targets y = 2 and 4; x̃ = ỹ = -1 and 1.

            >>> sums = Moments.of(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [4.0]]]))
            >>> [value.item() for value in sums.central_moments()]
            [1.0, 1.0, 2.0, 3.0]
        """
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count
        for first in range(0, xx.shape[1], STRIP):
            strip = slice(first, first + STRIP)
            xx[:, strip] -= mean_x[:, strip].unsqueeze(2) * mean_x.unsqueeze(1)
        xy = self.xy / self.count - mean_x.unsqueeze(2) * mean_y.unsqueeze(1)
        return xx, xy, mean_x, mean_y


def fit_need(parts: int, columns: int, outputs: int, rows: int) -> Need:
    """Estimate the memory that refitting a layer takes.

    Formula, in bytes, with m = 8 p c² and v = 8 c o for p parts, c columns, o outputs and r rows: the two sums of
    `Moments` (float64) hold 2 (m + v); besides, the solution takes 3 m + 7 v, or adding a batch takes
    2 (m + v) + 12 r p c, where the rows (float32) count as drawn, as part of a batch, and moved. The larger of the two
    counts. The sums are those of docs/method.md#rebalancing.

    Args:
        parts: number of independent parts of a grouped convolution; 1 for other layers.
        columns: number of columns that each part reads.
        outputs: number of outputs of the layer.
        rows: most rows that are drawn from a batch.

    Returns:
        The bytes held, and the bytes needed besides them for a while.

    Example:
        >>> need = fit_need(parts=1, columns=10, outputs=2, rows=5)  # m = 800, v = 160
        >>> need.held, need.solving  # 2 (800 + 160); max(2400 + 1120, 1920 + 600)
        (1920, 3520)
    """
    # Solving: the centred moments and their factor, or the sum of both, centred, and its factor.
    xx, xy = 8 * parts * columns**2, 8 * columns * outputs
    return Need(held=2 * (xx + xy), solving=max(3 * xx + 7 * xy, 2 * xx + 2 * xy + 3 * 4 * rows * parts * columns))


@dataclass(frozen=True)
class Fit:
    """A corrected layer.

    Attributes:
        weight: W, shape (parts, outputs, columns).
        bias: b, shape (parts, outputs).
        before: error of the old layer on the held-out rows.
        after: error of the new layer on the held-out rows, before it was fitted on all rows.
        ridge: the chosen ridge; infinite if only the bias was fitted.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float
    ridge: float


def fit(
    learned: Moments, held_out: Moments, weight: Tensor, bias: Tensor, *, ridges: Sequence[float], shift: bool
) -> Fit | None:
    """Refit a layer by least squares with a ridge that pulls towards the old weights.

    Formula (docs/method.md#rebalancing): (W, b) = argmin E‖y − W x − b‖² + λ ‖W − W_old‖². λ is a ridge times the mean
    variance of a column. Each ridge is tried on the learned rows, and so is fitting the bias alone. The held-out rows
    choose one of these layers or the old one. The chosen layer is then fitted on all rows.

    Args:
        learned: sums over the rows to learn from.
        held_out: sums over rows of other samples, which choose the ridge.
        weight: W_old of the layer, shape (parts, outputs, columns).
        bias: bias of the layer, shape (parts, outputs).
        ridges: the ridges to try; if it is empty, only the bias is fitted.
        shift: whether the layer can add a bias; if not, b stays as it is.

    Returns:
        The new layer; None if no layer has a lower error on the held-out rows than the old one.

    Example:
        The layer 0 is fitted to y = 2 x at x = 1 and 3. There the variance of x is 1 and its covariance with y is 2, so
        with the ridge 1, W = 2 / (1 + 1) and b = 4 - 2. Held out is x = 3: the old layer gives 0 for 6, the new one 5.
        Over all rows, the means are 7/3 and 14/3, so b = 14/3 - 7/3.

        >>> learned = Moments.of(torch.tensor([[[1.0], [3.0]]]).double(), torch.tensor([[[2.0], [6.0]]]).double())
        >>> held_out = Moments.of(torch.tensor([[[3.0]]]).double(), torch.tensor([[[6.0]]]).double())
        >>> weight, bias = torch.zeros(1, 1, 1).double(), torch.zeros(1, 1).double()
        >>> found = fit(learned, held_out, weight, bias, ridges=[1.0], shift=True)
        >>> found.ridge, round(found.weight.item(), 3), round(found.bias.item(), 3)
        (1.0, 1.0, 2.333)
        >>> round(found.before, 3), round(found.after, 3)
        (36.0, 1.0)
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
    """Minimise the error on the rows with a ridge; None if the second moments can't be factored."""
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
