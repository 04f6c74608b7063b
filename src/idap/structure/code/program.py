"""Programs: the code of a rewritten module as data. They replace a forward that can't produce the shapes after a cut.

Trees of arguments are plain values, and tuples that begin with a tag:

    ("value", n)            the n-th value, a tensor: an input or the result of a step
    ("int", n)              the n-th value, a whole number: an input
    ("own", name)           a parameter or buffer of the module, or of one below it
    ("size", tree, dim)     a size of a tensor
    ("calc", symbol, ...)   arithmetic with sizes
    ("list" | "tuple", ...) ("dict", (key, tree), ...) ("slice", start, stop, step) ("ellipsis",)
    ("dtype", name) ("device",) ("same type",) ("format", name) ("float", text) ("training",)
    ("in training", share)  that number in training, else 0
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from keyword import iskeyword
from typing import Any

from idap.errors import PlanError
from idap.graph.ir import ARITHMETIC
from idap.graph.provenance import RELATIONS
from idap.parsing import LARGEST, abbreviate, whole
from idap.structure.code.vocabulary import mistake

Tree = Any
"""A plain value or a tagged tuple, see above."""

DTYPES = frozenset(
    ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64")
) | {"complex128"}
"""Types of numbers that a program may name: those that all functions of torch support."""

_MOST = {"routines": 32, "steps": 20_000, "parts": 400_000}
"""The most routines of one program, the most steps and guards of all of them, and the most parts of all their trees."""

Guard = tuple[Tree, str, Tree, int]
"""Two sizes, the relation in which they must stand, and the number of steps that make both known."""


@dataclass(frozen=True)
class Instruction:
    """One step of a program.

    Attributes:
        function: name of a torch function, "" for the call of a module.
        module: path of a module below the one that is rewritten, "" for a function.
        args: positional arguments.
        kwargs: keyword arguments.
        results: for each value that is used later, its place in the result and its number.
    """

    function: str
    module: str
    args: tuple[Tree, ...]
    kwargs: tuple[tuple[str, Tree], ...]
    results: tuple[tuple[tuple[int | str, ...], int], ...]

    def trees(self) -> tuple[Tree, ...]:
        """All arguments."""
        return (*self.args, *(tree for _, tree in self.kwargs))


@dataclass(frozen=True)
class Routine:
    """What a rewritten module does when it is called in one way.

    Attributes:
        args: the positional arguments that it takes: ("value", n) takes a tensor, ("int", n) a whole number.
        kwargs: keyword arguments, likewise.
        steps: in order.
        output: what is returned.
        guards: relations of sizes that must still hold, because the code branched on them or computed with the sizes.
    """

    args: tuple[Tree, ...]
    kwargs: tuple[tuple[str, Tree], ...]
    steps: tuple[Instruction, ...]
    output: Tree
    guards: tuple[Guard, ...] = ()


@dataclass(frozen=True)
class Program:
    """What a rewritten module does.

    Attributes:
        routines: one for each way in which it is called, such as with and without a mask.
    """

    routines: tuple[Routine, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists and dicts; `Program.from_json` reads them back."""
        return [
            {
                "args": routine.args,
                "kwargs": routine.kwargs,
                "steps": [[s.function, s.module, s.args, s.kwargs, s.results] for s in routine.steps],
                "output": routine.output,
                "guards": routine.guards,
            }
            for routine in self.routines
        ]

    def check(self) -> None:
        """Check every part of the program; see `check_routine`.

        Raises:
            PlanError: a part is invalid, and is named; or there are more routines, steps or parts than allowed.
        """
        steps = sum(len(routine.steps) + len(routine.guards) for routine in self.routines)
        _check_size(routines=len(self.routines), steps=steps, parts=self.parts)
        for routine in self.routines:
            check_routine(routine)

    @cached_property
    def parts(self) -> int:
        """How many parts all trees of the program have together."""
        return sum(_parts(tree) for routine in self.routines for tree in _all_trees(routine))

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> "Program":
        """Read what `to_json` wrote.

        Raises:
            PlanError: a part is missing or of the wrong type.
        """
        try:
            steps = sum(len(routine["steps"]) + len(routine["guards"]) for routine in data)
            _check_size(routines=len(data), steps=steps)
            program = cls(tuple(map(_routine, data)))
            program.check()
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"this is not the code of a module: {type(error).__name__}: {error}") from error
        return program


