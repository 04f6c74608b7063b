"""Dropout that code calls only in training: ``if dropout_p > 0.0: x = dropout(x, p=dropout_p)``.

In evaluation such a call hands on what it is given. So a frame of training, read with what went in where something came
out, is the frame of evaluation; and the frame of evaluation with the call put in does the right thing in both modes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from idap.graph.frames import Built, Frame, Step
from idap.graph.ir import Attribute, Extent, Operation, Ref

_FUNCTION = "torch.nn.functional.dropout"
_GIVEN: Mapping[str, tuple[str, ...]] = {
    _FUNCTION: ("input", "p", "training", "inplace"),
    "torch.dropout": ("input", "p", "train"),
}
"""Plain dropout -> the names of its parameters."""


def dropout_in(step: Step) -> Step | None:
    """A step that does nothing but drop, as new code calls it, which sets `training` by the mode; else None."""
    names = _GIVEN.get(step.function)
    if names is None or len(step.results) != 1 or step.results[0][0]:
        return None
    given = {"p": 0.5, "training": True, "inplace": False, **dict(zip(names, step.args, strict=False)), **step.kwargs}
    given["training"] = given.pop("train", given["training"])
    share = given["p"].value if isinstance(given["p"], Attribute) else given["p"]  # an int: nn.Dropout(0)
    if not isinstance(given["input"], Ref) or type(share) not in (int, float):
        return None
    if not given["training"] or given["inplace"]:
        return None
    return replace(step, function=_FUNCTION, args=(given["input"],), kwargs={"p": share, "training": True})


def only_in_training(training: Iterable[Step], evaluation: Iterable[Step]) -> dict[str, str]:
    """What dropout returns that is called only in training -> what it is given; names of tensors."""
    known = {step.place for step in evaluation}
    dropped: dict[str, str] = {}
    for step in training:
        found = dropout_in(step) if step.place not in known else None
        if found is not None:
            dropped[found.results[0][1]] = found.args[0].name
    return {name: _first(given, dropped) for name, given in dropped.items()}


def _first(name: str, dropped: Mapping[str, str]) -> str:
    """What was dropped first, where it was dropped several times."""
    while name in dropped:
        name = dropped[name]
    return name


def without(frame: Frame, dropped: Mapping[str, str]) -> Frame:
    """A frame of training as if these calls handed on what they are given."""
    steps = [step for step in frame.steps if not _is_one(step, dropped)]
    told: Frame = _named(replace(frame, steps=tuple(steps)), dropped)
    return told


def with_them(evaluation: Frame, training: Frame, dropped: Mapping[str, str]) -> Frame:
    """The frame of evaluation with these calls put in; sizes stay named by what the exported model makes.

    Args:
        evaluation: what `training` is without the calls.
        training: the frame of the same call of the module.
        dropped: see `only_in_training`.
    """
    made: set[str] = set()
    steps: list[Step] = []
    rest = iter(evaluation.steps)
    for step in training.steps:
        if _is_one(step, dropped):
            called = dropout_in(step) or step  # the call of a module that drops is one already
            args, kwargs = (_read(_named(given, dropped), given, made) for given in (called.args, dict(called.kwargs)))
            steps.append(replace(called, args=args, kwargs=kwargs))
            made.add(step.results[0][1])
        else:
            plain = next(rest)
            args, kwargs = _read(plain.args, step.args, made), _read(plain.kwargs, step.kwargs, made)
            steps.append(replace(plain, args=args, kwargs=kwargs))
    return replace(evaluation, steps=tuple(steps), output=_read(evaluation.output, training.output, made))


def _is_one(step: Step, dropped: Mapping[str, str]) -> bool:
    return len(step.results) == 1 and step.results[0][1] in dropped


def _read(plain: Any, trained: Any, made: set[str]) -> Any:
    """What a step reads, with what was dropped in the same frame wherever the frame of training reads that."""
    if isinstance(plain, Ref):
        return trained if isinstance(trained, Ref) and trained.name in made else plain
    if isinstance(plain, tuple | list):
        read = [_read(one, other, made) for one, other in zip(plain, trained, strict=False)]
        return type(plain)([*read, *plain[len(read) :]])  # the last may be a dropout that is given only in one mode
    if isinstance(plain, dict):
        return {key: _read(item, trained[key], made) if key in trained else item for key, item in plain.items()}
    if isinstance(plain, slice):
        return slice(*(_read(one, other, made) for one, other in zip(_parts(plain), _parts(trained), strict=True)))
    return plain


def _parts(item: slice) -> tuple[Any, Any, Any]:
    return item.start, item.stop, item.step


def _named(item: Any, names: Mapping[str, str]) -> Any:
    """A frame, or a part of one, with other names for some of its tensors."""
    if isinstance(item, Ref):
        return Ref(names.get(item.name, item.name))
    if isinstance(item, Extent):
        return replace(item, node=names.get(item.node, item.node))
    if isinstance(item, Operation):
        return replace(item, operands=tuple(_named(part, names) for part in item.operands))
    if isinstance(item, tuple | list):
        return type(item)(_named(part, names) for part in item)
    if isinstance(item, dict):
        return {key: _named(part, names) for key, part in item.items()}
    if isinstance(item, slice):
        return slice(*(_named(part, names) for part in _parts(item)))
    if isinstance(item, Built):
        return replace(item, items=_named(dict(item.items), names))
    if isinstance(item, Step):
        return replace(item, args=_named(item.args, names), kwargs=_named(dict(item.kwargs), names))
    if isinstance(item, Frame):
        given = {"args": _named(item.args, names), "kwargs": _named(dict(item.kwargs), names)}
        return replace(item, **given, steps=_named(item.steps, names), output=_named(item.output, names))
    return item
