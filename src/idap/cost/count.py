"""Count multiply-adds, parameters and bytes of a model under any plan without building it: one formula per operator."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import Tensor, nn

from idap.graph.ir import Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.graph.rules.linear import read_equation
from idap.structure.analysis import Structure
from idap.structure.blocks import Block
from idap.structure.groups import Group
from idap.structure.layout import Presence, count
from idap.structure.replacement import Kept

Shape = tuple[int, ...]
ShapeOf = Callable[[Any], Shape]
Formula = Callable[[Mapping[str, Any], Shape, ShapeOf], int]


def _linear(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    return prod(result) * shape_of(given["weight"])[1]


def _conv(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    return prod(result) * prod(shape_of(given["weight"])[1:])


def _conv_transpose(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    return prod(shape_of(given["input"])) * prod(shape_of(given["weight"])[1:])


def _product(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    return prod(result) * shape_of(next(iter(given.values())))[-1]


def _addmm(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    return prod(result) * shape_of(list(given.values())[1])[-1]


def _attention(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    query, key, value = (shape_of(given[name]) for name in ("query", "key", "value"))
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _tensordot(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    shape = shape_of(given["self"])
    return prod((*result, *(shape[axis] for axis in given["dims_self"])))


def _bilinear(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    """Contract the weight with the second input, then with the first."""
    width, left, right = shape_of(given["weight"])
    return prod(result[:-1]) * width * left * (right + 1)


def _recurrent(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    steps = prod(shape_of(given["input"])[:-1])
    return steps * sum(prod(shape_of(ref)) for ref in given["params"] if len(shape_of(ref)) == 2)


def _einsum(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    shapes = [shape_of(ref) for ref in given["tensors"]]
    if len(shapes) < 2:
        return 0
    sizes: dict[str, int] = {}
    for letters, shape in zip(read_equation(given["equation"], list(map(len, shapes))).terms, shapes, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return prod(sizes.values())


FORMULAS: Mapping[str, Formula] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "conv_transpose1d": _conv_transpose,
    "conv_transpose2d": _conv_transpose,
    "conv_transpose3d": _conv_transpose,
    "matmul": _product,
    "mm": _product,
    "bmm": _product,
    "mv": _product,
    "dot": _product,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "bilinear": _bilinear,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
}


def macs_of(node: Node, result: Shape, shape_of: ShapeOf) -> int:
    """Multiply-adds of one operator.

    Args:
        node: the operator.
        result: shape of its result.
        shape_of: gives the shape of a tensor argument.

    Returns:
        The number for the whole batch; 0 for operators without a formula.
    """
    formula = FORMULAS.get(base_name(node.op))
    return formula(arguments(node), result, shape_of) if formula is not None else 0


def has_formula(node: Node) -> bool:
    """Whether the operator has a formula."""
    return base_name(node.op) in FORMULAS


def tensors_of(node: Node) -> tuple[str, ...]:
    """Names of the nodes whose shapes the operator's formula may need."""
    return tuple(dict.fromkeys([*node.inputs(), node.name]))


def ref_name(value: Any) -> str:
    """Name of the node behind a tensor argument."""
    assert isinstance(value, Ref)
    return value.name


Keep = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Cost:
    """Cost of one sample.

    Attributes:
        macs: multiply-adds for one sample.
        parameters: number of parameters, trainable or not, without buffers.
        size: bytes of all tensors in the saved file; 0 if the cost model was built without `saved`.
    """

    macs: int
    parameters: int
    size: int = 0


