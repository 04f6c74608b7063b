"""Bound the memory and the time that each call of a rewritten module may take.

Plans may come from strangers, and a program of a few lines could ask for any amount of memory. So when a module is
called with new sizes, each step is first computed on torch's meta device, which takes no memory. The elements of its
results, its temporary elements and its multiplications are counted.
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
from idap.surgery.effort import effort_of, parts_of, tensors_in

LEAST = 2**26
"""Elements that all steps of a call may make together, however small the module is."""

TIMES = 1024
"""They may make this many times the elements of the largest tensor at hand, or, if that is more, as many times as the
widest dimension has slots."""

LARGE = 2**34
"""But they may make no more than this, or than `TIMES_ALL` times the elements of all tensors at hand together, if that
is more."""

TIMES_ALL = 256
"""See `LARGE`."""

PRODUCTS = 2**12
"""Multiplications and comparisons that may be made for each element that may be made."""

MOST_STEPS = 2**20
"""Steps that one call may take, including those of the rewritten modules that it calls."""

SMALLEST = 512
"""Elements that each tensor counts for at least: even an empty one takes memory."""

LARGEST_SIZE = 2**48
"""The largest size that a program may compute."""

_META = torch.device("meta")
_BY_CONTENT = ("torch.Tensor.__getitem__", "torch.Tensor.__setitem__")
"""Functions whose result may have a shape that depends on the content of a mask."""

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of the tensors that a module returned."""

_OUTERMOST: ContextVar["Allowance | None"] = ContextVar("outermost", default=None)
"""The allowance of the outermost rewritten module among those that are running."""


