"""What the code of a plan may ask of memory: counted before it is made, for each size of the inputs once."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from idap.errors import RewrittenModuleError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery import allowance
from idap.surgery.allowance import LARGEST_SIZE, Allowance, calculate
from idap.surgery.apply import apply_plan

HUGE = 2**40


class More(nn.Module):
    """Of the user's own: what it makes is more than what it gets, and not the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("times", torch.tensor(1), persistent=False)
        self.factor = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], self.factor, device="meta")


class Plain(nn.Module):
    """Its code can't follow a cut, so it is rewritten: a call, a view, a calculation, a call."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read, self.more = nn.Linear(4, 12), nn.Linear(12, 3), More()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.write(x).view(x.shape[0], 3, 4).relu()
        return self.read(hidden.view(x.shape[0], 12))


@pytest.fixture(scope="module")
def written() -> tuple[nn.Module, dict[str, Any]]:
    model = Plain().eval()
    plan = analyze(trace(model, (torch.ones(2, 4),))).plan({"write": [0]})
    return model, json.loads(json.dumps(plan.to_json()))


def with_step(written: tuple[nn.Module, dict[str, Any]], *steps: list[Any]) -> nn.Module:
    """The model with other steps behind its first one; what they make is not used."""
    model, data = written
    data = copy.deepcopy(data)
    data["programs"][""][0]["steps"][1:1] = [
        [name, "" if name else "more", args, kwargs, [[[], n + 50]]] for n, (name, args, kwargs) in enumerate(steps)
    ]
    return apply_plan(model, Plan.from_json(data))


X = ["value", 0]
BOMBS: dict[str, list[list[Any]]] = {
    "zeros": [["torch.zeros", [HUGE], []]],
    "ones by two": [["torch.ones", [["tuple", 2**20, 2**20]], []]],
    "range": [["torch.arange", [HUGE], [["device", ["device"]]]]],
    "repeat": [["torch.Tensor.repeat", [X, HUGE, 1], []]],
    "padding": [["torch.nn.functional.pad", [X, ["tuple", 0, HUGE]], []]],
    "interpolation": [
        ["torch.Tensor.unsqueeze", [X, 0], []],
        ["torch.nn.functional.interpolate", [["value", 50]], [["size", HUGE]]],
    ],
    "expansion, then a copy": [
        ["torch.Tensor.expand", [["own", "read.bias"], 2**39, 3], []],
        ["torch.Tensor.contiguous", [["value", 50]], []],
    ],
    "an outer sum": [
        ["torch.arange", [2**22], []],
        ["torch.Tensor.unsqueeze", [["value", 50], 1], []],
        ["torch.add", [["value", 50], ["value", 51]], []],
    ],
    "an outer product": [
        ["torch.ones", [2**22, 1], []],
        ["torch.matmul", [["value", 50], ["own", "read.weight"]], []],
        ["torch.ones", [1, 2**22], []],
        ["torch.matmul", [["value", 50], ["value", 52]], []],
    ],
    "scores of attention": [
        ["torch.ones", [1, 1, 2**22, 1], []],
        ["torch.nn.functional.scaled_dot_product_attention", [["value", 50]] * 3, []],
    ],
    "doubling": [["torch.cat", [["list", ["value", n], ["value", n]]], []] for n in [0, *range(50, 90)]],
    "many small tensors": [["torch.ones", [2**20], []], ["torch.Tensor.unbind", [["value", 50]], []]],
    "a product that is expanded first": [
        ["torch.ones", [2**11, 1, 1, 2**11], []],
        ["torch.ones", [1, 2**11, 2**11, 1], []],
        ["torch.matmul", [["value", 50], ["value", 51]], []],
    ],
    "pairs that are compared": [
        ["torch.ones", [2**11, 1, 2**11], []],
        ["torch.ones", [1, 2**11, 2**11], []],
        ["torch.nn.functional.cosine_similarity", [["value", 50], ["value", 51], 2], []],
    ],
    "a kernel as long as what it passes over": [
        ["torch.ones", [1, 1, 2**23], []],
        ["torch.ones", [1, 1, 2**22], []],
        ["torch.nn.functional.conv1d", [["value", 50], ["value", 51]], []],
    ],
    "a window as long as what it passes over": [
        ["torch.ones", [1, 1, 2**22], []],
        ["torch.nn.functional.max_pool1d", [["value", 50], 2**21, 1], []],
    ],
    "parts without end": [["torch.tensor_split", [["own", "read.bias"], HUGE], []]],
    "a part for each number": [["torch.arange", [2**25], []], ["torch.unbind", [["value", 50]], []]],
    "a window of one number, in two dimensions": [
        ["torch.ones", [1, 1, 2**11, 2**11], []],
        ["torch.nn.functional.avg_pool2d", [["value", 50], ["list", 2**10], 1], []],
    ],
    "a window of lp_pool": [
        ["torch.ones", [1, 1, 2**22], []],
        ["torch.nn.functional.lp_pool1d", [["value", 50], 2, 2**21, 1], []],
    ],
    "sums of much": [
        ["torch.ones", [2**12], []],
        ["torch.Tensor.expand", [["value", 50], 2**27, 2**12], []],
        ["torch.Tensor.sum", [["value", 51]], []],
    ],
    "an empty result that is long": [
        ["torch.Tensor.view", [X, 1, 1, -1, 1], []],
        ["torch.nn.functional.adaptive_max_pool2d", [["value", 50], ["list", HUGE, 0]], []],
    ],
    "a value that is no tensor": [
        ["torch.ones", [2**5], []],
        ["torch.unbind", [["value", 50]], []],
        ["torch.functional.einsum", ["a->a", ["value", 51]], []],
    ],
    "places picked over and over": [
        ["torch.zeros", [2**22], [["dtype", ["dtype", "int64"]]]],
        ["torch.ones", [1, 2**22], []],
        ["torch.Tensor.__getitem__", [["value", 51], ["value", 50]], []],
    ],
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_takes_too_much_is_refused_before_it_takes_it(written: Any, name: str) -> None:
    small = with_step(written, *BOMBS[name])
    with pytest.raises(RewrittenModuleError, match=r"would make .* up to|can't compute|for a tensor"):
        small(torch.ones(2, 4))


@pytest.mark.parametrize(
    "calculation",
    [["**", 9, HUGE], ["**", 2, 2, 62], ["*", HUGE, HUGE], ["//", 1, 0], ["%", 1, 0], ["**", 2, -1]],
    ids=str,
)
def test_numbers_that_no_size_reaches_are_refused(written: Any, calculation: list[Any]) -> None:
    small = with_step(written, ["torch.Tensor.narrow", [X, 0, 0, ["calc", *calculation]], []])
    with pytest.raises(RewrittenModuleError, match="the rewritten code of a module"):
        small(torch.ones(2, 4))


def test_calculations_within_bounds() -> None:
    assert calculate("*", 2**24, 2**24) == LARGEST_SIZE
    assert (calculate("-", 3, 5), calculate("//", 7, 2), calculate("%", 7, 4), calculate("neg", 3)) == (-2, 3, 3, -3)


def test_each_size_of_inputs_is_counted_once(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    note = Allowance.note
    monkeypatch.setattr(Allowance, "note", lambda self, name, made: (counted.append(name), note(self, name, made))[1])
    small = with_step(written)
    for batch in (2, 2, 3, 2, 3):
        small(torch.ones(batch, 4))
    assert counted.count("torch.Tensor.relu") == 2
    small.train()
    small(torch.ones(2, 4))
    assert counted.count("torch.Tensor.relu") == 3


def test_counting_changes_no_result_and_no_random_number(written: Any) -> None:
    small = with_step(written, ["torch.nn.functional.dropout", [X, 0.5], [["training", True]]])
    torch.manual_seed(3)
    first, after = small(torch.ones(2, 4)), torch.rand(1)
    torch.manual_seed(3)
    second, again = small(torch.ones(2, 4)), torch.rand(1)
    torch.testing.assert_close((first, after), (second, again), rtol=0, atol=0)


def test_a_mask_decides_sizes_and_is_counted_each_time(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    picked = ["torch.Tensor.__getitem__", [X, ["value", 50]], []]
    small = with_step(written, ["torch.Tensor.gt", [X, 0.0], []], picked)
    made: list[Allowance] = []
    begin = Allowance.__init__
    monkeypatch.setattr(
        Allowance, "__init__", lambda self, *given, steps: (made.append(self), begin(self, *given, steps=steps))[1]
    )
    for _ in range(3):
        small(torch.ones(2, 4))
    assert len(made) == 3 and all(each.by_content for each in made)


def test_more_may_be_made_of_more(written: Any) -> None:
    module = nn.Linear(4, 4)
    assert Allowance(module, ()).total == allowance.LEAST
    wide = torch.empty(2**13, 3, device="meta")
    assert Allowance(module, (wide,)).total == wide.numel() * 2**13
    wider = torch.empty(2**20, 3, device="meta")
    assert Allowance(module, (wider,)).total == allowance.LARGE
    large = torch.empty(2**14, 2**14, device="meta")
    assert Allowance(module, (large, large)).total == 2 * large.numel() * allowance.TIMES_ALL + 20 * 256


def test_compiled_code_is_counted_too(written: Any) -> None:
    small = with_step(written, ["torch.zeros", [HUGE], []])
    with pytest.raises(Exception, match="would make"):
        torch.compile(small, backend="eager", fullgraph=True)(torch.ones(2, 4))


def test_attributes_only_become_smaller(written: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    data = analyze(trace(model, (torch.ones(1, 2, 5, 5),))).plan({"0": [0]}).to_json()
    apply_plan(model, Plan.from_json(data))
    for name, value in {"padding": [HUGE, HUGE], "stride": [-1, 1], "kernel_size": [3], "out_channels": 5}.items():
        wrong = copy.deepcopy(data)
        wrong["attributes"].setdefault("0", {})[name] = value
        with pytest.raises(Exception, match=f"'{name}' of module '0' is .* and can't become"):
            apply_plan(model, Plan.from_json(wrong))


def test_a_module_that_makes_more_than_before_is_counted_from_there_on(written: Any) -> None:
    """What follows was counted with the sizes of then, so it must be counted anew."""
    small = with_step(written, ["", [X], []], ["torch.Tensor.mul", [["value", 50], 2.0], []])
    small(torch.ones(2, 4))
    small.more.factor = 2**20
    small(torch.ones(2, 4))
    small.more.factor = 2**40
    with pytest.raises(RewrittenModuleError, match=r"up to more"):
        small(torch.ones(2, 4))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_weights_of_a_recurrent_layer_must_fit_each_other(kind: type[nn.RNNBase]) -> None:
    """The kernels of torch don't look: they would read behind the end of a weight."""
    model = nn.Sequential(kind(4, 8, batch_first=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for name in shapes:
        with pytest.raises(Exception, match=rf"{name}.* recurrent"):
            apply_plan(model, Plan(tensors={name: {0: (0,)}}, shapes=shapes))
    smaller = {"0": {"hidden_size": 2}}
    with pytest.raises(Exception, match=r"recurrent"):
        apply_plan(model, Plan(attributes=smaller, shapes=shapes))


def test_values_and_numbers_are_told_apart(written: Any) -> None:
    model, data = written
    for step in (["torch.Tensor.narrow", "", [X, 0, 0, ["int", 0]], [], []], ["torch.zeros", "", [["int", 9]], [], []]):
        wrong = copy.deepcopy(data)
        wrong["programs"][""][0]["steps"].insert(0, step)
        with pytest.raises(Exception, match="uses number"):
            apply_plan(model, Plan.from_json(wrong))
