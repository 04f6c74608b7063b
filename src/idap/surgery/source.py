"""Turn a routine of a rewritten module into a Python function, whose source is made of checked parts only."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from torch import nn

from idap.errors import PlanError, RewrittenModuleError
from idap.graph.ir import ARITHMETIC
from idap.graph.provenance import RELATIONS
from idap.structure.code.program import Instruction, Routine, Tree, check_routine, references
from idap.structure.code.safeguards import SAFEGUARDED
from idap.structure.code.vocabulary import function_of_name, takes_device
from idap.surgery.allowance import calculate, tensor_of


def inputs_of(routine: Routine) -> list[int]:
    """The numbers of the values that are inputs of a routine, in order."""
    trees = (*routine.args, *(tree for _, tree in routine.kwargs))
    return [number for tree in trees for tag, number in references(tree) if tag in ("value", "int")]


def function_of(routine: Routine, inputs: Sequence[int], *, counted_after: bool = False) -> Callable[..., Any]:
    """A routine as a Python function of the module, an allowance and the values of its inputs.

    Args:
        routine: what the function does.
        inputs: numbers of its inputs.
        counted_after: True: what a step makes is counted after the step. False: it is counted before, unless the
            allowance says that nothing needs to be counted.

    Raises:
        PlanError: a part of the routine is invalid.
    """
    check_routine(routine)
    _check_values(routine)
    globals_: dict[str, Any] = {"torch": torch, "calc": calculate, "device_of": _device_of, "check": _check_sizes}
    globals_ |= {"type_of": _type_of, "tensor_of": tensor_of}
    lines = [f"def body(self, allowance, {', '.join(f'v{int(number)}' for number in inputs)}):"]
    given = f"v{inputs[0]}" if inputs else "None"
    lines.append(f"    device, kind = device_of(self, {given}), type_of(self, {', '.join(f'v{n}' for n in inputs)})")
    over: dict[int, list[str]] = {}
    for number, place in _last_uses(routine).items():
        over.setdefault(place, []).append(f"v{int(number)}")
    checks = _checks(routine)
    lines += [f"    {check}" for check in checks.get(0, ())]
    for place, step in enumerate(routine.steps):
        lines += [f"    {line}" for line in _lines(step, place, globals_, counted_after=counted_after)]
        lines += [f"    {check}" for check in checks.get(place + 1, ())]
        if place in over:
            lines.append(f"    {' = '.join(over[place])} = None")
    lines.append(f"    return {_source(routine.output)}")
    exec(compile("\n".join(lines), f"<rewritten, {len(routine.steps)} steps>", "exec"), globals_)
    body: Callable[..., Any] = globals_["body"]
    return body


def _checks(routine: Routine) -> Mapping[int, Sequence[str]]:
    """Number of steps -> source of the guards that are checked after that many steps."""
    found: dict[int, list[str]] = {}
    for left, symbol, right, known in routine.guards:
        check = f"check(self, {_source(left)}, {symbol!r}, {_source(right)}, {isinstance(right, tuple)})"
        found.setdefault(known, []).append(check)
    return found


def _check_values(routine: Routine) -> None:
    """Check that every value is made before it is used: tensors by inputs and steps, whole numbers by inputs."""
    given = [found for tree in (*routine.args, *(tree for _, tree in routine.kwargs)) for found in references(tree)]
    made = set(given)
    if any(tag == "own" for tag, _ in made) or len({number for _, number in made}) < len(made):
        raise PlanError("the code of a rewritten module has one input of two kinds, or one that is the module's own")
    asked: dict[int, list[Tree]] = {}
    for left, _, right, known in routine.guards:
        asked.setdefault(known, []).extend((left, right))
    _check_made(asked.get(0, ()), made)
    for place, step in enumerate(routine.steps):
        _check_made(step.trees(), made)
        for _, number in step.results:
            if ("int", number) in made:
                raise PlanError(
                    f"the code of a rewritten module makes value {number}, which is an input and a whole number"
                )
            made.add(("value", number))
        _check_made(asked.get(place + 1, ()), made)
    _check_made([routine.output], made)


def _check_made(trees: Iterable[Tree], made: set[tuple[str, Any]]) -> None:
    for found in (found for tree in trees for found in references(tree)):
        if found[0] != "own" and found not in made:
            kind = "number" if found[0] == "int" else "value"
            raise PlanError(f"the code of a rewritten module uses {kind} {found[1]}, which nothing makes")


def _value_numbers(trees: Iterable[Tree]) -> Iterator[int]:
    """The numbers of the tensors that trees use."""
    return (number for tree in trees for tag, number in references(tree) if tag == "value")


def _last_uses(routine: Routine) -> dict[int, int]:
    """Number of a value -> the last step that uses it, without values that are returned or that guards read."""
    last: dict[int, int] = {}
    for place, step in enumerate(routine.steps):
        for number in _value_numbers(step.trees()):
            last[number] = place
    for number in _value_numbers(
        [routine.output, *(tree for left, _, right, _ in routine.guards for tree in (left, right))]
    ):
        last.pop(number, None)
    return last


def _lines(step: Instruction, place: int, globals_: dict[str, Any], *, counted_after: bool) -> Iterator[str]:
    args = [_source(tree) for tree in step.args]
    kwargs = [f"{key}={_source(tree)}" for key, tree in step.kwargs]
    if step.module:
        called = "note" if counted_after else "hand_on"
        call = f"allowance.{called}({step.module!r}, {_path(step.module)}({', '.join([*args, *kwargs])}))"
    else:
        globals_[f"f{place}"] = function_of_name(step.function)
        method = step.function.removeprefix("torch.Tensor.")
        plain = step.function not in SAFEGUARDED
        if plain and method != step.function and method.isidentifier() and step.args and _is_value(step.args[0]):
            # torch.compile can trace a method call, but not a call of its function if that is written in Python.
            call = f"{args[0]}.{method}({', '.join([*args[1:], *kwargs])})"
        else:
            call = f"f{place}({', '.join([*args, *kwargs])})"
        if counted_after:
            call = f"allowance.note({step.function!r}, {call})"
        else:
            makes = not any(_is_value(tree) for tree in step.args) and takes_device(step.function)
            given = f"({''.join(f'{arg}, ' for arg in args)}), dict({', '.join(kwargs)})"
            call += f" if allowance.fast else allowance.call({step.function!r}, f{place}, {given}, makes={makes})"
    name = step.function or step.module
    if len(step.results) == 1 and not step.results[0][0]:
        yield f"v{int(step.results[0][1])} = tensor_of({name!r}, {call})"
        return
    yield f"result = {call}"
    for path, number in step.results:
        yield f"v{int(number)} = tensor_of({name!r}, result{''.join(f'[{key!r}]' for key in path)})"


def _is_value(tree: Tree) -> bool:
    return isinstance(tree, tuple) and tree[:1] in (("value",), ("own",))


def _source(tree: Tree) -> str:  # noqa: PLR0912 - one case per tag
    if not isinstance(tree, tuple):
        return repr(tree)
    match tree:
        case ("value" | "int", int(number)):
            return f"v{number}"
        case ("own", str(name)):
            return _path(name)
        case ("size", of, int(dim)):
            return f"{_source(of)}.size({dim})"
        case ("calc", str(symbol), *operands) if symbol in ARITHMETIC:
            return f"calc({symbol!r}, {_join(operands)})"
        case ("list", *items):
            return f"[{_join(items)}]"
        case ("tuple", *items):
            return f"({_join(items)}{',' if len(items) == 1 else ''})"
        case ("dict", *pairs):
            return "{" + ", ".join(f"{key!r}: {_source(item)}" for key, item in pairs) + "}"
        case ("slice", start, stop, step):
            return f"slice({_join((start, stop, step))})"
        case ("ellipsis",):
            return "..."
        case ("dtype" | "format", str(name)) if isinstance(
            getattr(torch, name, None), torch.dtype | torch.memory_format
        ):
            return f"torch.{name}"
        case ("device",):
            return "device"
        case ("same type",):
            return "kind"
        case ("float", ("inf" | "-inf" | "nan") as text):
            return f"float({text!r})"
        case ("in training", float(share)):
            return f"({share!r} if self.training else 0.0)"
        case ("training",):
            return "self.training"
        case _:
            raise PlanError(f"the code of a rewritten module holds {tree!r}, which means nothing")


def _join(trees: Sequence[Tree]) -> str:
    return ", ".join(_source(tree) for tree in trees)


def _path(name: str) -> str:
    """The expression for a part of a module: ``self.mlp.fc1``, or `getattr` where a name is no identifier."""
    found = "self"
    for part in name.split("."):
        plain = part.isidentifier() and not iskeyword(part)
        found = f"{found}.{part}" if plain else f"getattr({found}, {part!r})"
    return found


_HOLDS: Mapping[str, Callable[[int, int], bool]] = {
    symbol: getattr(operator, name) for symbol, name in RELATIONS.items()
}


def _check_sizes(module: nn.Module, left: int, symbol: str, right: int, both: bool) -> None:
    """Check that sizes compare as they did in the trace; `both`: the right side is a size of the input, too."""
    if _HOLDS[symbol](left, right):
        return
    if both:
        wanted, found = f"sizes with a {symbol} b", f"a = {left}, b = {right}"
    else:
        wanted, found = f"a size {'of' if symbol == '==' else symbol} {right}", f"{left}"
    raise RewrittenModuleError(
        f"the code of this {type(module).__name__} was rewritten for {wanted}, found {found}: the original code takes "
        "another branch then, or computes other numbers. Trace the model with inputs of the size that it gets in use; "
        "if it gets both kinds, pass swap=False to idap.analyze or idap.Config, so that no code is rewritten."
    )


def _type_of(module: nn.Module, *given: Any) -> torch.dtype:
    """The floating point type of the first input that has one, else of the first parameter that has one."""
    tensors = [*(item for item in given if isinstance(item, torch.Tensor)), *module.parameters()]
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def _device_of(module: nn.Module, first: Any) -> torch.device:
    """The device of the module's first input, else of its own first tensor."""
    if isinstance(first, torch.Tensor):
        return first.device
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.get_default_device()
