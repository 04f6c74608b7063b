"""Two processes with half of the batches each measure what one process measures with all of them."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from idap.divergence.measure import measure_all
from idap.divergence.observe import Pass
from tests import nets
from tests.divergence.parts import build

CRITERIA = ("relative", "paper", "taylor", "innovation")


def scores_of(rank, processes, memory):
    draw = torch.Generator().manual_seed(1)
    batch, labels = torch.randn(8, 5, 4, generator=draw), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    make = lambda: nets.Encoder(4, 8, nets.PreNorm(8, nets.FusedAttention(8, 3, 4), nets.FeedForward(8, 10)))  # noqa: E731
    model, structure = build(make, batch[:2])
    data = [
        Pass(lambda m, x=x: m(x), lambda out, y=y: F.cross_entropy(out, y))
        for x, y in zip(batch.split(2), labels.split(2), strict=True)
    ]
    found = measure_all(model, structure, data[rank::processes], criteria=CRITERIA, memory=memory)
    return {name: (dict(each.units), dict(each.blocks)) for name, each in found.items()}


def process(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        return scores_of(rank, 2, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(tmp_path):
    whole = scores_of(0, 1, 2**30)
    code = (
        "import torch, tests.conftest; from tests.divergence.test_processes import process; "
        f"torch.save(process(1, {str(tmp_path)!r}), {str(tmp_path / 'other.pt')!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as other:
        mine = process(0, str(tmp_path))
        assert other.wait(60) == 0
    for half in (mine, torch.load(tmp_path / "other.pt")):
        for name in CRITERIA:
            for found, expected in zip(half[name], whole[name], strict=True):
                assert_close(found, expected, rtol=1e-5, atol=1e-7)
