"""Measure the latency of models side by side, and derive seconds from a table of the latencies of layers."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from idap.errors import ConfigError
from idap.parsing import LARGEST, indices, items, sequence, text, whole


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, in seconds.

    Attributes:
        median: median over the timed passes.
        spread: first and third quartile.
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
        models: the models by name; they run in eval mode, and their modes are restored.
        args: positional inputs, the same for all models.
        kwargs: keyword inputs.
        repeats: timed passes of each model, at least 2.
        warmup: passes of each model before the clock starts.

    Returns:
        Median and quartiles of each model, in seconds.

    Raises:
        ConfigError: `repeats` is below 2.

    Example:
        >>> times = measure_latency({"small": nn.Linear(2, 2)}, (torch.zeros(1, 2),), repeats=3)
        >>> times["small"].median > 0
        True
    """
    # Not inference_mode: a model may keep a tensor for later, and training can't use a tensor made in that mode.
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
    """Time several functions in turn, so that changes of the machine's speed affect all of them.

    Args:
        runs: the functions by name.
        repeats: timed calls of each function, at least 2.
        warmup: calls of each function before the clock starts.
        on_gpu: measure by the GPU's clock, with events before and after each call.

    Returns:
        Median and quartiles of each function, in seconds.

    Raises:
        ConfigError: `repeats` is below 2.

    Example:
        >>> sorted(alternate({"sum": lambda: sum(range(9)), "max": lambda: max(range(9))}, repeats=3))
        ['max', 'sum']
    """
    if repeats < 2:
        raise ConfigError(f"a median needs at least 2 repeats, found {repeats}.")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            seconds = _time(run, on_gpu=on_gpu)
            if turn >= warmup:
                times[name].append(seconds)
    found = {}
    for name, seconds_each in times.items():
        low, middle, high = statistics.quantiles(seconds_each, n=4, method="inclusive")
        found[name] = Latency(middle, (low, high))
    return found


def _time(run: Callable[[], Any], *, on_gpu: bool) -> float:
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


FORMAT = 1


