"""Fused attention."""

from typing import Any

from idap.graph.ir import Graph, Node
from idap.graph.labels import Dim
from idap.graph.rules.flow import Flow, Pin, arguments, base_name, broadcast, rule


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
    return [*(flow.labels.settled(dim) for dim in batch), *flow.of(given["query"])[-2:-1], flow.of(given["value"])[-1]]


def implied_scale(graph: Graph, node: Node) -> float | None:
    """The scale that an attention takes from its head width; None if it is told one, or for another operator."""
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
    return [*batch, flow.labels.settled(query[-1])]
