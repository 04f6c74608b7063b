"""What else the code of modules does: in training, without masks. Runs that may only add to what is known."""

import copy
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from idap.graph.frames import Built, Frame, Step
from idap.graph.ir import Attribute, Expression, Extent, Operation, Ref, leaves
from idap.graph.recording import Record, record_forward
from idap.graph.run import copy_computed, own_inputs, skeleton

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
    told: Frame = _rename(replace(frame, steps=tuple(steps)), dropped)
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
            args, kwargs = (_read(_rename(given, dropped), given, made) for given in (called.args, dict(called.kwargs)))
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


def _rename(item: Any, names: Mapping[str, str]) -> Any:
    """A frame, or a part of one, with other names for some of its tensors."""
    if isinstance(item, Ref):
        return Ref(names.get(item.name, item.name))
    if isinstance(item, Extent):
        return replace(item, node=names.get(item.node, item.node))
    if isinstance(item, Operation):
        return replace(item, operands=tuple(_rename(part, names) for part in item.operands))
    if isinstance(item, tuple | list):
        return type(item)(_rename(part, names) for part in item)
    if isinstance(item, dict):
        return {key: _rename(part, names) for key, part in item.items()}
    if isinstance(item, slice):
        return slice(*(_rename(part, names) for part in _parts(item)))
    if isinstance(item, Built):
        return replace(item, items=_rename(dict(item.items), names))
    if isinstance(item, Step):
        return replace(item, args=_rename(item.args, names), kwargs=_rename(dict(item.kwargs), names))
    if isinstance(item, Frame):
        given = {"args": _rename(item.args, names), "kwargs": _rename(dict(item.kwargs), names)}
        return replace(item, **given, steps=_rename(item.steps, names), output=_rename(item.output, names))
    return item


Frames = Mapping[str, Sequence[Frame]]
"""Module path -> what its own code did in each of its calls."""

_ATTENTION = ".scaled_dot_product_attention"
_SIZES = (int, Attribute, Extent, Operation)
_FOLLOWS = ("training", "dropout_p")
"""Arguments that may differ in training: new code sets them by the mode."""


@dataclass(frozen=True)
class Ways:
    """What was learned.

    Attributes:
        unmasked: what the modules do if no mask masks anything, as far as that could be tried.
        dropped: call of a fused attention -> its dropout in training.
        training: what the modules do that call dropout only in training, with these calls put in.
        unwritable: modules whose code can't be written anew, with the reason.
        escaped: sizes from which the code computes other numbers in training: for each the modules, with the place.
    """

    unmasked: list[Frames] = field(default_factory=list)
    dropped: dict[str, float] = field(default_factory=dict)
    training: dict[str, tuple[Frame, ...]] = field(default_factory=dict)
    unwritable: dict[str, str] = field(default_factory=dict)
    escaped: dict[Expression, dict[str, str]] = field(default_factory=dict)


def other_ways(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frames: Frames) -> Ways:
    """Try what the modules do in training and without masks.

    Args:
        model: is left as it is.
        args: positional example inputs.
        kwargs: keyword example inputs.
        frames: what they do in evaluation.
    """
    found = Ways(_run_unmasked(model, args, kwargs), unwritable=dict(_opaque_modules(model, frames)))
    asking = [path for path, module in model.named_modules() if _asks_for_training(module)]
    if not asking:
        return found
    record = _run_in_training(model, args, kwargs)
    training = None if record is None else record.frames
    found.escaped.update({} if record is None else record.escaped)
    dropped = only_in_training(_steps(training or {}), _steps(frames))
    for path in (path for path in asking if _is_given_sizes(frames.get(path, ()))):
        trained, plain = (training or {}).get(path, ()), frames.get(path, ())
        if training is None or _modes_differ(trained, plain, dropped):
            found.unwritable.setdefault(path, "it does something else in training, which new code would not do")
        elif sum(len(frame.steps) for frame in trained) > sum(len(frame.steps) for frame in plain):
            pairs = zip(plain, trained, strict=True)
            found.training[path] = tuple(with_them(one, other, dropped) for one, other in pairs)
    for step in _steps(training or {}):
        if step.function.endswith(_ATTENTION):
            share = step.kwargs.get("dropout_p", step.args[4] if len(step.args) > 4 else 0.0)
            if isinstance(share, float) and share > 0:
                found.dropped[step.place] = share
    return found


