"""Turn an exported program, and the record of its forward pass, into plain data."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from idap.errors import TraceError
from idap.graph.frames import Frame
from idap.graph.ir import Comparison, Expression, Extent, Literal, ModuleCall, Node, Operation, Ref, leaves
from idap.graph.provenance import sources
from idap.graph.recording import Record, places_in

_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "hints_wrapper")
_PASSING = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
"""Operators that return their input itself in eval mode, although their schema doesn't say so."""


class Converter:
    """Walks one exported program and its inlined sub-graphs.

    Args:
        program: the export.
        record: the record of the forward pass that was exported.
        canonical: every name of every parameter and buffer -> its canonical name.
        paths: every path of every module -> its first path.

    Attributes:
        canonical: the argument of that name.
        nodes: the operators, by name, in execution order.
        outputs: names of the nodes that the model returns.
        returned: a name for each of them, such as ``logits`` or ``0.1``.
        constants: tensors that the code makes from plain numbers, by node name.
        places: name of a tensor in the record -> the node that holds it.
    """

    def __init__(
        self, program: ExportedProgram, record: Record, canonical: Mapping[str, str], paths: Mapping[str, str]
    ) -> None:
        self._program = program
        self._record = record
        self.canonical = canonical
        self._paths = paths
        self._made_by: dict[int, list[str]] = {}
        self.places: dict[str, str] = {}
        self._raw: dict[str, Node] = {}
        self.constants: dict[str, Tensor] = {}
        names: dict[fx.Node, Any] = {}
        self._placeholders(names)
        self._walk(self._program.graph, names, "")
        self._locate()
        self.nodes = {name: self._resolve(node) for name, node in self._raw.items()}
        self.outputs, self.returned = self._outputs(names)

    def calls(self, path: str) -> tuple[ModuleCall, ...]:
        """The calls of a module, with the nodes they start from and end in."""
        return tuple(self._call_of(frame) for frame in self._record.frames.get(path, ()))

    def _call_of(self, frame: Frame) -> ModuleCall:
        passed: dict[int | str, Any] = dict(enumerate(frame.args))
        passed.update(frame.kwargs)
        places = {item.name: place for place, item in reversed(passed.items()) if isinstance(item, Ref)}
        takes = next((place for place, item in passed.items() if isinstance(item, Ref)), 0)
        given = passed.get(takes)
        stream = next((name for _, name in places_in(frame.output)), "")
        gives = _output_form(frame.output, stream, places)
        return ModuleCall(
            self.places.get(given.name, "") if isinstance(given, Ref) else "",
            "" if gives is None else self.places.get(stream, ""),
            takes,
            gives,
        )

    def find_escapes(self, training: Mapping[Expression, dict[str, str]]) -> dict[Expression, dict[str, str]]:
        """The leaves of the sizes from which the code computes other numbers, each with the modules and the place.

        Args:
            training: the same from a run in training; sizes of tensors that exist only in training are left out.
        """
        found: dict[Expression, dict[str, str]] = {}
        for expression, places in (*self._record.escaped.items(), *training.items()):
            for leaf in sources(expression):
                if not isinstance(leaf, Extent) or leaf.node in self.places:
                    renamed = self._rename(leaf)
                    found[renamed] = places | found.get(renamed, {})
        return found

    def comparisons(self) -> tuple[Comparison, ...]:
        """The comparisons of sizes that the code made, with their outcomes."""
        return tuple(
            replace(note, left=self._rename(note.left), right=self._rename(note.right), known=self._knows(note))
            for note in self._record.compared
        )

    def _knows(self, note: Comparison) -> bool:
        read = sources(note.left) | sources(note.right)
        return all(leaf.node in self.places for leaf in read if isinstance(leaf, Extent))

    def _outputs(self, names: Mapping[fx.Node, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        wanted = set(self._program.graph_signature.user_outputs)
        returned = [n for n in leaves(list(self._program.graph.output_node().args)) if isinstance(n, fx.Node)]
        refs = [names[n] for n in returned if n.name in wanted]
        nodes = tuple(ref.name for ref in refs if isinstance(ref, Ref))
        # What the exporter returns is flat; what the model's own code returned has names.
        (frame,) = self._record.frames[""]
        paths = [".".join(map(str, path)) or "output" for path, _ in places_in(frame.output)]
        return nodes, tuple(paths) if len(paths) == len(nodes) else tuple(map(str, range(len(nodes))))

    def _placeholders(self, names: dict[fx.Node, Any]) -> None:
        inputs = 0
        for node in self._program.graph.nodes:
            if node.op != "placeholder":
                continue
            kind, target = self._kind_of(node.name)
            if kind == "constant":
                self.constants[node.name] = self._program.constants[target]
            elif kind == "input":
                self.places[f"input:{inputs}"] = node.name
                inputs += 1
            else:
                self.places[f"tensor:{target}"] = node.name
            names[node] = Ref(node.name)
            value = node.meta.get("val")
            shapes = (tuple(map(int, value.shape)),) if isinstance(value, Tensor) else ()
            self._raw[node.name] = Node(node.name, kind, shapes=shapes, target=target)

    def _kind_of(self, name: str) -> tuple[str, str]:
        signature = self._program.graph_signature
        if name in signature.inputs_to_parameters:
            return "parameter", self.canonical[signature.inputs_to_parameters[name]]
        if name in signature.inputs_to_buffers:
            return "buffer", self.canonical[signature.inputs_to_buffers[name]]
        if name in signature.inputs_to_lifted_tensor_constants:
            return "constant", signature.inputs_to_lifted_tensor_constants[name]
        return "input", name

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
        taken = getattr(node.target, "__name__", "") == "getitem"
        if taken and not isinstance(args[0], Ref):
            return args[0][args[1]]  # an item of an inlined sub-graph's tuple
        name = prefix + node.name
        call = (node.meta.get("custom") or {}).get("idap_call")
        event = self._record.events[call] if call is not None else None
        shares, writes = _effects(node, names)
        self._raw[name] = Node(
            name,
            "getitem" if taken else str(node.target),
            args,
            kwargs,
            tuple(tuple(map(int, leaf.shape)) for leaf in leaves(node.meta.get("val")) if isinstance(leaf, Tensor)),
            owner=self._owner(node),
            source=_source(node),
            call=event.key if event else None,
            place=event.place if event else "",
            sizes=event.sizes if event else (),
            shares=(args[0].name,) if taken else shares,
            writes=writes,
        )
        if call is not None:
            self._made_by.setdefault(call, []).append(name)
        return Ref(name)

    def _owner(self, node: fx.Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]).split("@")[0] if stack else ""
        return self._paths.get(path, path)

    def _inline(self, node: fx.Node, names: dict[fx.Node, Any], prefix: str) -> Any:
        getter = next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")
        module = self._program.graph_module
        for part in str(getter.target).split("."):
            module = getattr(module, part)
        operands = node.args[node.args.index(getter) + 1 :]
        if "wrap_with_autocast" in str(node.target):
            _refuse_lowered(node.args, module.graph)
        inner: dict[fx.Node, Any] = {}
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        for place, operand in zip(places, operands, strict=True):
            inner[place] = _translate(operand, names)
        return self._walk(module.graph, inner, f"{prefix}{node.name}.")

    def _locate(self) -> None:
        """Find the node that holds each result of each eager call."""
        for index, event in enumerate(self._record.events):
            names = [name for name in self._made_by.get(index, []) if self._raw[name].shapes]  # without assertions
            if not names and event.same in self.places and event.outputs:
                self.places[event.outputs[0][0]] = self.places[event.same]
            read = {name for made in names for name in self._raw[made].inputs()}
            ends = [name for name in names if name not in read]
            if len(ends) != len(event.outputs):  # several results: their items are nodes of their own
                ends = names[-len(event.outputs) :] if event.outputs else []
            for name, (place, shape) in zip(ends, event.outputs, strict=False):
                if self._raw[name].shapes and self._raw[name].shape == shape:
                    self.places[place] = name

    def _resolve(self, node: Node) -> Node:
        return replace(node, sizes=tuple(self._rename(size) for size in node.sizes)) if node.sizes else node

    def _rename(self, expression: Expression) -> Expression:
        if isinstance(expression, Extent):
            found = self.places.get(expression.node)
            return replace(expression, node=found) if found else Literal(expression.value)
        if isinstance(expression, Operation):
            return replace(expression, operands=tuple(self._rename(part) for part in expression.operands))
        return expression


def _refuse_lowered(args: Sequence[Any], code: fx.Graph) -> None:
    """Refuse code that lowers the precision itself: the verification of cuts needs more digits.

    Args:
        args: the arguments of the autocast context: device type, dtype, whether it is enabled.
        code: the operators inside the context.

    Raises:
        TraceError: an operator computes in the lower precision; the message names its line.
    """
    device, dtype, enabled = args[:3]
    made = [(node, leaf) for node in code.nodes for leaf in leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    lowered = [node for node, tensor in made if tensor.dtype == dtype and tensor.device.type == device]
    if enabled and lowered:
        line = next((source for node in lowered if (source := _source(node))), "")
        raise TraceError(
            f"the model's own code lowers the precision by torch.autocast({str(device)!r}, {dtype})"
            f"{f', as in {line}' if line else ''}. Every cut is verified in the precision of the weights; the lower "
            "precision has too few digits for that. Move autocast out of forward and put it around the call of the "
            'model; for the recovery, use Recovery(precision="bf16").'
        )


def _output_form(output: Any, stream: str, places: Mapping[str, int | str]) -> Any:
    """What a module returns, as a tree of its stream and its arguments; None if it also returns something else."""
    if isinstance(output, Ref):
        if output.name == stream:
            return ("stream",)
        return ("given", places[output.name]) if output.name in places else None
    if isinstance(output, tuple | list):
        items = [_output_form(item, stream, places) if item is not None else ("none",) for item in output]
        return None if None in items else ("tuple" if isinstance(output, tuple) else "list", *items)
    return None


def _translate(tree: Any, names: Mapping[fx.Node, Any]) -> Any:
    if isinstance(tree, fx.Node):
        return names.get(tree)
    if isinstance(tree, tuple | list):
        return tuple(_translate(item, names) for item in tree)
    if isinstance(tree, dict):
        return {key: _translate(item, names) for key, item in tree.items()}
    return tree


def _effects(node: fx.Node, names: Mapping[fx.Node, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes whose memory an operator's result may share, and those whose memory it changes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return (), ()
    passing = schema.name.split("::")[-1] in _PASSING
    shares: list[str] = []
    writes: list[str] = []
    given: dict[str, Any] = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    for place, argument in enumerate(schema.arguments):
        value = (given | dict(node.kwargs)).get(argument.name)
        refs = [names[n].name for n in leaves(value) if isinstance(n, fx.Node) and isinstance(names.get(n), Ref)]
        if argument.alias_info is not None or (passing and place == 0):
            shares += refs
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes += refs
    return tuple(shares), tuple(writes)


def _source(node: fx.Node) -> str:
    """The innermost line of code outside of torch, as ``file.py:12: code``."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    found = ""
    for place, code in itertools.pairwise(lines):
        if not place.strip().startswith("File ") or "/torch/" in place or "/idap/graph/" in place:
            continue
        file, line = place.strip().split(",")[:2]
        name = Path(file.removeprefix("File ").strip('"')).name
        found = f"{name}:{line.strip().removeprefix('line ')}: {code.strip()}"
    return found


def tensor_names(tensors: Sequence[tuple[str, Tensor]]) -> dict[str, str]:
    """Every name of every tensor -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def module_names(model: nn.Module) -> dict[str, str]:
    """Every path of every module -> the first path of the same module."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(module), path) for path, module in model.named_modules(remove_duplicate=False)}
