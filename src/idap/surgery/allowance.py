"""How much the code of a plan may make: a bound on what each call of a rewritten module asks of memory and time.

Plans come from strangers, and a program of a few lines could ask for any amount of memory. So where a module is called
with sizes that it was not called with before, each step is first computed on torch's meta device, which takes no
memory, and counted: what it makes, what it makes on the way, and how often it multiplies.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import RewrittenModuleError
from idap.graph.ir import ARITHMETIC
from idap.surgery.effort import effort_of

LEAST = 2**26
"""Elements that all steps of a call may make together, however small the module is."""

TIMES = 1024
"""They may make so many times the largest tensor at hand, or as many times as the widest dimension has slots."""

PRODUCTS = 2**12
"""Multiplications and comparisons that may be made for each element that may be made."""

SMALLEST = 512
"""Elements that a tensor counts for at least: an empty one takes memory too."""

LARGEST_SIZE = 2**48
"""No size that a program computes may be larger."""

_META = torch.device("meta")
_BY_CONTENT = ("torch.Tensor.__getitem__", "torch.Tensor.__setitem__")
"""Functions whose result may depend on the content of a mask."""

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of the tensors in what a module returned."""


class Allowance:
    """What one call of a rewritten module may still make.

    Args:
        module: the rewritten module.
        given: the tensors and whole numbers that it was called with.
        known: what the modules that it calls returned when it was called with the same sizes before; None if it never
            was.

    Attributes:
        fast: whether nothing needs to be counted, as all sizes are those of an earlier call.
        by_content: whether a step made a result whose size depends on the content of a mask.
        shapes: what the modules that it called returned, in order.
    """

    def __init__(self, module: nn.Module, given: Sequence[Any], known: Sequence[Shapes] | None = None) -> None:
        self.fast = known is not None
        self.by_content = False
        self.shapes: list[Shapes] = []
        self._known = known or ()
        self._module, self._given = module, given
        self._total = self._made = self._products = 0

    @property
    def total(self) -> int:
        """Elements that the steps may make together."""
        if not self._total:
            largest = widest = 0
            for tensor in (*self._given, *self._module.parameters(), *self._module.buffers()):
                if isinstance(tensor, Tensor):
                    largest, widest = max(largest, tensor.numel()), max(widest, *tensor.shape, 0)
            self._total = max(LEAST, largest * max(TIMES, widest))
        return self._total

    def hand_on(self, name: str, result: Any) -> Any:
        """Look at what a module returned, and give it back; other sizes than before must be counted from here on."""
        shapes = tuple(tuple(tensor.shape) for tensor in _tensors(result))
        if self.fast and (len(self.shapes) >= len(self._known) or self._known[len(self.shapes)] != shapes):
            self.fast = False
        self.shapes.append(shapes)
        return result if self.fast else self.note(name, result)

    def call(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, makes: bool
    ) -> Any:
        """Call a function, once its result is known to be small enough.

        Args:
            name: of the function, for messages.
            function: one that a program may call.
            args: positional arguments.
            kwargs: keyword arguments.
            makes: whether it makes tensors of numbers alone, on a device that it is told.

        Raises:
            RewrittenModuleError: the call would make too much, or can't be computed.
        """
        if all(tensor.layout == torch.strided and not tensor.is_nested for tensor in _tensors((args, kwargs))):
            # Neither modes that count calls, such as a probe of ours or a counter of FLOPs, nor hooks hear of this.
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
                device = {"device": _META} if makes else {}
                self._count(name, function, _on_meta(args), {**_on_meta(kwargs), **device})
        return function(*args, **kwargs)

    def _count(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if name in _BY_CONTENT and _one_mask(args[1]):
                self.by_content = True
                self.take(name, args[0].numel())
                return
            kind = type(self._module).__name__
            raise RewrittenModuleError(
                f"the new code of this {kind} can't compute {name} with what it was given: {error}"
            ) from error
        beside, products = effort_of(name, args, kwargs, _tensors(result))
        self._products += products
        self.take(name, beside)
        self.note(name, result)

    def note(self, name: str, result: Any) -> Any:
        """Count what a step made, and give it back."""
        self.take(name, sum(max(tensor.numel(), SMALLEST) for tensor in _tensors(result)))
        return result

    def take(self, name: str, elements: int) -> None:
        """Count elements that a step makes.

        Raises:
            RewrittenModuleError: all steps together make too many.
        """
        self._made += elements
        if self._made > self.total or self._products > PRODUCTS * self.total:
            raise RewrittenModuleError(
                f"the new code of this {type(self._module).__name__} would make {self._made:,} numbers in "
                f"{self._products:,} multiplications up to {name}; for what the module holds and was given, "
                f"{self.total:,} numbers are the most, and {PRODUCTS:,} multiplications for each. A plan that idap "
                "wrote does not come near that: do not use this one."
            )


class Unlimited:
    """What code may make while it is traced into another form: nothing is counted."""

    fast = True

    def hand_on(self, _name: str, result: Any) -> Any:
        """Give back what a module returned."""
        return result


def calculate(symbol: str, *operands: int) -> int:
    """Arithmetic of sizes, from the left.

    Raises:
        RewrittenModuleError: a result is larger than any size, or no whole number.

    >>> calculate("*", 2, 3, 4), calculate("neg", 5), calculate("**", 2, 10)
    (24, -5, 1024)
    """
    if len(operands) == 1:
        return ARITHMETIC[symbol](operands[0])
    first = operands[0]
    for other in operands[1:]:
        if type(other) is int and symbol == "**" and not 0 <= other <= math.log2(LARGEST_SIZE):
            raise RewrittenModuleError(f"the new code of a module computes {first} to the power of {other}")
        if type(other) is int and symbol in ("//", "%") and other == 0:
            raise RewrittenModuleError(f"the new code of a module divides {first} by zero")
        first = ARITHMETIC[symbol](first, other)
        if type(first) is int and not -LARGEST_SIZE <= first <= LARGEST_SIZE:
            raise RewrittenModuleError("the new code of a module computes a size that is larger than any tensor's")
    return first


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple | list):
        return [tensor for item in tree for tensor in _tensors(item)]
    return [tensor for item in tree.values() for tensor in _tensors(item)] if isinstance(tree, Mapping) else []


def _on_meta(tree: Any) -> Any:
    """Arguments with tensors on the meta device in place of real ones, and that device in place of others."""
    if isinstance(tree, Tensor):
        return torch.empty_strided(tree.shape, tree.stride(), dtype=tree.dtype, device=_META)
    if type(tree) in (tuple, list):
        return type(tree)(_on_meta(item) for item in tree)
    if type(tree) is dict:
        return {key: _on_meta(item) for key, item in tree.items()}
    return _META if isinstance(tree, torch.device) else tree


def _one_mask(index: Any) -> bool:
    """Whether a mask is the only tensor of an index: then no more is picked than there is."""
    picked = _tensors(index)
    return len(picked) == 1 and picked[0].dtype == torch.bool
