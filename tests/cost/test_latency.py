"""Latency is measured side by side, and leaves the models as they were."""

import math

import pytest
import torch
from torch import nn

from idap.cost import latency
from idap.cost.latency import Latency, measure_latency
from idap.errors import ConfigError


class Noting(nn.Module):
    """Notes its calls, the mode and whether gradients are on; keeps a tensor for later, as caches do."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls
        self.inner = nn.Linear(2, 2)
        self.kept = None

    def forward(self, x, *, scale=1.0):
        self.calls.append((self.name, self.training, torch.is_grad_enabled(), scale))
        self.kept = x + 1
        return self.inner(x)


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_models_take_turns_in_eval_mode_without_gradients():
    calls = []
    models = {"large": Noting("large", calls), "small": Noting("small", calls)}
    measure_latency(models, (torch.zeros(1, 2),), {"scale": 2.0}, repeats=3, warmup=2)
    assert calls == [("large", False, False, 2.0), ("small", False, False, 2.0)] * 5


def test_modes_are_put_back():
    models = {"one": Noting("one", []), "two": Noting("two", []).eval()}
    models["one"].inner.eval()
    models["two"].inner.train()
    measure_latency(models, (torch.zeros(1, 2),), repeats=2)
    assert [module.training for model in models.values() for module in model.modules()] == [True, False, False, True]


def test_modes_are_put_back_after_an_error():
    good, bad = Noting("good", []), Broken()
    with pytest.raises(RuntimeError, match="broken"):
        measure_latency({"good": good, "bad": bad}, (torch.zeros(1, 2),))
    assert good.training and good.inner.training and bad.training


def test_a_tensor_that_a_model_keeps_can_be_trained_with():
    model = Noting("one", [])
    measure_latency({"one": model}, (torch.zeros(1, 2),), repeats=2)
    model.inner(model.kept).sum().backward()
    assert model.inner.weight.grad is not None


def test_median_and_quartiles_are_those_of_the_timed_passes(monkeypatch):
    seconds = iter([100.0, 1.0, 2.0, 3.0, 4.0, 10.0])
    monkeypatch.setattr(latency, "_time", lambda *_, on_gpu: next(seconds))
    found = measure_latency({"one": nn.Identity()}, (), repeats=5, warmup=1)
    assert found == {"one": Latency(3.0, (2.0, 4.0))}


def test_quartiles_of_two_passes_lie_between_them(monkeypatch):
    seconds = iter([1.0, 2.0])
    monkeypatch.setattr(latency, "_time", lambda *_, on_gpu: next(seconds))
    found = measure_latency({"one": nn.Identity()}, (), repeats=2, warmup=0)["one"]
    assert found == Latency(1.5, (1.25, 1.75))


def test_a_slower_model_is_seen_to_be_slower():
    models = {"small": nn.Linear(400, 8), "large": nn.Sequential(*(nn.Linear(400, 400) for _ in range(20)))}
    found = measure_latency(models, (torch.zeros(64, 400),), repeats=15)
    assert 0 < found["small"].median < found["large"].median
    assert all(time.spread[0] <= time.median <= time.spread[1] < math.inf for time in found.values())


def test_too_few_repeats():
    with pytest.raises(ConfigError, match=r"^a median needs at least 2 repeats, found 1\.$"):
        measure_latency({"one": nn.Identity()}, (torch.zeros(1),), repeats=1)
