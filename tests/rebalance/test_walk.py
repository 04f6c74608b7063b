"""The walk through the network: which layers, in which order, towards what."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.divergence.observe import Pass
from idap.errors import ConfigError, StructureError, TaskError
from idap.graph.trace import trace
from idap.rebalance import run
from idap.rebalance.layers import Case
from idap.rebalance.run import Rebalance, rebalance_
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from tests.divergence.parts import Convs, Mlp
from tests.nets import (
    Basic,
    Encoder,
    FeedForward,
    FusedAttention,
    InvertedResidual,
    LanguageModel,
    MobileNet,
    PreNorm,
    ResNet,
    Shared,
)
from tests.rebalance.cuts import Cut, build_net, error, normal, outputs, passes, same_state, structure_of, without


def halve(structure, seed=0):
    """Every group loses about half of its units."""
    draw = random.Random(seed)
    return {g.name: sorted(draw.sample(range(g.size), (g.size + 1) // 2)) for g in structure.groups}


def resnet() -> nn.Module:
    return ResNet(Basic(6, 6), Basic(6, 8, 2), Basic(8, 8), stem=6, width=8)


def transformer() -> nn.Module:
    return Encoder(4, 8, *(PreNorm(8, FusedAttention(8, 4, 2), FeedForward(8, 12)) for _ in range(2)))


NETS = {
    "resnet": (resnet, (3, 8, 8)),
    "residual convolutions": (Convs, (3, 6, 6)),
    "transformer": (transformer, (5, 4)),
    "depthwise": (MobileNet, (3, 8, 8)),
    "mlp": (Mlp, (4,)),
}


# ------------------------------------------------------------------------------------------------- the whole network


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETS)
def test_the_whole_network_is_nearer_to_the_original_on_fresh_data(name, seed):
    make, shape = NETS[name]
    model = build_net(make, seed=seed)
    structure = structure_of(model, 2, *shape)
    cut = Cut(model, structure, halve(structure, seed), normal(96, *shape, seed=seed))
    before, after = cut.errors(normal(64, *shape, seed=seed + 100))
    assert after < 0.8 * before
    assert all(one.after <= one.before for one in cut.corrections)


def test_later_branches_make_up_for_errors_of_earlier_ones():
    def errors(through):
        found = []
        for seed in range(3):
            model = build_net(lambda: ResNet(*(Basic(6, 6) for _ in range(3)), stem=6, width=6), seed=seed)
            structure = structure_of(model, 2, 3, 8, 8)
            setting = Rebalance(through_additions=through)
            cut = Cut(
                model, structure, without(structure, "layers.0.conv1", 0, 2, 3, 5), normal(64, 3, 8, 8), setting=setting
            )
            found.append(cut.errors(normal(64, 3, 8, 8, seed=9))[1])
        return sum(found)

    assert errors(True) < 0.9 * errors(False)


def test_an_error_of_the_stream_is_taken_back_at_the_next_branch():
    """The first branch loses all that it can't replace; the second could give exactly that."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 6)
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.one(x)
            return x + self.two(x)

    model = build_net(Two)
    structure = structure_of(model, 2, 4)
    first = structure.blocks[0].name
    x, fresh = normal(256, 4), normal(64, 4, seed=1)
    for through, limit in ((True, 1e-3), (False, 10)):
        cut = Cut(model, structure, {}, x, removed=[first], setting=Rebalance(through_additions=through))
        assert error(cut.small, model, fresh) < limit
        assert through or error(cut.small, model, fresh) > 0.01
        assert [one.weight for one in cut.corrections] == ["two.weight"]


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("through", [True, False])
def test_layers_that_are_added_to_each_other_are_all_corrected(through, batches):
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    cut = Cut(
        model, structure, halve(structure), normal(64, 3, 8, 8), setting=Rebalance(through_additions=through),
        batches=batches,
    )  # fmt: skip
    weights = [one.weight for one in cut.corrections]
    assert {"layers.1.conv2.weight", "layers.1.downsample.0.weight"} <= set(weights)
    assert len(weights) == len(set(weights)) == 8
    before, after = cut.errors(normal(64, 3, 8, 8, seed=5))
    assert after < 0.5 * before


