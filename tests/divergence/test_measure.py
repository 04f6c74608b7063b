"""Measuring streams, leaves nothing behind, and works on cut models as on whole ones."""

import contextlib
import copy
import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close

from idap.divergence import observe as observing
from idap.divergence.measure import measure, measure_all
from idap.divergence.observe import Pass
from idap.errors import ConfigError, StructureError, TaskError
from idap.graph.trace import trace
from idap.progress import Silent
from idap.structure.analysis import analyze
from idap.structure.blocks import Block
from idap.surgery.apply import apply_plan
from tests import nets
from tests.divergence.parts import Convs, Mlp, Tap, Unit, build, energy, lost_energy, measure_batches, unit_slots

CRITERIA = pytest.mark.parametrize("criterion", ["relative", "paper"])
IMAGES = torch.randn(9, 3, 6, 6, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(3))


def transformer():
    return nets.Encoder(
        4, 8, *(nets.PreNorm(8, nets.FusedAttention(8, 3, 4), nets.FeedForward(8, 10)) for _ in range(2))
    )


class Counting(Silent):
    """Remembers of each phase how many steps were announced, and taken."""

    def __init__(self):
        self.announced, self.taken = [], 0

    @contextlib.contextmanager
    def phase(self, title, total):
        self.announced.append((title, total))
        yield self

    def advance(self, note=""):
        self.taken += 1


NETS = {"convs": (Convs, IMAGES), "transformer": (transformer, TOKENS), "mlp": (Mlp, TOKENS)}
EVERY_NET = pytest.mark.parametrize("net", NETS)


def assert_same(found, expected, rtol=1e-5):
    assert found.units.keys() == expected.units.keys()
    for name, scores in expected.units.items():
        assert_close(found.units[name], scores, rtol=rtol, atol=0, equal_nan=True)
    assert found.blocks == pytest.approx(expected.blocks, rel=rtol)


@EVERY_NET
@CRITERIA
def test_batches_of_any_size_add_up_to_one_large_one(net, criterion):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    whole = measure_batches(model, structure, batch, criterion=criterion)
    assert_same(measure_batches(model, structure, *batch.split([1, 5, 3]), criterion=criterion), whole)
    assert whole.criterion == criterion
    assert whole.unmeasured == ()
    assert set(whole.units) == {group.name for group in structure.groups}
    assert all(scores.dtype == torch.float64 and scores.sum() > 0 for scores in whole.units.values())


@pytest.mark.parametrize("memory", [1, 2**30], ids=["a layer per pass", "one pass"])
def test_every_batch_and_every_solved_layer_is_a_step(memory):
    model, structure = build(Convs, IMAGES[:2])
    passes = [Pass(lambda judged, part=part: judged(part)) for part in IMAGES.split(3)]
    told, unknown = Counting(), Counting()
    for batches, progress in ((passes, told), (iter(passes), unknown)):
        measure_all(
            model, structure, batches, criteria=["innovation"], memory=memory, progress=progress, title="looking"
        )
    assert told.announced == [("looking", told.taken)]
    kept = memory == 1  # batches that are looked at several times are kept, so they can be counted
    assert unknown.announced == [("looking", told.taken if kept else None)]
    assert unknown.taken == told.taken > len(passes)


@EVERY_NET
@CRITERIA
def test_passes_may_be_a_generator(net, criterion):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    lazily = (Pass(lambda m, part=part: m(part)) for part in batch.split(3))
    assert_same(
        measure(model, structure, lazily, criterion=criterion),
        measure_batches(model, structure, batch, criterion=criterion),
    )


PLANS = {
    "convs": [
        ({"stem": (0, 2, 5), "one.conv1": (1, 4), "last": (1, 3)}, ()),
        ({}, ("one",)),
        ({"stem": (1, 2, 3, 4), "two.conv1": (0, 3)}, ("one",)),
        ({"last": (0, 1)}, ("one", "two")),
    ],
    "transformer": [
        ({"blocks.0.attn.qkv:heads": (0, 2), "blocks.1.mlp.fc1": (1, 2, 7), "embed": (0, 3, 4, 6)}, ()),
        ({"embed": (0, 1, 2, 5)}, ("blocks.0",)),
        ({"blocks.1.attn.qkv:heads": (1, 2)}, ("blocks.0.norm2…mlp",)),
        ({}, ("blocks.0.norm1…attn", "blocks.1.norm2…mlp")),
    ],
    "mlp": [({"stem": (1, 2, 7), "fc1": (0, 9)}, ()), ({"stem": (1, 2)}, ("fc1…fc2",))],
}


