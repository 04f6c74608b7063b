"""Try a task on one batch of each split before any work; make a validation split where there is none."""

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
from idap.training.processes import alone
from idap.training.task import Split, Task, empty_split

SHARE = 0.1
"""Of the training data that decides."""


def with_validation(task: Task, *, seed: int = 0) -> tuple[Task, str]:
    """Give a task validation data, split off its training data, where it has none.

    Args:
        task: left as it is.
        seed: of the choice.

    Returns:
        The task with validation data, and what was done in one sentence; the task itself and "" if it has some.

    Raises:
        TaskError: the training data can't be split.

    Example:
        >>> from idap.training.task import classification
        >>> batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))] * 20
        >>> task, told = with_validation(classification(batches, num_classes=2))
        >>> len(task.train), len(task.val), told
        (18, 2, 'the task has no validation data: 2 of its 20 training batches decide, the others train')
    """
    if task.val is not None:
        return task, ""
    if isinstance(task.train, DataLoader):
        train, val, counts = _split_loader(task.train, seed)
    elif isinstance(task.train, Sequence) and len(task.train) > 1:
        chosen = _choose(len(task.train), _tenth(len(task.train)), seed)
        train = [batch for place, batch in enumerate(task.train) if place not in chosen]
        val = [batch for place, batch in enumerate(task.train) if place in chosen]
        counts = f"{len(val)} of its {len(task.train)} training batches decide, the others train"
    else:
        raise TaskError(
            f"the task has no validation data, and its training data is {describe(task.train)}, which can't be split: "
            "pass val=batches."
        )
    return replace(task, train=train, val=val), f"the task has no validation data: {counts}"


def _split_loader(loader: DataLoader[Batch], seed: int) -> tuple[Iterable[Batch], Iterable[Batch], str]:
    data = loader.dataset
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler) and loader.batch_size is not None
    if isinstance(data, IterableDataset) or not plain or len(data) < 2:  # type: ignore[arg-type]
        raise TaskError(
            f"the task has no validation data, and its training loader, over {describe(data)}, has its own way of "
            "choosing samples: split the data yourself and pass val=batches."
        )
    total = len(data)  # type: ignore[arg-type]
    count = _tenth(total)
    if _leaves_one(loader, total - count) and not _leaves_one(loader, total):
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
        f"{len(chosen)} of its {total} training samples decide, as the training loader gives them, augmentations "
        "included; the others train"
    )
    return make_loader(rest, training=True), make_loader(sorted(chosen), training=False), counts


def _leaves_one(loader: DataLoader[Batch], samples: int) -> bool:
    """Whether the last batch would hold a single sample, which a batch norm can't learn from."""
    size = loader.batch_size or 1
    return not loader.drop_last and size > 1 and samples % size == 1


def _tenth(total: int) -> int:
    return max(1, round(SHARE * total))


def _choose(total: int, count: int, seed: int) -> set[int]:
    dice = torch.Generator().manual_seed(seed)
    return set(torch.randperm(total, generator=dice)[:count].tolist())


T = TypeVar("T")

REPEATABLE = 1e-5
"""Largest difference between two runs on one batch, relative to the largest output; sums on a GPU differ by less."""


def check_task(model: nn.Module, task: Task, *, trains: bool = True) -> None:
    """Make sure that a model and a task fit together, on the first batch of each split.

    The loss is tried on 'train' and 'calibration', the metric and the logits on 'val' and 'test', where the model runs
    twice. It keeps its modes, buffers and gradients, and torch's random state is put back.

    Args:
        model: the model to train and judge.
        task: what it is for.
        trains: the model will be trained, so the loss must have a gradient.

    Raises:
        TaskError: a split is empty or can be read only once, the model does not take the inputs, has weights of half
            precision, or gives other outputs each time; the loss is not a finite scalar with a gradient, the metric is
            not a finite number, or labels do not fit the outputs.
    """
    check_model(model)
    _check_precision(model)
    device = device_of(model)
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda), keep_modes(model), _keep_buffers(model), alone():
        for split in _splits_of(task):
            batch = move(_first_batch(task.batches(split), split), device)
            if split in ("train", "calibration"):
                _check_loss(model, task, batch, split=split, trains=trains)
            else:
                _check_metric(model, task, batch, split=split)


