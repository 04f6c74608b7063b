"""The layers that may be corrected: where they are, what holds their weight and their bias."""

from collections.abc import Mapping
from dataclasses import dataclass

from idap.divergence.gram import Rows
from idap.divergence.observe import tensor_argument
from idap.divergence.ports import Stream, Wiring, stream_of
from idap.graph.ir import CallKey, Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.structure.analysis import Structure


@dataclass(frozen=True)
class Consumer:
    """A layer whose inputs may have changed.

    Attributes:
        node: the operator.
        call: in the running model.
        rows: draws what it reads.
        weight: canonical name of its weight.
        bias: canonical name of its bias, "" if it has none.
        norm: the batch norm right behind it, whose running mean can take a bias instead; "" if there is none.
        input_at: which tensor of the call is read.
        stream: where its output joins the flow.
        addition: call of that addition, if its skip is added as it is to a branch of the same shape; else None.
        branch_at: which operand of the addition is the branch.
    """

    node: str
    call: CallKey
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
    """The layers to correct, in the order of the network.

    Args:
        structure: of the original.
        wiring: of what is left.
        changed: nodes whose value is not what it was.
        limit: rows drawn from one batch.
    """
    graph = structure.graph
    readers: dict[str, int] = {}
    for node in graph.nodes.values():
        for name in node.inputs():
            readers[name] = readers.get(name, 0) + 1
    found = []
    for contraction in structure.layout.contractions:
        node, weight = graph.nodes[contraction.node], graph.nodes[contraction.weight]
        rows = Rows(contraction, node, limit)
        place = tensor_argument(graph, node.name, contraction.input)
        alone = weight.op == "parameter" and readers[weight.name] == 1 and weight.target not in graph.aliases.values()
        if (
            node.name in wiring.gone or node.call is None or place is None or not alone or not rows.known
            or wiring.source(contraction.input) not in changed
        ):  # fmt: skip
            continue
        channels = structure.layout.dims[node.name][0][contraction.output_dim].shape[1]
        stream = stream_of(wiring, node.name, channels=channels)
        addition, branch_at = _addition(wiring, node, stream)
        norm = next(iter(stream.affine), "")
        norm = norm if norm and base_name(graph.nodes[norm].op) == "batch_norm" else ""
        if norm and list(wiring.users[node.name]) != [norm]:
            norm = ""
        bias = _bias(graph, node, readers)
        found.append(
            Consumer(node.name, node.call, rows, weight.target, bias, norm, place, stream, addition, branch_at)
        )
    return found


def changed_nodes(structure: Structure, wiring: Wiring, shrunk: Mapping[str, object]) -> set[str]:
    """Nodes whose value is not what it was once these tensors have shrunk and some parts are gone."""
    graph = structure.graph
    touched = {node.name for node in graph.nodes.values() if node.target in shrunk}
    changed: set[str] = set(touched)
    for node in graph.nodes.values():
        sources = {wiring.source(name) for name in node.inputs()}
        if sources & changed or sources != set(node.inputs()):
            changed.add(node.name)
    return changed


def _bias(graph: Graph, node: Node, readers: Mapping[str, int]) -> str:
    given = arguments(node)
    value = given.get("bias", given.get("self") if base_name(node.op) == "addmm" else None)
    if not isinstance(value, Ref):
        return ""
    held = graph.nodes[value.name]
    return held.target if held.op == "parameter" and len(held.shape) == 1 and readers[held.name] == 1 else ""


def _addition(wiring: Wiring, node: Node, stream: Stream) -> tuple[CallKey | None, int]:
    """The addition behind a layer, where the branch arrives there in the layer's own shape."""
    if not stream.addition:
        return None, 0
    place = wiring.graph.nodes[stream.addition]
    if wiring.graph.nodes[stream.end].shapes != node.shapes:
        return None, 0
    return place.call, 1 - stream.skip
