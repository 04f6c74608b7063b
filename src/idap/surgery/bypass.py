"""What stands in for a removed module."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import PlanError
from idap.structure.plan import Called
from idap.structure.remains import IDENTITY, ZERO


class Pass(nn.Module):
    """Returns the stream that it is given, whatever else it is given, such as a mask.

    Args:
        takes: place or name of the argument that is the stream.
        gives: what is returned: ("stream",), or a tuple or list with it, with arguments handed on, and with None.
    """

    def __init__(self, takes: int | str = 0, gives: Any = ("stream",)) -> None:
        super().__init__()
        self.takes, self.gives = takes, gives

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the removed module returned, with the stream as it came."""
        return _filled(self.gives, self.stream(_argument(args, kwargs, self.takes)), args, kwargs)

    def stream(self, x: Tensor) -> Tensor:
        """What becomes of the stream."""
        return x

    def extra_repr(self) -> str:
        """Nothing in the ordinary case."""
        return "" if (self.takes, self.gives) == (0, ("stream",)) else f"takes={self.takes!r}, gives={self.gives}"


class Zero(Pass):
    """Returns zeros like the stream: the last module of a removed branch, so that nothing is added."""

    def stream(self, x: Tensor) -> Tensor:
        """Zeros of the shape, dtype and device of `x`."""
        return torch.zeros_like(x)


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int | str) -> Any:
    if isinstance(place, int):
        return args[place] if place < len(args) else next(iter(kwargs.values()))
    return kwargs[place] if place in kwargs else args[0]


def _filled(gives: Any, stream: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    match gives:
        case ("stream",):
            return stream
        case ("none",):
            return None
        case ("given", place):
            return _argument(args, kwargs, place)
        case ("tuple", *items):
            return tuple(_filled(item, stream, args, kwargs) for item in items)
        case ("list", *items):
            return [_filled(item, stream, args, kwargs) for item in items]
    raise PlanError(f"a stand-in can't return {gives!r}")


def stand_in(kind: str, called: Called | None = None) -> nn.Module:
    """The module that replaces a removed one.

    Args:
        kind: "identity" or "zero".
        called: how the removed module is called; None: with the stream first, and it returns the stream alone.

    Raises:
        PlanError: the kind is unknown.
    """
    kinds = {IDENTITY: Pass, ZERO: Zero}
    if kind not in kinds:
        raise PlanError(f"a removed module can become 'identity' or 'zero', found {kind!r}")
    return kinds[kind]() if called is None else kinds[kind](called.takes, called.gives)
