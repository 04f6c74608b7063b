"""Operators that rearrange slots without computing."""

from collections.abc import Sequence

from idap.graph.ir import Node
from idap.graph.labels import Dim, concat, constant_dim
from idap.graph.rules.flow import Flow, arguments, broadcast, freeze_all, regroup, rule


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def reshape(flow: Flow, node: Node) -> list[Dim]:
    """Regroup slots in row-major order; sizes that the code passes follow the dims."""
    given = arguments(node)
    dims = regroup(flow, flow.of(given["self"]), node.shape)
    sizes = given.get("size", given.get("shape", given.get("sizes")))
    first = int(given["dim"]) % len(flow.of(given["self"])) if "sizes" in given else 0
    if sizes is not None:
        for index, size in enumerate(sizes):
            if size != -1:
                flow.follows(node, _sizes_name(given), index, dims[first + index])
    return dims


def _sizes_name(given: dict[str, object]) -> str:
    return next(name for name in ("size", "shape", "sizes") if name in given)


@rule("permute")
def permute(flow: Flow, node: Node) -> list[Dim]:
    """Put the dims in another order."""
    given = arguments(node)
    x = flow.of(given["self"])
    return [x[int(axis)] for axis in given["dims"]]


@rule("transpose", "swapaxes", "swapdims")
def transpose(flow: Flow, node: Node) -> list[Dim]:
    """Exchange two dims."""
    given = list(arguments(node).values())
    x = flow.of(given[0])
    one, other = int(given[1]), int(given[2])
    x[one], x[other] = x[other], x[one]
    return x


@rule("t", "numpy_T", "mT", "matrix_H", "adjoint")
def t(flow: Flow, node: Node) -> list[Dim]:
    """Exchange the last two dims."""
    x = flow.of(node.args[0])
    return x[::-1] if len(x) <= 2 else [*x[:-2], x[-1], x[-2]]


@rule("movedim", "moveaxis")
def movedim(flow: Flow, node: Node) -> list[Dim]:
    """Move some dims to other places."""
    given = arguments(node)
    x = flow.of(given["self"])
    sources = [int(a) % len(x) for a in _several(given["source"])]
    targets = [int(a) % len(x) for a in _several(given["destination"])]
    rest = iter([dim for axis, dim in enumerate(x) if axis not in sources])
    moved = {target: x[source] for source, target in zip(sources, targets, strict=True)}
    return [moved[axis] if axis in moved else next(rest) for axis in range(len(x))]


def _several(value: object) -> Sequence[int]:
    return value if isinstance(value, tuple | list) else (value,)


@rule("unsqueeze")
def unsqueeze(flow: Flow, node: Node) -> list[Dim]:
    """Add a dim of one slot."""
    given = arguments(node)
    x = flow.of(given["self"])
    place = int(given["dim"]) % (len(x) + 1)
    return [*x[:place], constant_dim(1), *x[place:]]


@rule("squeeze")
def squeeze(flow: Flow, node: Node) -> list[Dim]:
    """Remove dims of one slot."""
    given = arguments(node)
    x = flow.of(given["self"])
    axes = range(len(x)) if "dim" not in given else [int(axis) % len(x) for axis in _several(given["dim"])]
    return [dim for axis, dim in enumerate(x) if axis not in axes or dim.shape[1] != 1]


@rule("expand", "expand_as", "broadcast_to")
def expand(flow: Flow, node: Node) -> list[Dim]:
    """Expand dims of one slot to many equal slots, any of which may be removed."""
    given = arguments(node)
    x = flow.of(given["self"])
    lead = len(node.shape) - len(x)
    dims = [flow.labels.fresh_dim(size) for size in node.shape[:lead]]
    for dim, size in zip(x, node.shape[lead:], strict=True):
        dims.append(dim if dim.shape[1] == size else flow.labels.fresh_dim(size))
    if "other" in given:
        return broadcast(flow, [dims, flow.of(given["other"])], node.shape)
    for index, size in enumerate(given["size"]):
        if size != -1:
            flow.follows(node, "size", index, dims[index])
    return dims


@rule("repeat", "tile")
def repeat(flow: Flow, node: Node) -> list[Dim]:
    """Put copies of a tensor side by side."""
    given = arguments(node)
    x = flow.of(given["self"])
    name = "repeats" if "repeats" in given else "dims"
    repeats = [int(count) for count in given[name]]
    repeats = [1] * (len(x) - len(repeats)) + repeats  # tile may be given fewer counts than dims
    x = [constant_dim(1)] * (len(repeats) - len(x)) + x
    dims = []
    for index, (dim, count) in enumerate(zip(x, repeats, strict=True)):
        if dim.shape[1] == 1 and count > 1:
            dims.append(flow.labels.fresh_dim(count))
            flow.follows(node, name, index - (len(repeats) - len(given[name])), dims[-1])
        else:
            dims.append(concat([dim] * count))
    return dims


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, node: Node) -> list[Dim]:
    """Repeat every slot several times in a row; the dim may shrink only if one number holds for all slots."""
    given = arguments(node)
    x, repeats = flow.of(given["self"]), given["repeats"]
    if given["dim"] is None or not isinstance(repeats, int):
        return freeze_all(flow, node)[0]
    axis = int(given["dim"]) % len(x)
    x[axis] = flow.labels.merge([x[axis], constant_dim(repeats)])
    return x


