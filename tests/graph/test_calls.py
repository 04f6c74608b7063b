"""The k-th call of a function in a module is the same place in the code, in an export and in any run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from idap.graph.calls import intercept, watch_attributes
from idap.graph.ir import CallKey, leaves
from idap.surgery.apply import apply_plan
from tests.nets import VGG, Net, TorchEncoder, by_name, every_net, images, sequence, structure_of


def calls(model: nn.Module, *args: Any, **kwargs: Any) -> list[CallKey]:
    """Every call of one forward pass."""
    return [key for key, _ in results(model, *args, **kwargs)]


def results(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[CallKey, Any]]:
    """Every call of one forward pass, with what it returned."""
    found = []

    def handle(key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        found.append((key, result))
        return result

    with torch.no_grad(), intercept(model, handle):
        model(*args, **kwargs)
    return found


def tensor_calls(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[CallKey, list[int]]]:
    """The calls that return tensors or write into them, with the numbers of dimensions; no reads of shapes."""
    made = [
        (key, [x.dim() for x in leaves(result) if isinstance(x, Tensor)])
        for key, result in results(model, *args, **kwargs)
    ]
    return [(key, dims) for key, dims in made if dims or key[1] == "__setitem__"]


def is_clean() -> bool:
    hooks = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    modes = torch._C._len_torch_function_stack()
    return not hooks and not modes and "__getattribute__" not in vars(nn.Module)


@every_net
def test_an_ordinary_run_makes_the_calls_of_the_export(net: Net) -> None:
    traced = [node.call for node in structure_of(net.name).graph.nodes.values() if node.call is not None]
    model = net.model()
    made = calls(model, *net.args, **net.kwargs)
    assert len(set(made)) == len(made)
    assert set(traced) <= set(made)
    order = {key: place for place, key in enumerate(made)}
    assert sorted(traced, key=order.__getitem__) == traced
    assert calls(model, *net.args, **net.kwargs) == made  # a second run counts anew
    assert is_clean()


@every_net
def test_the_batch_size_does_not_matter(net: Net) -> None:
    model = net.model()
    wide = tuple(torch.cat([arg, arg[:1]]) for arg in net.args)
    kwargs = {name: torch.cat([arg, arg[:1]]) for name, arg in net.kwargs.items()}
    assert calls(model, *wide, **kwargs) == calls(model, *net.args, **net.kwargs)


def parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


@every_net
def test_a_cut_model_makes_the_same_calls(net: Net) -> None:
    structure, model = structure_of(net.name), net.model()
    plan = structure.plan({group.name: [0] for group in structure.groups})
    small = apply_plan(model, plan)
    # Code that is written anew reads fewer shapes, or reads them elsewhere. What makes tensors is the same call.
    assert tensor_calls(small, *net.args, **net.kwargs) == tensor_calls(model, *net.args, **net.kwargs)
    mine, theirs = calls(small, *net.args, **net.kwargs), calls(model, *net.args, **net.kwargs)
    # Those that hold rewritten modules may be told to leave a fused kernel alone, and then read fewer shapes, too.
    touched = {above for path in plan.programs for above in (path, *parents(path))}
    assert [key for key in mine if key[0] not in touched] == [key for key in theirs if key[0] not in touched]
    assert net.swap == bool(plan.programs)


@every_net
def test_what_stays_keeps_its_calls_when_blocks_go(net: Net) -> None:
    structure, model = structure_of(net.name), net.model()
    before = calls(model, *net.args, **net.kwargs)
    for block in structure.blocks:
        plan = structure.plan({}, [block.name])
        left = set(calls(apply_plan(model, plan), *net.args, **net.kwargs))
        stand_ins = {(path, "zeros_like", 0) for path, kind in plan.replaced.items() if kind == "zero"}
        assert left - stand_ins == {key for key in before if not plan.removes(key[0])}


def test_keys_name_module_function_and_place() -> None:
    found = calls(VGG().eval(), images())
    assert ("features.0", "conv2d", 0) in found and ("features.3", "max_pool2d", 0) in found
    assert ("", "flatten", 0) in found


def test_a_module_that_runs_twice_counts_on() -> None:
    model = by_name["shared"].model()
    places = [key for key in calls(model, sequence(4)) if key[0] == "twice"]
    assert places == [("twice", "linear", 0), ("twice", "linear", 1)]


def test_a_module_with_two_names_has_the_first_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [key for key in calls(model, sequence(4)) if key[1] == "linear"] == [("0", "linear", 0), ("0", "linear", 1)]


def test_the_fast_path_of_torch_is_not_taken() -> None:
    """It would be one opaque call in place of those that the export knows."""
    names = {key[1] for key in calls(TorchEncoder().eval(), sequence(4))}
    assert "scaled_dot_product_attention" in names and "_transformer_encoder_layer_fwd" not in names


def test_the_steps_of_an_attention_count_one_by_one() -> None:
    """`F.multi_head_attention_forward` is Python code: its calls are those of the module, and it leaves no trace."""
    before = F.multi_head_attention_forward
    model = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    found = calls(model, *3 * [sequence(4)], need_weights=False)
    assert ("", "linear", 0) in found and ("", "scaled_dot_product_attention", 0) in found
    assert all(key[1] != "multi_head_attention_forward" for key in found)
    assert F.multi_head_attention_forward is before and is_clean()


class Foreign(nn.Module):
    """A model that calls a module which is not one of its own, and one that fails and is caught."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bad = Bad()
        self.held = [nn.Linear(4, 4)]
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.held[0](self.fc(x)))
        if self.fails:
            try:
                x = self.bad(x)
            except ValueError:
                x = torch.sin(x)
        return torch.cos(x)


