"""Rewrite a module's code with the sizes after a cut, where the original code can't produce them.

Every int that counts a cut dimension becomes the number that the cut leaves. Every other int stays the expression that
the code computes, so that the batch size and the image size stay free. Numbers that the code computes from sizes, such
as the scale of an attention, keep their original value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from idap.graph.frames import Frame, SameType, Step, Unseen
from idap.graph.ir import Attribute, Comparison, Expression, Extent, Graph, Literal, Node, Operation, Ref
from idap.graph.provenance import sources
from idap.graph.rules.layers import default_scale
from idap.structure.code.guards import Guards, Hand, comparisons_by_module, ever_at_hand
from idap.structure.code.program import Instruction, Program, Routine, Tree
from idap.structure.code.sizes import Values, size_position
from idap.structure.code.vocabulary import mistake, module_hazard
from idap.structure.layout import Layout

_HAS_TRAINING = ("dropout", "batch_norm", "instance_norm")
_CONTAINERS: Mapping[type, str] = {tuple: "tuple", list: "list"}


class CannotRewriteError(Exception):
    """Why a module's code can't be rewritten; never leaves the analysis."""


class Rewriter:
    """Writes the programs of modules.

    Args:
        graph: the traced model.
        enabled: whether any module may be rewritten.

    Attributes:
        refused: module path -> why it can't be rewritten.
        hazards: path of a module that rewritten code may not call -> why.
    """

    def __init__(self, graph: Graph, *, enabled: bool = True) -> None:
        self.graph = graph
        self.enabled = enabled
        self.refused: dict[str, str] = dict(graph.unwritable)
        self._checked: set[str] = set()
        self.nodes: dict[str, list[Node]] = {}
        for node in graph.nodes.values():
            if node.place:
                self.nodes.setdefault(node.place, []).append(node)
        hazards = ((path, module_hazard(info.bases, info.sizes)) for path, info in graph.modules.items())
        self.hazards = {path: reason for path, reason in hazards if reason is not None}
        self._asked = comparisons_by_module(graph)
        self._ever: dict[str, Hand] = {}
        self._names: dict[str, list[str]] = {name: [name] for name in graph.shapes}
        for alias, name in graph.aliases.items():
            self._names[name].append(alias)
        self._paths: dict[str, list[str]] = {path: [path] for path in graph.modules}
        for alias, path in graph.module_aliases.items():
            self._paths[path].append(alias)

    def possible(self, path: str) -> bool:
        """Whether a module's code can be rewritten at all: this is tried without a cut."""
        if not self.enabled or path not in self.graph.frames:
            return False
        if path not in self._checked:
            self._checked.add(path)
            try:
                self._write(path, lambda frame: _Writer(self, path, frame, None, {}).routine())
            except CannotRewriteError as error:
                self.refused[path] = str(error)
        return path not in self.refused

    def program(self, path: str, layout: Layout, values: Values) -> Program:
        """The code of a module after a cut.

        Raises:
            CannotRewriteError: the code can't be rewritten.
        """
        wanted: dict[tuple[str, int], int] = {}
        for use in layout.sizes:
            node = self.graph.nodes[use.node]
            if node.module == path:
                count = use.sign * values.slots(use.dim)
                position = size_position(node, use)
                if position is not None:
                    wanted[use.node, position] = count
                elif values.slots(use.dim) != use.dim.shape[1]:
                    raise CannotRewriteError(f"it is not known where {node.where()} gets its {use.argument}")
        return self._write(path, lambda frame: _Writer(self, path, frame, values, wanted).routine())

    def _write(self, path: str, write: Callable[[Frame], Routine]) -> Program:
        found = []
        for frames in self.graph.frames[path]:
            first, *others = (write(frame) for frame in frames)
            if any(other != first for other in others):
                raise CannotRewriteError("it does something different each time it is called")
            found.append(first)
        return Program(tuple(dict.fromkeys(found)))

    def comparisons_at(self, path: str) -> tuple[Sequence[Comparison], Hand]:
        """The comparisons of sizes in a module's code, and everything that it has at hand in at least one call."""
        if path not in self._ever:
            frames = (frame for calls in self.graph.frames[path] for frame in calls)
            self._ever[path] = ever_at_hand(frames, self.graph.places, self.local)
        return self._asked.get(path, ()), self._ever[path]

    def local(self, expression: Expression) -> Expression:
        """An expression of a frame, with the names of the graph."""
        if isinstance(expression, Extent) and expression.node not in self.graph.nodes:
            node = self.graph.places.get(expression.node)
            return Extent(node, expression.dim, expression.value) if node else Literal(expression.value)
        if isinstance(expression, Operation):
            operands = tuple(self.local(part) for part in expression.operands)
            return Operation(expression.symbol, operands, expression.value)
        return expression

    def below(self, path: str, name: str, *, tensor: bool) -> str:
        """The name of a tensor or module as seen from the module at `path`."""
        prefix = f"{path}." if path else ""
        for known in (self._names if tensor else self._paths).get(name, [name]):
            if known.startswith(prefix) and known != path:
                return known.removeprefix(prefix)
        raise CannotRewriteError(f"its code uses {name}, which lies elsewhere")


