"""Give every tensor function that a model calls a key that is the same in an export and in an ordinary run.

The same Python code makes the same calls in the same order, so the k-th call of a function in a module identifies
one place in the code. By this key a node of the exported graph is found again in the running model, whatever the
batch size, and even after other parts were removed.
"""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from idap.graph.ir import CallKey

Handler = Callable[[CallKey, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Receives one call and must return its result, usually by making the call."""

_IN_PYTHON = ("multi_head_attention_forward",)
"""Functions of torch that are written in Python: the calls inside them count, not the function as a whole."""

_OF_EVERY_MODULE = frozenset(dir(nn.Module()))


class Stack:
    """The paths of the modules that are running, the innermost last.

    A module that does not belong to the model counts as its caller; outside the model the path is None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.path_of: dict[int, str] = {}
        for path, module in model.named_modules():
            self.path_of.setdefault(id(vars(module)), path)
        self.paths: list[str | None] = []
        self.entered: Callable[[], None] = lambda: None

    @property
    def current(self) -> str | None:
        """Path of the innermost module, None outside of the model."""
        return self.paths[-1] if self.paths else None

    def enter(self, module: nn.Module, _inputs: Any) -> None:
        """Record that a module is called."""
        path = self.path_of.get(id(vars(module)))
        if path == "":
            self.paths.clear()
            self.entered()
        self.paths.append(self.current if path is None else path)

    def leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        """Record that a module returns."""
        if self.paths:
            self.paths.pop()

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Follow the calls of all modules."""
        before = register_module_forward_pre_hook(self.enter)
        after = register_module_forward_hook(self.leave, always_call=True)
        try:
            yield
        finally:
            after.remove()
            before.remove()


class _Intercept(TorchFunctionMode):
    def __init__(self, stack: Stack, handler: Handler) -> None:
        super().__init__()
        self._stack = stack
        self._handler = handler
        self._counts: dict[tuple[str, str], int] = {}
        stack.entered = self._counts.clear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        path = self._stack.current
        if path is None:  # data loading, a loss: not the model's own code
            return func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _IN_PYTHON:
            with self:
                return _without_override(func)(*args, **(kwargs or {}))
        place = (path, getattr(func, "__name__", str(func)))
        count = self._counts.get(place, 0)
        self._counts[place] = count + 1
        return self._handler((*place, count), func, args, kwargs or {})


def _without_override(func: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function without its first step, which would hand the call back to the interceptor."""
    unaware = {name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")}
    return types.FunctionType(
        func.__code__, {**func.__globals__, **unaware}, func.__name__, func.__defaults__, func.__closure__
    )


@contextmanager
def intercept(model: nn.Module, handler: Handler) -> Iterator[Stack]:
    """Route every tensor function that `model` calls through `handler`; all hooks are removed afterwards.

    Args:
        model: the model whose forward is run inside the context.
        handler: receives the call's key, the function and its arguments; returns the result.

    Yields:
        The modules that are running.
    """
    stack = Stack(model)
    with stack.follow(), _Intercept(stack, handler):
        yield stack


def _reads_itself(frame: types.FrameType, module: nn.Module) -> bool:
    """Whether the code that runs is a method of the module, such as a `__call__` of its own."""
    names = frame.f_code.co_varnames[:1]
    return bool(names) and frame.f_locals.get(names[0]) is module


@contextmanager
def watch_attributes(model: nn.Module) -> Iterator[dict[str, set[str]]]:
    """Find which modules' attributes are read by the code of other modules; all hooks are removed afterwards.

    Attributes that every module has, such as `training`, do not count: a stand-in has them too.

    Args:
        model: the model whose forward is run inside the context.

    Yields:
        A mapping that fills while the model runs: the path of a module -> the paths of the modules that read it.
    """
    stack, found = Stack(model), dict[str, set[str]]()

    def read(module: nn.Module, name: str) -> Any:
        if stack.current is not None and not name.startswith("_") and name not in _OF_EVERY_MODULE:
            path = stack.path_of.get(id(object.__getattribute__(module, "__dict__")))
            if path is not None and path != stack.current and not _reads_itself(sys._getframe(1), module):
                found.setdefault(path, set()).add(stack.current)
        return object.__getattribute__(module, name)

    with stack.follow():
        nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
        try:
            yield found
        finally:
            del nn.Module.__getattribute__
