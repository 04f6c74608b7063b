"""Gradients of gates against gates: multiply the units where they are read, and go back sample by sample."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from idap.divergence.measure import measure, measure_all
from idap.divergence.observe import Pass
from idap.errors import TaskError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from tests import nets
from tests.divergence.parts import Convs, Mlp, build

DRAW = torch.Generator().manual_seed(4)
VECTORS, TOKENS, IMAGES = (torch.randn(5, *shape, generator=DRAW) for shape in ((4,), (6, 4), (3, 6, 6)))
LABELS = torch.tensor([0, 2, 1, 1, 0])


def crossentropy(outputs, labels):
    return F.cross_entropy(outputs if outputs.dim() == 2 else outputs.mean(1), labels)


def labelled_passes(*parts, loss=crossentropy):
    return [Pass(lambda m, x=x: m(x), lambda out, y=y: loss(out, y)) for x, y in parts]


def gate_derivatives(model, batch, size, readers, *, width=1, dim=-1):
    """Per-sample derivative of the loss with respect to a gate on each unit, shape (samples, units)."""
    model = copy.deepcopy(model).double()
    gate = torch.ones(size, dtype=torch.float64, requires_grad=True)
    for path in readers:

        def close(_module, given):
            full = gate.repeat_interleave(width)
            return (given[0] * (full if dim == -1 else full[:, None, None]),)

        model.get_submodule(path).register_forward_pre_hook(close)
    found = []
    for x, y in zip(batch.double(), LABELS, strict=True):
        loss = crossentropy(model(x[None]), y[None])
        found.append(torch.autograd.grad(loss, gate)[0])
    return torch.stack(found)


def gate_scores(model, structure, batch, split=(5,)):
    parts = list(zip(batch.split(split), LABELS.split(split), strict=True))
    found = measure_all(model, structure, labelled_passes(*parts), criteria=["taylor", "fisher"])
    return found["taylor"].units, found["fisher"].units


def check(model, structure, batch, group, **gate):
    derivatives = gate_derivatives(model, batch, structure.group(group).size, **gate)
    for split in ((5,), (3, 2)):
        taylor, fisher = gate_scores(model, structure, batch, split)
        assert_close(taylor[group], derivatives.abs().mean(0), rtol=1e-4, atol=1e-7)
        assert_close(fisher[group], derivatives.square().mean(0), rtol=1e-4, atol=1e-9)
    return derivatives


def test_a_chain():
    model, structure = build(Mlp, VECTORS[:2])
    check(model, structure, VECTORS, "fc1", readers=["fc2"])


def test_tokens():
    model, structure = build(Mlp, TOKENS[:2])
    check(model, structure, TOKENS, "fc1", readers=["fc2"])


def test_a_stream_is_gated_where_it_is_read_and_not_where_it_goes_on():
    model, structure = build(Mlp, VECTORS[:2])
    check(model, structure, VECTORS, "stem", readers=["fc1", "head"])


def test_filters_and_the_stream_of_a_residual_network():
    model, structure = build(Convs, IMAGES[:2])
    check(model, structure, IMAGES, "one.conv1", readers=["one.conv2"], dim=1)
    check(model, structure, IMAGES, "stem", readers=["one.conv1", "two.conv1", "last"], dim=1)


def test_a_channel_flattened_into_many_features():
    model, structure = build(Convs, IMAGES[:2])
    check(model, structure, IMAGES, "last", readers=["head"], width=4)


def encoder(attention):
    return lambda: nets.Encoder(4, 8, nets.PreNorm(8, attention(8, 3, 4), nets.FeedForward(8, 10)))


def test_heads():
    model, structure = build(encoder(nets.FusedAttention), TOKENS[:2])
    check(model, structure, TOKENS, "blocks.0.attn.qkv:heads", readers=["blocks.0.attn.proj"], width=4)


def test_three_layers_that_read_one_tensor_are_three_readers():
    model, structure = build(encoder(nets.WrittenAttention), TOKENS[:2])
    names = [f"blocks.0.attn.{name}_proj" for name in "qkv"]
    check(model, structure, TOKENS, "embed", readers=[*names, "blocks.0.mlp.fc1", "head"])


class Windows(nn.Module):
    """Reads four windows of each sample side by side in the batch, and a table that no sample changes."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.one, self.two = nn.Linear(2, 5), nn.Linear(5, 6)
        self.register_buffer("places", torch.arange(12.0).reshape(1, 6, 2) / 12)

    def forward(self, x):
        x = F.relu(self.stem(x))
        inside = self.inner(x.reshape(-1, 3, 6)).reshape(x.shape)
        return self.head(inside + self.two(torch.tanh(self.one(self.places)))).mean(1)


