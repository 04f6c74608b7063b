"""The ints that modules hold: which change with a cut, to what, and which cuts they forbid."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.errors import PlanError
from idap.graph.ir import Attribute, Extent, Literal, Operation
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.code.sizes import Demand, Values, solve_attributes
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.nets import Net, every_net, randomised, sequence, structure_of


@every_net
def test_what_layers_of_torch_say_of_themselves_is_true_after_a_cut(net: Net) -> None:
    structure = structure_of(net.name)
    plan = structure.plan({group.name: range(0, group.size, 2) for group in structure.groups})
    for module in apply_plan(net.model(), plan).modules():
        shape = (
            tuple(getattr(module, "weight", None).shape) if isinstance(getattr(module, "weight", None), Tensor) else ()
        )
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == shape
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == shape[:2]
            assert module.out_channels % module.groups == 0 == module.in_channels % module.groups
        elif isinstance(module, nn.ConvTranspose2d):
            assert (module.in_channels, module.out_channels // module.groups) == shape[:2]
        elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d) and shape:
            assert (module.num_features,) == shape
        elif isinstance(module, nn.GroupNorm):
            assert (module.num_channels,) == shape and module.num_channels % module.num_groups == 0
        elif isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == shape
        elif isinstance(module, nn.Embedding):
            assert (module.num_embeddings, module.embedding_dim) == shape
        elif isinstance(module, nn.PReLU):
            assert (module.num_parameters,) == shape


@pytest.mark.parametrize(
    ("net", "keep", "expected"),
    [
        ("mobilenet", {"blocks.0.conv.0": 5}, {"blocks.0.conv.3": {"groups": 5, "in_channels": 5, "out_channels": 5}}),
        ("grouped", {"conv1": 3}, {"conv2": {"groups": 3, "in_channels": 6, "out_channels": 9}}),
        ("grouped", {"conv1#2": 1}, {"conv2": {"in_channels": 4}}),
        ("grouped", {"conv2": 2}, {"conv2": {"out_channels": 8}, "conv3": {"in_channels": 8}}),
        ("unet", {"merge2": 1}, {"up2": {"groups": 1, "in_channels": 3, "out_channels": 3}}),
        ("unet", {"up2": 2}, {"up2": {"out_channels": 4}, "head": {"in_channels": 4}}),
        ("group norm", {"conv1": 2}, {"norm1": {"num_groups": 2, "num_channels": 8}}),
        ("group norm", {"conv1#2": 3}, {"norm1": {"num_channels": 9}}),
        ("instance norm", {"conv1": 4}, {"norm1": {"num_features": 4}}),
        ("cifar held", {"layers.1.conv2": 1}, {"layers.1.shortcut": {"before": 1}}),
        ("cifar held", {"layers.1.conv2#2": 1}, {"layers.1.shortcut": {"after": 1}}),
        ("pre-norm, fused", {"blocks.0.attn.qkv:heads": 1}, {"blocks.0.attn": {"num_heads": 1}}),
        ("pre-norm, fused", {"blocks.0.attn.qkv:head-width": 2}, {"blocks.0.attn": {"head_dim": 2}}),
        ("pre-norm, written", {"blocks.0.attn.q_proj:head-width": 3}, {"blocks.0.attn": {"head_dim": 3}}),
        ("pre-norm, fused", {"embed": 5}, {"norm": {"normalized_shape": (5,)}}),
        ("language model", {"embed": 5}, {"embed": {"embedding_dim": 5}, "head": {"in_features": 5}}),
        ("language model", {"block.attn.qkv:heads": 1}, {"block.attn": {"heads": 1}}),
        ("vision transformer", {"patch": 5}, {"patch": {"out_channels": 5}}),
    ],
)
def test_attributes_change_with_their_group(
    net: str, keep: dict[str, int], expected: dict[str, dict[str, Any]]
) -> None:
    plan = structure_of(net).plan({name: range(count) for name, count in keep.items()})
    for path, values in expected.items():
        assert {name: plan.attributes[path].get(name) for name in values} == values


def test_a_plan_touches_no_other_attribute() -> None:
    plan = structure_of("grouped").plan({"conv1#2": [0]})
    assert plan.attributes == {"conv1": {"out_channels": 4}, "conv2": {"in_channels": 4}}


# ------------------------------------------------------------------------------------------------ hand-made cases


class Made(nn.Module):
    """A layer that writes 12 neurons, something that handles them by sizes, and a layer that reads them."""

    def __init__(self, body: Callable[["Made", Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.write, self.read, self.body = nn.Linear(4, 12), nn.LazyLinear(3), body
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.body(self, self.write(x)).flatten(1))


def make_case(
    body: Callable[[Made, Tensor], Tensor], swap: bool = False, **held: Any
) -> tuple[Made, Structure, dict[str, int]]:
    model, x = Made(body, **held), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    model(x)
    model = randomised(model.eval())
    structure = analyze(trace(model, (x,)), swap=swap, required=False)
    for seed in range(4):
        keep = {g.name: torch.randperm(g.size)[: seed % g.size + 1].tolist() for g in structure.groups}
        plan = structure.plan(keep)
        assert verify(structure, model, apply_plan(model, plan), plan, ((x,), {})).error <= 1e-5
    return model, structure, {group.name: group.size for group in structure.groups}


@pytest.mark.parametrize(
    ("body", "held", "groups"),
    [
        (lambda m, x: x.view(2, m.a, m.b), {"a": 3, "b": 4}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, m.a, -1), {"a": 3}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, *m.shape), {"shape": (3, 4)}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, *m.shape), {"shape": [3, 4]}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, m.a, m.b // m.a), {"a": 3, "b": 12}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, m.a, x.shape[1] // m.a), {"a": 3}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, m.write.out_features), {}, {"write": 12}),
        (lambda m, x: torch.cat(x.split(m.parts, 1)[::-1], 1), {"parts": [5, 7]}, {"write": 5, "write#2": 7}),
        (lambda m, x: torch.cat(x.split([m.a, x.shape[1] - m.a], 1)[::-1], 1), {"a": 5}, {"write": 5, "write#2": 7}),
        (lambda m, x: torch.cat([x[:, : m.a].relu(), x[:, m.a :]], 1), {"a": 5}, {"write": 5, "write#2": 7}),
        (lambda m, x: F.group_norm(x, m.a), {"a": 3}, {"write": 3, "write#2": 4}),
        (lambda m, x: x + torch.zeros(2, m.a), {"a": 12}, {"write": 12}),
        (lambda m, x: x * torch.ones(1, m.a).expand(2, m.a), {"a": 12}, {"write": 12}),
        (lambda m, x: x if x.shape[1] == m.a else x * 2, {"a": 12}, {"write": 12}),
    ],
)
def test_sizes_are_followed_to_where_they_come_from(
    body: Callable[[Made, Tensor], Tensor], held: dict[str, Any], groups: dict[str, int]
) -> None:
    for swap in (False, True):
        _, structure, found = make_case(body, swap, **held)
        assert found == groups
        assert not structure.plan({name: [0] for name in groups}).programs


@pytest.mark.parametrize(
    ("body", "held", "groups", "rewritten"),
    [
        (lambda m, x: x.view(2, 3, 4), {}, {}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(-1, m.a * m.b), {"a": 3, "b": 4}, {}, {"write": 12}),
        (lambda m, x: x.view(2, 3, m.b), {"b": 4}, {"write": 4}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, m.a, m.b) * m.b, {"a": 3, "b": 4}, {"write": 3}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, m.a, -1) / (m.a + 1) ** 0.5, {"a": 3}, {"write": 4}, {"write": 3, "write#2": 4}),
        (lambda m, x: x.view(2, m.a * 1, int(m.b)), {"a": 3, "b": 4}, {"write": 3}, {"write": 3, "write#2": 4}),
        (lambda m, x: x if x.shape[1] == 12 else x * 2, {}, {}, {"write": 12}),
        (lambda m, x: x * x.shape[1], {}, {}, {"write": 12}),
        (lambda m, x: x / x.numel(), {}, {}, {"write": 12}),
        (lambda m, x: x + torch.full((), x.shape[1]), {}, {}, {"write": 12}),
        (lambda m, x: x + torch.arange(x.shape[1]), {}, {}, {}),
        (
            lambda m, x: torch.cat([x[:, : m.a].view(2, 2, 3), x[:, m.a :].view(2, m.a // 3, 3)], 1),
            {"a": 6},
            {},
            {"write": 2, "write#2": 2, "write#3": 3},
        ),
    ],
)
def test_what_the_code_fixes_can_go_only_where_the_code_is_rewritten(
    body: Callable[[Made, Tensor], Tensor], held: dict[str, Any], groups: dict[str, int], rewritten: dict[str, int]
) -> None:
    assert make_case(body, **held)[2] == groups
    _, structure, found = make_case(body, swap=True, **held)
    assert found == rewritten
    plan = structure.plan({name: [0] for name in rewritten})
    assert list(plan.programs) == ([""] if rewritten else [])


def test_one_number_for_two_dims_ties_them() -> None:
    """q and k are as wide as v only because one attribute says so: they shrink together."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 5
            self.one, self.other, self.read = nn.Linear(4, 10), nn.Linear(4, 5), nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            one = self.one(x).view(-1, 2, self.width)
            return self.read(torch.cat([one.flatten(1), self.other(x).view(-1, self.width)], 1))

    model, x = randomised(Two().eval()), torch.randn(3, 4)
    structure = analyze(trace(model, (x,)), swap=False)
    assert [(group.name, group.size) for group in structure.groups] == [("one", 5)]
    plan = structure.plan({"one": [0, 3]})
    assert plan.attributes[""] == {"width": 2}
    assert verify(structure, model, apply_plan(model, plan), plan, ((x,), {})).error <= 1e-5
    structure = analyze(trace(model, (x,)))  # a rewritten view can have another 2, but one number stays one number
    assert [(group.name, group.size) for group in structure.groups] == [("one", 2), ("one#2", 5)]
    plan = structure.plan({"one#2": [0, 3]})
    assert plan.attributes[""] == {"width": 2} and not plan.programs
    for plan in (structure.plan({"one": [1]}), structure.plan({"one": [0], "one#2": [0, 3]})):
        assert verify(structure, model, apply_plan(model, plan), plan, ((x,), {})).error <= 1e-5


