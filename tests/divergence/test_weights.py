"""Criteria of the weights alone against sums over the weights, unit by unit."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from tests import nets
from tests.divergence.parts import Convs, Mlp, build, measure_batches

IMAGES, TOKENS = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 4)
NORMS = pytest.mark.parametrize(
    ("criterion", "norm"), [("magnitude", lambda w: w.square().sum().sqrt()), ("magnitude_l1", lambda w: w.abs().sum())]
)


def assert_same(found, expected):
    assert_close(found, torch.stack(list(expected)).detach(), rtol=1e-9, atol=0)


def join_weights(*weights):
    return torch.cat([weight.double().ravel() for weight in weights])


@NORMS
def test_a_stream_counts_all_that_write_it_and_all_that_read_it(criterion, norm):
    model, structure = build(Convs, IMAGES)
    found = measure_batches(model, structure, IMAGES, criterion=criterion).units
    one, two = model.one, model.two
    assert_same(
        found["stem"],
        (
            norm(
                join_weights(
                    model.stem.weight[u],
                    *(unit.conv2.weight[u] for unit in (one, two)),
                    *(unit.conv1.weight[:, u] for unit in (one, two)),
                    model.last.weight[:, u],
                )
            )
            for u in range(6)
        ),
    )
    assert_same(found["one.conv1"], (norm(join_weights(one.conv1.weight[u], one.conv2.weight[:, u])) for u in range(5)))
    flat = model.head.weight.reshape(3, 4, 4)  # a channel is read as four features
    assert_same(found["last"], (norm(join_weights(model.last.weight[u], flat[:, u])) for u in range(4)))


@NORMS
def test_places_and_parts_of_a_grouped_convolution(criterion, norm):
    model, structure = build(nets.GroupedNet, IMAGES)
    found = measure_batches(model, structure, IMAGES, criterion=criterion).units
    wrote = model.conv1.weight.reshape(4, 2, -1)  # (parts, places, taps)
    parts = model.conv2.weight.reshape(4, 3, 2, 9)  # (parts, outputs, places, taps)
    (place,) = (group for group in structure.groups if ("conv2.weight", 1) in group.members)
    assert_same(found[place.name], (norm(join_weights(wrote[:, u], parts[:, :, u])) for u in range(2)))


@NORMS
def test_heads_of_a_packed_projection(criterion, norm):
    model, structure = build(lambda: transformer(nets.FusedAttention(8, 3, 4)), TOKENS)
    found = measure_batches(model, structure, TOKENS, criterion=criterion).units["blocks.0.attn.qkv:heads"]
    attn = model.blocks[0].attn
    packed, read = attn.qkv.weight.reshape(3, 3, 4, 8), attn.proj.weight.reshape(8, 3, 4)
    assert_same(found, (norm(join_weights(packed[:, h], read[:, h])) for h in range(3)))


def transformer(attention):
    return nets.Encoder(4, 8, nets.PreNorm(8, attention, nets.FeedForward(8, 10)))


def test_scales_of_the_norms_that_a_unit_passes():
    model, structure = build(Convs, IMAGES)
    found = measure_batches(model, structure, IMAGES, criterion="bn_scale")
    stream = (model.one.bn2.weight.double().abs() + model.two.bn2.weight.double().abs()) / 2
    assert_close(found.units["stem"], stream.detach(), rtol=1e-9, atol=0)
    assert_close(found.units["two.conv1"], model.two.bn1.weight.abs().double().detach(), rtol=1e-9, atol=0)
    assert found.unmeasured == ("last",)  # no norm behind it; of blocks this criterion says nothing


def test_distances_to_the_other_units_of_a_group():
    model, structure = build(Convs, IMAGES)
    found = measure_batches(model, structure, IMAGES, criterion="fpgm").units
    writers = [weight.double().flatten(1) for weight in (model.stem.weight, model.one.conv2.weight)]
    writers.append(model.two.conv2.weight.double().flatten(1))
    assert_same(found["stem"], (sum((w[u] - w).norm(dim=1).sum() for w in writers) for u in range(6)))
    last = model.last.weight.double().flatten(1)
    assert_same(found["last"], ((last[u] - last).norm(dim=1).sum() for u in range(4)))


def test_two_equal_filters_are_the_nearest_to_all_others():
    model, structure = build(lambda: Mlp(bias=False), TOKENS)
    with torch.no_grad():
        model.fc1.weight[3] = model.fc1.weight.mean(0)  # the middle of them all
    assert int(measure_batches(model, structure, TOKENS, criterion="fpgm").units["fc1"].argmin()) == 3


def test_chance_is_drawn_by_the_seed():
    model, structure = build(Convs, IMAGES)
    draw = lambda seed: measure_batches(model, structure, IMAGES, criterion="random", seed=seed).units  # noqa: E731
    once, again, other = draw(1), draw(1), draw(2)
    for name, scores in once.items():
        assert torch.equal(scores, again[name])
        assert not torch.equal(scores, other[name])
        assert len(scores.unique()) == len(scores)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude_l1", "bn_scale", "fpgm", "random"])
def test_weights_alone_know_no_blocks(criterion):
    model, structure = build(Convs, IMAGES)
    found = measure_batches(model, structure, IMAGES, criterion=criterion)
    assert found.blocks == {}
    assert set(found.unmeasured) <= {"last"}


KEPT = {"one.conv1": (0, 2), "stem": (1, 4, 5), "last": (0, 3)}


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude_l1", "bn_scale", "fpgm"])
def test_what_was_cut_counts_no_more(criterion):
    model, structure = build(Convs, IMAGES)
    small = apply_plan(model, structure.plan(KEPT, ()))
    found = measure_batches(small, structure, IMAGES, criterion=criterion, keep=KEPT).units
    fresh = measure_batches(small, analyze(trace(small, (IMAGES,))), IMAGES, criterion=criterion).units
    for name, scores in fresh.items():
        assert_close(found[name][list(KEPT.get(name, range(len(found[name]))))], scores)


def test_a_weight_that_is_computed_is_no_magnitude():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    nn.utils.parametrizations.weight_norm(model[0])
    structure = analyze(trace(model, (torch.randn(2, 4),)))
    found = measure_batches(model, structure, torch.randn(2, 4), criterion="magnitude").units
    reads = model[2].weight.double()
    (scores,) = found.values()
    assert_same(scores, (reads[:, u].norm() for u in range(6)))