def _check_size(**counts: int) -> None:
    """Refuse code that is too large; what can be counted early is counted before anything is made of it."""
    for name, count in counts.items():
        if count > _MOST[name]:
            raise PlanError(f"the code of a rewritten module has {count:,} {name}; at most {_MOST[name]:,} are allowed")


def _all_trees(routine: Routine) -> Iterator[Tree]:
    """All trees of a routine."""
    yield from (routine.args, routine.kwargs, routine.output, routine.guards)
    for step in routine.steps:
        yield from (step.args, step.kwargs, step.results)


def _parts(tree: Tree) -> int:
    return 1 + sum(map(_parts, tree)) if isinstance(tree, tuple) else 1


def references(tree: Tree) -> Iterator[tuple[str, Any]]:
    """The values and the module's own tensors in a tree: ("value", number), ("int", number) and ("own", name).

    >>> list(references(("tuple", ("value", 3), ("dict", ("value", ("own", "weight"))), 7)))
    [('value', 3), ('own', 'weight')]
    """
    match tree:
        case ("value" | "int" | "own", _):
            yield tree
        case ("dict", *pairs):
            for _, item in pairs:
                yield from references(item)
        case (_, *items):
            for item in items:
                yield from references(item)
        case _:
            pass


_SHAPES: Mapping[str, tuple[type, ...] | None] = {
    "value": (int,), "int": (int,), "own": (str,), "dtype": (str,), "format": (str,), "float": (str,),
    "in training": (float,), "ellipsis": (), "device": (), "same type": (), "training": (), "size": None,
    "calc": None, "list": None, "tuple": None, "dict": None, "slice": None,
}  # fmt: skip
"""Tag -> the types of what follows it; None where trees follow."""


def check_tree(tree: Tree) -> None:
    """Check that a tree consists of known tags with parts of the right types, before it is used.

    Raises:
        PlanError: names the invalid part.
    """
    if not isinstance(tree, tuple):
        number = type(tree) in (int, float) and -LARGEST < tree < LARGEST  # neither infinite nor NaN, which have a tag
        if not (number or tree is None or type(tree) in (bool, str)):
            raise PlanError(f"the code of a rewritten module holds {tree!r}, which means nothing")
        return
    tag, parts = (tree[0], tree[1:]) if tree else ("", ())
    if not isinstance(tag, str) or tag not in _SHAPES:
        raise PlanError(f"the code of a rewritten module holds {tree!r}, which means nothing")
    types = _SHAPES[tag]
    wrong = types is not None and (tuple(map(type, parts)) != types or (tag in ("value", "int") and parts[0] < 0))
    if wrong or (tag == "dtype" and parts[0] not in DTYPES):
        raise PlanError(f"the code of a rewritten module holds {tree!r}, which means nothing")
    sizes = (
        [part for part in parts if part is not None] if tag == "slice" else [tree] if tag in ("size", "calc") else []
    )
    if not all(map(_is_size, sizes)) or (tag == "slice" and len(parts) != 3):
        raise PlanError(f"the code of a rewritten module holds {tree!r}, which means nothing")
    for part in parts if types is None else ():
        if tag == "dict":
            if not isinstance(part, tuple) or len(part) != 2 or type(part[0]) not in (str, int):
                raise PlanError(f"the code of a rewritten module holds {tree!r}, which means nothing")
            check_tree(part[1])
        else:
            check_tree(part)


