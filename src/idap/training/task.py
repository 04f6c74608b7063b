"""Describe what a model is for: its data, its loss, its metric, and how a batch is passed to the model."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idap.errors import ConfigError, TaskError
from idap.training.batch import (
    Batch,
    Inputs,
    Outputs,
    default_inputs,
    default_labels,
    default_logits,
    default_padding,
    default_size,
    describe,
    move,
    seed_loader,
)

if TYPE_CHECKING:
    from torchmetrics import Metric
    from typing_extensions import TypeIs

Split = Literal["train", "val", "test", "calibration"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Data, loss and metric of one purpose; everything that training and evaluation need.

    Args:
        train: batches to learn from; iterated anew in every epoch.
        val: batches on which steps are accepted or rolled back; None: compression splits some off `train`.
        test: batches that are evaluated once, at the end.
        calibration: batches on which divergence is measured; None: `train` is used.
        loss: returns the scalar loss of `(outputs, batch)`.
        metric: a torchmetrics metric, or a function of `(outputs, batch)` that returns the mean over one batch.
        metric_name: name of the metric in reports.
        higher_is_better: False for a metric such as perplexity.
        update: updates a torchmetrics metric: `update(metric, outputs, batch)`.
        inputs: returns the model's positional and keyword arguments for a batch.
        logits: returns the tensor of logits from the model's outputs, with classes in the last dimension.
        size: counts the samples of a batch; its mean is weighted by them.
        padding: returns which positions of a batch of sequences count, of shape (samples, positions), or None if all
            do; by default the batch's ``attention_mask``.
        notes: sentences about the data that the reader of a run should know; compression prints them first.

    Raises:
        TaskError: the metric and `update` do not fit together.
    """

    train: Iterable[Batch] = field(repr=False)
    val: Iterable[Batch] | None = field(default=None, repr=False)
    test: Iterable[Batch] | None = field(default=None, repr=False)
    calibration: Iterable[Batch] | None = field(default=None, repr=False)
    loss: Callable[[Outputs, Batch], Tensor]
    metric: "Metric | Callable[[Outputs, Batch], float | Tensor]"
    metric_name: str
    higher_is_better: bool = True
    update: "Callable[[Metric, Outputs, Batch], None] | None" = None
    inputs: Callable[[Batch], Inputs] = default_inputs
    logits: Callable[[Outputs], Tensor] = default_logits
    size: Callable[[Batch], int] = default_size
    padding: Callable[[Batch], Tensor | None] = default_padding
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if is_torchmetrics(self.metric) and self.update is None:
            raise TaskError(
                f"metric {self.metric_name!r} is a torchmetrics {type(self.metric).__name__}, and nothing updates it. "
                "Pass update=lambda metric, outputs, batch: metric.update(predictions, targets) to the task."
            )
        if not is_torchmetrics(self.metric) and self.update is not None:
            raise TaskError(
                f"update= is for a torchmetrics metric, but metric {self.metric_name!r} is {describe(self.metric)}, "
                "which is called as metric(outputs, batch). Leave update= out."
            )

    def batches(self, split: Split) -> Iterable[Batch]:
        """Return the batches of a split.

        Args:
            split: 'train', 'val', 'test' or 'calibration'; the last is 'train' if the task has no calibration data.

        Returns:
            The iterable that was given for the split.

        Raises:
            TaskError: there is no such split.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test, "calibration": self.calibration}
        if split not in splits:
            raise TaskError(f"there is no split {split!r}; splits are {', '.join(splits)}.")
        batches = splits[split]
        if batches is None and split == "calibration":
            return self.train
        if batches is None:
            raise TaskError(f"the task has no {split!r} split. Pass {split}=batches when the task is built.")
        return batches

    def run(self, model: nn.Module, batch: Batch) -> Outputs:
        """Call the model on one batch.

        Args:
            model: called as it is; the caller sets its mode and whether gradients are computed.
            batch: already on the model's device, see `move`.

        Returns:
            What the model returns.
        """
        args, kwargs = self.inputs(batch)
        return model(*args, **kwargs)

    def example(self, device: torch.device | str) -> Inputs:
        """Return the model's arguments for the first calibration batch.

        Args:
            device: device of the returned tensors.

        Returns:
            Positional and keyword arguments of the model; the same each time, even if the loader shuffles.

        Raises:
            TaskError: the calibration split is empty.
        """
        batches = self.batches("calibration")
        with seed_loader(batches, 0):
            for batch in batches:
                return self.inputs(move(batch, device))
        raise empty_split("calibration" if self.calibration is not None else "train")


def is_torchmetrics(value: object) -> "TypeIs[Metric]":
    """Whether something is a metric of torchmetrics.

    The library is not imported for this: if it is not imported yet, nothing can be one of its metrics.

    >>> is_torchmetrics(lambda outputs, batch: 0.5)
    False
    """
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(value, library.Metric)


def classification(
    train: Iterable[Batch],
    val: Iterable[Batch] | None = None,
    *,
    num_classes: int,
    test: Iterable[Batch] | None = None,
    calibration: Iterable[Batch] | None = None,
    label_smoothing: float = 0.0,
) -> Task:
    """Build a task that predicts one of several classes, with cross-entropy and accuracy.

    Args:
        train: batches `(input, labels, ...)`, or dicts with 'labels' or 'label'; labels are integers of shape `(B,)`.
        val: batches on which steps are accepted or rolled back; None: compression splits some off `train`.
        num_classes: the number of classes C; the model's logits have shape `(B, C)`.
        test: batches that are evaluated once, at the end.
        calibration: batches on which divergence is measured; None: `train` is used.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).

    Returns:
        A `Task` whose metric is the accuracy, in [0, 1]. Labels are checked in every batch.

    Raises:
        ConfigError: `num_classes` or `label_smoothing` is out of range.
    """
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ConfigError(f"num_classes must be 2 or more, got {num_classes!r}.")
    if not isinstance(label_smoothing, int | float):
        raise ConfigError(f"label_smoothing must be a number, got {label_smoothing!r}.")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        logits, labels = _logits_and_labels(outputs, batch, num_classes)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def accuracy(outputs: Outputs, batch: Batch) -> float:
        logits, labels = _logits_and_labels(outputs, batch, num_classes)
        return int((logits.argmax(1) == labels).sum()) / len(labels)

    return Task(
        train=train, val=val, test=test, calibration=calibration, loss=loss, metric=accuracy, metric_name="accuracy"
    )


def empty_split(split: str) -> TaskError:
    """The error for a split without batches."""
    return TaskError(
        f"the {split!r} split gave no batches. Either it is empty, or it can be read only once, as a generator can: "
        "pass a DataLoader, a list, or an object whose __iter__ starts anew each time."
    )


def _logits_and_labels(outputs: Outputs, batch: Batch, num_classes: int) -> tuple[Tensor, Tensor]:
    """Find logits `(B, C)` and labels `(B,)` as int64; raises `TaskError` if they can't be compared."""
    logits, labels = default_logits(outputs), default_labels(batch)
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        raise TaskError(
            f"the model's logits have shape {tuple(logits.shape)}; classification with num_classes={num_classes} "
            f"expects (B, {num_classes}). Pass the model's own number of outputs, or replace its last layer."
        )
    if labels.dtype not in _INTEGERS or labels.shape != logits.shape[:1]:
        raise TaskError(
            f"the labels are {describe(labels)}; expected integers of shape ({len(logits)},), one class per sample. "
            "Turn one-hot rows into indices with argmax(1), and columns of shape (B, 1) into squeeze(1)."
        )
    if not len(labels):
        raise TaskError("a batch holds no samples. Leave out such batches, as a DataLoader with drop_last=True does.")
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise TaskError(
            f"label {low if low < 0 else high} is outside 0..{num_classes - 1}: the model has {num_classes} outputs. "
            "Renumber the labels from 0, or give the model and num_classes more classes."
        )
    return logits, labels.long()