@pytest.mark.parametrize(("net", "keep", "removed"), [(net, *plan) for net, plans in PLANS.items() for plan in plans])
@CRITERIA
def test_a_cut_model_is_measured_as_if_it_had_been_built_small(net, keep, removed, criterion):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    small = apply_plan(model, structure.plan(keep, removed))
    found = measure_batches(small, structure, batch, criterion=criterion, keep=keep, removed=removed)
    fresh = measure_batches(small, analyze(trace(small, (batch[:2],))), batch, criterion=criterion)
    assert found.units.keys() == fresh.units.keys()
    for name, scores in found.units.items():
        kept = list(keep.get(name, range(len(scores))))
        assert len(scores) == structure.group(name).size
        assert_close(scores[kept], fresh.units[name])
        gone = torch.ones(len(scores), dtype=torch.bool)
        gone[kept] = False
        assert scores[gone].isnan().all()
        assert not scores[kept].isnan().any()
    assert set(removed).isdisjoint(found.blocks)
    for (
        score
    ) in fresh.blocks.values():  # by value: a block of which one branch is left is named after it, or it after that
        assert any(score == pytest.approx(other, rel=1e-5) for other in found.blocks.values())


def test_all_blocks_but_one_can_go_in_any_order():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.units = nn.Conv2d(3, 4, 1), nn.Sequential(*(Unit(4, 3, 1) for _ in range(4)))
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.units(self.stem(x)))

    model, structure = build(Deep, IMAGES[:2])
    for left in range(4):
        removed = tuple(f"units.{place}" for place in range(4) if place != left)
        small = apply_plan(model, structure.plan({}, removed))
        found = measure_batches(small, structure, IMAGES, removed=removed)
        alone = nn.Sequential(model.stem, copy.deepcopy(model.units[left]), model.head).eval()
        expected = measure_batches(alone, analyze(trace(alone, (IMAGES[:2],))), IMAGES)
        assert found.blocks == {f"units.{left}": pytest.approx(expected.blocks["1"])}
        assert_close(found.units[f"units.{left}.conv1"], expected.units["1.conv1"])
        assert_close(found.units["stem"], expected.units["0"])


# --------------------------------------------------------------------------------------------- what must not disturb


class InPlace(nn.Module):
    """Works in place on what was just written, read and kept; `careful` says the same without."""

    def __init__(self, careful):
        super().__init__()
        self.careful = careful
        self.stem, self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.block, self.head = Lines(careful), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        if self.careful:
            x = x + self.fc2(F.relu(self.fc1(x)))
            return self.head(torch.relu(self.block(x)))
        out = self.fc2(self.fc1(x).relu_())
        out += x
        return self.head(self.block(out).relu_())


class Lines(nn.Module):
    def __init__(self, careful):
        super().__init__()
        self.careful = careful
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if self.careful:
            x = x + self.one(x)
            return x + self.two(x)
        x += self.one(x)
        x.add_(self.two(x))
        return x


@CRITERIA
def test_working_in_place_makes_no_difference(criterion):
    batch = torch.randn(9, 4)
    hasty, structure = build(lambda: InPlace(careful=False), batch[:2])
    careful, plain = build(lambda: InPlace(careful=True), batch[:2])
    with torch.no_grad():
        assert_close(hasty(batch), careful(batch))
    found = measure_batches(hasty, structure, batch, criterion=criterion)
    expected = measure_batches(careful, plain, batch, criterion=criterion)
    assert found.blocks.keys() >= {"fc1…fc2", "block.one", "block.two"}
    # The block as a whole overwrites the stream it is given, so it can't be bypassed and is no candidate.
    assert_same(found, dataclasses.replace(expected, blocks={name: expected.blocks[name] for name in found.blocks}))


def fused_layers(x, one, two):
    """A function that torch.overrides sees as one call, as many of torch.nn.functional are."""
    if torch.overrides.has_torch_function((x, one, two)):
        return torch.overrides.handle_torch_function(fused_layers, (x, one, two), x, one, two)
    return F.linear(F.relu(F.linear(x, one)), two)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.one, self.two = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(8, 10))

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + fused_layers(x, self.one, self.two))


@CRITERIA
def test_what_an_opaque_call_hides_is_reported_and_not_guessed(criterion):
    model, structure = build(Opaque, TOKENS[:2])
    assert [group.name for group in structure.groups] == ["stem", "one"]
    found = measure_batches(model, structure, TOKENS, criterion=criterion)
    assert found.unmeasured == ("one",)
    tap = Tap(model, TOKENS)
    through = lost_energy(tap.model.head, tap.input_of("head"), unit_slots(8), -1) / energy(tap.output_of("head"), -1)
    if criterion == "relative":  # by the one reader that can be seen
        assert_close(found.units["stem"], through, rtol=2e-5, atol=0)
    assert set(found.units) == {"stem"}


