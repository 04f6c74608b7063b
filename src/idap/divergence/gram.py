"""Second moments of what a contraction reads: the matrix whose rows are positions and whose columns are its inputs.

For a convolution a row is an unfolded patch: the inputs under all taps of the kernel. The matrix itself is never held;
batch by batch some of its rows are drawn and their products added up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from idap.divergence.squares import BLOCK, add_products, mirrored_, sum_of_rows
from idap.graph.ir import Node
from idap.graph.rules import Contraction
from idap.graph.rules.flow import arguments, base_name

WAIT = 0.25
"""As many rows as this share of the columns are multiplied at once."""


class _Side(NamedTuple):
    """How a kernel goes along one spatial dimension.

    Attributes:
        taps: extent of the kernel.
        stride: from one position to the next.
        apart: from one tap to the next.
        padding: before and after the input.
        positions: of the output.
    """

    taps: int
    stride: int
    apart: int
    padding: tuple[int, int]
    positions: int


@dataclass(frozen=True)
class Rows:
    """Draws rows of the matrix that a contraction multiplies by its weights.

    Attributes:
        contraction: what it does.
        node: the operator.
        limit: most rows drawn from one batch.
    """

    contraction: Contraction
    node: Node
    limit: int

    @property
    def known(self) -> bool:
        """Whether this kind of contraction can be unfolded; transposed convolutions and single samples can't."""
        kind, place = self.contraction.kind, self.contraction.input_dim
        return kind == "linear" or (place == 1 and base_name(self.node.op) in ("conv1d", "conv2d", "conv3d"))

    @property
    def paired(self) -> bool:
        """Whether what comes out has its rows in the order of what is read; an einsum may exchange them."""
        return self.known and self.contraction.paired

    def choose(self, x: Tensor, weight: Tensor, valid: Callable[[Tensor], Tensor | None], seed: int) -> Tensor:
        """Which positions of a batch are drawn: all, or a random choice without repetition, in order.

        Args:
            x: the input.
            weight: as the call is given it.
            valid: gives the flat positions of a tensor with its channels last that are no padding; None for all.
            seed: of the draw.
        """
        if self.contraction.kind == "linear":
            last = x.movedim(self.contraction.input_dim, -1)
            return self._draw(valid(last), last.numel() // max(1, last.shape[-1]), seed)
        return self._draw(None, len(x) * self._extent(x, weight), seed)

    def choose_outputs(self, y: Tensor, valid: Callable[[Tensor], Tensor | None], seed: int) -> Tensor:
        """The same from the output: its positions."""
        last = y.movedim(self.contraction.output_dim, -1)
        counted = valid(last) if self.contraction.kind == "linear" else None
        return self._draw(counted, last.numel() // max(1, last.shape[-1]), seed)

    def _draw(self, counted: Tensor | None, count: int, seed: int) -> Tensor:
        """All of so many positions, or of those that count, or a random choice."""
        if counted is not None:
            count = len(counted)
        chosen = torch.arange(count)
        if count > self.limit:
            draw = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(count, generator=draw)[: self.limit].sort().values
        return chosen if counted is None else counted[chosen]

    def of(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """The rows at chosen positions, shape (parts, rows, columns); columns in the order of the flat weight."""
        rows = self.by_tap(x, weight, chosen)
        if self.contraction.kind == "linear":
            return rows
        apart = rows.reshape(*rows.shape[:2], prod(weight.shape[2:]), -1)
        return apart.transpose(2, 3).flatten(2)

    def by_tap(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """The same with all columns of a kernel's tap side by side, which takes one copy less of all rows.

        Args:
            x: the input; of a contraction in one part some of its channels will do.
            weight: as the call is given it.
            chosen: positions.
        """
        if self.contraction.kind == "linear":
            flat = x.movedim(self.contraction.input_dim, -1)
            return exact(flat.reshape(-1, flat.shape[-1])[chosen.to(x.device)]).unsqueeze(0)
        sides = self._sides(x, weight)
        padded = F.pad(x, [pad for side in reversed(sides) for pad in side.padding])  # torch wants the last one first
        flat = padded.movedim(1, -1).reshape(-1, x.shape[1])  # a row per place: whole rows are copied fast
        places = torch.unravel_index(chosen.to(x.device), (len(x), *(side.positions for side in sides)))
        first, taps = places[0], torch.zeros(1, dtype=torch.long, device=x.device)
        for side, extent, place in zip(sides, padded.shape[2:], places[1:], strict=True):
            first = first * extent + place * side.stride
            within = side.apart * torch.arange(side.taps, device=x.device)
            taps = (taps.unsqueeze(1) * extent + within).ravel()
        taken = exact(flat[(first.unsqueeze(1) + taps).ravel()])
        parts = max(1, x.shape[1] // weight.shape[1])
        return taken.reshape(len(chosen), len(taps), parts, -1).permute(2, 0, 1, 3).flatten(2)

    def _extent(self, x: Tensor, weight: Tensor) -> int:
        """Number of positions in the output for one sample of a convolution."""
        return prod(side.positions for side in self._sides(x, weight))

    def outputs(self, y: Tensor, chosen: Tensor) -> Tensor:
        """The outputs at the same positions, shape (rows, outputs)."""
        flat = y.movedim(self.contraction.output_dim, -1)
        return exact(flat.reshape(-1, flat.shape[-1])[chosen.to(y.device)])

    def matrix(self, weight: Tensor, parts: int) -> Tensor:
        """The weight as matrices, shape (parts, outputs of a part, columns)."""
        flat = weight.movedim(self.contraction.write_dim, 0)
        flat = flat if self.contraction.kind == "conv" else flat.reshape(len(flat), -1)
        return flat.reshape(parts, len(flat) // parts, -1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Matrices back in the shape of the weight."""
        first = like.movedim(self.contraction.write_dim, 0)
        return matrix.reshape(first.shape).movedim(0, self.contraction.write_dim)

    def _sides(self, x: Tensor, weight: Tensor) -> list["_Side"]:
        """How the kernel goes along each spatial dimension of the input."""
        given = arguments(self.node)
        kernel = weight.shape[2:]
        stride, dilation = (_each(given[name], len(kernel)) for name in ("stride", "dilation"))
        padding = _padding(given["padding"], kernel, dilation)
        sides = []
        for extent, taps, step, apart, pads in zip(x.shape[2:], kernel, stride, dilation, padding, strict=True):
            room = extent + sum(pads) - (taps - 1) * apart
            sides.append(_Side(taps, step, apart, pads, (room - 1) // step + 1))
        return sides


@dataclass
class Gram:
    """Sums over rows: the rows, their products, and their number; float64.

    Rows wait until there are enough for their products to cost more than adding these up.

    Attributes:
        sums: "total" of shape (parts, columns), "products" of shape (parts, columns, columns), on and above the
            diagonal, "count"; of all rows once `settle` was called.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    _waiting: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        """Add rows of shape (parts, rows, columns)."""
        self._waiting.append(rows)
        if sum(part.shape[1] for part in self._waiting) >= max(BLOCK, WAIT * rows.shape[2]):
            self.settle()

    def settle(self) -> None:
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
        self.settle()
        return float(self.sums["count"]) if self.sums else 0.0

    def centred(self) -> Tensor:
        """Second moments about the mean, shape (parts, columns, columns)."""
        self.settle()
        mean = self.sums["total"] / self.sums["count"].to(self.sums["total"].device)
        moments = mirrored_(self.sums["products"] / self.sums["count"].to(self.sums["products"].device))
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


def _each(value: Any, count: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * count if len(values) == 1 else values


def _padding(given: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after each dimension."""
    if given == "same":
        totals = [apart * (size - 1) for size, apart in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in ([0] * len(kernel) if given == "valid" else _each(given, len(kernel)))]
