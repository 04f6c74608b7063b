"""The modules that replace removed ones: the identity, zeros, or a linear map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import PlanError, RewrittenModuleError
from idap.structure.plan import CallForm
from idap.structure.replacement import IDENTITY, LAYER, PROJECTION, ZERO, Projected


class Pass(nn.Module):
    """Returns the stream as it is, and ignores other arguments, such as a mask, unless the result holds them.

    Args:
        takes: index or name of the argument that is the stream.
        gives: the form of the result: ("stream",), or a tuple or list of the stream, arguments and None.
    """

    def __init__(self, takes: int | str = 0, gives: Any = ("stream",)) -> None:
        super().__init__()
        self.takes, self.gives = takes, gives

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result in the form in which the removed module returned it."""
        return _fill(self.gives, self.stream(_argument(args, kwargs, self.takes)), args, kwargs)

    def stream(self, x: Tensor) -> Tensor:
        """The stream to return, here unchanged."""
        return x

    def extra_repr(self) -> str:
        """Empty if the stream is the first argument and the whole result."""
        return "" if (self.takes, self.gives) == (0, ("stream",)) else f"takes={self.takes!r}, gives={self.gives}"


class Zero(Pass):
    """Returns zeros like the stream: the last module of a removed branch, so that nothing is added."""

    def stream(self, x: Tensor) -> Tensor:
        """Zeros of the shape, dtype and device of `x`."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class LinearMap:
    """The linear map of a projection over all channels of the original; zero for channels that were removed.

    Attributes:
        weight: shape (outputs, inputs).
        bias: shape (outputs,).
    """

    weight: Tensor
    bias: Tensor

    def tensors(self, projected: Projected, path: str = "") -> dict[str, Tensor]:
        """Weight and bias in the shapes of a layer with all channels, by the names of `Projected.tensors`.

        Raises:
            PlanError: the sizes of the map differ from those of the original.
        """
        shapes = {name: kept.shape for name, kept in projected.tensors(path).items()}
        if (tuple(self.weight.shape), tuple(self.bias.shape)) != (projected.sizes, projected.sizes[:1]):
            raise PlanError(
                f"a linear map with weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)} was given for "
                f"{path or 'a projection'!r}, which has {projected.sizes[0]} outputs and {projected.sizes[1]} inputs "
                "in the original"
            )
        given = (self.weight, self.bias)
        return {name: tensor.reshape(shape) for (name, shape), tensor in zip(shapes.items(), given, strict=True)}


class Projection(Pass):
    """Returns a learned linear map of the stream's channels: a 1x1 convolution or a linear layer.

    Args:
        projected: sizes and stride. The map starts at zero.
        takes: as for `Pass`.
        gives: as for `Pass`.

    Attributes:
        map: the layer.
    """

    def __init__(self, projected: Projected, takes: int | str = 0, gives: Any = ("stream",)) -> None:
        super().__init__(takes, gives)
        inputs, outputs, stride = len(projected.inputs), len(projected.outputs), projected.stride
        # A layer without weights draws no random numbers, so that the state of the generator stays as it was.
        kinds = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        given = {"kernel_size": 1, "stride": stride} if stride else {}
        layer = kinds[len(stride)](inputs, outputs, device="meta", **given)
        layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))
        layer.bias = nn.Parameter(torch.zeros(outputs))
        self.add_module(LAYER, layer)

    @torch.no_grad()
    def take(self, given: LinearMap, projected: Projected) -> None:
        """Set the weights to those of a map, for the channels that `projected` keeps."""
        weight, bias = given.tensors(projected).values()
        outputs, inputs = list(projected.outputs), list(projected.inputs)
        self.get_parameter(f"{LAYER}.weight").copy_(weight[outputs][:, inputs])
        self.get_parameter(f"{LAYER}.bias").copy_(bias[outputs])

    def stream(self, x: Tensor) -> Tensor:
        """The stream with other channels, and at fewer positions if the layer has a stride."""
        mapped: Tensor = self.get_submodule(LAYER)(x)
        return mapped


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int | str) -> Any:
    """An argument by its index or its name; if nothing was passed that way, the first that was passed the other way."""
    held = args if isinstance(place, int) else kwargs
    if place in (range(len(held)) if isinstance(place, int) else held):
        return held[place]  # type: ignore[index]
    others = (*kwargs.values(),) if isinstance(place, int) else args
    if not others:
        raise RewrittenModuleError(
            f"a module that replaces a removed one was called without argument {place!r}, which it takes or returns "
            "according to its plan"
        )
    return others[0]


def _fill(gives: Any, stream: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    match gives:
        case ("stream",):
            return stream
        case ("none",):
            return None
        case ("given", place):
            return _argument(args, kwargs, place)
        case ("tuple", *items):
            return tuple(_fill(item, stream, args, kwargs) for item in items)
        case ("list", *items):
            return [_fill(item, stream, args, kwargs) for item in items]
    raise PlanError(f"a stand-in can't return {gives!r}")


_KINDS: Mapping[str, type[Pass]] = {IDENTITY: Pass, ZERO: Zero}


def trial_map(projected: Projected) -> LinearMap:
    """A map of random numbers from a fixed seed, to try a cut with."""
    draw = torch.Generator().manual_seed(0)
    outputs, inputs = projected.sizes
    weight = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
    return LinearMap(weight, torch.randn(outputs, generator=draw))


def check_stand_in(kind: str, projected: Projected | None) -> None:
    """Check that a removed module can become what a plan says.

    Args:
        kind: "identity", "zero" or "projection".
        projected: the sizes of the linear map that a projection computes.

    Raises:
        PlanError: the kind is unknown, a projection has no sizes, or another kind has sizes.
    """
    if kind not in (*_KINDS, PROJECTION):
        raise PlanError(f"a removed module can become 'identity', 'zero' or 'projection', found {kind!r}")
    if (kind == PROJECTION) != (projected is not None):
        raise PlanError(
            f"a removed module becomes {kind!r} {'with' if projected else 'without'} sizes of a linear map: only a "
            "projection takes them, and it needs them"
        )


def stand_in(kind: str, called: CallForm | None = None, projected: Projected | None = None) -> nn.Module:
    """Make the module that replaces a removed one.

    Args:
        kind: "identity", "zero" or "projection".
        called: how the removed module is called; None: the stream is its first argument and its whole result.
        projected: the sizes of the linear map that a projection computes.

    Raises:
        PlanError: see `check_stand_in`.
    """
    check_stand_in(kind, projected)
    given = () if called is None else (called.takes, called.gives)
    return _KINDS[kind](*given) if projected is None else Projection(projected, *given)
