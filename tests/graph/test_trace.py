"""Tracing: what the graph knows, what it refuses, and that the user's model is as it was."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from idap.errors import TraceError, UnknownOperatorError
from idap.graph.ir import Attribute, Extent
from idap.graph.provenance import TracedInt
from idap.graph.rules.flow import flow_of
from idap.graph.trace import trace
from tests import nets


class Reshapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = 2
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return x.view(x.shape[0], self.parts, x.shape[1] // self.parts).sum(1)


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"odd": Odd()})
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner["odd"](x))


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.expit(torch.logcumsumexp(x, 1).renorm(2, 0, 1.0))


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_sizes_remember_where_they_came_from() -> None:
    graph = trace(Reshapes(), (torch.randn(3, 4),))
    (view,) = (node for node in graph.nodes.values() if node.op == "aten.view.default")
    batch, parts, rest = view.sizes
    assert isinstance(batch, Extent) and batch.dim == 0 and graph.nodes[batch.node].op == "aten.linear.default"
    assert parts == Attribute("", "parts", None, 2)
    assert rest.value == 3 and str(rest).endswith("// parts)")


def test_nodes_know_their_module_their_line_and_their_call() -> None:
    graph = trace(nets.VGG(), (nets.images(),))
    convolutions = [node for node in graph.nodes.values() if node.op == "aten.conv2d.default"]
    assert all(node.owner and node.call == (node.owner, "conv2d", 0) for node in convolutions)
    assert all("nets.py:" in node.source for node in convolutions)


def test_tied_tensors_have_one_canonical_name() -> None:
    graph = trace(nets.LanguageModel(), (nets.tokens(),), {"mask": torch.ones(2, 5)})
    assert graph.aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in graph.shapes


@pytest.mark.parametrize("fails", [False, True])
def test_the_users_model_is_as_it_was(fails: bool) -> None:
    model = Decides() if fails else Reshapes()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    held = dict(vars(model))
    if fails:
        with pytest.raises(TraceError):
            trace(model, (torch.randn(3, 4),))
    else:
        trace(model, (torch.randn(3, 4),))
    assert vars(model).keys() == held.keys() and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(value, TracedInt) for module in model.modules() for value in vars(module).values())
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
    gc.collect()


def test_an_operator_without_a_rule_is_named_with_module_and_line() -> None:
    graph = trace(Strange(), (torch.randn(3, 4),))
    with pytest.raises(
        UnknownOperatorError, match=r"no rule for operator aten\.\w+\.\w+ in module 'inner\.odd' \(test_trace\.py:\d+"
    ):
        flow_of(graph)
    assert flow_of(graph, freeze_unknown=True).dims


def test_inputs_that_are_no_tuple_are_refused() -> None:
    with pytest.raises(
        TraceError, match=r"must be a tuple of positional arguments, found Tensor; for one input x write \(x,\)"
    ):
        trace(nn.Linear(4, 2), torch.randn(3, 4))  # type: ignore[arg-type]


def test_inputs_that_the_model_refuses_are_shown() -> None:
    with pytest.raises(
        TraceError, match=r"Linear does not accept the example inputs \(shapes \[\(3, 5\)\]\): RuntimeError"
    ):
        trace(nn.Linear(4, 2), (torch.randn(3, 5),))


def test_a_path_that_depends_on_values_is_explained() -> None:
    with pytest.raises(TraceError, match=r"torch\.export cannot export Decides: .* depends on the values in a tensor"):
        trace(Decides(), (torch.randn(3, 4),))


class Mixed(nn.Module):
    def __init__(self, dtype: torch.dtype, *, enabled: bool, device: str = "cpu") -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.how = (device, dtype, enabled)

    def forward(self, x: Tensor) -> Tensor:
        device, dtype, enabled = self.how
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            x = self.fc(x)
        return x.float()


def test_code_that_lowers_the_precision_itself_is_named() -> None:
    with pytest.raises(
        TraceError,
        match=r"by torch\.autocast\('cpu', torch\.bfloat16\), as in test_trace\.py:\d+: x = self\.fc\(x\)\. .* "
        r"around the call of the model",
    ):
        trace(Mixed(torch.bfloat16, enabled=True), (torch.zeros(2, 4),))


@pytest.mark.parametrize(("device", "enabled"), [("cpu", False), ("cuda", True)])
def test_autocast_that_lowers_nothing_here_is_followed(device: str, enabled: bool) -> None:
    graph = trace(Mixed(torch.bfloat16, enabled=enabled, device=device), (torch.zeros(2, 4),))
    assert "aten.linear.default" in {node.op for node in graph.nodes.values()}
