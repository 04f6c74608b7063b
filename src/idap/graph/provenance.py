"""Ints that remember where they come from, so that the sizes of a cut model can be corrected at their source.

A forward pass reads plain ints: `self.num_heads` in a reshape, `self.groups` in a convolution. While a model is
traced, the ints its modules hold and the shapes its tensors report are `TracedInt`s: equal to the plain number in
every respect, and carrying the expression that made them.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import nn

from idap.graph.ir import ARITHMETIC, Attribute, Comparison, Expression, Literal, Operation, leaves

RELATIONS = {"==": "__eq__", "!=": "__ne__", "<": "__lt__", ">=": "__ge__", ">": "__gt__", "<=": "__le__"}
"""Comparisons and Python's names for them."""


@dataclass
class Notes:
    """What one trace shows about its sizes.

    Attributes:
        escaped: expressions that the code turned into something other than a size (a float, a scale), so that changing
            them would change a result. Each has the modules whose code does so, with the place.
        compared: the comparisons of sizes that the code made, with their outcomes.
        module: path of the module whose code runs now.
    """

    escaped: dict[Expression, dict[str, str]] = field(default_factory=dict)
    compared: dict[Comparison, None] = field(default_factory=dict)
    module: str = ""

    def clear(self) -> None:
        """Forget everything that was noted."""
        self.escaped.clear()
        self.compared.clear()
        self.module = ""

    def note_escape(self, expression: Expression, place: str) -> None:
        """Note that the code that runs now computes something other than a size from a size."""
        self.escaped.setdefault(expression, {}).setdefault(self.module, place)


class TracedInt(int):
    """An int with the expression that produced it.

    In Python an int cannot detect its use in `range(n)`, nor in an operation whose left side is a float, as in
    ``0.5 * n``. Such uses are found only when a cut model is verified.

    Attributes:
        expression: where it comes from.
        notes: shared by all ints of one trace.
    """

    expression: Expression
    notes: Notes

    def __new__(cls, value: int, expression: Expression, notes: Notes) -> Self:
        """An int of this value."""
        made = super().__new__(cls, value)
        made.expression = expression
        made.notes = notes
        return made

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (strip_trace(self),)

    def __neg__(self) -> "TracedInt":
        value = -strip_trace(self)
        return TracedInt(value, Operation("neg", (self.expression,), value), self.notes)


def _caller(depth: int) -> str:
    """``file.py:line`` of the code that made a TracedInt do something."""
    frame = sys._getframe(depth)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def strip_trace(value: int) -> int:
    """The plain number; this use of it is not noted."""
    return int.__add__(value, 0)


def expression_of(value: int) -> Expression:
    """The expression of an int: its own if it remembers one, else a literal."""
    return value.expression if isinstance(value, TracedInt) else Literal(int(value))


def _exact(symbol: str, name: str, *, swapped: bool) -> Callable[[TracedInt, Any], Any]:
    """An operation of ints that gives an int; with a float it gives a float, and the int has escaped."""

    def method(self: TracedInt, other: Any) -> Any:
        value = getattr(strip_trace(self), name)(plain(other))
        if value is NotImplemented or not isinstance(value, int):
            self.notes.note_escape(self.expression, _caller(2))
            return value
        operands = (expression_of(self), expression_of(other))
        return TracedInt(value, Operation(symbol, operands[::-1] if swapped else operands, value), self.notes)

    return method


def _relation(name: str, holds: str, fails: str) -> Callable[[TracedInt, object], Any]:
    """A comparison; its outcome must stay the same, as the code may have branched on it."""

    def method(self: TracedInt, other: object) -> Any:
        outcome = getattr(int, name)(self, other)
        if outcome is not NotImplemented and isinstance(other, int) and not isinstance(other, bool):
            expression = expression_of(other)
            if expression != self.expression:
                symbol = holds if outcome else fails
                note = Comparison(self.expression, expression, _caller(2), self.notes.module, symbol)
                self.notes.compared[note] = None
        return outcome

    return method


