"""Give a module the code of a program: its class becomes a subclass whose forward runs that code.

Parameters, their names, submodules and hooks stay as they are; the module can be trained, copied, pickled and
exported like any other. Programs come from files, so no text in them is executed as it stands. They may call only the
functions listed in `idap.structure.code.vocabulary`, with arguments that these take. Python source is generated from
checked parts only, and the memory and work of each call are bounded (`idap.surgery.allowance`).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import PlanError, RewrittenModuleError
from idap.graph.provenance import sizes_held
from idap.structure.code.program import Program, Routine, Tree, references
from idap.structure.code.vocabulary import module_hazard
from idap.surgery.allowance import Allowance, Known, Unlimited
from idap.surgery.source import function_of, inputs_of

KNOWN_SIZES = 1024
"""For how many combinations of input sizes a rewritten module remembers what it counted."""

_SETTINGS_OF: Mapping[str, Mapping[str, Any]] = {
    # The fused kernel of TransformerEncoderLayer would read the attention's weights without calling it.
    "MultiheadAttention": {"_qkv_same_embed_dim": False},
}

SETTINGS_ABOVE: Mapping[str, Mapping[str, Any]] = {
    # In evaluation mode it would pass nested tensors to its layers, because of the same kernel.
    "TransformerEncoder": {"use_nested_tensor": False},
}
"""Class of a module that contains a rewritten one -> attributes that are set on it."""


def rewrite_(module: nn.Module, program: Program) -> None:
    """Replace a module's forward by a program, in place.

    Args:
        module: any module; if it was rewritten before, the new program replaces the old one.
        program: from a plan.

    Raises:
        PlanError: the program calls a function that is not listed, or something that is not part of the module.
    """
    kind = original_class(type(module))
    module.__class__ = rewritten_class(kind, program, module)
    for base in kind.__mro__:
        for name, value in _SETTINGS_OF.get(base.__name__, {}).items():
            setattr(module, name, value)


def original_class(kind: type) -> type:
    """The class that a rewritten module had before; of any other module, its class."""
    found: type = getattr(kind, "_idap_original", kind)
    return found


def rewritten_class(kind: type, program: Program, module: nn.Module) -> type:
    """A subclass of a module's class with the program as its forward."""
    try:
        check_program(module, program)
        forward = _compile(program, inspect.signature(kind.forward))  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise PlanError(
            f"the code of a rewritten {kind.__name__} is broken: {type(error).__name__}: {error}"
        ) from error
    return _class_of(kind, program, forward)


def _class_of(kind: type, program: Program, forward: Callable[..., Any]) -> type:
    members = {
        "forward": forward,
        "__reduce_ex__": _reduce,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "_idap_original": kind,
        "_idap_program": program,
    }
    return type(kind.__name__, (kind,), members)


def _reduce(self: Any, _protocol: int) -> tuple[Any, ...]:
    return _rebuild, (type(self)._idap_original, type(self)._idap_program), self.__getstate__()


def _rebuild(kind: Any, program: Program) -> Any:
    made = kind.__new__(kind)
    made.__class__ = _class_of(kind, program, _compile(program, inspect.signature(kind.forward)))
    return made


def check_program(module: nn.Module, program: Program) -> None:
    """Check that a module has every module and tensor that a program names, and that the program may call them.

    Raises:
        PlanError: names the first module or tensor that is missing, or the first module that may not be called.
    """
    for path in {step.module: None for routine in program.routines for step in routine.steps if step.module}:
        for part in _find(module, path, "module").modules():
            bases = (f"{base.__module__}.{base.__qualname__}" for base in type(part).__mro__)
            if (reason := module_hazard(bases, sizes_held(part))) is not None:
                raise PlanError(
                    f"the code of a rewritten {type(module).__name__} calls {path!r}, which contains a "
                    f"{type(part).__name__} that a program may not call: {reason}"
                )
    for routine in program.routines:
        for tree in (routine.output, *(tree for step in routine.steps for tree in step.trees())):
            for tag, name in references(tree):
                if tag == "own":
                    _find(module, name, "tensor")
    if not program.routines:
        raise PlanError("the code of a rewritten module is empty")


def _find(module: nn.Module, name: str, what: str) -> Any:
    """The module or the tensor that a program names."""
    *above, last = name.split(".")
    holder: nn.Module | None = module
    for part in above:
        holder = holder._modules.get(part) if holder is not None else None
    if holder is not None:
        tables: tuple[Mapping[str, Any], ...] = (
            (holder._modules,) if what == "module" else (holder._parameters, holder._buffers)
        )
        for table in tables:
            if table.get(last) is not None:
                return table[last]
    raise PlanError(f"the code of a rewritten {type(module).__name__} uses {what} {name!r}, which it lacks")


