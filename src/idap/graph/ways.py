"""What else the code of modules does: in training, without masks. Runs that may only add to what is known.

They run on shapes without numbers, or on copies of everything, so they leave nothing behind; what they can't run they
don't learn, and the modules in question are then not written anew.
"""

import copy
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from idap.graph.copies import computed, own_inputs, skeleton
from idap.graph.dropouts import only_in_training, with_them, without
from idap.graph.frames import Frame, Step
from idap.graph.ir import Attribute, Expression, Extent, Operation, leaves
from idap.graph.recording import Record, recorded

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
    found = Ways(_run_unmasked(model, args, kwargs), unwritable=dict(_closed(model, frames)))
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


def _closed(model: nn.Module, frames: Frames) -> Iterator[tuple[str, str]]:
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
            with recorded(copied) as record:
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


def _unmasked(leaf: Any) -> Any:
    """A mask that masks nothing, in the place of one: code may take another way then."""
    if isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_meta:
        return torch.ones_like(leaf) if bool(((leaf == 0) | (leaf == 1)).all()) and bool((leaf == 0).any()) else leaf
    return leaf


def _run_unmasked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Frames]:
    """What the modules do if no mask masks anything, where that can be tried."""
    unmasked = tree_map(_unmasked, (args, kwargs))
    if all(one is other for one, other in zip(tree_leaves((args, kwargs)), tree_leaves(unmasked), strict=True)):
        return []
    given, named = own_inputs(*unmasked)
    copied = copy.deepcopy(model, computed(model)).eval()
    try:
        with torch.random.fork_rng(), torch.no_grad(), recorded(copied) as record:
            copied(*given, **named)
    except Exception:
        return []
    return [record.frames]
