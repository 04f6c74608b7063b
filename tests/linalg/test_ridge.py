"""Sums over rows, and the ridge that held-out rows prefer."""

import numpy as np
import pytest
import torch
from torch import Tensor

from idap.linalg.ridge import RIDGES, Moments, fit, fit_need
from tests.rebalance.cuts import normal

PARTS, COLUMNS, OUTPUTS = 2, 5, 3


def rows(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """What is read, and what should come out: linear, a constant, and noise."""
    x = normal(PARTS, count, COLUMNS, seed=seed).to(dtype) + 0.5
    truth = normal(PARTS, COLUMNS, OUTPUTS, seed=99).to(dtype)
    return x, x @ truth + 2 + 0.3 * normal(PARTS, count, OUTPUTS, seed=seed + 1000).to(dtype)


def layer(seed: int = 7) -> tuple[Tensor, Tensor]:
    return normal(PARTS, OUTPUTS, COLUMNS, seed=seed).double(), normal(PARTS, OUTPUTS, seed=seed + 1).double()


def direct(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    missed = x @ weight.transpose(1, 2) + bias.unsqueeze(1) - y
    return float(missed.square().sum() / x.shape[1])


def solve_with_ridge(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, ridge: float, shift: bool
) -> tuple[Tensor, Tensor]:
    """Least squares pulled towards the old weights, as rows below those of the data; part by part."""
    weights, biases = [], []
    for part in range(len(x)):
        mean_x, mean_y = (x[part].mean(0), y[part].mean(0)) if shift else (torch.zeros(COLUMNS).double(), bias[part])
        a, b = x[part] - mean_x, y[part] - mean_y
        damped = (ridge * a.square().mean()).sqrt() * torch.eye(COLUMNS).double() * len(a) ** 0.5
        missing = torch.cat([b - a @ weight[part].T, torch.zeros(COLUMNS, OUTPUTS).double()])
        change = torch.linalg.lstsq(torch.cat([a, damped]), missing).solution
        weights.append(weight[part] + change.T)
        biases.append(mean_y - weights[-1] @ mean_x)
    return torch.stack(weights), torch.stack(biases)


@pytest.mark.parametrize("seed", range(5))
def test_sums_and_central_moments_are_those_of_numpy(seed):
    x, y = (each.numpy() for each in rows(40, seed))
    found = Moments.of(torch.from_numpy(x), torch.from_numpy(y))
    assert (found.count, found.parts) == (40, PARTS)
    np.testing.assert_allclose(found.x, x.sum(1), rtol=1e-10)
    np.testing.assert_allclose(found.y, y.sum(1), rtol=1e-10)
    np.testing.assert_allclose(found.xx, np.einsum("pni,pnj->pij", x, x), rtol=1e-10)
    np.testing.assert_allclose(found.xy, np.einsum("pni,pno->pio", x, y), rtol=1e-10)
    np.testing.assert_allclose(found.yy, (y**2).sum(1), rtol=1e-10)
    xx, xy, mean_x, mean_y = found.central_moments()
    for part in range(PARTS):
        both = np.cov(x[part].T, y[part].T, bias=True)
        np.testing.assert_allclose(xx[part], both[:COLUMNS, :COLUMNS], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(xy[part], both[:COLUMNS, COLUMNS:], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(mean_x, x.mean(1), rtol=1e-10)
    np.testing.assert_allclose(mean_y, y.mean(1), rtol=1e-10)


def test_memory_counts_the_sums_and_the_rows():
    sums = np.empty((PARTS, COLUMNS, COLUMNS)).nbytes, np.empty((OUTPUTS, COLUMNS)).nbytes
    assert fit_need(PARTS, COLUMNS, OUTPUTS, 0).held == 2 * sum(sums)
    assert fit_need(PARTS, COLUMNS, OUTPUTS, 0).solving == 3 * sums[0] + 7 * sums[1]
    read = np.empty((PARTS, 1000, COLUMNS), np.float32).nbytes
    assert fit_need(PARTS, COLUMNS, OUTPUTS, 1000).solving == 2 * sum(sums) + 3 * read


def test_the_error_is_that_of_the_rows():
    x, y = rows(40, 0)
    assert Moments.of(x, y).error(*layer()) == pytest.approx(direct(x, y, *layer()), rel=1e-12)


def test_sums_add_up():
    x, y = rows(40, 0)
    whole, two = Moments.of(x, y), Moments.of(x[:, :13], y[:, :13]) + Moments.of(x[:, 13:], y[:, 13:])
    for name in ("x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(two, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert two.count == 40
    assert two.error(*layer()) == pytest.approx(whole.error(*layer()), rel=1e-12)


def test_sums_are_those_of_float64_although_rows_are_float32_and_far_from_zero():
    x, y = (each + 1000 for each in rows(400, 0, torch.float32))
    mine, exact = Moments.of(x, y), Moments.of(x.double(), y.double())
    for one, other in zip(mine.central_moments(), exact.central_moments(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_no_rows_add_nothing():
    x, y = rows(8, 0)
    none = Moments.of(x[:, :0], y[:, :0])
    assert none.count == 0
    assert (none + Moments.of(x, y)).error(*layer()) == pytest.approx(direct(x, y, *layer()))
    assert fit(none, Moments.of(x, y), *layer(), ridges=RIDGES, shift=True) is None
    assert fit(Moments.of(x, y), none, *layer(), ridges=RIDGES, shift=True) is None


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("count", "seed"), [(6, 1), (9, 2), (20, 3), (200, 4)])
def test_the_ridge_is_the_one_that_held_out_rows_prefer(count, seed, shift):
    (x, y), (held_x, held_y) = rows(count, seed), rows(30, seed + 50)
    weight, bias = layer()
    found = fit(Moments.of(x, y), Moments.of(held_x, held_y), weight, bias, ridges=RIDGES, shift=shift)
    errors = {ridge: direct(held_x, held_y, *solve_with_ridge(x, y, weight, bias, ridge, shift)) for ridge in RIDGES}
    assert found.ridge == min(errors, key=errors.__getitem__)
    assert found.after == pytest.approx(errors[found.ridge], rel=1e-6)
    assert found.before == pytest.approx(direct(held_x, held_y, weight, bias), rel=1e-9)
    expected = solve_with_ridge(torch.cat([x, held_x], 1), torch.cat([y, held_y], 1), weight, bias, found.ridge, shift)
    torch.testing.assert_close(found.weight, expected[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.bias, expected[1], rtol=1e-6, atol=1e-8)


def test_without_ridges_only_the_bias_is_fitted():
    (x, y), (held_x, held_y) = rows(50, 1), rows(20, 2)
    weight, bias = layer()
    found = fit(Moments.of(x, y), Moments.of(held_x, held_y), weight, bias, ridges=(), shift=True)
    assert found.ridge == float("inf")
    assert torch.equal(found.weight, weight)
    every_x, every_y = torch.cat([x, held_x], 1), torch.cat([y, held_y], 1)
    missing = (every_y - every_x @ weight.transpose(1, 2)).mean(1)
    torch.testing.assert_close(found.bias, missing)
    assert fit(Moments.of(x, y), Moments.of(held_x, held_y), weight, bias, ridges=(), shift=False) is None


def test_nothing_is_fitted_where_held_out_rows_say_it_gets_worse():
    x = rows(7, 1)[0]
    held_x = rows(40, 2)[0]
    weight, bias = layer()
    targets = normal(PARTS, 7, OUTPUTS, seed=3).double()
    held = held_x @ weight.transpose(1, 2) + bias.unsqueeze(1)  # exactly what the layer gives
    assert fit(Moments.of(x, targets), Moments.of(held_x, held), weight, bias, ridges=RIDGES, shift=True) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_nothing(bad):
    (x, y), (held_x, held_y) = rows(50, 1), rows(20, 2)
    x[0, 0, 0] = bad
    assert fit(Moments.of(x, y), Moments.of(held_x, held_y), *layer(), ridges=RIDGES, shift=True) is None
    assert fit(Moments.of(held_x, held_y), Moments.of(x, y), *layer(), ridges=RIDGES, shift=True) is None


def test_inputs_that_are_always_zero_are_no_trouble():
    (x, y), (held_x, held_y) = rows(50, 1), rows(20, 2)
    x[..., 2], held_x[..., 2] = 0, 0
    weight, bias = layer()
    found = fit(Moments.of(x, y), Moments.of(held_x, held_y), weight, bias, ridges=RIDGES, shift=True)
    torch.testing.assert_close(found.weight[..., 2], weight[..., 2])
    found = fit(Moments.of(x * 0, y), Moments.of(held_x * 0, held_y), weight, bias, ridges=RIDGES, shift=True)
    torch.testing.assert_close(found.weight, weight)
