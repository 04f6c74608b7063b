"""Layers that read too many columns to be refitted, and bounds of memory."""

import pytest
import torch

from idap.divergence.observe import Pass
from idap.errors import ConfigError, InsufficientMemoryError
from idap.linalg.ridge import Moments, fit, fit_need
from idap.linalg.shift import Residuals, fit_shift, shift_need
from idap.memory import Need
from idap.rebalance import layers, projections, run
from idap.rebalance.layers import Case
from idap.rebalance.projections import fit_projections
from idap.rebalance.run import Rebalance
from tests.divergence.parts import Convs, Mlp
from tests.rebalance import test_projections
from tests.rebalance.cuts import Cut, build_net, normal, same_state, structure_of, without


def rows(count, seed):
    x = normal(2, count, 5, seed=seed).double() + 0.5
    y = x @ normal(2, 5, 3, seed=9).double() + normal(2, 1, 3, seed=8) + 0.1 * normal(2, count, 3, seed=seed + 1)
    return x, y


def sums(x, y, weight, bias):
    return Moments.of(x, y), Residuals.of(x, y, weight, bias)


def test_a_shift_is_the_fit_of_a_bias_alone():
    weight, bias = normal(2, 3, 5, seed=5).double(), normal(2, 3, seed=6).double()
    learned, held_out = sums(*rows(80, 0), weight, bias), sums(*rows(40, 20), weight, bias)
    expected = fit(learned[0], held_out[0], weight, bias, ridges=(), shift=True)
    found = fit_shift(learned[1], held_out[1], weight, shift=True)
    assert torch.equal(found.weight, weight)
    torch.testing.assert_close(found.bias, expected.bias, rtol=1e-10, atol=1e-10)
    assert (found.before, found.after) == pytest.approx((expected.before, expected.after), rel=1e-9)
    assert found.ridge == expected.ridge == float("inf")
    assert held_out[1].error(weight, bias + 1) == pytest.approx(held_out[0].error(weight, bias + 1), rel=1e-9)


def test_a_shift_that_does_not_help_or_has_no_place_is_none():
    weight, bias = normal(2, 3, 5, seed=5).double(), normal(2, 3, seed=6).double()
    x, y = rows(40, 0)
    learned = Residuals.of(x, y, weight, bias)
    assert fit_shift(learned, learned, weight, shift=False) is None
    other = Residuals.of(x, 2 * (x @ weight.transpose(1, 2) + bias.unsqueeze(1)) - y, weight, bias)
    assert fit_shift(learned, other, weight, shift=True) is None  # misses the opposite
    nothing = Residuals.of(x[:, :0], y[:, :0], weight, bias)
    assert fit_shift(learned, nothing, weight, shift=True) is None
    assert nothing.error(weight, bias) == 0


def test_sums_of_residuals_add_up():
    weight, bias = normal(2, 3, 5, seed=5).double(), normal(2, 3, seed=6).double()
    x, y = rows(40, 0)
    whole = Residuals.of(x, y, weight, bias)
    two = Residuals.of(x[:, :13], y[:, :13], weight, bias) + Residuals.of(x[:, 13:], y[:, 13:], weight, bias)
    assert two.count == whole.count == 40
    torch.testing.assert_close(two.total, whole.total)
    torch.testing.assert_close(two.squares, whole.squares)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(("make", "shape", "group"), [(Mlp, (4,), "fc1"), (Convs, (3, 6, 6), "one.conv1")])