@dataclass
class Count:
    """The counted work of the steps of a call.

    Attributes:
        elements: number of elements that the steps make.
        products: number of multiplications and comparisons.
        steps: number of steps.
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
        """The difference between this count and an earlier state of it."""
        return Count(self.elements - earlier.elements, self.products - earlier.products, self.steps - earlier.steps)


@dataclass(frozen=True)
class Known:
    """What was counted in an earlier call of a rewritten module with the same sizes.

    Attributes:
        shapes: shapes of what the modules that it calls returned, in the order of the calls.
        count: the work of all steps, including those of the rewritten modules that it calls.
    """

    shapes: tuple[Shapes, ...]
    count: Count


class Allowance:
    """Counts the work of one call of a rewritten module and bounds it; rewritten modules within it share the bound.

    Args:
        module: the rewritten module.
        given: the tensors and whole numbers that it was called with.
        known: what an earlier call with the same sizes counted; None if there was none.
        steps: how many steps the module takes.

    Attributes:
        fast: whether nothing needs to be counted, because all sizes are those of an earlier call.
        by_content: whether a size depends on more than the sizes of the inputs, such as the content of a mask, so that
            what was counted does not hold for the next call.
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
        self._known_is_spent = False

    @contextmanager
    def enter_call(self) -> Iterator[None]:
        """A context for a run of the module: its work and that of rewritten modules within it are counted together."""
        outermost = _OUTERMOST.get()
        token = None if outermost is not None else _OUTERMOST.set(self)
        self._outer = outermost or self
        self._before = replace(self._outer._count)
        try:
            if self._known is None:
                self._spend(Count(steps=self._steps), "its first step")
            elif not self._outer.fast:
                self._spend_known()
            yield
        finally:
            if token is not None:
                _OUTERMOST.reset(token)

    def _spend_known(self) -> None:
        """Add all that such a call made before, once."""
        if self._known is not None and not self._known_is_spent:
            self._known_is_spent = True
            self._spend(self._known.count, "its first step")

    @property
    def known(self) -> Known:
        """What this call counted, once the module has run."""
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
        """Check the shapes that a module returned, and return its result; if they are new, counting starts here."""
        shapes = tuple(tuple(tensor.shape) for tensor in tensors_in(result))
        before = self._known.shapes if self._known else ()
        if self.fast and (len(self._shapes) >= len(before) or before[len(self._shapes)] != shapes):
            self.fast, self.by_content = False, True  # what is known of such calls stays
            self._spend_known()
        self._shapes.append(shapes)
        return result if self.fast else self.note(name, result)

    def call(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, makes: bool
    ) -> Any:
        """Call a function after a check that its result is small enough.

        Args:
            name: name of the function, for messages.
            function: a function that a program may call.
            args: positional arguments.
            kwargs: keyword arguments.
            makes: whether it makes tensors from numbers alone, on a device that it takes as an argument.

        Raises:
            RewrittenModuleError: the call would make too much, or can't be computed.
        """
        if all(tensor.layout == torch.strided and not tensor.is_nested for tensor in tensors_in((args, kwargs))):
            # Modes that count calls, such as idap's probes or a counter of FLOPs, and hooks must not see this estimate.
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
                device = {"device": _META} if makes else {}
                self._estimate(name, function, _on_meta(args), {**_on_meta(kwargs), **device})
        return function(*args, **kwargs)

    def _estimate(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Compute a call on the meta device, and count what it makes."""
        try:
            self._spend(Count(elements=SMALLEST * parts_of(name, args, kwargs)), name)
            result = function(*args, **kwargs)
        except RewrittenModuleError:
            raise
        except Exception as error:
            if name in _BY_CONTENT and len(args) > 1 and _one_mask(args[1]):
                self.by_content = True
                self._spend(Count(elements=args[0].numel() * (1 + tensors_in(args[1])[0].ndim)), name)
                return
            kind = type(self._module).__name__
            raise RewrittenModuleError(
                f"the rewritten code of this {kind} can't compute {name} with these arguments: {error}"
            ) from error
        temporary, products = effort_of(name, args, kwargs, tensors_in(result))
        self._spend(Count(temporary, products), name)
        self.note(name, result)

    def note(self, name: str, result: Any) -> Any:
        """Count the elements of a step's result, and return it."""
        self._spend(Count(sum(map(_elements, tensors_in(result)))), name)
        return result

    def _spend(self, count: Count, name: str) -> None:
        """Add the work of a step to the count.

        Raises:
            RewrittenModuleError: the steps together make too many elements, multiply too often, or are too many.
        """
        outer = self._outer
        outer._count.add(count)
        spent = outer._count
        if spent.elements > outer.total or spent.products > PRODUCTS * outer.total or spent.steps > MOST_STEPS:
            raise RewrittenModuleError(
                f"the rewritten code of this {type(outer._module).__name__} would make {spent.elements:,} numbers in "
                f"{spent.products:,} multiplications and {spent.steps:,} steps up to {name}. For the tensors of this "
                f"module and its inputs, the limits are {outer.total:,} numbers, {PRODUCTS:,} multiplications for each "
                f"of them, and {MOST_STEPS:,} steps. Plans that idap writes stay far below: do not use this one."
            )


class Unlimited:
    """Replaces an `Allowance` while the code is exported or traced: nothing is counted."""

    fast = True

    def hand_on(self, _name: str, result: Any) -> Any:
        """Return what a module returned."""
        return result


def calculate(symbol: str, *operands: int) -> int:
    """Compute with sizes, from left to right.

    Raises:
        RewrittenModuleError: a result is larger than `LARGEST_SIZE`, an exponent is negative or too large, or a divisor
            is zero.

    >>> calculate("*", 2, 3, 4), calculate("neg", 5), calculate("**", 2, 10)
    (24, -5, 1024)
    """
    if len(operands) == 1:
        return ARITHMETIC[symbol](operands[0])
    first = operands[0]
    for other in operands[1:]:
        if type(other) is int and symbol == "**" and not 0 <= other <= math.log2(LARGEST_SIZE):
            raise RewrittenModuleError(f"the rewritten code of a module computes {first} to the power of {other}")
        if type(other) is int and symbol in ("//", "%") and other == 0:
            raise RewrittenModuleError(f"the rewritten code of a module divides {first} by zero")
        first = ARITHMETIC[symbol](first, other)
        if type(first) is int and not -LARGEST_SIZE <= first <= LARGEST_SIZE:
            raise RewrittenModuleError(
                f"the rewritten code of a module computes a size beyond {LARGEST_SIZE:,}, larger than any tensor's"
            )
    return first


def tensor_of(name: str, result: Any) -> Tensor:
    """Check that a value of a program is a tensor: what functions do with other values would not be counted.

    Raises:
        RewrittenModuleError: it is something else.
    """
    if not isinstance(result, Tensor):
        raise RewrittenModuleError(
            f"the rewritten code of a module takes the result of {name} for a tensor, found a {type(result).__name__}"
        )
    return result


def _elements(tensor: Tensor) -> int:
    """The elements that a tensor counts for; an empty one counts for its other sizes, since loops may run over them."""
    elements = tensor.numel()
    if not elements:
        elements = 1
        for size in tensor.shape:
            elements *= max(size, 1)
    return max(elements, SMALLEST)


_PLAIN = (int, float, bool, str, torch.dtype, torch.memory_format, torch.SymInt, type(None), type(...))


def _on_meta(tree: Any) -> Any:
    """Arguments in which meta tensors replace real ones, and the meta device replaces other devices."""
    if isinstance(tree, Tensor):
        return torch.empty_strided(tree.shape, tree.stride(), dtype=tree.dtype, device=_META)
    if type(tree) in (tuple, list):
        return type(tree)(_on_meta(item) for item in tree)
    if type(tree) is dict:
        return {key: _on_meta(item) for key, item in tree.items()}
    if isinstance(tree, torch.device):
        return _META
    if not isinstance(tree, _PLAIN) and type(tree) is not slice:
        raise RewrittenModuleError(f"the rewritten code of a module passes on a {type(tree).__name__}")
    return tree


def _one_mask(index: Any) -> bool:
    """Whether a mask is the only tensor of an index, which then can't pick more elements than there are."""
    picked = tensors_in(index)
    return len(picked) == 1 and picked[0].dtype == torch.bool
