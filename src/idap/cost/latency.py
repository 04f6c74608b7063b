"""Latency of models measured side by side: they alternate in one process, so that both see the same machine."""

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from idap.errors import ConfigError


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        median: seconds.
        spread: first and third quartile, seconds.
    """

    median: float
    spread: tuple[float, float]


def measure_latency(
    models: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    repeats: int = 50,
    warmup: int = 5,
) -> dict[str, Latency]:
    """Time the forward passes of several models in turn.

    Args:
        models: by name; run in eval mode, their modes are put back.
        args: positional inputs, the same for all.
        kwargs: keyword inputs.
        repeats: timed passes of each model, at least 2.
        warmup: passes of each model before the clock starts.

    Returns:
        Median and quartiles of each model, in seconds.

    Raises:
        ConfigError: too few repeats.

    Example:
        >>> times = measure_latency({"small": nn.Linear(2, 2)}, (torch.zeros(1, 2),), repeats=3)
        >>> times["small"].median > 0
        True
    """
    if repeats < 2:
        raise ConfigError(f"a median needs at least 2 repeats, found {repeats}.")
    times: dict[str, list[float]] = {name: [] for name in models}
    # no_grad, not inference_mode: a model may keep a tensor for later, and training could not use an inference tensor.
    with ExitStack() as stack, torch.no_grad():
        for model in models.values():
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            model.eval()
        for turn in range(warmup + repeats):
            for name, model in models.items():
                seconds = _timed(model, args, kwargs or {})
                if turn >= warmup:
                    times[name].append(seconds)
    found = {}
    for name, seconds_each in times.items():
        low, middle, high = statistics.quantiles(seconds_each, n=4, method="inclusive")
        found[name] = Latency(middle, (low, high))
    return found


def _timed(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    _wait()
    start = time.perf_counter()
    model(*args, **kwargs)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
