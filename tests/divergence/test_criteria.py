"""What all criteria share: one pass, statistics that do not disturb each other, padding, few digits, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from idap.divergence.criteria import CRITERIA, OF_THE_LOSS, WITH_BLOCKS
from idap.divergence.measure import Divergence, measure, measure_all
from idap.divergence.observe import Pass
from idap.errors import ConfigError, StructureError, TaskError
from tests import nets
from tests.divergence.parts import Convs, Mlp, Tap, build, energy, lost_energy, measure_batches, unit_slots

DRAW = torch.Generator().manual_seed(6)
IMAGES, TOKENS = torch.randn(6, 3, 6, 6, generator=DRAW), torch.randn(6, 5, 4, generator=DRAW)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
OF_THE_FLOW = ("relative", "fluctuation", "paper", "share", "activation", "innovation")


def transformer(attention=nets.FusedAttention):
    return nets.Encoder(4, 8, nets.PreNorm(8, attention(8, 3, 4), nets.FeedForward(8, 10)))


NETS = {"convs": (Convs, IMAGES), "transformer": (transformer, TOKENS)}
EVERY_NET = pytest.mark.parametrize("net", NETS)


def labelled_passes(batch, labels=LABELS):
    return [Pass(lambda m: m(batch), lambda out: F.cross_entropy(out, labels))]


def assert_equal(found: Divergence, expected: Divergence, *, rtol=0.0):
    assert found.units.keys() == expected.units.keys()
    for name, scores in expected.units.items():
        assert_close(found.units[name], scores, rtol=rtol, atol=0, equal_nan=True)
    assert found.blocks == pytest.approx(expected.blocks, rel=rtol, abs=0)
    assert found.unmeasured == expected.unmeasured


# ----------------------------------------------------------------------------------------------- all at once or alone


@EVERY_NET
def test_criteria_measured_together_equal_each_measured_alone(net):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    model, batch = model.double(), batch.double()  # the order of sums shows in the last digits
    data = [*labelled_passes(batch[:4], LABELS[:4]), *labelled_passes(batch[4:], LABELS[4:])]
    together = measure_all(model, structure, data, criteria=list(CRITERIA), seed=3)
    assert list(together) == list(CRITERIA)
    for name in CRITERIA:
        assert_equal(together[name], measure(model, structure, data, criterion=name, seed=3), rtol=1e-12)
        assert together[name].criterion == name
    backwards = measure_all(model, structure, data, criteria=list(CRITERIA)[::-1], seed=3)
    for name in CRITERIA:
        assert_equal(backwards[name], together[name], rtol=1e-12)


@EVERY_NET
def test_one_pass_over_the_data_serves_all(net):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    runs, losses = [], []

    def run(m, part):
        runs.append(len(part))
        return m(part)

    def loss(out, labels):
        losses.append(len(labels))
        return F.cross_entropy(out, labels)

    data = (
        Pass(lambda m, x=x: run(m, x), lambda out, y=y: loss(out, y))
        for x, y in zip(batch.split(4), LABELS.split(4), strict=True)
    )
    measure_all(model, structure, data, criteria=list(CRITERIA))
    assert runs == losses == [4, 2]


@EVERY_NET
def test_no_score_is_negative_and_only_some_know_blocks(net):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    for name, found in measure_all(model, structure, labelled_passes(batch), criteria=list(CRITERIA)).items():
        assert all(bool((scores >= 0).all()) for scores in found.units.values()), name
        assert all(score >= 0 for score in found.blocks.values())
        assert bool(found.blocks) == (name in WITH_BLOCKS)
        for group, scores in found.units.items():
            assert scores.shape == (structure.group(group).size,)
            assert scores.dtype == torch.float64


@pytest.mark.parametrize("criterion", [*OF_THE_FLOW, *OF_THE_LOSS])
def test_no_gradient_and_no_graph_in_the_scores(criterion):
    model, structure = build(Mlp, TOKENS[:2])
    data = [Pass(lambda m: m(TOKENS), lambda out: out.square().mean())]
    found = measure(model, structure, data, criterion=criterion)
    assert not any(scores.requires_grad for scores in found.units.values())
    assert all(type(score) is float for score in found.blocks.values())


# ------------------------------------------------------------------------------------------------------------- forms


def test_shares_add_up_to_one():
    model, structure = build(transformer, TOKENS[:2])
    both = measure_all(model, structure, labelled_passes(TOKENS), criteria=["share", "paper"])
    for name, scores in both["share"].units.items():
        assert float(scores.sum()) == pytest.approx(1, rel=1e-12)
        paper = both["paper"].units[name]
        assert_close(scores, paper / paper.sum(), rtol=1e-12, atol=0)
    assert sum(both["share"].blocks.values()) == pytest.approx(1, rel=1e-12)


def test_activation_is_the_root_mean_square_of_what_is_written():
    model, structure = build(Convs, IMAGES[:2])
    tap = Tap(model, IMAGES)
    found = measure_batches(model, structure, IMAGES, criterion="activation").units
    rms = lambda x: x.square().mean((0, 2, 3)).sqrt()  # noqa: E731
    assert_close(found["two.conv1"], rms(tap.input_of("two.conv2")), rtol=1e-5, atol=0)
    assert_close(found["last"], rms(F.relu(tap.output_of("last"))), rtol=1e-5, atol=0)
    wrote = [tap.input_of("one"), tap.output_of("one.bn2"), tap.output_of("two.bn2")]
    squares = torch.stack([rms(x).square() for x in wrote]).mean(0)
    assert_close(found["stem"], squares.sqrt(), rtol=1e-5, atol=0)


def test_activation_of_heads_is_what_their_projection_reads():
    model, structure = build(transformer, TOKENS[:2])
    read = Tap(model, TOKENS).input_of("blocks.0.attn.proj").unflatten(-1, (3, 4))
    found = measure_batches(model, structure, TOKENS, criterion="activation").units["blocks.0.attn.qkv:heads"]
    assert_close(found, read.square().mean((0, 1, 3)).sqrt(), rtol=1e-5, atol=0)


def test_fluctuation_leaves_out_what_a_bias_can_take_over():
    model, structure = build(Mlp, TOKENS[:2])
    tap = Tap(model, TOKENS)
    read = tap.input_of("fc2")
    through = lost_energy(tap.model.fc2, read - read.mean((0, 1)), unit_slots(10), -1) / energy(
        tap.output_of("stem"), -1
    )
    both = [
        measure_batches(model, structure, TOKENS, criterion=name).units["fc1"] for name in ("fluctuation", "relative")
    ]
    assert_close(both[0], through, rtol=1e-4, atol=1e-9)
    assert bool((both[0] <= both[1]).all())


def test_fluctuation_of_heads_and_of_wide_convolutions():
    model, structure = build(transformer, TOKENS[:2])
    tap = Tap(model, TOKENS)
    read = tap.input_of("blocks.0.attn.proj")
    through = lost_energy(tap.model.blocks[0].attn.proj, read - read.mean((0, 1)), unit_slots(3, 4), -1)
    found = measure_batches(model, structure, TOKENS, criterion="fluctuation").units["blocks.0.attn.qkv:heads"]
    assert_close(found, through / energy(tap.input_of("blocks.0.norm1"), -1), rtol=1e-4, atol=1e-9)
    model, structure = build(Convs, IMAGES[:2])
    tap = Tap(model, IMAGES)
    unit = tap.model.two
    scale = unit.bn2.weight / (unit.bn2.running_var + unit.bn2.eps).sqrt()
    weights = (unit.conv2.weight * scale[:, None, None, None]).square().sum((0, 2, 3)).detach()
    variance = tap.input_of("two.conv2").var((0, 2, 3), correction=0)
    found = measure_batches(model, structure, IMAGES, criterion="fluctuation").units["two.conv1"]
    assert_close(found, weights * variance / energy(tap.input_of("two"), 1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("attention", [nets.FusedAttention, nets.WrittenAttention])
def test_heads_and_neurons_add_up_to_their_block(attention):
    """D5, and the additivity of heads."""
    model, structure = build(lambda: transformer(attention), TOKENS[:2])
    found = measure_batches(model, structure, TOKENS, criterion="paper")
    block, tap = "blocks.0", Tap(model, TOKENS)
    attn, last = tap.model.blocks[0].attn, "proj" if attention is nets.FusedAttention else "out_proj"
    packed = attn.qkv.weight if last == "proj" else torch.cat([getattr(attn, f"{n}_proj").weight for n in "qkv"])
    projections = packed.detach().reshape(3, 3, 4, 8).flatten(2).norm(dim=2).sum(0)  # (heads,)
    read = (
        tap.input_of(f"{block}.attn.{last}").unflatten(-1, (3, 4)).transpose(1, 2).flatten(2)
    )  # (B, heads, T x width)
    heads = float((read.norm(dim=2).mean(0) / 5 * projections).sum())
    hidden = tap.input_of(f"{block}.mlp.fc2").norm(dim=1).mean(0) / (5 * 10)  # (neurons,)
    neurons = float((hidden * tap.model.blocks[0].mlp.fc1.weight.detach().norm(dim=1)).sum())
    assert found.inside(structure, f"{block}.norm1…attn") == pytest.approx(heads, rel=1e-5)
    assert found.inside(structure, f"{block}.norm2…mlp") == pytest.approx(neurons, rel=1e-5)
    assert found.inside(structure, block) == pytest.approx(heads + neurons, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- padding


class Up(nn.Module):
    """A grouped transposed convolution, whose weight has fewer output channels than what comes out, and its norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.up, self.norm = nn.ConvTranspose2d(8, 6, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.up(F.relu(self.stem(x))))))


