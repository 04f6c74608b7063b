"""Pooling and interpolation: they act on the spatial dimensions only."""

from idap.graph.ir import Node
from idap.graph.labels import Dim, fixed
from idap.graph.rules.flow import Flow, arguments, rule


def _spatial(flow: Flow, node: Node, count: int) -> list[list[Dim]]:
    x = flow.of(next(iter(arguments(node).values())))
    flow.freeze(x[-count:], "it is pooled or resized")
    return [[*x[:-count], *(fixed(size) for size in shape[-count:])] for shape in node.shapes]


@rule("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "upsample_nearest1d",
      "upsample_linear1d", "max_pool1d_with_indices")  # fmt: skip
def pool1d(flow: Flow, node: Node) -> list[list[Dim]]:
    """The last dimension."""
    return _spatial(flow, node, 1)


@rule("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
      "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "grid_sampler",
      "reflection_pad2d", "replication_pad2d", "_upsample_nearest_exact2d", "_upsample_bicubic2d_aa",
      "_upsample_bilinear2d_aa")  # fmt: skip
def pool2d(flow: Flow, node: Node) -> list[list[Dim]]:
    """The last two dimensions."""
    return _spatial(flow, node, 2)


@rule("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d", "upsample_nearest3d",
      "max_pool3d_with_indices",
      "upsample_trilinear3d")  # fmt: skip
def pool3d(flow: Flow, node: Node) -> list[list[Dim]]:
    """The last three dimensions."""
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
    return [*(flow.labels.settled(dim) for dim in x[:-count]), *(fixed(size) for size in node.shape[-count:])]


@rule("im2col")
def im2col(flow: Flow, node: Node) -> list[Dim]:
    """(N, C, H, W) -> (N, C·kernel, places): the slots of a channel stay together."""
    x = flow.of(node.args[0])
    flow.freeze(x[-2:], "patches are taken from it")
    inner = node.shape[-2] // x[-3].shape[1]
    return [*x[:-3], flow.labels.merge([x[-3], fixed(inner)]), fixed(node.shape[-1])]


@rule("col2im")
def col2im(flow: Flow, node: Node) -> list[Dim]:
    """(N, C·kernel, places) -> (N, C, H, W): the slots of a channel stay together."""
    x = flow.of(node.args[0])
    channels, inner = flow.labels.split(x[-2], [node.shape[-3], x[-2].shape[1] // node.shape[-3]])
    flow.freeze([inner, x[-1]], "it is put together from patches")
    return [*x[:-2], flow.labels.settled(channels), *(fixed(size) for size in node.shape[-2:])]
