"""The relative form against its definition: the change in the flow that removing the part would cause."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tests import nets
from tests.divergence.parts import Convs, Mlp, Tap, build, energy, lost_energy, measure_batches, unit_slots


def assert_same(found, expected):
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)


def test_neurons_of_a_branch_are_measured_against_the_stream():
    batch = torch.randn(16, 4)
    model, structure = build(Mlp, batch[:2])
    tap = Tap(model, batch)
    expected = lost_energy(tap.model.fc2, tap.input_of("fc2"), unit_slots(10), -1) / energy(tap.output_of("stem"), -1)
    assert_same(measure_batches(model, structure, batch).units["fc1"], expected)


def test_tokens_are_positions():
    batch = torch.randn(6, 5, 4)
    model, structure = build(Mlp, batch[:2])
    tap = Tap(model, batch)
    expected = lost_energy(tap.model.fc2, tap.input_of("fc2"), unit_slots(10), -1) / energy(tap.output_of("stem"), -1)
    assert_same(measure_batches(model, structure, batch).units["fc1"], expected)


def test_where_there_is_no_stream_the_readers_own_output_counts_and_readers_are_averaged():
    batch = torch.randn(16, 4)
    model, structure = build(Mlp, batch[:2])
    tap = Tap(model, batch)
    through = [
        lost_energy(getattr(tap.model, name), tap.input_of(name), unit_slots(8), -1) / energy(tap.output_of(name), -1)
        for name in ("fc1", "head")
    ]
    assert_same(measure_batches(model, structure, batch).units["stem"], torch.stack(through).mean(0))


@pytest.mark.parametrize("attention", [nets.FusedAttention, nets.WrittenAttention])
def test_heads_exactly(attention):
    batch = torch.randn(3, 6, 4)
    block = lambda: nets.PreNorm(8, attention(8, 3, 4), nets.FeedForward(8, 10))  # noqa: E731
    model, structure = build(lambda: nets.Encoder(4, 8, block(), block()), batch[:2])
    tap = Tap(model, batch)
    heads = [group.name for group in structure.groups if group.kind == "heads"]
    assert len(heads) == 2
    found = measure_batches(model, structure, batch)
    for number, name in enumerate(heads):
        last = "proj" if attention is nets.FusedAttention else "out_proj"
        path = f"blocks.{number}.attn.{last}"
        read = tap.model.get_submodule(path)
        stream = tap.input_of(f"blocks.{number}.norm1")
        assert_same(found.units[name], lost_energy(read, tap.input_of(path), unit_slots(3, 4), -1) / energy(stream, -1))


def test_heads_add_up_to_their_branch_where_they_do_not_overlap():
    """With orthogonal contributions the sum telescopes: ‖Σ W_h a_h‖² = Σ ‖W_h a_h‖²."""
    batch = torch.randn(3, 6, 4)
    block = nets.PreNorm(8, nets.FusedAttention(8, 2, 4), nets.FeedForward(8, 10))
    model, structure = build(lambda: nets.Encoder(4, 8, block), batch[:2])
    with torch.no_grad():
        proj = model.blocks[0].attn.proj
        proj.weight.copy_(torch.block_diag(*proj.weight.reshape(2, 4, 2, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1)))
        proj.bias.zero_()
    found = measure_batches(model, structure, batch)
    (heads,) = (found.units[group.name].sum() for group in structure.groups if group.kind == "heads")
    assert_close(float(heads), found.blocks["blocks.0.norm1…attn"], rtol=2e-5, atol=0)


def test_pointwise_convolution_exactly_with_its_norm_folded_in():
    batch = torch.randn(5, 3, 6, 6)
    model, structure = build(lambda: Convs(kernel=1), batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch)
    for path, size in (("one", 5), ("two", 4)):
        unit = tap.model.get_submodule(path)
        through = lost_energy(
            lambda x, unit=unit: unit.bn2(unit.conv2(x)), tap.input_of(f"{path}.conv2"), unit_slots(size), 1
        )
        assert_same(found.units[f"{path}.conv1"], through / energy(tap.input_of(path), 1))


def test_wide_convolution_by_its_formula():
    """E‖V_u a_u‖² is read as ‖V_u‖² over output channels and taps, times E[a_u²]: neighbouring pixels not paired."""
    batch = torch.randn(5, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch)
    for path in ("one", "two"):
        unit = tap.model.get_submodule(path)
        scale = unit.bn2.weight / (unit.bn2.running_var + unit.bn2.eps).sqrt()
        weights = (unit.conv2.weight * scale[:, None, None, None]).square().sum((0, 2, 3)).detach()
        expected = weights * tap.input_of(f"{path}.conv2").square().mean((0, 2, 3)) / energy(tap.input_of(path), 1)
        assert_same(found.units[f"{path}.conv1"], expected)


def test_strided_and_grouped_convolutions_by_their_formula():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.mix = nn.Conv2d(8, 12, 3, stride=2, groups=4)
            self.head = nn.Conv2d(12, 2, 1)

        def forward(self, x):
            return self.head(F.relu(self.mix(F.relu(self.stem(x)))))

    batch = torch.randn(5, 3, 7, 7)
    model, structure = build(Grouped, batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch)
    group = next(group for group in structure.groups if ("mix.weight", 1) in group.members)
    assert group.size == 2  # a place in each of the four parts
    weight = tap.model.mix.weight.detach().reshape(4, 3, 2, 9).square().sum((1, 3))  # (parts, places)
    moment = tap.input_of("mix").square().mean((0, 2, 3)).reshape(4, 2)
    assert_same(found.units[group.name], (weight * moment).sum(0) / energy(tap.output_of("mix"), 1))


def test_a_channel_flattened_into_many_features_counts_as_one_unit():
    batch = torch.randn(5, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    tap = Tap(model, batch)
    expected = lost_energy(tap.model.head, tap.input_of("head"), unit_slots(4, 4), -1) / energy(
        tap.output_of("head"), -1
    )
    assert_same(measure_batches(model, structure, batch).units["last"], expected)


class ConvAttention(nn.Module):
    """Attention over the places of a picture, all its projections convolutions, with a factor per channel."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 2, 4
        self.stem = nn.Conv2d(3, 6, 1)
        self.qkv = nn.Conv2d(6, 3 * 2 * 4, 1)
        self.proj = nn.Conv2d(2 * 4, 6, 1)
        self.gamma = nn.Parameter(torch.ones(6, 1, 1))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).view(batch, 3, self.heads, self.width, -1).transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, -1, height, width)
        return self.head(x + 0.5 * (self.gamma * self.proj(y)))


