"""The graph as data: names, shapes and numbers. It holds no module and can be printed and compared."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from idap.graph.frames import Frame, Memory

CallKey = tuple[str, str, int]
"""Identifies an eager call: (path of the module whose forward makes it, function name, number of such calls before)."""

SPECIAL_OPS = ("input", "parameter", "buffer", "constant", "output")


@dataclass(frozen=True)
class Ref:
    """A use of another node's value."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Literal:
    """A size that the code writes as a number, or whose origin is unknown."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Attribute:
    """A size read from an int, or one entry of a tuple of ints, that a module holds."""

    module: str
    name: str
    index: int | None
    value: int

    def __str__(self) -> str:
        place = f"{self.module}.{self.name}" if self.module else self.name
        return place if self.index is None else f"{place}[{self.index}]"


@dataclass(frozen=True)
class Extent:
    """A size read from a tensor's shape."""

    node: str
    dim: int
    value: int

    def __str__(self) -> str:
        return f"size {self.dim} of {self.node}"


@dataclass(frozen=True)
class Operation:
    """A size computed from other sizes."""

    symbol: str
    operands: tuple["Expression", ...]
    value: int

    def __str__(self) -> str:
        if len(self.operands) == 1:
            return f"-{self.operands[0]}"
        return f"({f' {self.symbol} '.join(map(str, self.operands))})"


Expression = Literal | Attribute | Extent | Operation

