"""Any plan, on any net: the cut module equals the masked original, and the user's model is as it was."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from idap.errors import VerificationError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan, apply_plan_
from idap.surgery.verify import verify
from tests import nets

Case = tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]


def _pre(attention: Callable[[], nn.Module], feed_forward: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nets.Encoder(4, 8, *(nets.PreNorm(8, attention(), feed_forward()) for _ in range(2)))


def _fused() -> nn.Module:
    return nets.FusedAttention(8, 2, 3)


def _written() -> nn.Module:
    return nets.WrittenAttention(8, 2, 4)


def _feed_forward() -> nn.Module:
    return nets.FeedForward(8, 10)


CASES: dict[str, Case] = {
    "mlp": (nets.mlp, (nets.sequence(4),), {}),
    "vgg": (nets.VGG, (nets.images(),), {}),
    "conv1d, prelu": (nets.ConvAndLinear1d, (torch.randn(2, 3, 8),), {}),
    "group norm": (nets.GroupNormNet, (nets.images(),), {}),
    "resnet basic": (
        lambda: nets.ResNet(nets.Basic(6, 6), nets.Basic(6, 8, 2), nets.Basic(8, 8), stem=6, width=8),
        (nets.images(),),
        {},
    ),
    "resnet bottleneck": (
        lambda: nets.ResNet(nets.Bottleneck(6, 4, 10), nets.Bottleneck(10, 4, 10), stem=6, width=10),
        (nets.images(),),
        {},
    ),
    "padded shortcut, literal": (
        lambda: nets.ResNet(nets.CifarBlock(4, 4), nets.CifarBlock(4, 8, nets.PadLiteral()), stem=4, width=8),
        (nets.images(),),
        {},
    ),
    "padded shortcut, held": (
        lambda: nets.ResNet(nets.CifarBlock(4, 4), nets.CifarBlock(4, 9, nets.PadHeld(2, 3)), stem=4, width=9),
        (nets.images(),),
        {},
    ),
    "mobilenet": (nets.MobileNet, (nets.images(),), {}),
    "squeeze and excite": (nets.SENet, (nets.images(),), {}),
    "grouped": (nets.GroupedNet, (nets.images(),), {}),
    "shufflenet": (nets.ShuffleNet, (nets.images(),), {}),
    "densenet": (nets.DenseNet, (nets.images(),), {}),
    "unet": (nets.UNet, (nets.images(),), {}),
    "fused attention": (_pre(_fused, _feed_forward), (nets.sequence(4),), {}),
    "written attention": (_pre(_written, lambda: nets.SwiGLU(8, 6)), (nets.sequence(4),), {}),
    "einsum attention": (_pre(lambda: nets.EinsumAttention(8, 2), _feed_forward), (nets.sequence(4),), {}),
    "post norm": (
        lambda: nets.Encoder(4, 8, nets.PostNorm(8, nets.FusedAttention(8, 4, 2), nets.FeedForward(8, 10))),
        (nets.sequence(4),),
        {},
    ),
    "layer scale, class token": (
        lambda: nets.VisionTransformer(8, nets.LayerScale(8, nets.WrittenAttention(8, 2, 4), nets.FeedForward(8, 6))),
        (nets.images(),),
        {},
    ),
    "torch encoder": (nets.TorchEncoder, (nets.sequence(4),), {}),
    "hybrid": (nets.Hybrid, (nets.images(),), {}),
    "language model": (nets.LanguageModel, (nets.tokens(),), {"mask": torch.ones(2, 5)}),
    "shared": (nets.Shared, (nets.sequence(4),), {}),
    "in place": (nets.InPlace, (torch.randn(3, 4),), {}),
    "scale from shape": (nets.ScaleFromShape, (torch.randn(3, 4),), {}),
}

_built: dict[str, tuple[nn.Module, Structure]] = {}


def case(name: str) -> tuple[nn.Module, Structure, tuple[Any, ...], dict[str, Any]]:
    make, args, kwargs = CASES[name]
    if name not in _built:
        torch.manual_seed(0)
        model = nets.randomised(make().eval())
        _built[name] = model, analyze(trace(model, args, kwargs))
    return (*_built[name], args, kwargs)


def random_plan(structure: Structure, seed: int, *, share: float, blocks: bool = True) -> Plan:
    random = np.random.default_rng(seed)
    keep = {
        group.name: np.sort(random.permutation(group.size)[: random.integers(1, group.size + 1)]).tolist()
        for group in structure.groups
        if random.random() < share
    }
    removed = [block.name for block in structure.blocks if blocks and random.random() < 0.4]
    inner = {name for block in structure.blocks if block.name in removed for name in block.contains}
    return structure.plan(keep, [name for name in removed if name not in inner])


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        found = model(*args, **kwargs)
    return [found] if isinstance(found, Tensor) else list(found.values())


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.3, 1.0]))
def test_a_cut_module_equals_the_masked_original(name: str, seed: int, share: float) -> None:
    model, structure, args, kwargs = case(name)
    before = copy.deepcopy(model.state_dict())
    plan = random_plan(structure, seed, share=share)
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, (args, kwargs)).error <= 1e-4
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for key, tensor in [*small.named_parameters(), *small.named_buffers()]:
        assert tuple(tensor.shape) == plan.shape_after(key)


@pytest.mark.parametrize("name", CASES)
def test_in_float64_the_difference_is_rounding(name: str) -> None:
    model, structure, args, kwargs = case(name)
    doubled = [leaf.double() if leaf.is_floating_point() else leaf for leaf in args]
    plan = random_plan(structure, 3, share=1.0)
    wide_model = copy.deepcopy(model).double()
    small = apply_plan(wide_model, plan)
    wide = {key: value.double() for key, value in kwargs.items()}
    assert verify(structure, wide_model, small, plan, (tuple(doubled), wide)).error <= 1e-11


@pytest.mark.parametrize("name", CASES)
def test_the_eager_original_with_zeroed_weights_agrees_where_no_norm_is_crossed(name: str) -> None:
    """An oracle that knows nothing of graphs: zeros in the original's own weights, run by its own code."""
    model, structure, args, kwargs = case(name)
    plan = random_plan(structure, 5, share=0.6, blocks=False)
    small = apply_plan(model, plan)
    if verify(structure, model, small, plan, (args, kwargs)).crossed:
        pytest.skip("this plan crosses a norm; there a zero is not an absence")
    masked = copy.deepcopy(model)
    tensors = dict([*masked.named_parameters(), *masked.named_buffers()])
    with torch.no_grad():
        for key, dims in plan.tensors.items():
            for dim, kept in dims.items():
                gone = [slot for slot in range(tensors[key].shape[dim]) if slot not in kept]
                tensors[key].index_fill_(dim, torch.tensor(gone), 0.0)
    for mine, theirs in zip(outputs(small, args, kwargs), outputs(masked, args, kwargs), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_plans_compose(name: str) -> None:
    model, structure, args, kwargs = case(name)
    first = random_plan(structure, 7, share=0.7)
    keep = {
        group.name: first.keep.get(group.name, tuple(range(group.size)))[:: 2 if group.index % 2 else 1]
        for group in structure.groups
    }
    second = structure.plan(keep, first.removed)
    once = apply_plan(model, second)
    twice = apply_plan(apply_plan(model, first), second.since(first))
    assert {k: v.tolist() for k, v in once.state_dict().items()} == {
        k: v.tolist() for k, v in twice.state_dict().items()
    }
    for mine, theirs in zip(outputs(once, args, kwargs), outputs(twice, args, kwargs), strict=True):
        assert torch.equal(mine, theirs)
    half = apply_plan(model, first)
    assert verify(structure, half, twice, second, (args, kwargs), since=first).error <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_in_place_does_the_same_and_ties_stay_tied(name: str) -> None:
    model, structure, args, kwargs = case(name)
    plan = random_plan(structure, 11, share=1.0)
    small, mutated = apply_plan(model, plan), copy.deepcopy(model)
    assert apply_plan_(mutated, plan) is mutated
    for mine, theirs in zip(outputs(small, args, kwargs), outputs(mutated, args, kwargs), strict=True):
        assert torch.equal(mine, theirs)
    for alias, canonical in structure.graph.aliases.items():
        if not plan.removes(alias) and not plan.removes(canonical):
            assert small.get_parameter(alias) is small.get_parameter(canonical)


@pytest.mark.parametrize("name", CASES)
def test_every_block_and_branch_can_go_alone(name: str) -> None:
    model, structure, args, kwargs = case(name)
    for block in structure.blocks:
        plan = structure.plan({}, [block.name])
        small = apply_plan(model, plan)
        assert verify(structure, model, small, plan, (args, kwargs)).error <= 1e-4
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_list_of_slots_rolled_by_one_is_caught(name: str) -> None:
    """The negative control: if this passed, the proof would prove nothing."""
    model, structure, args, kwargs = case(name)
    group = max((g for g in structure.groups if g.readers), key=lambda g: g.size)
    plan = structure.plan({group.name: list(range(0, group.size, 2))})
    key, dim = next((name, dim) for name, dim in reversed(group.members) if dim in plan.tensors.get(name, {}))
    size = plan.shapes[key][dim]
    rolled = tuple(sorted((slot + 1) % size for slot in plan.tensors[key][dim]))
    wrong = replace(plan, tensors={**plan.tensors, key: {**plan.tensors[key], dim: rolled}})
    with pytest.raises(VerificationError, match="differs from the masked original"):
        verify(structure, model, apply_plan(model, wrong), plan, (args, kwargs))