@dataclass(frozen=True)
class Curve:
    """Seconds of one pass of an operator, or of several, by the number of units of a group.

    Attributes:
        widths: numbers of units, ascending; the last one is that of the whole group.
        seconds: seconds at each width: the middle one of the medians of a few rounds.
        spread: seconds between the lowest and the highest of these medians, at each width.
    """

    widths: tuple[int, ...]
    seconds: tuple[float, ...]
    spread: tuple[float, ...]

    def at(self, width: int) -> float:
        """Seconds at a width, interpolated linearly between the measured widths and constant beyond them.

        >>> Curve((8, 16), (1.0, 3.0), (0.0, 0.0)).at(12)
        2.0
        """
        return float(np.interp(width, self.widths, self.seconds))


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of every layer that reads or writes units of a group, measured alone, with all other groups whole.

    Attributes:
        batch: samples of a pass.
        device: device on which it was measured.
        threads: number of threads of the CPU.
        curves: the curve of each different layer.
        layers: node of the graph -> group whose units it reads or writes -> index of its curve.
        fixed: node -> seconds, for the layers that read and write no units.
        unmeasured: names of the operators on units that were not timed.
    """

    batch: int
    device: str
    threads: int
    curves: tuple[Curve, ...]
    layers: Mapping[str, Mapping[str, int]]
    fixed: Mapping[str, float] = field(default_factory=dict)
    unmeasured: tuple[str, ...] = ()

    @cached_property
    def _of_group(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for node, over in self.layers.items():
            for group in over:
                found.setdefault(group, []).append(node)
        return found

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups whose units are read or written by a measured layer."""
        return tuple(self._of_group)

    def curve(self, group: str) -> Curve:
        """Seconds of all layers of a group by its width, with all other groups whole.

        Args:
            group: one of `groups`.
        """
        mine = [self.curves[self.layers[node][group]] for node in self._of_group[group]]
        widths = max((curve.widths for curve in mine), key=len)
        seconds = tuple(sum(curve.at(width) for curve in mine) for width in widths)
        spread = tuple(sum(float(np.interp(w, c.widths, c.spread)) for c in mine) for w in widths)
        return Curve(widths, seconds, spread)

    def seconds(self, numbers: Mapping[str, int], gone: Collection[str] = ()) -> float:
        """Seconds of one pass of all measured layers, each narrowed by each of its groups independently.

        Args:
            numbers: group name -> number of units that it has; groups that are not named are whole.
            gone: names of the nodes that are no longer computed.
        """
        over = sum(self._layer(node, numbers) for node in self.layers if node not in gone)
        return over + sum(time for node, time in self.fixed.items() if node not in gone)

    def unit_seconds(self, numbers: Mapping[str, int], gone: Collection[str] = ()) -> dict[str, float]:
        """Seconds that one unit of each group takes: those that half of the units saves, divided by their number.

        Args:
            numbers: group name -> number of units that it has, for all groups of interest.
            gone: names of the nodes that are no longer computed.

        Returns:
            Group name -> seconds, above 0; a thousandth of the mean where no difference was measured. Groups with fewer
            than two units, and groups none of whose measured layers is left, are missing.
        """
        found = {}
        for group, width in numbers.items():
            measured = self._of_group.get(group, ())
            nodes = [node for node in measured if node not in gone]
            if width < 2 or (measured and not nodes):
                continue
            half = {**numbers, group: width // 2}
            saved = sum(self._layer(node, numbers) - self._layer(node, half) for node in nodes)
            found[group] = saved / (width - width // 2)
        return positive_seconds(found)

    def _layer(self, node: str, numbers: Mapping[str, int]) -> float:
        """Seconds of one layer: those of the whole layer, times the share that each group leaves."""
        curves = [(self.curves[index], numbers.get(group)) for group, index in self.layers[node].items()]
        time = curves[0][0].seconds[-1]
        for curve, width in curves:
            time *= 1.0 if width is None else curve.at(width) / curve.seconds[-1]
        return time

    def to_json(self) -> dict[str, Any]:
        """The table as plain data, which `table_from` reads."""
        return {
            "format": FORMAT,
            "batch": self.batch,
            "device": self.device,
            "threads": self.threads,
            "curves": [
                {"widths": list(c.widths), "seconds": list(c.seconds), "spread": list(c.spread)} for c in self.curves
            ],
            "layers": {node: dict(over) for node, over in self.layers.items()},
            "fixed": dict(self.fixed),
            "unmeasured": list(self.unmeasured),
        }


def positive_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Make seconds safe to divide by: each becomes at least a thousandth of the mean, and is above 0."""
    mean = sum(max(0.0, value) for value in seconds.values()) / max(1, len(seconds))
    return {name: max(value, mean / 1000, 1e-12) for name, value in seconds.items()}


def table_from(data: Any) -> LatencyTable:
    """Read a table from the plain data of `LatencyTable.to_json`.

    Raises:
        TypeError, ValueError: the data are of another form, or contradict themselves; the message says what was found.
    """
    found = dict(items(data))
    wanted = {"format", "batch", "device", "threads", "curves", "layers", "fixed", "unmeasured"}
    if set(found) != wanted:
        raise ValueError(f"expected the keys {', '.join(sorted(wanted))}, found {', '.join(sorted(found))}")
    if whole(found["format"]) != FORMAT:
        raise ValueError(f"expected format {FORMAT}, found {found['format']}")
    curves = tuple(_curve(one) for one in sequence(found["curves"]))
    layers = {node: {group: whole(place) for group, place in items(over)} for node, over in items(found["layers"])}
    fixed = dict(items(found["fixed"]))
    for node, over in layers.items():
        if not over or any(not 0 <= place < len(curves) for place in over.values()):
            raise ValueError(f"layer {node!r} has no curve, or one that is not in the table")
    return LatencyTable(
        batch=whole(found["batch"]),
        device=text(found["device"]),
        threads=whole(found["threads"]),
        curves=curves,
        layers=layers,
        fixed=dict(zip(fixed, _times(list(fixed.values())), strict=True)),
        unmeasured=tuple(text(name) for name in sequence(found["unmeasured"])),
    )


def _curve(data: Any) -> Curve:
    found = dict(items(data))
    widths = indices(found.get("widths"))
    seconds, spread = _times(found.get("seconds")), _times(found.get("spread"))
    if not widths or not len(widths) == len(seconds) == len(spread) or min(seconds) <= 0:
        raise ValueError("a curve needs seconds above 0 and a spread for each of its widths")
    return Curve(widths, seconds, spread)


def _times(data: Any) -> tuple[float, ...]:
    found: Sequence[Any] = sequence(data)
    for value in found:
        if type(value) not in (int, float) or not 0 <= value < LARGEST:
            raise ValueError(f"expected seconds of at least 0, found {value!r:.60}")
    return tuple(float(value) for value in found)
