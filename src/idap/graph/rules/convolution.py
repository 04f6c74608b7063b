"""Convolutions of any dimension, grouped and transposed."""

from idap.graph.ir import Node
from idap.graph.labels import Dim, fixed
from idap.graph.rules.flow import Contraction, Flow, arguments, rule


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
        flow.follows(node, "groups", None, flow.labels.settled(read_parts))
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
    flow.follows(node, "groups", None, flow.labels.settled(parts))
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
    spatial = [fixed(size) for size in node.shape[place + 1 :]]
    return [*flow.of(given["input"])[:place], flow.labels.settled(written), *spatial]