def check_routine(routine: Routine) -> None:
    """Check every part of a routine; see `check_tree`.

    Raises:
        PlanError: names the invalid part.
    """
    named = [pair for pairs in (routine.kwargs, *(step.kwargs for step in routine.steps)) for pair in pairs]
    for key, _ in named:
        if not isinstance(key, str) or not key.isidentifier() or iskeyword(key):
            raise PlanError(f"the code of a rewritten module has an argument named {key!r}")
    trees = [*routine.args, *(tree for _, tree in named), *(tree for step in routine.steps for tree in step.args)]
    for tree in (*trees, routine.output):
        check_tree(tree)
    for guard in routine.guards:
        _check_guard(guard, len(routine.steps))
    for step in routine.steps:
        if type(step.function) is not str or type(step.module) is not str or bool(step.function) == bool(step.module):
            raise PlanError(
                f"the code of a rewritten module calls {step.function!r:.80} and module {step.module!r:.80}: each step "
                "calls one of the two"
            )
        if step.function and (wrong := mistake(step.function, step.args, step.kwargs)):
            raise PlanError(f"the code of a rewritten module {wrong}")
        if step.module and any(key == "self" for key, _ in step.kwargs):
            raise PlanError(f"the code of a rewritten module gives module {step.module!r} an argument named 'self'")
        for path, number in step.results:
            if type(number) is not int or number < 0 or any(type(key) not in (int, str) for key in path):
                raise PlanError(f"the code of a rewritten module makes value {number!r}, which means nothing")


def _check_guard(guard: Guard, steps: int) -> None:
    """Check that a guard relates two numbers, sizes of values or arithmetic with these, after one of the steps."""
    if not isinstance(guard, tuple) or len(guard) != 4 or type(guard[3]) is not int or not 0 <= guard[3] <= steps:
        raise PlanError(f"the code of a rewritten module checks {guard!r}, which means nothing")
    left, symbol, right, _ = guard
    sizes = (
        _is_size(left)
        and _is_size(right)
        and all(tag != "own" for side in (left, right) for tag, _ in references(side))
    )
    if type(symbol) is not str or symbol not in RELATIONS or not sizes:
        raise PlanError(f"the code of a rewritten module checks {guard!r}, which means nothing")


def _is_size(tree: Tree) -> bool:
    """Whether a tree is a whole number, or made of whole numbers and sizes of tensors."""
    match tree:
        case ("int", number):
            return type(number) is int and number >= 0
        case ("size", (("value" | "own") as tag, name), dim):
            named = type(name) is str if tag == "own" else _is_size(("int", name))
            return named and type(dim) is int and abs(dim) < LARGEST
        case ("calc", str(symbol), *operands):
            enough = len(operands) == 1 if symbol == "neg" else len(operands) > 1
            return symbol in ARITHMETIC and enough and all(map(_is_size, operands))
        case _:
            return type(tree) is int and abs(tree) < LARGEST


def _routine(data: Mapping[str, Any]) -> Routine:
    steps = tuple(Instruction(*(tuples(part) for part in step)) for step in data["steps"])
    return Routine(tuples(data["args"]), tuples(data["kwargs"]), steps, tuples(data["output"]), tuples(data["guards"]))


DEEPEST = 64
"""How deep trees may be nested."""


def tuples(tree: Any, depth: int = 0) -> Any:
    """A tree read from JSON, with tuples instead of lists.

    Raises:
        ValueError: the tree is nested too deep.
    """
    if depth > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST} lists")
    return tuple(tuples(item, depth + 1) for item in tree) if isinstance(tree, list | tuple) else tree


_GIVEN = ("stream", "none", "given", "tuple", "list")


def check_tuples(data: Any) -> Any:
    """Read the form of what a stand-in returns from JSON, and check it; see `ModuleCall.gives`.

    Raises:
        TypeError, ValueError: a part is invalid.
    """
    tree = tuples(data)
    if not isinstance(tree, tuple) or not tree or not isinstance(tree[0], str) or tree[0] not in _GIVEN:
        raise TypeError(f"a stand-in can't return {abbreviate(tree)}")
    if tree[0] == "given":
        (place,) = tree[1:]
        if not isinstance(place, str) and whole(place) < 0:
            raise ValueError(f"a stand-in can't return argument {place}")
    elif tree[0] in ("tuple", "list"):
        for part in tree[1:]:
            check_tuples(part)
    elif len(tree) > 1:
        raise TypeError(f"a stand-in can't return {abbreviate(tree)}")
    return tree