def test_of_two_layers_added_to_each_other_the_larger_makes_up_for_both():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 8)
            self.up, self.down, self.short = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            return self.head(torch.tanh(self.down(torch.tanh(self.up(x))) + self.short(x)))

    model = build_net(Parallel)
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "stem", 0, 1, 2), normal(256, 4))
    assert [one.weight for one in cut.corrections] == ["up.weight", "short.weight", "down.weight", "head.weight"]


class Joined(nn.Module):
    """A branch that joins the stream in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        branch = self.two(torch.relu(self.one(x)))
        if self.way == "plain":
            x = x + branch
        elif self.way == "branch in place":
            branch.add_(x)
            x = branch
        elif self.way == "stream in place":
            x += branch
        elif self.way == "keywords":
            x = torch.add(input=branch, other=x)
        elif self.way == "factor on the stream":
            x = torch.add(branch, x, alpha=3)
        elif self.way == "factor on the branch":
            x = torch.add(x, branch, alpha=3)
        elif self.way == "exchanged":
            x = x + branch.transpose(0, 1)
        return self.head(torch.relu(x))


WAYS = (
    "plain", "branch in place", "stream in place", "keywords", "factor on the stream", "factor on the branch",
    "exchanged",
)  # fmt: skip


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_way_of_adding_does_not_mislead(way, batches):
    model = build_net(lambda: Joined(way))
    with torch.no_grad():  # a unit of the stem and one of the branch that others replace
        for layer in (model.stem, model.one):
            layer.weight[3], layer.bias[3] = layer.weight[0], layer.bias[0]
    shape = (6, 6, 4)
    structure = structure_of(model, *shape)
    plan = structure.plan(without(structure, "one", 3, 5))
    small, plain = apply_plan(model, plan), apply_plan(model, plan)
    data = [normal(*shape, seed=seed) for seed in range(12)]
    found = rebalance_(small, model, structure, plan, passes(*data) if batches > 1 else passes(*data[:1]))
    assert [one.weight for one in found] == ["two.weight", "head.weight"]
    fresh = normal(*shape, seed=50)
    assert error(small, model, fresh) < 0.9 * error(plain, model, fresh)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_corrected_and_what_it_gives_agree(at_once):
    """A branch that is replaced exactly leaves nothing for the layers behind it to do."""
    model = build_net(lambda: Joined("branch in place"))
    with torch.no_grad():
        model.one.weight[3], model.one.bias[3] = model.one.weight[0], model.one.bias[0]
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "one", 3), normal(512, 4), batches=1 if at_once else 2)
    assert cut.errors(normal(64, 4, seed=1))[1] < 1e-3
    assert cut.corrections[1].before < 1e-5


# --------------------------------------------------------------------------------------------------------- the guard


def test_a_cut_of_nothing_corrects_nothing():
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    cut = Cut(model, structure, {}, normal(16, 3, 8, 8))
    assert cut.corrections == []
    assert same_state(cut.small, model)


def test_what_would_get_worse_keeps_its_weights_bit_for_bit(monkeypatch):
    model = build_net(Mlp)
    structure = structure_of(model, 2, 4)
    monkeypatch.setattr(run, "fit", lambda *_args, **_settings: None)
    cut = Cut(model, structure, halve(structure), normal(64, 4))
    assert same_state(cut.small, cut.plain)
    assert [one.after for one in cut.corrections] == [one.before for one in cut.corrections]
    assert all(one.before > 0 and one.ridge != one.ridge for one in cut.corrections)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_samples_do_no_harm(count):
    model = build_net(
        lambda: nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    )
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "0", 0), normal(count, 4, seed=3))
    before, after = cut.errors(normal(256, 4, seed=1))
    assert after < 2 * before
    if count == 1:
        assert same_state(cut.small, cut.plain)
    for one, (name, kept) in zip(cut.corrections, [("2", 2), ("4", 4)], strict=True):
        if one.ridge != one.ridge:
            assert torch.equal(cut.small[kept].weight, cut.plain[kept].weight), name
            assert torch.equal(cut.small[kept].bias, cut.plain[kept].bias), name


def test_a_layer_whose_targets_are_noise_keeps_its_weights():
    model = build_net(Mlp)
    structure = structure_of(model, 2, 4)
    plan = structure.plan(without(structure, "fc1", 0))
    small = apply_plan(model, plan)
    held = apply_plan(model, plan)
    with torch.no_grad():
        for layer in (small.fc2, held.fc2):  # it gives nearly what the held-out samples want
            layer.weight.zero_()
            layer.bias.zero_()

    class Noise(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.fc2(F.relu(self.fc1(x)))
            return self.head(x + y)

    teacher = Noise()
    with torch.no_grad():
        teacher.load_state_dict(model.state_dict())
        teacher.fc2.weight.zero_()
        teacher.fc2.bias.zero_()
    found = rebalance_(small, teacher, structure, plan, passes(normal(64, 4)))
    assert torch.equal(small.fc2.weight, held.fc2.weight)
    assert found[0].before == found[0].after < 1e-9


# ------------------------------------------------------------------------------------------------------- many passes


@pytest.mark.parametrize("name", ["resnet", "transformer", "mlp"])
def test_several_passes_give_what_one_pass_gives(name):
    make, shape = NETS[name]
    model = build_net(make)
    structure = structure_of(model, 2, *shape)
    x, fresh = normal(96, *shape), normal(64, *shape, seed=7)
    one, many = (Cut(model, structure, halve(structure), x, batches=batches) for batches in (1, 4))
    assert [c.weight for c in one.corrections] == [c.weight for c in many.corrections]
    before, after = one.errors(fresh)
    assert many.errors(fresh)[1] < max(1.3 * after, 0.1 * before)


def test_several_passes_are_the_same_sums_as_one():
    """The rows that are held out are the same ones: each batch ends with its own share."""
    model = build_net(Mlp).double()
    structure = structure_of(model, 2, 4)
    batches = normal(128, 4).double().chunk(4)
    whole = torch.cat([*(b[:24] for b in batches), *(b[24:] for b in batches)])
    keep = halve(structure)
    plan = structure.plan(keep)
    one, many = apply_plan(model, plan), apply_plan(model, plan)
    found = rebalance_(one, model, structure, plan, passes(whole))
    streamed = rebalance_(many, model, structure, plan, passes(*batches))
    for mine, theirs in zip(found, streamed, strict=True):
        assert (mine.weight, mine.ridge) == (theirs.weight, theirs.ridge)
        assert mine.after == pytest.approx(theirs.after, rel=1e-6)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2])
def test_batches_of_one_or_two_samples_are_enough(size):
    model = build_net(Mlp)
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "fc1", 1, 2), normal(40, 4), batches=40 // size)
    before, after = cut.errors(normal(64, 4, seed=1))
    assert after < 0.9 * before
    assert any(one.ridge == one.ridge for one in cut.corrections)


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("batches", [1, 3])
def test_little_memory_gives_the_same(name, batches):
    make, shape = NETS[name]
    model = build_net(make).double()
    structure = structure_of(model, 2, *shape)
    one, other = (
        Cut(model, structure, halve(structure), normal(48, *shape).double(), setting=setting, batches=batches)
        for setting in (Rebalance(), Rebalance(memory=1))
    )
    assert [c.weight for c in one.corrections] == [c.weight for c in other.corrections]
    for key, tensor in one.small.state_dict().items():
        torch.testing.assert_close(other.small.state_dict()[key], tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batches", [1, 3])
def test_what_a_layer_needed_is_let_go_once_it_is_corrected(monkeypatch, batches):
    seen = []
    monkeypatch.setattr(run, "Case", lambda *given: seen.append(Case(*given)) or seen[-1])
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    cut = Cut(model, structure, halve(structure), normal(24, 3, 8, 8), batches=batches)
    assert len(seen) == len(cut.corrections) == 8
    for case in seen:
        assert (case.learned, case.held_out, case.targets) == (None, None, [])
        assert case.output.numel() == case.read.numel() == 0
        assert case.again is torch.empty


def test_rows_beyond_the_limit_are_drawn_the_same_way_each_time():
    model = build_net(Convs)
    structure = structure_of(model, 2, 3, 6, 6)
    cuts = [Cut(model, structure, halve(structure), normal(48, 3, 6, 6), setting=Rebalance(rows=512)) for _ in range(2)]
    assert same_state(cuts[0].small, cuts[1].small)
    before, after = cuts[0].errors(normal(64, 3, 6, 6, seed=1))
    assert after < 0.8 * before


def test_padding_does_not_count():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.gelu(self.one(x)))

    model = build_net(Tokens)
    structure = structure_of(model, 2, 5, 4)
    plan = structure.plan(without(structure, "one", 1, 5))
    lengths = [(5, 2, 4, 1), (3, 7, 1, 2), (2, 2, 6, 3)]

    def correct(filler: float) -> nn.Module:
        found = []
        for number, sizes in enumerate(lengths):
            x, mask = normal(4, max(sizes), 4, seed=number), torch.zeros(4, max(sizes), dtype=torch.bool)
            for sample, length in enumerate(sizes):
                x[sample, length:] = filler
                mask[sample, :length] = True
            found.append(Pass(lambda m, x=x: m(x), padding=mask))
        small = apply_plan(model, plan)
        rebalance_(small, model, structure, plan, found)
        return small

    one, other = correct(0), correct(1e4)
    assert same_state(one, other)
    fresh = normal(64, 5, 4, seed=5)
    assert error(one, model, fresh) < error(apply_plan(model, plan), model, fresh)


# ------------------------------------------------------------------------------------------------ what is left alone


def state_of(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [m.training for m in model.modules()], hooks, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("norms", [True, False])
def test_the_original_and_the_modes_are_left_as_they_were(norms, batches):
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    plan = structure.plan(halve(structure))
    small = apply_plan(model, plan)
    model.layers[0].train()
    small.layers[1].train()
    small.layers[0].bn1.momentum = 0.3
    small.fc.weight.grad = torch.ones_like(small.fc.weight)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, mine, theirs = torch.get_rng_state(), state_of(small), state_of(model)
    rebalance_(small, model, structure, plan, passes(*normal(48, 3, 8, 8).chunk(batches)), Rebalance(norms=norms))
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert (state_of(small), state_of(model)) == (mine, theirs)
    assert small.layers[0].bn1.momentum == 0.3
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(p.is_leaf and p.grad_fn is None for p in small.parameters())
    assert torch.equal(small.fc.weight.grad, torch.ones_like(small.fc.weight))


class Failing:
    """Runs the model on three batches and fails at the end of a run; nothing is caught."""

    def __init__(self, at: int) -> None:
        self.at, self.runs = at, 0

    def passes(self, x: Tensor) -> list[Pass]:
        return [Pass(lambda m, batch=batch: self.run(m, batch)) for batch in x.chunk(3)]

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        self.runs += 1
        y = model(x) if self.runs < self.at else model(x[:, :, :6])
        if self.runs == self.at:
            raise RuntimeError("out of order")
        return y


@pytest.mark.parametrize("at", [1, 3])
def test_an_exception_in_the_original_changes_nothing(at):
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    plan = structure.plan(halve(structure))
    small = apply_plan(model, plan)
    small.layers[0].train()
    held, mine, theirs = apply_plan(model, plan), state_of(small), state_of(model)
    with pytest.raises(RuntimeError, match="out of order"):
        rebalance_(small, model, structure, plan, Failing(at).passes(normal(24, 3, 8, 8)))
    assert same_state(small, held)
    assert (state_of(small), state_of(model)) == (mine, theirs)


@pytest.mark.parametrize("batches", [1, 3])
def test_an_error_in_the_middle_of_the_walk_leaves_a_model_that_works(batches):
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    plan = structure.plan(halve(structure))
    small = apply_plan(model, plan)
    small.layers[0].train()
    mine = state_of(small)
    handle = small.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rebalance_(small, model, structure, plan, passes(*normal(24, 3, 8, 8).chunk(batches)), Rebalance(norms=True))
    handle.remove()
    assert state_of(small) == mine
    small.eval()
    x = normal(16, 3, 8, 8, seed=1)
    assert torch.isfinite(outputs(small, x)).all()
    assert not same_state(small, apply_plan(model, plan))  # what came before it is corrected
    assert error(small, model, x) < 2 * error(apply_plan(model, plan), model, x)


def test_weights_that_are_used_twice_never_change():
    model = build_net(Shared)
    structure = structure_of(model, 2, 5, 4)
    cut = Cut(model, structure, without(structure, "weight", 1, 4), normal(64, 5, 4))
    assert torch.equal(cut.small.weight, cut.plain.weight)
    assert torch.equal(cut.small.twice.weight, cut.plain.twice.weight)
    assert torch.equal(cut.small.twice.bias, cut.plain.twice.bias)
    assert [one.weight for one in cut.corrections] == ["head.weight"]


def test_tied_weights_never_change():
    model = build_net(LanguageModel)
    ids = torch.randint(0, 11, (64, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(64, 5)
    structure = analyze(trace(model, (ids[:2],), {"mask": mask[:2]}))
    plan = structure.plan(halve(structure))
    small, plain = apply_plan(model, plan), apply_plan(model, plan)
    found = rebalance_(small, model, structure, plan, [Pass(lambda m: m(ids, mask=mask))])
    assert found
    assert torch.equal(small.embed.weight, plain.embed.weight)
    assert small.head.weight is small.embed.weight


def test_what_the_user_has_frozen_never_changes():
    model = build_net(Mlp)
    model.fc2.weight.requires_grad_(False)
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, halve(structure), normal(64, 4))
    assert [one.weight for one in cut.corrections] == ["fc1.weight", "head.weight"]
    assert torch.equal(cut.small.fc2.weight, cut.plain.fc2.weight)
    model.requires_grad_(False)
    cut = Cut(model, structure, halve(structure), normal(64, 4))
    assert len(cut.corrections) == 3  # where nothing learns, nothing is meant to be spared


class Norms(nn.Module):
    """Two layers in front of one and the same norm, and a layer with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.one, self.two = nn.Linear(8, 5, bias=False), nn.Linear(8, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.norm(self.one(x))) * F.relu(self.norm(self.two(x))))


