"""The innovation form against least squares: take a unit away, refit what reads it, look at what is lost."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from idap.divergence import innovation
from idap.divergence.measure import measure_all
from idap.divergence.observe import Pass
from idap.divergence.ports import Unfolding
from idap.errors import StructureError
from idap.graph.rules import Contraction
from idap.graph.trace import trace
from idap.linalg.moments import SecondMoments
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from tests import nets
from tests.divergence.parts import Convs, Mlp, Tap, build, energy, measure_batches, passes, unit_slots


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


@pytest.fixture
def no_damping(monkeypatch):
    """As good as no ridge, in float64: without one the score is the error of least squares itself."""
    monkeypatch.setattr(innovation, "DAMPING", 1e-9)
    monkeypatch.setattr(innovation, "PER_SAMPLE", 10**6)
    monkeypatch.setattr(innovation, "PER_SAMPLE", 10**6)
    monkeypatch.setattr(SecondMoments, "count", property(lambda _: 1e10))  # the other lower bound of the ridge


def exact_scores(model, structure, batch):
    return measure_batches(model.double(), structure, batch.double(), criterion="innovation").units


def refit_error(rows, outputs, gone):
    """Mean squared norm of what is left of the outputs after the best fit, with an intercept, without some columns."""
    kept = [column for column in range(rows.shape[1]) if column not in gone]
    rows, outputs = rows - rows.mean(0), outputs - outputs.mean(0)
    if not kept:
        return outputs.square().sum(1).mean()
    fit = torch.linalg.lstsq(rows[:, kept], outputs, driver="gelsd").solution
    return (outputs - rows[:, kept] @ fit).square().sum(1).mean()


def greedy_scores(rows, outputs, slots):
    """Scores by brute force: at each step refit without each unit that is left, let the cheapest go."""
    scores, gone, order = torch.zeros(len(slots), dtype=torch.float64), [], []
    while len(order) < len(slots):
        left = [unit for unit in range(len(slots)) if unit not in order]
        costs = [float(refit_error(rows, outputs, [*gone, *slots[unit]])) for unit in left]
        cost, unit = min(zip(costs, left, strict=True))
        scores[unit] = cost
        order.append(unit)
        gone += slots[unit]
    return scores


def assert_same(found, expected, rtol=1e-4):
    assert_close(found, expected.detach(), rtol=rtol, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- the rows

CONV = Contraction("conv", "conv", "x", 1, "w", 1, 0, 1)


def rows_of(spatial, stride, padding, dilation, x, weight, op=None):
    x_ref, w_ref = (SimpleNamespace(name=name) for name in "xw")
    op = op or f"aten.conv{spatial}d.default"
    args = (x_ref, w_ref, None, stride, padding, dilation, 1)
    rows = Unfolding(CONV, SimpleNamespace(op=op, args=args, kwargs={}), 10**6)
    chosen = rows.choose(x, weight, lambda _: None, 0)
    return rows, rows.of(x, weight, chosen), chosen


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), ((2, 1), (0, 2), (1, 2)), (1, 2, 2)])
def test_rows_of_a_convolution_are_its_unfolded_patches(stride, padding, dilation):
    x, weight = torch.randn(3, 4, 7, 8), torch.randn(5, 4, 3, 2)
    rows, found, _ = rows_of(2, stride, padding, dilation, x, weight)
    pair = lambda v: list(v) if isinstance(v, tuple) else [v, v]  # noqa: E731
    patches = F.unfold(x, (3, 2), dilation=pair(dilation), padding=pair(padding), stride=pair(stride))
    assert_close(found, patches.transpose(1, 2).reshape(1, -1, 4 * 6), rtol=0, atol=0)
    y = F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation).movedim(1, -1).reshape(-1, 5)
    assert_close(found[0] @ rows.matrix(weight, 1)[0].T, y, rtol=1e-4, atol=1e-4)
    assert_close(rows.weight(rows.matrix(weight, 1), weight), weight)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_by_name(padding, kernel):
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, *kernel)
    rows, found, _ = rows_of(2, 1, padding, 2 if padding == "valid" else 1, x, weight, op="aten.conv2d.padding")
    y = F.conv2d(x, weight, padding=padding, dilation=2 if padding == "valid" else 1)
    assert_close(found[0] @ rows.matrix(weight, 1)[0].T, y.movedim(1, -1).reshape(-1, 5), rtol=1e-4, atol=1e-4)


def test_rows_of_grouped_and_of_one_dimensional_convolutions():
    x, weight = torch.randn(2, 6, 5, 5), torch.randn(9, 2, 3, 3)
    rows, found, _ = rows_of(2, 1, 1, 1, x, weight)
    patches = F.unfold(x, 3, padding=1).reshape(2, 3, 18, -1).permute(1, 0, 3, 2).reshape(3, -1, 18)
    assert_close(found, patches, rtol=0, atol=0)
    y = torch.cat(list(found @ rows.matrix(weight, 3).transpose(1, 2)), -1)
    assert_close(y, F.conv2d(x, weight, padding=1, groups=3).movedim(1, -1).reshape(-1, 9), rtol=1e-4, atol=1e-4)
    line, taps = torch.randn(3, 4, 9), torch.randn(5, 4, 3)
    _, found, _ = rows_of(1, 2, 1, 2, line, taps)
    patches = F.unfold(line[:, :, None], (1, 3), dilation=(1, 2), padding=(0, 1), stride=(1, 2))
    assert_close(found, patches.transpose(1, 2).reshape(1, -1, 12), rtol=0, atol=0)


def test_some_rows_are_drawn_without_repetition_and_the_same_again():
    x, weight = torch.randn(4, 3, 6, 6), torch.randn(2, 3, 3, 3)
    rows, whole, everywhere = rows_of(2, 1, 1, 1, x, weight)
    few = Unfolding(CONV, rows.node, 10)
    chosen = few.choose(x, weight, lambda _: None, 7)
    assert len(chosen.unique()) == len(chosen) == 10 < len(everywhere) == 144
    assert torch.equal(chosen, few.choose(x, weight, lambda _: None, 7))
    assert not torch.equal(chosen, few.choose(x, weight, lambda _: None, 8))
    assert_close(few.of(x, weight, chosen), whole[:, chosen], rtol=0, atol=0)


def test_second_moments_keep_their_digits_beside_a_large_mean():
    rows = torch.randn(3, 50, 4) + torch.tensor([0.0, 10.0, 1000.0, -3000.0])
    gram = SecondMoments()
    for part in rows.split([20, 0, 30], 1):
        gram.add(part)
    exact = rows.double() - rows.double().mean(1, keepdim=True)
    assert gram.count == 50
    assert_close(gram.covariance(), exact.transpose(1, 2) @ exact / 50, rtol=1e-4, atol=1e-5)


def test_few_rows_wait_for_more_and_none_is_lost():
    rows = torch.randn(2, 700, 4)
    gram, at_once = SecondMoments(), SecondMoments()
    for part in rows.split([100, 100, 300, 200], 1):
        gram.add(part)
        assert bool(gram.sums) == (part.shape[1] >= 200)
    at_once.add(rows)
    assert gram.count == at_once.count == 700
    assert_close(gram.covariance(), at_once.covariance(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the elimination


def test_neurons_go_in_the_order_of_brute_force(no_damping):
    batch = torch.randn(200, 4)
    model, structure = build(Mlp, batch[:2])
    tap = Tap(model, batch)
    found = exact_scores(model, structure, batch)["fc1"]
    outputs = tap.input_of("fc2") @ tap.model.fc2.weight.detach().T
    expected = greedy_scores(tap.input_of("fc2"), outputs, unit_slots(10)) / energy(tap.output_of("stem"), -1)
    assert_same(found, expected)
    assert found.argsort().tolist() == expected.argsort().tolist()


def test_the_first_neuron_to_go_with_the_ridge_that_is_used():
    batch = torch.randn(2000, 4)
    model, structure = build(Mlp, batch[:2])
    tap = Tap(model, batch)
    rows = tap.input_of("fc2")
    found = measure_batches(model, structure, batch, criterion="innovation").units["fc1"]
    first = int(found.argmin())
    outputs = rows @ tap.model.fc2.weight.detach().T
    costs = torch.stack([refit_error(rows, outputs, [unit]) for unit in range(10)])
    costs = costs / energy(tap.output_of("stem"), -1)
    assert first == int(costs.argmin())
    assert float(costs[first]) <= float(found[first]) <= float(costs[first]) * 1.1 + 0.01 * float(found.max())


def test_a_stream_costs_the_mean_over_those_that_read_it(no_damping):
    batch = torch.randn(300, 8)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(8, 5), nn.Linear(5, 3), nn.Linear(5, 4)

        def forward(self, x):
            x = torch.tanh(self.stem(x))
            return torch.cat([self.one(x), self.two(x)], -1)

    model, structure = build(Two, batch[:2])
    tap = Tap(model, batch)
    found = exact_scores(model, structure, batch)["stem"]
    scaled = [tap.output_of(name) / energy(tap.output_of(name), -1).sqrt() for name in ("one", "two")]
    assert_same(found, greedy_scores(tap.input_of("one"), torch.cat(scaled, -1), unit_slots(5)) / 2)


@pytest.mark.parametrize("kernel", [1, 3])
def test_filters_with_their_norm_folded_in(kernel, no_damping):
    batch = torch.randn(12, 3, 6, 6)
    model, structure = build(lambda: Convs(kernel=kernel), batch[:2])
    tap = Tap(model, batch)
    unit = tap.model.two
    patches = F.unfold(tap.input_of("two.conv2"), kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
    outputs = unit.bn2(unit.conv2(tap.input_of("two.conv2"))).detach().movedim(1, -1).flatten(0, -2)
    expected = greedy_scores(patches, outputs, unit_slots(4, kernel**2)) / energy(tap.input_of("two"), 1)
    assert_same(exact_scores(model, structure, batch)["two.conv1"], expected)


def test_places_within_the_parts_of_a_grouped_convolution(no_damping):
    batch = torch.randn(12, 3, 6, 6)

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, stride=2, groups=2)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(F.relu(self.mix(F.relu(self.stem(x)))))

    model, structure = build(Grouped, batch[:2])
    tap = Tap(model, batch)
    (group,) = (group for group in structure.groups if ("mix.weight", 1) in group.members)
    read = tap.input_of("mix").unflatten(1, (2, 4))
    parts = [F.unfold(read[:, part], 3, stride=2).transpose(1, 2).flatten(0, 1) for part in range(2)]
    made = tap.output_of("mix").movedim(1, -1).flatten(0, -2).unflatten(1, (2, 3))
    found = exact_scores(model, structure, batch)[group.name]
    first = int(found.argmin())
    costs = [
        sum(refit_error(parts[p], made[:, p], list(range(9 * u, 9 * u + 9))) for p in range(2)) / 2 for u in range(4)
    ]
    costs = torch.stack(costs) / energy(tap.output_of("mix"), 1)
    assert first == int(costs.argmin())
    assert_same(found[first], costs[first])


def test_heads(no_damping):
    batch = torch.randn(40, 6, 4)
    make = lambda: nets.Encoder(4, 8, nets.PreNorm(8, nets.FusedAttention(8, 3, 4), nets.FeedForward(8, 10)))  # noqa: E731
    model, structure = build(make, batch[:2])
    tap = Tap(model, batch)
    path = "blocks.0.attn.proj"
    rows, outputs = tap.input_of(path).flatten(0, 1), tap.output_of(path).flatten(0, 1)
    expected = greedy_scores(rows, outputs, unit_slots(3, 4)) / energy(tap.input_of("blocks.0.norm1"), -1)
    found = exact_scores(model, structure, batch)["blocks.0.attn.qkv:heads"]
    assert_same(found, expected, rtol=1e-3)


def test_a_channel_flattened_into_many_features(no_damping):
    batch = torch.randn(200, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    tap = Tap(model, batch)
    expected = greedy_scores(tap.input_of("head"), tap.output_of("head"), unit_slots(4, 4)) / energy(
        tap.output_of("head"), -1
    )
    assert_same(exact_scores(model, structure, batch)["last"], expected)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.two(self.one(x))


def test_a_unit_that_the_others_make_up_goes_first_and_costs_nothing():
    batch = torch.randn(500, 4)
    model, structure = build(Chain, batch[:2])
    with torch.no_grad():
        model.one.weight.zero_()
        model.one.weight[:3, :3] = torch.eye(3)
        model.one.weight[3:5, 3:] = torch.tensor([[1.0], [1.0]])  # twins; the second moments are singular
        model.one.weight[5] = 0  # and one that is constant
        model.two.weight.fill_(1.0)
    found = measure_batches(model, structure, batch, criterion="innovation").units["one"]
    assert int(found.argmin()) == 5
    assert set(found.argsort()[1:2].tolist()) <= {3, 4}
    assert float(found[found.argsort()[1]]) < 1e-2 * float(found.max())  # no more than the ridge
    assert float(found[found.argsort()[2]]) > 0.05 * float(found.max())


def test_nothing_at_all_to_read_costs_nothing():
    batch = torch.randn(50, 4)
    model, structure = build(Chain, batch[:2])
    with torch.no_grad():
        model.one.weight.zero_()
    found = measure_batches(model, structure, batch, criterion="innovation").units["one"]
    assert_close(found, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_fewer_rows_than_columns():
    batch = torch.randn(3, 4)
    model, structure = build(Mlp, batch[:2])
    for scores in measure_batches(model, structure, batch, criterion="innovation").units.values():
        assert bool((scores.isfinite() & (scores >= 0)).all())


def test_a_wide_group_goes_several_at_a_time_and_its_scores_only_grow(monkeypatch):
    batch = torch.randn(400, 4)
    model, structure = build(Mlp, batch[:2])
    seen = []
    remove = innovation.System.remove

    def note(self, gone):
        seen.append(self.units[gone].tolist())
        remove(self, gone)

    monkeypatch.setattr(innovation.System, "remove", note)
    monkeypatch.setattr("idap.linalg.elimination.STEPS", 4)
    scores = measure_batches(model, structure, batch, criterion="innovation").units["fc1"]
    steps = [units for units in seen if set(units) <= set(range(10))]
    assert max(map(len, steps)) == 2
    assert bool((scores >= 0).all())
    assert float(scores.max()) > 0


def test_scores_grow_along_the_order(monkeypatch):
    batch = torch.randn(60, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    orders, eliminate = [], innovation.eliminate

    def note(systems, size):
        order, remove = [], systems[0].remove
        systems[0].remove = lambda gone: (order.extend(systems[0].units[gone].tolist()), remove(gone))
        scores = eliminate(systems, size)
        orders.append((order, scores))
        return scores

    monkeypatch.setattr(innovation, "eliminate", note)
    found = measure_batches(model, structure, batch, criterion="innovation").units
    assert len(orders) == len(found) == 4
    for order, scores in orders:
        along = scores[order]
        assert len(order) == len(scores)
        assert bool((along[1:] >= along[:-1]).all())
        assert float(along[0]) >= 0


# ------------------------------------------------------------------------------------------------ rounds, cuts, errors


@pytest.mark.parametrize("lazily", [False, True])
def test_little_memory_means_more_rounds_and_the_same_scores(lazily):
    batch = torch.randn(30, 3, 6, 6)
    model, structure = build(Convs, batch[:2])
    runs = []

    def run(m, part):
        runs.append(len(part))
        return m(part)

    def data():
        found = (Pass(lambda m, part=part: run(m, part)) for part in batch.split(20))
        return found if lazily else list(found)

    criteria = ["innovation", "relative"]
    whole = measure_all(model, structure, data(), criteria=criteria)
    assert runs == [20, 10]
    rounds = measure_all(model, structure, data(), criteria=criteria, memory=1)
    assert runs[2:] == [20, 10] * 4  # one group at a time; what fits one pass is seen in the first
    for name in criteria:
        for group, scores in whole[name].units.items():
            assert torch.equal(rounds[name].units[group], scores)


PLANS = [
    (nets.GroupedNet, {}, ()),
    (Convs, {"stem": (0, 2, 5), "one.conv1": (1, 4), "last": (1, 3)}, ("two",)),
]


@pytest.mark.parametrize("criterion", ["innovation", "relative", "paper", "magnitude", "activation", "fluctuation"])
@pytest.mark.parametrize(("make", "keep", "removed"), PLANS)
def test_a_cut_model_is_measured_as_if_it_had_been_built_small(make, keep, removed, criterion):
    batch = torch.randn(10, 3, 6, 6)
    model, structure = build(make, batch[:2])
    if not keep:  # of every group one unit goes
        keep = {group.name: tuple(range(1, group.size)) for group in structure.groups}
    small = apply_plan(model, structure.plan(keep, removed))
    found = measure_batches(small, structure, batch, criterion=criterion, keep=keep, removed=removed)
    fresh = measure_batches(small, analyze(trace(small, (batch[:2],))), batch, criterion=criterion)
    assert found.units
    for name, scores in found.units.items():
        kept = scores[list(keep.get(name, range(len(scores))))]
        assert scores.isnan().sum() == len(scores) - len(kept)
        if len(kept) > 1:  # units of which one is left are no group of the small model
            close = [
                torch.allclose(kept, other, rtol=1e-5) for other in fresh.units.values() if len(other) == len(kept)
            ]
            assert any(close)


def test_what_is_not_finite_is_found():
    batch = torch.randn(30, 4)
    model, structure = build(Mlp, batch[:2])
    batch[3] = float("nan")
    with pytest.raises(
        StructureError, match=r"^the input of aten\..+ in module '.+' \(.+\) is not finite; look for NaN"
    ):
        measure_batches(model, structure, batch, criterion="innovation")


def test_blocks_are_all_innovation():
    batch = torch.randn(30, 4)
    model, structure = build(Mlp, batch[:2])
    found = measure_all(model, structure, passes(batch), criteria=["innovation"])["innovation"]
    assert found.blocks == {}
    assert found.unmeasured == ()
