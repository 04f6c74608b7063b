"""Find the layers to correct after a cut, and keep the sums from which each of them is corrected."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod

import torch
from torch import Tensor

from idap.divergence.observe import Pass, is_result, tensor_argument
from idap.divergence.ports import Stream, Unfolding, Wiring, stream_of
from idap.divergence.watch import valid_positions
from idap.graph.ir import CallKey, Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.linalg.ridge import Moments, fit_need
from idap.linalg.shift import Residuals, shift_need
from idap.memory import Room
from idap.structure.analysis import Structure
from idap.structure.projections import former_exit

Sums = Moments | Residuals
"""The sums that are kept for a layer while the calibration data pass through the model."""


@dataclass(frozen=True)
class Consumer:
    """A layer whose inputs may have changed.

    Attributes:
        node: name of the operator's node.
        call: its call in the running model.
        original: the call in the original whose output is the target; it differs from `call` for a projection.
        rows: draws the rows that the layer reads.
        weight: canonical name of its weight.
        bias: canonical name of its bias, "" if it has none.
        norm: node of the batch norm right behind it, whose running mean can take a bias instead; "" if there is none.
        input_at: index of the tensor that is read, among the tensors of the call.
        stream: the stream that its output is added to.
        addition: call of that addition, if this layer can also make up for the error of the stream there; else None.
        branch_at: index of the branch among the two operands of the addition.
    """

    node: str
    call: CallKey
    original: CallKey
    rows: Unfolding
    weight: str
    bias: str
    norm: str
    input_at: int
    stream: Stream
    addition: CallKey | None
    branch_at: int

    @property
    def shifts(self) -> bool:
        """Whether a bias can be added: to the layer's own, or to the running mean of its norm."""
        return bool(self.bias or self.norm)


def consumers_of(structure: Structure, wiring: Wiring, changed: set[str], *, limit: int) -> list[Consumer]:
    """Find the layers to correct, in the order in which they are corrected.

    A layer that makes up for the error of a stream is corrected at the addition, others where they run.

    Args:
        structure: structure of the original, with projections in the place of the blocks that they replaced.
        wiring: the connections that are left.
        changed: names of the nodes whose value has changed.
        limit: most rows that are drawn from one batch.
    """
    graph = structure.graph
    readers: dict[str, int] = {}
    for node in graph.nodes.values():
        for name in node.inputs():
            readers[name] = readers.get(name, 0) + 1
    projections = {block.exit: former_exit(block) for block in map(structure.block, structure.standing)}
    found = []
    for contraction in structure.layout.contractions:
        node, weight = graph.nodes[contraction.node], graph.nodes[contraction.weight]
        original = _in_original(graph, node.name, projections.get(node.name, node.name))
        rows = Unfolding(contraction, node, limit)
        place = tensor_argument(graph, node.name, contraction.input)
        alone = weight.op == "parameter" and readers[weight.name] == 1 and weight.target not in graph.aliases.values()
        if (
            node.name in wiring.gone or node.call is None or original is None or place is None
            or not alone or not rows.keeps_order
            or (wiring.source(contraction.input) == contraction.input and contraction.input not in changed)
        ):  # fmt: skip
            continue
        channels = structure.layout.dims[node.name][0][contraction.output_dim].shape[1]
        stream = stream_of(wiring, node.name, channels=channels)
        norm, bias = _norm(wiring, node, stream, readers), _bias(graph, node, readers)
        plain = not stream.affine or stream.affine == (norm,)
        addition, branch_at = _addition(wiring, node, stream) if plain and (bias or norm) else (None, 0)
        found.append(
            Consumer(
                node.name, node.call, original, rows, weight.target, bias, norm, place, stream, addition, branch_at
            )
        )
    return _sort(graph, found)


def _in_original(graph: Graph, name: str, before: str) -> CallKey | None:
    """The call in the original whose output is the target of a layer; None if its output can't be observed."""
    return graph.nodes[before].call if before == name or is_result(graph, before) else None


def _sort(graph: Graph, found: list[Consumer]) -> list[Consumer]:
    """Sort layers by the calls where they are corrected; of several at one addition, only the largest keeps it."""
    shapes, order = graph.shapes, {name: number for number, name in enumerate(graph.nodes)}
    largest: dict[CallKey, Consumer] = {}
    for one in found:
        if one.addition is not None:
            other = largest.setdefault(one.addition, one)
            if prod(shapes[one.weight]) > prod(shapes[other.weight]):
                largest[one.addition] = one
    found = [
        one if one.addition is None or largest[one.addition] is one else replace(one, addition=None) for one in found
    ]
    return sorted(found, key=lambda one: order[one.node if one.addition is None else one.stream.addition])


