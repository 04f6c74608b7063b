"""Find what replaces a removed module: the identity or zero, if the code still runs with it, or a linear map."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from idap.errors import PlanError
from idap.graph.ir import Graph, Node
from idap.graph.labels import Dim
from idap.graph.rules.flow import RULES, arguments, base_name, rule_of
from idap.parsing import items, sizes
from idap.structure.layout import Layout

PROJECTION = "projection"
"""What a module is replaced by if a linear map replaces it (the others are "identity" and "zero")."""

LAYER = "map"
"""Name of the layer inside the stand-in."""


LONGEST_STRIDE = 4096
"""Convolutions with much longer ones take forever to differentiate."""


@dataclass(frozen=True)
class Kept:
    """A tensor, and what is kept of it.

    Attributes:
        shape: the shape with all channels of the original.
        slots: dimension -> slots kept, ascending; dimensions that are not named stay whole.
    """

    shape: tuple[int, ...]
    slots: Mapping[int, tuple[int, ...]]

    @property
    def shape_after(self) -> tuple[int, ...]:
        """The shape of what is kept."""
        return tuple(len(self.slots.get(dim, range(size))) for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class Projected:
    """A linear map in place of a module, in the channels that the module had in the original.

    Attributes:
        inputs: channels of the module's input that it reads, ascending.
        outputs: channels of the module's output that it writes, ascending.
        sizes: numbers of outputs and inputs that the original has.
        stride: stride of the 1x1 convolution over the channels in dimension 1, one number per spatial dimension; empty:
            a linear map of the last dimension.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sizes: tuple[int, int]
    stride: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, kept, size in (("outputs", self.outputs, self.sizes[0]), ("inputs", self.inputs, self.sizes[1])):
            if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
                raise PlanError(
                    f"a projection keeps {name} {_short(kept)}; expected ascending numbers from 0 to {size - 1}, at "
                    "least one"
                )
        if len(self.stride) > 3 or not all(1 <= step <= LONGEST_STRIDE for step in self.stride):
            raise PlanError(
                f"a projection has stride {self.stride}; expected none, or 1 to 3 numbers from 1 to {LONGEST_STRIDE}"
            )

    @property
    def dim(self) -> int:
        """The dimension of the channels in the input and in the output; -1 is the last one."""
        return 1 if self.stride else -1

    def tensors(self, path: str = "") -> dict[str, "Kept"]:
        """The tensors that the layer adds to a model in place of the module at `path`, by name.

        Without a path, the names are those within the stand-in.

        >>> weight, bias = Projected((0,), (0, 2), (3, 1), (2, 2)).tensors("layer2.0").items()
        >>> weight
        ('layer2.0.map.weight', Kept(shape=(3, 1, 1, 1), slots={0: (0, 2), 1: (0,)}))
        >>> bias
        ('layer2.0.map.bias', Kept(shape=(3,), slots={0: (0, 2)}))
        """
        taps, layer = (1,) * len(self.stride), f"{path}.{LAYER}" if path else LAYER
        return {
            f"{layer}.weight": Kept((*self.sizes, *taps), {0: self.outputs, 1: self.inputs}),
            f"{layer}.bias": Kept(self.sizes[:1], {0: self.outputs}),
        }

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes that hold the sizes of the layer."""
        names = ("in_channels", "out_channels") if self.stride else ("in_features", "out_features")
        return dict(zip(names, (len(self.inputs), len(self.outputs)), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain lists; `from_json` reads them back."""
        names = ("inputs", "outputs", "sizes", "stride")
        return {name: list(getattr(self, name)) for name in names}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Projected":
        """Read what `to_json` wrote.

        Raises:
            PlanError: a number is out of range.
            KeyError, TypeError, ValueError: a part is missing or of the wrong type.
        """
        given = {name: sizes(value) for name, value in items(data)}
        outputs, inputs = given["sizes"]
        return cls(given["inputs"], given["outputs"], (outputs, inputs), given["stride"])


def _short(kept: Sequence[int]) -> str:
    return f"{list(kept[:8])}{' …' if len(kept) > 8 else ''}"