def add_module(x, module):
    """The same with a module inside, and the addition behind it."""
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(add_module, (x,), x, module)
    return x + module(x)


class OpaqueBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(add_module(self.stem(x), self.inner))


@CRITERIA
def test_a_branch_that_an_opaque_call_hides_is_reported_and_has_no_score(criterion):
    model, structure = build(OpaqueBranch, TOKENS[:2])
    (addition,) = (node for node in structure.graph.nodes.values() if node.op.startswith("aten.add"))
    entry, inner = addition.inputs()
    hidden = [
        Block("as branch", "branch", entry, addition.name, addition.name, inner, frozenset([inner]), {"inner": "zero"}),
        Block("as block", "block", entry, inner, "", "", frozenset([inner]), {"inner": "identity"}),
    ]
    found = measure_batches(model, dataclasses.replace(structure, blocks=tuple(hidden)), TOKENS, criterion=criterion)
    assert found.blocks == {}
    assert {"as branch", "as block"} <= set(found.unmeasured)


class Wide(nn.Module):
    """Queries and keys narrower than values: nothing but the attention itself reads their width."""

    def __init__(self):
        super().__init__()
        self.heads, self.narrow, self.wide, self.scale = 2, 3, 4, 0.5
        self.q, self.k, self.v = nn.Linear(4, 2 * 3), nn.Linear(4, 2 * 3), nn.Linear(4, 2 * 4)
        self.out = nn.Linear(2 * 4, 2)

    def forward(self, x):
        q, k = (f(x).unflatten(-1, (self.heads, self.narrow)).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (self.heads, self.wide)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


def test_units_that_no_weight_reads_have_no_relative_divergence():
    model, structure = build(Wide, TOKENS[:2])
    names = {group.name for group in structure.groups}
    (narrow,) = (group.name for group in structure.groups if group.size == 3)
    found = measure_batches(model, structure, TOKENS)
    assert found.unmeasured == (narrow,)
    assert set(found.units) == names - {narrow}
    assert measure_batches(model, structure, TOKENS, criterion="paper").unmeasured == ()


@CRITERIA
def test_torchs_own_encoder(criterion):
    model, structure = build(nets.TorchEncoder, TOKENS[:2])
    found = measure_batches(model, structure, TOKENS, criterion=criterion)
    assert found.unmeasured == ()
    assert all(scores.min() >= 0 and scores.max() < 10 for scores in found.units.values())
    assert all(0 < score < 10 for score in found.blocks.values())


# ------------------------------------------------------------------------------------------------ nothing stays behind


def traces_of(model):
    """Everything that a measurement could leave on a model or in torch."""
    hooks = [
        len(table)
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    everywhere = [len(global_hooks._global_forward_hooks), len(global_hooks._global_forward_pre_hooks)]
    modes = [module.training for module in model.modules()]
    named = dict([*model.named_parameters(), *model.named_buffers()])
    tensors = {name: tensor.detach().clone() for name, tensor in named.items()}
    tensors |= {f"{name}.grad": tensor.grad.clone() for name, tensor in named.items() if tensor.grad is not None}
    attributes = [sorted(vars(module)) for module in model.modules()]
    return (
        hooks,
        everywhere,
        modes,
        len(_get_current_function_mode_stack()),
        torch.is_grad_enabled(),
        attributes,
        tensors,
    )


def assert_untouched(model, before):
    after = traces_of(model)
    assert after[:-1] == before[:-1]
    assert_close(after[-1], before[-1], rtol=0, atol=0)


def used_model(make, batch):
    """A model in the middle of its life: mixed modes, gradients."""
    model, structure = build(make, batch[:2])
    model.train()
    for place, module in enumerate(model.modules()):
        module.training = place % 2 == 0
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    return model, structure


@EVERY_NET
@CRITERIA
def test_the_model_is_left_as_it_was(net, criterion):
    make, batch = NETS[net]
    model, structure = used_model(make, batch)
    before = traces_of(model)
    measure_batches(model, structure, batch, criterion=criterion)
    assert_untouched(model, before)


@EVERY_NET
@CRITERIA
def test_modes_of_training_do_not_matter(net, criterion):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    expected = measure_batches(model, structure, batch, criterion=criterion)
    assert_same(measure_batches(model.train(), structure, batch, criterion=criterion), expected)


def test_passes_run_in_eval_mode_without_gradients():
    model, structure = used_model(Convs, IMAGES)
    seen = []

    def run(m):
        seen.append((torch.is_grad_enabled(), any(module.training for module in m.modules())))
        m(IMAGES)

    measure(model, structure, [Pass(run), Pass(run)])
    assert seen == [(False, False)] * 2


def fail(*_args, **_kwargs):
    raise RuntimeError("on purpose")


@EVERY_NET
def test_nothing_stays_behind_after_an_error_in_the_forward_pass(net):
    make, batch = NETS[net]
    model, structure = used_model(make, batch)
    last = [module for module in model.modules() if not list(module.children())][-1]
    last.forward = fail
    before = traces_of(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        measure_batches(model, structure, batch)
    assert_untouched(model, before)
    del last.forward
    assert measure_batches(model, structure, batch).unmeasured == ()


@pytest.mark.parametrize("criterion", ["relative", "paper"])
def test_nothing_stays_behind_after_an_error_in_a_probe(criterion, monkeypatch):
    model, structure = used_model(Convs, IMAGES)
    before = traces_of(model)
    with monkeypatch.context() as patched:
        patched.setattr("idap.divergence.watch.ChannelStats.add", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            measure_batches(model, structure, IMAGES, criterion=criterion)
    assert_untouched(model, before)


def test_nothing_stays_behind_after_an_error_while_a_batch_is_loaded():
    model, structure = used_model(Convs, IMAGES)
    before = traces_of(model)

    def passes():
        yield Pass(lambda m: m(IMAGES))
        fail()

    with pytest.raises(RuntimeError, match="on purpose"):
        measure(model, structure, passes())
    assert_untouched(model, before)


@EVERY_NET
@CRITERIA
def test_no_activation_outlives_its_batch(net, criterion):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    seen = []

    def note(_module, _given, made):
        seen.append(weakref.ref(made))

    for module in model.modules():
        module.register_forward_hook(note)

    def run(m, part):
        gc.collect()
        assert [ref for ref in seen if ref() is not None] == []
        m(part)

    measure(model, structure, [Pass(lambda m, part=part: run(m, part)) for part in batch.split(5)], criterion=criterion)
    assert len(seen) >= 10


# -------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_criterion():
    model, structure = build(Mlp, TOKENS[:2])
    with pytest.raises(ConfigError, match=r"^there is no criterion 'largest'; there are relative, fluctuation, "):
        measure_batches(model, structure, TOKENS, criterion="largest")


def test_no_calibration_batch():
    model, structure = build(Mlp, TOKENS[:2])
    with pytest.raises(TaskError, match=r"^there is no calibration batch; the divergence needs at least one\.$"):
        measure_batches(model, structure)


def test_unknown_names_in_the_plan():
    model, structure = build(Mlp, TOKENS[:2])
    with pytest.raises(StructureError, match=r"there is no group named 'fc9'"):
        measure_batches(model, structure, TOKENS, keep={"fc9": (0,)})
    with pytest.raises(StructureError, match=r"there is no block or branch named 'fc9'"):
        measure_batches(model, structure, TOKENS, removed=("fc9",))


def test_a_forward_pass_that_takes_another_way_is_noticed():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = F.relu(self.one(x))
            return self.head(x if len(x) > 3 else F.relu(self.two(x)))

    model, structure = build(Forked, torch.randn(2, 4))
    with pytest.raises(
        StructureError,
        match=r"^call \d of '\w+' in module '.+' was seen when the model was traced but not now: its forward takes "
        r"another path on this data\. Trace it on inputs like the calibration data\.$",
    ):
        measure_batches(model, structure, torch.randn(5, 4))
    assert set(measure_batches(model, structure, torch.randn(3, 4)).units) == {"one", "two"}


def test_a_call_that_makes_several_operators_tells_no_tensor_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2), nn.Conv2d(4, 2, 1))
    graph = trace(model, (IMAGES[:2],))
    inside = [node.name for node in graph.nodes.values() if node.call == ("1", "local_response_norm", 0)]
    assert len(inside) > 5
    assert [name for name in inside if observing.tensors_given(graph, name) is not None] == []
    assert [observing.is_result(graph, name) for name in inside] == [False] * (len(inside) - 1) + [True]


def test_the_steps_of_torchs_attention_are_told_apart():
    """Every one of them is a call of its own, of which the tensors are known."""
    _, structure = build(nets.TorchEncoder, TOKENS[:2])
    graph = structure.graph
    inside = [n.name for n in graph.nodes.values() if n.call and n.call[0].endswith("self_attn")]
    assert any("scaled_dot_product_attention" in graph.nodes[name].op for name in inside)
    assert all(observing.is_result(graph, name) for name in inside)
    assert [name for name in inside if observing.tensors_given(graph, name) is None] == []
