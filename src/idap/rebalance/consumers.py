"""The layers that may be corrected: where they are, what holds their weight and their bias."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from idap.divergence.gram import Rows
from idap.divergence.observe import is_result, tensor_argument
from idap.divergence.ports import Stream, Wiring, stream_of
from idap.graph.ir import CallKey, Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.structure.analysis import Structure
from idap.structure.standing import former


@dataclass(frozen=True)
class Consumer:
    """A layer whose inputs may have changed.

    Attributes:
        node: the operator.
        call: in the running model.
        original: the call that gives what this layer should give in the original; another one for a projection.
        rows: draws what it reads.
        weight: canonical name of its weight.
        bias: canonical name of its bias, "" if it has none.
        norm: the batch norm right behind it, whose running mean can take a bias instead; "" if there is none.
        input_at: which tensor of the call is read.
        stream: where its output joins the flow.
        addition: call of that addition, if this layer can make up there for what else is missing; else None.
        branch_at: which operand of the addition is the branch.
    """

    node: str
    call: CallKey
    original: CallKey
    rows: Rows
    weight: str
    bias: str
    norm: str
    input_at: int
    stream: Stream
    addition: CallKey | None
    branch_at: int

    @property
    def shifts(self) -> bool:
        """Whether there is a place for a bias."""
        return bool(self.bias or self.norm)


def consumers_of(structure: Structure, wiring: Wiring, changed: set[str], *, limit: int) -> list[Consumer]:
    """The layers to correct, in the order in which they can be: one that is added where it is added.

    Args:
        structure: of the original, with projections in their places.
        wiring: of what is left.
        changed: nodes whose value is not what it was.
        limit: rows drawn from one batch.
    """
    graph = structure.graph
    readers: dict[str, int] = {}
    for node in graph.nodes.values():
        for name in node.inputs():
            readers[name] = readers.get(name, 0) + 1
    projections = {block.exit: former(block) for block in map(structure.block, structure.standing)}
    found = []
    for contraction in structure.layout.contractions:
        node, weight = graph.nodes[contraction.node], graph.nodes[contraction.weight]
        original = _in_original(graph, node.name, projections.get(node.name, node.name))
        rows = Rows(contraction, node, limit)
        place = tensor_argument(graph, node.name, contraction.input)
        alone = weight.op == "parameter" and readers[weight.name] == 1 and weight.target not in graph.aliases.values()
        if (
            node.name in wiring.gone or node.call is None or original is None or place is None
            or not alone or not rows.paired
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
    return _ordered(graph, found)


def _in_original(graph: Graph, name: str, before: str) -> CallKey | None:
    """The call in the original that gives what a layer should give; None if that can't be seen."""
    return graph.nodes[before].call if before == name or is_result(graph, before) else None


def _ordered(graph: Graph, found: list[Consumer]) -> list[Consumer]:
    """In the order of the calls where they are corrected; of layers added to each other the largest makes up."""
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
    """Nodes whose value is not what it was once these tensors have shrunk and some parts are gone."""
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
    """The batch norm right behind a layer, if its statistics are of this layer alone; else ""."""
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
    """The addition behind a layer, where the branch arrives there as the layer gave it, place by place."""
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
