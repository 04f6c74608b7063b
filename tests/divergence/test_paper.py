"""The paper's forms against their formulas in docs/method.md#paper, computed the slow way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tests import nets
from tests.divergence.parts import Convs, Mlp, Tap, build, measure_batches


def assert_same(found, expected):
    assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)


def scores_by_loop(activation, weight):
    """D7 with loops: the mean norm of a unit's activation, times the norm of its weights, over channels and places."""
    scores = []
    for unit in range(activation.shape[1]):
        norms = [activation[sample, unit].norm() for sample in range(len(activation))]
        scores.append(sum(norms) / len(norms) * weight[unit].norm() / activation[0].numel())
    return torch.stack(scores).detach()


def test_filters_behind_norm_and_activation():
    batch = torch.randn(5, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch, criterion="paper").units
    for path in ("one", "two"):
        assert_same(
            found[f"{path}.conv1"],
            scores_by_loop(tap.input_of(f"{path}.conv2"), tap.model.get_submodule(path).conv1.weight),
        )
    assert_same(found["last"], scores_by_loop(F.relu(tap.output_of("last")), tap.model.last.weight))


def test_filters_that_are_coupled_add_up():
    batch = torch.randn(5, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    tap = Tap(model, batch)
    stream = scores_by_loop(tap.input_of("one"), tap.model.stem.weight)
    for path in ("one", "two"):
        stream += scores_by_loop(tap.output_of(f"{path}.bn2"), tap.model.get_submodule(path).conv2.weight)
    assert_same(measure_batches(model, structure, batch, criterion="paper").units["stem"], stream)


def test_neurons():
    batch = torch.randn(7, 4)
    model, structure = build(Mlp, batch[:2])
    tap = Tap(model, batch)
    assert_same(
        measure_batches(model, structure, batch, criterion="paper").units["fc1"],
        scores_by_loop(tap.input_of("fc2"), tap.model.fc1.weight),
    )


def test_tokens_are_places():
    batch = torch.randn(7, 5, 4)
    model, structure = build(Mlp, batch[:2])
    tap = Tap(model, batch)
    assert_same(
        measure_batches(model, structure, batch, criterion="paper").units["fc1"],
        scores_by_loop(tap.input_of("fc2").transpose(1, 2), tap.model.fc1.weight),
    )


def test_a_norm_over_all_channels_belongs_to_the_activation():
    batch = torch.randn(5, 3, 8, 8)
    model, structure = build(nets.GroupNormNet, batch[:2])
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch, criterion="paper").units["conv2"]
    assert_same(found, scores_by_loop(F.silu(tap.output_of("norm2")), tap.model.conv2.weight))


def test_pictures_of_several_sizes_are_each_divided_by_their_own():
    small, large = torch.randn(5, 3, 6, 6), torch.randn(5, 3, 10, 10)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3)

        def forward(self, x):
            return self.two(F.relu(self.one(x))).mean((2, 3))

    model, structure = build(Plain, small[:2])
    both = measure_batches(model, structure, small, large, criterion="paper").units["one"]
    alone = [measure_batches(model, structure, batch, criterion="paper").units["one"] for batch in (small, large)]
    assert_same(both, torch.stack(alone).mean(0))


def head_scores_by_loop(read, heads, *projections):
    """D4 with loops; `read` holds what the output projection reads, (B, tokens, heads x width)."""
    width = read.shape[-1] // heads
    scores = []
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        norms = [sample[:, rows].norm() for sample in read]
        weights = sum(weight[rows].norm() for weight in projections)
        scores.append(sum(norms) / len(norms) * weights / read.shape[1])
    return torch.stack(scores).detach()


class Interleaved(nets.FusedAttention):
    """The rows of the projection lie head by head: query, key and value of the first, then of the second."""

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


def attention_net(attention):
    return nets.Encoder(4, 8, nets.PreNorm(8, attention, nets.FeedForward(8, 10)))


def heads_in(structure):
    (name,) = (group.name for group in structure.groups if group.kind == "heads")
    return name


def test_heads():
    batch = torch.randn(3, 6, 4)
    model, structure = build(lambda: attention_net(nets.WrittenAttention(8, 3, 4)), batch[:2])
    tap = Tap(model, batch)
    attn = tap.model.blocks[0].attn
    expected = head_scores_by_loop(
        tap.input_of("blocks.0.attn.out_proj"), 3, attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
    )
    assert_same(measure_batches(model, structure, batch, criterion="paper").units[heads_in(structure)], expected)


@pytest.mark.parametrize("fused", [nets.FusedAttention, Interleaved])
def test_heads_score_the_same_however_their_projections_are_stored(fused):
    batch = torch.randn(3, 6, 4)
    apart, structure = build(lambda: attention_net(nets.WrittenAttention(8, 3, 4)), batch[:2])
    expected = measure_batches(apart, structure, batch, criterion="paper").units[heads_in(structure)]
    state = apart.state_dict()
    for kind in ("weight", "bias"):
        parts = torch.stack([state.pop(f"blocks.0.attn.{name}_proj.{kind}") for name in "qkv"])  # (3, 12, ...)
        parts = parts.reshape(3, 3, 4, *parts.shape[2:])
        state[f"blocks.0.attn.qkv.{kind}"] = (parts.transpose(0, 1) if fused is Interleaved else parts).flatten(0, 2)
        state[f"blocks.0.attn.proj.{kind}"] = state.pop(f"blocks.0.attn.out_proj.{kind}")
    together, structure = build(lambda: attention_net(fused(8, 3, 4)), batch[:2])
    together.load_state_dict(state)
    with torch.no_grad():
        assert_close(together(batch), apart(batch))
    assert_same(measure_batches(together, structure, batch, criterion="paper").units[heads_in(structure)], expected)


def test_a_class_token_alone_is_one_place():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.head = nets.FusedAttention(8, 2, 4), nn.Linear(8, 2)

        def forward(self, x):
            attn = self.attn
            q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)[:, :, 0].flatten(1)
            return self.head(attn.proj(y))

    batch = torch.randn(3, 6, 8)
    model, structure = build(Pooled, batch[:2])
    tap = Tap(model, batch)
    weights = tap.model.attn.qkv.weight.chunk(3)
    expected = head_scores_by_loop(tap.input_of("attn.proj")[:, None], 2, *weights)
    assert_same(measure_batches(model, structure, batch, criterion="paper").units[heads_in(structure)], expected)


def test_branches_by_d6_and_blocks_by_d1b():
    batch = torch.randn(3, 6, 4)
    model, structure = build(
        lambda: nets.Encoder(4, 8, nets.PreNorm(8, nets.FusedAttention(8, 3, 4), nets.FeedForward(8, 10))), batch[:2]
    )
    tap = Tap(model, batch)
    found = measure_batches(model, structure, batch, criterion="paper").blocks

    def ratio(change, stream):
        return float(sum(c.norm() / (s.norm() + 1e-6) for c, s in zip(change, stream, strict=True)) / len(stream))

    start, middle, end = tap.input_of("blocks.0"), tap.input_of("blocks.0.norm2"), tap.output_of("blocks.0")
    expected = {
        "blocks.0.norm1…attn": ratio(tap.output_of("blocks.0.attn"), start),
        "blocks.0.norm2…mlp": ratio(tap.output_of("blocks.0.mlp"), middle),
        "blocks.0": ratio(end - start, start),
    }
    assert found == pytest.approx(expected, rel=2e-5)
