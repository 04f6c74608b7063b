"""Sums of residuals, and the bias that is corrected by their mean, against numpy in float64."""

import numpy as np
import pytest
import torch

from idap.linalg.shift import Residuals, fit_shift, shift_need

PARTS, COLUMNS, OUTPUTS = 2, 5, 3
SEEDS = range(5)


def problem(seed, count=40):
    """Rows, targets, weight and bias of a layer with two parts."""
    draw = np.random.default_rng(seed)
    x, y = draw.standard_normal((PARTS, count, COLUMNS)), draw.standard_normal((PARTS, count, OUTPUTS)) + 1
    return x, y, draw.standard_normal((PARTS, OUTPUTS, COLUMNS)), draw.standard_normal((PARTS, OUTPUTS))


def residuals(x, y, weight, bias):
    return y - np.einsum("pnc,poc->pno", x, weight) - bias[:, None]


def sums_of(*arrays):
    return Residuals.of(*map(torch.from_numpy, arrays))


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_are_those_of_the_residuals(seed):
    made = problem(seed)
    found, exact = sums_of(*made), residuals(*made)
    assert (found.count, found.parts) == (40, PARTS)
    np.testing.assert_allclose(found.total, exact.sum(1), rtol=1e-10)
    np.testing.assert_allclose(found.squares, (exact**2).sum(1), rtol=1e-10)
    np.testing.assert_allclose(found.mean, exact.mean(1), rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_error_with_another_bias_is_that_of_the_rows(seed):
    x, y, weight, bias = problem(seed)
    other = bias + np.random.default_rng(seed + 100).standard_normal(bias.shape)
    expected = (residuals(x, y, weight, other) ** 2).sum() / 40
    assert sums_of(x, y, weight, bias).error(torch.empty(0), torch.from_numpy(other)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_shift_is_the_mean_residual_of_all_rows(seed):
    x, y, weight, bias = problem(seed, 60)
    learned, held_out = ((x[:, part], y[:, part]) for part in (slice(40), slice(40, None)))
    found = fit_shift(
        sums_of(*learned, weight, bias), sums_of(*held_out, weight, bias), torch.from_numpy(weight), shift=True
    )
    np.testing.assert_allclose(found.bias, bias + residuals(x, y, weight, bias).mean(1), rtol=1e-10)
    before = residuals(*held_out, weight, bias)
    after = before - residuals(*learned, weight, bias).mean(1)[:, None]
    errors = [(each**2).sum() / 20 for each in (before, after)]
    assert (found.before, found.after) == pytest.approx(errors)


def test_memory_counts_the_weight_the_rows_and_the_residuals():
    x = problem(0)[0]
    numbers = 3 * x.astype(np.float32).nbytes + 3 * np.empty((40, OUTPUTS)).nbytes
    numbers += np.empty((OUTPUTS, COLUMNS)).nbytes + np.empty((OUTPUTS, COLUMNS), np.float32).nbytes
    assert shift_need(PARTS, COLUMNS, OUTPUTS, 40).solving == numbers
