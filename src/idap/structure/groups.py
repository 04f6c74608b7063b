"""Form groups from labels: every tensor treats the units of a group alike, and each may be removed on its own."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from idap.graph.ir import Graph
from idap.graph.labels import Dim
from idap.graph.rules import Flow
from idap.structure.layout import Layout


@dataclass(frozen=True)
class Port:
    """A place where the units of a group are written or read by weights.

    Attributes:
        contraction: index into the layout's contractions.
        node: the operator.
        weight: canonical name of its weight, "" if the weight is computed.
    """

    contraction: int
    node: str
    weight: str


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one; all slots of one unit are removed together.

    Attributes:
        index: position in the structure.
        name: path of the module whose tensor is the first to hold the units; the kind is appended, unless the units are
            channels or neurons.
        kind: "channels", "neurons", "heads" or "head width".
        size: number of units.
        members: (canonical tensor name, dimension) that shrink with the group, in the order in which they are read.
        writers: contractions that write the units.
        readers: contractions that read the units.
        crosses: nodes that compute a norm, softmax or reduction over the units.
    """

    index: int
    name: str
    kind: str
    size: int
    members: tuple[tuple[str, int], ...]
    writers: tuple[Port, ...]
    readers: tuple[Port, ...]
    crosses: tuple[str, ...]


@dataclass(frozen=True)
class Blocked:
    """Slots of a dimension of a weight that can't be removed, and why.

    Attributes:
        tensor: canonical name of the weight.
        dim: the dimension.
        size: number of slots that can't be removed; often all.
        reason: the reason for the first of them.
    """

    tensor: str
    dim: int
    size: int
    reason: str


def build_groups(flow: Flow) -> tuple[tuple[Group, ...], Layout]:
    """Group the labels of a walked graph.

    Returns:
        The groups in the order of the network, and the layout of their units.
    """
    dims, tensors = _final_dims(flow)
    group_of, unit_of, count = _assign(flow, tensors)
    layout = Layout(
        dims,
        tensors,
        group_of,
        unit_of,
        tuple(flow.sizes),
        tuple(flow.contractions),
        dict(flow.crossings),
        dict(flow.escaped),
        tuple(flow.pins),
    )
    return _describe(flow, layout, count), layout


def blocked_dims(flow: Flow, layout: Layout) -> tuple[Blocked, ...]:
    """The slots that weights write and read and that belong to no group, with reasons."""
    alone = "its weights are read by no other operator"
    weights: list[tuple[str, Sequence[int], str]] = [
        (use.weight, (use.write_dim, use.read_dim), alone) for use in layout.contractions
    ]
    weights += [(name, range(len(flow.graph.nodes[name].shape)), way) for name, way in flow.products]
    found: dict[tuple[str, int], Blocked] = {}
    for name, dims, otherwise in weights:
        node = flow.graph.nodes[name]
        if node.op != "parameter":
            continue
        for dim in dims:
            final, original = layout.tensors[node.target][dim], flow.dims[node.name][0][dim]
            stuck = ~(layout.group_of[final] >= 0).any(axis=0)
            if node.shape[dim] > 1 and stuck.any():
                reason = flow.labels.reason(original[:, stuck].ravel()) or otherwise
                found[node.target, dim] = Blocked(node.target, dim, int(stuck.sum()), reason)
    return tuple(found.values())


def by_reason(blocked: Iterable[Blocked]) -> dict[str, list[Blocked]]:
    """Reason -> the dimensions that can't shrink for it."""
    found: dict[str, list[Blocked]] = {}
    for item in blocked:
        found.setdefault(item.reason, []).append(item)
    return found


def obstacles(blocked: Iterable[Blocked], most: int = 8) -> list[str]:
    """Why dimensions can't shrink: one line for each of the `most` reasons that hold most dimensions."""
    held = sorted(by_reason(blocked).values(), key=len, reverse=True)
    return [
        f"{first.tensor}, dimension {first.dim}{f' and {len(others)} more' if others else ''}: {first.reason}"
        for first, *others in held[:most]
    ]


