"""Functions that torch does not check: rewritten code calls them with the checks that they lack, in every mode."""

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from idap.errors import PlanError, RewrittenModuleError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.structure.code.safeguards import SAFEGUARDED
from idap.structure.code.vocabulary import function_of_name, vocabulary
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan


class Views(nn.Module):
    """A view with a literal size, so that a cut rewrites it; it has a pooling layer to call."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read, self.pool = nn.Linear(4, 12), nn.Linear(12, 4), nn.MaxPool2d((2, 1), 1, (1, 0), (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.write(x).view(x.shape[0], 3, 4).relu().view(x.shape[0], 12))


@pytest.fixture(scope="module")
def views() -> tuple[nn.Module, dict[str, Any]]:
    model = Views().eval()
    structure = analyze(trace(model, (torch.ones(2, 4),)))
    return model, json.loads(json.dumps(structure.plan({"write": [0]}).to_json()))


def with_steps(views: tuple[nn.Module, dict[str, Any]], *steps: tuple[str, list[Any], Any]) -> nn.Module:
    """The module with other steps before its own; the result of a step has the number 50 + its place."""
    model, data = views
    data = copy.deepcopy(data)
    data["programs"][""][0]["steps"][0:0] = [
        [name, "" if "." in name else name, args, [], results if results else [[[], 50 + place]]]
        for place, (name, args, results) in enumerate(steps)
    ]
    for step in data["programs"][""][0]["steps"]:
        step[0] = "" if step[1] else step[0]
    return apply_plan(model, Plan.from_json(data))


def trace_by_jit(model: nn.Module, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, (x,))


MODES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "run": lambda model, x: model(x),
    "compiled": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "exported": lambda model, x: torch.export.export(model, (x,)),
    "traced": trace_by_jit,
}


@pytest.mark.parametrize("mode", MODES)
def test_attention_takes_as_many_keys_as_values(views: Any, mode: str) -> None:
    small = with_steps(
        views,
        ("torch.ones", [1, 2, 3, 4], None),
        ("torch.ones", [1, 2, 64, 4], None),
        ("torch.ones", [1, 2, 4000, 4], None),
        ("torch.nn.functional.scaled_dot_product_attention", [["value", 50], ["value", 51], ["value", 52]], None),
    )
    with pytest.raises(Exception, match=r"attends to 64 keys with 4000 values"):
        MODES[mode](small, torch.ones(2, 4))


@pytest.mark.parametrize("mode", MODES)
def test_windows_begin_within_what_is_pooled(views: Any, mode: str) -> None:
    small = with_steps(
        views,
        ("torch.ones", [1, 1, 2, 300], None),
        ("torch.nn.functional.max_pool2d", [["value", 50], ["tuple", 2, 1], 1, ["tuple", 1, 0], ["tuple", 3, 1]], None),
    )
    with pytest.raises(Exception, match=r"pools 2 positions with padding 1 and dilation 3"):
        MODES[mode](small, torch.ones(2, 4))


def test_a_pooling_layer_whose_windows_may_begin_outside_is_not_called(views: Any) -> None:
    with pytest.raises(PlanError, match=r"calls 'pool', .* with padding and a dilation"):
        with_steps(views, ("pool", [["value", 0]], None))


def test_pooling_within_bounds_is_that_of_torch() -> None:
    x = torch.randn(2, 3, 9, 8)
    for options in ({}, {"padding": 1}, {"dilation": 2, "padding": (1, 0)}, {"stride": 2, "ceil_mode": True}):
        found = SAFEGUARDED["torch.nn.functional.max_pool2d"](x, 3, **options)
        assert_close(found, F.max_pool2d(x, 3, **options), rtol=0, atol=0)


def test_saved_indices_that_are_changed_are_noticed(views: Any) -> None:
    """Through `.data`, autograd would not notice, and the gradient would be written wherever they point."""
    small = with_steps(
        views,
        ("torch.ones", [1, 1, 4, 4], None),
        ("torch.Tensor.sum", [["value", 0]], None),
        ("torch.Tensor.mul", [["value", 50], ["value", 51]], None),
        ("torch.nn.functional.max_pool2d_with_indices", [["value", 52], 2], [[[0], 70], [[1], 71]]),
        ("torch.Tensor.data.__get__", [["value", 71]], None),
        ("torch.Tensor.fill_", [["value", 54], 10**12], None),
        ("torch.Tensor.sum", [["value", 70]], None),
        ("torch.Tensor.add", [["value", 0], ["value", 56]], None),
        ("torch.Tensor.copy_", [["value", 0], ["value", 57]], None),
    )
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        small(x * 1.0).sum().backward()


@pytest.mark.parametrize("name", ["torch.median", "torch.Tensor.median"])
def test_the_median_of_an_expanded_tensor(name: str) -> None:
    x = torch.tensor([[0.66], [0.25]]).expand(2, 5001)
    assert_close(function_of_name(name)(x, 1)[0], torch.tensor([0.66, 0.25]), rtol=0, atol=0)
    assert_close(function_of_name(name)(x), torch.tensor(0.25), rtol=0, atol=0)
    assert_close(function_of_name("torch.median")(input=x, dim=1)[0], torch.tensor([0.66, 0.25]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["torch.div", "torch.Tensor.div", "torch.Tensor.div_"])
@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.float32])
def test_division_towards_zero(name: str, kind: torch.dtype) -> None:
    numbers = torch.arange(0 if kind == torch.uint8 else -9, 10).to(kind)
    divide = function_of_name(name)
    for other in (3, 2, *(() if kind == torch.uint8 else (-1, -4)), torch.full((1,), 5, dtype=kind)):
        found = divide(numbers.clone(), other, rounding_mode="trunc")
        assert_close(found, torch.div(numbers, other, rounding_mode="trunc"), rtol=0, atol=0)
    for mode in (None, "floor"):
        if kind.is_floating_point or (mode and name != "torch.Tensor.div_"):
            assert_close(divide(numbers.clone(), 2, rounding_mode=mode), torch.div(numbers, 2, rounding_mode=mode))


def test_the_smallest_whole_number_is_divided_by_minus_one() -> None:
    """In torch, this ends the process."""
    by_name = function_of_name("torch.div")(input=torch.tensor([-7, 7]), other=2, rounding_mode="trunc")
    assert by_name.tolist() == [-3, 3]
    smallest = torch.full((3,), -(2**31), dtype=torch.int32)
    assert function_of_name("torch.div")(smallest, -1, rounding_mode="trunc").dtype == torch.int32


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_group_norm_of_two_types_is_computed_in_that_of_its_weights(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6, dtype=kind).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    norm = function_of_name("torch.nn.functional.group_norm")
    found = norm(x, 2, weight, bias)
    found.float().square().sum().backward()
    assert found.dtype == kind
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    F.group_norm(exact[0], 2, *exact[1:]).square().sum().backward()
    for tensor, reference in zip((weight, bias), exact[1:], strict=True):
        assert_close(tensor.grad.double(), reference.grad, rtol=0.05, atol=0.5)
    assert_close(norm(x, 2).float(), F.group_norm(x.float(), 2), rtol=0.02, atol=0.02)


def test_every_safeguard_is_for_a_function_of_the_list() -> None:
    assert set(SAFEGUARDED) <= set(vocabulary())
    assert all(name in SAFEGUARDED for name in vocabulary() if "max_pool" in name and "adaptive" not in name)


def test_counting_begins_anew_where_a_module_returns_other_sizes(views: Any) -> None:
    """What was counted before the change counts as well, and does not replace what is known."""
    model, data = views
    data = copy.deepcopy(data)
    model = copy.deepcopy(model)
    model.pool = Picked()
    data["programs"][""][0]["steps"][0:0] = [
        ["torch.ones", "", [2**24], [], [[[], 50]]],
        ["", "pool", [["value", 0]], [], [[[], 51]]],
        ["torch.ones", "", [2**24], [], [[[], 52]]],
    ]
    small = apply_plan(model, Plan.from_json(data))
    ones = torch.ones(2, 4)
    small(ones)  # is counted, and known
    small(-ones)  # the same sizes, and another one on the way
    made = {id(known): known.count.elements for known in _known(small)}
    assert made and min(made.values()) > 2**25
    small.pool.factor = 2**22
    with pytest.raises(RewrittenModuleError, match="would make"):
        small(ones)


class Picked(nn.Module):
    """What it returns depends on the content of its input."""

    factor = 1

    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].repeat(self.factor)


def _known(module: nn.Module) -> list[Any]:
    """What a rewritten module remembers."""
    ways = next(cell.cell_contents for cell in type(module).forward.__closure__ if isinstance(cell.cell_contents, list))
    return [known for way in ways for known in way._known.values()]
