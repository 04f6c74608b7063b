"""The loop of a training: one step after another, epoch by epoch."""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from idap.errors import DivergedError, IdapError, TaskError
from idap.progress import Phase
from idap.training.batch import Batch, Outputs, device_of, move, nan_in
from idap.training.best import Best
from idap.training.distill import Features, distillation_loss, feature_distance
from idap.training.evaluate import keep_modes
from idap.training.processes import Draw, align_tensors_, share, sum_gradients_, totals
from idap.training.recovery import Pace, Recovery
from idap.training.speed import (
    Precision,
    channels_last,
    channels_last_fault,
    compile_model,
    explain_failure,
    has_convolutions,
)
from idap.training.task import Task, empty_split


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What a training run did.

    Args:
        steps: optimiser steps taken.
        first_loss: loss of the first step.
        last_loss: loss of the last step.
        best: the highest value the judge gave, which the model returned to; None without a judge.
        losses: mean loss of each epoch, the last one possibly cut short.
        curve: loss of each step.
        scores: (steps taken, what the judge gave then), before training and after each epoch.
        seconds: wall-clock time, judging included.
        diverged: what ended it early; "" if nothing did.
        averaged: whether the model is the average of the untrained and the trained one.
    """

    steps: int
    first_loss: float
    last_loss: float
    best: float | None
    losses: tuple[float, ...]
    curve: tuple[float, ...]
    scores: tuple[tuple[int, float], ...]
    seconds: float
    diverged: str = ""
    averaged: bool = False


class Loop:
    """The state of one training.

    Args:
        model: in training mode.
        task: gives the batches and the loss.
        recovery: how to train.
        pace: counts the steps.
        phase: told of each step.
        optimizer: of the model's parameters; None: the one that `recovery` describes.

    Attributes:
        first_loss: loss of the first step.
        last_loss: loss of the last step.
        means: mean loss of each epoch.
        curve: loss of each step.

    Raises:
        TaskError: there is nothing to train, or the optimiser is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recovery: Recovery,
        pace: Pace,
        phase: Phase,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._model, self._task, self._recovery, self._pace, self._phase = model, task, recovery, pace, phase
        self._called = model  # to run it; perhaps compiled
        self._teacher: nn.Module | None = None
        self._features: Features | None = None
        self._device = device_of(model)
        self._precision = Precision(recovery.precision, self._device)
        self._optimizer = _make_optimizer(model, recovery) if optimizer is None else _of_model(model, optimizer)
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self.first_loss = self.last_loss = math.nan
        self.means: list[float] = []
        self.curve: list[float] = []

    def learn_from(self, teacher: nn.Module | None, features: Features | None) -> None:
        """Train beside a teacher, as far as the settings give it a weight."""
        self._features = features if self._recovery.features > 0 else None
        self._teacher = teacher if self._recovery.distil > 0 or self._features is not None else None

    def epoch(self, draw: Draw, lasting: ExitStack, *, expected: int | None) -> None:
        """Train over all batches once, or up to the last step.

        Args:
            draw: gives the batches.
            lasting: gets what lasts as long as the training.
            expected: how many batches there are; None: any number.

        Raises:
            TaskError: there was no batch, or another number of them; a loss or gradient is not finite.
        """
        losses: list[float] = []
        for loaded in draw.batches(self._task.train):
            if len(losses) == expected:
                raise _uneven(expected, "more")
            part, weight = share(loaded, self._task.size)
            batch = move(part, self._device)
            if self._pace.done == 0:
                self._settle(batch, lasting)
            losses.append(self._step(batch, weight))
            self.curve.append(losses[-1])
            if self._pace.over:
                break
        if not losses:
            raise empty_split("train")
        if expected is not None and len(losses) < expected and not self._pace.over:
            raise _uneven(expected, str(len(losses)))
        self.means.append(sum(losses) / len(losses))

    def report(self, best: Best, seconds: float, diverged: str) -> FitReport:
        """What was done, with the judge's scores, the time that it took, and what ended it early."""
        return FitReport(
            steps=self._pace.done,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            best=best.value,
            losses=tuple(self.means),
            curve=tuple(self.curve),
            scores=tuple(best.scores),
            seconds=seconds,
            diverged=diverged,
            averaged=best.averaged,
        )

    def put_back_rates(self) -> None:
        """Give the optimiser's groups the learning rates that they came with."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            _set_rate(group, rate)

    def _settle(self, batch: Batch, lasting: ExitStack) -> None:
        """See on the first batch how the model can be run."""
        wanted = self._recovery.channels_last
        if wanted is True or (wanted == "auto" and has_convolutions(self._model)):
            refusal = channels_last_fault(self._model, self._device)
            with ExitStack() as trial:
                if refusal is None:
                    for model in self._models():
                        trial.enter_context(channels_last(model))
                    refusal = self._refusal(batch)
                if refusal is None:
                    lasting.enter_context(trial.pop_all())
            if refusal is not None and wanted is True:
                raise TaskError(f"channels_last=True, but the model does not run that way: {refusal}. Leave it out.")
        if self._recovery.compile:
            self._called = compile_model(self._model)

    @torch.no_grad()
    def _refusal(self, batch: Batch) -> str | None:
        """Why the models can't run on a batch as they are now; None if they can."""
        cuda = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=cuda), keep_modes(self._model), self._precision.autocast():
            for model in self._models():
                try:
                    self._task.run(model, batch)
                except RuntimeError as error:  # such as a view that the usual order of memory would allow
                    return str(error).splitlines()[0]
        return None

    def _step(self, batch: Batch, weight: float) -> float:
        rates = [self._pace.learning_rate(rate, self._recovery.warmup) for rate in self._rates]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            _set_rate(group, rate)
        self._optimizer.zero_grad()
        compiles = self._called is not self._model and self._pace.done == 0
        self.last_loss = (
            explain_failure(lambda: self._backward(batch, weight)) if compiles else self._backward(batch, weight)
        )
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        sum_gradients_(parameters)
        if self._recovery.clip_norm is not None:
            self._finite("gradient norm", float(nn.utils.clip_grad_norm_(parameters, self._recovery.clip_norm)))
        self._optimizer.step()
        align_tensors_(self._model.buffers())
        if self._pace.done == 0:
            self.first_loss = self.last_loss
        self._pace.advance()
        self._phase.advance(f"loss {self.last_loss:.3f}")
        return self.last_loss

    def _backward(self, batch: Batch, weight: float) -> float:
        """Compute the gradient of this process's part of the loss; give the loss of the whole batch."""
        loss = self._loss(batch, weight)
        (value,) = totals(loss.item())
        self._finite("loss", value, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _loss(self, batch: Batch, weight: float) -> Tensor:
        """The sum of these over all processes is the loss of the whole batch."""
        ours: list[Tensor] = []
        with self._precision.autocast():
            if self._features is None:
                outputs = self._run(batch)
            else:
                outputs, ours = self._features.student(lambda: self._run(batch))
        outputs = self._precision.whole(outputs)
        if self._teacher is None:
            return weight * self._task.loss(outputs, batch)
        target, theirs = self._teacher_outputs(self._teacher, batch)
        distil = self._recovery.distil
        parts = []
        if distil > 0:
            logits = self._task.logits(outputs)
            parts.append(distil * distillation_loss(logits, target, temperature=self._recovery.temperature))
        if distil < 1:
            parts.append((1 - distil) * self._task.loss(outputs, batch))
        loss = weight * torch.stack(parts).sum()
        return loss if self._features is None else loss + self._recovery.features * feature_distance(ours, theirs)

    def _run(self, batch: Batch) -> Outputs:
        """The model's outputs; what it raises says on which batch.

        The first batch of each split was tried before, but not in training, and others may be smaller.
        """
        try:
            return self._task.run(self._called, batch)
        except (IdapError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._called is not self._model:  # what went wrong may be the compilation, see `explain_failure`
                raise
            samples = self._task.size(batch)
            advice = " A batch norm can't learn from one sample: drop_last=True leaves it out." if samples == 1 else ""
            raise TaskError(
                f"{type(self._model).__name__} failed in training at {self._pace}, on a batch with "
                f"{samples} sample{'' if samples == 1 else 's'}: {type(error).__name__}: {error}.{advice}"
            ) from error

    def _models(self) -> list[nn.Module]:
        """The model, and its teacher if there is one."""
        return [model for model in (self._model, self._teacher) if model is not None]

    @torch.no_grad()
    def _teacher_outputs(self, teacher: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The logits and the features of the teacher."""
        theirs: list[Tensor] = []
        with self._precision.autocast():
            if self._features is None:
                outputs = self._task.run(teacher, batch)
            else:
                outputs, theirs = self._features.teacher(lambda: self._task.run(teacher, batch))
        return self._task.logits(self._precision.whole(outputs)), theirs

    def _finite(self, what: str, number: float, batch: Batch = None) -> None:
        if not math.isfinite(number):
            rate = self._pace.learning_rate(max(self._rates), self._recovery.warmup)
            clip = "" if self._recovery.clip_norm is not None else ", or set clip_norm"
            advice = f"Lower lr or lengthen warmup{clip}; at step 0, look for NaN in the weights."
            (count,) = totals(0.0 if batch is None else float(any(map(bool, nan_in(self._task.inputs(batch))))))
            if count:
                advice = "This training batch itself holds NaN: look at the data."
            raise DivergedError(f"the {what} is {number} at {self._pace}, learning rate {rate:.3g}. {advice}")


def _make_optimizer(model: nn.Module, recovery: Recovery) -> torch.optim.Optimizer:
    """The optimiser that the settings describe."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TaskError(f"no parameter of {type(model).__name__} requires a gradient. Call model.requires_grad_(True).")
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recovery.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recovery.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recovery.lr, betas=(float(recovery.momentum), 0.999))
    return torch.optim.SGD(groups, lr=recovery.lr, momentum=recovery.momentum)


def _of_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimiser, if it trains parameters of this model."""
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [parameter for parameter in held if id(parameter) not in own]
    if strangers or not any(parameter.requires_grad for parameter in held):
        found = f"a parameter of shape {tuple(strangers[0].shape)} that" if strangers else "no trainable parameter that"
        raise TaskError(
            f"the {type(optimizer).__name__} holds {found} {type(model).__name__} has. Build it from "
            "model.parameters(); for a model that was cut, slice it with slice_optimizer."
        )
    return optimizer


def _set_rate(group: dict[str, object], rate: float) -> None:
    held = group["lr"]
    if isinstance(held, Tensor):
        held.fill_(rate)
    else:
        group["lr"] = rate


def _uneven(expected: int, found: str) -> TaskError:
    return TaskError(
        f"an epoch of the 'train' split gave {found} batches, expected {expected}, as it announced or gave before. "
        "Give as many in every epoch, or say how long to train with steps or minutes instead of epochs."
    )
