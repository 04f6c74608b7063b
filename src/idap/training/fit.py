"""Train a model for a fixed number of steps, alone or beside a teacher, and keep its best state.

One process, one device, the model's own precision: a plain loop does that without wrapping the user's model.
"""

import copy
import math
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from idap.errors import ConfigError, TaskError
from idap.progress import Phase, Progress, Silent
from idap.training.batch import Batch, device_of, move
from idap.training.distill import distillation_loss
from idap.training.evaluate import modes_kept
from idap.training.task import Task, empty_split

Judge = Callable[[nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How to train.

    Args:
        epochs: passes over the training batches; a fraction stops within a pass, 0 trains nothing.
        optimizer: 'sgd' or 'adamw'.
        lr: the highest learning rate.
        momentum: of SGD; the first beta of AdamW.
        weight_decay: for parameters of two and more dimensions; biases and norms are never decayed.
        warmup: share of the steps over which the learning rate rises, in [0, 1); afterwards it falls to 0 as a cosine.
        temperature: softens the logits for distillation, above 0.
        distil: weight of the distillation loss in [0, 1], the task's own loss has the rest; counts only with a teacher.
        clip_norm: the largest gradient norm, above 0; None: gradients are not clipped.
        seed: of torch's random state during training.

    Raises:
        ConfigError: a setting is out of range.
    """

    epochs: float = 1.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    temperature: float = 2.0
    distil: float = 0.5
    clip_norm: float | None = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ConfigError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}.")
        if not 0 <= self.epochs < math.inf:
            raise ConfigError(f"epochs must be 0 or more and finite, got {self.epochs}.")
        for name in ("lr", "temperature", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite, got {value}.")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be 0 or more and finite, got {self.weight_decay}.")
        if not 0 <= self.distil <= 1:
            raise ConfigError(f"distil must be in [0, 1], got {self.distil}.")

    @property
    def trains(self) -> bool:
        """Whether there is anything to do."""
        return self.epochs > 0


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What a training run did.

    Args:
        steps: optimiser steps taken.
        first_loss: loss of the first step.
        last_loss: loss of the last step.
        best: the highest value the judge gave, which the model returned to; None without a judge.
        losses: mean loss of each epoch, the last one possibly cut short.
        seconds: wall-clock time, judging included.
    """

    steps: int
    first_loss: float
    last_loss: float
    best: float | None
    losses: tuple[float, ...]
    seconds: float


def fit(
    model: nn.Module,
    task: Task,
    recovery: Recovery,
    *,
    teacher: nn.Module | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
    title: str = "recovery",
) -> FitReport:
    """Train a model in place.

    The same seed on the same device gives the same weights where the loader draws from torch's global random state, as
    a `DataLoader` without a generator does. That state is put back at the end.

    Args:
        model: trained in place, in training mode; every module gets its mode back, gradients are cleared.
        task: gives the training batches, the loss and the logits.
        recovery: how to train.
        teacher: its logits are learned too, with weight `recovery.distil`; stays as it is, on the model's device.
        judge: scores the model, higher is better, before training and after each epoch; the best state is kept, the
            later one of equals.
        progress: told of each step.
        title: what the progress bar is called.

    Returns:
        A `FitReport`.

    Raises:
        TaskError: nothing to train or train on, a teacher elsewhere, or a loss, gradient or score that is not finite.
    """
    started = time.perf_counter()
    with _training(model, teacher, seed=recovery.seed):
        steps = _count_steps(task, recovery.epochs)
        best = _Best(model, judge)
        with (progress or Silent()).phase(title, steps) as phase:
            loop = _Loop(model, task, recovery, teacher=teacher, steps=steps, phase=phase)
            while loop.done < steps:
                loop.epoch()
                best.look()
        best.restore()
    return FitReport(
        steps=steps,
        first_loss=loop.first_loss,
        last_loss=loop.last_loss,
        best=best.value,
        losses=tuple(loop.means),
        seconds=time.perf_counter() - started,
    )


def learning_rate(step: int, steps: int, *, lr: float, warmup: float) -> float:
    """Give the learning rate of one step: a linear rise, then a cosine fall towards 0.

    Args:
        step: number of the step, from 0.
        steps: steps in all.
        lr: the highest learning rate.
        warmup: share of the steps that rise.

    Returns:
        A rate in (0, lr].

    Example:
        >>> [round(learning_rate(step, 6, lr=1.0, warmup=0.34), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / rising
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


@contextmanager
def _training(model: nn.Module, teacher: nn.Module | None, *, seed: int) -> Iterator[None]:
    """Fork and seed the random state, set the modes, and put everything back but the weights."""
    if teacher is not None:
        _check_teacher(model, teacher)
    teacher_modes = nullcontext() if teacher is None else modes_kept(teacher)
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda), teacher_modes, modes_kept(model, training=True):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            model.zero_grad()


class _Loop:
    """The state of one training run."""

    def __init__(
        self, model: nn.Module, task: Task, recovery: Recovery, *, teacher: nn.Module | None, steps: int, phase: Phase
    ) -> None:
        self._model, self._task, self._recovery, self._phase = model, task, recovery, phase
        self._teacher = teacher if recovery.distil > 0 else None
        self._steps = steps
        self._optimizer = _optimizer(model, recovery)
        self._device = device_of(model)
        self.done = 0
        self.first_loss = self.last_loss = math.nan
        self.means: list[float] = []

    def epoch(self) -> None:
        """Train over all batches once, or up to the last step."""
        losses = [self._step(batch) for batch in islice(self._task.train, self._steps - self.done)]
        if not losses:
            raise empty_split("train")
        self.means.append(sum(losses) / len(losses))

    def _step(self, loaded: Batch) -> float:
        rate = learning_rate(self.done, self._steps, lr=self._recovery.lr, warmup=self._recovery.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss = self._loss(move(loaded, self._device))
        self.last_loss = self._finite("loss", loss, rate)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._recovery.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._recovery.clip_norm)
            self._finite("gradient norm", norm, rate)
        self._optimizer.step()
        if self.done == 0:
            self.first_loss = self.last_loss
        self.done += 1
        self._phase.advance(f"loss {self.last_loss:.3f}")
        return self.last_loss

    def _loss(self, batch: Batch) -> Tensor:
        outputs = self._task.run(self._model, batch)
        if self._teacher is None:
            return self._task.loss(outputs, batch)
        with torch.no_grad():
            target = self._task.logits(self._task.run(self._teacher, batch))
        weight = self._recovery.distil
        loss = weight * distillation_loss(self._task.logits(outputs), target, temperature=self._recovery.temperature)
        return loss + (1 - weight) * self._task.loss(outputs, batch) if weight < 1 else loss

    def _finite(self, what: str, value: Tensor, rate: float) -> float:
        number = value.item()
        if not math.isfinite(number):
            raise TaskError(
                f"the {what} is {number} at step {self.done} of {self._steps}, learning rate {rate:.3g}. "
                "Lower lr, lengthen warmup or set clip_norm; at step 0, look for NaN in the inputs and in the weights."
            )
        return float(number)


class _Best:
    """Keeps the best state of a model so far, on the CPU; does nothing without a judge."""

    def __init__(self, model: nn.Module, judge: Judge | None) -> None:
        self._model, self._judge = model, judge
        self._state: dict[str, Any] = {}
        self.value: float | None = None
        self.look()

    def look(self) -> None:
        if self._judge is None:
            return
        with modes_kept(self._model):
            value = float(self._judge(self._model))
        if math.isnan(value):
            raise TaskError("the judge gave nan; expected a number that is higher for a better model.")
        if self.value is None or value >= self.value:
            self.value = value
            self._state = {
                name: kept.detach().to("cpu", copy=True) if isinstance(kept, Tensor) else copy.deepcopy(kept)
                for name, kept in self._model.state_dict().items()
            }

    def restore(self) -> None:
        if self._judge is not None:
            self._model.load_state_dict(self._state)


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    if teacher is model:
        raise TaskError("the teacher is the model itself, it would teach nothing. Pass a copy taken before the cut.")
    ours, theirs = device_of(model), device_of(teacher)
    if ours != theirs:
        raise TaskError(f"the teacher is on {theirs}, the model on {ours}. Call teacher.to({str(ours)!r}) first.")


def _count_steps(task: Task, epochs: float) -> int:
    # A loader without a length is read through once, since the schedule must know its end.
    batches = operator.length_hint(task.train) or sum(1 for _ in task.train)
    if batches == 0:
        raise empty_split("train")
    return max(1, round(epochs * batches)) if epochs else 0


def _optimizer(model: nn.Module, recovery: Recovery) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TaskError(f"no parameter of {type(model).__name__} requires a gradient. Call model.requires_grad_(True).")
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recovery.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recovery.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recovery.lr, betas=(recovery.momentum, 0.999))
    return torch.optim.SGD(groups, lr=recovery.lr, momentum=recovery.momentum)
