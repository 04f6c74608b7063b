"""What a plan may not ask of a model: weights of recurrent layers that don't fit, sizes of zero, code out of bounds."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from idap.errors import PlanError, RewrittenModuleError, StructureError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan, apply_plan_

INPUT = torch.randn(2, 6, 5)


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones; its weights may be computed from others."""

    def __init__(self, computed: Any = lambda rnn, name: None) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(5, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 3)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            computed(self.rnn, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


def old_weight_norm(rnn: nn.Module, name: str) -> None:
    with pytest.warns(FutureWarning):
        weight_norm(rnn, name)


COMPUTED = {
    "weight_norm": old_weight_norm,
    "parametrized": parametrizations.weight_norm,
    "spectral_norm": spectral_norm,
    "pruned": lambda rnn, name: prune.random_unstructured(rnn, name, 0.3),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_computed_weights_of_a_recurrent_layer_must_fit_too(how: str) -> None:
    """The tensors that a plan names are those from which torch's kernels get theirs."""
    model = Recurrent(COMPUTED[how]).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        for dim in (dim for dim, size in enumerate(shape) if size > 3 and name.startswith("rnn")):
            with pytest.raises(PlanError, match=r"recurrent layer"):
                apply_plan_(model, Plan(tensors={name: {dim: (0, 1, 2)}}, shapes=shapes))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("how", [name for name in COMPUTED if name != "spectral_norm"])
def test_a_recurrent_layer_with_computed_weights_is_cut(how: str) -> None:
    model = Recurrent(COMPUTED[how]).eval()
    structure = analyze(trace(model, (INPUT,)))
    small = apply_plan(model, structure.plan({group.name: [0, 3] for group in structure.groups}))
    assert (small.rnn.hidden_size, small(INPUT).shape) == (2, (2, 3))


def test_a_recurrent_layer_that_computes_weights_in_a_way_of_its_own_is_not_cut() -> None:
    model = Recurrent()
    weight = model.rnn._parameters.pop("weight_hh_l0")
    model.rnn.raw = weight
    model.rnn.weight_hh_l0 = weight.detach()
    model.rnn.register_forward_pre_hook(lambda rnn, _: setattr(rnn, "weight_hh_l0", rnn.raw * 1.0))
    plan = Plan(tensors={"rnn.raw": {0: (0,)}}, shapes={"rnn.raw": (48, 12)})
    with pytest.raises(PlanError, match=r"'rnn', whose 'weight_hh_l0' is neither a parameter nor computed"):
        apply_plan(model, plan)


def test_a_weight_that_is_tied_to_a_recurrent_layer_must_fit_it() -> None:
    """Whatever the plan says of aliases: it is the tensor that counts."""
    model = nn.ModuleDict({"a": nn.Linear(8, 32, bias=False), "rnn": nn.LSTM(8, 8)})
    model["a"].weight = model["rnn"].weight_hh_l0
    plan = Plan(tensors={"a.weight": {0: (0,)}}, shapes={"a.weight": (32, 8)})
    with pytest.raises(PlanError, match=r"rnn.weight_hh_l0.* recurrent"):
        apply_plan(model, plan)


def test_a_recurrent_layer_that_stays_under_another_name_is_checked() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(4, 8)})
    model["b"] = model["a"]
    plan = Plan(tensors={"a.weight_hh_l0": {0: (0,)}}, shapes={"a.weight_hh_l0": (32, 8)}, replaced={"a": "identity"})
    with pytest.raises(PlanError, match=r"a.weight_hh_l0.* recurrent"):
        apply_plan(model, plan)


@pytest.mark.parametrize(("name", "value"), [("num_heads", 0), ("num_heads", -1), ("embed_dim", 0)])
def test_no_size_becomes_zero(name: str, value: int) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(
        PlanError, match=rf"'{name}' of module 'attention' is \d and can't become {value}; .* down to 1"
    ):
        apply_plan(model, Plan(attributes={"attention": {name: value}}))


def test_the_place_of_a_layer_may_become_zero() -> None:
    """Layers that stay are numbered from 0 again; that is no size of a kernel."""
    model = nn.ModuleDict({"a": Numbered(3)})
    assert apply_plan(model, Plan(attributes={"a": {"layer_idx": 0}}))["a"].layer_idx == 0
    with pytest.raises(PlanError, match=r"can't become -1; .* down to 0"):
        apply_plan(model, Plan(attributes={"a": {"layer_idx": -1}}))