def test_the_mean_of_a_norm_that_is_used_twice_never_changes():
    model = build_net(Norms)
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "stem", 0, 3), normal(256, 4))
    assert torch.equal(cut.small.norm.running_mean, model.norm.running_mean)
    before, after = cut.errors(normal(64, 4, seed=1))
    assert after < before


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("with_units", [True, False])
def test_after_a_removed_block_the_rest_comes_nearer(name, with_units):
    make, shape = NETS[name]
    model = build_net(make)
    structure = structure_of(model, 2, *shape)
    removed = [structure.blocks[0].name]
    keep = halve(structure) if with_units else {}
    cut = Cut(model, structure, keep, normal(96, *shape), removed=removed)
    before, after = cut.errors(normal(64, *shape, seed=3))
    assert cut.corrections
    assert after < 0.8 * before


# -------------------------------------------------------------------------------------------------- kinds of numbers


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_numbers_keep_their_kind(name, dtype, batches):
    make, shape = NETS[name]
    model = build_net(make).to(dtype)
    structure = structure_of(model, 2, *shape)
    cut = Cut(model, structure, halve(structure), normal(48, *shape).to(dtype), batches=batches)
    assert {p.dtype for p in cut.small.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in cut.small.parameters())
    assert all(one.after <= one.before for one in cut.corrections)
    before, after = cut.errors(normal(64, *shape, seed=3).to(dtype))
    assert after < before


