"""Name every tensor function that a model's forward calls, in an export and in an ordinary run alike.

The same Python code makes the same calls in the same order, so the k-th call of a function in a module is one
place in the code. That is how a node of the exported graph is found again in the running model, whatever its
batch size, and also after other parts were cut or removed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from idap.graph.ir import CallKey

Handler = Callable[[CallKey, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Receives one call and must return its result, usually by making the call."""


class _Intercept(TorchFunctionMode):
    def __init__(self, model: nn.Module, handler: Handler) -> None:
        super().__init__()
        self._handler = handler
        self._paths: dict[int, str] = {}
        for path, module in model.named_modules():
            self._paths.setdefault(id(module), path)
        self._stack: list[str] = []
        self._counts: dict[tuple[str, str], int] = {}

    def enter(self, module: nn.Module, _inputs: Any) -> None:
        path = self._paths.get(id(module))
        if path == "":
            self._stack.clear()
            self._counts.clear()
        self._stack.append(self._stack[-1] if path is None and self._stack else path or "")

    def leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._stack:
            self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._stack:  # data loading, a loss: not the model's own code
            return func(*args, **(kwargs or {}))
        place = (self._stack[-1], getattr(func, "__name__", str(func)))
        count = self._counts.get(place, 0)
        self._counts[place] = count + 1
        return self._handler((*place, count), func, args, kwargs or {})


@contextmanager
def intercept(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Route every tensor function that `model` calls through `handler`; leaves nothing behind.

    Args:
        model: the model whose forward is run inside the context.
        handler: gets the call's key, the function and its arguments; returns the result.
    """
    mode = _Intercept(model, handler)
    before = register_module_forward_pre_hook(mode.enter)
    after = register_module_forward_hook(mode.leave, always_call=True)
    try:
        with mode:
            yield
    finally:
        after.remove()
        before.remove()