class Numbered(nn.Module):
    """A layer that knows its place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.layer_idx = place


class Bags(nn.Module):
    """Its view has a literal width, so a cut needs rewritten code, which would have to call the table or the images."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(4, 12), nn.Linear(12, 3)
        self.part = nn.ModuleDict({"inner": part})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.write(x).view(x.shape[0], 3, 4).relu()
        picked = self.part["inner"](torch.zeros(x.shape[0], 2, dtype=torch.int64)).sum()
        return self.read(hidden.view(x.shape[0], 12)) + picked


def test_modules_that_read_memory_by_their_inputs_are_not_called_by_new_code() -> None:
    """At tracing, the group stays whole and the reason is told; at loading, it is an error."""
    with pytest.raises(
        StructureError, match=r"calls part.inner, which rewritten code may not call: its kernel reads its tables"
    ):
        analyze(trace(Bags(nn.EmbeddingBag(5, 1)).eval(), (torch.ones(2, 4),)))
    free = Bags(nn.Embedding(5, 1)).eval()
    plan = analyze(trace(free, (torch.ones(2, 4),))).plan({"write": [0]})
    apply_plan(free, plan)
    with pytest.raises(
        PlanError, match=r"calls 'part.inner', which contains a EmbeddingBag that .* may not call: its kernel"
    ):
        apply_plan(Bags(nn.EmbeddingBag(5, 1)), plan)