def test_wide_layers_get_their_bias_as_if_only_means_were_corrected(make, shape, group, batches):
    model = build_net(make).double()
    structure = structure_of(model, 2, *shape)
    x, keep = normal(96, *shape).double(), without(structure, group, 1, 2)
    means = Cut(model, structure, keep, x, setting=Rebalance(least_squares=False), batches=batches)
    found = Cut(model, structure, keep, x, setting=Rebalance(columns=1), batches=batches)
    assert all(one.too_wide for one in found.corrections)
    assert any(one.ridge == float("inf") for one in found.corrections)
    for mine, theirs in zip(found.corrections, means.corrections, strict=True):
        assert (mine.weight, theirs.too_wide) == (theirs.weight, False)
        assert mine.after == pytest.approx(theirs.after, rel=1e-6, abs=1e-12)
    for name, tensor in means.small.state_dict().items():
        torch.testing.assert_close(found.small.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


def test_only_what_is_wider_than_the_setting_is_too_wide():
    model = build_net(Convs)
    structure = structure_of(model, 2, 3, 6, 6)
    x, keep = normal(96, 3, 6, 6), without(structure, "one.conv1", 1, 2)
    every = Cut(model, structure, keep, x, setting=Rebalance(columns=54))  # 6 channels under 9 taps
    whole = Cut(model, structure, keep, x)
    assert not any(one.too_wide for one in every.corrections)
    assert same_state(every.small, whole.small)
    some = Cut(model, structure, keep, x, setting=Rebalance(columns=53)).corrections
    wide = {one.weight for one in some if one.too_wide}
    assert wide
    assert wide < {one.weight for one in some}
    assert all(model.get_parameter(name).shape[1] == 6 for name in wide)


def test_without_a_place_for_a_bias_a_wide_layer_keeps_its_weights():
    model = build_net(lambda: Mlp(bias=False))
    structure = structure_of(model, 2, 4)
    cut = Cut(model, structure, without(structure, "fc1", 1, 2), normal(96, 4), setting=Rebalance(columns=1))
    assert same_state(cut.small, cut.plain)
    for one in cut.corrections:
        assert one.too_wide
        assert one.after == one.before
        assert one.ridge != one.ridge


def test_of_a_wide_layer_fewer_rows_are_drawn(monkeypatch):
    """So that 16,384 rows of 65,536 columns are not 4 GB."""
    monkeypatch.setattr(layers, "DRAWN", 300 * 54)
    model = build_net(Convs)
    structure = structure_of(model, 2, 3, 6, 6)
    keep, seen = without(structure, "one.conv1", 1, 2), []
    monkeypatch.setattr(run, "Case", lambda *given: seen.append(Case(*given)) or seen[-1])
    Cut(model, structure, keep, normal(96, 3, 6, 6), setting=Rebalance(columns=53))
    limits = {case.consumer.weight: case.consumer.rows.limit for case in seen}
    assert limits["one.conv2.weight"] == 16384
    assert {limit for name, limit in limits.items() if model.get_parameter(name)[0].numel() == 54} == {300}


def test_a_bound_that_is_too_small_names_the_layer_and_the_way_out(monkeypatch):
    model = build_net(Mlp)
    structure = structure_of(model, 2, 4)
    keep, x = without(structure, "fc1", 1, 2), normal(96, 4)
    monkeypatch.setenv("IDAP_MEMORY", "1MB")
    message = (
        r"refitting the layer with weight 'fc2\.weight', which reads 8 columns, would take 1\.6 MB of memory on cpu, "
        r"and 1\.0 MB may be taken there \(IDAP_MEMORY=1MB\)\. Set rebalance\.columns below 8, so that only its bias"
    )
    with pytest.raises(InsufficientMemoryError, match=message):
        Cut(model, structure, keep, x)
    assert Cut(model, structure, keep, x, setting=Rebalance(rows=1000)).corrections


def test_what_refitting_takes_is_estimated():
    xx, xy = 8 * 2 * 100**2, 8 * 100 * 30
    assert fit_need(2, 100, 30, rows=10) == Need(held=2 * (xx + xy), solving=3 * xx + 7 * xy)
    assert fit_need(2, 100, 30, rows=10**6).solving == 2 * (xx + xy) + 12 * 10**6 * 200
    assert shift_need(2, 100, 30, rows=10) == Need(solving=12 * 3000 + 12 * 10 * 200 + 24 * 300)


def test_projections_that_do_not_fit_at_once_take_more_passes_and_are_the_same(monkeypatch):
    model = build_net(test_projections.resnet)
    x = normal(64, 3, 8, 8)
    structure = test_projections.analyze_net(model, x[:2], "projection")
    names = [block.name for block in structure.blocks if block.projected]
    runs = []
    data = [Pass(lambda m, part=part: (runs.append(1), m(part))[1]) for part in x.split(32)]

    def fit_all():
        runs.clear()
        return fit_projections(model, structure, iter(data), names, present=structure.presence({})), len(runs)

    whole, once = fit_all()
    monkeypatch.setattr(projections, "MEMORY", 1)
    parts, often = fit_all()
    assert (once, often) == (2, 2 * len(names))
    assert len(names) > 1
    assert list(parts) == list(whole)
    for name, mine in whole.items():
        assert torch.equal(parts[name].map.weight, mine.map.weight)
        assert parts[name].residual == mine.residual
    monkeypatch.setenv("IDAP_MEMORY", "1kB")
    with pytest.raises(InsufficientMemoryError, match=r"projection in place of block '.*' would take \d.* Let blocks"):
        fit_all()
    assert not runs


def test_a_number_of_columns_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"rebalance\.columns must be at least 1, found 0"):
        Rebalance(columns=0)