@rule("meshgrid")
def meshgrid(flow: Flow, node: Node) -> list[list[Dim]]:
    """One dim from each vector; each result varies along the dim of its vector."""
    given = arguments(node)
    vectors = [flow.of(ref) for ref in given["tensors"]]
    dims = [vector[0] if vector else constant_dim(1) for vector in vectors]
    if given.get("indexing") == "xy" and len(dims) > 1:
        dims[0], dims[1] = dims[1], dims[0]
    return [list(dims) for _ in node.shapes]


@rule("select")
def select(flow: Flow, node: Node) -> list[Dim]:
    """Pick one slot, so that the dim can't shrink."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    # There is always a first and a last slot; if the result is not used, it does not matter which slot it is.
    if flow.is_used(node) or given["index"] not in (0, -1):
        flow.freeze([x[axis]], "a slot of it is picked by its place")
    axis %= len(x)
    return [flow.labels.resolve(dim) for place, dim in enumerate(x) if place != axis]


@rule("slice", "narrow")
def slice_(flow: Flow, node: Node) -> list[Dim]:
    """Take a range of slots, or every n-th slot of it."""
    given = arguments(node)
    x, axis = flow.of(given["self"]), int(given["dim"])
    axis %= len(x)
    dim = x[axis]
    if "length" in given:
        flow.freeze([dim])
        start, stop, step = int(given["start"]) % dim.shape[1], node.shape[axis], 1
        stop += start
    else:
        start, stop, step = slice(given["start"], given["end"], int(given["step"])).indices(dim.shape[1])
    if step > 1 and len(dim):
        _freeze_phase(flow, dim, step)
    dim = flow.labels.resolve(dim)
    if "length" not in given:
        _bounds_follow(flow, node, dim, given, (start, stop))
    x = flow.of(given["self"])
    x[axis] = flow.labels.resolve(dim[:, start:stop:step])
    return x


def _freeze_phase(flow: Flow, dim: Dim, step: int) -> None:
    """Let a dim lose whole periods, but no single slot of a period, if every n-th slot of it is taken."""
    if dim.shape[1] % step:
        flow.freeze([dim])
        return
    flow.freeze(flow.labels.split(dim, [dim.shape[1] // step, step])[1:])


def _bounds_follow(flow: Flow, node: Node, dim: Dim, given: dict[str, int | None], bounds: tuple[int, int]) -> None:
    size = dim.shape[1]
    for name, place in zip(("start", "end"), bounds, strict=True):
        written = given[name]
        if written is None or written == 0 or abs(written) >= size:
            continue
        if written < 0:
            flow.follows(node, name, None, flow.labels.resolve(dim[:, place:]), -1)
        else:
            flow.follows(node, name, None, flow.labels.resolve(dim[:, :place]))


@rule("pad", "constant_pad_nd")
def pad(flow: Flow, node: Node) -> list[Dim]:
    """Add slots of zeros before and after; if the dim may shrink, they may be removed and their number follows."""
    given = arguments(node)
    x, amounts = flow.of(given["self"]), [int(amount) for amount in given["pad"]]
    rigid = given.get("mode", "constant") != "constant"
    for pair in range(len(amounts) // 2):
        axis = len(x) - 1 - pair
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        if (before, after) == (0, 0):
            continue
        if rigid or min(before, after) < 0 or not len(x[axis]):
            flow.freeze([x[axis]])
            x[axis] = constant_dim(node.shape[axis])
            continue
        sides = [flow.labels.fresh(count)[None] for count in (before, after)]
        for place, side in enumerate(sides):
            flow.follows(node, "pad", 2 * pair + place, side)
        x[axis] = concat([sides[0], x[axis], sides[1]])
    return x


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, node: Node) -> list[Dim]:
    """(N, C·r², H, W) -> (N, C, rH, rW): the r² places of a channel stay together."""
    given = arguments(node)
    x, factor = flow.of(given["self"]), int(given["upscale_factor"])
    channels, inner = flow.labels.split(x[-3], [node.shape[-3], factor * factor])
    flow.freeze([inner, *x[-2:]])
    return [*x[:-3], flow.labels.resolve(channels), *(constant_dim(size) for size in node.shape[-2:])]


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, node: Node) -> list[Dim]:
    """(N, C, rH, rW) -> (N, C·r², H, W): the r² places of a channel stay together."""
    given = arguments(node)
    x, factor = flow.of(given["self"]), int(given["downscale_factor"])
    flow.freeze(x[-2:])
    channels = flow.labels.merge([x[-3], constant_dim(factor * factor)])
    return [*x[:-3], channels, *(constant_dim(size) for size in node.shape[-2:])]


@rule("channel_shuffle")
def channel_shuffle(flow: Flow, node: Node) -> list[Dim]:
    """(N, g·n, ...) -> (N, n·g, ...): the channels i of all groups are kept or removed together."""
    given = arguments(node)
    x, groups = flow.of(given["self"]), int(given["groups"])
    outer, inner = flow.labels.split(x[1], [groups, x[1].shape[1] // groups])
    flow.freeze([outer])
    return [x[0], flow.labels.merge([inner, constant_dim(groups)]), *x[2:]]