class _Writer:
    """Writes one routine from one call of a module."""

    def __init__(
        self,
        rewriter: Rewriter,
        path: str,
        frame: Frame,
        values: Values | None,
        wanted: Mapping[tuple[str, int], int],
    ) -> None:
        self._rewriter, self._path, self._frame = rewriter, path, frame
        self._values, self._wanted = values, wanted
        self._number: dict[str, int] = {}
        self._given: dict[Expression, int] = {}
        self._count = 0
        self._targets: dict[int, int] = {}
        self._position = 0
        self._known, self._handing_on = True, False

    def routine(self) -> Routine:
        """What the module does in this call."""
        args = tuple(self._input(item) for item in self._frame.args)
        kwargs = tuple((name, self._input(item)) for name, item in self._frame.kwargs.items())
        waiting = self._guards()
        guards = list(waiting.take_ready(self._hand(), 0))
        steps = []
        for step in self._frame.steps:
            steps.append(self._step(step))
            guards += waiting.take_ready(self._hand(), len(steps)) if waiting else ()
        self._targets, self._known, self._handing_on = {}, True, False
        return Routine(args, kwargs, tuple(steps), self._tree(self._frame.output), tuple(guards))

    def _guards(self) -> Guards:
        """The guards of this routine."""
        notes, ever = self._rewriter.comparisons_at(self._path)
        return Guards(notes, self._follows_input, ever)

    def _hand(self) -> Hand:
        places, local = self._rewriter.graph.places, self._rewriter.local
        held = {places.get(name): number for name, number in self._number.items()}
        return Hand(held, {local(item): n for item, n in self._given.items() if self._now(item) == item.value})

    def _follows_input(self, extent: Extent) -> bool:
        """Whether a size depends on the input, and is the same before and after the cut."""
        node = self._rewriter.graph.nodes[extent.node]
        return node.op not in ("parameter", "buffer", "constant") and self._now(extent) == extent.value

    def _input(self, item: Any) -> Tree:
        """An argument of the module: tensors and sizes get a number; all else must be the same in each call."""
        if isinstance(item, Ref):
            return ("value", self._new(item.name))
        if isinstance(item, Attribute | Extent | Literal | Operation):
            return ("int", self._given.setdefault(item, self._new("")))
        if type(item) in _CONTAINERS:
            return (_CONTAINERS[type(item)], *(self._input(part) for part in item))
        if isinstance(item, dict):
            return ("dict", *((key, self._input(part)) for key, part in item.items()))
        return self._plain(item)

    def _new(self, name: str) -> int:
        number, self._count = self._count, self._count + 1
        if name:
            self._number[name] = number
        return number

    def _step(self, step: Step) -> Instruction:
        if not step.module and not step.function:
            raise CannotRewriteError(f"its code calls {step.place.split('/')[1]}, unknown to torch")
        nodes = self._rewriter.nodes.get(step.place, [])
        self._targets, self._position = {}, 0
        self._known, self._handing_on = bool(nodes) or bool(step.module), bool(step.module)
        for node in nodes:
            for position in range(len(node.sizes)):
                if (node.name, position) in self._wanted:
                    self._targets[position] = self._wanted[node.name, position]
        args = tuple(self._tree(item) for item in step.args)
        kwargs = {name: self._tree(item) for name, item in step.kwargs.items()}
        kwargs |= self._scale_argument(nodes, kwargs)
        if step.place in self._rewriter.graph.dropped:
            dropout = ("in training", self._rewriter.graph.dropped[step.place])
            args = (*args[:4], dropout, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": dropout} if len(args) <= 4 else {}
        if "training" in kwargs and any(step.function.endswith(name) for name in _HAS_TRAINING):
            kwargs["training"] = ("training",)
        if step.function and (wrong := mistake(step.function, args, kwargs.items())):
            raise CannotRewriteError(f"its code {wrong}")
        results = tuple((place, self._new(name)) for place, name in step.results)
        module = self._callable_module(step.module) if step.module else ""
        return Instruction(step.function, module, args, tuple(kwargs.items()), results)

    def _callable_module(self, called: str) -> str:
        """The path of a called module, relative to the module that is rewritten."""
        for path, reason in self._rewriter.hazards.items():
            if path == called or path.startswith(f"{called}."):
                raise CannotRewriteError(f"its code calls {path}, which rewritten code may not call: {reason}")
        return self._rewriter.below(self._path, called, tensor=False)

    def _scale_argument(self, nodes: list[Node], kwargs: Mapping[str, Tree]) -> dict[str, Tree]:
        """The original scale of an attention, if the code uses the default, which follows the head width."""
        for node in nodes:
            scale = default_scale(self._rewriter.graph, node)
            if scale is not None and kwargs.get("scale") is None:
                return {"scale": scale}
        return {}

    def _tree(self, item: Any) -> Tree:
        if isinstance(item, int) and not isinstance(item, bool):
            return self._int(Literal(item))
        if isinstance(item, Attribute | Extent | Literal | Operation):
            return self._int(item)
        if isinstance(item, Ref):
            return self._tensor(item.name)
        if type(item) in _CONTAINERS:
            return (_CONTAINERS[type(item)], *(self._tree(part) for part in item))
        if isinstance(item, dict):
            return ("dict", *((key, self._tree(part)) for key, part in item.items()))
        if isinstance(item, slice):
            return ("slice", self._tree(item.start), self._tree(item.stop), self._tree(item.step))
        return self._plain(item)

    def _plain(self, item: Any) -> Tree:
        """A value that isn't a tensor, a size or a container."""
        if isinstance(item, float) and not math.isfinite(item):
            return ("float", str(item))
        if item is None or isinstance(item, bool | str | int | float):
            return item
        if item is ...:
            return ("ellipsis",)
        if isinstance(item, SameType):
            return ("same type",)
        if isinstance(item, torch.dtype):
            return ("dtype", str(item).removeprefix("torch."))
        if isinstance(item, torch.device):
            return ("device",)
        if isinstance(item, torch.memory_format):
            return ("format", str(item).removeprefix("torch."))
        kind = item.kind if isinstance(item, Unseen) else type(item).__name__
        raise CannotRewriteError(f"its code passes on {kind}")

    def _tensor(self, name: str) -> Tree:
        if name in self._number:
            return ("value", self._number[name])
        if name.startswith("tensor:"):
            return ("own", self._rewriter.below(self._path, name.removeprefix("tensor:"), tensor=True))
        raise CannotRewriteError("its code uses a tensor from outside of the module")

    def _int(self, expression: Expression) -> Tree:
        """The next int of a call: the number that the cut requires, else the original one."""
        if self._handing_on:
            return self._calc(expression)
        target = self._targets.get(self._position, expression.value)
        self._position += 1
        return self._fit(expression, target)

    def _fit(self, expression: Expression, target: int) -> Tree:
        """The expression if it gives the target, else as much of it as can be kept, else the number."""
        if not self._known:
            return self._keep_size(expression)
        if isinstance(expression, Literal):
            return target
        if self._now(expression) == target:
            return self._calc(expression)
        if isinstance(expression, Operation) and expression.symbol in ("*", "+"):
            kept = [part for part in _flat(expression, expression.symbol) if self._stays(part)]
            product = math.prod(part.value for part in kept)
            if kept and expression.symbol == "*" and product and target % product == 0:
                return ("calc", "*", *(self._calc(part) for part in kept), target // product)
            if kept and expression.symbol == "+":
                return ("calc", "+", *(self._calc(part) for part in kept), target - sum(part.value for part in kept))
        return target

    def _keep_size(self, expression: Expression) -> Tree:
        """A size passed to a call that the exported model does not make, so that its value after the cut is unknown."""
        unseen = any(
            isinstance(leaf, Extent) and leaf.node not in self._rewriter.graph.places for leaf in sources(expression)
        )
        if unseen or self._now(expression) != expression.value:
            raise CannotRewriteError("its code takes another branch when it is exported")
        return expression.value if isinstance(expression, Literal) else self._calc(expression)

    def _stays(self, expression: Expression) -> bool:
        """Whether a size depends on the input and isn't changed by the cut."""
        reads = expression in self._given or isinstance(expression, Extent | Operation)
        return reads and self._now(expression) == expression.value

    def _now(self, expression: Expression) -> int | None:
        return expression.value if self._values is None else self._values.of(self._rewriter.local(expression))

    def _calc(self, expression: Expression) -> Tree:
        if expression in self._given:
            return ("int", self._given[expression])
        if isinstance(expression, Extent):
            return ("size", self._tensor(expression.node), expression.dim)
        if isinstance(expression, Operation):
            return ("calc", expression.symbol, *(self._calc(part) for part in expression.operands))
        return self._now(expression)


def _flat(expression: Expression, symbol: str) -> list[Expression]:
    """The factors of a product, or the terms of a sum."""
    if isinstance(expression, Operation) and expression.symbol == symbol:
        return [part for operand in expression.operands for part in _flat(operand, symbol)]
    return [expression]
