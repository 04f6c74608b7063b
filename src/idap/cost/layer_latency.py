"""Time the layers of a model one by one, at several widths of each group whose units they read or write."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from idap.cost.count import FORMULAS
from idap.cost.latency import Curve, LatencyTable, alternate
from idap.graph.ir import Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name, operator
from idap.graph.trace import trace
from idap.progress import Progress, Silent
from idap.structure.analysis import Structure
from idap.structure.groups import Group
from idap.structure.layout import Presence, count
from idap.training.batch import Inputs, device_name, device_of

SECONDS = 0.4
"""About how many seconds each layer is measured for each of its groups."""
ROUNDS = 3
"""Number of rounds in which a layer is measured; the spread of their medians is the uncertainty."""
FEWEST, MOST = 2, 51
"""Bounds of the number of timed passes of each width in a round."""

IMAGES = frozenset(
    ("conv2d", "conv_transpose2d", "batch_norm", "group_norm", "instance_norm", "max_pool2d", "avg_pool2d",
     "adaptive_avg_pool2d")
)  # fmt: skip
EVEN = frozenset(
    ("relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardswish",
     "hardsigmoid", "softmax", "add", "mul", "cat", "layer_norm", "rms_norm", *IMAGES - FORMULAS.keys())
)  # fmt: skip
"""Operators without a formula that are timed as well; their time is linear in the width, so two widths are enough."""


@dataclass(frozen=True)
class _Shape:
    """Placeholder for a tensor of this shape among the arguments of a call."""

    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Call:
    """One call of an operator, with shapes in place of tensors."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


