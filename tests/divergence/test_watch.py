"""Sums over tensors: a piece at a time or at once, they are the same."""

import pytest
import torch
from torch.testing import assert_close

from idap.divergence.watch import ChannelStats
from idap.linalg import moments


@pytest.mark.parametrize("piece", [1, 150, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [1, 7])
def test_squares_are_added_piece_by_piece(monkeypatch, piece, dtype, batch):
    monkeypatch.setattr(moments, "PIECE", piece)
    x = torch.randn(batch, 5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tensor in (x, x.permute(0, 2, 1).contiguous().permute(0, 2, 1)):
        stats = ChannelStats(2)
        stats.add(tensor, None)
        stats.add(tensor, None)
        assert_close(stats.sums["square"], 2 * x.double().square().sum((0, 1)), rtol=1e-6, atol=0)
        assert_close(stats.latest.double(), x.double().square().sum((1, 2)), rtol=1e-6, atol=0)
        assert stats.samples == 2 * batch


def test_padded_positions_do_not_count_in_pieces(monkeypatch):
    monkeypatch.setattr(moments, "PIECE", 1)
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    padding = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    stats = ChannelStats(2)
    stats.add(x, padding)
    assert_close(stats.sums["square"], (x.double() * padding[..., None]).square().sum((0, 1)), rtol=1e-6, atol=0)
    assert_close(stats.square, stats.sums["square"] / 13)