def task_from(data: Any, where: str) -> Task:
    """Make a task from what a data set returned: a task, or splits for classification.

    Args:
        data: the task, or an object with train, val, test and num_classes.
        where: name of the recipe, with which every error begins.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(data, Task):
        return data
    try:
        task = classification(
            data.train,
            data.val,
            test=data.test,
            num_classes=data.num_classes,
            calibration=getattr(data, "calibration", None),
        )
    except AttributeError as error:
        raise ConfigError(
            f"{where}: data.name gave {type(data).__name__} without {error.name!r}; expected an idap.Task, or an "
            "object with train, val, test (or None) and num_classes, such as idap.data.tensors.Splits."
        ) from error
    return replace(task, notes=tuple(getattr(data, "notes", ())))


def task_of(definition: Any) -> Task:
    """Return the task from the user's code, which is a task or a function that returns one.

    Raises:
        ConfigError: it is something else.
    """
    task = definition() if callable(definition) else definition
    if not isinstance(task, Task):
        raise ConfigError(f"the task is {type(task).__name__}, expected an idap.Task, or a function that returns one.")
    return task


def check_keys(build: Any, keys: Mapping[str, Any], name: str, where: str) -> None:
    """Check that the user's function accepts the keys of `[data]` as arguments.

    Raises:
        ConfigError: it is not a function, or does not accept one of the keys.
    """
    if not callable(build):
        raise ConfigError(f"{where}: data.name {name} is {type(build).__name__}, expected a function.")
    parameters = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in keys:
        if key not in parameters:
            raise ConfigError(
                f"{where}: data.{key} is not a key of {name}, which takes {', '.join(parameters) or 'no keys'}."
            )