def _final_dims(flow: Flow) -> tuple[dict[str, tuple[tuple[Dim, ...], ...]], dict[str, tuple[Dim, ...]]]:
    """Resolve every dim until no label fills a whole dimension any more."""
    flow.labels.because("removing it would leave nothing of a dimension")
    while True:
        final: dict[int, Dim] = {}  # many nodes pass on the dims of others
        for nested in flow.dims.values():
            for tensor in nested:
                for dim in tensor:
                    if id(dim) not in final:
                        final[id(dim)] = flow.labels.resolve(dim)
        filling = [label for dim in final.values() for label in _common_labels(dim)]
        if not filling:
            break
        flow.labels.freeze(np.array(filling))
    dims = {
        name: tuple(tuple(final[id(dim)] for dim in tensor) for tensor in nested) for name, nested in flow.dims.items()
    }
    flow.sizes = [replace(use, dim=flow.labels.resolve(use.dim)) for use in flow.sizes]
    flow.pins = [replace(pin, dim=flow.labels.resolve(pin.dim)) for pin in flow.pins]
    tensors = {
        node.target: dims[node.name][0] for node in flow.graph.nodes.values() if node.op in ("parameter", "buffer")
    }
    return dims, {name: tensors[name] for name in _in_order_of_use(flow, tensors)}


def _common_labels(dim: Dim) -> list[int]:
    """Labels that every slot of a dim depends on, even if they stand in different rows."""
    if len(dim) < 2:
        return []
    labels, counts = np.unique(dim, return_counts=True)
    return [int(label) for label, times in zip(labels, counts, strict=True) if label and times >= dim.shape[1]]


