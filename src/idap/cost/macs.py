"""Multiply-adds of one operator from the shapes it sees: one small formula per operator.

One multiply-add is one multiplication and the addition that follows it; biases, norms, activations and pooling are
not counted, as in the papers this method is compared with.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from idap.graph.equations import read_equation
from idap.graph.ir import Node, Ref
from idap.graph.rules.flow import arguments, base_name

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


def _added_product(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    return prod(result) * shape_of(list(given.values())[1])[-1]


def _attention(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    query, key, value = (shape_of(given[name]) for name in ("query", "key", "value"))
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _tensordot(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    shape = shape_of(given["self"])
    return prod((*result, *(shape[axis] for axis in given["dims_self"])))


def _bilinear(given: Mapping[str, Any], result: Shape, shape_of: ShapeOf) -> int:
    """The weight with the second input, then with the first."""
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
    "addmm": _added_product,
    "baddbmm": _added_product,
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
        The number for the whole batch; 0 for operators that are not counted.
    """
    formula = FORMULAS.get(base_name(node.op))
    return formula(arguments(node), result, shape_of) if formula is not None else 0


def counted(node: Node) -> bool:
    """Whether the operator has a formula."""
    return base_name(node.op) in FORMULAS


def tensors_of(node: Node) -> tuple[str, ...]:
    """Names of the nodes whose shapes the operator's formula may ask for."""
    return tuple(dict.fromkeys([*node.inputs(), node.name]))


def ref_name(value: Any) -> str:
    """The name behind a tensor argument."""
    assert isinstance(value, Ref)
    return value.name
