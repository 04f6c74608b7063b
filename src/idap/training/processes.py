"""Divide the work of one run among several processes, and combine their results.

Every process runs the same program, reads the same batches in the same order, and works on its share of them. All
processes take the same decisions, because every decision follows from sums over all processes. In a single process, the
functions here return their argument or the local value unchanged.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from idap.errors import IdapError, TaskError
from idap.training.batch import Batch

T = TypeVar("T")

_LOCAL = ContextVar("local", default=False)

CHUNK = 2**24
"""The most numbers that are exchanged at once."""


@contextmanager
def join_processes() -> Iterator[torch.device]:
    """Join the other processes that a launcher such as `accelerate launch` started, if there are any.

    Yields:
        The device for this process.
    """
    from accelerate import PartialState  # noqa: PLC0415 - slow to import, and needed by commands only

    joined = dist.is_available() and dist.is_initialized()
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"))
    try:
        # Sums of squares are kept in float64, which mps does not support.
        yield torch.device("cpu") if state.device.type == "mps" else state.device
        if not joined and state.num_processes > 1:
            dist.barrier()  # a process that leaves early closes the connections of the others
    finally:
        if not joined:
            state.destroy_process_group()


def process_count() -> int:
    """The number of processes of the run; 1 where `torch.distributed` is not initialised."""
    if _LOCAL.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def process_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def is_main() -> bool:
    """Whether this is process 0, the only one that writes files and prints."""
    return process_rank() == 0


@contextmanager
def work_locally() -> Iterator[None]:
    """Within this context, every process does all the work itself, as if there were no others."""
    token = _LOCAL.set(True)
    try:
        yield
    finally:
        _LOCAL.reset(token)


def call_locally(call: Callable[[], T]) -> T:
    """Call a function as if there were no other processes."""
    with work_locally():
        return call()


@contextmanager
def raise_everywhere() -> Iterator[None]:
    """Raise an error in every process if one process raises it; otherwise the others would wait for ever.

    Raises:
        Exception: the error of this process, or else the error of the first process that failed.
    """
    if process_count() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failures: list[Exception | None] = [None] * process_count()
    dist.all_gather_object(failures, None if own is None else _portable_error(own))
    if own is not None:
        raise own
    for failure in failures:
        if failure is not None:
            raise failure


def on_main(call: Callable[[], T]) -> T:
    """Call a function in process 0 only; every process returns its result, or raises its error."""
    results: list[Any] = [None]
    with raise_everywhere():
        if is_main():
            results[0] = call()
    if process_count() > 1:
        dist.broadcast_object_list(results, src=0, device=_exchange_device())
    value: T = results[0]
    return value


def from_main(value: float) -> float:
    """The value that a number has in process 0."""
    if process_count() == 1:
        return value
    held = torch.tensor([value], dtype=torch.float64, device=_exchange_device())
    dist.broadcast(held, src=0)
    return float(held)


def totals(*values: float) -> tuple[float, ...]:
    """Sum numbers over all processes, in float64."""
    if process_count() == 1:
        return values
    held = torch.tensor(values, dtype=torch.float64, device=_exchange_device())
    dist.all_reduce(held)
    return tuple(held.tolist())


def local_items(items: Sequence[T]) -> Sequence[T]:
    """The items of a sequence that this process works on: every n-th one of n processes."""
    return items[process_rank() :: process_count()]


def share(batch: Batch, size: Callable[[Batch], int]) -> tuple[Batch, float]:
    """Take this process's samples of a batch.

    Tensors whose first dimension is the batch, nested in tuples, lists and dicts, are sliced; so are lists with one
    item per sample. If a process would get fewer than two samples, or nothing can be sliced, each process takes the
    whole batch.

    Args:
        batch: the whole batch.
        size: counts its samples.

    Returns:
        The part, and its weight. The mean over the batch is the sum over all processes of weight times the part's mean.
    """
    count = process_count()
    if count == 1:
        return batch, 1.0
    samples = size(batch)
    part, sliced = _slice(batch, samples, slice(process_rank(), None, count))
    if not sliced or samples < 2 * count:
        return batch, 1 / count
    return part, len(range(process_rank(), samples, count)) / samples


def _slice(value: Any, samples: int, places: slice) -> tuple[Any, bool]:
    if isinstance(value, Tensor):
        fits = value.ndim > 0 and len(value) == samples
        return (value[places], True) if fits else (value, False)
    if isinstance(value, Mapping):
        parts = {key: _slice(part, samples, places) for key, part in value.items()}
        return {key: part for key, (part, _) in parts.items()}, any(cut for _, cut in parts.values())
    if isinstance(value, tuple | list):
        found = [_slice(part, samples, places) for part in value]
        if any(cut for _, cut in found):
            kept = [part for part, _ in found]
            return (type(value)(*kept) if hasattr(value, "_fields") else type(value)(kept)), True
        if len(value) == samples and not hasattr(value, "_fields"):
            return value[places], True
    return value, False


class Draw:
    """Iterates a loader so that every process gets the same batches, whatever else it draws from torch's random state.

    Args:
        seed: seed of the batches; None: they start from torch's current random state. In a single process, the loader
            draws from torch's random state, and the seed has no effect.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._state = torch.get_rng_state() if seed is None else torch.Generator().manual_seed(seed).get_state()

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate a loader once."""
        if process_count() == 1:
            yield from loader
            return
        with self._use_state():
            iterator = iter(loader)
        while True:
            try:
                with self._use_state():
                    batch = next(iterator)
            except StopIteration:
                return
            yield batch

    @contextmanager
    def _use_state(self) -> Iterator[None]:
        own = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(own)


def align_(model: nn.Module) -> None:
    """Copy the parameters and buffers of a model from process 0 to every process, in place."""
    align_tensors_([*model.parameters(), *model.buffers()])


def align_tensors_(tensors: Iterable[Tensor]) -> None:
    """Copy the values of tensors from process 0 to every process, in place."""
    if process_count() > 1:
        for chunk in _chunks([tensor.detach() for tensor in tensors]):
            flat = torch.cat([tensor.reshape(-1) for tensor in chunk]).to(_exchange_device())
            dist.broadcast(flat, src=0)
            _put_back(flat, chunk)


def sum_gradients_(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place; a gradient that is None in every process stays None."""
    if process_count() == 1:
        return
    has = torch.tensor([parameter.grad is not None for parameter in parameters], device=_exchange_device()).int()
    dist.all_reduce(has)
    held = [parameter for parameter, count in zip(parameters, has.tolist(), strict=True) if count]
    for parameter in held:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for chunk in _chunks([parameter.grad for parameter in held if parameter.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in chunk]).to(_exchange_device())
        dist.all_reduce(flat)
        _put_back(flat, chunk)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one data type, with at most `CHUNK` numbers in each list unless one tensor has more."""
    chunk: list[Tensor] = []
    for tensor in tensors:
        if chunk and (chunk[0].dtype != tensor.dtype or sum(map(Tensor.numel, chunk)) + tensor.numel() > CHUNK):
            yield chunk
            chunk = []
        chunk.append(tensor)
    if chunk:
        yield chunk


def _put_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, values in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.reshape(tensor.shape))


def _portable_error(error: Exception) -> Exception:
    """The error itself if it can be sent to another process, else a `TaskError` that quotes it."""
    if isinstance(error, IdapError):
        return type(error)(*map(str, error.args))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TaskError(f"process {process_rank()} failed: {type(error).__name__}: {error}")
    return error


def _exchange_device() -> torch.device:
    """The device that tensors must be on so that processes can exchange them."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
