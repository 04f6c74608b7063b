"""Measure a model on a task, and leave the model unchanged."""

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from idap.errors import DivergedError, IdapError, TaskError
from idap.progress import Progress, Silent
from idap.training.batch import Batch, Outputs, describe, device_of, move, nan_in, seed_loader
from idap.training.processes import Draw, process_count, process_rank, raise_everywhere, totals, work_locally
from idap.training.task import Split, Task, empty_split, is_torchmetrics

if TYPE_CHECKING:
    from torchmetrics import Metric


@contextmanager
def keep_modes(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Put a model in evaluation or training mode, and restore the mode of each module afterwards.

    Args:
        model: changed in place within the context.
        training: the mode within the context.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Score(NamedTuple):
    """The result of measuring one split.

    Attributes:
        metric: a finite number.
        batches: number of batches of the split.
        broken: number of batches on which outputs of the model hold NaN. The metric may not show it: an accuracy counts
            them as class 0.
    """

    metric: float
    batches: int
    broken: int = 0


def evaluate(model: nn.Module, task: Task, *, split: Split = "val", progress: Progress | None = None) -> float:
    """Measure the task's metric on one split; see `score`, which takes the same arguments and raises the same errors.

    Returns:
        The metric, a finite number.
    """
    return score(model, task, split=split, progress=progress).metric


def score(model: nn.Module, task: Task, *, split: Split = "val", progress: Progress | None = None) -> Score:
    """Measure the task's metric on one split; with several processes, each measures some of the batches.

    Args:
        model: run in evaluation mode without gradients; the mode of every module is restored.
        task: gives the batches and the metric; a metric that is a function is averaged over batches, weighted by their
            size.
        split: which batches; a loader that shuffles uses the same seed each time.
        progress: the listener that receives each batch.

    Returns:
        The metric, the number of batches, and on how many of them the outputs hold NaN.

    Raises:
        TaskError: the split is missing or empty, the model or the metric fails on a batch, or the metric is not a
            number.
        DivergedError: the metric is NaN or infinite.
    """
    device = device_of(model)
    batches = task.batches(split)
    meter = Meter(task, device, split=split)
    broken: list[list[Tensor]] = []
    total = operator.length_hint(batches) or None
    # no_grad, not inference_mode: a model may keep a tensor, and training can't use an inference tensor.
    phase_of = (progress or Silent()).phase(f"evaluate {split}", total)
    with raise_everywhere(), keep_modes(model), torch.no_grad(), seed_loader(batches, 0), phase_of as phase:
        for number, loaded in enumerate(Draw(seed=0).batches(batches)):
            if number % process_count() == process_rank():
                with _name_batch(task, split, number):
                    batch = move(loaded, device)
                    outputs = task.run(model, batch)
                    broken.append(nan_in(outputs))
                    with _blame_model(broken[-1]):
                        meter.add(outputs, batch)
            meter.seen += 1
            phase.advance()
    if is_torchmetrics(task.metric) and meter.seen < process_count():
        with work_locally():  # torchmetrics can't compute a result in a process without batches
            return score(model, task, split=split)
    (count,) = totals(sum(any(map(bool, flags)) for flags in broken))
    return Score(meter.value(), meter.seen, int(count))


@contextmanager
def _blame_model(broken: list[Tensor]) -> Iterator[None]:
    """If a metric fails on outputs that hold NaN, report that the model failed, not the metric."""
    try:
        yield
    except (IdapError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not any(map(bool, broken)):
            raise
        raise DivergedError(
            f"the model's outputs hold NaN, and the metric raised {type(error).__name__}: {error}"
        ) from error


def output_error(model: nn.Module, reference: nn.Module, task: Task, *, split: Split = "val") -> float:
    """Measure the squared difference between the logits of a model and of a reference, relative to the reference.

    The value is E‖N0(x) − N*(x)‖² / E‖N0(x)‖²; see `docs/method.md#promise`.

    Args:
        model: N*, the compressed model.
        reference: N0, the original model, on the same device.
        task: gives the batches, and the logits of the outputs.
        split: which batches.

    Returns:
        The relative error: 0 for equal outputs, 1 for a model whose logits are all 0.

    Raises:
        TaskError: the split is missing or empty, the shapes differ, or the error is not finite.
    """
    device = device_of(model)
    error = power = 0.0
    seen = 0
    batches = task.batches(split)
    with raise_everywhere(), keep_modes(model), keep_modes(reference), torch.no_grad(), seed_loader(batches, 0):
        for number, loaded in enumerate(Draw(seed=0).batches(batches)):
            seen += 1
            if number % process_count() != process_rank():
                continue
            with _name_batch(task, split, number):
                batch = move(loaded, device)
                ours = task.logits(task.run(model, batch)).float()
                theirs = task.logits(task.run(reference, batch)).float()
            if ours.shape != theirs.shape:
                raise TaskError(
                    f"the model's logits have shape {tuple(ours.shape)}, those of the reference {tuple(theirs.shape)}; "
                    "the output error compares models with the same outputs."
                )
            error += float((theirs - ours).square().sum())
            power += float(theirs.square().sum())
    error, power = totals(error, power)
    if seen == 0:
        raise empty_split(split)
    if power == 0 or not math.isfinite(error + power):
        raise TaskError(
            f"on the {split!r} split the squared logits of the reference sum to {power} and the squared differences to "
            f"{error}; for a relative error both must be finite, and the first above 0. Look for NaN and infinity in "
            "the outputs of both models."
        )
    return error / power


@contextmanager
def _name_batch(task: Task, split: Split, number: int) -> Iterator[None]:
    """Add the number of the batch to errors of the user's model and metric."""
    try:
        yield
    except (IdapError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise TaskError(
            f"batch {number} of the {split!r} split, counted from 0, can't be measured by {task.metric_name!r}: "
            f"{type(error).__name__}: {error}. Run the model and the metric on that batch."
        ) from error


class Meter:
    """Accumulates a task's metric batch by batch, without changing the metric object of the task.

    Args:
        task: gives the metric.
        device: device of the outputs.
        split: name of the split, for errors.

    Attributes:
        seen: batches of the split so far, over all processes.
    """

    def __init__(self, task: Task, device: torch.device, *, split: Split) -> None:
        self._task = task
        self._split = split
        self._metric: Metric | None = None
        if is_torchmetrics(task.metric):
            self._metric = task.metric.clone().to(device)
            self._metric.reset()
            for part in self._metric.modules():  # computing it sums over all processes
                if is_torchmetrics(part):
                    part.sync_on_compute = process_count() > 1
        self.seen = 0
        self._batches = 0
        self._sum = 0.0
        self._weight = 0

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """Add one batch.

        Args:
            outputs: what the model returned.
            batch: the batch on the model's device.

        Raises:
            TaskError: the metric of the batch is not a number.
            DivergedError: it is NaN or infinite.
        """
        if self._metric is not None and self._task.update is not None:
            self._task.update(self._metric, outputs, batch)
        elif not is_torchmetrics(self._task.metric):
            size = self._task.size(batch)
            where = f"batch {self.seen} of the {self._split!r} split"
            self._sum += size * self._number(self._task.metric(outputs, batch), where)
            self._weight += size
        self._batches += 1

    def value(self) -> float:
        """Return the metric over all batches so far, in all processes.

        Returns:
            A finite number.

        Raises:
            TaskError: there was no batch, or the metric is not a number.
            DivergedError: the metric is NaN or infinite.
        """
        batches, weighted, weight = totals(self._batches, self._sum, self._weight)
        if batches == 0:
            raise empty_split(self._split)
        if self._metric is not None:
            return self._number(self._metric.compute(), f"the {self._split!r} split")
        if weight == 0:
            raise TaskError(f"all batches of the {self._split!r} split have size 0. Check size= of the task.")
        return weighted / weight

    def _number(self, value: object, where: str) -> float:
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        name = self._task.metric_name
        if not isinstance(number, Real):
            raise TaskError(
                f"metric {name!r} gave {describe(value)} on {where}; expected one number. "
                "Let the metric return a float, or a tensor with one element."
            )
        if not math.isfinite(number):
            raise DivergedError(
                f"metric {name!r} is {float(number)} on {where}; expected a finite number. "
                "Look for NaN in the model's outputs there, and for a division by zero in the metric."
            )
        return float(number)