def changed_nodes(structure: Structure, wiring: Wiring, shrunk: Mapping[str, object]) -> set[str]:
    """Names of the nodes whose value changes when these tensors shrink and some parts are removed."""
    graph = structure.graph
    touched = {node.name for node in graph.nodes.values() if node.target in shrunk}
    touched |= {structure.block(name).exit for name in structure.standing}
    changed: set[str] = set(touched)
    for node in graph.nodes.values():
        sources = {wiring.source(name) for name in node.inputs()}
        if sources & changed or sources != set(node.inputs()):
            changed.add(node.name)
    return changed


def _norm(wiring: Wiring, node: Node, stream: Stream, readers: Mapping[str, int]) -> str:
    """Node of the batch norm right behind a layer, if only this layer's outputs pass it; else ""."""
    norm = next(iter(stream.affine), "")
    if not norm or base_name(wiring.graph.nodes[norm].op) != "batch_norm" or wiring.users[node.name] != [norm]:
        return ""
    return norm if readers[arguments(wiring.graph.nodes[norm])["running_mean"].name] == 1 else ""


def _bias(graph: Graph, node: Node, readers: Mapping[str, int]) -> str:
    given = arguments(node)
    value = given.get("bias", given.get("self") if base_name(node.op) == "addmm" else None)
    if not isinstance(value, Ref):
        return ""
    held = graph.nodes[value.name]
    return held.target if held.op == "parameter" and len(held.shape) == 1 and readers[held.name] == 1 else ""


def _addition(wiring: Wiring, node: Node, stream: Stream) -> tuple[CallKey | None, int]:
    """The addition behind a layer and the index of the branch, if the layer's output arrives there element by element.

    Otherwise None and 0.
    """
    if not stream.addition:
        return None, 0
    place = wiring.graph.nodes[stream.addition]
    end = stream.end
    while end != node.name:
        before = wiring.graph.nodes[end]
        if before.shapes != node.shapes or base_name(before.op) in ("permute", "transpose"):
            return None, 0
        end = next(used for used in map(wiring.source, before.inputs()) if wiring.users[used] == [end])
    return (place.call, 1 - stream.skip) if arguments(place).get("alpha", 1) == 1 else (None, 0)


@dataclass(frozen=True)
class Correction:
    """The result of the correction of one layer.

    Attributes:
        weight: canonical name of its weight.
        before: error against the original's output on held-out samples, before the correction.
        after: the same error after the correction; equal to `before` if the layer kept its old weights.
        ridge: the ridge that the held-out samples chose; infinite if only the bias changed, NaN if nothing did.
        too_wide: whether it reads more columns than `Rebalance.columns`, so that only its bias could change.
    """

    weight: str
    before: float
    after: float
    ridge: float
    too_wide: bool = False


