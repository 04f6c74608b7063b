"""Settings of a wrong kind, such as a text for a number: told when they are made, not after hours of work."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from idap.errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def check_kinds(settings: object, *, prefix: str = "", word: str = "found", only: Sequence[str] = ()) -> None:
    """Compare the fields of a dataclass with their annotations.

    Args:
        settings: the instance; fields of other kinds than numbers, texts, switches, tuples and mappings of these are
            left to its own checks, and so are the choices of a Literal.
        prefix: before each name in the message.
        word: "found" or "got", before the value in the message.
        only: the fields that are checked; empty: all.

    Raises:
        ConfigError: names the field, what it must be, and what it is.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Pace:
        ...     lr: float | None
        >>> check_kinds(Pace(lr="fast"))
        Traceback (most recent call last):
        ...
        idap.errors.ConfigError: lr must be a number or None, found 'fast'.
    """
    for name, hint in get_type_hints(type(settings)).items():
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        value = getattr(settings, name)
        if (only and name not in only) or any(_fits(value, option) for option in options):
            continue
        kinds = " or ".join(_worded(option) for option in options)
        raise ConfigError(f"{prefix}{name} must be {kinds}, {word} {value!r:.80}.")


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind in _WORDS:
        return isinstance(value, kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Mapping:
        key, held = get_args(kind)
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, held) for k, v in value.items())
    return True


def _worded(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"several of {_worded(get_args(kind)[0])}"
    if get_origin(kind) is Mapping:
        key, held = get_args(kind)
        return f"a mapping of {_worded(key)} to {_worded(held)}"
    return _WORDS.get(kind, str(kind))
