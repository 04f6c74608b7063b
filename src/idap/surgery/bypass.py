"""What stands in for a removed module."""

from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import PlanError
from idap.structure.remains import IDENTITY, ZERO


class Zero(nn.Module):
    """Returns zeros like its first input: the last module of a removed branch, so that nothing is added."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Zeros of the shape, dtype and device of `x`."""
        return torch.zeros_like(x)


class Pass(nn.Module):
    """Returns its first input whatever else it is given, such as a mask."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """`x` itself."""
        return x


def stand_in(kind: str) -> nn.Module:
    """The module that replaces a removed one.

    Args:
        kind: "identity" or "zero".

    Raises:
        PlanError: the kind is unknown.
    """
    if kind == IDENTITY:
        return Pass()
    if kind == ZERO:
        return Zero()
    raise PlanError(f"a removed module can become 'identity' or 'zero', found {kind!r}")
