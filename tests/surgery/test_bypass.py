"""What stands in for a removed module."""

import copy

import pytest
import torch
from torch import nn

from idap.errors import PlanError
from idap.structure.plan import CallForm
from idap.surgery.stand_ins import Pass, Zero, stand_in


def test_pass_returns_its_first_argument_whatever_else_it_is_given() -> None:
    x = torch.randn(2, 3)
    assert Pass()(x) is x
    assert Pass()(x, torch.ones(1), mask=None, causal=True) is x


def test_zero_is_like_its_first_argument() -> None:
    x = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    found = Zero()(x, None, mask=x)
    assert torch.equal(found, torch.zeros(2, 3, dtype=torch.float64)) and not found.requires_grad
    assert Zero()(torch.empty(2, 3, device="meta")).device.type == "meta"


def test_stand_ins_by_name() -> None:
    assert type(stand_in("identity")) is Pass and type(stand_in("zero")) is Zero
    with pytest.raises(PlanError, match=r"can become 'identity', 'zero' or 'projection', found 'gone'"):
        stand_in("gone")


@pytest.mark.parametrize("kind", ["identity", "zero"])
def test_stand_ins_hold_nothing_and_can_be_copied_and_exported(kind: str) -> None:
    module = nn.Sequential(stand_in(kind), nn.Linear(3, 2))
    assert not list(module[0].parameters()) and not list(module[0].buffers())
    x = torch.ones(1, 3)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_a_stand_in_takes_and_gives_what_the_removed_module_did() -> None:
    x, bias = torch.randn(2, 3), torch.randn(1, 3)
    called = CallForm("hidden", ("tuple", ("stream",), ("none",), ("given", "bias")))
    found = stand_in("zero", called)(hidden=x, mask=None, bias=bias)
    assert torch.equal(found[0], torch.zeros(2, 3)) and found[1] is None and found[2] is bias
    assert stand_in("identity", CallForm(1, ("list", ("stream",))))(bias, x) == [x]
    with pytest.raises(PlanError, match="can't return"):
        stand_in("identity", CallForm(0, ("everything",)))(x)