@contextmanager
def _keep_buffers(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that a forward pass changes, such as counters."""
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
                module._buffers[name] = buffer  # a pass may have set another one
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def check_model(model: nn.Module) -> None:
    """Refuse what can't be traced and trained, before anything is tried.

    Raises:
        TaskError: the model is no module, went through `torch.compile`, or inference mode is on.
    """
    if not isinstance(model, nn.Module):
        raise TaskError(f"the model is {describe(model)}; expected a torch.nn.Module.")
    if torch.is_inference_mode_enabled():
        raise TaskError(
            "this was called within torch.inference_mode(), where nothing can be trained. Call it outside of that "
            "context, and load or build the model outside as well."
        )
    for name, part in model.named_modules():
        if type(part).__name__ == "OptimizedModule" and hasattr(part, "_orig_mod"):
            called = f"module {name!r}" if name else "the model"
            raise TaskError(
                f"{called} went through torch.compile, and what it does can't be traced or cut. Give the module that "
                f"was compiled, {f'model.{name}' if name else 'model'}._orig_mod, and compile the result."
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
            f"The model's outputs are {describe(outputs)}; look there and in the inputs for NaN and infinity."
        )
    if not trains:
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TaskError(f"no parameter of {type(model).__name__} requires a gradient. Call model.requires_grad_(True).")
    if not loss.requires_grad:
        raise TaskError(
            f"the loss has no gradient on the first batch of {split!r}: something between the parameters and the loss "
            "cuts it off. Look for .item(), .detach(), argmax and torch.no_grad in the model and in the loss."
        )
    _check_dependence(model, task, batch, loss, split=split)


def _check_dependence(model: nn.Module, task: Task, batch: Batch, loss: Tensor, *, split: Split) -> None:
    """A gradient of 0 may be that of the best model possible; then other weights must give another loss."""
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
    told = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) > 1]
    if told and all(bool((leaf == leaf[0]).all()) for leaf in told):
        raise TaskError(
            f"{type(model).__name__} gives the same outputs for each of the {len(told[0])} samples of the first batch "
            f"of {split!r}, and with other weights too: it is dead, as when no ReLU lets anything through. Its "
            "training went wrong, or its weights are broken; where it was trained in this run, lower train.lr."
        )
    raise TaskError(
        f"the loss does not depend on the model: on the first batch of {split!r} its gradient is 0 for each of the "
        f"{len(learned)} parameters that are trained, and other weights give the same loss, {loss.item():g}. Let "
        "loss= use the outputs it is given."
    )


def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            raise TaskError(
                f"the weights of the model are {parameter.dtype} ({name!r} is the first): a cut can't be proved to the "
                "last digits in it, and small updates are lost in training. Call model.float() first, let "
                'Recovery(precision="bf16") make training fast, and convert the result at the end.'
            )


def _check_metric(model: nn.Module, task: Task, batch: Batch, *, split: Split) -> None:
    with torch.no_grad():
        outputs = _outputs(model, task, batch, split=split)
        logits = _attempt(lambda: task.logits(outputs), f"logits= of the task failed on the first batch of {split!r}")
        if isinstance(logits, Tensor):
            _check_repeatable(model, logits, task.logits(_outputs(model, task, batch, split=split)))
        if not isinstance(logits, Tensor):
            raise TaskError(
                f"logits= of the task gave {describe(logits)} on the first batch of {split!r}; not a tensor."
            )
        meter = Meter(task, device_of(model), split=split)
        failed = f"metric {task.metric_name!r} failed on the first batch of {split!r}"
        _attempt(lambda: meter.add(outputs, batch), failed)
        _attempt(meter.value, failed)


def _check_repeatable(model: nn.Module, first: Tensor, second: Tensor) -> None:
    """Cuts are proved, and decisions taken, by comparing outputs."""
    same = first.shape == second.shape
    largest = float(first.float().abs().max()) if first.numel() else 0.0
    spread = (
        float((first.float() - second.float()).abs().max()) / max(largest, 1e-12) if same and first.numel() else 0.0
    )
    if not same or spread > REPEATABLE:
        found = f"by {spread:.2g} of the largest output" if same else f"in shape, {first.shape} and {second.shape}"
        raise TaskError(
            f"{type(model).__name__} gives other outputs for the same batch from call to call in eval mode: they "
            f"differ {found}, allowed is {REPEATABLE:g}. Look for sampling, and for dropout that model.eval() does not "
            "switch off."
        )


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
