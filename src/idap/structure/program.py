"""A module's code as data: what replaces its forward where the code itself can't express a pruned shape.

Trees of arguments are plain values, and tuples that begin with a tag:

    ("value", n)            the n-th value: an input or the result of a step
    ("own", name)           a parameter or buffer of the module, or of one below it
    ("size", tree, dim)     a size of a tensor
    ("calc", symbol, ...)   arithmetic with sizes
    ("list" | "tuple", ...) ("dict", (key, tree), ...) ("slice", start, stop, step) ("ellipsis",)
    ("dtype", name) ("dtype of", tree) ("device",) ("format", name) ("float", text) ("training",)
    ("in training", share)  that number in training, else 0
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idap.errors import PlanError

Tree = Any
"""A plain value or a tagged tuple, see above."""


@dataclass(frozen=True)
class Instruction:
    """One step of a program.

    Attributes:
        function: name of a torch function, "" for the call of a module.
        module: path of a module below the one that is rewritten, "" for a function.
        args: positional arguments.
        kwargs: keyword arguments.
        results: for each value that is used later its place in the result and its number.
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
        args: positional arguments as they must come: ("value", n) gets a tensor or an int.
        kwargs: keyword arguments, likewise.
        steps: in order.
        output: what is returned.
    """

    args: tuple[Tree, ...]
    kwargs: tuple[tuple[str, Tree], ...]
    steps: tuple[Instruction, ...]
    output: Tree


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
            }
            for routine in self.routines
        ]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> "Program":
        """Read what `to_json` wrote.

        Raises:
            PlanError: a part is missing or of the wrong type.
        """
        try:
            return cls(tuple(_routine(part) for part in data))
        except (KeyError, TypeError) as error:
            raise PlanError(f"this is not the code of a module: {type(error).__name__}: {error}") from error


def tagged(tree: Tree) -> Iterator[tuple[str, Any]]:
    """The values and the module's own tensors in a tree: ("value", number) and ("own", name).

    >>> list(tagged(("tuple", ("value", 3), ("dict", ("value", ("own", "weight"))), 7)))
    [('value', 3), ('own', 'weight')]
    """
    match tree:
        case ("value" | "own", _):
            yield tree
        case ("dict", *pairs):
            for _, item in pairs:
                yield from tagged(item)
        case (_, *items):
            for item in items:
                yield from tagged(item)
        case _:
            pass


def _routine(data: Mapping[str, Any]) -> Routine:
    steps = tuple(Instruction(*(tuples(part) for part in step)) for step in data["steps"])
    return Routine(tuples(data["args"]), tuples(data["kwargs"]), steps, tuples(data["output"]))


def tuples(tree: Any) -> Any:
    """A tree read from JSON with tuples in the place of its lists."""
    return tuple(tuples(item) for item in tree) if isinstance(tree, list | tuple) else tree
