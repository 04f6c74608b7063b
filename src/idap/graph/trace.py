"""Export a module with `torch.export` and turn the result into a `Graph`. The only file that knows the exporter."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from idap.errors import TraceError
from idap.graph.calls import intercept
from idap.graph.ir import CallKey, Expression, Extent, Graph, Literal, ModuleInfo, Node, Ref, leaves
from idap.graph.provenance import TracedInt, expression_of, plain, remember_sizes, sizes_held, sources

_SHAPE_GETTER = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "hints_wrapper")


@dataclass
class _Event:
    """One eager call while exporting: the sizes it was given and the tensors it returned."""

    key: CallKey
    sizes: tuple[Expression, ...]
    outputs: list[Tensor]


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the module tree and share its parameters: what a forward pass leaves behind never reaches the model."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); idap works on a copy, so that your model stays as it "
            "is. Remove what cannot be copied (locks, open files, lambdas bound to C objects) from its attributes."
        ) from error


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Export a model in eval mode and return its operators as plain data.

    Args:
        model: any module that `torch.export` can export (non-strict); it is left as it was. Meta tensors are fine.
        args: positional example inputs, always a tuple.
        kwargs: keyword example inputs.

    Returns:
        The graph: every operator with its shapes, owner module, source line and the origin of its sizes.

    Raises:
        TraceError: the inputs are not a tuple, the model refuses them, or it cannot be exported.

    Example:
        >>> graph = trace(nn.Linear(3, 2), (torch.zeros(1, 3),))
        >>> graph.ops()["aten.linear.default"], graph.shapes["weight"]
        (1, (2, 3))
    """
    if not isinstance(args, tuple):
        raise TraceError(
            f"example inputs must be a tuple of positional arguments, found {type(args).__name__}; "
            "for one input x write (x,)."
        )
    kwargs = dict(kwargs or {})
    _check_inputs(model, args, kwargs)
    traced = skeleton(model).eval()
    modules = _describe_modules(traced)
    escaped = remember_sizes(traced.named_modules())
    events: list[_Event] = []
    with _recording(traced, events, escaped):
        program = _export(traced, args, kwargs)
    return _convert(program, events, model, modules, escaped)


def _check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    copied = skeleton(model).eval()
    try:
        with torch.no_grad():
            copied(*args, **kwargs)
    except Exception as error:
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
        raise TraceError(
            f"{type(model).__name__} does not accept the example inputs (shapes {shapes}): "
            f"{type(error).__name__}: {error}. Pass inputs on which model(*args, **kwargs) runs."
        ) from error


