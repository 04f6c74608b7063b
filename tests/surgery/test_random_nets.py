"""Nets put together at random from the building blocks, cut at random: the cut net equals the masked one."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests import nets
from tests.nets import images, randomised, sequence

Block = tuple[nn.Module, int]
"""A block and the width of what it returns."""


class Normed(nn.Module):
    def __init__(self, inside: int, outside: int, norm: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inside, outside, 3, 1, 1, groups=groups), norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Dense(nn.Module):
    def __init__(self, inside: int, grown: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, grown, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.tanh(self.conv(x))], 1)


class Halved(nn.Module):
    """Half of the channels passes, half is worked on, then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.unit = nets.ShuffleUnit(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x)


class SkipConcat(nn.Module):
    """Down and up again, and the wide way beside it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 3, 2, 1), nn.ConvTranspose2d(inner, inner, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.up(F.silu(self.down(x)))], 1)


Maker = Callable[[int, int], Block]

IMAGE_BLOCKS: dict[str, Maker] = {
    "conv": lambda w, n: (Normed(w, n + 2, nn.BatchNorm2d(n + 2)), n + 2),
    "group norm": lambda w, n: (Normed(w, 2 * n + 2, nn.GroupNorm(2, 2 * n + 2)), 2 * n + 2),
    "instance norm": lambda w, n: (Normed(w, n + 2, nn.InstanceNorm2d(n + 2)), n + 2),
    "depthwise": lambda w, n: (Normed(w, w * (1 + n % 2), nn.BatchNorm2d(w * (1 + n % 2)), groups=w), w * (1 + n % 2)),
    "grouped": lambda w, n: (
        (Normed(w, 2 * n + 2, nn.BatchNorm2d(2 * n + 2), groups=2), 2 * n + 2) if w % 2 == 0 else (nn.Identity(), w)
    ),
    "basic": lambda w, n: (nets.Basic(w, w), w),
    "wider": lambda w, n: (nets.Basic(w, n + 3), n + 3),
    "bottleneck": lambda w, n: (nets.Bottleneck(w, n + 1, w), w),
    "inverted": lambda w, n: (nets.InvertedResidual(w, w + n, w), w),
    "padded": lambda w, n: (nets.CifarBlock(w, w + n + 1, nets.PadHeld(n, 1)), w + n + 1),
    "squeeze": lambda w, n: (nets.SqueezeExcite(w, n + 1), w),
    "dense": lambda w, n: (Dense(w, n + 1), w + n + 1),
    "halved": lambda w, n: (Halved(w), w) if w % 2 == 0 else (nn.PReLU(w), w),
    "skip": lambda w, n: (SkipConcat(w, n + 2), w + n + 2),
    "pool": lambda w, n: (nn.AvgPool2d(3, 1, 1), w),
}


class ImageNet(nn.Module):
    def __init__(self, width: int, recipe: list[tuple[str, int]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        blocks = []
        for kind, number in recipe:
            block, width = IMAGE_BLOCKS[kind](width, number)
            blocks.append(block)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


ATTENTIONS: tuple[Callable[[int, int, int], nn.Module], ...] = (
    nets.FusedAttention,
    nets.WrittenAttention,
    lambda width, heads, _: nets.EinsumAttention(width, heads),
    lambda width, heads, _: nets.CausalAttention(width, heads),
)
FEED_FORWARDS = (nets.FeedForward, nets.SwiGLU)
BLOCKS = (nets.PreNorm, nets.PostNorm, nets.LayerScale)


@st.composite
def encoders(draw: st.DrawFn) -> nn.Module:
    width = 4 * draw(st.integers(1, 2))
    made = []
    for _ in range(draw(st.integers(1, 2))):
        attention = draw(st.sampled_from(ATTENTIONS))(width, draw(st.sampled_from([2, 4])), draw(st.integers(2, 4)))
        feed_forward = draw(st.sampled_from(FEED_FORWARDS))(width, draw(st.integers(2, 6)))
        made.append(draw(st.sampled_from(BLOCKS))(width, attention, feed_forward))
    return nets.Encoder(4, width, *made)


@st.composite
def plans(draw: st.DrawFn, structure: Structure) -> Plan:
    """Random units of random groups, and random blocks."""
    keep = {}
    for group in structure.groups:
        if draw(st.booleans()):
            units = st.lists(st.integers(0, group.size - 1), min_size=1, max_size=group.size, unique=True)
            keep[group.name] = draw(units)
    return structure.plan(keep, [block.name for block in structure.blocks if draw(st.integers(0, 3)) == 0])


recipes = st.lists(st.tuples(st.sampled_from(sorted(IMAGE_BLOCKS)), st.integers(1, 4)), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(width=st.integers(2, 6), recipe=recipes, data=st.data())
def test_any_net_of_convolutions(width: int, recipe: list[tuple[str, int]], data: st.DataObject) -> None:
    check(ImageNet(width, recipe), images(), data)


@settings(max_examples=8, deadline=None)
@given(model=encoders(), data=st.data())
def test_any_transformer(model: nn.Module, data: st.DataObject) -> None:
    check(model, sequence(4), data)


def check(model: nn.Module, x: Tensor, data: st.DataObject) -> None:
    model = randomised(model.eval())
    structure = analyze(trace(model, (x,)), required=False)
    for _ in range(2):
        plan = data.draw(plans(structure))
        small = apply_plan(model, plan)
        proof = verify(structure, model, small, plan, ((x,), {}))
        wide = copy.deepcopy(model).double()
        verify(structure, wide, apply_plan(wide, plan), plan, ((x.double(),), {}), tolerance=1e-9)
        if not proof.crossed and not plan.removed:
            with torch.no_grad():
                torch.testing.assert_close(small(x), mask(model, plan)(x), rtol=1e-4, atol=1e-5)


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """The original module with zeros in the removed slots of its own tensors: an oracle that knows no graph."""
    masked = copy.deepcopy(model)
    tensors = dict([*masked.named_parameters(), *masked.named_buffers()])
    with torch.no_grad():
        for name, dims in plan.tensors.items():
            for dim, kept in dims.items():
                gone = sorted(set(range(tensors[name].shape[dim])) - set(kept))
                tensors[name].index_fill_(dim, torch.tensor(gone), 0.0)
    return masked
