"""Ints that remember where they came from, and what the code did with them."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from idap.graph.ir import Attribute, Comparison, Expression, Extent, Literal, Operation
from idap.graph.provenance import (
    RELATIONS,
    Notes,
    TracedInt,
    evaluate,
    expression_of,
    plain,
    remember_sizes,
    sources,
    strip_trace,
)
from idap.graph.trace import trace


def traced_int(value: int, name: str = "n") -> TracedInt:
    return TracedInt(value, Attribute("", name, None, value), Notes())


def test_it_is_an_int_in_every_respect() -> None:
    n = traced_int(6)
    assert n == 6 and n != 7 and n < 7 and hash(n) == 6 and {6: "x"}[n] == "x" and f"{n:03d}" == "006"
    assert [0] * n == [0] * 6 and list(range(n))[-1] == 5 and torch.zeros(n).shape == (6,)
    assert type(copy.deepcopy(n)) is TracedInt and type(pickle.loads(pickle.dumps(n))) is int


def test_arithmetic_is_remembered() -> None:
    n, m = traced_int(6), traced_int(4, "m")
    result = -(2 * n + m // 2 - 1) % 5**m
    assert isinstance(result, TracedInt) and result == -(2 * 6 + 4 // 2 - 1) % 5**4
    values: dict[Expression, int] = {n.expression: 10, m.expression: 2}

    def value_of(leaf: Expression) -> int:
        return leaf.value if isinstance(leaf, Literal) else values[leaf]

    assert evaluate(result.expression, value_of) == -(2 * 10 + 2 // 2 - 1) % 5**2
    assert {n.expression, m.expression} <= sources(result.expression)
    assert not n.notes.escaped and not m.notes.escaped


def test_an_expression_can_be_read() -> None:
    n, size = traced_int(6), Extent("linear", 1, 8)
    assert str((n * 2 + 1).expression) == "((n * 2) + 1)"
    assert str(Operation("//", (size, Attribute("blocks.0", "heads", 1, 2)), 4)) == (
        "(size 1 of linear // blocks.0.heads[1])"
    )
    assert str((-n).expression) == "-n"


@pytest.mark.parametrize(
    "use",
    [
        lambda n: n**-0.5,
        lambda n: 1 / n,
        lambda n: n / 2,
        lambda n: n * 0.5,
        math.sqrt,
        float,
        int,
        abs,
        round,
        math.floor,
        lambda n: n >> 1,
        lambda n: n & 3,
        lambda n: 64 | n,
        lambda n: divmod(n, 4),
        lambda n: [0] * n,
    ],
)
def test_what_becomes_another_number_has_escaped(use) -> None:
    n = traced_int(8)
    n.notes.module = "blocks.0"
    assert use(n) == use(8)
    assert list(n.notes.escaped) == [n.expression]
    assert list(n.notes.escaped[n.expression]) == ["blocks.0"]
    assert n.notes.escaped[n.expression]["blocks.0"].startswith("test_provenance.py:")


def test_every_module_that_computes_with_a_size_is_noted_with_its_first_place() -> None:
    n = traced_int(8)
    for module in ("a", "b", "a"):
        n.notes.module = module
        float(n)
    assert list(n.notes.escaped[n.expression]) == ["a", "b"]
    n.notes.clear()
    assert not n.notes.escaped and not n.notes.compared and n.notes.module == ""


def test_a_float_that_comes_first_is_not_seen() -> None:
    """Python's float takes any int by its value, so this is left to `verify`: see test_verify."""
    n = traced_int(8)
    assert 0.5 * n == 4.0 and not n.notes.escaped


def test_what_stays_a_size_has_not_escaped() -> None:
    n = traced_int(8)
    assert n // 2 * 3 - 1 == 11 and min(n, 9) == 8 and n in (1, 8) and f"{n}" and n > 3
    assert torch.Size([n, 2]).numel() and not n.notes.escaped