def test_windows_count_for_their_sample_and_a_table_for_all_samples():
    model, structure = build(Windows, TOKENS[:2])
    check(model, structure, TOKENS, "stem", readers=["inner"])
    mean = gate_derivatives(model, TOKENS, 5, ["two"]).mean(0)  # the table does not say which sample moved it
    taylor, fisher = gate_scores(model, structure, TOKENS)
    assert_close(taylor["one"], mean.abs(), rtol=1e-4, atol=1e-7)
    assert_close(fisher["one"], mean.square(), rtol=1e-4, atol=1e-9)


class Written(nn.Module):
    """Writes into the tensor that it has just read; `careful` says the same without."""

    def __init__(self, careful):
        super().__init__()
        self.careful = careful
        self.stem, self.one, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        if self.careful:
            return self.head(x + self.one(x))
        x += self.one(x)
        return self.head(x)


def test_writing_into_what_was_read_makes_no_difference():
    careful, plain = build(lambda: Written(careful=True), VECTORS[:2])
    hasty, structure = build(lambda: Written(careful=False), VECTORS[:2])
    for found, expected in zip(
        gate_scores(hasty, structure, VECTORS), gate_scores(careful, plain, VECTORS), strict=True
    ):
        assert_close(found, expected)
    check(careful, plain, VECTORS, "stem", readers=["one", "head"])


def test_a_cut_model_is_gated_as_if_it_had_been_built_small():
    model, structure = build(Convs, IMAGES[:2])
    keep = {"stem": (0, 2, 5), "one.conv1": (1, 4), "last": (1, 3)}
    small = apply_plan(model, structure.plan(keep, ("two",)))
    found = measure(
        small, structure, labelled_passes((IMAGES, LABELS)), criterion="taylor", keep=keep, removed=("two",)
    ).units
    fresh = gate_scores(small, analyze(trace(small, (IMAGES[:2],))), IMAGES)[0]
    assert found.keys() == fresh.keys()
    for name, scores in fresh.items():
        assert_close(found[name][list(keep.get(name, range(len(found[name]))))], scores)


def test_frozen_parameters_count_and_stay_frozen_and_nothing_is_left():
    model, structure = build(Convs, IMAGES[:2])
    expected = gate_scores(model, structure, IMAGES)
    frozen = [place % 3 > 0 for place, _ in enumerate(model.parameters())]
    for parameter, ice in zip(model.parameters(), frozen, strict=True):
        parameter.requires_grad_(not ice)
    for place, module in enumerate(model.modules()):
        module.training = place % 2 == 0
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for found, scores in zip(gate_scores(model, structure, IMAGES), expected, strict=True):
        assert_close(found, scores)
    assert [not parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    model.requires_grad_(False)
    with torch.no_grad():
        assert_close(gate_scores(model, structure, IMAGES)[0], expected[0])


def test_frozen_parameters_stay_frozen_after_an_error():
    model, structure = build(Mlp, VECTORS[:2])
    model.stem.requires_grad_(False)
    with pytest.raises(RuntimeError, match="on purpose"):
        measure(model, structure, labelled_passes((VECTORS, LABELS), loss=fail), criterion="taylor")
    assert not model.stem.weight.requires_grad
    assert model.fc1.weight.requires_grad


def fail(*_):
    raise RuntimeError("on purpose")


def test_no_loss():
    model, structure = build(Mlp, VECTORS[:2])
    with pytest.raises(TaskError, match=r"^this criterion needs the gradient of the loss, and the calibration data "):
        measure(model, structure, [Pass(lambda m: m(VECTORS))], criterion="taylor")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda out, _: out.mean() * float("nan"), r"is nan; one finite number was expected\.$"),
        (lambda out, _: out.mean(1), r"is \[.*\]; one finite number was expected\.$"),
        (lambda out, _: out.detach().mean(), r"has no gradient; run the model without torch\.no_grad\(\)\.$"),
    ],
)
def test_a_loss_that_is_no_number_or_has_no_gradient(loss, said):
    model, structure = build(Mlp, VECTORS[:2])
    with pytest.raises(TaskError, match=said):
        measure(model, structure, labelled_passes((VECTORS, LABELS), loss=loss), criterion="fisher")


def test_gradients_know_no_blocks():
    model, structure = build(Mlp, VECTORS[:2])
    found = measure(model, structure, labelled_passes((VECTORS, LABELS)), criterion="taylor")
    assert found.blocks == {}
    assert found.unmeasured == ()
