"""What was cut twice is described by one plan for the original, whatever the network."""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from idap.errors import PlanError, StructureError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.chain import chain_plans
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests.nets import Net, every_net, randomised, sequence, structure_of


def random_plan(structure: Structure, seed: int, *, blocks: int = 0) -> Plan:
    dice = random.Random(seed)
    keep = {group.name: dice.sample(range(group.size), -(-2 * group.size // 3)) for group in structure.groups}
    return structure.plan(keep, tuple(block.name for block in structure.blocks[:blocks]))


@every_net
def test_two_cuts_are_one(net: Net) -> None:
    model = randomised(net.model()).eval()
    first = random_plan(structure_of(net.name), 0, blocks=1)
    once = apply_plan(model, first)
    try:
        structure = analyze(trace(once, net.args, net.kwargs), swap=net.swap)
    except StructureError:
        pytest.skip("the first cut leaves nothing to be removed")
    second = random_plan(structure, 1, blocks=1)
    twice = apply_plan(once, second)
    both = chain_plans(first, second)
    found = apply_plan(model, both)
    assert both.shapes == first.shapes and second
    assert_close(found.state_dict(), twice.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        assert_close(found(*net.args, **net.kwargs), twice(*net.args, **net.kwargs), rtol=0, atol=0)
    assert Plan.from_json(both.to_json()) == both
    for name, units in both.keep.items():
        if name in first.keep and name in second.keep:
            assert set(units) < set(first.keep[name]) and len(units) == len(second.keep[name])


class Attentive(nn.Module):
    """torch's own attention, whose code can follow no cut of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(16, 8, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attn(x, x, x, need_weights=False)[0])


def test_code_that_was_written_anew_twice() -> None:
    model, inputs = randomised(Attentive()).eval(), (sequence(16),)
    first = analyze(trace(model, inputs)).plan({"attn:heads": [0, 2, 3, 5, 7]})
    once = apply_plan(model, first)
    second = analyze(trace(once, inputs)).plan({"attn:heads": [1, 4]})
    assert first.programs.keys() == second.programs.keys() == {"attn"}
    twice, found = apply_plan(once, second), apply_plan(model, chain_plans(first, second))
    assert chain_plans(first, second).programs == second.programs
    assert chain_plans(first, second).keep == {"attn:heads": (2, 7)}
    assert torch.equal(found(*inputs), twice(*inputs))


def layers(*sizes: int) -> dict[str, tuple[int, ...]]:
    return {f"{place}.weight": (size,) for place, size in enumerate(sizes)}


ONE = Plan(tensors={"0.weight": {0: (0, 2, 3)}}, shapes=layers(5, 4, 6), replaced={"2": "identity"}, removed=("2",))


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (Plan(shapes=layers(3, 4, 6)), r"names tensor '2\.weight', which the model of the earlier plan lacks"),
        (
            Plan(shapes=layers(5, 4)),
            r"tensor '0\.weight' with shape \(3,\), the later one expects \(5,\): it was made for",
        ),
        (
            Plan(shapes={"0.weight": (3,)}),
            r"tensor '1\.weight' with shape \(4,\), the later one expects no such tensor",
        ),
        (
            Plan(shapes=layers(3, 4), replaced={"2.fc": "zero"}),
            r"changes module '2\.fc', which the earlier plan removes",
        ),
    ],
)
def test_a_plan_for_another_model_is_refused(later: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        chain_plans(ONE, later)


def test_what_lies_in_a_removed_module_is_forgotten() -> None:
    earlier = Plan(
        tensors={"a.w": {0: (1,)}, "b.w": {0: (1, 2)}},
        shapes={"a.w": (3,), "a.inner.w": (2,), "b.w": (3,)},
        attributes={"a": {"size": 1}, "b": {"size": 2, "other": 7}},
        replaced={"a.inner": "zero"},
        removed=("a.inner",),
    )
    later = Plan(
        shapes={"a.w": (1,), "b.w": (2,)},
        attributes={"b": {"size": 1}},
        tensors={"b.w": {0: (1,)}},
        replaced={"a": "zero"},
    )
    both = chain_plans(earlier, later)
    assert both.replaced == {"a": "zero"} and both.tensors == {"b.w": {0: (2,)}}
    assert both.attributes == {"b": {"size": 1, "other": 7}} and both.removed == ("a.inner",)


def test_groups_whose_units_are_counted_differently_are_left_out() -> None:
    earlier = Plan(keep={"attn": (0, 2), "fc": (1, 3)}, shapes=layers(2))
    later = Plan(keep={"attn": (0, 5), "fc": (1,), "new": (4,)}, shapes=layers(2))
    assert chain_plans(earlier, later).keep == {"fc": (3,), "new": (4,)}
