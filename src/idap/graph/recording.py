"""Record what a forward pass does while the exporter runs it: calls, sizes with their origin, module boundaries."""

import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, resolve_name
from torch.utils._pytree import tree_leaves

from idap.graph.calls import Stack, intercept
from idap.graph.frames import Built, Frame, Step, Unseen, origin_of_type
from idap.graph.ir import CallKey, Comparison, Expression, Extent, Operation, Ref, leaves
from idap.graph.provenance import Notes, TracedInt, expression_of, plain, remember_sizes
from idap.graph.run import tensors_of

_SHAPE_GETTER = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_DTYPE_GETTER = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_COUNTS = ("numel", "nelement")
_PLAIN = (int, float, str, bool, complex, type(None), type(...), torch.dtype, torch.device, torch.memory_format)

_FACTORIES = ("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "tensor", "tril_indices", "triu_indices")
"""Functions that make tensors of numbers."""

_UNLISTED = ("hardsigmoid", "hardswish")
"""Functions of torch.nn.functional that torch does not list among those that can be overridden."""

_BETWEEN = ("idap/graph/recording.py", "idap/graph/calls.py", "torch/overrides.py")
"""Files whose stack frames lie between the code of a model and the recording of its call."""


@dataclass
class Event:
    """One eager call.

    Attributes:
        key: its key.
        place: identifies it by the line of code that makes it, which stays unique if the code takes another branch.
        sizes: the ints it was given.
        outputs: names and shapes of the tensors it returned.
        same: the earlier name of its result, if it returned a tensor that it was given.
    """

    key: CallKey
    place: str
    sizes: tuple[Expression, ...]
    outputs: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    same: str = ""


@dataclass
class Record:
    """What was recorded in one forward pass.

    Attributes:
        events: the calls, in order; a node of the export carries the index of its call.
        frames: module path -> what its own code did in each of its calls.
        escaped: sizes from which the code computed other numbers, each with the modules and the place.
        compared: the comparisons of sizes that the code made, with their outcomes.
    """

    events: list[Event] = field(default_factory=list)
    frames: dict[str, list[Frame]] = field(default_factory=dict)
    escaped: dict[Expression, dict[str, str]] = field(default_factory=dict)
    compared: list[Comparison] = field(default_factory=list)


@dataclass
class _Open:
    """A call of a module that is running."""

    path: str
    args: Any
    kwargs: Any
    modes: tuple[bool, ...]
    reads_type: bool = False
    steps: list[Step] = field(default_factory=list)


@contextmanager
def record_forward(model: nn.Module) -> Iterator[Record]:
    """Record the last forward pass that runs inside the context.

    Args:
        model: a copy of the user's model: its ints are replaced by ints that remember their place.

    Yields:
        The record, which the forward pass fills.
    """
    recorder = _Recorder(model, remember_sizes(model.named_modules()))
    forward = model.forward
    model.forward = recorder.run
    try:
        yield recorder.record
    finally:
        model.forward = forward


class _Recorder:
    def __init__(self, model: nn.Module, notes: Notes) -> None:
        self.record = Record()
        self._model, self._notes, self._forward = model, notes, model.forward
        self._origin: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._open: list[_Open] = []
        self._places: dict[str, int] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward and record it; the record of an earlier run is discarded."""
        self._notes.clear()
        self._origin.clear()
        self._open.clear()
        self._places.clear()
        for table in (self.record.events, self.record.frames, self.record.escaped, self.record.compared):
            table.clear()
        for place, leaf in enumerate(tree_leaves((args, kwargs))):
            self._name(leaf, f"input:{place}")
        for name, tensor in tensors_of(self._model).items():
            self._name(tensor, f"tensor:{name}")
        with ExitStack() as wrapped, intercept(self._model, self._call) as stack:
            for module in self._model.modules():
                wrapped.enter_context(self._follow(module, stack))
            stack.enter(self._model, ())  # the model was entered before its calls were followed
            result = self._model.forward(*args, **kwargs)
        self.record.escaped |= self._notes.escaped
        self.record.compared += self._notes.compared
        return result

    @contextmanager
    def _follow(self, module: nn.Module, stack: Stack) -> Iterator[None]:
        """Record what enters and leaves a module. Its forward is wrapped, as some code checks whether it has hooks."""
        own, before = vars(module).get("forward"), self._forward if module is self._model else module.forward

        path = stack.path_of[id(vars(module))]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if stack.current != path:  # forward is called directly: its steps count as its caller's
                return before(*args, **kwargs)
            self._enter(path, args, kwargs)
            result = before(*args, **kwargs)
            self._leave(result)
            return result

        module.forward = forward
        try:
            yield
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own

    def _name(self, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            self._origin[id(value)] = weakref.ref(value), name

    def _origin_of(self, value: Any) -> str:
        found = self._origin.get(id(value)) if isinstance(value, Tensor) else None
        return found[1] if found is not None and found[0]() is value else ""

    def _enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._notes.module = path
        self._open.append(_Open(path, self._note(args), self._note(kwargs), _modes()))

    def _leave(self, output: Any) -> None:
        done = self._open.pop()
        frame = Frame(done.args, done.kwargs, tuple(done.steps), self._note(output))
        self.record.frames.setdefault(done.path, []).append(frame)
        if self._open:
            self._notes.module = self._open[-1].path
            step = Step("", done.path, done.args, done.kwargs, tuple(places_in(frame.output)))
            self._open[-1].steps.append(step)

    def _note(self, tree: Any) -> Any:
        """An argument tree as plain data."""
        if isinstance(tree, Tensor):
            name = self._origin_of(tree)
            return Ref(name) if name else Unseen("a tensor from elsewhere")
        if isinstance(tree, TracedInt):
            return tree.expression
        if isinstance(tree, slice):
            return slice(*(self._note(item) for item in (tree.start, tree.stop, tree.step)))
        if isinstance(tree, Mapping):  # a dictionary, or an output class of transformers
            items = {key: self._note(item) for key, item in tree.items()}
            return items if type(tree) is dict else Built(type(tree).__name__, items)
        if isinstance(tree, tuple | list):
            members = [self._note(item) for item in tree]
            if type(tree) not in (tuple, list, torch.Size):
                return Built(type(tree).__name__, dict(enumerate(members)))
            return members if isinstance(tree, list) else tuple(members)
        if isinstance(tree, torch.dtype) and self._open and self._open[-1].reads_type:
            return origin_of_type(self._caller_frame(), tree)
        return tree if isinstance(tree, _PLAIN) else Unseen(type(tree).__name__)

    def _call(self, key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if func == _SHAPE_GETTER or name == "size":
            return self._shape(func, args, kwargs)
        if name in _COUNTS:
            return self._count(func, args[0])
        if name == "__len__":
            return self._shape(torch.Tensor.size, (args[0], 0), {})
        if name == "__iter__":
            return iter(self._call(key, torch.Tensor.unbind, args, kwargs))
        return self._note_call(key, func, args, kwargs)

    def _note_call(self, key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        noted = (self._note(args), self._note(kwargs))
        events = self.record.events
        with fx_traceback.annotate({"idap_call": len(events)}):
            event = Event(key, self._place(key), _expressions(args, kwargs))
            events.append(event)
            result = func(*plain(args), **plain(kwargs))
        event.same = self._origin_of(result)
        for position, tensor in enumerate(leaf for leaf in leaves(result) if isinstance(leaf, Tensor)):
            name = f"{event.place}:{position}"
            event.outputs.append((name, tuple(tensor.shape)))
            self._name(tensor, name)
        if func == _DTYPE_GETTER and self._open:
            self._open[-1].reads_type = True
        if self._open and (event.outputs or key[1] == "__setitem__"):
            # A call in other modes than those in which the module was called gets no name: it can't be rewritten.
            name = function_name(func) if _modes() == self._open[-1].modes else ""
            step = Step(name, "", *noted, tuple(places_in(self._note(result))), event.place)
            self._open[-1].steps.append(step)
        return result

    def _caller_frame(self) -> types.FrameType:
        """The frame of the model's code that makes the call."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(_BETWEEN) and frame.f_back is not None:
            frame = frame.f_back
        return frame

    def _place(self, key: CallKey) -> str:
        """The module, the function and the line of code of a call, and the number of such calls before it."""
        frame = self._caller_frame()
        place = f"{key[0]}/{key[1]}/{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        count = self._places[place] = self._places.get(place, -1) + 1
        return f"{place}/{count}"

    def _shape(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*plain(args), **plain(kwargs))
        extents = self._extents(args[0])
        if not extents:
            return result
        traced = [TracedInt(extent.value, extent, self._notes) for extent in extents]
        if isinstance(result, tuple):
            return torch.Size(traced)
        return traced[int(kwargs["dim"] if "dim" in kwargs else args[1])]

    def _count(self, func: Callable[..., Any], tensor: Tensor) -> Any:
        extents = self._extents(tensor)
        if not extents:
            return func(tensor)
        product: Expression = extents[0]
        for extent in extents[1:]:
            product = Operation("*", (product, extent), product.value * extent.value)
        return TracedInt(product.value, product, self._notes)

    def _extents(self, value: Any) -> list[Extent]:
        """The sizes of a tensor, by its name; empty if the tensor is unknown or its sizes are symbolic."""
        origin = self._origin_of(value)
        if not origin or any(type(size) is not int for size in value.shape):
            return []
        return [Extent(origin, dim, size) for dim, size in enumerate(value.shape)]


def _modes() -> tuple[bool, ...]:
    """The modes that torch code runs in: whether gradients are computed, and whether precision is mixed."""
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"))  # fmt: skip


def _expressions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Expression, ...]:
    return tuple(
        expression_of(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, int) and not isinstance(leaf, bool)
    )


