"""Note what a forward pass does while the exporter runs it: calls, sizes with their origin, module boundaries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from idap.graph.calls import intercept
from idap.graph.ir import CallKey, Comparison, Expression, Extent, Operation, leaves
from idap.graph.provenance import Notes, TracedInt, expression_of, plain, remember_sizes

_SHAPE_GETTER = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_COUNTS = ("numel", "nelement")
_OPAQUE = ("multi_head_attention_forward",)
"""Functions of torch written in Python that compute sizes from those of their inputs where nobody can see it."""


@dataclass
class Event:
    """One eager call: the sizes it was given and the tensors it returned."""

    key: CallKey
    sizes: tuple[Expression, ...]
    outputs: list[Tensor]


@dataclass
class Record:
    """What was noted in one forward pass.

    Tensors are named by where they came from: ``event:position``, ``input:place`` or ``tensor:name``.

    Attributes:
        events: the calls, in order; a node of the export carries the index of its call.
        calls: module path -> for each of its calls the tensor it was given first and the one it returned, "" if other.
        escaped: sizes that were turned into other numbers, with the place.
        equal: sizes that were compared and found equal.
    """

    events: list[Event] = field(default_factory=list)
    calls: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    escaped: dict[Expression, str] = field(default_factory=dict)
    equal: list[Comparison] = field(default_factory=list)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Record]:
    """Note the last forward pass that runs inside the context.

    Args:
        model: a copy of the user's model: its ints are replaced by ints that remember their place.
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
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self._paths.setdefault(id(module), path)
        # The tensors are kept, or their ids could be used again.
        self._origin: dict[int, tuple[Tensor, str]] = {}
        self._given: list[str] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with everything noted; what an earlier run noted is forgotten."""
        self._notes.clear()
        self._origin.clear()
        for table in (self.record.events, self.record.calls, self.record.escaped, self.record.equal):
            table.clear()
        for place, leaf in enumerate(tree_leaves((args, kwargs))):
            self._name(leaf, f"input:{place}")
        for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
            self._name(tensor, f"tensor:{name}")
        self._given.clear()
        before, after = register_module_forward_pre_hook(self._entered), register_module_forward_hook(self._returned)
        try:
            with intercept(self._model, self._call):
                result = self._enter_root(args, kwargs)
        finally:
            after.remove()
            before.remove()
        self.record.escaped |= self._notes.escaped
        self.record.equal += self._notes.equal
        return result

    def _enter_root(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model once more as a module: it was entered before the hooks that follow modules were there."""
        self._model.forward = self._forward
        try:
            return nn.Module.__call__(self._model, *args, **kwargs)
        finally:
            self._model.forward = self.run

    def _name(self, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            self._origin[id(value)] = (value, name)

    def _origin_of(self, value: Any) -> str:
        return self._origin[id(value)][1] if isinstance(value, Tensor) and id(value) in self._origin else ""

    def _entered(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._given.append(self._origin_of(inputs[0]) if inputs else "")  # it may be changed in place inside

    def _returned(self, module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        given, path = self._given.pop(), self._paths.get(id(module))
        if path:
            self.record.calls.setdefault(path, []).append((given, self._origin_of(output)))

    def _call(self, key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if func == _SHAPE_GETTER or name == "size":
            return self._shape(func, args, kwargs)
        if name in _COUNTS:
            return self._count(func, args[0])
        if name in _OPAQUE:
            for extent in (extent for leaf in leaves((args, kwargs)) for extent in self._extents(leaf)):
                self._notes.escaped.setdefault(extent, f"torch's {name}")
        events = self.record.events
        with fx_traceback.annotate({"idap_call": len(events)}):
            index = len(events)
            event = Event(key, _expressions(args, kwargs), [])
            events.append(event)
            result = func(*plain(args), **plain(kwargs))
        event.outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        for position, tensor in enumerate(event.outputs):
            self._name(tensor, f"event:{index}:{position}")
        return result

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
        """The sizes of a tensor, by name; none if it is not known or its sizes are symbols."""
        origin = self._origin_of(value)
        if not origin or any(type(size) is not int for size in value.shape):
            return []
        return [Extent(origin, dim, size) for dim, size in enumerate(value.shape)]


def _expressions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Expression, ...]:
    return tuple(
        expression_of(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, int) and not isinstance(leaf, bool)
    )
