"""Read plain data that came from elsewhere: every part must have exactly the type that was written.

Each function returns its argument as a value of that type, or raises TypeError or ValueError, which says what it found.
"""

import reprlib
from collections.abc import ItemsView, Mapping
from itertools import pairwise
from typing import Any

LARGEST = 2**63
"""No size, index or attribute of a model reaches it."""


def items(data: Any) -> ItemsView[str, Any]:
    """The items of an object whose keys are all strings."""
    if not isinstance(data, Mapping):
        raise TypeError(f"expected an object, found {shown(data)}")
    for key in data:
        text(key)
    return data.items()


def sequence(data: Any) -> list[Any] | tuple[Any, ...]:
    """A list."""
    if not isinstance(data, list | tuple):
        raise TypeError(f"expected a list, found {shown(data)}")
    return data


def text(value: Any) -> str:
    """A string."""
    if type(value) is not str:
        raise TypeError(f"expected a string, found {shown(value)}")
    return value


def whole(value: Any) -> int:
    """A whole number that a computer's word can hold; True and 3.0 are none."""
    if type(value) is not int:
        raise TypeError(f"expected a whole number, found {shown(value)}")
    if not -LARGEST < value < LARGEST:
        raise ValueError("a number is larger than any model's")
    return value


def sizes(data: Any) -> tuple[int, ...]:
    """A list of whole numbers from 0 on."""
    found = tuple(whole(value) for value in sequence(data))
    if any(value < 0 for value in found):
        raise ValueError(f"expected numbers from 0 on, found {min(found)}")
    return found


def ascending(data: Any) -> tuple[int, ...]:
    """A list of whole numbers from 0 on, each larger than the one before.

    >>> ascending([0, 2, 5])
    (0, 2, 5)
    """
    found = sizes(data)
    for before, after in pairwise(found):
        if after <= before:
            raise ValueError(f"expected ascending numbers, found {after} after {before}")
    return found


def size(value: Any) -> int | tuple[int, ...]:
    """What an attribute may hold: a whole number or a list of them."""
    return tuple(whole(part) for part in value) if isinstance(value, list | tuple) else whole(value)


def dimension(key: str) -> int:
    """The number of a dimension, which JSON has as a string."""
    if not (key.isascii() and key.isdigit() and len(key) <= 2 and str(int(key)) == key):
        raise ValueError(f"expected the number of a dimension, found {shown(key)}")
    return int(key)


def shown(value: Any) -> str:
    """A value for a message, at most 60 characters of it."""
    if isinstance(value, int) and not -LARGEST < value < LARGEST:
        return "a huge number"
    found = reprlib.repr(value)
    return found if len(found) <= 60 else found[:57] + "..."