class Double(nn.Module):
    """Code that can't follow a cut, so that it is rewritten: two layers of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.write, self.inner, self.read = nn.Linear(4, 12), inner, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.write(self.inner(x)).view(x.shape[0], 3, 4).relu().view(x.shape[0], 12))


@pytest.fixture(scope="module")
def nested() -> tuple[nn.Module, dict[str, Any]]:
    model = Double(Double(Double(nn.Identity()))).eval()
    structure = analyze(trace(model, (torch.ones(2, 4),)))
    plan = structure.plan({group.name: [0] for group in structure.groups})
    assert list(plan.programs) == ["", "inner", "inner.inner"]
    return model, json.loads(json.dumps(plan.to_json()))


def with_steps(data: dict[str, Any], path: str, *steps: list[Any]) -> Plan:
    data = copy.deepcopy(data)
    data["programs"][path][0]["steps"][0:0] = steps
    return Plan.from_json(data)


def test_code_within_code_shares_what_it_may_take(nested: Any) -> None:
    """Each module alone stays within its bound; together they would multiply it."""
    model, data = nested
    spend = [["torch.ones", "", [2**24], [], [[[], 90 + n]]] for n in range(3)]
    alone = apply_plan(model, with_steps(data, "inner.inner", *spend))
    alone(torch.ones(2, 4))
    for path in ("", "inner"):
        data = with_steps(data, path, *spend).to_json()
        data = json.loads(json.dumps(data))
    small = apply_plan(model, with_steps(data, "inner.inner", *spend))
    small.inner.inner(torch.ones(2, 4))
    with pytest.raises(RewrittenModuleError, match="would make"):
        small(torch.ones(2, 4))


def test_what_is_known_of_inner_code_counts_for_outer_code(nested: Any) -> None:
    """The inner module ran with these sizes before, so it is not counted again, but what it makes is added."""
    model, data = nested
    inner = [["torch.ones", "", [2**24], [], [[[], 90]]]]
    again = [["", "inner", [["value", 0]], [], [[[], 100 + n]]] for n in range(4)]
    small = apply_plan(
        model, with_steps(json.loads(json.dumps(with_steps(data, "inner", *inner).to_json())), "", *again)
    )
    for _ in range(3):
        small.inner(torch.ones(2, 4))
    with pytest.raises(RewrittenModuleError, match="would make"):
        small(torch.ones(2, 4))


def test_steps_of_code_within_code_multiply_up_to_a_bound(nested: Any) -> None:
    model, data = nested
    outer = [["", "inner", [["value", 0]], [], [[[], 1000 + n]]] for n in range(150)]
    middle = [["", "inner", [["value", 0]], [], [[[], 1000 + n]]] for n in range(1500)]
    nothing = [["torch.Tensor.detach", "", [["value", 0]], [], [[[], 1000 + n]]] for n in range(10)]
    for path, steps in (("", outer), ("inner", middle), ("inner.inner", nothing)):
        data = json.loads(json.dumps(with_steps(data, path, *steps).to_json()))
    model = copy.deepcopy(model).to("meta")  # so large that numbers are no bound
    model.register_buffer("large", torch.empty(2**32, device="meta"), persistent=False)
    plan = Plan.from_json(data)
    with pytest.raises(RewrittenModuleError, match=r"and 1,0\d\d,\d\d\d steps up to"):
        apply_plan(model, plan)(torch.ones(2, 4, device="meta"))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (["", "inner", [["value", 0]], [["self", 1]], []], "an argument named 'self'"),
        (["torch.Tensor.relu", "", [["own", "inner"]], [], []], "uses tensor 'inner', which it lacks"),
        (["torch.Tensor.relu", "", [["own", "read.weight.data"]], [], []], "uses tensor 'read.weight.data'"),
        (["", "read.weight", [["value", 0]], [], []], "uses module 'read.weight', which it lacks"),
        (["torch.Tensor.__getitem__", "", [], [["self", ["value", 0]], ["key", 0]], []], "may not give it"),
        (
            ["torch.nn.functional.pad", "", [["value", 0], ["tuple", -1, 0], "circular"], [], []],
            r"calls 'torch.nn.functional.pad' with arguments",
        ),
        (
            ["torch.nn.functional.conv_transpose1d", "", [["value", 0], ["own", "read.weight"], None, 512], [], []],
            r"calls 'torch.nn.functional.conv_transpose1d' with arguments",
        ),
        (
            [
                "torch.nn.functional.conv_transpose1d",
                "",
                [["value", 0], ["own", "read.weight"], None, ["calc", "*", ["size", ["value", 0], 0], 512]],
                [],
                [],
            ],
            r"calls 'torch.nn.functional.conv_transpose1d' with arguments",
        ),
    ],
    ids=lambda case: case if isinstance(case, str) else case[0] or case[1],
)
def test_code_that_torch_would_not_survive_is_refused(nested: Any, step: list[Any], message: str) -> None:
    model, data = nested
    with pytest.raises(PlanError, match=message):
        apply_plan(model, with_steps(data, "", step))


def test_a_projection_of_a_recurrent_layer_stays_smaller_than_its_state() -> None:
    """Torch tells by the sizes of the states whether there is one."""
    model = nn.ModuleDict({"rnn": nn.LSTM(64, 8, num_layers=2, bias=False, proj_size=3)})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    gates = tuple(gate * 8 + unit for gate in range(4) for unit in range(3))
    tensors = {name: {1: (0, 1, 2)} if "weight_hr" in name else {0: gates} for name in shapes}
    with pytest.raises(PlanError, match=r"hidden size of the recurrent layer 'rnn' 3 and its projection 3"):
        apply_plan(model, Plan(tensors=tensors, shapes=shapes, attributes={"rnn": {"hidden_size": 3}}))


def test_a_stand_in_without_the_argument_that_it_returns_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shapes = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
    data = Plan().to_json() | {"replaced": {"0": "identity"}, "called": {"0": [5, ["stream"]]}, "shapes": shapes}
    small = apply_plan(model, Plan.from_json(data))
    with pytest.raises(RewrittenModuleError, match="without argument 5"):
        small[0]()


def test_a_projection_is_measured_before_it_is_made() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    big = {"inputs": [0], "outputs": [0], "sizes": [2**30, 2**30], "stride": []}
    data = Plan().to_json() | {"replaced": {"a": "projection"}, "projections": {"a": big}}
    with pytest.raises(PlanError, match="more than the 0 numbers of the module"):
        Plan.from_json(data)
    lying = data | {"shapes": {"a.weight": [2**40, 2**40]}}
    with pytest.raises(PlanError, match=r"tensor 'a.weight' has shape|more than the 20 parameters"):
        apply_plan(model, Plan.from_json(lying))


def test_the_code_of_all_modules_together_is_bounded(nested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = nested
    parts = sum(program.parts for program in Plan.from_json(data).programs.values())
    monkeypatch.setattr("idap.structure.plan.MOST_PARTS", parts - 1)
    with pytest.raises(
        PlanError, match=rf"of all rewritten modules has {parts:,} parts, and {parts - 1:,} are the most"
    ):
        Plan.from_json(data)