def measure_table(
    model: nn.Module,
    structure: Structure,
    example: Inputs,
    widths_of: Callable[[int], Sequence[int]],
    *,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time the layers of every group on the model's device; equal layers are timed once.

    Each layer runs alone, on tensors of its own shapes, in the data type and the memory layout that it has in the
    model; the widths are measured in turn. The caches then hold other data than in a whole pass, so the seconds serve
    to compare layers and widths rather than to be added up.

    Args:
        model: the traced model; it is not changed.
        structure: structure of the model.
        example: inputs with the number of samples to measure; the model is traced with them to find the shapes.
        widths_of: size of a group -> widths to measure, ascending, up to the size.
        seconds: about how many seconds each layer is measured for each of its groups.
        progress: the listener that receives progress, group by group; None: no progress is reported.

    Returns:
        The latency table.

    Raises:
        TraceError: the model can't be traced with these inputs.
    """
    graph = trace(model, *example)
    timer = _Timer(model, example, seconds)
    with torch.no_grad():
        curves, layers, unmeasured = _measure_layers(structure, graph, timer, widths_of, progress or Silent())
        fixed = {
            node.name: timer.once(_call(structure, graph, graph.nodes[node.name], structure.presence({})))
            for node in structure.graph.nodes.values()
            if base_name(node.op) in FORMULAS and node.name not in layers and node.name in graph.nodes
        }
    return LatencyTable(
        batch=_samples(example),
        device=timer.name,
        threads=torch.get_num_threads(),
        curves=tuple(curves),
        layers=layers,
        fixed=fixed,
        unmeasured=tuple(unmeasured),
    )


def _measure_layers(
    structure: Structure,
    graph: Graph,
    timer: "_Timer",
    widths_of: Callable[[int], Sequence[int]],
    progress: Progress,
) -> tuple[list[Curve], dict[str, dict[str, int]], list[str]]:
    """The curve of each different layer, the groups and curves of each node, and the operators that were left out."""
    layers: dict[str, dict[str, int]] = {}
    curves: dict[tuple[tuple[int, ...], tuple[_Call, ...]], int] = {}
    found: list[Curve] = []
    unmeasured: dict[str, None] = {}
    with progress.phase("latency of layers", len(structure.groups)) as phase:
        for group in structure.groups:
            for node in _over(structure, group):
                name, there = base_name(node.op), graph.nodes.get(node.name)
                if there is None or there.op != node.op or name not in FORMULAS.keys() | EVEN:
                    if not node.shares:  # a view costs nothing
                        unmeasured[name] = None
                    continue
                widths = tuple(widths_of(group.size))
                if name not in FORMULAS:
                    widths = tuple(dict.fromkeys((widths[0], widths[-1])))
                calls = tuple(_call(structure, graph, there, _presence(structure, group, width)) for width in widths)
                if (widths, calls) not in curves:
                    curves[widths, calls] = len(found)
                    found.append(timer.curve(widths, calls))
                layers.setdefault(node.name, {})[group.name] = curves[widths, calls]
            phase.advance(group.name)
    return found, layers, list(unmeasured)


def _over(structure: Structure, group: Group) -> Iterator[Node]:
    """The operators that read or write units of a group."""
    dims = structure.layout.dims
    special = ("input", "parameter", "buffer", "constant", "output", "getitem")
    for node in structure.graph.nodes.values():
        if node.op in special or node.name not in dims:
            continue
        touched = [dim for name in (*node.inputs(), node.name) for dims_of in dims[name][:1] for dim in dims_of]
        if any(group.index in structure.layout.groups_in(dim) for dim in touched):
            yield node


def _presence(structure: Structure, group: Group, width: int) -> Presence:
    return structure.presence({group.name: range(width)})


def _samples(example: Inputs) -> int:
    tensors = [leaf for leaf in (*example[0], *example[1].values()) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else 1


def _call(structure: Structure, graph: Graph, node: Node, present: Presence) -> _Call:
    """The call of a node if only some units are present; batch and image sizes are those of the graph."""
    layout = structure.layout
    sizes = {
        (use.argument, use.index): use.sign * count(use.dim, present)
        for use in layout.sizes
        if use.node == node.name and len(use.dim)
    }

    def shape(name: str) -> _Shape:
        full = graph.nodes[name].shape
        dims = layout.dims[name][0]
        return _Shape(tuple(n * count(dim, present) // max(1, dim.shape[1]) for n, dim in zip(full, dims, strict=True)))

    def shape_value(value: Any) -> Any:
        if isinstance(value, Ref):
            return shape(value.name)
        return tuple(shape_value(item) for item in value) if isinstance(value, tuple | list) else value

    def resize(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(sizes.get((name, place), item) for place, item in enumerate(value))
        return sizes.get((name, None), value)

    given = {name: resize(name, shape_value(value)) for name, value in arguments(node).items()}
    ordered = [argument.name for argument in operator(node)._schema.arguments if not argument.kwarg_only]
    return _Call(node.op, tuple(given.pop(name) for name in ordered), tuple(given.items()))


@dataclass
class _Timer:
    """Times calls on tensors that reuse the same memory at every width."""

    model: nn.Module
    example: Inputs
    seconds: float
    _memory: dict[int, Tensor] = field(default_factory=dict)
    _known: dict[_Call, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights = [tensor for tensor in self.model.parameters() if tensor.is_floating_point()]
        self._dtype = weights[0].dtype if weights else torch.float32
        self._device = device_of(self.model)
        inputs = [leaf for leaf in (*self.example[0], *self.example[1].values()) if isinstance(leaf, Tensor)]
        self._channels_last = any(map(_lies_last, (*weights, *inputs)))
        self.name = device_name(self._device)

    def curve(self, widths: tuple[int, ...], calls: tuple[_Call, ...]) -> Curve:
        """Measure calls, one for each width; the seconds are the middle one of the medians of a few rounds."""
        on_gpu = self._device.type == "cuda"
        runs = {width: self._run(call) for width, call in zip(widths, calls, strict=True)}
        first = alternate({"": runs[widths[-1]]}, repeats=2, warmup=1, on_gpu=on_gpu)[""].median
        passes = self.seconds / max(1e-9, first * len(widths) * ROUNDS)
        repeats = int(min(MOST, max(FEWEST, passes)))
        medians: dict[int, list[float]] = {width: [] for width in widths}
        for turn in range(ROUNDS):
            order = widths if turn % 2 else widths[::-1]  # so that a periodic disturbance hits other widths
            times = alternate({str(w): runs[w] for w in order}, repeats=repeats, warmup=int(not turn), on_gpu=on_gpu)
            for width in widths:
                medians[width].append(max(1e-9, times[str(width)].median))
        return Curve(
            widths,
            tuple(median(medians[width]) for width in widths),
            tuple(max(medians[width]) - min(medians[width]) for width in widths),
        )

    def once(self, call: _Call) -> float:
        """Seconds of a call; equal calls are measured once."""
        if call not in self._known:
            self._known[call] = self.curve((1,), (call,)).seconds[0]
        return self._known[call]

    def _run(self, call: _Call) -> Callable[[], Any]:
        name = base_name(call.op)
        places = iter(range(64))
        last = self._channels_last and name in IMAGES | EVEN

        def fill(value: Any) -> Any:
            if isinstance(value, _Shape):
                return self._tensor(next(places), value.sizes, last=last)
            return [fill(item) for item in value] if isinstance(value, tuple) else value

        args = [fill(value) for value in call.args]
        kwargs: Mapping[str, Any] = {key: fill(value) for key, value in call.kwargs}
        return partial(operator(Node("", call.op)), *args, **kwargs)

    def _tensor(self, place: int, sizes: tuple[int, ...], *, last: bool) -> Tensor:
        """A tensor of numbers near 1, of which no operator makes subnormal ones; each place reuses its memory."""
        wanted = prod(sizes)
        held = self._memory.get(place)
        if held is None or held.numel() < wanted:
            held = torch.rand(wanted, device=self._device).add_(0.5).to(self._dtype)
            self._memory[place] = held
        if last and len(sizes) == 4:
            batch, channels, height, width = sizes
            return held[:wanted].view(batch, height, width, channels).permute(0, 3, 1, 2)
        return held[:wanted].view(sizes)


def _lies_last(tensor: Tensor) -> bool:
    """Whether a tensor's channels are last in memory, and the layout is not contiguous as well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