def test_a_list_stays_a_list_and_a_tuple_a_tuple() -> None:
    for kind in (list, tuple):
        model, structure, _ = make_case(lambda m, x: x.view(2, *m.shape), shape=kind((3, 4)))
        small = apply_plan(model, structure.plan({"write": [0]}))
        assert small.shape == kind((1, 4)) and model.shape == kind((3, 4))


def test_a_layer_derived_from_one_of_torch_is_mended_too() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 6), nn.ReLU(), nn.Linear(6, 2))
    small = apply_plan(model, analyze(trace(model, (sequence(4),))).plan({"0": [1, 2]}))
    assert (small[0].out_features, small[2].in_features) == (2, 2)


def test_a_cut_that_the_code_cannot_express_is_refused_with_the_reason() -> None:
    """Ints that agree with every trial cut but not with this one would be reported here."""
    structure = structure_of("pre-norm, fused")
    heads = structure.group("blocks.0.attn.qkv:heads")
    wrong = Demand(Literal(2), None, structure.layout.dims["linear"][0][2], "size[1] of view", node="linear")
    strict = Structure(**{**vars(structure), "demands": (*structure.demands, wrong)})
    with pytest.raises(PlanError, match=r"can't run with this cut: size\[1\] of view is always 2: .*keep these groups"):
        strict.plan({heads.name: [0], "embed": [0]})


