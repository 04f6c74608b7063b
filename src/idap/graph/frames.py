"""What a module's own code did in one call, step by step: enough to write that code anew with other sizes.

Tensors are named by where they came from: ``module/function/file:line/k:position`` for a result of the k-th call of a
function in a line of a module's code, ``input:place`` for what the model was given, ``tensor:name`` for a parameter or
buffer. In argument trees a tensor is a `Ref` by that name and a size is an expression.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SameType:
    """A data type that the code read from a tensor and passes on."""


@dataclass(frozen=True)
class Unseen:
    """An argument of which nothing is known: a tensor from elsewhere, an object of another kind.

    Attributes:
        kind: its class.
    """

    kind: str


@dataclass(frozen=True)
class Built:
    """A container of a class of its own, such as a named tuple or an output of transformers.

    Attributes:
        kind: its class.
        items: by key or place.
    """

    kind: str
    items: Mapping[Any, Any]


@dataclass(frozen=True)
class Step:
    """One thing that a module's own code did: call a torch function, or another module.

    Attributes:
        function: name of the function in torch, such as ``torch.Tensor.view``, "" for the call of a module.
        module: path of the module that is called, "" for a function.
        args: positional arguments.
        kwargs: keyword arguments.
        results: for each tensor that is returned its place in the result and its name.
        place: names the eager call, "" for the call of a module.
    """

    function: str
    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[tuple[tuple[Any, ...], str], ...]
    place: str = ""


@dataclass(frozen=True)
class Frame:
    """One call of a module: what it was given, what its own code did, what it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    steps: tuple[Step, ...]
    output: Any
