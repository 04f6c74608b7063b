"""How much the code of a plan may make: a bound on what each call of a rewritten module asks of memory.

Plans come from strangers, and a program of a few lines could ask for any amount of memory. So where a module is called
with sizes that it was not called with before, each step is first computed on torch's meta device, which takes no
memory, and counted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from idap.errors import RewrittenModuleError
from idap.graph.ir import ARITHMETIC

LEAST = 2**26
"""Elements that all steps of a call may make together, however small the module is."""

TIMES = 1024
"""They may make so many times the largest tensor at hand, or as many times as the widest dimension has slots."""

LARGEST_SIZE = 2**48
"""No size that a program computes may be larger."""

_META = torch.device("meta")
_BY_CONTENT = frozenset({"torch.Tensor.__getitem__", "torch.Tensor.__setitem__"})
"""Functions whose result may depend on the content of a mask; it is no larger than what the mask lies on."""


class Allowance:
    """What one call of a rewritten module may still make.

    Args:
        module: the rewritten module.
        given: the tensors and whole numbers that it was called with.

    Attributes:
        total: elements that its steps may make together.
        by_content: whether a step made a result whose size depends on the content of a mask.
    """

    def __init__(self, module: nn.Module, given: Sequence[Any]) -> None:
        largest = widest = 0
        for tensor in (*given, *module.parameters(), *module.buffers()):
            if isinstance(tensor, Tensor):
                largest, widest = max(largest, tensor.numel()), max(widest, *tensor.shape, 0)
        self.total = max(LEAST, largest * max(TIMES, widest))
        self.by_content = False
        self._kind = type(module).__name__
        self._made = 0

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
            with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
                self._count(
                    name, function, _on_meta(args), {**_on_meta(kwargs), **({"device": _META} if makes else {})}
                )
        if name.endswith("scaled_dot_product_attention"):
            query, key = args[0], args[1]
            self.take(name, query.numel() // max(query.shape[-1], 1) * key.shape[-2])
        return function(*args, **kwargs)

    def _count(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if name in _BY_CONTENT and _masked((args, kwargs)):
                self.by_content = True
                self.take(name, args[0].numel())
                return
            raise RewrittenModuleError(
                f"the new code of this {self._kind} can't compute {name} with what it was given: {error}"
            ) from error
        self.note(name, result)

    def note(self, name: str, result: Any) -> Any:
        """Count what a function made; gives it back."""
        self.take(name, sum(tensor.numel() for tensor in _tensors(result)))
        return result

    def take(self, name: str, elements: int) -> None:
        """Count elements that a step makes.

        Raises:
            RewrittenModuleError: all steps together make too many.
        """
        self._made += elements
        if self._made > self.total:
            raise RewrittenModuleError(
                f"the new code of this {self._kind} would make {self._made:,} numbers up to {name}; for what the "
                f"module holds and was given, {self.total:,} are the most. A plan that idap wrote does not come near "
                "that: do not use this one."
            )


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


def _masked(tree: Any) -> bool:
    """Whether all tensors but the first are masks, or there is no other."""
    return all(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(tree)[1:])
