"""Views and in-place operators: what a value depends on beyond what it is computed from."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from idap.graph.frames import Memory
from idap.graph.ir import Graph
from idap.graph.rules.flow import operator
from idap.graph.run import run
from idap.graph.trace import trace
from tests.nets import Net, every_net


def test_who_shares_and_who_writes() -> None:
    memory = Memory({"x": ((), ()), "view": (("x",), ()), "other": ((), ()), "add_": (("view",), ("view",))})
    assert memory.writers("x") == {"add_"} == memory.writers("view")
    assert memory.writers("other") == set()
    assert memory.owners("add_") == {"x"} and not memory.owners("view")
    assert memory.writers_before(("x",), 4) == ["add_"] and memory.writers_before(("x",), 3) == []
    assert memory.writers_before(("add_",), 4) == []


class Program(nn.Module):
    def __init__(self, body: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.body = body

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.body(x, self.fc(x))


def half_then_all(x: Tensor, y: Tensor) -> Tensor:
    part = y[:, :3]
    part.mul_(2)
    return y


def view_before_write(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    part = y[:, :3]
    y.add_(1)
    return part, y * 2


def filled(x: Tensor, y: Tensor) -> Tensor:
    made = y.new_zeros(y.shape)
    made[:, :2] = y[:, 2:4]
    made.narrow(1, 2, 2).copy_(x[:, :2])
    made[:, 4:].fill_(3)
    return made.relu_()


def unread(x: Tensor, y: Tensor) -> Tensor:
    spare = y * 2
    spare.add_(1)
    return y


def through_dropout(x: Tensor, y: Tensor) -> Tensor:
    """In eval mode dropout returns its input itself."""
    same = torch.dropout(y, 0.5, False)
    same.add_(1)
    return y


PROGRAMS = [half_then_all, view_before_write, filled, unread, through_dropout]


@pytest.mark.parametrize("body", PROGRAMS, ids=lambda body: body.__name__)
def test_the_graph_computes_what_the_model_does(body: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Program(body).eval(), torch.randn(3, 4)
    graph = trace(model, (x,))
    with torch.no_grad():
        expected = tree_leaves(model(x))
    before = x.clone()
    for mine, theirs in zip(run(graph, dict(model.named_parameters()), [x]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(x, before)


@every_net
def test_the_graph_of_every_net_computes_what_the_net_does(net: Net) -> None:
    model = net.model()
    graph = trace(model, net.args, net.kwargs)
    with torch.no_grad():
        expected = tree_leaves(model(*(arg.clone() for arg in net.args), **net.kwargs))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    found = run(graph, tensors, tree_leaves((net.args, dict(net.kwargs))))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def trace_body(body: Callable[[Tensor, Tensor], Tensor]) -> Graph:
    return trace(Program(body).eval(), (torch.randn(3, 4),))


def test_what_is_written_in_place_is_alive_and_the_rest_is_not() -> None:
    graph = trace_body(half_then_all)
    assert "mul_" in graph.ends and "mul_" in graph.live({})
    graph = trace_body(unread)
    assert "mul" not in graph.live({}) and "add_" not in graph.live({})


def test_a_tensor_made_from_sizes_carries_data_once_data_was_written_into_it() -> None:
    graph = trace_body(filled)
    assert {"new_zeros", "copy_", "relu_"} <= graph.data_nodes()
    assert "copy_" in graph.dependencies["relu_"] and "relu_" in graph.users()["copy_"]
    assert "p_fc_weight" not in graph.data_nodes()


def test_nodes_that_are_skipped_take_another_value() -> None:
    graph = trace_body(lambda x, y: (y * 2).relu() + 1)
    model = Program(lambda x, y: y)
    found = run(graph, dict(model.named_parameters()), [torch.ones(1, 4)], skip_to={"relu": "linear"})
    torch.testing.assert_close(found[0], model.fc(torch.ones(1, 4)).detach() + 1)
    assert "mul" not in graph.live({"relu": "linear"})


def test_a_graph_that_runs_lets_go_of_what_nobody_reads_any_more() -> None:
    """Otherwise a proof of a large model would hold all of its activations at once."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    graph = trace(net, (torch.ones(1, 4),))
    layers = [name for name, node in graph.nodes.items() if node.op == "aten.linear.default"]
    alive = []

    def watch(node, fetch):
        result = operator(node)(*fetch(node.args))
        alive.append((sum(reference() is not None for reference in seen), weakref.ref(result)))
        seen.append(alive[-1][1])
        return result

    seen = []
    tensors = dict(net.named_parameters())
    (found,) = run(graph, tensors, [torch.ones(1, 4)], special=dict.fromkeys(layers, watch))
    assert torch.equal(found, net(torch.ones(1, 4)))
    assert max(count for count, _ in alive) <= 2
