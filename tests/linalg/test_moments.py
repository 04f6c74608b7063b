"""Second moments from sums over batches, against float64 over all rows at once."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from idap.linalg.moments import (
    BLOCK,
    PIECE,
    STRIP,
    SecondMoments,
    about_mean,
    add_products,
    exact,
    mirror_,
    sum_of_rows,
    sum_of_squares,
)
from idap.linalg.ridge import Moments


def rows_far_from_zero(parts: int, count: int, columns: int, *, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(parts, count, 8, generator=draw) @ torch.randn(parts, 8, columns, generator=draw)
    return mixed + torch.randn(parts, count, columns, generator=draw) + 50


@pytest.mark.parametrize(("parts", "columns"), [(1, 1), (3, 40), (1, STRIP), (2, STRIP + 1), (1, 2 * STRIP + 7)])
def test_moments_of_any_width(parts: int, columns: int) -> None:
    batches = [rows_far_from_zero(parts, count, columns, seed=count) for count in (300, 1, 17)]
    gram = SecondMoments()
    for rows in batches:
        gram.add(rows)
    every = torch.cat(batches, 1).double()
    away = every - every.mean(1, keepdim=True)
    found = gram.covariance()
    assert gram.count == every.shape[1]
    assert_close(found, away.transpose(1, 2) @ away / gram.count, rtol=0, atol=1e-5)
    assert_close(found, found.transpose(1, 2), rtol=0, atol=0)


def test_moments_that_a_layer_is_refitted_from_are_whole() -> None:
    rows = rows_far_from_zero(1, 64, 2 * STRIP + 7, seed=0)
    expected = rows.double().transpose(1, 2) @ rows.double()
    assert_close(Moments.of(rows, rows[:, :, :3]).xx, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_rows_are_summed_as_by_numpy(count: int) -> None:
    rows = rows_far_from_zero(2, count, 5, seed=count)
    np.testing.assert_allclose(sum_of_rows(rows).numpy(), rows.numpy().astype(np.float64).sum(1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 2, 3, 4), (7, PIECE // 16, 4)])
def test_squares_are_summed_as_by_numpy(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inner = list(range(1, len(shape) - 1))
    expected = (x.numpy().astype(np.float64) ** 2).sum(tuple(inner))
    np.testing.assert_allclose(sum_of_squares(x, inner, torch.float64).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("columns", [1, 6, STRIP + 3])
def test_products_of_moved_rows_are_those_of_the_rows(columns: int) -> None:
    """Twice, since products are added to what is there."""
    rows = rows_far_from_zero(2, 9, columns, seed=1).double()
    sums = torch.zeros(2, columns, columns, dtype=torch.float64)
    at = rows.mean(1) + 0.5
    for _ in range(2):
        add_products(sums, rows - at.unsqueeze(1), at, (rows - at.unsqueeze(1)).sum(1))
    expected = 2 * np.einsum("pni,pnj->pij", rows.numpy(), rows.numpy())
    np.testing.assert_allclose(np.triu(sums.numpy()), np.triu(expected), rtol=1e-12)
    np.testing.assert_allclose(mirror_(sums).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 4, STRIP, STRIP + 1, 2 * STRIP + 3])
def test_a_mirrored_matrix_is_symmetric(size: int) -> None:
    upper = np.triu(np.random.default_rng(size).standard_normal((2, size, size)))
    expected = upper + np.triu(upper, 1).transpose(0, 2, 1)
    assert torch.equal(mirror_(torch.from_numpy(upper.copy())), torch.from_numpy(expected))


@pytest.mark.parametrize("count", [1, 2 * BLOCK - 1, 2 * BLOCK, 5 * BLOCK + 3])
def test_moved_rows_lie_about_a_point_near_their_mean(count: int) -> None:
    rows = rows_far_from_zero(2, count, 3, seed=count)
    moved, at, rest = about_mean(rows)
    exact_rows = rows.numpy().astype(np.float64)
    step = max(1, count // BLOCK)
    np.testing.assert_allclose(at.numpy(), exact_rows[:, ::step].mean(1), rtol=1e-6)
    np.testing.assert_allclose(moved.numpy(), exact_rows - at.numpy()[:, None], atol=1e-4)
    np.testing.assert_allclose(rest.numpy(), (exact_rows - at.numpy()[:, None]).sum(1), atol=1e-4 * count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_precision_for_products_keeps_every_number(dtype: torch.dtype) -> None:
    x = torch.randn(20, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert exact(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_array_equal(exact(x).double().numpy(), x.double().numpy())
