"""Check a task on one batch of each split before a run starts, and split off validation data where there are none."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from idap.errors import IdapError, TaskError
from idap.training.batch import Batch, describe, device_of, move
from idap.training.evaluate import Meter, keep_modes
from idap.training.processes import work_locally
from idap.training.task import Split, Task, empty_split

SHARE = 0.1
"""The share of the training data that becomes validation data."""


def with_validation(task: Task, *, seed: int = 0) -> tuple[Task, str]:
    """Split validation data off the training data of a task that has none.

    Args:
        task: the task; it is not changed.
        seed: seed of the random choice of samples or batches.

    Returns:
        The task with validation data, and a sentence that says what was done. If the task already has validation data:
        the task itself and "".

    Raises:
        TaskError: the training data can't be split.

    Example:
        >>> from idap.training.task import classification
        >>> batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))] * 20
        >>> task, note = with_validation(classification(batches, num_classes=2))
        >>> len(task.train), len(task.val), note
        (18, 2, 'the task has no validation data: 2 of its 20 training batches are used for validation')
    """
    if task.val is not None:
        return task, ""
    if isinstance(task.train, DataLoader):
        train, val, counts = _split_loader(task.train, seed)
    elif isinstance(task.train, Sequence) and len(task.train) > 1:
        chosen = _choose(len(task.train), _validation_count(len(task.train)), seed)
        train = [batch for place, batch in enumerate(task.train) if place not in chosen]
        val = [batch for place, batch in enumerate(task.train) if place in chosen]
        counts = f"{len(val)} of its {len(task.train)} training batches are used for validation"
    else:
        raise TaskError(
            f"the task has no validation data, and its training data is {describe(task.train)}, which can't be split. "
            "Pass val=batches."
        )
    return replace(task, train=train, val=val), f"the task has no validation data: {counts}"


def _split_loader(loader: DataLoader[Batch], seed: int) -> tuple[Iterable[Batch], Iterable[Batch], str]:
    data = loader.dataset
    usual = isinstance(loader.sampler, RandomSampler | SequentialSampler) and loader.batch_size is not None
    if isinstance(data, IterableDataset) or not usual or len(data) < 2:  # type: ignore[arg-type]
        raise TaskError(
            f"the task has no validation data, and its training loader, over {describe(data)}, can't be split: it has "
            "its own sampler, no length, or fewer than two samples. Split the data yourself and pass val=batches."
        )
    total = len(data)  # type: ignore[arg-type]
    count = _validation_count(total)
    if _has_last_batch_of_one(loader, total - count) and not _has_last_batch_of_one(loader, total):
        count += 1 if total - count > 1 else 0
    chosen = _choose(total, count, seed)
    rest = [place for place in range(total) if place not in chosen]

    def make_loader(places: list[int], *, training: bool) -> DataLoader[Batch]:
        return DataLoader(
            Subset(data, places),
            batch_size=loader.batch_size,
            shuffle=training and isinstance(loader.sampler, RandomSampler),
            drop_last=training and loader.drop_last,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator if training else None,
            persistent_workers=loader.persistent_workers,
        )

    counts = (
        f"{len(chosen)} of its {total} training samples are used for validation, with the training loader's "
        "augmentations"
    )
    return make_loader(rest, training=True), make_loader(sorted(chosen), training=False), counts


def _has_last_batch_of_one(loader: DataLoader[Batch], samples: int) -> bool:
    """Whether the last batch would hold a single sample, on which a batch norm can't train."""
    size = loader.batch_size or 1
    return not loader.drop_last and size > 1 and samples % size == 1


def _validation_count(total: int) -> int:
    return max(1, round(SHARE * total))


def _choose(total: int, count: int, seed: int) -> set[int]:
    dice = torch.Generator().manual_seed(seed)
    return set(torch.randperm(total, generator=dice)[:count].tolist())


T = TypeVar("T")

REPEATABLE = 1e-5
"""The largest difference allowed between two passes over one batch, relative to the largest output.

Sums on a GPU differ by less.
"""


