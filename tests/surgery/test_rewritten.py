"""Rewritten modules: they behave like the original modules, only smaller, and no text in a file is executed."""

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from idap.errors import PlanError, RewrittenModuleError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan, apply_plan_
from idap.surgery.rewritten import original_class
from idap.surgery.verify import verify
from tests.nets import by_name, randomised, sequence, structure_of


class Attentive(nn.Module):
    """torch's own attention with a residual around it; a mask may be given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attn = nn.MultiheadAttention(8, 4, batch_first=True, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(x, x, x, key_padding_mask=mask, need_weights=False)[0])


PADDED = torch.tensor([[False, False, False, True, True], [False] * 5])


def model_and_structure(**settings: Any) -> tuple[nn.Module, Structure]:
    model = randomised(Attentive(**settings).eval())
    return model, analyze(trace(model, (sequence(4),)))


@pytest.fixture(scope="module")
def attentive() -> tuple[nn.Module, Structure]:
    return model_and_structure()


@pytest.fixture(scope="module")
def plan(attentive: tuple[nn.Module, Structure]) -> Plan:
    return attentive[1].plan({"attn:heads": [0, 3], "attn:head-width": [1], "embed": [0, 2, 3, 4, 7]})


@pytest.fixture
def small(attentive: tuple[nn.Module, Structure], plan: Plan) -> nn.Module:
    return apply_plan(attentive[0], plan)


def written_attention(model: nn.Module, x: Tensor, *, heads: list[int], mask: Tensor | None = None) -> Tensor:
    """What the model computes with only some heads, by plain sums over the weights of the original."""
    x = model.embed(x)
    q, k, v = F.linear(x, model.attn.in_proj_weight, model.attn.in_proj_bias).chunk(3, -1)
    total = torch.zeros_like(x) + model.attn.out_proj.bias
    for head in heads:
        part = slice(2 * head, 2 * head + 2)
        scores = q[..., part] @ k[..., part].mT * 2**-0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None], float("-inf"))
        total = total + scores.softmax(-1) @ v[..., part] @ model.attn.out_proj.weight[:, part].T
    return model.head(x + total)


@pytest.mark.parametrize("heads", [[0], [3], [1, 2], [0, 2, 3]])
def test_heads_of_torchs_attention_can_go(attentive: tuple[nn.Module, Structure], heads: list[int]) -> None:
    model, structure = attentive
    plan = structure.plan({"attn:heads": heads})
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, ((sequence(4),), {})).error <= 1e-5
    assert small.attn.in_proj_weight.shape == (3 * 2 * len(heads), 8)
    for x in (sequence(4), sequence(4, 1, 1), sequence(4, 9, 3)):
        torch.testing.assert_close(small(x), written_attention(model, x, heads=heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8, "vdim": 8}]
)
def test_every_kind_of_it(settings: dict[str, Any]) -> None:
    model, structure = model_and_structure(**settings)
    assert {group.kind for group in structure.groups} == {"neurons", "heads", "head width"}
    plan = structure.plan({group.name: range(0, group.size, 2) for group in structure.groups})
    small = apply_plan(model, plan)
    assert list(plan.programs) == ["attn"]
    assert verify(structure, model, small, plan, ((sequence(4),), {})).error <= 1e-5


def test_the_width_of_heads_can_shrink_and_their_scale_stays(attentive: tuple[nn.Module, Structure]) -> None:
    model, structure = attentive
    plan = structure.plan({"attn:head-width": [1]})
    small = apply_plan(model, plan)
    masked = copy.deepcopy(model)  # the original itself with zeros: it still divides by the root of 2
    with torch.no_grad():
        for part in (masked.attn.in_proj_weight, masked.attn.in_proj_bias):
            part.view(12, 2, -1)[:, 0] = 0
        masked.attn.out_proj.weight.view(8, 4, 2)[..., 0] = 0
    torch.testing.assert_close(small(sequence(4)), masked(sequence(4)), rtol=1e-4, atol=1e-5)


def test_it_is_still_the_module_it_was(attentive: tuple[nn.Module, Structure], small: nn.Module) -> None:
    model = attentive[0]
    assert isinstance(small.attn, nn.MultiheadAttention) and original_class(type(small.attn)) is nn.MultiheadAttention
    assert type(model.attn) is nn.MultiheadAttention and type(small.embed) is nn.Linear
    assert repr(small).startswith("Attentive(\n  (embed)") and "(attn): MultiheadAttention(" in repr(small)
    assert list(small.state_dict()) == list(model.state_dict())
    assert [name for name, _ in small.named_modules()] == [name for name, _ in model.named_modules()]


def test_it_can_be_trained(small: nn.Module) -> None:
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        loss = F.mse_loss(small(sequence(4)), torch.ones(2, 5, 3))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def pickle_and_load(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        pickle_and_load,
        save_and_load,
        lambda model: pickle_and_load(copy.deepcopy(pickle_and_load(model))),
    ],
)
def test_copies_are_the_same_and_their_own(small: nn.Module, again: Callable[[nn.Module], nn.Module]) -> None:
    x, copied = sequence(4, 7, 3), again(small)
    expected = small(x)
    assert torch.equal(copied(x), expected)
    assert isinstance(copied.attn, nn.MultiheadAttention)
    with torch.no_grad():
        copied.attn.in_proj_weight.zero_()
    assert torch.equal(small(x), expected) and not torch.equal(copied(x), expected)


def test_a_plan_with_programs_survives_json(attentive: tuple[nn.Module, Structure], plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and list(again.programs) == ["attn"]
    assert torch.equal(apply_plan(attentive[0], again)(sequence(4)), apply_plan(attentive[0], plan)(sequence(4)))


def test_in_place_and_twice(attentive: tuple[nn.Module, Structure], small: nn.Module, plan: Plan) -> None:
    model, structure = attentive
    mutated = copy.deepcopy(model)
    assert apply_plan_(mutated, plan) is mutated and torch.equal(mutated(sequence(4)), small(sequence(4)))
    first = structure.plan({"attn:heads": [0, 1, 3]})
    twice = apply_plan(apply_plan(model, first), plan.since(first))
    assert original_class(type(twice.attn)) is nn.MultiheadAttention  # not a subclass of a subclass
    assert type(twice.attn).__mro__[1] is nn.MultiheadAttention
    assert torch.equal(twice(sequence(4)), small(sequence(4)))


def test_it_can_be_exported_with_free_sizes(small: nn.Module) -> None:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(small, (sequence(4),), dynamic_shapes=(free,)).module()
    for x in (sequence(4), sequence(4, 9, 3)):
        torch.testing.assert_close(exported(x), small(x), rtol=1e-4, atol=1e-5)


def test_it_can_be_traced_and_cut_again(small: nn.Module) -> None:
    structure = analyze(trace(small, (sequence(4),)))
    assert {group.name: group.size for group in structure.groups}["attn:heads"] == 2
    plan = structure.plan({"attn:heads": [1], "embed": [0, 1]})
    smaller = apply_plan(small, plan)
    assert verify(structure, small, smaller, plan, ((sequence(4),), {})).error <= 1e-5
    assert original_class(type(smaller.attn)) is nn.MultiheadAttention


def test_data_types_follow_the_model(small: nn.Module) -> None:
    expected = small(sequence(4))
    found = small.double()(sequence(4).double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)
    assert small.bfloat16()(sequence(4).bfloat16()).dtype == torch.bfloat16
    assert small.to("meta")(sequence(4).bfloat16().to("meta")).device.type == "meta"


def test_tensors_that_the_code_makes_follow_the_model() -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.read = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.write(x).view(-1, 3, 4)
            places = torch.arange(x.shape[0], device=x.device, dtype=x.dtype)[:, None, None]
            return self.read((x + torch.zeros(1, 3, 4, dtype=x.dtype, device=x.device) + places).flatten(1))

    model, x = randomised(Makes().eval()), torch.randn(2, 4)
    structure = analyze(trace(model, (x,)))
    plan = structure.plan({"write": [0, 2]})
    small = apply_plan(model, plan)
    assert list(plan.programs) == [""]
    assert verify(structure, model, small, plan, ((x,), {})).error <= 1e-5
    assert small(torch.randn(5, 4)).shape == (5, 3)
    assert small.double()(x.double()).dtype == torch.float64
    assert small.to("meta")(x.double().to("meta")).device.type == "meta"


# --------------------------------------------------------------------------------------------------- ways to be called


def test_a_call_in_another_way_is_refused_by_name(small: nn.Module) -> None:
    with pytest.raises(
        RewrittenModuleError,
        match=r"forward of this MultiheadAttention was rewritten for .*key_padding_mask=None.*, "
        r"found .*key_padding_mask=a tensor.*swap=False",
    ):
        small(sequence(4), PADDED)
    x = small.embed(sequence(4))
    with pytest.raises(RewrittenModuleError, match=r"need_weights=False, found .*need_weights=True"):
        small.attn(x, x, x, need_weights=True)
    assert torch.equal(small.attn(query=x, key=x, value=x, key_padding_mask=None, need_weights=False)[0],
                       small.attn(x, x, x, need_weights=False)[0])  # fmt: skip


def test_a_mask_where_one_was_traced_may_mask_anything_or_nothing() -> None:
    model = randomised(Attentive().eval())
    structure = analyze(trace(model, (sequence(4), PADDED)))
    plan = structure.plan({"attn:heads": [1, 3]})
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, ((sequence(4), PADDED), {})).error <= 1e-5
    for mask in (PADDED, PADDED.flip(0), torch.zeros_like(PADDED)):
        expected = written_attention(model, sequence(4), heads=[1, 3], mask=mask)
        torch.testing.assert_close(small(sequence(4), mask), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RewrittenModuleError, match=r"key_padding_mask=a tensor.*, found .*key_padding_mask=None"):
        small(sequence(4))


class Drops(nn.Module):
    """Three ways to drop, in a forward that must be rewritten."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.write, self.read, self.way = nn.Linear(4, 12), nn.Linear(12, 3), way
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x).view(-1, 3, 4)
        if self.way == "function":
            x = F.dropout(x, 0.5, self.training)
        elif self.way == "module":
            x = self.drop(x)
        else:
            p = 0.5 if self.training else 0.0
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=p, scale=1.0)
        return self.read(x.flatten(1))