def test_heads_that_a_convolution_reads_and_factors_behind_it():
    batch = torch.randn(3, 3, 4, 4)
    model, structure = build(ConvAttention, batch[:2])
    tap = Tap(model, batch)
    (name,) = (group.name for group in structure.groups if group.kind == "heads")
    through = lost_energy(
        lambda x: 0.5 * tap.model.gamma * tap.model.proj(x), tap.input_of("proj"), unit_slots(2, 4), 1
    )
    assert_same(measure_batches(model, structure, batch).units[name], through / energy(tap.output_of("stem"), 1))


def test_layer_scale_is_folded_in():
    batch = torch.randn(3, 6, 4)
    model, structure = build(
        lambda: nets.Encoder(4, 8, nets.LayerScale(8, nets.FusedAttention(8, 3, 4), nets.FeedForward(8, 10))), batch[:2]
    )
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch)
    block = tap.model.blocks[0]
    middle = tap.input_of("blocks.0.norm2")
    through = lost_energy(
        lambda x: block.gamma2 * block.mlp.fc2(x), tap.input_of("blocks.0.mlp.fc2"), unit_slots(10), -1
    )
    assert_same(found.units["blocks.0.mlp.fc1"], through / energy(middle, -1))


def test_learned_positions_are_no_stream():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)
            self.positions = nn.Parameter(torch.randn(1, 5, 8) * 100)

        def forward(self, x):
            x = self.two(F.relu(self.one(x)))
            return self.head(x + self.positions.expand(len(x), -1, -1))

    batch = torch.randn(3, 5, 4)
    model, structure = build(Positions, batch[:2])
    tap = Tap(model, batch)
    expected = lost_energy(tap.model.two, tap.input_of("two"), unit_slots(6), -1) / energy(tap.output_of("two"), -1)
    assert_same(measure_batches(model, structure, batch).units["one"], expected)


