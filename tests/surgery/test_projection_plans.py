"""Projections in place of blocks: any plan equals the masked reference, later cuts run through them."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from idap.errors import PlanError, VerificationError
from idap.graph.run import tensors_of
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.chain import chain_plans
from idap.structure.plan import CallForm, Plan
from idap.structure.replacement import Projected
from idap.surgery.apply import apply_plan, apply_plan_
from idap.surgery.stand_ins import LinearMap, Projection, stand_in, trial_map
from idap.surgery.verify import verify
from tests import nets
from tests.surgery.test_random_plans import outputs


class Tall(nn.Module):
    """Blocks of linear layers that change the width, in a list; the second adds a shortcut."""

    class Step(nn.Module):
        def __init__(self, inside: int, outside: int, *, adds: bool) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(inside, 12), nn.Linear(12, outside)
            self.shortcut = nn.Linear(inside, outside) if adds else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(torch.relu(self.up(x)))
            return y if self.shortcut is None else y + self.shortcut(x)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.steps = nn.ModuleList([self.Step(6, 8, adds=False), self.Step(8, 5, adds=True)])
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for step in self.steps:
            x = torch.tanh(step(x))
        return self.last(x)


def _resnet() -> nn.Module:
    blocks = nets.Basic(6, 6), nets.Basic(6, 8, 2), nets.Basic(8, 8), nets.Basic(8, 12, 2)
    return nets.ResNet(*blocks, stem=6, width=12)


def _conv1d() -> nn.Module:
    def block(inside: int, outside: int, stride: int) -> nn.Module:
        convs = nn.Conv1d(inside, 9, 3, stride, 1), nn.ReLU(), nn.Conv1d(9, outside, 3, 1, 1)
        return nn.Sequential(*convs, nn.ReLU(inplace=True))

    pool = nn.AdaptiveAvgPool1d(1), nn.Flatten()
    return nn.Sequential(nn.Conv1d(3, 5, 1), block(5, 7, 2), block(7, 6, 1), *pool, nn.Linear(6, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "resnet basic": (_resnet, (nets.images(),)),
    "resnet bottleneck": (
        lambda: nets.ResNet(nets.Bottleneck(6, 4, 10), nets.Bottleneck(10, 6, 12, 2), stem=6, width=12),
        (nets.images(),),
    ),
    "odd sizes": (_resnet, (nets.images(size=9),)),
    "padded shortcut": (
        lambda: nets.ResNet(nets.CifarBlock(4, 4), nets.CifarBlock(4, 8, nets.PadLiteral()), stem=4, width=8),
        (nets.images(),),
    ),
    "mobilenet": (nets.MobileNet, (nets.images(),)),
    "shufflenet": (nets.ShuffleNet, (nets.images(),)),
    "densenet": (nets.DenseNet, (nets.images(),)),
    "linear": (Tall, (nets.sequence(4),)),
    "conv1d": (_conv1d, (torch.randn(2, 3, 8),)),
    "post norm": (
        lambda: nets.Encoder(4, 8, nets.PostNorm(8, nets.FusedAttention(8, 4, 2), nets.FeedForward(8, 10))),
        (nets.sequence(4),),
    ),
    "torch encoder": (nets.TorchEncoder, (nets.sequence(4),)),
}

_built: dict[str, tuple[nn.Module, Structure]] = {}


def case(name: str) -> tuple[nn.Module, Structure, tuple[Any, ...]]:
    make, args = CASES[name]
    if name not in _built:
        torch.manual_seed(0)
        model = nets.randomised(make().eval())
        _built[name] = model, analyze(trace(model, args), replacement="projection")
    return (*_built[name], args)


def random_plan(structure: Structure, seed: int, *, share: float = 0.6, chance: float = 0.6) -> Plan:
    """Some units of some groups, and some blocks, of which one at least becomes a projection."""
    random = np.random.default_rng(seed)
    keep = {
        group.name: np.sort(random.permutation(group.size)[: random.integers(1, group.size + 1)]).tolist()
        for group in structure.groups
        if random.random() < share
    }
    able = [block for block in structure.blocks if block.projected is not None]
    removed = {block.name for block in structure.blocks if random.random() < chance}
    removed |= {able[random.integers(len(able))].name}
    inner = {name for block in structure.blocks if block.name in removed for name in block.contains}
    return structure.plan(keep, sorted(removed - inner))


def maps_for(plan: Plan) -> dict[str, LinearMap]:
    return {path: trial_map(projected) for path, projected in plan.projections.items()}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.3, 1.0]))
def test_a_model_with_projections_equals_the_masked_reference(name: str, seed: int, share: float) -> None:
    model, structure, args = case(name)
    before = copy.deepcopy(model.state_dict())
    plan = random_plan(structure, seed, share=share)
    maps = maps_for(plan)
    small = apply_plan(model, plan, maps)
    assert verify(structure, model, small, plan, (args, {}), maps=maps).error <= 1e-4
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for key, tensor in [*small.named_parameters(), *small.named_buffers()]:
        assert tuple(tensor.shape) == plan.shape_after(key)
    for path, projected in plan.projections.items():
        layer = small.get_submodule(path).get_submodule("map")
        assert {key: getattr(layer, key) for key in projected.attributes} == projected.attributes
        assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_projection_computes_its_map_of_what_enters_the_block(name: str) -> None:
    """An oracle that knows nothing of graphs: hooks around the block of the original."""
    model, structure, args = case(name)
    for block in structure.blocks:
        if block.projected is None:
            continue
        plan = structure.plan({}, [block.name])
        (given,) = maps_for(plan).values()
        x, y = stream_around(apply_plan(model, plan, {block.name: given}), block.name, args)
        step = block.projected.stride
        dim = block.projected.dim
        for axis, size in enumerate(step):
            x = x.index_select(axis + 2, torch.arange(0, x.shape[axis + 2], size))
        expected = torch.einsum("...i,oi->...o", x.movedim(dim, -1), given.weight) + given.bias
        assert torch.allclose(y.movedim(dim, -1), expected, atol=1e-5)
        assert y.shape == stream_around(model, block.name, args)[1].shape


def stream_around(model: nn.Module, path: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _m, given, result: seen.extend([given[0], result]))
    with torch.no_grad():
        model(*(arg.clone() for arg in args))
    hook.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_plans_with_projections_compose(name: str, seed: int) -> None:
    model, structure, args = case(name)
    first = random_plan(structure, seed, chance=0.3)
    maps = maps_for(first)
    keep = {
        group.name: first.keep.get(group.name, tuple(range(group.size)))[:: 2 if group.index % 2 else 1]
        for group in structure.groups
    }
    wider = {*first.removed, *(block.name for block in structure.blocks if block.projected and seed % 2)}
    inner = {name for block in structure.blocks if block.name in wider for name in block.contains}
    second = structure.plan(keep, sorted(wider - inner))
    half = apply_plan(model, first, maps)
    for tensor in half.parameters():  # as if it had been trained: the maps of then no longer count
        tensor.data.mul_(1.01)
    later = {path: given for path, given in maps_for(second).items() if path not in first.projections}
    twice = apply_plan(half, second.since(first), later)
    assert verify(structure, half, twice, second, (args, {}), since=first, maps=later).error <= 1e-4
    shapes = {key: tuple(tensor.shape) for key, tensor in apply_plan(model, second).state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in twice.state_dict().items()} == shapes
    again = Plan.from_json(json.loads(json.dumps(second.to_json())))
    assert again == second and again.since(first) == second.since(first)
    mutated = apply_plan_(copy.deepcopy(half), second.since(first), later)
    for mine, theirs in zip(outputs(mutated, args, {}), outputs(twice, args, {}), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("densenet", "conv1d")])
def test_channels_of_a_projection_rolled_by_one_are_caught(name: str) -> None:
    """The negative control, for a new projection and for one that is cut later."""
    model, structure, args = case(name)
    block = next(b for b in structure.blocks if b.projected and structure.layout.groups_in(_dim(structure, b)))
    keep = {
        structure.groups[index].name: range(0, structure.groups[index].size, 2)
        for index in structure.layout.groups_in(_dim(structure, block))
    }
    plan = structure.plan(keep, [block.name])
    projected = plan.projections[block.name]
    rolled = tuple(sorted((slot + 1) % projected.sizes[1] for slot in projected.inputs))
    wrong = replace(plan, projections={block.name: replace(projected, inputs=rolled)})
    maps = maps_for(plan)
    with pytest.raises(VerificationError, match="differs from the masked original"):
        verify(structure, model, apply_plan(model, wrong, maps), plan, (args, {}), maps=maps)
    whole = structure.plan({}, [block.name])
    made = apply_plan(model, whole, maps)
    right = apply_plan(made, plan.since(whole))
    assert verify(structure, made, right, plan, (args, {}), since=whole).error <= 1e-4
    with pytest.raises(VerificationError, match="differs from the masked original"):
        verify(structure, made, apply_plan(made, wrong.since(whole)), plan, (args, {}), since=whole)


def _dim(structure: Structure, block: Any) -> Any:
    return structure.layout.dims[block.entry][0][block.projected.dim]


def test_in_float64_the_difference_is_rounding() -> None:
    model, structure, (x,) = case("resnet basic")
    plan = random_plan(structure, 3)
    maps, wide = maps_for(plan), copy.deepcopy(model).double()
    small = apply_plan(wide, plan, maps)
    assert {tensor.dtype for tensor in tensors_of(small).values() if tensor.is_floating_point()} == {torch.float64}
    assert verify(structure, wide, small, plan, ((x.double(),), {}), maps=maps).error <= 1e-11


@pytest.mark.parametrize("name", ["resnet basic", "linear"])
def test_what_is_compressed_again_has_one_plan_for_the_original(name: str) -> None:
    model, structure, args = case(name)
    first = random_plan(structure, 5)
    small = apply_plan(model, first, maps_for(first))
    again = analyze(trace(small, args), replacement="auto")
    keep = {group.name: tuple(range(0, group.size, 2)) for group in again.groups}
    second = again.plan(keep, [block.name for block in again.blocks if block.projected is not None])
    smaller = apply_plan(small, second, maps_for(second))
    both = chain_plans(first, second)
    assert Plan.from_json(json.loads(json.dumps(both.to_json()))) == both
    rebuilt = apply_plan(model, both)
    rebuilt.load_state_dict(smaller.state_dict())  # strictly: the same names and shapes
    for mine, theirs in zip(outputs(rebuilt, args, {}), outputs(smaller, args, {}), strict=True):
        assert torch.equal(mine, theirs)


# --------------------------------------------------------------------------------------------------- the stand-in


@pytest.mark.parametrize("stride", [(), (2,), (1, 2), (2, 2, 1)])
def test_a_projection_is_a_plain_layer_that_can_be_copied_exported_and_trained(stride: tuple[int, ...]) -> None:
    projected = Projected((0, 2), (1, 3, 4), (5, 3), stride)
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    module = stand_in("projection", None, projected)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert isinstance(module, Projection) and len(list(module.parameters())) == 2
    x = torch.randn(2, *((2, *(4 for _ in stride)) if stride else (7, 2)))
    assert not module(x).any()
    given = LinearMap(torch.randn(5, 3), torch.randn(5))
    module.take(given, projected)
    weight = given.weight[[1, 3, 4]][:, [0, 2]]
    assert torch.equal(module.get_parameter("map.weight").reshape(3, 2), weight)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_projection_takes_and_gives_what_the_removed_module_did() -> None:
    projected = Projected((0, 1), (0, 1, 2), (3, 2))
    called = CallForm("hidden", ("tuple", ("stream",), ("none",), ("given", "bias")))
    module, x, bias = stand_in("projection", called, projected), torch.randn(4, 2), torch.randn(1, 3)
    assert isinstance(module, Projection)
    given = trial_map(projected)
    module.take(given, projected)
    found = module(hidden=x, mask=None, bias=bias)
    assert torch.allclose(found[0], x @ given.weight.T + given.bias) and found[1] is None and found[2] is bias


def test_a_part_that_vanishes_with_a_projection_may_be_named_beside_it() -> None:
    model, structure, args = case("post norm")
    block = next(block for block in structure.blocks if block.projected is not None and block.contains)
    plan = structure.plan({}, [*block.contains, block.name])
    maps = maps_for(plan)
    assert verify(structure, model, apply_plan(model, plan, maps), plan, (args, {}), maps=maps).error <= 1e-4


def test_a_map_of_other_sizes_is_refused_before_anything_is_cut() -> None:
    model, structure, _ = case("linear")
    plan = structure.plan({}, ["steps.0"])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        PlanError, match=r"weight \(6, 8\) and bias \(8,\) was given for 'steps.0', which has 8 outputs"
    ):
        apply_plan_(model, plan, {"steps.0": LinearMap(torch.zeros(6, 8), torch.zeros(8))})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_projection_without_sizes_is_refused() -> None:
    with pytest.raises(PlanError, match="becomes 'projection' without sizes"):
        stand_in("projection")
    with pytest.raises(PlanError, match="becomes 'zero' with sizes"):
        stand_in("zero", None, Projected((0,), (0,), (1, 1)))
