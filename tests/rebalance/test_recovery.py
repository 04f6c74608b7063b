"""Where the rest can replace what was removed, it does so exactly."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.rebalance.run import Rebalance
from tests.nets import Encoder, FeedForward, FusedAttention, PreNorm
from tests.rebalance.cuts import Cut, build_net, error, normal, outputs, structure_of, without


class Transposed(nn.Module):
    """As in transformers' GPT-2: the weight lies transposed, the product is an addmm."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside))
        self.bias = nn.Parameter(torch.zeros(outside))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(shape)


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Transposed(4, 6), Transposed(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class Letters(nn.Module):
    """A layer written as an einsum, whose result has its rows in another order."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.randn(6, 3))
        self.equation = equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, self.first(x).relu(), self.weight)


class Columns(nn.Module):
    """The weight stands on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 6, 1)
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ self.first(x).relu()


def chain(first: nn.Module, *rest: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), *rest)


@dataclass(frozen=True)
class Copy:
    """A net in which one unit is twice another.

    Attributes:
        make: the net; its first layer makes the units.
        shape: of a batch.
        dim: of the first layer's weight where the units lie.
        reads: the layer that reads them.
        group: of the units.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dim: int = 0
    group: str = "0"

    def model(self) -> nn.Module:
        model = build_net(self.make)
        first = next(module for module in model.modules() if "weight" in module._parameters)
        first = model.first if hasattr(model, "first") else first
        with torch.no_grad():
            weight = first.weight.movedim(self.dim, 0)
            weight[4] = 2 * weight[1]
            first.bias[4] = 2 * first.bias[1]
        return model


SCALED = {  # relu keeps the factor, gelu does not
    "linear": Copy(lambda: chain(nn.Linear(4, 6), nn.Linear(6, 3)), (256, 4)),
    "linear, no bias": Copy(lambda: chain(nn.Linear(4, 6), nn.Linear(6, 3, bias=False)), (256, 4)),
    "linear on tokens": Copy(lambda: chain(nn.Linear(4, 6), nn.Linear(6, 3)), (64, 5, 4)),
    "conv2d": Copy(lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)), (16, 3, 9, 9)),
    "stride, padding": Copy(lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, 2, (2, 1))), (24, 3, 9, 9)),
    "dilation": Copy(lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, (3, 2), dilation=(2, 3))), (16, 3, 11, 11)),
    "same": Copy(lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, (2, 4), padding="same")), (16, 3, 9, 9)),
    "reflected": Copy(
        lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")), (16, 3, 9, 9)
    ),
    "conv1d": Copy(lambda: chain(nn.Conv1d(3, 6, 3), nn.Conv1d(6, 4, 3, 2, 1)), (32, 3, 16)),
    "conv3d": Copy(lambda: chain(nn.Conv3d(2, 6, 1), nn.Conv3d(6, 3, (1, 2, 2), padding=(0, 1, 0))), (8, 2, 4, 6, 5)),
    "flattened": Copy(
        lambda: chain(nn.Conv2d(3, 6, 3), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(6, 4)), (256, 3, 5, 5)
    ),
    "behind it a norm": Copy(
        lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), (16, 3, 9, 9)
    ),
    "weight on the left": Copy(Columns, (64, 4, 5), group="first"),
    "einsum": Copy(lambda: Letters("bti,io->bto"), (64, 5, 4), group="first"),
    "einsum with dots": Copy(lambda: Letters("...i,io->...o"), (64, 5, 4), group="first"),
    "einsum without an arrow": Copy(lambda: Letters("bti,io"), (64, 5, 4), group="first"),
}


@pytest.mark.parametrize("name", SCALED)
def test_what_a_multiple_of_it_can_replace_comes_back(name):
    copy = SCALED[name]
    model = copy.model()
    structure = structure_of(model, *copy.shape)
    x, fresh = normal(*copy.shape, seed=1), normal(*copy.shape, seed=2)
    cut = Cut(model, structure, without(structure, copy.group, 4), x)
    before, after = cut.errors(fresh)
    assert before > 0.05
    assert after < 1e-3
    assert [correction.ridge for correction in cut.corrections] == [1e-4]
    assert cut.corrections[0].after < 1e-4 * cut.corrections[0].before


def test_a_transposed_weight_is_corrected_too():
    model = Copy(Gpt, (64, 5, 4), dim=1).model()
    with torch.no_grad():
        model.first.weight[:, 4], model.first.bias[4] = model.first.weight[:, 1], model.first.bias[1]
    structure = structure_of(model, 64, 5, 4)
    before, after = Cut(model, structure, without(structure, "first", 4), normal(64, 5, 4, seed=1)).errors(
        normal(64, 5, 4, seed=2)
    )
    assert before > 0.05
    assert after < 1e-3


@pytest.mark.parametrize("equation", ["bti,io->tbo", "a...i,io->...ao", "tbi,io->bto"])
def test_an_einsum_that_exchanges_its_rows_is_left_alone(equation):
    model = Copy(lambda: Letters(equation), (8, 5, 4)).model()
    structure = structure_of(model, 8, 5, 4)
    cut = Cut(model, structure, without(structure, "first", 4), normal(64, 5, 4))
    assert cut.corrections == []


def test_grouped_convolutions_are_corrected_part_by_part():
    model = build_net(lambda: chain(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2, padding=1)))
    with torch.no_grad():  # the last channel of each part is a multiple of its first
        for part in (0, 4):
            model[0].weight[part + 3] = 1.5 * model[0].weight[part]
            model[0].bias[part + 3] = 1.5 * model[0].bias[part]
    structure = structure_of(model, 2, 3, 9, 9)
    (places,) = [group.name for group in structure.groups if group.size == 4]
    cut = Cut(model, structure, without(structure, places, 3), normal(16, 3, 9, 9, seed=1))
    before, after = cut.errors(normal(16, 3, 9, 9, seed=2))
    assert cut.small[2].weight.shape == (6, 3, 3, 3)
    assert before > 0.05
    assert after < 1e-3


def test_a_head_that_another_repeats_is_replaced():
    model = build_net(lambda: Encoder(4, 8, PreNorm(8, FusedAttention(8, 3, 4), FeedForward(8, 10))))
    attention = model.blocks[0].attn
    with torch.no_grad():
        for tensor in (attention.qkv.weight, attention.qkv.bias):
            heads = tensor.view(3, 3, 4, -1)
            heads[:, 2] = heads[:, 0]
    structure = structure_of(model, 2, 5, 4)
    cut = Cut(model, structure, without(structure, "blocks.0.attn.qkv:heads", 2), normal(128, 5, 4, seed=1))
    before, after = cut.errors(normal(64, 5, 4, seed=2))
    assert before > 0.01
    assert after < 1e-3
    assert cut.corrections[0].weight == "blocks.0.attn.proj.weight"


def test_a_bias_that_has_no_place_goes_into_the_running_mean():
    model = build_net(lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 1.5
    structure = structure_of(model, 2, 3, 9, 9)
    cut = Cut(model, structure, without(structure, "0", 2), normal(8, 3, 9, 9), setting=Rebalance(least_squares=False))
    before, after = cut.errors(normal(8, 3, 9, 9, seed=3))
    assert before > 0.05
    assert after < 1e-6
    assert torch.equal(cut.small[2].weight, cut.plain[2].weight)
    assert not torch.equal(cut.small[3].running_mean, cut.plain[3].running_mean)
    assert torch.equal(cut.small[3].bias, cut.plain[3].bias)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 3), lambda: nn.Linear(6, 3, bias=False)])
def test_means_alone_restore_a_constant_unit_wherever_there_is_a_bias(make):
    model = build_net(lambda: chain(nn.Linear(4, 6), make()))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, 2
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "0", 3), normal(64, 4), setting=Rebalance(least_squares=False))
    before, after = cut.errors(normal(64, 4, seed=1))
    assert before > 0.05
    if model[2].bias is None:
        assert after == before
        assert all(correction.ridge != correction.ridge for correction in cut.corrections)
    else:
        assert after < 1e-6
        assert [correction.ridge for correction in cut.corrections] == [float("inf")]
    assert torch.equal(cut.small[2].weight, cut.plain[2].weight)


def test_without_means_the_bias_stays_as_it_was():
    model = SCALED["linear"].model()
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "0", 4), normal(256, 4), setting=Rebalance(means=False))
    assert cut.errors(normal(64, 4, seed=1))[1] < 1e-3
    assert torch.equal(cut.small[2].bias, model[2].bias)


def test_a_large_mean_does_not_eat_up_the_digits():
    model = SCALED["linear"].model()
    structure = structure_of(model, 2, 4)
    with torch.no_grad():
        model[0].weight[:] = model[0].weight.abs()
    cut = Cut(model, structure, without(structure, "0", 4), normal(512, 4) + 1000)
    fresh = normal(512, 4, seed=1) + 1000
    varying = outputs(model, fresh) - outputs(model, fresh).mean(0)
    missed = outputs(cut.small, fresh) - outputs(model, fresh)
    assert missed.norm() < 5e-3 * varying.norm()


@pytest.mark.parametrize("through", [True, False])
def test_a_removed_block_is_made_up_for_by_the_layer_that_reads_the_stream(through):
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 6)
            self.branch = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.branch(x)
            return self.head(x)

    model = build_net(Stream)
    structure = structure_of(model, 2, 4)
    cut = Cut(
        model, structure, {}, normal(256, 4), removed=[structure.blocks[0].name],
        setting=Rebalance(through_additions=through),
    )  # fmt: skip
    assert error(cut.plain, model, normal(64, 4, seed=1)) > 0.1
    assert error(cut.small, model, normal(64, 4, seed=1)) < 1e-3


def test_a_single_sample_without_a_batch_dimension_is_left_alone():
    model = Copy(lambda: chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)), (3, 9, 9)).model()
    structure = structure_of(model, 3, 9, 9)
    cut = Cut(model, structure, without(structure, "0", 4), normal(3, 9, 9, seed=1))
    assert cut.corrections == []