IDENTITY, ZERO = "identity", "zero"

KEEPS_ZERO = (
    *("relu", "relu6", "hardtanh", "gelu", "silu", "mish", "hardswish", "leaky_relu", "elu", "selu", "celu", "prelu"),
    *("tanh", "abs", "neg", "sqrt", "square", "sin", "erf", "softsign", "div", "glu", "mean", "sum"),
    *("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy"),
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "t", "squeeze"),
    *("unsqueeze", "expand", "repeat", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
    *("getitem", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "float", "type_as"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest2d"),
)
"""Operators whose result is zero if their first tensor is zero."""

SUMS = ("add", "sub", "cat", "stack")
"""Operators whose result is zero if all their arguments are zero."""

PRODUCTS = ("mul", "matmul", "mm", "bmm", "einsum")
"""Operators whose result is zero if one of their tensors is zero."""


@dataclass(frozen=True)
class _Value:
    """What is known about a value: the dims of the tensors it holds, and whether it is certainly zero."""

    dims: Sequence[Sequence[Dim]]
    zero: bool = False


class _CannotRun(Exception):  # noqa: N818 - never leaves this module
    """The remaining code can't run on the dims that it would receive, or it is unknown whether it can."""


class Remains:
    """Finds stand-ins for the modules of a branch."""

    def __init__(self, graph: Graph, layout: Layout) -> None:
        self.graph = graph
        self.layout = layout
        data = graph.data_nodes() & graph.live({})
        self._users = graph.users()
        self._contracting = {contraction.node for contraction in layout.contractions}
        self._order = {name: place for place, name in enumerate(graph.nodes)}
        self._inside: dict[str, list[str]] = {}
        for node in graph.nodes.values():
            for path in _homes(node.owner) if node.name in data and node.shapes else ():
                self._inside.setdefault(path, []).append(node.name)
        self._with_tensors = {path for other, info in graph.modules.items() if info.tensors for path in _homes(other)}
        self._read_outside = {
            path
            for other, info in graph.modules.items()
            for path in _homes(other)
            if any(not _within(reader, path) for reader in info.read_by)
        }
        self._sharing = self._with_shared_tensors()
        self._replaceable: dict[str, bool] = {}

    def _with_shared_tensors(self) -> set[str]:
        """The modules that hold a tensor which has another name outside the module."""
        names: dict[str, list[str]] = {}
        for alias, name in self.graph.aliases.items():
            names.setdefault(name, [name]).append(alias)
        return {
            path
            for shared in names.values()
            for name in shared
            for path in _homes(name)
            if not all(_within(other, path) for other in shared)
        }

    def inside(self, path: str) -> list[str]:
        """Every node with data that runs in a module or below it, in order."""
        return self._inside.get(path, [])

    def is_replaceable(self, path: str) -> bool:
        """Whether a module can be replaced: it is called once, for one tensor, and nothing else needs it."""
        if path not in self._replaceable:
            calls = self.graph.modules[path].calls if path and self.inside(path) else ()
            once = len(calls) == 1 and bool(calls[0].input and calls[0].output)
            self._replaceable[path] = once and path not in self._read_outside and path not in self._sharing
        return self._replaceable[path]

    def stand_ins(self, nodes: frozenset[str], entry: str, branch: str) -> dict[str, str]:
        """Module -> what it becomes so that the branch adds nothing; empty if this is impossible."""
        outermost = self._outermost(nodes)
        covered = {name for path in outermost for name in self.inside(path)}
        if not outermost or (nodes - covered) & self._contracting:
            return {}
        last = self._last(nodes, branch, outermost)
        replaced = {path: ZERO if path in last else IDENTITY for path in outermost}
        try:
            left = self._follow(nodes, branch, replaced)
        except _CannotRun:
            return {}
        return replaced if left.zero and alike(left.dims[0], self.layout.dims[entry][0]) else {}

    def _outermost(self, nodes: frozenset[str]) -> list[str]:
        """The largest replaceable modules with parameters that lie in a branch, in the order in which they run."""
        held: dict[str, int] = {}
        for name in nodes:
            for path in _homes(self.graph.nodes[name].owner):
                held[path] = held.get(path, 0) + 1
        whole = {path for path, count in held.items() if count == len(self.inside(path)) and path in self._with_tensors}
        able = {path for path in whole if self.is_replaceable(path)}
        found = [path for path in able if not any(outer in able for outer in _homes(path) if outer != path)]
        return sorted(found, key=lambda path: self._order[self.inside(path)[0]])

    def _last(self, nodes: frozenset[str], branch: str, outermost: Sequence[str]) -> set[str]:
        """The modules from which the end of the branch is reached without passing another."""
        home = {name: path for path in outermost for name in self.inside(path)}
        found, todo, seen = set(), [branch], set[str]()
        while todo:
            name = todo.pop()
            if name in home:
                found.add(home[name])
            elif name in nodes and name not in seen:
                seen.add(name)
                todo += self.graph.dependencies[name]
        return found

    def _follow(self, nodes: frozenset[str], branch: str, replaced: Mapping[str, str]) -> _Value:
        """What the last value of the branch becomes.

        Raises:
            _CannotRun: the code between the modules can't run with their stand-ins.
        """
        home = {name: path for path in replaced for name in self.inside(path)}
        values: dict[str, _Value] = {}

        def value_of(name: str) -> _Value:
            return values.get(name) or _Value(self.layout.dims[name])

        for name in sorted(nodes, key=self._order.__getitem__):
            path = home.get(name, "")
            if not path:
                values[name] = self._operator(self.graph.nodes[name], value_of)
                continue
            (call,) = self.graph.modules[path].calls
            if name == call.output:
                given = value_of(call.input)
                values[name] = _Value(given.dims, given.zero or replaced[path] == ZERO)
            elif any(user not in home or home[user] != path for user in self._users[name]):
                raise _CannotRun
        return values[branch]

    def _operator(self, node: Node, value_of: Callable[[str], _Value]) -> _Value:
        given = [value_of(name) for name in node.inputs()]
        changed = any(
            not all(map(alike, value.dims, self.layout.dims[name]))
            for name, value in zip(node.inputs(), given, strict=True)
        )
        if not changed:
            return _Value(self.layout.dims[node.name], _stays_zero(node, given))
        if node.op == "getitem" or rule_of(node) is not RULES["add"]:
            raise _CannotRun
        return _Value([_broadcast([value.dims[0] for value in given])], _stays_zero(node, given))


def _homes(path: str) -> Iterator[str]:
    """A path and the paths that it lies in, innermost first, without the model itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _within(name: str, path: str) -> bool:
    """Whether a module or tensor is, or lies in, the module at a path."""
    return name == path or name.startswith(f"{path}.")


def _stays_zero(node: Node, given: Sequence[_Value]) -> bool:
    name = base_name(node.op)
    zeros = [value.zero for value in given]
    if name in PRODUCTS:
        return any(zeros)
    if name in SUMS:
        return all(zeros) and not any(isinstance(leaf, float | int) and leaf for leaf in node.args[:2])
    if name in ("linear", "conv1d", "conv2d", "conv3d"):
        return zeros[0] and arguments(node)["bias"] is None
    return name in KEEPS_ZERO and zeros[0]


def _broadcast(tensors: Sequence[Sequence[Dim]]) -> list[Dim]:
    """The dims of tensors combined element by element.

    Raises:
        _CannotRun: the dims do not fit each other after every cut.
    """
    rank = max(map(len, tensors))
    found = []
    for place in range(-rank, 0):
        met = sorted((dims[place] for dims in tensors if len(dims) >= -place), key=lambda dim: dim.shape[1])
        if any(not alike(dim, met[-1]) for dim in met if dim.shape[1] > 1):
            raise _CannotRun
        found.append(met[-1])
    return found


def alike(one: Dim | Sequence[Dim], other: Dim | Sequence[Dim]) -> bool:
    """Whether two dims, or the dims of two tensors, have the same slots after every cut."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and np.array_equal(np.sort(one, axis=0), np.sort(other, axis=0))
    return len(one) == len(other) and all(map(alike, one, other))