@pytest.mark.parametrize("batches", [1, 2])
def test_what_a_number_can_not_hold_is_not_written(batches):
    model = build_net(lambda: ResNet(Basic(6, 6), Basic(6, 6), stem=6, width=6))
    with torch.no_grad():
        model.layers[1].bn2.weight[:2] = 3e-6  # to change anything behind it takes weights of a million
    model = model.half()
    structure = structure_of(model, 2, 3, 8, 8)
    x = normal(48, 3, 8, 8).half()
    cut = Cut(model, structure, without(structure, "layers.0.conv1", 1, 2, 3, 4), x, batches=batches)
    assert all(torch.isfinite(tensor).all() for tensor in cut.small.state_dict().values())
    kept = next(one for one in cut.corrections if one.weight == "layers.1.conv2.weight")
    assert kept.ridge != kept.ridge
    assert torch.equal(cut.small.layers[1].conv2.weight, cut.plain.layers[1].conv2.weight)


def test_norms_may_stay_in_float32():
    model = build_net(lambda: ResNet(Basic(6, 6), Basic(6, 6), stem=6, width=6)).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    structure = structure_of(model, 2, 3, 8, 8)
    x = normal(48, 3, 8, 8).bfloat16()
    cut = Cut(model, structure, without(structure, "layers.0.conv1", 1, 2), x)
    assert cut.corrections
    assert cut.small.layers[0].bn1.running_mean.dtype == torch.float32