def test_branches_and_blocks():
    batch = torch.randn(3, 6, 4)
    make = lambda: nets.PreNorm(8, nets.FusedAttention(8, 3, 4), nets.FeedForward(8, 10))  # noqa: E731
    model, structure = build(lambda: nets.Encoder(4, 8, make(), make()), batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch).blocks
    assert set(found) == {block.name for block in structure.blocks}
    for number in range(2):
        path = f"blocks.{number}"
        start, middle, end = tap.input_of(path), tap.input_of(f"{path}.norm2"), tap.output_of(path)
        expected = {
            f"{path}.norm1…attn": tap.output_of(f"{path}.attn").square().sum() / start.square().sum(),
            f"{path}.norm2…mlp": tap.output_of(f"{path}.mlp").square().sum() / middle.square().sum(),
            path: (end - start).square().sum() / start.square().sum(),
        }
        for name, value in expected.items():
            assert_same(torch.tensor(found[name], dtype=torch.float64), value)


def test_blocks_of_a_residual_cnn():
    batch = torch.randn(5, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch).blocks
    assert set(found) == {"one", "two"}
    for path, value in found.items():
        start, end = tap.input_of(path), tap.output_of(path)
        assert_close(value, float((end - start).square().sum() / start.square().sum()), rtol=2e-5, atol=0)


def test_a_block_that_starts_at_the_models_input_is_measured():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = nets.FeedForward(4, 6), nn.Linear(4, 2)
            self.pair = nn.ModuleList([nets.PreNorm(4, nn.Linear(4, 4), nn.Linear(4, 4))])

        def forward(self, x):
            return self.head(self.pair[0](x))

    batch = torch.randn(7, 4)
    model, structure = build(Bare, batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch)
    change = (tap.output_of("pair.0") - batch.double()).square().sum() / batch.double().square().sum()
    assert_close(found.blocks["pair.0"], float(change), rtol=2e-5, atol=0)
    assert found.unmeasured == ()


def test_scaling_a_layer_and_unscaling_the_next_changes_nothing():
    batch = torch.randn(16, 4)
    model, structure = build(Mlp, batch[:2])
    before = measure_batches(model, structure, batch)
    with torch.no_grad():
        for tensor in (model.fc1.weight, model.fc1.bias):
            tensor.mul_(7)
        model.fc2.weight.div_(7)
    after = measure_batches(model, structure, batch)
    assert_same(after.units["fc1"], before.units["fc1"])
    assert_close(after.blocks["fc1…fc2"], before.blocks["fc1…fc2"])


def test_scaling_the_input_of_a_homogeneous_net_changes_nothing():
    batch = torch.randn(16, 4)
    model, structure = build(lambda: Mlp(bias=False), batch[:2])
    before, after = (measure_batches(model, structure, scale * batch) for scale in (1, 50))
    for name, scores in before.units.items():
        assert_same(after.units[name], scores)
    assert_close(after.blocks, before.blocks)


def test_the_next_unit_to_go_is_really_the_one_that_changes_the_flow_least():
    """The score against the thing itself: cut each unit for real and look at what comes out of the net."""
    batch = torch.randn(64, 4)
    model, structure = build(lambda: Mlp(bias=False), batch[:2])
    from idap.surgery.apply import apply_plan

    with torch.no_grad():
        whole = model.stem(batch) + model.fc2(F.relu(model.fc1(model.stem(batch))))
        real = []
        for unit in range(10):
            small = apply_plan(model, structure.plan({"fc1": [u for u in range(10) if u != unit]}))
            stream = small.stem(batch)
            real.append(float((stream + small.fc2(F.relu(small.fc1(stream))) - whole).square().sum()))
    scores = measure_batches(model, structure, batch).units["fc1"]
    assert scores.argsort().tolist() == torch.tensor(real).argsort().tolist()
