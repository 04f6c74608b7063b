"""Find out what the code of modules does in training and without masks, beyond what the export shows."""

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
    """The step as a plain call of dropout if it does nothing else; otherwise None.

    A rewritten forward calls dropout in this form and sets `training` by the mode of the module.
    """
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


def training_dropouts(training: Iterable[Step], evaluation: Iterable[Step]) -> dict[str, str]:
    """The dropouts that are called only in training: name of the tensor returned -> name of the tensor given."""
    known = {step.place for step in evaluation}
    dropped: dict[str, str] = {}
    for step in training:
        found = dropout_in(step) if step.place not in known else None
        if found is not None:
            dropped[found.results[0][1]] = found.args[0].name
    return {name: _before_dropouts(given, dropped) for name, given in dropped.items()}


def _before_dropouts(name: str, dropped: Mapping[str, str]) -> str:
    """The tensor that the first of several dropouts in a row was given."""
    while name in dropped:
        name = dropped[name]
    return name


def remove_dropouts(frame: Frame, dropped: Mapping[str, str]) -> Frame:
    """The frame of a training run without these dropouts, as if each returned the tensor that it is given."""
    steps = [step for step in frame.steps if not _is_dropout(step, dropped)]
    renamed: Frame = _rename(replace(frame, steps=tuple(steps)), dropped)
    return renamed


def insert_dropouts(evaluation: Frame, training: Frame, dropped: Mapping[str, str]) -> Frame:
    """Insert the dropouts of training into the frame of evaluation; sizes keep the names of the exported tensors.

    Args:
        evaluation: a frame that equals `training` without these dropouts.
        training: the frame of the same call of the module in training.
        dropped: see `training_dropouts`.
    """
    made: set[str] = set()
    steps: list[Step] = []
    rest = iter(evaluation.steps)
    for step in training.steps:
        if _is_dropout(step, dropped):
            called = dropout_in(step) or step  # the call of a dropout module already has the right form
            args, kwargs = (_read(_rename(given, dropped), given, made) for given in (called.args, dict(called.kwargs)))
            steps.append(replace(called, args=args, kwargs=kwargs))
            made.add(step.results[0][1])
        else:
            plain = next(rest)
            args, kwargs = _read(plain.args, step.args, made), _read(plain.kwargs, step.kwargs, made)
            steps.append(replace(plain, args=args, kwargs=kwargs))
    return replace(evaluation, steps=tuple(steps), output=_read(evaluation.output, training.output, made))


def _is_dropout(step: Step, dropped: Mapping[str, str]) -> bool:
    return len(step.results) == 1 and step.results[0][1] in dropped


def _read(plain: Any, trained: Any, made: set[str]) -> Any:
    """The arguments of a step, with a tensor from `made` wherever the frame of training reads that tensor."""
    if isinstance(plain, Ref):
        return trained if isinstance(trained, Ref) and trained.name in made else plain
    if isinstance(plain, tuple | list):
        read = [_read(one, other, made) for one, other in zip(plain, trained, strict=False)]
        return type(plain)([*read, *plain[len(read) :]])  # the last may be a dropout that only one mode passes
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
"""Arguments that may differ in training: a rewritten forward sets them by the mode of the module."""


@dataclass(frozen=True)
class OtherRuns:
    """What the runs in training and without masks showed.

    Attributes:
        unmasked: what the modules do if no mask masks anything; empty if this could not be tried.
        dropped: call of a fused attention -> its dropout in training.
        training: the frames of the modules that call dropout only in training, with these calls inserted.
        unwritable: modules whose code can't be rewritten, with the reason.
        escaped: sizes from which the code computes other numbers in training, each with the modules and the place.
    """

    unmasked: list[Frames] = field(default_factory=list)
    dropped: dict[str, float] = field(default_factory=dict)
    training: dict[str, tuple[Frame, ...]] = field(default_factory=dict)
    unwritable: dict[str, str] = field(default_factory=dict)
    escaped: dict[Expression, dict[str, str]] = field(default_factory=dict)