@pytest.mark.parametrize("way", ["function", "module", "attention"])
def test_dropout_follows_the_training_mode(way: str) -> None:
    model, x = randomised(Drops(way).eval()), torch.randn(4, 4)
    structure = analyze(trace(model, (x,)))
    small = apply_plan(model, structure.plan({group.name: range(group.size - 1) for group in structure.groups}))
    assert original_class(type(small)) is not type(small)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_dropout_of_torchs_attention_follows_the_training_mode() -> None:
    model, structure = model_and_structure(dropout=0.5)
    assert not torch.equal(model.train()(sequence(4)), model(sequence(4)))
    model.eval()
    small = apply_plan(model, structure.plan({"attn:heads": [0, 3]}))
    assert torch.equal(small(sequence(4)), small(sequence(4)))
    small.train()
    assert not torch.equal(small(sequence(4)), small(sequence(4)))


# ----------------------------------------------------------------------------------------------------- the fused kernel


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def fused_calls(model: nn.Module, *args: Any, **kwargs: Any) -> set[str]:
    with torch.no_grad(), Operators() as operators:
        model(*args, **kwargs)
    return {name for name in operators.seen if "transformer_encoder_layer" in name or "native_multi_head" in name}


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)


def test_the_fused_kernel_of_an_encoder_layer_is_not_taken() -> None:
    """It would read the attention's weights without calling it, with the number of heads that it had."""
    model = randomised(nn.Sequential(nn.Linear(4, 8), encoder_layer(), nn.Linear(8, 3)).eval())
    structure = analyze(trace(model, (sequence(4),)))
    assert fused_calls(model, sequence(4))  # the original takes it
    for keep in ({"1.self_attn:heads": [0, 2]}, {"1.self_attn:head-width": [1]}, {"0": [0, 1, 4, 6]}):
        plan = structure.plan(keep)
        small = apply_plan(model, plan)
        assert "1.self_attn" in plan.programs
        assert verify(structure, model, small, plan, ((sequence(4),), {})).error <= 1e-5
        assert not fused_calls(small, sequence(4))
        assert not fused_calls(pickle_and_load(small), sequence(4))
        with torch.no_grad():
            quick = small(sequence(4, 7, 3))
        torch.testing.assert_close(quick, small(sequence(4, 7, 3)).detach(), rtol=1e-4, atol=1e-5)