def _escape(name: str) -> Callable[..., Any]:
    """An operation whose result does not remember where it comes from."""

    def method(self: TracedInt, *others: Any) -> Any:
        for value in (self, *others):
            if isinstance(value, TracedInt):
                value.notes.note_escape(value.expression, _caller(2))
        return getattr(strip_trace(self), name)(*plain(others))

    return method


for _holds, _fails in (("==", "!="), ("<", ">="), (">", "<=")):
    for _symbol, _other in ((_holds, _fails), (_fails, _holds)):
        setattr(TracedInt, RELATIONS[_symbol], _relation(RELATIONS[_symbol], _symbol, _other))
TracedInt.__hash__ = int.__hash__  # type: ignore[method-assign]
for _symbol, _method in {"+": "add", "-": "sub", "*": "mul", "//": "floordiv", "%": "mod", "**": "pow"}.items():
    setattr(TracedInt, f"__{_method}__", _exact(_symbol, f"__{_method}__", swapped=False))
    setattr(TracedInt, f"__r{_method}__", _exact(_symbol, f"__r{_method}__", swapped=True))
for _method in ("truediv", "divmod", "lshift", "rshift", "and", "or", "xor"):
    setattr(TracedInt, f"__{_method}__", _escape(f"__{_method}__"))
    setattr(TracedInt, f"__r{_method}__", _escape(f"__r{_method}__"))
for _method in ("float", "int", "round", "trunc", "floor", "ceil", "abs", "invert"):
    setattr(TracedInt, f"__{_method}__", _escape(f"__{_method}__"))


def plain(tree: Any) -> Any:
    """The same nested arguments with every `TracedInt` made an ordinary int."""
    if isinstance(tree, TracedInt):
        return strip_trace(tree)
    if type(tree) in (tuple, list):
        return type(tree)(plain(item) for item in tree)
    if type(tree) is dict:
        return {key: plain(item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(plain(tree.start), plain(tree.stop), plain(tree.step))
    if isinstance(tree, tuple) and any(isinstance(leaf, TracedInt) for leaf in leaves(tree)):
        return tuple(plain(item) for item in tree)  # torch.Size
    return tree


def sizes_held(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """The ints, and tuples or lists of ints, that a module holds as plain attributes."""
    found: dict[str, int | tuple[int, ...]] = {}
    for name, value in vars(module).items():
        if type(value) is int:  # neither a bool nor a member of an enumeration
            found[name] = value
        elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
            found[name] = tuple(value)
    return found


def remember_sizes(modules: Iterable[tuple[str, nn.Module]]) -> Notes:
    """Make every int that the modules hold remember its place; the modules are changed, so pass a copy.

    Returns:
        The object that receives the notes of these ints and of the ints made from them.
    """
    notes = Notes()
    for path, module in modules:
        for name, held in sizes_held(module).items():
            if isinstance(held, int):
                vars(module)[name] = TracedInt(held, Attribute(path, name, None, held), notes)
            else:
                kind = type(vars(module)[name])
                vars(module)[name] = kind(TracedInt(v, Attribute(path, name, i, v), notes) for i, v in enumerate(held))
    return notes


def evaluate(expression: Expression, value_of: Callable[[Expression], int]) -> int:
    """Compute an expression from new values; `value_of` returns the value of each leaf.

    Raises:
        ArithmeticError: the new values divide by zero.
    """
    if isinstance(expression, Operation):
        return int(ARITHMETIC[expression.symbol](*(evaluate(part, value_of) for part in expression.operands)))
    return value_of(expression)


def sources(expression: Expression) -> set[Expression]:
    """The leaves of an expression: attributes, shapes and literals."""
    if isinstance(expression, Operation):
        return set().union(*(sources(part) for part in expression.operands))
    return {expression}


def attributes_in(expression: Expression) -> set[Attribute]:
    """The module attributes that an expression reads."""
    return {leaf for leaf in sources(expression) if isinstance(leaf, Attribute)}
