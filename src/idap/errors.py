"""Define every error that idap raises on purpose, and check that settings have the right types."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class IdapError(Exception):
    """The root of every error that idap raises on purpose."""


class TraceError(IdapError):
    """The model could not be run or exported on the example inputs."""


class UnknownOperatorError(TraceError):
    """An operator has no rule, so how channels pass through it is not known."""


class StructureError(IdapError):
    """The analysis found nothing that can be removed, or was given a name that it does not know."""


class PlanError(IdapError):
    """A plan does not fit the model, or contradicts itself."""


class RewrittenModuleError(IdapError):
    """A module was called in a way that its rewritten code does not support."""


class VerificationError(IdapError):
    """The cut model does not equal the masked original."""


class ExportError(IdapError):
    """The model cannot be exported, or the exported model gives different outputs."""


class TaskError(IdapError):
    """The data, the loss or the metric of a task cannot be used."""


class DivergedError(TaskError):
    """A loss, a gradient or a metric is no longer finite, or an output is NaN, in training or after a cut."""


class ConfigError(IdapError):
    """A setting or a recipe is wrong."""


class BudgetError(ConfigError):
    """The goals cannot be met by any compression."""


class RunFolderError(IdapError):
    """A run folder cannot be read or written, or holds another run."""


class InsufficientMemoryError(IdapError):
    """A piece of work would take more memory than is allowed."""


class TrustError(IdapError):
    """A run folder from elsewhere names code that the user has not agreed to run."""


class ReportError(IdapError):
    """A report cannot be printed."""


class CheckpointError(IdapError):
    """A saved file is broken or does not belong to this model."""


class UncheckedFileWarning(UserWarning):
    """A saved file carries no checksum, so damage to it cannot be detected."""


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def check_kinds(settings: object, *, prefix: str = "", word: str = "found", only: Sequence[str] = ()) -> None:
    """Compare the fields of a dataclass with their annotations.

    Args:
        settings: the instance. Only numbers, texts, switches, and tuples and mappings of these are checked; other
            fields, and the choices of a Literal, are left to the class's own checks.
        prefix: text before each name in the message.
        word: "found" or "got", before the value in the message.
        only: the fields to check; empty: all.

    Raises:
        ConfigError: a field has the wrong type; the message names the field, the expected type and the value.

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
        kinds = " or ".join(_describe_kind(option) for option in options)
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


def _describe_kind(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"several of {_describe_kind(get_args(kind)[0])}"
    if get_origin(kind) is Mapping:
        key, held = get_args(kind)
        return f"a mapping of {_describe_kind(key)} to {_describe_kind(held)}"
    return _WORDS.get(kind, str(kind))
