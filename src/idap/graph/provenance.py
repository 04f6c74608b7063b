"""Ints that remember where they came from, so that a pruned model's sizes can be repaired at their source.

A forward pass reads plain ints: `self.num_heads` in a reshape, `self.groups` in a convolution. While a model is
traced, the ints its modules hold and the shapes its tensors report are `TracedInt`s: equal to the plain number in
every respect, and carrying the expression that made them.
"""

from collections.abc import Callable, Iterable
from typing import Any, Self

from torch import nn

from idap.graph.ir import ARITHMETIC, Attribute, Expression, Literal, Operation, leaves


class TracedInt(int):
    """An int with the expression that produced it.

    Attributes:
        expression: where it came from.
        escaped: shared by all ints of one trace; receives the expressions that the code turned into other numbers (a
            float, a scale), so that changing the int would change a result.
    """

    expression: Expression
    escaped: set[Expression]

    def __new__(cls, value: int, expression: Expression, escaped: set[Expression]) -> Self:
        made = super().__new__(cls, value)
        made.expression = expression
        made.escaped = escaped
        return made

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __neg__(self) -> "TracedInt":
        return TracedInt(-int(self), Operation("neg", (self.expression,), -int(self)), self.escaped)

    def __float__(self) -> float:
        self.escaped.add(self.expression)
        return float(int(self))


def expression_of(value: int) -> Expression:
    """The expression of an int: its own if it remembers one, else a literal."""
    return value.expression if isinstance(value, TracedInt) else Literal(int(value))


def _exact(symbol: str, name: str, *, swapped: bool) -> Callable[[TracedInt, Any], Any]:
    """An operation of ints that gives an int; with a float it gives a float, and the int has escaped."""

    def method(self: TracedInt, other: Any) -> Any:
        value = getattr(int(self), name)(plain(other))
        if value is NotImplemented or not isinstance(value, int):
            self.escaped.add(self.expression)
            return value
        operands = (expression_of(self), expression_of(other))
        return TracedInt(value, Operation(symbol, operands[::-1] if swapped else operands, value), self.escaped)

    return method


def _escaping(name: str) -> Callable[[TracedInt, Any], Any]:
    """An operation that never gives an int."""

    def method(self: TracedInt, other: Any) -> Any:
        self.escaped.add(self.expression)
        if isinstance(other, TracedInt):
            self.escaped.add(other.expression)
        return getattr(int(self), name)(plain(other))

    return method


for _symbol, _method in {"+": "add", "-": "sub", "*": "mul", "//": "floordiv", "%": "mod", "**": "pow"}.items():
    setattr(TracedInt, f"__{_method}__", _exact(_symbol, f"__{_method}__", swapped=False))
    setattr(TracedInt, f"__r{_method}__", _exact(_symbol, f"__r{_method}__", swapped=True))
for _method in ("__truediv__", "__rtruediv__"):
    setattr(TracedInt, _method, _escaping(_method))


def plain(tree: Any) -> Any:
    """The same nested arguments with every `TracedInt` made an ordinary int."""
    if isinstance(tree, TracedInt):
        return int(tree)
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
        if _is_int(value):
            found[name] = int(value)
        elif type(value) in (tuple, list) and value and all(_is_int(item) for item in value):
            found[name] = tuple(int(item) for item in value)
    return found


def remember_sizes(modules: Iterable[tuple[str, nn.Module]]) -> set[Expression]:
    """Make every int that the modules hold remember its place; changes the modules, so give it a copy.

    Returns:
        The set that receives what escapes.
    """
    escaped: set[Expression] = set()
    for path, module in modules:
        for name, held in sizes_held(module).items():
            if isinstance(held, int):
                vars(module)[name] = TracedInt(held, Attribute(path, name, None, held), escaped)
            else:
                kind = type(vars(module)[name])
                vars(module)[name] = kind(
                    TracedInt(v, Attribute(path, name, i, v), escaped) for i, v in enumerate(held)
                )
    return escaped


def evaluate(expression: Expression, value_of: Callable[[Expression], int]) -> int:
    """Compute an expression anew; `value_of` gives the value of its leaves.

    Raises:
        ArithmeticError: the new values divide by zero.
    """
    if isinstance(expression, Operation):
        return ARITHMETIC[expression.symbol](*(evaluate(part, value_of) for part in expression.operands))
    return value_of(expression)


def sources(expression: Expression) -> set[Expression]:
    """The leaves of an expression: attributes, shapes and literals."""
    if isinstance(expression, Operation):
        return set().union(*(sources(part) for part in expression.operands))
    return {expression}


def attributes_in(expression: Expression) -> set[Attribute]:
    """The module attributes that an expression reads."""
    return {leaf for leaf in sources(expression) if isinstance(leaf, Attribute)}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
