"""A linear map of the channels in place of a removed module: its sizes, and which channels of either side stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idap.errors import PlanError
from idap.structure.strict import items, sizes

PROJECTION = "projection"
"""What such a module is replaced by (beside "identity" and "zero")."""

LAYER = "map"
"""Name of the layer inside of the stand-in."""


@dataclass(frozen=True)
class Kept:
    """A tensor, and what stays of it.

    Attributes:
        shape: with all channels of the original.
        slots: dimension -> slots kept, ascending; dimensions that are not named stay whole.
    """

    shape: tuple[int, ...]
    slots: Mapping[int, tuple[int, ...]]

    @property
    def shape_after(self) -> tuple[int, ...]:
        """The shape of what stays."""
        return tuple(len(self.slots.get(dim, range(size))) for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class Projected:
    """A linear map in place of a module, in the channels that the module had in the original.

    Attributes:
        inputs: channels of the module's input that it reads, ascending.
        outputs: channels of the module's output that it writes, ascending.
        sizes: how many outputs and inputs the original has.
        stride: of the 1x1 convolution over channels in dimension 1, one number per spatial dimension; empty: a linear
            map of the last dimension.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sizes: tuple[int, int]
    stride: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, kept, size in (("outputs", self.outputs, self.sizes[0]), ("inputs", self.inputs, self.sizes[1])):
            if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
                raise PlanError(
                    f"a projection keeps {name} {_short(kept)}; expected ascending numbers from 0 to {size - 1}, at "
                    "least one"
                )
        if len(self.stride) > 3 or any(step < 1 for step in self.stride):
            raise PlanError(f"a projection has stride {self.stride}; expected none, or 1 to 3 numbers of at least 1")

    @property
    def dim(self) -> int:
        """The dimension of the channels in the input and in the output; -1 is the last one."""
        return 1 if self.stride else -1

    def tensors(self, path: str = "") -> dict[str, "Kept"]:
        """The tensors that the layer adds to a model where it stands in for the module at `path`, by name.

        Without a path their names in the stand-in.

        >>> weight, bias = Projected((0,), (0, 2), (3, 1), (2, 2)).tensors("layer2.0").items()
        >>> weight
        ('layer2.0.map.weight', Kept(shape=(3, 1, 1, 1), slots={0: (0, 2), 1: (0,)}))
        >>> bias
        ('layer2.0.map.bias', Kept(shape=(3,), slots={0: (0, 2)}))
        """
        taps, layer = (1,) * len(self.stride), f"{path}.{LAYER}" if path else LAYER
        return {
            f"{layer}.weight": Kept((*self.sizes, *taps), {0: self.outputs, 1: self.inputs}),
            f"{layer}.bias": Kept(self.sizes[:1], {0: self.outputs}),
        }

    @property
    def attributes(self) -> dict[str, int]:
        """The ints by which the layer knows its sizes."""
        names = ("in_channels", "out_channels") if self.stride else ("in_features", "out_features")
        return dict(zip(names, (len(self.inputs), len(self.outputs)), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain lists; `from_json` reads them back."""
        names = ("inputs", "outputs", "sizes", "stride")
        return {name: list(getattr(self, name)) for name in names}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Projected":
        """Read what `to_json` wrote.

        Raises:
            PlanError: a number is out of range.
            KeyError, TypeError, ValueError: a part is missing or of the wrong type.
        """
        given = {name: sizes(value) for name, value in items(data)}
        outputs, inputs = given["sizes"]
        return cls(given["inputs"], given["outputs"], (outputs, inputs), given["stride"])


def _short(kept: Sequence[int]) -> str:
    return f"{list(kept[:8])}{' …' if len(kept) > 8 else ''}"