@dataclass
class Case:
    """A layer while it is corrected.

    Attributes:
        consumer: the layer.
        kept: indices of the outputs that it still has, among those of the original.
        through: whether the layer also makes up for the error of the stream that it is added to.
        chosen: for each batch, the positions that were drawn.
        targets: for each batch, the targets at these positions.
        learned: sums over the rows to learn from.
        held_out: sums over the held-out rows.
        seen: number of rows in both.
        again: repeats the layer's last call.
        output: the output of the layer's last call.
        read: the rows that this call read, shape (parts, rows, columns).
        layer: its weight and bias, shapes (parts, outputs, columns) and (parts, outputs), if it is too wide to be
            refitted: then sums of its residuals are kept, and only its bias is corrected.
    """

    consumer: Consumer
    kept: Tensor
    through: bool
    chosen: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    learned: Sums | None = None
    held_out: Sums | None = None
    seen: int = 0
    again: Callable[[], Tensor] = torch.empty
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    read: Tensor = field(default_factory=lambda: torch.empty(0))
    layer: tuple[Tensor, Tensor] | None = None

    def choose(self, given: Sequence[Tensor], each: Pass, number: int) -> None:
        """Draw positions from a batch, given the tensors of the layer's call in the original."""
        rows, at = self.consumer.rows, self.consumer.input_at
        weight = next(tensor for i, tensor in enumerate(given) if i != at and tensor.dim() > 1)
        self.chosen.append(rows.choose(given[at], weight, lambda x: valid_positions(each.padding, x), number))

    def choose_outputs(self, result: Tensor, each: Pass, number: int) -> None:
        """Draw positions from a batch, given the output of the code in the original that this layer replaces."""
        self.chosen.append(
            self.consumer.rows.choose_outputs(result, lambda x: valid_positions(each.padding, x), number)
        )

    def add(self, targets: Tensor, share: float) -> None:
        """Add the rows that were read to the sums, and hold a share of them out.

        Args:
            targets: targets of these rows, shape (rows, outputs).
            share: share of the rows that is held out.
        """
        parts, rows = self.read.shape[:2]
        y = targets.reshape(rows, parts, -1).transpose(0, 1)
        before, self.seen = self.seen, self.seen + rows
        judge = _up(self.seen * share) - _up(before * share)  # if batches have one row, some are held out whole
        places = slice(0, rows - judge), slice(rows - judge, rows)  # rows are in the order of samples
        for name, part in zip(("learned", "held_out"), places, strict=True):
            x = self.read[:, part]
            sums = Moments.of(x, y[:, part]) if self.layer is None else Residuals.of(x, y[:, part], *self.layer)
            held = getattr(self, name)
            setattr(self, name, sums if held is None else held + sums)
        self.read = torch.empty(0)

    def sums(self) -> tuple[Sums, Sums]:
        """Take the sums over the rows to learn from and over the held-out rows; the case keeps no tensors."""
        learned, held_out = self.learned, self.held_out
        assert learned is not None and held_out is not None
        self.learned = self.held_out = None
        self.targets, self.chosen, self.layer = [], [], None
        return learned, held_out


def by_call(cases: Sequence[Case]) -> dict[CallKey, Case]:
    """The cases by the calls of their layers."""
    return {case.consumer.call: case for case in cases}


def by_original(cases: Sequence[Case]) -> dict[CallKey, Case]:
    """The cases by the calls of the original whose outputs are their targets."""
    return {case.consumer.original: case for case in cases}


def by_addition(cases: Sequence[Case]) -> dict[CallKey, Case]:
    """The cases that make up for the error of a stream, by the calls of the additions."""
    return {case.consumer.addition: case for case in cases if case.through and case.consumer.addition is not None}


def _up(share: float) -> int:
    return ceil(share - 1e-9)


DRAWN = 2**26
"""Most numbers that are drawn from a batch for a layer that is too wide to be refitted."""
FEWEST_ROWS = 256
"""Fewest rows that are drawn from a batch for such a layer."""


def columns_of(consumer: Consumer, weight: Tensor) -> int:
    """Number of columns that each part of a layer reads."""
    return weight.numel() // max(1, weight.shape[consumer.rows.contraction.write_dim])


def with_fewer_rows(consumer: Consumer, weight: Tensor, widest: int) -> Consumer:
    """Let fewer rows be drawn for a layer that is too wide to be refitted: a mean needs few, and each row is large."""
    columns = columns_of(consumer, weight) * consumer.rows.contraction.groups
    if columns_of(consumer, weight) <= widest:
        return consumer
    limit = min(consumer.rows.limit, max(FEWEST_ROWS, DRAWN // columns))
    return replace(consumer, rows=replace(consumer.rows, limit=limit))


def check_sizes(consumers: Sequence[Consumer], tensors: Mapping[str, Tensor], widest: int) -> None:
    """Refuse layers whose correction takes more memory than is allowed, before any calibration data are read.

    Args:
        consumers: the layers, which are corrected one by one.
        tensors: tensors of the model, by canonical name.
        widest: most columns of a layer that is refitted.

    Raises:
        InsufficientMemoryError: a layer takes more memory than is allowed; the message names the first.
    """
    if not consumers:
        return
    room = Room.now(tensors[consumers[0].weight].device)
    for consumer in consumers:
        weight, contraction = tensors[consumer.weight], consumer.rows.contraction
        columns = columns_of(consumer, weight)
        estimate = fit_need if columns <= widest else shift_need
        need = estimate(contraction.groups, columns, weight.shape[contraction.write_dim], consumer.rows.limit)
        room.check(
            need,
            what=f"refitting the layer with weight {consumer.weight!r}, which reads {columns:,} columns,",
            way_out=f"Set rebalance.columns below {columns}, so that only its bias is corrected, or rebalance to None.",
        )
