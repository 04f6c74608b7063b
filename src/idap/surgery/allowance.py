"""How much the code of a plan may make: a bound on what each call of a rewritten module asks of memory and time.

Plans come from strangers, and a program of a few lines could ask for any amount of memory. So where a module is called
with sizes that it was not called with before, each step is first computed on torch's meta device, which takes no
memory, and counted: what it makes, what it makes on the way, and how often it multiplies.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import RewrittenModuleError
from idap.graph.ir import ARITHMETIC
from idap.surgery.effort import check_types, effort_of, parts_of

LEAST = 2**26
"""Elements that all steps of a call may make together, however small the module is."""

TIMES = 1024
"""They may make so many times the largest tensor at hand, or as many times as the widest dimension has slots."""

LARGE = 2**34
"""But no more than so many, or than `TIMES_ALL` times all tensors at hand together, where that is more."""

TIMES_ALL = 256

PRODUCTS = 2**12
"""Multiplications and comparisons that may be made for each element that may be made."""

MOST_STEPS = 2**20
"""Steps that one call may take, with those of the rewritten modules that it calls."""

SMALLEST = 512
"""Elements that a tensor counts for at least: an empty one takes memory too."""

LARGEST_SIZE = 2**48
"""No size that a program computes may be larger."""

_META = torch.device("meta")
_BY_CONTENT = ("torch.Tensor.__getitem__", "torch.Tensor.__setitem__")
"""Functions whose result may depend on the content of a mask."""

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of the tensors in what a module returned."""

_OUTERMOST: ContextVar["Allowance | None"] = ContextVar("outermost", default=None)
"""The allowance of the rewritten module whose call began first, among those that are running."""


@dataclass
class Count:
    """What the steps of a call amount to.

    Attributes:
        elements: that they make.
        products: multiplications and comparisons.
        steps: how many there are.
    """

    elements: int = 0
    products: int = 0
    steps: int = 0

    def add(self, other: "Count") -> None:
        """Add another count to this one."""
        self.elements += other.elements
        self.products += other.products
        self.steps += other.steps

    def since(self, earlier: "Count") -> "Count":
        """What was added since this count was as an earlier one."""
        return Count(self.elements - earlier.elements, self.products - earlier.products, self.steps - earlier.steps)


@dataclass(frozen=True)
class Known:
    """What is known of a call of a rewritten module with certain sizes.

    Attributes:
        shapes: what the modules that it calls return, in order.
        count: what all steps amount to, also those of the rewritten modules that it calls.
    """

    shapes: tuple[Shapes, ...]
    count: Count