@contextmanager
def _recording(model: nn.Module, events: list[_Event], escaped: set[Expression]) -> Iterator[None]:
    """Note every call of the forward pass while the exporter runs it, and tag the nodes it makes with the call."""
    # Strong references keep the ids below unique for as long as they are compared.
    origin: dict[int, tuple[int, int]] = {}
    forward = model.forward

    def handle(key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func == _SHAPE_GETTER or getattr(func, "__name__", "") == "size":
            return _traced_shape(func, args, kwargs, origin, escaped)
        with fx_traceback.annotate({"idap_call": len(events)}):  # type: ignore[no-untyped-call]
            index = len(events)
            event = _Event(key, _expressions(args, kwargs), [])
            events.append(event)
            result = func(*plain(args), **plain(kwargs))
        event.outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        for position, tensor in enumerate(event.outputs):
            origin[id(tensor)] = (index, position)
        return result

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.clear()
        origin.clear()
        escaped.clear()
        with intercept(model, handle):
            # The hooks see modules from here on; the model itself has already been entered.
            return _enter_root(model, forward, args, kwargs)

    model.forward = recorded
    mha_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path is one opaque operator
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(mha_fast)
        del model.forward


def _enter_root(model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recorded = model.forward
    model.forward = forward
    try:
        return nn.Module.__call__(model, *args, **kwargs)
    finally:
        model.forward = recorded


def _expressions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Expression, ...]:
    return tuple(
        expression_of(leaf)
        for leaf in leaves((args, kwargs))
        if isinstance(leaf, int) and not isinstance(leaf, bool)
    )


def _traced_shape(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    origin: dict[int, tuple[int, int]],
    escaped: set[Expression],
) -> Any:
    result = func(*plain(args), **plain(kwargs))
    place = origin.get(id(args[0]))
    if place is None:
        return result

    def traced(size: int, dim: int) -> int:
        name = f"{place[0]}:{place[1]}"  # resolved to a node's name once the nodes are known
        return TracedInt(size, Extent(name, dim, size), escaped) if type(size) is int else size

    if isinstance(result, tuple):
        return torch.Size([traced(size, dim) for dim, size in enumerate(result)])
    dim = kwargs["dim"] if "dim" in kwargs else args[1]
    return traced(result, int(dim) % args[0].dim())


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        with fx_traceback.preserve_node_meta(), warnings.catch_warnings():  # type: ignore[no-untyped-call]
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise TraceError(
            f"torch.export cannot export {type(model).__name__}: {type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}. Code whose path depends on the values in a tensor cannot be "
            "exported: rewrite it, or compress the part of the model that has none."
        ) from error


def _describe_modules(model: nn.Module) -> dict[str, ModuleInfo]:
    canonical = _canonical_names(model)
    found = {}
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = {name: canonical[f"{path}.{name}" if path else name] for name, _ in own}
        found[path] = ModuleInfo(f"{type(module).__module__}.{type(module).__qualname__}", sizes_held(module), tensors)
    return found


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


class _Converter:
    """Walks one exported program and its inlined sub-graphs."""

    def __init__(self, program: ExportedProgram, events: Sequence[_Event], canonical: Mapping[str, str]) -> None:
        self._program = program
        self._events = events
        self._canonical = canonical
        self._made_by: dict[int, list[str]] = {}
        self._raw: dict[str, Node] = {}
        self.constants: dict[str, Tensor] = {}

    def nodes(self) -> dict[str, Node]:
        names: dict[fx.Node, Any] = {}
        self._placeholders(names)
        self._walk(self._program.graph, names, "")
        self._names = names
        self._known = self._places()
        return {name: self._resolved(node) for name, node in self._raw.items()}

    def resolve(self, escaped: set[Expression]) -> frozenset[Expression]:
        """The leaves of expressions, with tensors named by their nodes."""
        return frozenset(leaf for expression in escaped for leaf in sources(_rename(expression, self._known)))

    def outputs(self) -> tuple[str, ...]:
        wanted = set(self._program.graph_signature.user_outputs)
        returned = [n for n in leaves(list(self._program.graph.output_node().args)) if isinstance(n, fx.Node)]
        found = [self._names[n] for n in returned if n.name in wanted]
        return tuple(ref.name for ref in found if isinstance(ref, Ref))

    def _placeholders(self, names: dict[fx.Node, Any]) -> None:
        signature = self._program.graph_signature
        for node in self._program.graph.nodes:
            if node.op != "placeholder":
                continue
            names[node] = Ref(node.name)
            value = node.meta.get("val")
            shapes = (tuple(map(int, value.shape)),) if isinstance(value, Tensor) else ()
            if node.name in signature.inputs_to_parameters:
                kind, target = "parameter", self._canonical[signature.inputs_to_parameters[node.name]]
            elif node.name in signature.inputs_to_buffers:
                kind, target = "buffer", self._canonical[signature.inputs_to_buffers[node.name]]
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                kind, target = "constant", signature.inputs_to_lifted_tensor_constants[node.name]
                self.constants[node.name] = self._program.constants[target]
            else:
                kind, target = "input", node.name
            self._raw[node.name] = Node(node.name, kind, shapes=shapes, target=target)

    def _walk(self, graph: fx.Graph, names: dict[fx.Node, Any], prefix: str) -> Any:
        returned: Any = None
        for node in graph.nodes:
            if node.op == "output":
                returned = _translate(node.args[0], names)
            elif node.op == "call_function":
                names[node] = self._call(node, names, prefix)
        return returned

    def _call(self, node: fx.Node, names: dict[fx.Node, Any], prefix: str) -> Any:
        args, kwargs = _translate(node.args, names), _translate(node.kwargs, names)
        if any(part in str(node.target) for part in _INLINED):
            return self._inline(node, names, prefix)
        if getattr(node.target, "__name__", "") == "getitem" and not isinstance(args[0], Ref):
            return args[0][args[1]]  # an item of an inlined sub-graph's tuple
        name = prefix + node.name
        call = (node.meta.get("custom") or {}).get("idap_call")
        value = node.meta.get("val")
        shapes = tuple(tuple(map(int, leaf.shape)) for leaf in leaves(value) if isinstance(leaf, Tensor))
        event = self._events[call] if call is not None else None
        self._raw[name] = Node(
            name,
            "getitem" if getattr(node.target, "__name__", "") == "getitem" else str(node.target),
            args,
            kwargs,
            shapes,
            owner=_owner(node),
            source=_source(node),
            call=event.key if event else None,
            sizes=event.sizes if event else (),
        )
        if call is not None:
            self._made_by.setdefault(call, []).append(name)
        return Ref(name)

    def _inline(self, node: fx.Node, names: dict[fx.Node, Any], prefix: str) -> Any:
        getter = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
        module = self._program.graph_module
        for part in str(getter.target).split("."):
            module = getattr(module, part)
        operands = node.args[node.args.index(getter) + 1 :]
        inner: dict[fx.Node, Any] = {}
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        for place, operand in zip(places, operands, strict=True):
            inner[place] = _translate(operand, names)
        return self._walk(module.graph, inner, f"{prefix}{node.name}.")

    def _places(self) -> dict[str, str]:
        """``event:position`` -> name of the node that holds this result of the eager call."""
        places = {}
        for index, names in self._made_by.items():
            outputs = self._events[index].outputs
            read = {name for made in names for name in self._raw[made].inputs()}
            ends = [name for name in names if name not in read]
            if len(ends) != len(outputs):  # an operator with several results whose items are made by other nodes
                ends = names[-len(outputs) :] if outputs else []
            for position, (name, tensor) in enumerate(zip(ends, outputs, strict=False)):
                if self._raw[name].shapes and self._raw[name].shape == tuple(tensor.shape):
                    places[f"{index}:{position}"] = name
        return places

    def _resolved(self, node: Node) -> Node:
        return replace(node, sizes=tuple(_rename(size, self._known) for size in node.sizes)) if node.sizes else node


def _rename(expression: Expression, places: Mapping[str, str]) -> Expression:
    if isinstance(expression, Extent):
        found = places.get(expression.node)
        return replace(expression, node=found) if found else Literal(expression.value)
    if hasattr(expression, "operands"):
        return replace(expression, operands=tuple(_rename(part, places) for part in expression.operands))
    return expression


def _translate(tree: Any, names: Mapping[fx.Node, Any]) -> Any:
    if isinstance(tree, fx.Node):
        return names.get(tree)
    if isinstance(tree, tuple | list):
        return tuple(_translate(item, names) for item in tree)
    if isinstance(tree, dict):
        return {key: _translate(item, names) for key, item in tree.items()}
    return tree


def _owner(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""


def _source(node: fx.Node) -> str:
    """The innermost line of code outside of torch, as ``file.py:12: code``."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    found = ""
    for place, code in zip(lines, lines[1:], strict=False):
        if not place.strip().startswith("File ") or "/torch/" in place or "/idap/graph/" in place:
            continue
        file, line = place.strip().split(",")[:2]
        found = f"{Path(file.removeprefix('File ').strip(chr(34))).name}:{line.strip().removeprefix('line ')}: {code.strip()}"
    return found


def _convert(
    program: ExportedProgram,
    events: Sequence[_Event],
    model: nn.Module,
    modules: dict[str, ModuleInfo],
    escaped: set[Expression],
) -> Graph:
    canonical = _canonical_names(model)
    converter = _Converter(program, events, canonical)
    nodes = converter.nodes()
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return Graph(
        nodes=nodes,
        outputs=converter.outputs(),
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items() if canonical[name] == name},
        aliases={name: first for name, first in canonical.items() if name != first},
        modules=modules,
        constants=converter.constants,
        escaped=converter.resolve(escaped),
    )