ARITHMETIC: Mapping[str, Callable[..., int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "neg": operator.neg,
}


@dataclass(frozen=True)
class Node:
    """One value of the graph and how it is computed.

    Attributes:
        name: unique in the graph.
        op: the ATen overload, such as ``aten.linear.default``, ``getitem``, or one of `SPECIAL_OPS`.
        args: positional arguments; other nodes appear as `Ref`.
        kwargs: keyword arguments; other nodes appear as `Ref`.
        shapes: the shape of each tensor it produces (one for most operators).
        owner: path of the module whose forward produced it; "" is the model itself.
        source: ``file.py:line: code`` of the innermost user line, "" where unknown.
        target: for parameters and buffers, the canonical name in the state dict; for inputs, their place.
        call: the eager call that produced it, None where there is none.
        place: identifies the same call by its line of code, as `Step.place` does.
        sizes: the ints that the eager call was given, in order, each with its origin.
        shares: nodes whose memory its result may share (a view, an in-place result).
        writes: nodes whose memory it changes.
    """

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ()
    owner: str = ""
    source: str = ""
    target: str = ""
    call: CallKey | None = None
    place: str = ""
    sizes: tuple[Expression, ...] = ()
    shares: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first tensor it produces."""
        return self.shapes[0]

    @property
    def module(self) -> str:
        """Path of the module whose own code makes the eager call."""
        return self.call[0] if self.call is not None else self.owner

    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes it reads, in order, with repetitions."""
        return tuple(ref.name for ref in leaves((self.args, dict(self.kwargs))) if isinstance(ref, Ref))

    def where(self) -> str:
        """The operator with its module and source line, for messages."""
        return f"{self.op} in module {self.owner or '(the model itself)'!r}" + (
            f" ({self.source})" if self.source else ""
        )


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the stream of data that enters and leaves it.

    Attributes:
        input: the node that holds the first tensor among its arguments, "" if there is none.
        output: the node that holds the first tensor among its results, "" if there is none, or if the call also
            returns other tensors that it was not given.
        takes: position or name of the argument that holds `input`.
        gives: what it returns, as a tree: ("stream",) is the tensor of `output`, ("given", place) is an argument that
            is passed on.
    """

    input: str
    output: str
    takes: int | str = 0
    gives: Any = ("stream",)


@dataclass(frozen=True)
class ModuleInfo:
    """What the analysis needs to know about one module.

    Attributes:
        kind: its class, with the package.
        layer: the class of torch.nn that it is, or derives from, without the package; "" if there is none.
        sizes: the ints, and tuples of ints, that it holds.
        tensors: its own parameters and buffers: attribute name -> canonical name in the state dict.
        calls: its calls, in order.
        read_by: the other modules whose code reads its attributes, which a stand-in would not have.
        bases: its class and all that it derives from, with their packages.
    """

    kind: str
    layer: str
    sizes: Mapping[str, int | tuple[int, ...]]
    tensors: Mapping[str, str]
    calls: tuple[ModuleCall, ...] = ()
    read_by: frozenset[str] = frozenset()
    bases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A comparison of two sizes in the code: its outcome must stay the same, as the code may have branched on it.

    Attributes:
        left: the left side.
        right: the right side.
        source: ``file.py:line`` of the comparison.
        module: path of the module whose code compares.
        symbol: the relation that held, such as ``==`` or ``<``.
        known: whether the graph knows all sizes in it; a size that it does not know is a `Literal` here.
    """

    left: Expression
    right: Expression
    source: str
    module: str = ""
    symbol: str = "=="
    known: bool = True


@dataclass(frozen=True)
class Graph:
    """A model as a list of operators in execution order.

    Attributes:
        nodes: by name, in execution order.
        outputs: names of the nodes that the model returns.
        shapes: canonical name of each parameter and buffer -> its shape.
        aliases: every other name of a tied tensor -> its canonical name.
        modules: module path -> the module's description.
        constants: tensors that the code makes from plain numbers, by node name.
        escaped: attributes and shapes from which the code computes other numbers, such as a scale. They must not
            change, or the results would change. Each has the modules whose code does so, with the place,
            ``file.py:line``.
        comparisons: the comparisons of sizes that the code makes, with their outcomes.
        returned: a name for each output, such as ``logits`` or ``0.1``, in the order of `outputs`.
        frames: module path -> for each call of the module, what its own code did, step by step; once as exported,
            and once more if it does something else in an ordinary run.
        places: name of a tensor in `frames` -> the node that holds it.
        dropped: call of a fused attention, as `Step.place` -> its dropout in training.
        unwritable: modules whose code can't be rewritten, with the reason.
        module_aliases: every other path of a shared module -> its first path.
        unsaved: canonical names of the buffers that the model's state does not hold.
    """

    nodes: Mapping[str, Node]
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    modules: Mapping[str, ModuleInfo]
    constants: Mapping[str, Tensor]
    escaped: Mapping[Expression, Mapping[str, str]] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    returned: tuple[str, ...] = ()
    frames: Mapping[str, tuple[tuple[Frame, ...], ...]] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, float] = field(default_factory=dict)
    unwritable: Mapping[str, str] = field(default_factory=dict)
    module_aliases: Mapping[str, str] = field(default_factory=dict)
    unsaved: tuple[str, ...] = ()

    @cached_property
    def call_nodes(self) -> Mapping[CallKey, tuple[Node, ...]]:
        """For each call of the running model, the nodes it makes, in order, without the exporter's assertions."""
        made: dict[CallKey, list[Node]] = {}
        for node in self.nodes.values():
            if node.call is not None and node.shapes:
                made.setdefault(node.call, []).append(node)
        return {call: tuple(nodes) for call, nodes in made.items()}

    @cached_property
    def memory(self) -> Memory:
        """Which nodes share memory, and which change it."""
        return Memory({name: (node.shares, node.writes) for name, node in self.nodes.items()})

    @cached_property
    def dependencies(self) -> Mapping[str, tuple[str, ...]]:
        """For each node, the nodes it needs: those it reads, and those that changed them in place before it."""
        order = {name: place for place, name in enumerate(self.nodes)}
        return {
            name: tuple(dict.fromkeys([*node.inputs(), *self.memory.writers_before(node.inputs(), order[name])]))
            for name, node in self.nodes.items()
        }

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The nodes that are returned, and those that change them in place after they were made."""
        return tuple(dict.fromkeys([*self.outputs, *self.memory.writers_before(self.outputs, len(self.nodes))]))

    def users(self) -> dict[str, list[str]]:
        """For each node, the nodes that need it, in order."""
        users: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, needed in self.dependencies.items():
            for used in needed:
                users[used].append(name)
        return users

    def live(self, skip_to: Mapping[str, str]) -> set[str]:
        """The nodes that the outputs depend on if each node in `skip_to` takes the value of the node named there."""
        live: set[str] = set()
        todo = list(self.ends)
        while todo:
            name = todo.pop()
            if name not in live:
                live.add(name)
                todo += [skip_to[name]] if name in skip_to else self.dependencies[name]
        return live

    def data_nodes(self) -> set[str]:
        """The nodes whose values depend on the model's inputs, not on its parameters alone."""
        found: set[str] = set()
        for name, node in self.nodes.items():
            if node.op == "input" or (not _shape_only(node) and any(used in found for used in self.dependencies[name])):
                found.add(name)
        return found | {name for name in self.nodes if self.memory.writers(name) & found}

    def ops(self) -> dict[str, int]:
        """How often each operator occurs."""
        counts: dict[str, int] = {}
        for node in self.nodes.values():
            counts[node.op] = counts.get(node.op, 0) + 1
        return counts


def _shape_only(node: Node) -> bool:
    """Whether an operator reads only the shape of its inputs."""
    name = node.op.split(".")[1] if node.op.count(".") >= 2 else node.op
    return name.startswith("new_") or name.endswith("_like") or name.startswith("_assert")


def leaves(tree: Any) -> Iterator[Any]:
    """Every leaf of nested tuples, lists, dicts and slices, in order."""
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item)
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def ints(tree: Any) -> list[int]:
    """The int leaves of a nested argument list, in order; bools do not count."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, int) and not isinstance(leaf, bool)]
