"""Cutting real modules: what the copy is, what the original stays, and which plans are refused."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from idap.errors import PlanError
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan, apply_plan_, cut_tensor
from idap.surgery.check_plan import check_fit
from idap.surgery.rewritten import original_class
from tests.nets import Net, by_name, every_net, structure_of


def half(net: Net) -> Plan:
    structure = structure_of(net.name)
    return structure.plan(
        {group.name: range(0, group.size, 2) for group in structure.groups}, [b.name for b in structure.blocks[:1]]
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


@every_net
def test_the_copy_is_smaller_and_the_original_untouched(net: Net) -> None:
    model, plan = net.model(), half(net)
    before = {name: (id(tensor), tensor.clone(), tensor.data_ptr()) for name, tensor in tensors(model).items()}
    held = {path: dict(vars(module)) for path, module in model.named_modules()}
    small = apply_plan(model, plan)
    assert isinstance(small, type(model)) and original_class(type(small)) is type(model) and small is not model
    for path, module in small.named_modules():
        assert (type(module) is original_class(type(module))) == (path not in plan.programs)
        assert plan.removes(path) or original_class(type(module)) is type(model.get_submodule(path))
    for name, tensor in tensors(model).items():
        identity, value, place = before[name]
        assert id(tensor) == identity and tensor.data_ptr() == place and torch.equal(tensor, value)
    for path, module in model.named_modules():
        now = vars(module)
        assert all(now[name] is value or now[name] == value for name, value in held[path].items())
    used = {tensor.untyped_storage().data_ptr() for tensor in tensors(model).values()}
    for name, tensor in tensors(small).items():
        assert tensor.untyped_storage().data_ptr() not in used and tensor.is_contiguous()
        canonical = structure_of(net.name).graph.aliases.get(name, name)
        assert tuple(tensor.shape) == plan.shape_after(canonical)
        expected = before[name][1]
        for dim, kept in plan.tensors.get(canonical, {}).items():
            expected = expected.index_select(dim, torch.tensor(kept))
        assert torch.equal(tensor, expected)


@every_net
def test_in_place_makes_the_same_model(net: Net) -> None:
    model, plan = net.model(), half(net)
    expected = apply_plan(model, plan)
    assert apply_plan_(model, plan) is model
    assert repr(model) == repr(expected)
    assert tensors(model).keys() == tensors(expected).keys()
    assert all(torch.equal(tensor, tensors(expected)[name]) for name, tensor in tensors(model).items())
    for (path, mine), (_, theirs) in zip(model.named_modules(), expected.named_modules(), strict=True):
        plain = {name: value for name, value in vars(mine).items() if isinstance(value, int | tuple | list)}
        if isinstance(mine, nn.RNNBase):
            del plain["_flat_weight_refs"]
            assert [id(tensor) for tensor in plain.pop("_flat_weights")] == [id(tensor) for tensor in mine.parameters()]
        assert plain == {name: vars(theirs)[name] for name in plain}, path


@every_net
def test_the_cut_model_trains_and_keeps_its_state_dict(net: Net) -> None:
    small = apply_plan(net.model(), half(net)).train()
    found = small(*net.args, **net.kwargs)
    total = sum(value.sum() for value in (found.values() if isinstance(found, dict) else [found]))
    total.backward()
    fresh = apply_plan(net.model(seed=1), half(net))
    fresh.load_state_dict(small.state_dict())
    assert all(parameter.requires_grad for parameter in small.parameters())


def test_ties_stay_tied() -> None:
    net = by_name["language model"]
    structure, model = structure_of(net.name), net.model()
    plan = structure.plan({"embed": [0, 2, 5]})
    for small in (apply_plan(model, plan), apply_plan_(copy.deepcopy(model), plan)):
        assert small.head.weight is small.embed.weight and small.head.weight.shape == (11, 3)
    assert model.head.weight is model.embed.weight


def test_frozen_parameters_and_training_modes_stay_so() -> None:
    net = by_name["vgg"]
    model = net.model()
    model.features[0].weight.requires_grad_(False)
    model.features[1].train()
    small = apply_plan(model, half(net))
    assert not small.features[0].weight.requires_grad and small.features[0].bias.requires_grad
    assert small.features[1].training and not small.features[4].training


def test_the_state_of_persistent_buffers_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    plan = Plan(
        keep={"0": (1,)},
        tensors={"0.weight": {0: (1,)}, "0.bias": {0: (1,)}, "2.weight": {1: (1,)}, "scratch": {0: (2,)}},
        shapes={"0.weight": (6, 4), "0.bias": (6,), "2.weight": (2, 6), "scratch": (3,)},
    )
    for small in (apply_plan(model, plan), apply_plan_(model, plan)):
        assert "scratch" not in small.state_dict() and small.scratch.shape == (1,)


def test_hooks_of_the_model_are_kept() -> None:
    net, seen = by_name["mlp"], []
    model = net.model()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    apply_plan(model, half(net))(*net.args)
    assert seen == [(2, 5, 3)]


def test_a_tensor_is_cut_along_several_dims() -> None:
    found = cut_tensor(torch.arange(24).reshape(2, 3, 4), {1: (0, 2), 2: (1,)})
    assert found.tolist() == [[[1], [9]], [[13], [21]]] and found.is_contiguous()


PLAN = structure_of("vgg").plan({"features.0": [0, 1], "classifier.0": [3]})


def other(**changes: object) -> Plan:
    return replace(PLAN, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            other(shapes={**PLAN.shapes, "features.0.weight": (5, 3, 3, 3)}),
            r"tensor 'features.0.weight' has shape \(4, 3, 3, 3\), the plan expects \(5, 3, 3, 3\); build the model",
        ),
        (
            other(shapes={"stem.weight": (4, 3), **PLAN.shapes}),
            r"does not fit this model: it has no tensor 'stem.weight' \(expected shape \(4, 3\)\)",
        ),
        (other(tensors={"stem.weight": {0: (1,)}}), "cuts tensor 'stem.weight' but does not give the shape"),
        (
            other(tensors={"features.0.weight": {0: (0, 4)}}),
            r"keeps slot 4 of dimension 0 of tensor 'features.0.weight', which has shape \(4, 3, 3, 3\)",
        ),
        (other(tensors={"features.0.weight": {0: (-1,)}}), "keeps slot -1 of dimension 0 of tensor"),
        (other(tensors={"features.0.weight": {4: (0,)}}), "keeps slot 0 of dimension 4 of tensor"),
        (other(tensors={"features.0.weight": {0: ()}}), "keeps no slot of dimension 0 of tensor"),
        (other(attributes={"stem": {"out_channels": 2}}), "does not fit this model: it has no module 'stem'"),
        (other(attributes={"features.0": {"heads": 2}}), "module 'features.0' has no attribute 'heads'"),
        (other(replaced={"features.9": "zero"}), "does not fit this model: it has no module 'features.9'"),
        (other(replaced={"features.1": "nothing"}), "can become 'identity', 'zero' or 'projection', found 'nothing'"),
        (other(replaced={"": "identity"}), "a plan can't replace the whole model"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_touched(plan: Plan, message: str) -> None:
    model = by_name["vgg"].model()
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    for act in (check_fit, apply_plan, apply_plan_):
        with pytest.raises(PlanError, match=message):
            act(model, plan)
    assert repr(model) == text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plan_does_not_fit_the_model_it_was_applied_to() -> None:
    small = apply_plan(by_name["vgg"].model(), PLAN)
    with pytest.raises(
        PlanError, match=r"'features.0.weight' has shape \(2, 3, 3, 3\), the plan expects \(4, 3, 3, 3\)"
    ):
        apply_plan(small, PLAN)
    check_fit(small, PLAN.since(PLAN))
