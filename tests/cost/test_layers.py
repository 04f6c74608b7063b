"""Layers timed one by one: the right shapes, equal ones once, and the model as it was."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from idap.cost import layer_latency
from idap.cost.latency import Latency
from idap.cost.layer_latency import measure_table
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from tests.nets import every_net, structure_of


class Blocks(nn.Module):
    """A stem, two equal bottlenecks with depthwise convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(8, 16, 1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1, groups=16),
                nn.Conv2d(16, 8, 1),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(F.gelu(x).mean((2, 3)))


@pytest.fixture
def calls(monkeypatch):
    """Calls in place of the clock: each takes as long as it has multiply-adds and elements."""
    found = []

    def time_calls(runs, *, repeats, warmup, on_gpu):
        times = {}
        for name, run in runs.items():
            tensors = [value for value in run.args if isinstance(value, torch.Tensor)]
            result = run()
            found.append((run.func, [tuple(t.shape) for t in tensors], run))
            seconds = 1e-6 * sum(t.numel() for t in (*tensors, result))
            times[name] = Latency(seconds, (seconds, seconds))
        return times

    monkeypatch.setattr(layer_latency, "alternate", time_calls)
    return found


def widths_of(size):
    return (size // 2, size) if size > 1 else (size,)


def table_of(model, batch, **layout):
    model = model.eval().to(**layout)
    structure = analyze(trace(model, (torch.randn(2, 3, 6, 6),)))
    return measure_table(model, structure, ((torch.randn(batch, 3, 6, 6),), {}), widths_of), structure


def test_layers_run_in_the_shapes_that_they_have_at_each_width(calls):
    table, structure = table_of(Blocks(), 5)
    assert table.batch == 5
    assert table.unmeasured == ("mean",)
    shapes = {tuple(shapes) for func, shapes, _ in calls if "conv2d" in str(func)}
    for inner in (8, 16):
        assert ((5, 8, 6, 6), (inner, 8, 1, 1), (inner,)) in shapes
        assert ((5, inner, 6, 6), (inner, 1, 3, 3), (inner,)) in shapes  # depthwise: its groups follow
        assert ((5, inner, 6, 6), (8, inner, 1, 1), (8,)) in shapes
    assert ((5, 4, 6, 6), (16, 4, 1, 1), (16,)) in shapes  # half of the stream
    assert set(table.groups) == {group.name for group in structure.groups}
    assert not table.fixed  # a group lies over every layer


def test_layers_over_which_no_group_lies_are_timed_too(calls):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    structure = analyze(trace(model, (torch.randn(2, 3, 6, 6),)))
    structure = dataclasses.replace(structure, groups=structure.groups[1:])
    table = measure_table(model, structure, ((torch.randn(5, 3, 6, 6),), {}), widths_of)
    assert [structure.graph.nodes[node].owner for node in table.fixed] == ["0"]
    assert table.seconds({}) > sum(table.fixed.values()) > 0


def test_layers_whose_time_goes_evenly_are_measured_at_the_same_ends(calls):
    """Below the smallest width no seconds are saved, so the half would count too little of a narrow group."""
    model = Blocks().eval()
    structure = analyze(trace(model, (torch.randn(2, 3, 6, 6),)))
    quarters = lambda size: (size // 4, size // 2, size)  # noqa: E731
    table = measure_table(model, structure, ((torch.randn(2, 3, 6, 6),), {}), quarters)
    assert {curve.widths for curve in table.curves} == {(4, 8, 16), (4, 16), (2, 4, 8), (2, 8)}
    half, quarter = (table.seconds({"first.0": width}) for width in (8, 4))
    assert table.seconds({}) - half == pytest.approx(2 * (half - quarter))


def test_equal_layers_are_measured_once(calls):
    table, _ = table_of(Blocks(), 2)
    assert table.curve("first.0") == table.curve("second.0")
    conv = [node for node, over in table.layers.items() if "first.0" in over or "second.0" in over]
    assert len({tuple(table.layers[node].values()) for node in conv}) < len(conv)


@pytest.mark.parametrize("last", [False, True])
def test_memory_lies_as_in_the_model(calls, last):
    layout = {"memory_format": torch.channels_last} if last else {}
    table_of(Blocks(), 2, **layout)
    images = [run.args[0] for func, _, run in calls if "conv2d" in str(func) and run.args[0].shape[1] > 1]
    assert images
    for image in images:
        assert image.is_contiguous(memory_format=torch.channels_last) == last
        assert image.is_contiguous() != last


@every_net
def test_the_layers_of_every_net_run_alone_and_it_is_left_as_it_is(net):
    model = net.model()
    before = copy.deepcopy(model.state_dict())
    structure = structure_of(net.name)
    table = measure_table(model, structure, (net.args, dict(net.kwargs)), widths_of, seconds=0)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert set(table.groups) == {group.name for group in structure.groups}
    assert table.seconds({}) > 0
    assert all(seconds > 0 for seconds in table.unit_seconds({g.name: g.size for g in structure.groups}).values())
