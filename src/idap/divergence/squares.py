"""Sums of squares of large tensors, a piece at a time."""

import torch
from torch import Tensor

PIECE = 2**19
"""Numbers whose squares stay in the cache of a CPU."""


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