def _assign(flow: Flow, tensors: Mapping[str, Sequence[Dim]]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Give each label a group (labels with the same places everywhere) and a unit number.

    The places are those in tensors and those in the dims that an int of the code counts. A group lies either entirely
    in the part that a slice takes or a padding adds, or entirely outside it, so no cut of the group can empty that part
    or the rest.
    """
    rank = _ranks(flow, tensors)
    signature = np.zeros(len(rank), dtype=np.uint64)
    random = np.random.default_rng(0)
    for dim in [*(dim for dims in tensors.values() for dim in dims), *(use.dim for use in flow.sizes)]:
        for row in dim:
            # A key per row: heads and the channels within them lie in the same slots, but in different rows.
            np.add.at(signature, row, random.integers(1, 2**63, dtype=np.uint64))
    used = _weight_labels(flow, len(rank))
    labels = np.flatnonzero((rank >= 0) & used)
    labels = labels[np.argsort(rank[labels])]
    group_of = np.full(len(rank), -1, dtype=np.int64)
    unit_of = np.zeros(len(rank), dtype=np.int64)
    _, first, inverse = np.unique(signature[labels], return_index=True, return_inverse=True)
    numbers = np.argsort(np.argsort(first))[inverse]  # groups in the order in which they first occur
    for number in range(len(first)):
        mine = labels[numbers == number]
        group_of[mine], unit_of[mine] = number, np.arange(len(mine))
    return group_of, unit_of, len(first)


def _ranks(flow: Flow, tensors: Mapping[str, Sequence[Dim]]) -> NDArray[np.int64]:
    """For each label, its place in the order in which tensors are read, -1 if it is in none; shape (labels,)."""
    rank = np.full(len(flow.labels), -1, dtype=np.int64)
    order = 0
    for dims in tensors.values():
        for dim in dims:
            for row in dim:
                fresh = row[(rank[row] < 0) & (row > 0)]
                _, first = np.unique(fresh, return_index=True)
                ordered = fresh[np.sort(first)]
                rank[ordered] = order + np.arange(len(ordered))
                order += len(ordered)
    return rank


def _in_order_of_use(flow: Flow, tensors: Collection[str]) -> list[str]:
    """Tensor names in the order in which the operators read them."""
    order: dict[str, None] = {}
    for node in flow.graph.nodes.values():
        for name in node.inputs():
            if flow.graph.nodes[name].target in tensors:
                order.setdefault(flow.graph.nodes[name].target)
    return list(order | dict.fromkeys(tensors))


def _weight_labels(flow: Flow, labels: int) -> NDArray[np.bool_]:
    """Labels that a weight writes or reads; the others are tables and tokens without cost. Shape (labels,)."""
    used = np.zeros(labels, dtype=bool)
    for contraction in flow.contractions:
        for dim in (contraction.write_dim, contraction.read_dim):
            used[flow.labels.resolve(flow.dims[contraction.weight][0][dim])] = True
        used[flow.labels.resolve(flow.dims[contraction.input][0][contraction.input_dim])] = True
    return used


def _describe(flow: Flow, layout: Layout, count: int) -> tuple[Group, ...]:
    members: list[list[tuple[str, int]]] = [[] for _ in range(count)]
    for name, dims in layout.tensors.items():
        for place, dim in enumerate(dims):
            for group in layout.groups_in(dim):
                members[group].append((name, place))
    writers: list[list[Port]] = [[] for _ in range(count)]
    readers: list[list[Port]] = [[] for _ in range(count)]
    for index, contraction in enumerate(layout.contractions):
        port = Port(index, contraction.node, flow.graph.nodes[contraction.weight].target)
        for group in layout.groups_in(layout.dims[contraction.weight][0][contraction.write_dim]):
            writers[group].append(port)
        for group in layout.groups_in(layout.dims[contraction.weight][0][contraction.read_dim]):
            readers[group].append(port)
    crosses = _crossings(flow.graph, layout, count)
    roles = _roles(flow, layout)
    names: dict[str, int] = {}
    groups = []
    for index in range(count):
        kind = roles.get(index) or _kind(layout, writers[index])
        name = _name(members[index], kind)
        names[name] = names.get(name, 0) + 1
        groups.append(
            Group(
                index,
                name if names[name] == 1 else f"{name}#{names[name]}",
                kind,
                int((layout.group_of == index).sum()),
                tuple(members[index]),
                tuple(writers[index]),
                tuple(readers[index]),
                tuple(crosses[index]),
            )
        )
    return tuple(groups)


def _crossings(graph: Graph, layout: Layout, count: int) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(count)]
    for name, kind in layout.crossings.items():
        if kind == "contraction":
            continue
        node = graph.nodes[name]
        lost = {group for used in node.inputs() for dim in layout.dims[used][0] for group in layout.groups_in(dim)}
        for group in lost:
            found[group].append(name)
    return found


def _roles(flow: Flow, layout: Layout) -> dict[int, str]:
    found: dict[int, str] = {}
    for kind, dim in sorted(flow.roles, key=lambda role: role[0] == "heads"):
        for group in layout.groups_in(flow.labels.resolve(dim)):
            found[group] = kind
    return found


def _kind(layout: Layout, writers: Sequence[Port]) -> str:
    kinds = {layout.contractions[port.contraction].kind for port in writers}
    return "channels" if "conv" in kinds or not kinds else "neurons"


def _name(members: Sequence[tuple[str, int]], kind: str) -> str:
    """The module that holds the first tensor; the kind is appended, unless the units are channels or neurons."""
    name = members[0][0].rpartition(".")[0] or members[0][0]
    return name if kind in ("channels", "neurons") else f"{name}:{kind.replace(' ', '-')}"


_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=[.:#]|$)")


def alike_groups(groups: Iterable[Group], how: Literal["none", "layers", "model"]) -> tuple[tuple[str, ...], ...]:
    """Find the groups that are to end with the same number of units: groups of the same kind and size.

    Args:
        groups: the groups of the original.
        how: "layers" also requires that they lie at the same place of repeated layers, so that their names differ only
            in the numbers of a path; "model" does not require this; "none" lets every group have its own number.

    Returns:
        The names of each class of two groups or more.

    Example:
        >>> names = ["enc.0.fc", "enc.1.fc", "dec.0.fc"]
        >>> groups = [Group(i, name, "neurons", 8, (), (), (), ()) for i, name in enumerate(names)]
        >>> alike_groups(groups, "layers"), alike_groups(groups, "model")
        ((('enc.0.fc', 'enc.1.fc'),), (('enc.0.fc', 'enc.1.fc', 'dec.0.fc'),))
    """
    if how == "none":
        return ()
    found: dict[tuple[str, int, str], list[str]] = {}
    for group in groups:
        # Two groups of one module, such as heads that share keys and the queries of each, have their own numbers.
        place = _NUMBER.sub("*", group.name) if how == "layers" else group.name.partition("#")[2]
        found.setdefault((group.kind, group.size, place), []).append(group.name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)