def run_in_other_modes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frames: Frames) -> OtherRuns:
    """Run copies of a model in training and without masks, and compare what its modules do.

    Args:
        model: the model; it is not changed.
        args: positional example inputs.
        kwargs: keyword example inputs.
        frames: what the modules do in evaluation.
    """
    found = OtherRuns(_run_unmasked(model, args, kwargs), unwritable=dict(_opaque_modules(model, frames)))
    candidates = [path for path, module in model.named_modules() if _has_training_code(module)]
    if not candidates:
        return found
    record = _run_in_training(model, args, kwargs)
    training = None if record is None else record.frames
    found.escaped.update({} if record is None else record.escaped)
    dropped = training_dropouts(_steps(training or {}), _steps(frames))
    for path in (path for path in candidates if _has_sizes(frames.get(path, ()))):
        trained, plain = (training or {}).get(path, ()), frames.get(path, ())
        if training is None or _modes_differ(trained, plain, dropped):
            found.unwritable.setdefault(path, "it does something else in training, which a rewritten forward would not")
        elif sum(len(frame.steps) for frame in trained) > sum(len(frame.steps) for frame in plain):
            pairs = zip(plain, trained, strict=True)
            found.training[path] = tuple(insert_dropouts(one, other, dropped) for one, other in pairs)
    for step in _steps(training or {}):
        if step.function.endswith(_ATTENTION):
            share = step.kwargs.get("dropout_p", step.args[4] if len(step.args) > 4 else 0.0)
            if isinstance(share, float) and share > 0:
                found.dropped[step.place] = share
    return found


def _opaque_modules(model: nn.Module, frames: Frames) -> Iterator[tuple[str, str]]:
    """The modules whose calls are changed by code outside their class, each with the reason."""
    modules = dict(model.named_modules())
    hooked = {path for path, module in modules.items() if module._forward_hooks or module._forward_pre_hooks}
    for path, module in modules.items():
        if "forward" in vars(module):
            yield path, "its forward was replaced on the object"
        elif any(step.module in hooked for frame in frames.get(path, ()) for step in frame.steps if step.module):
            yield path, "a module that it calls has hooks"


def _has_sizes(frames: Sequence[Frame]) -> bool:
    """Whether a module's own code may ever have to be rewritten: it passes sizes to functions, or calls attention."""
    for step in (step for frame in frames for step in frame.steps if not step.module):
        given = leaves((step.args, dict(step.kwargs)))
        if step.function.endswith(_ATTENTION) or any(
            isinstance(leaf, _SIZES) and not isinstance(leaf, bool) for leaf in given
        ):
            return True
    return False


def _has_training_code(module: nn.Module) -> bool:
    """Whether a module's own code reads `training`; what the layers of torch do in training is known."""
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
    """Whether a module does anything else in training than to call dropout."""
    return _without_dropout([remove_dropouts(frame, dropped) for frame in trained]) != _without_dropout(plain)


def _without_dropout(frames: Sequence[Frame]) -> list[tuple[Any, ...]]:
    return [(frame.args, frame.kwargs, [_modeless(step) for step in frame.steps], frame.output) for frame in frames]


def _modeless(step: Step) -> tuple[Any, ...]:
    args = step.args[:4] + step.args[5:] if step.function.endswith(_ATTENTION) else step.args
    return step.function, step.module, args, {k: v for k, v in step.kwargs.items() if k not in _FOLLOWS}, step.results


def _steps(frames: Frames) -> Iterator[Step]:
    return (step for calls in frames.values() for frame in calls for step in frame.steps)


def _full_mask(leaf: Any) -> Any:
    """A mask of ones for a mask that holds zeros, as code may branch on that; any other input as it is."""
    if isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_meta:
        return torch.ones_like(leaf) if bool(((leaf == 0) | (leaf == 1)).all()) and bool((leaf == 0).any()) else leaf
    return leaf


def _run_unmasked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Frames]:
    """What the modules do if no mask masks anything; empty if no input is a mask, or if the run fails."""
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