def test_compared_sizes_are_noted_with_the_line() -> None:
    n, m = traced_int(8), traced_int(8, "m")
    assert n == m and m == 8
    notes = [*n.notes.compared, *m.notes.compared]
    assert [(note.left, note.right) for note in notes] == [(n.expression, m.expression), (m.expression, Literal(8))]
    assert all(isinstance(note, Comparison) and note.source.startswith("test_provenance.py:") for note in notes)
    same = n
    assert n == same and len(n.notes.compared) == 1  # a size is always equal to itself
    assert all(n != other for other in (8.5, "8", True)) and len(n.notes.compared) == 1  # no sizes


@pytest.mark.parametrize(
    ("compare", "outcome", "symbol"),
    [
        (lambda n: n == 8, True, "=="),
        (lambda n: n == 7, False, "!="),
        (lambda n: n != 7, True, "!="),
        (lambda n: n != 8, False, "=="),
        (lambda n: n < 9, True, "<"),
        (lambda n: n < 8, False, ">="),
        (lambda n: n >= 8, True, ">="),
        (lambda n: n >= 9, False, "<"),
        (lambda n: n > 7, True, ">"),
        (lambda n: n > 8, False, "<="),
        (lambda n: n <= 8, True, "<="),
        (lambda n: n <= 7, False, ">"),
    ],
)
def test_what_a_comparison_found_is_noted_not_what_was_asked(
    compare: Callable[[int], bool], outcome: bool, symbol: str
) -> None:
    n = traced_int(8)
    n.notes.module = "blocks.0"
    assert compare(n) is outcome
    (note,) = n.notes.compared
    assert (note.left, note.symbol, note.module) == (n.expression, symbol, "blocks.0")
    assert getattr(note.left.value, RELATIONS[note.symbol])(note.right.value)  # what is noted is true


def test_a_number_on_the_left_is_compared_the_other_way_round() -> None:
    n = traced_int(8)
    assert 3 < n and not 9 <= n  # noqa: SIM300
    assert [(note.right, note.symbol) for note in n.notes.compared] == [(Literal(3), ">"), (Literal(9), "<")]


def test_plain_gives_ordinary_ints_back() -> None:
    n = traced_int(3)
    made = plain(([n, 1], {"a": slice(n, None, 2)}, torch.Size([n, n]), n))
    assert made == ([3, 1], {"a": slice(3, None, 2)}, (3, 3), 3)
    assert [type(value) for value in (made[0][0], made[1]["a"].start, made[2][0], made[3])] == [int] * 4
    assert expression_of(5) == Literal(5) and expression_of(n) == n.expression
    assert type(strip_trace(n)) is int


def test_the_ints_that_modules_hold_remember_their_place() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.flag, self.shape, self.names = 4, True, [2, 3], ["a"]

    model = nn.Sequential(Holds())
    remember_sizes(model.named_modules())
    held = model[0]
    assert held.heads.expression == Attribute("0", "heads", None, 4)
    assert [item.expression for item in held.shape] == [Attribute("0", "shape", i, i + 2) for i in range(2)]
    assert held.flag is True and held.names == ["a"] and type(held.shape) is list


class Sizes(nn.Module):
    """Uses sizes of many origins in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.table = nn.Parameter(torch.ones(6, 3))
        self.parts = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        assert x.shape[-1] == self.table.shape[0]
        x = x.view(len(x), self.parts, x.size(-1) // self.parts)
        return x.reshape(x.numel() // 3, 3) @ self.table.t().view(self.table.size(dim=1), -1)


def test_sizes_of_inputs_parameters_and_results_are_known_by_their_node() -> None:
    graph = trace(Sizes(), (torch.ones(5, 4),))
    (note,) = graph.comparisons
    assert isinstance(note.left, Extent) and isinstance(note.right, Extent)
    assert (graph.nodes[note.left.node].op, note.left.dim) == ("aten.linear.default", 1)
    assert (graph.nodes[note.right.node].target, note.right.dim) == ("table", 0)
    (reshape,) = (node for node in graph.nodes.values() if node.op == "aten.reshape.default")
    assert str(reshape.sizes[0]) == "(((size 0 of view * size 1 of view) * size 2 of view) // 3)"
    views = [node for node in graph.nodes.values() if node.op == "aten.view.default"]
    assert [str(size) for size in views[1].sizes] == ["size 1 of p_table", "-1"]