def _opaque_modules(model: nn.Module, frames: Frames) -> Iterator[tuple[str, str]]:
    """Modules that something outside of their class has a hand in."""
    modules = dict(model.named_modules())
    hooked = {path for path, module in modules.items() if module._forward_hooks or module._forward_pre_hooks}
    for path, module in modules.items():
        if "forward" in vars(module):
            yield path, "its forward was replaced on the object"
        elif any(step.module in hooked for frame in frames.get(path, ()) for step in frame.steps if step.module):
            yield path, "a module that it calls has hooks"


def _is_given_sizes(frames: Sequence[Frame]) -> bool:
    """Whether a module's own code may ever need to be written anew: it hands sizes to functions, or has attention."""
    for step in (step for frame in frames for step in frame.steps if not step.module):
        given = leaves((step.args, dict(step.kwargs)))
        if step.function.endswith(_ATTENTION) or any(
            isinstance(leaf, _SIZES) and not isinstance(leaf, bool) for leaf in given
        ):
            return True
    return False


def _asks_for_training(module: nn.Module) -> bool:
    """Whether a module's own code asks if it is in training; torch's layers do what they say."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    if kind.__module__.startswith("torch.nn.modules."):
        return False
    for base in kind.__mro__:
        if base is nn.Module:
            return False
        for member in vars(base).values():
            if isinstance(member, types.FunctionType) and "training" in member.__code__.co_names:
                return True
    return False


def _run_in_training(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record | None:
    copied = skeleton(model).train()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            given, named = tree_map_only(Tensor, fake.from_tensor, (args, kwargs))
            with record_forward(copied) as record:
                copied(*given, **named)
    except Exception:
        return None
    return record


def _modes_differ(trained: Sequence[Frame], plain: Sequence[Frame], dropped: Mapping[str, str]) -> bool:
    """Whether a module does more in training than to drop."""
    return _without_dropout([without(frame, dropped) for frame in trained]) != _without_dropout(plain)


def _without_dropout(frames: Sequence[Frame]) -> list[tuple[Any, ...]]:
    return [(frame.args, frame.kwargs, [_modeless(step) for step in frame.steps], frame.output) for frame in frames]


def _modeless(step: Step) -> tuple[Any, ...]:
    args = step.args[:4] + step.args[5:] if step.function.endswith(_ATTENTION) else step.args
    return step.function, step.module, args, {k: v for k, v in step.kwargs.items() if k not in _FOLLOWS}, step.results


def _steps(frames: Frames) -> Iterator[Step]:
    return (step for calls in frames.values() for frame in calls for step in frame.steps)


def _full_mask(leaf: Any) -> Any:
    """A mask that masks nothing, in the place of one: code may take another way then."""
    if isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_meta:
        return torch.ones_like(leaf) if bool(((leaf == 0) | (leaf == 1)).all()) and bool((leaf == 0).any()) else leaf
    return leaf


def _run_unmasked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Frames]:
    """What the modules do if no mask masks anything, where that can be tried."""
    unmasked = tree_map(_full_mask, (args, kwargs))
    if all(one is other for one, other in zip(tree_leaves((args, kwargs)), tree_leaves(unmasked), strict=True)):
        return []
    given, named = own_inputs(*unmasked)
    copied = copy.deepcopy(model, copy_computed(model)).eval()
    try:
        with torch.random.fork_rng(), torch.no_grad(), record_forward(copied) as record:
            copied(*given, **named)
    except Exception:
        return []
    return [record.frames]