class Allowance:
    """What one call of a rewritten module may still make; rewritten modules within it share what it may.

    Args:
        module: the rewritten module.
        given: the tensors and whole numbers that it was called with.
        known: what is known of calls with the same sizes; None if there were none.
        steps: how many steps the module takes.

    Attributes:
        fast: whether nothing needs to be counted, as all sizes are those of an earlier call.
        by_content: whether a step made a result whose size depends on the content of a mask.
    """

    def __init__(self, module: nn.Module, given: Sequence[Any], known: Known | None = None, *, steps: int = 0) -> None:
        self.fast = known is not None
        self.by_content = False
        self._shapes: list[Shapes] = []
        self._known = known
        self._module, self._given = module, given
        self._count, self._outer = Count(), self
        self._total = 0
        self._steps = steps
        self._before = Count()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """While the module runs: what it makes, and what the rewritten modules within it make, counts as one."""
        outermost = _OUTERMOST.get()
        token = None if outermost is not None else _OUTERMOST.set(self)
        self._outer = outermost or self
        self._before = replace(self._outer._count)
        try:
            if self._known is None:
                self._spend(Count(steps=self._steps), "its first step")
            elif not self._outer.fast:
                self._spend(self._known.count, "its first step")
            yield
        finally:
            if token is not None:
                _OUTERMOST.reset(token)

    @property
    def known(self) -> Known:
        """What is known of such calls, once the module ran."""
        return Known(tuple(self._shapes), self._outer._count.since(self._before))

    @property
    def total(self) -> int:
        """Elements that the steps may make together."""
        if not self._total:
            largest = widest = together = 0
            for tensor in (*self._given, *self._module.parameters(), *self._module.buffers()):
                if isinstance(tensor, Tensor):
                    largest, widest = max(largest, tensor.numel()), max(widest, *tensor.shape, 0)
                    together += tensor.numel()
            generous = min(largest * max(TIMES, widest), LARGE)
            self._total = max(LEAST, generous, together * TIMES_ALL)
        return self._total

    def hand_on(self, name: str, result: Any) -> Any:
        """Look at what a module returned, and give it back; other sizes than before must be counted from here on."""
        shapes = tuple(tuple(tensor.shape) for tensor in _tensors(result))
        before = self._known.shapes if self._known else ()
        if self.fast and (len(self._shapes) >= len(before) or before[len(self._shapes)] != shapes):
            self.fast = False
        self._shapes.append(shapes)
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
                self._estimate(name, function, _on_meta(args), {**_on_meta(kwargs), **device})
        return function(*args, **kwargs)

    def _estimate(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Compute a call on the meta device, and count what it makes."""
        try:
            self._spend(Count(elements=SMALLEST * parts_of(name, args, kwargs)), name)
            check_types(name, args, kwargs)
            result = function(*args, **kwargs)
        except RewrittenModuleError:
            raise
        except Exception as error:
            if name in _BY_CONTENT and len(args) > 1 and _one_mask(args[1]):
                self.by_content = True
                self._spend(Count(elements=args[0].numel()), name)
                return
            kind = type(self._module).__name__
            raise RewrittenModuleError(
                f"the new code of this {kind} can't compute {name} with what it was given: {error}"
            ) from error
        beside, products = effort_of(name, args, kwargs, _tensors(result))
        self._spend(Count(beside, products), name)
        self.note(name, result)

    def note(self, name: str, result: Any) -> Any:
        """Count what a step made, and give it back."""
        self._spend(Count(sum(map(_elements, _tensors(result)))), name)
        return result

    def _spend(self, count: Count, name: str) -> None:
        """Count what a step makes.

        Raises:
            RewrittenModuleError: all steps together make too many elements, multiply too often, or are too many.
        """
        outer = self._outer
        outer._count.add(count)
        spent = outer._count
        if spent.elements > outer.total or spent.products > PRODUCTS * outer.total or spent.steps > MOST_STEPS:
            raise RewrittenModuleError(
                f"the new code of this {type(outer._module).__name__} would make {spent.elements:,} numbers in "
                f"{spent.products:,} multiplications and {spent.steps:,} steps up to {name}; for what the module holds "
                f"and was given, {outer.total:,} numbers are the most, with {PRODUCTS:,} multiplications for each, and "
                f"{MOST_STEPS:,} steps. A plan that idap wrote does not come near that: do not use this one."
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


def tensor_of(name: str, result: Any) -> Tensor:
    """A value of a program, which must be a tensor: functions take other things apart in ways that nobody counts.

    Raises:
        RewrittenModuleError: it is something else.
    """
    if not isinstance(result, Tensor):
        raise RewrittenModuleError(
            f"the new code of a module takes what {name} returned for a tensor, found a {type(result).__name__}"
        )
    return result


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple | list):
        return [tensor for item in tree for tensor in _tensors(item)]
    return [tensor for item in tree.values() for tensor in _tensors(item)] if isinstance(tree, Mapping) else []


def _elements(tensor: Tensor) -> int:
    """What a tensor counts for; of an empty one its other dimensions, over which functions may loop all the same."""
    elements = tensor.numel()
    if not elements:
        elements = 1
        for size in tensor.shape:
            elements *= max(size, 1)
    return max(elements, SMALLEST)


_PLAIN = (int, float, bool, str, torch.dtype, torch.memory_format, torch.SymInt, type(None), type(...))


def _on_meta(tree: Any) -> Any:
    """Arguments with tensors on the meta device in place of real ones, and that device in place of others."""
    if isinstance(tree, Tensor):
        return torch.empty_strided(tree.shape, tree.stride(), dtype=tree.dtype, device=_META)
    if type(tree) in (tuple, list):
        return type(tree)(_on_meta(item) for item in tree)
    if type(tree) is dict:
        return {key: _on_meta(item) for key, item in tree.items()}
    if isinstance(tree, torch.device):
        return _META
    if not isinstance(tree, _PLAIN) and type(tree) is not slice:
        raise RewrittenModuleError(f"the new code of a module hands on a {type(tree).__name__}")
    return tree


def _one_mask(index: Any) -> bool:
    """Whether a mask is the only tensor of an index: then no more is picked than there is."""
    picked = _tensors(index)
    return len(picked) == 1 and picked[0].dtype == torch.bool