def places_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Every tensor of a recorded result, as (place in the result, name of the tensor)."""
    if isinstance(tree, Ref):
        yield path, tree.name
    elif isinstance(tree, dict | Built):
        for key, item in (tree.items if isinstance(tree, Built) else tree).items():
            yield from places_in(item, (*path, key))
    elif isinstance(tree, tuple | list):
        for index, item in enumerate(tree):
            yield from places_in(item, (*path, index))


@cache
def torch_functions() -> Mapping[str, Callable[..., Any]]:
    """The functions of torch that compute tensors, by name."""
    functions = {function for named in get_overridable_functions().values() for function in named}
    found = {str(name): function for function in functions if (name := resolve_name(function))}
    methods = {f"torch.Tensor.{name}": getattr(torch.Tensor, name) for name in dir(torch.Tensor) if name[0] != "_"}
    methods = {name: method for name, method in methods.items() if callable(method)}
    found |= {f"torch.{name}": getattr(torch, name) for name in _FACTORIES}
    return methods | found | {f"torch.nn.functional.{name}": getattr(F, name) for name in _UNLISTED}


@cache
def _function_names() -> Mapping[Any, str]:
    return {function: name for name, function in torch_functions().items()}


def function_name(func: Callable[..., Any]) -> str:
    """The name in torch of a function that models call, such as ``torch.Tensor.view``; "" if it has none."""
    return _function_names().get(func, "")
