"""Try a task on one batch of each split, so that mistakes show before any work is done."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from idap.errors import IdapError, TaskError
from idap.training.batch import Batch, describe, device_of, move
from idap.training.evaluate import Meter, modes_kept
from idap.training.task import Split, Task, empty_split

T = TypeVar("T")


def check_task(model: nn.Module, task: Task) -> None:
    """Make sure that a model and a task fit together, on the first batch of each split.

    The loss is tried on 'train' and 'calibration', the metric and the logits on 'val' and 'test'. The model keeps its
    modes, buffers and gradients, and torch's random state is put back.

    Args:
        model: the model to train and judge.
        task: what it is for.

    Raises:
        TaskError: a split is empty or can be read only once, the model does not take the inputs, the loss is not a
            finite scalar with a gradient, the metric is not a finite number, or labels do not fit the outputs.
    """
    device = device_of(model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), modes_kept(model):
        for split in _given(task):
            batch = move(_first_batch(task.batches(split), split), device)
            if split in ("train", "calibration"):
                _check_loss(model, task, batch, split=split)
            else:
                _check_metric(model, task, batch, split=split)


def _given(task: Task) -> list[Split]:
    splits: list[Split] = ["train", "val"]
    if task.calibration is not None:
        splits.append("calibration")
    if task.test is not None:
        splits.append("test")
    return splits


def _first_batch(batches: Iterable[Batch], split: Split) -> Batch:
    try:
        # A DataLoader with persistent workers hands out the same iterator each time, but starts it anew.
        once = not isinstance(batches, DataLoader) and iter(batches) is iter(batches)
    except TypeError as error:
        raise TaskError(
            f"the {split!r} split is {describe(batches)}, which cannot be iterated; expected batches. "
            "Pass a DataLoader, a list, or an object whose __iter__ starts anew each time."
        ) from error
    if once:
        raise TaskError(
            f"the {split!r} split is {describe(batches)}, which can be read only once, and it is read many times. "
            "Pass a DataLoader, a list, or an object whose __iter__ starts anew each time."
        )
    for batch in batches:
        return batch
    raise empty_split(split)


def _check_loss(model: nn.Module, task: Task, batch: Batch, *, split: Split) -> None:
    with torch.enable_grad():
        outputs = _outputs(model, task, batch, split=split)
        loss = _attempt(lambda: task.loss(outputs, batch), f"the loss failed on the first batch of {split!r}")
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise TaskError(
            f"the loss is {describe(loss)} on the first batch of {split!r}; expected a tensor of shape (). "
            "Reduce it with .mean(), and do not turn it into a float."
        )
    if not math.isfinite(loss.item()):
        raise TaskError(
            f"the loss is {loss.item()} on the first batch of {split!r}; expected a finite number. "
            f"The model's outputs are {describe(outputs)}; look there and in the inputs for NaN and infinity."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TaskError(f"no parameter of {type(model).__name__} requires a gradient. Call model.requires_grad_(True).")
    if not loss.requires_grad:
        raise TaskError(
            f"the loss has no gradient on the first batch of {split!r}: something between the parameters and the loss "
            "cuts it off. Look for .item(), .detach(), argmax and torch.no_grad in the model and in the loss."
        )


def _check_metric(model: nn.Module, task: Task, batch: Batch, *, split: Split) -> None:
    with torch.no_grad():
        outputs = _outputs(model, task, batch, split=split)
        logits = _attempt(lambda: task.logits(outputs), f"logits= of the task failed on the first batch of {split!r}")
        if not isinstance(logits, Tensor):
            raise TaskError(
                f"logits= of the task gave {describe(logits)} on the first batch of {split!r}; not a tensor."
            )
        meter = Meter(task, device_of(model), split=split)
        failed = f"metric {task.metric_name!r} failed on the first batch of {split!r}"
        _attempt(lambda: meter.add(outputs, batch), failed)
        _attempt(meter.value, failed)


def _outputs(model: nn.Module, task: Task, batch: Batch, *, split: Split) -> Any:
    args, kwargs = _attempt(lambda: task.inputs(batch), f"inputs= of the task failed on the first batch of {split!r}")
    given = [describe(value) for value in args] + [f"{key}={describe(value)}" for key, value in kwargs.items()]
    failed = f"{type(model).__name__} failed on the first batch of {split!r}, called with ({', '.join(given)})"
    return _attempt(lambda: model(*args, **kwargs), failed, advice="Pass inputs= to the task if the call is wrong.")


def _attempt(call: Callable[[], T], failed: str, *, advice: str = "") -> T:
    """Call what the user wrote, and add to its errors where they came from."""
    try:
        return call()
    except IdapError:
        raise
    except Exception as error:
        raise TaskError(f"{failed}: {type(error).__name__}: {error}. {advice}".rstrip()) from error
