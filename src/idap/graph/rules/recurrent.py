"""Recurrent layers: LSTM, GRU and plain ones, of several layers and in both directions."""

from idap.graph.ir import Node, Ref
from idap.graph.labels import Dim, concat, fixed
from idap.graph.rules.flow import Contraction, Flow, arguments, base_name, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(flow: Flow, node: Node) -> list[list[Dim]]:
    """X (..., I), states (layers·directions, N, H) -> output (..., directions·H) and the states.

    A module of torch has one hidden size, so the units of all layers and directions go together.
    """
    given = arguments(node)
    if "input" not in given:  # packed sequences
        return _rigid(flow, node)
    name, weights = base_name(node.op), [ref.name for ref in given["params"]]
    directions = 2 if given["bidirectional"] else 1
    per_layer = len(weights) // (int(given["num_layers"]) * directions)
    if per_layer != (4 if given["has_biases"] else 2):  # an LSTM with a projection of its state
        return _rigid(flow, node)
    states: list[Ref] = [given["hx"]] if isinstance(given["hx"], Ref) else list(given["hx"])
    state = flow.of(states[0])[-1]
    features = flow.of(given["input"])[-1]
    for start in range(0, len(weights), per_layer):
        flow.labels.unify(_read(flow, weights[start]), features)
        for weight in weights[start : start + per_layer]:
            _gated(flow, weight, state, GATES[name])
            state = flow.labels.settled(state)
        flow.labels.unify(_read(flow, weights[start + 1]), state)
        state = flow.labels.settled(state)
        if start // per_layer % directions == directions - 1:
            features = concat([state] * directions)
    for ref in states:
        flow.labels.unify(flow.of(ref)[-1], state)
        state = flow.labels.settled(state)
    last = len(flow.of(given["input"])) - 1
    flow.contractions.append(
        Contraction(node.name, "recurrent", given["input"].name, last, weights[0], 1, 0, len(node.shape) - 1)
    )
    made = [*flow.of(given["input"])[:-1], concat([state] * directions)]
    return [made, *(_state(flow, ref, state, shape) for ref, shape in zip(states, node.shapes[1:], strict=True))]


def _state(flow: Flow, ref: Ref, state: Dim, shape: tuple[int, ...]) -> list[Dim]:
    """The dims of a state that is returned; torch 2.11 announces it with other dims than it has."""
    dims = flow.of(ref)[:-1]
    if tuple(dim.shape[1] for dim in dims) != shape[:-1]:
        dims = [fixed(size) for size in shape[:-1]]
    return [*dims, state]


def _read(flow: Flow, weight: str) -> Dim:
    return flow.labels.settled(flow.dims[weight][0][1])


def _gated(flow: Flow, weight: str, state: Dim, gates: int) -> None:
    """The first dim of a weight or bias holds the state once for each gate."""
    written = flow.labels.settled(flow.dims[weight][0][0])
    gate, units = flow.labels.split(written, [gates, state.shape[1]])
    flow.labels.freeze_dim(gate)
    flow.labels.unify(units, flow.labels.settled(state))


def _rigid(flow: Flow, node: Node) -> list[list[Dim]]:
    for name in node.inputs():
        for dims in flow.dims[name]:
            flow.freeze(dims, "a recurrent layer of this kind can't shrink")
    return [[fixed(size) for size in shape] for shape in node.shapes]
