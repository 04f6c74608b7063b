"""Second moments from sums over batches, against float64 over all rows at once."""

import pytest
import torch
from torch.testing import assert_close

from idap.linalg.moments import STRIP, SecondMoments
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
    exact = rows.double().transpose(1, 2) @ rows.double()
    assert_close(Moments.of(rows, rows[:, :, :3]).xx, exact, rtol=1e-8, atol=0)