def test_an_encoder_with_padding_makes_no_nested_tensors() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
            self.encoder = nn.TransformerEncoder(encoder_layer(), 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x), src_key_padding_mask=mask))

    model = randomised(Padded().eval())
    structure = analyze(trace(model, (sequence(4), PADDED)))
    assert {group.kind for group in structure.groups} == {"neurons", "heads", "head width"}
    small = apply_plan(model, structure.plan({group.name: range(0, group.size, 2) for group in structure.groups}))
    expected = small(sequence(4), PADDED)
    with torch.no_grad():
        found = small(sequence(4), PADDED)
    torch.testing.assert_close(found[~PADDED], expected[~PADDED], rtol=1e-4, atol=1e-5)
    assert not fused_calls(small, sequence(4), PADDED)


# ------------------------------------------------------------------------------------------------------- hostile plans


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.write(x).view(x.shape[0], 3, 4).flatten(1))


VIEW, ARGS, KWARGS, RESULTS = 1, 2, 3, 4
"""Place of the step that views, and of the parts in a step."""


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, dict[str, Any]]:
    """A model, and the JSON of a plan that rewrites it."""
    model = Plain().eval()
    plan = analyze(trace(model, (torch.ones(2, 4),))).plan({"write": [0]})
    data = json.loads(json.dumps(plan.to_json()))
    assert data["programs"][""][0]["steps"][VIEW][0] == "torch.Tensor.view"
    return model, data