@pytest.mark.parametrize("batches", [1, 3])
def test_under_autocast_the_layers_behind_see_the_corrected_weights(batches):
    model = build_net(lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 2 * model[0].weight[0], 2 * model[0].bias[0]
    structure = structure_of(model, 2, 4)
    plan = structure.plan(without(structure, "0", 3))
    small = apply_plan(model, plan)

    def run_under_autocast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    data = [Pass(lambda m, x=x: run_under_autocast(m, x)) for x in normal(512, 4).chunk(batches)]
    first, second = rebalance_(small, model, structure, plan, data)
    assert first.after < 0.01 * first.before
    assert second.before < 1e-3
    assert error(small, model, normal(64, 4, seed=1)) < 0.02


# --------------------------------------------------------------------------------------------------- what is refused


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="rows must be at least 256, found 255"):
        Rebalance(rows=255)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="held_out must lie in"):
            Rebalance(held_out=share)
    with pytest.raises(ConfigError, match="memory must be at least 1, found 0"):
        Rebalance(memory=0)


def test_a_setting_that_corrects_nothing_corrects_nothing():
    off = Rebalance(least_squares=False, means=False, norms=False)
    assert not off
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    cut = Cut(model, structure, halve(structure), normal(16, 3, 8, 8), setting=off)
    assert cut.corrections == []
    assert same_state(cut.small, cut.plain)


