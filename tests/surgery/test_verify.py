"""The proof: what it accepts, what it catches, and that it leaves everything as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idap.errors import VerificationError
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import Proof, masked_outputs, verify
from tests.nets import Net, by_name, every_net, randomised, sequence, structure_of

Parts = tuple[Structure, nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]


def parts(name: str) -> Parts:
    net = by_name[name]
    return structure_of(name), net.model(), (net.args, dict(net.kwargs))


@every_net
def test_doing_nothing_is_proved(net: Net) -> None:
    structure, model, inputs = parts(net.name)
    proof = verify(structure, model, model, structure.plan({}), inputs)
    assert proof.error < 1e-5 and proof.crossed == ()


def test_the_proof_tells_where_the_reference_had_to_leave_slots_out() -> None:
    structure, model, inputs = parts("pre-norm, fused")
    plan = structure.plan({"blocks.0.mlp.fc1": [0, 1]})
    assert verify(structure, model, apply_plan(model, plan), plan, inputs).crossed == ()
    plan = structure.plan({"embed": [0, 1, 5]})
    crossed = verify(structure, model, apply_plan(model, plan), plan, inputs).crossed
    assert {structure.graph.nodes[name].op for name in crossed} == {"aten.layer_norm.default"} and len(crossed) == 5


def test_one_wrong_value_is_caught_and_the_cut_is_named() -> None:
    structure, model, inputs = parts("pre-norm, fused")
    plan = structure.plan({"blocks.0.mlp.fc1": [0, 1], "blocks.1.attn.qkv:heads": [1]}, ["blocks.0.norm1…attn"])
    small = apply_plan(model, plan)
    with torch.no_grad():
        small.blocks[0].mlp.fc1.bias[1] += 5
    message = (
        r"differs from the masked original by 0\.\d+ of its largest output, allowed is 0\.0001 "
        r"\(cut: blocks.0.mlp.fc1, blocks.1.attn.qkv:heads, blocks.0.norm1…attn\)"
    )
    with pytest.raises(VerificationError, match=message):
        verify(structure, model, small, plan, inputs)


def test_a_model_that_does_not_run_is_caught() -> None:
    structure, model, inputs = parts("pre-norm, fused")
    plan = structure.plan({"blocks.0.attn.qkv:heads": [1]})
    small = apply_plan(model, plan)
    small.blocks[0].attn.num_heads = 2
    with pytest.raises(VerificationError, match=r"does not run: RuntimeError: .*\(cut: blocks.0.attn.qkv:heads\)"):
        verify(structure, model, small, plan, inputs)


def test_wrong_attributes_that_run_are_caught() -> None:
    """Two heads of width 2 in place of one of width 4: every shape fits, the result does not."""
    structure, model, inputs = parts("vision transformer")
    plan = structure.plan({"blocks.0.attn.qkv:heads": [1]})
    small = apply_plan(model, plan)
    small.blocks[0].attn.num_heads, small.blocks[0].attn.head_dim = 2, 2
    with pytest.raises(VerificationError, match="differs from the masked original"):
        verify(structure, model, small, plan, inputs)


class Returns(nn.Module):
    def __init__(self, how: str = "one") -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Any:
        x = self.two(self.one(x).relu())
        return {
            "one": x,
            "two": (x, x),
            "short": x[:1],
            "nan": torch.full_like(x, float("nan")),
            "ints": {"best": x.argmax(-1), "mask": x.masked_fill(x < 0, float("-inf"))},
        }[self.how]


def cut_pair(how: str, small_how: str) -> tuple[Structure, nn.Module, nn.Module, Plan]:
    model = randomised(Returns(how).eval())
    structure = analyze(trace(model, (sequence(4),)))
    plan = structure.plan({"one": [0, 1, 4]})
    small = apply_plan(model, plan)
    small.how = small_how
    return structure, model, small, plan


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("two", r"returns 2 tensors, the original 1 \(cut: one\)"),
        ("short", r"output 0 of the cut model has shape \(1, 5, 3\), that of the masked original \(2, 5, 3\)"),
        ("nan", "differs from the masked original by inf"),
    ],
)
def test_outputs_of_another_kind_are_caught(how: str, message: str) -> None:
    structure, model, small, plan = cut_pair("one", how)
    with pytest.raises(VerificationError, match=message):
        verify(structure, model, small, plan, ((sequence(4),), {}))


def test_integers_must_be_equal_and_infinities_in_their_places() -> None:
    structure, model, small, plan = cut_pair("ints", "ints")
    assert verify(structure, model, small, plan, ((sequence(4),), {})).error < 1e-5
    with torch.no_grad():
        small.two.bias[0] += 100
    with pytest.raises(VerificationError, match="by inf of its largest output"):
        verify(structure, model, small, plan, ((sequence(4),), {}))


def test_a_number_computed_from_a_size_unseen_is_caught() -> None:
    """A float that comes first takes an int by its value: the analysis can't see it, the proof does."""

    class Unseen(Returns):
        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x).relu()
            return self.two(x * (0.5 * x.shape[-1]))

    model = randomised(Unseen().eval())
    structure = analyze(trace(model, (sequence(4),)))
    plan = structure.plan({"one": [0, 1, 4]})
    with pytest.raises(VerificationError, match="differs from the masked original"):
        verify(structure, model, apply_plan(model, plan), plan, ((sequence(4),), {}))


def test_the_tolerance_is_the_callers() -> None:
    structure, model, inputs = parts("mlp")
    plan = structure.plan({"0": [0, 1]})
    small = apply_plan(model, plan)
    with torch.no_grad():
        small[4].bias += 0.01
    with pytest.raises(VerificationError, match=r"allowed is 0\.0001"):
        verify(structure, model, small, plan, inputs)
    assert isinstance(verify(structure, model, small, plan, inputs, tolerance=1.0), Proof)


def test_nothing_is_changed_by_a_proof() -> None:
    """In-place operators on the inputs, training modes, weights: all as before."""

    class Rude(Returns):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.relu_().mul_(2))

    model, x = randomised(Rude()), sequence(4)
    before, state = x.clone(), copy.deepcopy(model.state_dict())
    structure = analyze(trace(model, (x,)))
    plan = structure.plan({"one": [0, 2]})
    small = apply_plan(model, plan)
    small.one.eval()
    assert verify(structure, model, small, plan, ((x,), {})).error < 1e-5
    assert torch.equal(x, before)
    assert model.training and small.training and not small.one.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_inputs_by_keyword_and_outputs_in_a_dict() -> None:
    structure, model, inputs = parts("language model")
    plan = structure.plan({"embed": [0, 3, 5], "block.attn.qkv:heads": [1]})
    proof = verify(structure, model, apply_plan(model, plan), plan, (inputs[0], {"mask": torch.rand(2, 5)}))
    assert proof.error < 1e-4


def test_the_reference_is_the_original_where_nothing_is_masked() -> None:
    structure, model, (args, _) = parts("resnet basic")
    with torch.no_grad():
        expected = model(*args)
    (found,) = masked_outputs(structure, model, structure.plan({}), args)
    torch.testing.assert_close(found, expected)


def test_a_removed_block_is_skipped_in_the_reference() -> None:
    structure, model, (args, _) = parts("resnet basic")
    plan = structure.plan({}, ["layers.1"])
    (found,) = masked_outputs(structure, model, plan, args)
    model.layers[1] = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(found, model(*args))
