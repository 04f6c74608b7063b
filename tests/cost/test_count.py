"""The cost of any plan equals what PyTorch counts on the model that the plan builds."""

import random
from functools import cache
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from idap.cost.count import Cost, CostModel, count_macs, count_parameters
from idap.graph.trace import trace
from idap.models.nets import DigitsResNet, DigitsViT, cifar_resnet20
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from tests import nets

IMAGE, TOKENS = nets.images(), nets.sequence(4)


def encoder(*blocks):
    return nets.Encoder(4, 8, *blocks)


class ProjectedBlock(nn.Module):
    """A block that ends in a layer: that layer goes with the block."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(x + self.inner(x))


class Fixed(nn.Module):
    """A stream whose width is that of the input: blocks that end in a layer can be bypassed."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = ProjectedBlock(), ProjectedBlock(), nn.Linear(8, 2)

    def forward(self, x):
        one = self.one(x)
        return self.head(x + one + self.two(one))


class Language(nets.LanguageModel):
    """Tied embedding and head."""

    def forward(self, ids):
        return super().forward(ids, mask=torch.ones(ids.shape))["logits"]


class Bilinear(nn.Module):
    """Products written in every way that has a formula."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.randn(6, 7))
        self.other = nn.Parameter(torch.randn(5, 7))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = torch.tanh(self.fc(x)).reshape(-1, 6)
        x = torch.mm(x, self.weight)
        x = torch.addmm(self.bias, x, self.other.t())
        x = torch.tensordot(x, self.fc.weight[:5, :1].expand(5, 5), dims=([-1], [0]))
        left, right = x.view(2, 5, 5), x.view(2, 5, 5)
        return torch.baddbmm(left, left, right) + torch.bmm(left, right) + torch.einsum("...ij,bkj", left, right)


CASES = {
    "mlp": (nets.mlp, (torch.randn(2, 4),)),
    "vgg": (nets.VGG, (IMAGE,)),
    "conv1d": (nets.ConvAndLinear1d, (torch.randn(2, 3, 9),)),
    "group norm": (nets.GroupNormNet, (IMAGE,)),
    "basic resnet": (
        lambda: nets.ResNet(nets.Basic(4, 4), nets.Basic(4, 4), nets.Basic(4, 6, 2), stem=4, width=6),
        (IMAGE,),
    ),
    "bottleneck": (lambda: nets.ResNet(nets.Bottleneck(4, 3, 8), nets.Bottleneck(8, 3, 8), stem=4, width=8), (IMAGE,)),
    "mobilenet": (nets.MobileNet, (IMAGE,)),
    "squeeze-excite": (nets.SENet, (IMAGE,)),
    "grouped": (nets.GroupedNet, (IMAGE,)),
    "shufflenet": (nets.ShuffleNet, (IMAGE,)),
    "densenet": (nets.DenseNet, (IMAGE,)),
    "unet": (nets.UNet, (IMAGE,)),
    "fused attention": (
        lambda: encoder(*(nets.PreNorm(8, nets.FusedAttention(8, 2, 3), nets.FeedForward(8, 10)) for _ in range(2))),
        (TOKENS,),
    ),
    "written attention": (
        lambda: encoder(nets.PostNorm(8, nets.WrittenAttention(8, 3, 2), nets.SwiGLU(8, 6))),
        (TOKENS,),
    ),
    "einsum attention": (
        lambda: encoder(nets.PreNorm(8, nets.EinsumAttention(8, 2), nets.FeedForward(8, 5))),
        (TOKENS,),
    ),
    "layer scale": (
        lambda: encoder(*(nets.LayerScale(8, nets.FusedAttention(8, 2, 3), nets.FeedForward(8, 10)) for _ in range(2))),
        (TOKENS,),
    ),
    "torch encoder": (nets.TorchEncoder, (TOKENS,)),
    "language model": (Language, (nets.tokens(),)),
    "hybrid": (nets.Hybrid, (IMAGE,)),
    "last layer in the block": (lambda: encoder(ProjectedBlock(), ProjectedBlock()), (TOKENS,)),
    "stream of fixed width": (Fixed, (nets.sequence(8),)),
    "products": (Bilinear, (TOKENS,)),
    "shared": (nets.Shared, (torch.randn(2, 4),)),
    "digits resnet": (lambda: DigitsResNet(4, (3, 2)), (torch.randn(2, 1, 8, 8),)),
    "digits vit": (lambda: DigitsViT(dim=8, depth=2, heads=2, mlp=12), (torch.randn(2, 1, 8, 8),)),
}


@cache
def analyze_net(make, args):
    """A net that no test changes, and its structure; traced once for all tests."""
    torch.manual_seed(0)
    model = make().eval()
    return model, analyze(trace(model, args))


@pytest.fixture(autouse=True)
def no_fast_path():
    """Make torch's own encoder call operators that torch itself counts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def count_with_torch(model, args):
    """What torch counts of one sample: half the floating-point operations, and the elements of all parameters."""
    batch = len(args[0])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args)
    flops = counter.get_total_flops()
    assert flops % (2 * batch) == 0
    return Cost(flops // (2 * batch), sum(p.numel() for p in model.parameters()))


def some_plan(structure, seed):
    """A random part of every second group, and a random choice of blocks."""
    dice = random.Random(seed)
    keep = {
        group.name: tuple(sorted(dice.sample(range(group.size), dice.randint(1, group.size))))
        for group in structure.groups
        if dice.random() < 0.7
    }
    removed = [block.name for block in structure.blocks if dice.random() < 0.4]
    inner = {name for block in removed for name in structure.block(block).contains}
    return keep, tuple(name for name in removed if name not in inner)


@pytest.mark.parametrize("name", CASES)
def test_original_costs_what_torch_counts(name):
    make, args = CASES[name]
    model, structure = analyze_net(make, args)
    expected = count_with_torch(model, args)
    assert CostModel(structure, len(args[0])).cost() == expected
    assert count_macs(structure, batch=len(args[0])) == expected.macs
    assert count_parameters(structure) == expected.parameters


@pytest.mark.parametrize("name", CASES)
def test_any_plan_costs_what_torch_counts_on_the_model_it_builds(name):
    make, args = CASES[name]
    model, structure = analyze_net(make, args)
    costs = CostModel(structure, len(args[0]))
    for seed in range(5):
        keep, removed = some_plan(structure, seed)
        small = apply_plan(model, structure.plan(keep, removed))
        assert costs.cost(keep, removed) == count_with_torch(small, args), (keep, removed)


@pytest.mark.parametrize("name", CASES)
def test_cost_of_a_unit_is_the_difference_that_its_removal_makes(name):
    make, args = CASES[name]
    _, structure = analyze_net(make, args)
    costs = CostModel(structure, 1)
    for seed in range(3):
        keep, removed = some_plan(structure, seed)
        macs, parameters = costs.unit_macs(keep, removed), costs.unit_parameters(keep, removed)
        now = costs.cost(keep, removed)
        assert set(macs) == set(parameters) == {group.name for group in structure.groups}
        for group in structure.groups:
            units = keep.get(group.name, tuple(range(group.size)))
            then = costs.cost({**keep, group.name: units[:-1]}, removed)
            assert macs[group.name] == now.macs - then.macs, group.name
            assert parameters[group.name] == now.parameters - then.parameters, group.name


def test_unit_costs_are_per_sample():
    make, args = CASES["vgg"]
    _, structure = analyze_net(make, args)
    once, twice = CostModel(structure, 1).unit_macs(), CostModel(structure, 2).unit_macs()
    assert once == {name: 2 * macs for name, macs in twice.items()}


@pytest.mark.parametrize(
    "name", ["basic resnet", "fused attention", "layer scale", "torch encoder", "stream of fixed width", "digits vit"]
)
def test_cost_of_a_block_is_the_difference_that_its_removal_makes(name):
    make, args = CASES[name]
    model, structure = analyze_net(make, args)
    assert structure.blocks
    costs = CostModel(structure, len(args[0]))
    for seed in range(3):
        keep, removed = some_plan(structure, seed)
        now = count_with_torch(apply_plan(model, structure.plan(keep, removed)), args)
        gone = {name for block in removed for name in structure.block(block).contains}
        for block in structure.blocks:
            if block.name in gone:
                continue
            then = count_with_torch(apply_plan(model, structure.plan(keep, (*removed, block.name))), args)
            assert costs.block_macs(block.name, keep, removed) == now.macs - then.macs


def test_a_parameter_without_use_counts_whatever_is_removed():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.idle, self.head = nn.Linear(4, 6), nn.Linear(5, 5), nn.Linear(6, 2)
            self.block = nn.Linear(6, 6)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.block(x))

    _, structure = analyze_net(Idle, (torch.randn(2, 4),))
    costs = CostModel(structure, 2)
    assert costs.cost().parameters == 30 + 30 + 14 + 42
    assert costs.cost({}, ("block",)).parameters == 30 + 30 + 14