class Bad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.exp(x)
        raise ValueError("no")


def test_a_module_from_elsewhere_counts_as_its_caller() -> None:
    assert calls(Foreign(), sequence(4)) == [
        *(("fc", "linear", 0), ("", "linear", 0), ("", "tanh", 0), ("", "cos", 0)),
    ]


def test_a_module_that_fails_leaves_the_stack_in_order() -> None:
    assert calls(Foreign(fails=True), sequence(4))[-3:] == [("bad", "exp", 0), ("", "sin", 0), ("", "cos", 0)]


def test_what_is_not_the_models_code_is_not_seen() -> None:
    model, found = nn.Linear(4, 4), []
    with intercept(model, lambda key, func, args, kwargs: found.append(key) or func(*args, **kwargs)):
        x = torch.ones(2, 4) * 2
        loss = nn.MSELoss()(model(x), x) + F.l1_loss(x, x)
    assert found == [("", "linear", 0)] and loss.requires_grad


def test_a_model_within_another_is_followed_alone() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    outer, found = nn.Sequential(nn.Linear(4, 4), inner, nn.Tanh()), []
    with intercept(inner, lambda key, func, args, kwargs: found.append(key) or func(*args, **kwargs)):
        outer(torch.ones(2, 4))
    assert found == [("0", "linear", 0), ("1", "relu", 0)]


def test_the_handler_decides_what_a_call_returns() -> None:
    def handle(key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs) * 0 if key == ("0", "linear", 0) else func(*args, **kwargs)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with intercept(model, handle):
        assert torch.equal(model(torch.ones(1, 4))[0], model[1].bias)


def test_nothing_is_left_after_an_exception() -> None:
    with pytest.raises(ValueError, match="no"):
        calls(nn.Sequential(nn.Linear(4, 4), Bad()), sequence(4))
    assert is_clean()
    with pytest.raises(ValueError, match="no"), watch_attributes(nn.Sequential(Bad())) as _:
        nn.Sequential(Bad())(sequence(4))
    assert is_clean()


def test_attributes_that_other_modules_read() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            if self.blocks[0].out_features == 4 and self.norm.training is not None and len(self.blocks) == 2:
                x = F.linear(x, self.blocks[1].weight)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    model = Reads()
    with torch.no_grad(), watch_attributes(model) as found:
        model(sequence(4))
    assert found == {"blocks.0": {""}, "blocks.1": {""}}
    assert is_clean()
