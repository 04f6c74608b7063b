"""Equations of `torch.einsum`, written out."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Equation(NamedTuple):
    """Which dimensions of which tensors are one; a letter each, or a number for what an ellipsis stands for.

    Attributes:
        terms: the letters of each tensor, in the order of its dimensions.
        result: those of the result.
    """

    terms: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]


def read_equation(equation: str, ranks: Sequence[int]) -> Equation:
    """Write out what an equation leaves to be understood: ellipses, and the result after no arrow.

    Args:
        equation: as `torch.einsum` takes it.
        ranks: the number of dimensions of each tensor.

    Example:
        >>> read_equation("...i, io", (3, 2))
        Equation(terms=(('2', '1', 'i'), ('i', 'o')), result=('2', '1', 'o'))
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = tuple(_letters(term, rank) for term, rank in zip(left.split(","), ranks, strict=True))
    hidden = max((sum(letter.isdigit() for letter in term) for term in terms), default=0)
    if arrow:
        return Equation(terms, _letters(right, hidden + len(right.replace("...", ""))))
    counts = Counter(letter for term in terms for letter in term if not letter.isdigit())
    once = sorted(letter for letter, count in counts.items() if count == 1)
    return Equation(terms, (*_hidden(hidden), *once))


def _letters(term: str, rank: int) -> tuple[str, ...]:
    """One name per dimension."""
    before, dots, after = term.partition("...")
    return (*before, *(_hidden(rank - len(before) - len(after)) if dots else ()), *after)


def _hidden(count: int) -> tuple[str, ...]:
    """Names of what an ellipsis stands for, counted from the right, as they broadcast."""
    return tuple(map(str, range(count, 0, -1)))