def test_grouped_transposed_convolutions():
    model, structure = build(Up, IMAGES[:2])
    tap = Tap(model, IMAGES)
    found = measure_all(model, structure, [Pass(lambda m: m(IMAGES))], criteria=["relative", "paper", "activation"])
    read, made = tap.input_of("up"), tap.input_of("head")
    places = next(group.name for group in structure.groups if group.size == 4)  # in each of the two parts
    norm = lambda x: tap.model.norm(tap.model.up(x))  # noqa: E731
    slot = lost_energy(norm, read, unit_slots(8), 1).reshape(2, 4).sum(0)
    assert_close(found["relative"].units[places], slot / energy(tap.output_of("norm"), 1), rtol=1e-4, atol=0)
    outputs = next(group.name for group in structure.groups if group.size == 3)
    weights = tap.model.up.weight.detach().reshape(2, 4, 3).square().sum((0, 1)).sqrt()
    norms = made.unflatten(1, (2, 3)).transpose(1, 2).flatten(2).norm(dim=2).mean(0) / (6 * 36)
    assert_close(found["paper"].units[outputs], norms * weights, rtol=1e-4, atol=0)
    rms = made.unflatten(1, (2, 3)).square().mean((0, 1, 3, 4)).sqrt()
    assert_close(found["activation"].units[outputs], rms, rtol=1e-4, atol=0)