class CostModel:
    """Costs of one model under any plan; the work that does not depend on the plan is done once.

    Args:
        structure: structure of the model.
        batch: number of samples in the traced example; costs are per sample.
        saved: bytes of each tensor in the saved file, from `tensor_bytes`; None: sizes are 0.
    """

    def __init__(self, structure: Structure, batch: int, saved: Mapping[str, int] | None = None) -> None:
        self._structure = structure
        self._batch = batch
        self._given = saved or {}
        self._others: dict[tuple[str, ...], CostModel] = {}
        known = {name: max(1, prod(structure.graph.shapes[name])) for name in structure.layout.tensors}
        self._saved = {name: count // known[name] for name, count in (saved or {}).items() if name in known}
        self._unseen = {name: count for name, count in (saved or {}).items() if name not in known}
        graph = structure.graph
        self._nodes = [node for node in graph.nodes.values() if has_formula(node)]
        self._parameters = {node.target for node in graph.nodes.values() if node.op == "parameter"}
        self._touched: dict[int, list[Node]] = {group.index: [] for group in structure.groups}
        for node in self._nodes:
            for index in self._groups_of(node):
                self._touched[index].append(node)

    def cost(self, keep: Keep | None = None, removed: Sequence[str] = ()) -> Cost:
        """Cost of the model if groups keep only some units and some blocks are removed, with their projections."""
        return self._after(removed)._cost(keep, removed)

    def _cost(self, keep: Keep | None, removed: Sequence[str]) -> Cost:
        present, gone = self._structure.presence(keep or {}), self._dead_nodes(removed)
        macs = sum(self._macs(node, present) for node in self._nodes if node.name not in gone)
        held = self._parameters_left(removed)
        elements = {name: prod(self._tensor_shape(name, present)) for name in held | self._saved.keys()}
        parameters = sum(elements[name] for name in held)
        vanishes = self._removal_test(removed)
        size = sum(elements[name] * width for name, width in self._saved.items() if not vanishes(name))
        size += sum(count for name, count in self._unseen.items() if not vanishes(name))
        return Cost(macs // self._batch, parameters, size)

    def unit_macs(self, keep: Keep | None = None, removed: Sequence[str] = ()) -> dict[str, float]:
        """Multiply-adds per sample that the removal of the next unit of each group would save."""
        return self._after(removed)._unit_macs(keep, removed)

    def _unit_macs(self, keep: Keep | None, removed: Sequence[str]) -> dict[str, float]:
        structure, keep = self._structure, keep or {}
        present, gone = structure.presence(keep), self._dead_nodes(removed)
        found = {}
        for group in structure.groups:
            fewer = self._without_last(present, group, keep)
            nodes = [node for node in self._touched[group.index] if node.name not in gone]
            saved = sum(self._macs(node, present) - self._macs(node, fewer) for node in nodes)
            found[group.name] = saved / self._batch
        return found

    def unit_parameters(self, keep: Keep | None = None, removed: Sequence[str] = ()) -> dict[str, float]:
        """Parameters that the removal of the next unit of each group would save."""
        return self._after(removed)._unit_parameters(keep, removed)

    def _unit_parameters(self, keep: Keep | None, removed: Sequence[str]) -> dict[str, float]:
        structure, keep = self._structure, keep or {}
        present, held = structure.presence(keep), self._parameters_left(removed)
        found = {}
        for group in structure.groups:
            fewer = self._without_last(present, group, keep)
            tensors = {name for name, _ in group.members} & held
            found[group.name] = float(
                sum(prod(self._tensor_shape(n, present)) - prod(self._tensor_shape(n, fewer)) for n in tensors)
            )
        return found

    def block_macs(self, name: str, keep: Keep | None = None, removed: Sequence[str] = ()) -> int:
        """Multiply-adds per sample that removing a branch or block would save, minus those of its projection."""
        return self.cost(keep, removed).macs - self.cost(keep, [*removed, name]).macs

    def _after(self, removed: Sequence[str]) -> "CostModel":
        """The cost model of the structure with projections in place of the removed blocks that become projections."""
        structure = self._structure.after(removed)
        if structure is self._structure:
            return self
        if structure.standing not in self._others:
            new = {
                n: kept.shape
                for block in map(structure.block, structure.standing)
                for n, kept in _projection_tensors(block)
            }
            saved = {**self._given, **{name: prod(shape) * self._width(name) for name, shape in new.items()}}
            self._others[structure.standing] = CostModel(structure, self._batch, saved if self._given else None)
        return self._others[structure.standing]

    def _width(self, name: str) -> int:
        """Bytes of one number of a projection: as many as in the block that it replaces."""
        path = name.rpartition(".")[0].rpartition(".")[0]
        return next((w for n, w in self._saved.items() if n in self._parameters and n.startswith(f"{path}.")), 4)

    def _without_last(self, present: Presence, group: Group, keep: Keep) -> Presence:
        unit = keep.get(group.name, range(group.size))[-1]
        layout = self._structure.layout
        fewer: Presence = present & ~((layout.group_of == group.index) & (layout.unit_of == unit))
        return fewer

    def _dead_nodes(self, removed: Sequence[str]) -> set[str]:
        """Names of the nodes that are no longer computed."""
        return self._structure.dead_nodes(removed) | set(self._structure.skips(removed))

    def _parameters_left(self, removed: Sequence[str]) -> set[str]:
        """Names of the parameters that are left, used or not; a removed module shares none with others."""
        vanishes = self._removal_test(removed)
        return {name for name in self._parameters if not vanishes(name)}

    def _removal_test(self, removed: Sequence[str]) -> Callable[[str], bool]:
        """A function that says of the name of a tensor whether it is removed with these blocks."""
        blocks = [self._structure.block(name) for name in removed]
        paths = tuple(f"{path}." for block in blocks for path in block.replaced)
        made = {name for block in blocks for name, _ in _projection_tensors(block)}
        return lambda name: name.startswith(paths) and name not in made

    def _groups_of(self, node: Node) -> set[int]:
        layout = self._structure.layout
        return {
            group
            for name in tensors_of(node)
            for dims in layout.dims[name]
            for dim in dims
            for group in layout.groups_in(dim)
        }

    def _macs(self, node: Node, present: Presence) -> int:
        layout = self._structure.layout

        def shape_of(value: Any) -> tuple[int, ...]:
            return tuple(count(dim, present) for dim in layout.dims[ref_name(value)][0])

        return macs_of(node, tuple(count(dim, present) for dim in layout.dims[node.name][0]), shape_of)

    def _tensor_shape(self, name: str, present: Presence) -> tuple[int, ...]:
        return tuple(count(dim, present) for dim in self._structure.layout.tensors[name])


def _projection_tensors(block: Block) -> Iterable[tuple[str, Kept]]:
    """Names and shapes of the tensors of the projection that replaces a block."""
    return block.projected.tensors(block.name).items() if block.projected is not None else ()


def tensor_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each tensor in the saved file of a model; tied tensors count once, under their first name."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) == name:
            found[name] = tensor.numel() * tensor.element_size()
    return found


def count_macs(structure: Structure, *, batch: int = 1) -> int:
    """Count the multiply-adds of the traced model for one sample.

    Args:
        structure: structure of the model, from `analyze`.
        batch: number of samples in the traced example.
    """
    return CostModel(structure, batch).cost().macs


def count_parameters(structure: Structure) -> int:
    """Count the parameters of the traced model; tied parameters count once."""
    names = {node.target for node in structure.graph.nodes.values() if node.op == "parameter"}
    return int(sum(np.prod(structure.graph.shapes[name], dtype=np.int64) for name in names))