def poison(data: dict[str, Any], *place: Any, value: Any) -> Plan:
    data = copy.deepcopy(data)
    *path, last = place
    found = data["programs"][""][0]
    for part in path:
        found = found[part]
    found[last] = value
    return Plan.from_json(data)


HOSTILE = {
    "torch.load": (("steps", VIEW, 0), "torch.load", "calls 'torch.load', which is not among"),
    "os.system": (("steps", VIEW, 0), "os.system", "calls 'os.system', which is not among"),
    "a file": (("steps", VIEW, 0), "torch.from_file", "calls 'torch.from_file'"),
    "an address": (
        ("steps", VIEW, KWARGS),
        [["cdata", 71748523458560]],
        "arguments that rewritten code may not give it",
    ),
    "a hidden output": (("steps", VIEW, KWARGS), [["out", ["value", 0]]], "arguments that rewritten code may not give"),
    "a descriptor": (("steps", VIEW, 0), "torch.Tensor._cdata.__get__", "which is not among the functions"),
    "a size of a number": (("steps", VIEW, ARGS), [["value", 1], ["size", 3, 0]], "which means nothing"),
    "a calculation with text": (("steps", VIEW, ARGS), [["value", 1], ["calc", "*", "a", 3]], "which means nothing"),
    "both kinds of call": (("steps", VIEW, 1), "write", "each step calls one of the two"),
    "source as a keyword": (("steps", VIEW, KWARGS), [["x); import os; (", 1]], "argument named 'x\\); import os"),
    "a word of Python": (("steps", VIEW, KWARGS), [["class", 1]], "argument named 'class'"),
    "an unknown tag": (("steps", VIEW, ARGS), [["import", "os"]], "holds \\('import', 'os'\\), which means nothing"),
    "no arithmetic": (("steps", VIEW, ARGS), [["calc", "@", 1, 2]], "which means nothing"),
    "no module": (("steps", 0, 1), "nope", "uses module 'nope', which it lacks"),
    "no submodule": (("steps", 0, 1), "forward.__globals__", "uses module 'forward.__globals__', which it lacks"),
    "no tensor": (("steps", VIEW, ARGS), [["own", "__class__"], -1, 2], "uses tensor '__class__', which it lacks"),
    "no tensor returned": (("output",), ["own", "__class__.__init__"], "uses tensor '__class__.__init__'"),
    "no data type": (("steps", VIEW, ARGS), [["value", 1], ["dtype", "load"]], "which means nothing"),
    "no memory format": (("steps", VIEW, ARGS), [["value", 1], ["format", "hub"]], "may not give it"),
    "a number as text": (("steps", VIEW, ARGS), [["value", "1"]], "which means nothing"),
    "a negative number": (("steps", VIEW, ARGS), [["value", -1]], ""),
    "an unknown value": (("steps", VIEW, ARGS), [["value", 99]], ""),
    "source as a result": (("steps", VIEW, RESULTS), [[[], "os.system('true')"]], ""),
    "no results": (("steps", VIEW, RESULTS), "x", ""),
    "arguments that forward lacks": (("kwargs",), [["nope", 1]], ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_plan_is_refused_and_nothing_runs(
    plain: tuple[nn.Module, dict[str, Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, value, message = HOSTILE[name]
    ran: list[Any] = []
    monkeypatch.setattr("os.system", lambda *given: ran.append(given))
    monkeypatch.setattr("torch.load", lambda *given: ran.append(given))
    with pytest.raises(PlanError, match=message or None):
        apply_plan(plain[0], poison(plain[1], *place, value=value))
    assert not ran


def test_a_hostile_plan_leaves_a_model_in_place_untouched(plain: tuple[nn.Module, dict[str, Any]]) -> None:
    model = copy.deepcopy(plain[0])
    with pytest.raises(PlanError, match=r"calls 'torch.load'"):
        apply_plan_(model, poison(plain[1], "steps", VIEW, 0, value="torch.load"))
    assert type(model) is Plain and model.write.weight.shape == (12, 4)


def test_a_program_for_a_module_that_does_not_exist_is_refused(plain: tuple[nn.Module, dict[str, Any]]) -> None:
    model, data = plain
    wrong = Plan.from_json({**data, "programs": {"nope": data["programs"][""]}})
    with pytest.raises(PlanError, match="the plan does not fit this model: it has no module 'nope'"):
        apply_plan(model, wrong)


def test_the_untouched_plan_runs(plain: tuple[nn.Module, dict[str, Any]]) -> None:
    """Otherwise the refusals above would prove nothing."""
    assert apply_plan(plain[0], Plan.from_json(plain[1]))(torch.ones(7, 4)).shape == (7, 3)


def test_the_new_forward_has_the_parameters_of_the_old_one():
    net = by_name["language model, swapped"]
    structure = structure_of(net.name)
    small = apply_plan(net.model(), structure.plan({group.name: [0] for group in structure.groups}))
    assert any(original_class(type(each)) is not type(each) for each in small.modules())
    before = dict(net.model().named_modules())
    for path, module in small.named_modules():
        assert inspect.signature(module.forward) == inspect.signature(before[path].forward), path