def _compile(program: Program, signature: inspect.Signature) -> Callable[..., Any]:
    """The program as a Python function of the module and its arguments."""
    ways = [_Way(routine, signature) for routine in program.routines]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        for way in ways:
            values = way.values(self, given)
            if values is not None:
                return way.run(self, values)
        raise RewrittenModuleError(
            f"the forward of this {type(self).__name__} was rewritten for {' or '.join(w.described for w in ways)}, "
            f"found {_describe(given, self)}. Trace the model with inputs of the kind that it gets in use, or pass "
            "swap=False to idap.analyze or idap.Config."
        )

    # Exporters and text generation read the names of the original forward's parameters here.
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class _Way:
    """One way to call a rewritten module, and the code that runs then."""

    def __init__(self, routine: Routine, signature: inspect.Signature) -> None:
        self._parameters = signature.parameters
        # The arguments of the traced call, by the parameters of forward that took them.
        bound = signature.bind(None, *routine.args, **dict(routine.kwargs)).arguments
        bound.pop(next(iter(signature.parameters)))
        self._expected = {name: _pack(signature.parameters[name], tree) for name, tree in bound.items()}
        self._inputs = inputs_of(routine)
        self.described = ", ".join(f"{name}={_describe_argument(tree)}" for name, tree in self._expected.items())
        self._body = function_of(routine, self._inputs)
        self._counted_after = function_of(routine, self._inputs, counted_after=True)
        self._known: dict[tuple[Any, ...], Known] = {}
        self._steps = len(routine.steps) + len(routine.guards)

    def run(self, module: nn.Module, values: Sequence[Any]) -> Any:
        """Run the routine and return its result; its work is counted if the module is called with new sizes."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return self._body(module, Unlimited(), *values)
        if torch.compiler.is_compiling():  # the compiler calls it with tensors that take no memory
            return self._counted_after(module, Allowance(module, values), *values)
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        sizes = (module.training, autocast, *(_size_of(value) for value in values))
        allowance = Allowance(module, values, self._known.get(sizes), steps=self._steps)
        with allowance.enter_call():
            result = self._body(module, allowance, *values)
        if not allowance.fast and not allowance.by_content:
            if len(self._known) >= KNOWN_SIZES:
                self._known.clear()
            self._known[sizes] = allowance.known
        return result

    def values(self, module: nn.Module, given: Mapping[str, Any]) -> list[Any] | None:
        """The inputs of the routine, taken from the arguments; None if it was not written for such arguments."""
        found: dict[int, Any] = {}
        for name, tree in self._expected.items():
            if not _take(tree, given.get(name, self._parameters[name].default), found):
                return None
        for name, value in given.items():
            if name not in self._expected and value is not module and not _is_default(value, self._parameters[name]):
                return None
        return [found[number] for number in self._inputs]


def _size_of(value: Any) -> Any:
    """The properties of an input on which the work of a call depends."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _describe_argument(tree: Tree) -> str:
    """An argument in words, for messages."""
    kind = tree[:1] if isinstance(tree, tuple) else ()
    return {("value",): "a tensor", ("int",): "a whole number"}.get(kind, repr(tree))


def _describe(given: Mapping[str, Any], module: nn.Module) -> str:
    shown = {name: value for name, value in given.items() if value is not module}
    return ", ".join(
        f"{name}=a tensor" if isinstance(value, Tensor) else f"{name}={repr(value)[:40]}"
        for name, value in shown.items()
    )


def _pack(parameter: inspect.Parameter, tree: Tree) -> Tree:
    """An argument as one tree; those bound to ``*args`` and ``**kwargs`` become a tuple and a dict."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return ("tuple", *tree)
    return ("dict", *tree.items()) if parameter.kind is parameter.VAR_KEYWORD else tree


def _is_default(value: Any, parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return not value
    return value is parameter.default or (not isinstance(value, Tensor) and bool(value == parameter.default))


def _take(tree: Tree, value: Any, values: dict[int, Any]) -> bool:
    """Take the inputs out of an argument into `values`, and say whether the argument is of the expected kind."""
    if not isinstance(tree, tuple):
        return value is tree or (type(value) in (int, float, bool, str) and bool(value == tree))
    match tree:
        case ("value", int(number)):
            values[number] = value
            return isinstance(value, Tensor)
        case ("int", int(number)):
            values[number] = value
            return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)
        case ("tuple" | "list", *items):
            fits = isinstance(value, tuple | list) and len(value) == len(items)
            return fits and all(_take(item, part, values) for item, part in zip(items, value, strict=True))
        case ("dict", *pairs):
            fits = isinstance(value, dict) and set(value) == {key for key, _ in pairs}
            return fits and all(_take(item, value[key], values) for key, item in pairs)
        case ("dtype", name):
            return value is getattr(torch, str(name), None)
        case ("same type",):
            return isinstance(value, torch.dtype)
        case _:
            return True  # a device: it does not matter which
