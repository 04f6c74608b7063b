"""Both models run in every engine, take turns, and come back as they were."""

import importlib.util

import pytest
import torch
from torch import nn

from idap.cost.latency import alternate
from idap.deploy.bench import bench, peak_memory, subnormal_weights
from idap.errors import ConfigError

X = torch.randn(2, 3, 8, 8)
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is missing")


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 5)).eval()


def test_rows_for_each_engine_and_batch():
    large, small = net(64), net(8)
    found = bench(large, small, (X,), batches=(1, 4), repeats=3)
    assert [(row.engine, row.batch) for row in found.rows] == [("eager", 1), ("eager", 4)]
    for row in found.rows:
        assert row.latency[0].median > 0
        assert row.ratio == row.latency[1].median / row.latency[0].median
    one, four = (row.memory for row in found.rows)
    # Of the wide one: of few channels and one image, some CPUs unfold the image, which takes memory of its own.
    assert 4 * one[0] == pytest.approx(four[0], rel=0.5)
    assert 0 < one[1] <= four[1]
    assert one[0] > 2 * one[1]  # eight times as many channels, the same input
    assert found.size == tuple(sum(4 * p.numel() for p in each.parameters()) for each in (large, small))
    assert found.subnormal == (0, 0)


@needs_onnx
def test_onnxruntime_beside_pytorch():
    found = bench(net(16), net(8), (X,), engines=("eager", "onnxruntime"), batches=(3,), repeats=2, warmup=1)
    assert [row.engine for row in found.rows] == ["eager", "onnxruntime"]
    assert found.rows[1].memory is None


def test_models_and_threads_come_back_as_they_were():
    large, small = net(16).train(), net(8)
    before, threads = [p.clone() for p in large.parameters()], torch.get_num_threads()
    strides = [p.stride() for p in large.parameters()]
    found = bench(large, small, (X,), threads=1, channels_last=True, repeats=2, warmup=0)
    assert (found.threads, found.channels_last) == (1, True)
    assert large.training
    assert torch.get_num_threads() == threads
    assert [p.stride() for p in large.parameters()] == strides
    assert all(torch.equal(p, old) for p, old in zip(large.parameters(), before, strict=True))
    large(X).sum().backward()  # no tensor of inference mode is left


def test_channels_last_reaches_weights_and_inputs():
    seen = []

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in (x, self.conv.weight)])
            return self.conv(x)

    bench(Looks().eval(), Looks().eval(), (X,), channels_last=True, repeats=2, warmup=0)
    assert all(all(each) for each in seen)


def test_subnormal_weights_are_counted_once():
    layer = nn.Linear(4, 4)
    layer.again = layer.weight
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([1e-40, -1e-42, 0.0])
    layer.register_buffer("steps", torch.tensor(3))
    assert subnormal_weights(layer) == 2


def test_peak_memory_sees_what_is_freed_again():
    def waste():
        for _ in range(3):
            torch.zeros(1000, 250)  # a million bytes, freed at once

    assert 1e6 <= peak_memory(waste) < 1.5e6


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engines": ("tensorrt",)}, r"^engines must be among eager, compile, onnxruntime; found 'tensorrt'\.$"),
        ({"engines": ()}, "found 'none'"),
        ({"batches": (0,)}, r"^batch sizes must be at least 1, found \[0\]\.$"),
        ({"batches": ()}, r"^batch sizes must be at least 1, found \[\]\.$"),
        ({"threads": 0}, r"^the number of threads must be at least 1, found 0\.$"),
        ({"repeats": 1}, r"^a median needs at least 2 repeats, found 1\.$"),
    ],
)
def test_settings_that_are_not_possible(settings, match):
    with pytest.raises(ConfigError, match=match):
        bench(net(4), net(2), (X,), **settings)


def test_models_on_different_devices():
    with pytest.raises(ConfigError, match=r"^the models are on cpu and meta; bring both to one device\.$"):
        bench(net(4), net(2).to("meta"), (X,))


def test_calls_take_turns():
    order = []
    alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