def check_task(model: nn.Module, task: Task, *, trains: bool = True) -> None:
    """Check on the first batch of each split that a model and a task fit together.

    The loss is computed on 'train' and 'calibration', the metric and the logits on 'val' and 'test', where the model
    runs twice. The modes, buffers and gradients of the model and torch's random state are restored afterwards.

    Args:
        model: the model to train and evaluate.
        task: its data, loss and metric.
        trains: whether the model will be trained, so that the loss must have a gradient.

    Raises:
        TaskError: a split is empty or can be read only once; the model does not accept the inputs, has weights of half
            precision, or gives different outputs each time; the loss is not a finite scalar with a gradient; the metric
            is not a finite number; or the labels do not fit the outputs.
    """
    check_model(model)
    _check_precision(model)
    device = device_of(model)
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda), keep_modes(model), _keep_buffers(model), work_locally():
        for split in _splits_of(task):
            batch = move(_first_batch(task.batches(split), split), device)
            if split in ("train", "calibration"):
                _check_loss(model, task, batch, split=split, trains=trains)
            else:
                _check_metric(model, task, batch, split=split)


@contextmanager
def _keep_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers that a forward pass changes, such as counters."""
    held = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in held:
                module._buffers[name] = buffer  # a pass may have replaced it
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def check_model(model: nn.Module) -> None:
    """Refuse a model that can't be traced and trained, before any of it is run.

    Raises:
        TaskError: the model is not a module, was compiled by `torch.compile`, or inference mode is on.
    """
    if not isinstance(model, nn.Module):
        raise TaskError(f"the model is {describe(model)}; expected a torch.nn.Module.")
    if torch.is_inference_mode_enabled():
        raise TaskError(
            "this was called within torch.inference_mode(), where nothing can be trained. Call it outside of that "
            "context, and load or build the model outside of it as well."
        )
    for name, part in model.named_modules():
        if type(part).__name__ == "OptimizedModule" and hasattr(part, "_orig_mod"):
            culprit = f"module {name!r}" if name else "the model"
            raise TaskError(
                f"{culprit} was compiled by torch.compile, and compiled code can't be traced or cut. Pass the original "
                f"module, {f'model.{name}' if name else 'model'}._orig_mod, and compile the result."
            )


def _splits_of(task: Task) -> list[Split]:
    splits: list[Split] = ["train"] if task.val is None else ["train", "val"]
    if task.calibration is not None:
        splits.append("calibration")
    if task.test is not None:
        splits.append("test")
    return splits


def _first_batch(batches: Iterable[Batch], split: Split) -> Batch:
    try:
        # A DataLoader with persistent workers returns the same iterator each time, but restarts it.
        once = not isinstance(batches, DataLoader) and iter(batches) is iter(batches)
    except TypeError as error:
        raise TaskError(
            f"the {split!r} split is {describe(batches)}, which cannot be iterated; expected batches. "
            "Pass a DataLoader, a list, or an object whose __iter__ starts anew each time."
        ) from error
    if once:
        raise TaskError(
            f"the {split!r} split is {describe(batches)}, which can be read only once, but a run reads it many times. "
            "Pass a DataLoader, a list, or an object whose __iter__ starts anew each time."
        )
    for batch in batches:
        return batch
    raise empty_split(split)


def _check_loss(model: nn.Module, task: Task, batch: Batch, *, split: Split, trains: bool) -> None:
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
            f"The model's outputs are {describe(outputs)}; look for NaN and infinity in them and in the inputs."
        )
    if not trains:
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TaskError(f"no parameter of {type(model).__name__} requires a gradient. Call model.requires_grad_(True).")
    if not loss.requires_grad:
        raise TaskError(
            f"the loss has no gradient on the first batch of {split!r}: something between the parameters and the loss "
            "stops it. Look for .item(), .detach(), argmax and torch.no_grad in the model and in the loss."
        )
    _check_dependence(model, task, batch, loss, split=split)


def _check_dependence(model: nn.Module, task: Task, batch: Batch, loss: Tensor, *, split: Split) -> None:
    """Check that the loss depends on the weights.

    A gradient of 0 alone is no fault: the best possible model has it. But then other weights must change the loss.
    """
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    failed = f"the gradient of the loss can't be computed on the first batch of {split!r}"
    gradients = _attempt(lambda: torch.autograd.grad(loss, list(learned.values()), allow_unused=True), failed)
    if any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        return
    args, kwargs = task.inputs(batch)
    with torch.no_grad():
        outputs = model(*args, **kwargs)
        other = task.loss(functional_call(model, {name: 0.9 * p for name, p in learned.items()}, args, kwargs), batch)
    if other.item() != loss.item():
        return
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) > 1]
    if leaves and all(bool((leaf == leaf[0]).all()) for leaf in leaves):
        raise TaskError(
            f"{type(model).__name__} gives the same outputs for each of the {len(leaves[0])} samples of the first "
            f"batch of {split!r}, and other weights change nothing: it is dead, for instance because every ReLU gives "
            "0. Its training failed, or its weights are broken; if it was trained in this run, lower train.lr."
        )
    raise TaskError(
        f"the loss does not depend on the model: on the first batch of {split!r} its gradient is 0 for each of the "
        f"{len(learned)} trainable parameters, and other weights give the same loss, {loss.item():g}. Make loss= use "
        "the outputs that it is called with."
    )


def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            raise TaskError(
                f"the weights of the model are {parameter.dtype} ({name!r} is the first). This type has too few "
                "digits: a cut can't be verified in it, and training loses small updates. Call model.float(), use "
                'Recovery(precision="bf16") for fast training, and convert the result at the end.'
            )


def _check_metric(model: nn.Module, task: Task, batch: Batch, *, split: Split) -> None:
    with torch.no_grad():
        outputs = _outputs(model, task, batch, split=split)
        logits = _attempt(lambda: task.logits(outputs), f"logits= of the task failed on the first batch of {split!r}")
        if isinstance(logits, Tensor):
            _check_repeatable(model, logits, task.logits(_outputs(model, task, batch, split=split)))
        if not isinstance(logits, Tensor):
            raise TaskError(
                f"logits= of the task gave {describe(logits)} on the first batch of {split!r}; expected a tensor."
            )
        meter = Meter(task, device_of(model), split=split)
        failed = f"metric {task.metric_name!r} failed on the first batch of {split!r}"
        _attempt(lambda: meter.add(outputs, batch), failed)
        _attempt(meter.value, failed)


def _check_repeatable(model: nn.Module, first: Tensor, second: Tensor) -> None:
    """Check that a model gives the same outputs each time: cuts are verified and decided on by comparing outputs."""
    same = first.shape == second.shape
    largest = float(first.float().abs().max()) if first.numel() else 0.0
    spread = (
        float((first.float() - second.float()).abs().max()) / max(largest, 1e-12) if same and first.numel() else 0.0
    )
    if not same or spread > REPEATABLE:
        how = f"by {spread:.2g} of the largest output" if same else f"in shape, {first.shape} and {second.shape}"
        raise TaskError(
            f"{type(model).__name__} gives different outputs for the same batch in eval mode: they differ {how}; "
            f"{REPEATABLE:g} is allowed. Look for sampling, and for dropout that model.eval() does not switch off."
        )


def _outputs(model: nn.Module, task: Task, batch: Batch, *, split: Split) -> Any:
    args, kwargs = _attempt(lambda: task.inputs(batch), f"inputs= of the task failed on the first batch of {split!r}")
    given = [describe(value) for value in args] + [f"{key}={describe(value)}" for key, value in kwargs.items()]
    failed = f"{type(model).__name__} failed on the first batch of {split!r}, called with ({', '.join(given)})"
    return _attempt(lambda: model(*args, **kwargs), failed, advice="Pass inputs= to the task if the call is wrong.")


def _attempt(call: Callable[[], T], failed: str, *, advice: str = "") -> T:
    """Call the user's code, and add to its errors where they were raised."""
    try:
        return call()
    except IdapError:
        raise
    except Exception as error:
        raise TaskError(f"{failed}: {type(error).__name__}: {error}. {advice}".rstrip()) from error
