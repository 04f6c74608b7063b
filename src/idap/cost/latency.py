"""Latency of models measured side by side: they alternate in one process, so that both see the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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
    # no_grad, not inference_mode: a model may keep a tensor for later, and training could not use an inference tensor.
    with ExitStack() as stack, torch.no_grad():
        for model in models.values():
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            model.eval()
        runs = {name: partial(model, *args, **(kwargs or {})) for name, model in models.items()}
        tensors = next(iter(models.values())).parameters() if models else iter(())
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        return alternate(runs, repeats=repeats, warmup=warmup, on_gpu=on_gpu)


def alternate(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int = 50, warmup: int = 5, on_gpu: bool = False
) -> dict[str, Latency]:
    """Time several calls in turn, so that all of them see the same machine.

    Args:
        runs: by name.
        repeats: timed calls of each, at least 2.
        warmup: calls of each before the clock starts.
        on_gpu: the clock is the GPU's own: events before and after each call.

    Returns:
        Median and quartiles of each, in seconds.

    Raises:
        ConfigError: too few repeats.

    Example:
        >>> sorted(alternate({"sum": lambda: sum(range(9)), "max": lambda: max(range(9))}, repeats=3))
        ['max', 'sum']
    """
    if repeats < 2:
        raise ConfigError(f"a median needs at least 2 repeats, found {repeats}.")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            seconds = _timed(run, on_gpu=on_gpu)
            if turn >= warmup:
                times[name].append(seconds)
    found = {}
    for name, seconds_each in times.items():
        low, middle, high = statistics.quantiles(seconds_each, n=4, method="inclusive")
        found[name] = Latency(middle, (low, high))
    return found


def _timed(run: Callable[[], Any], *, on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    seconds: float = begin.elapsed_time(end) / 1000
    return seconds
