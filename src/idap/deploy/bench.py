"""Compare an original with its compressed model in several engines: latency, memory and file size."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from idap.cost.count import tensor_bytes
from idap.cost.latency import Latency, alternate
from idap.deploy.export import export
from idap.deploy.writers import need_onnx, onnx_runner
from idap.errors import ConfigError
from idap.progress import Progress, Silent
from idap.surgery.compare import batch_size, resize_inputs
from idap.training.batch import device_of
from idap.training.evaluate import keep_modes

Engine = Literal["eager", "compile", "onnxruntime"]
ENGINES: tuple[Engine, ...] = ("eager", "compile", "onnxruntime")
_PAIR = ("original", "compressed")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """Measurements of both models in one engine at one batch size; each pair is (original, compressed).

    Attributes:
        engine: "eager" (PyTorch as it is), "compile" (torch.compile) or "onnxruntime".
        batch: number of samples of a pass.
        latency: latency of one pass.
        memory: peak of the bytes held for activations during one pass; None if it is unknown.
    """

    engine: Engine
    batch: int
    latency: tuple[Latency, Latency]
    memory: tuple[int, int] | None

    @property
    def ratio(self) -> float:
        """Latency of the compressed model as a share of the original's."""
        return self.latency[1].median / self.latency[0].median


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measurements of two models on one machine; each pair is (original, compressed).

    Attributes:
        rows: one row for each engine and batch size.
        size: bytes of the tensors in a saved file.
        subnormal: number of weights so close to 0 that processors compute with them slowly.
        threads: number of threads of the CPU.
        device: device on which the models ran.
        channels_last: whether images had their channels last in memory.
    """

    rows: tuple[BenchRow, ...]
    size: tuple[int, int]
    subnormal: tuple[int, int]
    threads: int
    device: str
    channels_last: bool


def bench(  # noqa: PLR0913 - settings of a measurement, all with defaults
    original: nn.Module,
    compressed: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    batches: Sequence[int] = (1,),
    engines: Sequence[Engine] = ("eager",),
    threads: int | None = None,
    channels_last: bool = False,
    repeats: int = 50,
    warmup: int = 5,
    progress: Progress | None = None,
) -> Bench:
    """Time two models in turn, in one process, in each engine and at each batch size.

    Args:
        original: the original; not changed.
        compressed: the compressed model, on the same device; not changed.
        args: positional example inputs; their samples are repeated or left out to make a batch.
        kwargs: keyword example inputs.
        batches: numbers of samples per pass.
        engines: engines that run the models; "onnxruntime" runs on the CPU and needs the extra ``idap[onnx]``.
        threads: number of threads of the CPU; None: torch's current number is used.
        channels_last: let images and convolution weights have their channels last in memory, in the PyTorch engines.
        repeats: timed passes of each model, at least 2.
        warmup: passes of each model before the clock starts.
        progress: the listener that receives progress, for each engine and batch size; None: no progress is reported.

    Returns:
        Latency, memory, file size, and numbers of subnormal weights.

    Raises:
        ConfigError: a batch size, the number of threads or an engine is invalid, or the models are on two devices.
        ExportError: a model can't be exported for onnxruntime.
    """
    _check(batches, engines, threads, original, compressed)
    progress = progress or Silent()
    pair, inputs = (original, compressed), (args, dict(kwargs or {}))
    on_gpu = device_of(original).type == "cuda"
    rows = []
    with _threads(threads), keep_modes(original), keep_modes(compressed), _layout(pair, channels_last):
        with progress.phase("bench", len(batches) * len(engines)) as phase:
            for engine in engines:
                with _ready(engine, pair, inputs) as runs:
                    for batch in batches:
                        sized = _with_layout(resize_inputs(*inputs, batch), channels_last and engine != "onnxruntime")
                        calls = [partial(run, *sized) for run in runs]
                        rows.append(_row(engine, batch, calls, repeats=repeats, warmup=warmup, on_gpu=on_gpu))
                        phase.advance(f"{engine}, batch of {batch}")
        return Bench(
            rows=tuple(rows),
            size=_both(pair, lambda model: sum(tensor_bytes(model).values())),
            subnormal=_both(pair, subnormal_weights),
            threads=torch.get_num_threads(),
            device=str(device_of(original)),
            channels_last=channels_last,
        )


def _row(
    engine: Engine, batch: int, calls: Sequence[Callable[[], Any]], *, repeats: int, warmup: int, on_gpu: bool
) -> BenchRow:
    times = alternate(dict(zip(_PAIR, calls, strict=True)), repeats=repeats, warmup=warmup, on_gpu=on_gpu)
    memory = (peak_memory(calls[0]), peak_memory(calls[1])) if engine == "eager" else None
    return BenchRow(engine=engine, batch=batch, latency=(times[_PAIR[0]], times[_PAIR[1]]), memory=memory)


def subnormal_weights(model: nn.Module) -> int:
    """Count the weights that are not 0 but smaller than the smallest normal number of their type.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 1e-40)
        >>> subnormal_weights(layer)
        2
    """
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    return sum(int(((t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)).sum()) for t in tensors.values())


def peak_memory(run: Callable[[], Any]) -> int:
    """Measure the peak of the bytes that a call allocates itself, on the device where it runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        if torch.cuda.max_memory_allocated() > before:
            return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _check(
    batches: Sequence[int], engines: Sequence[str], threads: int | None, original: nn.Module, compressed: nn.Module
) -> None:
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown or not engines:
        raise ConfigError(f"engines must be among {', '.join(ENGINES)}; found {unknown[0] if unknown else 'none'!r}.")
    if not batches or min(batches) < 1:
        raise ConfigError(f"batch sizes must be at least 1, found {list(batches)}.")
    if threads is not None and threads < 1:
        raise ConfigError(f"the number of threads must be at least 1, found {threads}.")
    devices = {str(device_of(model)) for model in (original, compressed)}
    if len(devices) > 1:
        raise ConfigError(f"the models are on {' and '.join(sorted(devices))}; bring both to one device.")
    if "onnxruntime" in engines:
        need_onnx()


@contextmanager
def _ready(
    engine: Engine, pair: tuple[nn.Module, nn.Module], inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> Iterator[list[Callable[..., Any]]]:
    """Functions that run the two models in an engine on positional and keyword inputs."""
    if engine == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{name}.onnx" for name in _PAIR]
            for model, file in zip(pair, files, strict=True):
                export(model, inputs[0], file, kwargs=inputs[1], dynamic_batch=batch_size(*inputs) is not None)
            yield [onnx_runner(file) for file in files]
        return
    models = pair if engine == "eager" else tuple(torch.compile(model) for model in pair)

    def runner(model: Callable[..., Any]) -> Callable[..., Any]:
        return lambda args, kwargs: model(*args, **kwargs)

    with torch.inference_mode():
        yield [runner(model) for model in models]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _layout(pair: tuple[nn.Module, nn.Module], channels_last: bool) -> Iterator[None]:
    """Let 4-d weights have their channels last in memory inside the context."""
    if not channels_last:
        yield
        return
    before = {tensor: tensor.data for model in pair for tensor in model.parameters() if tensor.dim() == 4}
    try:
        for tensor, data in before.items():
            tensor.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for tensor, data in before.items():
            tensor.data = data


def _with_layout(inputs: Any, channels_last: bool) -> Any:
    if not channels_last:
        return inputs
    return tree_map_only(
        torch.Tensor, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, inputs
    )


def _both(pair: tuple[nn.Module, nn.Module], count: Callable[[nn.Module], int]) -> tuple[int, int]:
    return count(pair[0]), count(pair[1])