class PaddedEncoder(nn.Module):
    """Tokens attend to those that count."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Attending(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x, mask):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Attending(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj, self.mlp = nn.Linear(width, 24), nn.Linear(8, width), nets.FeedForward(width, 10)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


LENGTHS = (5, 2, 3, 4)


@pytest.mark.parametrize("width", [8, 5])  # five channels beside five places
@pytest.mark.parametrize("criterion", OF_THE_FLOW)
def test_padding_counts_for_nothing(criterion, width):
    batch = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(2)).double()
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    model, structure = build(lambda: PaddedEncoder(width), batch[:2].float(), mask[:2])
    model.double()
    padded = [Pass(lambda m, rows=rows: m(batch[rows], mask[rows]), padding=mask[rows]) for rows in ([0, 1], [2, 3])]
    alone = [Pass(lambda m, i=i, n=n: m(batch[i : i + 1, :n], mask[i : i + 1, :n])) for i, n in enumerate(LENGTHS)]
    found, expected = (measure(model, structure, data, criterion=criterion) for data in (padded, alone))
    assert set(expected.units) == {group.name for group in structure.groups}
    assert_equal(found, expected, rtol=1e-9)
    if criterion != "share":
        ignorant = measure(model, structure, [Pass(lambda m: m(batch, mask))], criterion=criterion)
        assert not torch.allclose(ignorant.units["embed"], expected.units["embed"], rtol=1e-3)


def test_rows_of_padding_may_be_flattened_away_and_still_count_for_nothing():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mlp()

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    batch = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    model, structure = build(Flat, batch[:2])
    kept = batch[mask][:, None]
    criteria = ["relative", "fluctuation", "paper", "activation", "innovation"]
    found = measure_all(model, structure, [Pass(lambda m: m(batch), padding=mask)], criteria=criteria)
    expected = measure_all(model, structure, [Pass(lambda m: m(kept))], criteria=criteria)
    for name in criteria:
        assert_equal(found[name], expected[name], rtol=1e-4)


@pytest.mark.parametrize("criterion", OF_THE_FLOW)
def test_sequences_of_any_length_follow_one_another(criterion):
    model, structure = build(transformer, TOKENS[:2])
    parts = [TOKENS[:2], TOKENS[2:4, :3], TOKENS[4:, :4]]
    found = measure_batches(model, structure, *parts, criterion=criterion)
    singly = [part[i : i + 1] for part in parts for i in range(len(part))]
    assert_equal(found, measure_batches(model, structure, *singly, criterion=criterion), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- few digits


@EVERY_NET
def test_few_digits_give_nearly_the_same_scores(net):
    make, batch = NETS[net]
    model, structure = build(make, batch[:2])
    criteria = [*OF_THE_FLOW, *OF_THE_LOSS]

    def run(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(batch)

    few = [Pass(run, lambda out: F.cross_entropy(out.float(), LABELS))]
    found = measure_all(model, structure, few, criteria=criteria)
    expected = measure_all(model, structure, labelled_passes(batch), criteria=criteria)
    for name in criteria:
        assert found[name].units.keys() == expected[name].units.keys()
        for group, scores in expected[name].units.items():
            of = "relative" if name == "fluctuation" else name  # beside a large mean the digits left are few
            assert_close(found[name].units[group], scores, rtol=0.1, atol=0.02 * float(expected[of].units[group].max()))
        assert found[name].blocks == pytest.approx(expected[name].blocks, rel=0.05)


# ------------------------------------------------------------------------------------------------------- one's own


def test_a_function_of_ones_own_may_give_scores_at_once():
    model, structure = build(Mlp, TOKENS[:2])

    def rows(scene):
        return {"fc1": scene.model.fc1.weight.abs().sum(1)}

    found = measure_batches(model, structure, TOKENS, criterion=rows, keep={"fc1": range(10)})
    assert found.criterion == "rows"
    assert found.unmeasured == ("stem",)
    assert_close(found.units["fc1"], model.fc1.weight.detach().double().abs().sum(1), rtol=1e-6, atol=0)


class Largest:
    """Mean of what each unit's readers read."""

    def __init__(self, scene):
        self._stats = {}
        for group in scene.groups:
            place = scene.place(scene.alive(group.readers)[0])
            self._stats[group.name] = scene.watch.channels(place.contraction.input, place.contraction.input_dim)

    def units(self):
        return {name: stats.mean.abs() for name, stats in self._stats.items()}

    def blocks(self):
        return {"fc1…fc2": 1.5}


