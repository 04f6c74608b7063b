"""Layers that are one operator: convolutions, pooling and interpolation, fused attention, recurrent layers."""

from typing import Any

from idap.graph.ir import Graph, Node, Ref
from idap.graph.labels import Dim, concat, constant_dim
from idap.graph.rules.flow import Contraction, Flow, Pin, arguments, base_name, broadcast, rule


@rule("conv1d", "conv2d", "conv3d")
def conv(flow: Flow, node: Node) -> list[Dim]:
    """X (N, C, *spatial), weight (O, C/groups, *kernel), bias (O) -> (N, O, *spatial)."""
    given = arguments(node)
    x, weight, groups = flow.of(given["input"]), flow.of(given["weight"]), int(given["groups"])
    place = len(x) - len(weight) + 1  # an input without batch dimension has the channels first
    flow.freeze([*x[place + 1 :], *weight[2:]], "it is convolved over")
    channels = x[place]
    if groups == 1:
        flow.labels.unify(channels, weight[1])
    else:
        read_parts, read_inner = flow.labels.split(channels, [groups, channels.shape[1] // groups])
        write_parts, _ = flow.labels.split(weight[0], [groups, weight[0].shape[1] // groups])
        flow.labels.unify(read_parts, write_parts)
        flow.labels.unify(read_inner, weight[1])
        flow.follows(node, "groups", None, flow.labels.resolve(read_parts))
    return _finish(flow, node, write_dim=0, read_dim=1)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(flow: Flow, node: Node) -> list[Dim]:
    """X (N, C, *spatial), weight (C, O/groups, *kernel), bias (O) -> (N, O, *spatial)."""
    given = arguments(node)
    x, weight, groups = flow.of(given["input"]), flow.of(given["weight"]), int(given["groups"])
    place = len(x) - len(weight) + 1
    flow.freeze([*x[place + 1 :], *weight[2:]], "it is convolved over")
    channels = x[place]
    flow.labels.unify(channels, weight[0])
    if groups == 1:
        return _finish(flow, node, write_dim=1, read_dim=0)
    parts, _ = flow.labels.split(weight[0], [groups, weight[0].shape[1] // groups])
    flow.follows(node, "groups", None, flow.labels.resolve(parts))
    written = flow.labels.merge([parts, weight[1]])
    return _finish(flow, node, write_dim=1, read_dim=0, written=written)


def _finish(flow: Flow, node: Node, *, write_dim: int, read_dim: int, written: Dim | None = None) -> list[Dim]:
    given = arguments(node)
    x, weight = flow.of(given["input"]), flow.of(given["weight"])
    written = weight[write_dim] if written is None else written
    if given["bias"] is not None:
        flow.labels.unify(flow.of(given["bias"])[0], written)
    place = len(x) - len(weight) + 1
    groups = int(given["groups"])
    flow.contractions.append(
        Contraction(
            node.name, "conv", given["input"].name, place, given["weight"].name, read_dim, write_dim, place, groups
        )
    )
    spatial = [constant_dim(size) for size in node.shape[place + 1 :]]
    return [*flow.of(given["input"])[:place], flow.labels.resolve(written), *spatial]


def _spatial(flow: Flow, node: Node, count: int) -> list[list[Dim]]:
    x = flow.of(next(iter(arguments(node).values())))
    flow.freeze(x[-count:], "it is pooled or resized")
    return [[*x[:-count], *(constant_dim(size) for size in shape[-count:])] for shape in node.shapes]


@rule("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_nearest1d",
      "upsample_linear1d", "max_pool1d_with_indices")  # fmt: skip
def pool1d(flow: Flow, node: Node) -> list[list[Dim]]:
    """Pool or resize the last dimension."""
    return _spatial(flow, node, 1)


@rule("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
      "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "grid_sampler",
      "reflection_pad2d", "replication_pad2d", "_upsample_nearest_exact2d", "_upsample_bicubic2d_aa",
      "_upsample_bilinear2d_aa")  # fmt: skip
def pool2d(flow: Flow, node: Node) -> list[list[Dim]]:
    """Pool or resize the last two dimensions."""
    return _spatial(flow, node, 2)


@rule("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d",
      "max_pool3d_with_indices",
      "upsample_trilinear3d")  # fmt: skip
def pool3d(flow: Flow, node: Node) -> list[list[Dim]]:
    """Pool or resize the last three dimensions."""
    return _spatial(flow, node, 3)


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(flow: Flow, node: Node) -> list[Dim]:
    """X and the places of its values (..., C, *places) -> (..., C, *larger): channels pass."""
    count = 2 if "2d" in node.op else 3
    x, places = (flow.of(value) for value in list(arguments(node).values())[:2])
    for dims in (x, places):
        flow.freeze(dims[-count:], "it is pooled or resized")
    for mine, theirs in zip(x[:-count], places[:-count], strict=True):
        flow.labels.unify(mine, theirs)
    return [*(flow.labels.resolve(dim) for dim in x[:-count]), *(constant_dim(size) for size in node.shape[-count:])]


@rule("im2col")
def im2col(flow: Flow, node: Node) -> list[Dim]:
    """(N, C, H, W) -> (N, C·kernel, places): the slots of a channel stay together."""
    x = flow.of(node.args[0])
    flow.freeze(x[-2:], "patches are taken from it")
    inner = node.shape[-2] // x[-3].shape[1]
    return [*x[:-3], flow.labels.merge([x[-3], constant_dim(inner)]), constant_dim(node.shape[-1])]


@rule("col2im")
def col2im(flow: Flow, node: Node) -> list[Dim]:
    """(N, C·kernel, places) -> (N, C, H, W): the slots of a channel stay together."""
    x = flow.of(node.args[0])
    channels, inner = flow.labels.split(x[-2], [node.shape[-3], x[-2].shape[1] // node.shape[-3]])
    flow.freeze([inner, x[-1]], "it is put together from patches")
    return [*x[:-2], flow.labels.resolve(channels), *(constant_dim(size) for size in node.shape[-2:])]


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(flow: Flow, node: Node) -> list[Dim]:
    """Query (..., H, L, E), key (..., H, S, E), value (..., H, S, Ev) -> (..., H, L, Ev)."""
    given = arguments(node)
    query, key, value = (flow.of(given[name]) for name in ("query", "key", "value"))
    flow.freeze([query[-2], key[-2], value[-2]])
    flow.labels.unify(query[-1], key[-1])
    if given["scale"] is None:
        flow.pins.append(Pin(node.name, query[-1], "the scale of the attention follows its head width"))
    batch = _heads(flow, given)
    flow.crosses(node, "contraction", flow.of(given["query"])[-1:])
    flow.roles += [("heads", dim) for dim in batch] + [("head width", flow.of(given["value"])[-1])]
    if given["attn_mask"] is not None:
        scores = [*batch, flow.of(given["query"])[-2], flow.of(given["key"])[-2]]
        broadcast(flow, [scores, flow.of(given["attn_mask"])], [dim.shape[1] for dim in scores])
    return [*(flow.labels.resolve(dim) for dim in batch), *flow.of(given["query"])[-2:-1], flow.of(given["value"])[-1]]


def default_scale(graph: Graph, node: Node) -> float | None:
    """The scale that an attention derives from its head width; None if it is given one, or for another operator."""
    if base_name(node.op) != "scaled_dot_product_attention":
        return None
    given = arguments(node)
    return graph.nodes[given["query"].name].shape[-1] ** -0.5 if given["scale"] is None else None


def _heads(flow: Flow, given: dict[str, Any]) -> list[Dim]:
    query, key, value = (flow.of(given[name])[:-2] for name in ("query", "key", "value"))
    shape = [dim.shape[1] for dim in query]
    if not given.get("enable_gqa") or not shape or key[-1].shape[1] == shape[-1]:
        return broadcast(flow, [query, key, value], shape)
    shared = key[-1].shape[1]  # each key head serves shape[-1] // shared query heads
    outer, _ = flow.labels.split(query[-1], [shared, shape[-1] // shared])
    flow.labels.unify(outer, key[-1])
    flow.labels.unify(key[-1], value[-1])
    batch = broadcast(flow, [query[:-1], key[:-1], value[:-1]], shape[:-1])
    return [*batch, flow.labels.resolve(query[-1])]


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(flow: Flow, node: Node) -> list[list[Dim]]:
    """X (..., I), states (layers·directions, N, H) -> output (..., directions·H) and the states.

    A module of torch has one hidden size, so the units of all layers and directions are removed together.
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
            _bind_gates(flow, weight, state, GATES[name])
            state = flow.labels.resolve(state)
        flow.labels.unify(_read(flow, weights[start + 1]), state)
        state = flow.labels.resolve(state)
        if start // per_layer % directions == directions - 1:
            features = concat([state] * directions)
    for ref in states:
        flow.labels.unify(flow.of(ref)[-1], state)
        state = flow.labels.resolve(state)
    last = len(flow.of(given["input"])) - 1
    flow.contractions.append(
        Contraction(node.name, "recurrent", given["input"].name, last, weights[0], 1, 0, len(node.shape) - 1)
    )
    made = [*flow.of(given["input"])[:-1], concat([state] * directions)]
    return [made, *(_state(flow, ref, state, shape) for ref, shape in zip(states, node.shapes[1:], strict=True))]


def _state(flow: Flow, ref: Ref, state: Dim, shape: tuple[int, ...]) -> list[Dim]:
    """The dims of a returned state; torch 2.11 reports other dims for it than it has."""
    dims = flow.of(ref)[:-1]
    if tuple(dim.shape[1] for dim in dims) != shape[:-1]:
        dims = [constant_dim(size) for size in shape[:-1]]
    return [*dims, state]


def _read(flow: Flow, weight: str) -> Dim:
    return flow.labels.resolve(flow.dims[weight][0][1])


def _bind_gates(flow: Flow, weight: str, state: Dim, gates: int) -> None:
    """The first dim of a weight or bias holds the state once for each gate."""
    written = flow.labels.resolve(flow.dims[weight][0][0])
    gate, units = flow.labels.split(written, [gates, state.shape[1]])
    flow.labels.freeze_dim(gate)
    flow.labels.unify(units, flow.labels.resolve(state))


def _rigid(flow: Flow, node: Node) -> list[list[Dim]]:
    for name in node.inputs():
        for dims in flow.dims[name]:
            flow.freeze(dims, "a recurrent layer of this kind can't shrink")
    return [[constant_dim(size) for size in shape] for shape in node.shapes]