# ------------------------------------------------------------------------------------------------------ the solver


def values(**sizes: int) -> Values:
    """Values with no tensors: only attributes and literals."""
    return Values(structure_of("mlp").layout, structure_of("mlp").presence({}))


def attribute(name: str, value: int) -> Attribute:
    return Attribute("", name, None, value)


def product(*parts: Any) -> Operation:
    return Operation("*", parts, 0)


def test_the_largest_value_that_meets_all_demands_is_found() -> None:
    """dim // 4 must be 2, which 8 to 11 give, and dim itself must be 8."""
    dim = attribute("dim", 16)
    quotient = Operation("//", (dim, Literal(4)), 4)
    demands = [Demand(quotient, Literal(2), None, "quotient"), Demand(dim, Literal(8), None, "dim")]
    found = values()
    assert solve_attributes(demands, found) == []
    assert found.solved == {dim: 8}


def test_two_attributes_are_told_apart_by_a_second_demand() -> None:
    heads, width = attribute("heads", 4), attribute("width", 8)
    demands = [
        Demand(product(heads, width), Literal(12), None, "both"),
        Demand(heads, Literal(2), None, "heads"),
    ]
    found = values()
    assert solve_attributes(demands, found) == []
    assert found.solved == {heads: 2, width: 6}


def test_what_is_fixed_or_contradicts_itself_is_reported() -> None:
    heads = attribute("heads", 4)
    demands = [Demand(heads, Literal(2), None, "one"), Demand(heads, Literal(3), None, "other")]
    assert [demand.place for demand in solve_attributes(demands, values())] == ["other"]
    assert [demand.place for demand in solve_attributes(demands[:1], values(), {heads})] == ["one"]
    assert demands[0].why(values(), {heads}) == "one comes from heads, which the code also uses as a number"
    found = values()
    found.solved[heads] = 2
    assert demands[1].why(found, set()) == "other is computed as heads, which gives 2, not 3"


def test_a_division_by_zero_meets_nothing() -> None:
    heads = attribute("heads", 4)
    demand = Demand(Operation("//", (Literal(8), heads), 2), Literal(0), None, "division")
    assert solve_attributes([demand], values()) == [demand]


def test_what_describes_a_convolution_waits_for_its_groups() -> None:
    groups, inside = attribute("groups", 4), attribute("in_channels", 8)
    demands = [
        Demand(inside, product(Literal(2), groups), None, "in_channels", defines=inside),
        Demand(groups, Literal(3), None, "groups"),
    ]
    found = values()
    assert solve_attributes(demands, found) == []
    assert found.solved == {groups: 3, inside: 6}


def test_a_size_that_counts_from_the_end_is_negative() -> None:
    structure = structure_of("mlp")
    dim = structure.layout.tensors["0.weight"][0]
    start = attribute("start", -6)
    demand = Demand(start, None, dim, "start", sign=-1)
    assert demand.holds(Values(structure.layout, structure.presence({})))
    cut = Values(structure.layout, structure.presence({"0": [0, 1]}))
    assert demand.target(cut) == -2 and solve_attributes([demand], cut) == [] and cut.solved == {start: -2}
    assert str(Extent("linear", 1, 6)) == "size 1 of linear"