@pytest.mark.parametrize(
    ("call", "shapes", "macs"),
    [
        (F.linear, [(2, 3, 4), (5, 4)], 2 * 3 * 4 * 5),
        (lambda x, w: F.conv2d(x, w, stride=2), [(2, 4, 7, 7), (6, 4, 3, 3)], 2 * 6 * 3 * 3 * 4 * 9),
        (lambda x, w: F.conv2d(x, w, groups=2), [(2, 4, 5, 5), (6, 2, 3, 3)], 2 * 6 * 3 * 3 * 2 * 9),
        (F.conv3d, [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2)], 3 * 27 * 2 * 8),
        (lambda x, w: F.conv_transpose1d(x, w, stride=2, groups=2), [(2, 4, 5), (4, 3, 2)], 2 * 4 * 5 * 3 * 2),
        (torch.matmul, [(2, 3, 4), (4,)], 2 * 3 * 4),
        (lambda x, w: torch.einsum("bic,dc->bid", x, w), [(2, 3, 4), (5, 4)], 2 * 3 * 4 * 5),
        (lambda x, w: torch.einsum("b...c,dc->b...d", x, w), [(2, 3, 7, 4), (5, 4)], 2 * 3 * 7 * 4 * 5),
        (lambda x, w: torch.einsum("...ij,...j->...i", x, w), [(2, 3, 4, 5), (3, 5)], 2 * 3 * 4 * 5),
        (lambda x, w: torch.einsum("ij->ji", x) + w, [(2, 3), (3, 2)], 0),
        (torch.dot, [(7,), (7,)], 7),
        (
            lambda x, w: F.scaled_dot_product_attention(x, w[..., :8], w),
            [(2, 3, 4, 8), (2, 3, 6, 10)],
            2 * 3 * 4 * 6 * (8 + 10),
        ),
        (lambda x, w: F.gelu(x) * w, [(2, 3), (3,)], 0),
    ],
)
def test_formula_by_hand(call, shapes, macs):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shapes[1]))

        def forward(self, x):
            return call(x, self.weight)

    model = One().eval()
    structure = analyze(trace(model, (torch.randn(shapes[0]),)), required=False)
    assert CostModel(structure, 1).cost() == Cost(macs, prod(shapes[1]))


def test_resnet20_costs_what_its_authors_say():
    """He et al. (2016) give 0.27 million parameters and, with others, 41 million multiply-adds."""
    _, structure = analyze_net(cifar_resnet20, (torch.randn(1, 3, 32, 32),))
    assert CostModel(structure, 1).cost() == Cost(40_551_040, 269_722)


def test_a_bilinear_layer_costs_its_weight_with_one_input_and_then_the_other():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.Bilinear(4, 3, 5)

        def forward(self, x):
            return self.pair(x, x[:, :3])

    structure = analyze(trace(Pair(), (torch.randn(2, 4),)), required=False)
    assert count_macs(structure, batch=2) == 5 * 4 * (3 + 1)