def test_a_function_of_ones_own_may_watch():
    model, structure = build(Mlp, TOKENS[:2])
    tap = Tap(model, TOKENS)
    found = measure_all(model, structure, [Pass(lambda m: m(TOKENS))], criteria=[Largest, "relative"])
    assert_close(found["Largest"].units["fc1"], tap.input_of("fc2").mean((0, 1)).abs(), rtol=1e-5, atol=1e-8)
    assert_close(found["Largest"].units["stem"], tap.input_of("fc1").mean((0, 1)).abs(), rtol=1e-5, atol=1e-8)
    assert found["Largest"].blocks == {"fc1…fc2": 1.5}
    assert_equal(found["relative"], measure_batches(model, structure, TOKENS), rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"fc1": torch.ones(9)},
            r"^criterion 'mine' gave scores of shape \(9,\) for group 'fc1', which has 10 units\.$",
        ),
        ({"fc1": torch.ones(10, 1)}, r"gave scores of shape \(10, 1\) for group 'fc1'"),
        ({"fc9": torch.ones(9)}, r"^criterion 'mine' gave scores for 'fc9', which is not a group of this model\.$"),
        (
            None,
            r"^criterion 'mine' returned None; expected a dict from group to the scores of its units, or an object ",
        ),
    ],
)
def test_scores_of_ones_own_that_fit_no_group(given, said):
    model, structure = build(Mlp, TOKENS[:2])

    def mine(_scene):
        return given

    with pytest.raises(ConfigError, match=said):
        measure_batches(model, structure, TOKENS, criterion=mine)


def test_two_criteria_of_one_name():
    model, structure = build(Mlp, TOKENS[:2])

    def relative(_scene):
        return {}

    with pytest.raises(ConfigError, match=r"^two criteria are called 'relative'; give your own functions different"):
        measure_all(model, structure, [Pass(lambda m: m(TOKENS))], criteria=["relative", relative])
    twice = measure_all(model, structure, [Pass(lambda m: m(TOKENS))], criteria=["relative", "relative"])
    assert list(twice) == ["relative"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", OF_THE_FLOW)
def test_data_that_are_not_finite(criterion, bad):
    model, structure = build(Mlp, TOKENS[:2])
    batch = TOKENS.clone()
    batch[2, 1, 0] = bad
    with pytest.raises(StructureError, match=r"look for NaN or infinite values in the calibration data and in the"):
        measure_batches(model, structure, batch, criterion=criterion)


@pytest.mark.parametrize("criterion", ["innovation", "taylor", "magnitude", "random"])
def test_no_data(criterion):
    model, structure = build(Mlp, TOKENS[:2])
    with pytest.raises(TaskError, match=r"^there is no calibration batch; "):
        measure_batches(model, structure, criterion=criterion)