def test_no_batches_are_refused():
    model = build_net(Mlp)
    structure = structure_of(model, 2, 4)
    plan = structure.plan(halve(structure))
    with pytest.raises(TaskError, match="no calibration batch"):
        rebalance_(apply_plan(model, plan), model, structure, plan, [])


class Early(nn.Module):
    """Goes another way for small batches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Linear(4, 8), nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 3)
        self.limit = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        added = self.two(F.relu(self.one(x))) if x.shape[0] > self.limit else x.tanh()
        return self.head(x + added)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("whose", ["both", "small", "original"])
def test_a_model_that_takes_another_way_than_traced_is_refused(whose, through, batches):
    model = build_net(Early)
    structure = structure_of(model, 8, 4)
    plan = structure.plan(without(structure, "one", 1))
    small = apply_plan(model, plan)
    if whose in ("both", "small"):
        small.limit = 100
    if whose in ("both", "original"):
        model.limit = 100
    setting = Rebalance(through_additions=through)
    with pytest.raises(StructureError, match=r"'two.weight' did not run as it was traced; trace the model on inputs"):
        rebalance_(small, model, structure, plan, passes(*normal(32, 4).chunk(batches)), setting)


# ----------------------------------------------------------------------------------------------------- several cuts


def test_a_second_cut_is_corrected_towards_the_original():
    model = build_net(resnet)
    structure = structure_of(model, 2, 3, 8, 8)
    x, fresh = normal(96, 3, 8, 8), normal(64, 3, 8, 8, seed=2)
    first = structure.plan({"layers.0.conv1": [0, 1, 3, 4, 5]})
    second = structure.plan({"layers.0.conv1": [0, 3, 4], "layers.2.conv1": [0, 1, 2, 5, 7]}, [])
    small = apply_plan(model, first)
    rebalance_(small, model, structure, first, passes(x))
    further = structure_of(small, 2, 3, 8, 8)  # the cut as it looks from the first one: units 0, 2, 3 of its five
    smaller = apply_plan(small, further.plan({"layers.0.conv1": [0, 2, 3], "layers.2.conv1": [0, 1, 2, 5, 7]}))
    assert {n: t.shape for n, t in smaller.state_dict().items()} == {
        n: t.shape for n, t in apply_plan(model, second).state_dict().items()
    }
    before = error(smaller, model, fresh)
    found = rebalance_(smaller, model, structure, second, passes(x))
    assert found
    assert error(smaller, model, fresh) < 0.9 * before


def test_a_second_correction_on_the_same_data_changes_little():
    model = build_net(Mlp)
    structure = structure_of(model, 2, 4)
    x, fresh = normal(256, 4), normal(64, 4, seed=2)
    cut = Cut(model, structure, halve(structure), x)
    after = error(cut.small, model, fresh)
    rebalance_(cut.small, model, structure, cut.plan, passes(x))
    assert error(cut.small, model, fresh) < 1.1 * after


def test_an_inverted_residual_is_corrected_depthwise_layer_and_all():
    model = build_net(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), InvertedResidual(4, 8, 4), nn.Conv2d(4, 2, 1)))
    structure = structure_of(model, 2, 3, 8, 8)
    cut = Cut(model, structure, halve(structure), normal(32, 3, 8, 8))
    assert "1.conv.3.weight" in [one.weight for one in cut.corrections]
    before, after = cut.errors(normal(32, 3, 8, 8, seed=1))
    assert after < before
