"""The training loop: steps and epochs."""

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
    """The report of a training.

    Args:
        steps: optimiser steps taken.
        first_loss: loss of the first step.
        last_loss: loss of the last step.
        best: the highest score of the judge, whose state the model has at the end; None without a judge.
        losses: mean loss of each epoch; the last epoch may be incomplete.
        curve: loss of each step.
        scores: (steps taken, score of the judge at that step), before training and after each epoch.
        seconds: wall-clock time, including the judge's.
        diverged: what ended the training early; "" if nothing did.
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
        phase: receives each step.
        optimizer: an optimiser of the model's parameters; None: the one that `recovery` describes.

    Attributes:
        first_loss: loss of the first step.
        last_loss: loss of the last step.
        means: mean loss of each epoch.
        curve: loss of each step.

    Raises:
        TaskError: there is nothing to train, or the optimiser belongs to another model.
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
        self._called = model  # the module that is called; compiled if the settings say so
        self._teacher: nn.Module | None = None
        self._features: Features | None = None
        self._device = device_of(model)
        self._precision = Precision(recovery.precision, self._device)
        self._optimizer = _make_optimizer(model, recovery) if optimizer is None else _check_optimizer(model, optimizer)
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self.first_loss = self.last_loss = math.nan
        self.means: list[float] = []
        self.curve: list[float] = []

    def learn_from(self, teacher: nn.Module | None, features: Features | None) -> None:
        """Set the teacher and the features, each of which is used only if its weight in the settings is above 0."""
        self._features = features if self._recovery.features > 0 else None
        self._teacher = teacher if self._recovery.distil > 0 or self._features is not None else None

    def train_epoch(self, draw: Draw, contexts: ExitStack, *, expected: int | None) -> None:
        """Train over all batches once, or up to the last step.

        Args:
            draw: iterates the batches.
            contexts: receives the contexts that stay open during the training.
            expected: the number of batches; None: any number.

        Raises:
            TaskError: there was no batch, or another number of batches than expected; a loss or gradient is not finite.
        """
        losses: list[float] = []
        for loaded in draw.batches(self._task.train):
            if len(losses) == expected:
                raise _epoch_length_error(expected, "more")
            part, weight = share(loaded, self._task.size)
            batch = move(part, self._device)
            if self._pace.done == 0:
                self._choose_format(batch, contexts)
            losses.append(self._step(batch, weight))
            self.curve.append(losses[-1])
            if self._pace.over:
                break
        if not losses:
            raise empty_split("train")
        if expected is not None and len(losses) < expected and not self._pace.over:
            raise _epoch_length_error(expected, str(len(losses)))
        self.means.append(sum(losses) / len(losses))

    def report(self, best: Best, seconds: float, diverged: str) -> FitReport:
        """Report the training, with the judge's scores, its duration, and what ended it early."""
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

    def restore_rates(self) -> None:
        """Restore the learning rates that the optimiser's groups had before the training."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            _set_rate(group, rate)

    def _choose_format(self, batch: Batch, contexts: ExitStack) -> None:
        """Try the channels-last format on the first batch if the settings want it, and compile the model."""
        wanted = self._recovery.channels_last
        if wanted is True or (wanted == "auto" and has_convolutions(self._model)):
            refusal = channels_last_fault(self._model, self._device)
            with ExitStack() as trial:
                if refusal is None:
                    for model in self._models():
                        trial.enter_context(channels_last(model))
                    refusal = self._refusal(batch)
                if refusal is None:
                    contexts.enter_context(trial.pop_all())
            if refusal is not None and wanted is True:
                raise TaskError(f"channels_last=True, but the model can't run in that format: {refusal}. Leave it out.")
        if self._recovery.compile:
            self._called = compile_model(self._model)

    @torch.no_grad()
    def _refusal(self, batch: Batch) -> str | None:
        """The reason why the models can't run on a batch in their current format; None if they can."""
        cuda = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=cuda), keep_modes(self._model), self._precision.autocast():
            for model in self._models():
                try:
                    self._task.run(model, batch)
                except RuntimeError as error:  # such as a view that only works in the usual memory format
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
            self._check_finite("gradient norm", float(nn.utils.clip_grad_norm_(parameters, self._recovery.clip_norm)))
        self._optimizer.step()
        align_tensors_(self._model.buffers())
        if self._pace.done == 0:
            self.first_loss = self.last_loss
        self._pace.advance()
        self._phase.advance(f"loss {self.last_loss:.3f}")
        return self.last_loss

    def _backward(self, batch: Batch, weight: float) -> float:
        """Compute the gradient of this process's part of the loss; returns the loss of the whole batch."""
        loss = self._loss(batch, weight)
        (value,) = totals(loss.item())
        self._check_finite("loss", value, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _loss(self, batch: Batch, weight: float) -> Tensor:
        """This process's part of the loss; the sum over all processes is the loss of the whole batch."""
        ours: list[Tensor] = []
        with self._precision.autocast():
            if self._features is None:
                outputs = self._run(batch)
            else:
                outputs, ours = self._features.student(lambda: self._run(batch))
        outputs = self._precision.widen(outputs)
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
        """The model's outputs; an error names the step and the size of the batch.

        The first batch of each split was checked before, but not in training mode, and other batches may be smaller.
        """
        try:
            return self._task.run(self._called, batch)
        except (IdapError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._called is not self._model:  # the compilation may have failed, see `explain_failure`
                raise
            samples = self._task.size(batch)
            advice = " A batch norm can't train on one sample: drop_last=True leaves it out." if samples == 1 else ""
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
        return self._task.logits(self._precision.widen(outputs)), theirs

    def _check_finite(self, what: str, number: float, batch: Batch = None) -> None:
        if not math.isfinite(number):
            rate = self._pace.learning_rate(max(self._rates), self._recovery.warmup)
            clip = "" if self._recovery.clip_norm is not None else ", or set clip_norm"
            advice = f"Lower lr or lengthen warmup{clip}; if this is step 0, look for NaN in the weights."
            (count,) = totals(0.0 if batch is None else float(any(map(bool, nan_in(self._task.inputs(batch))))))
            if count:
                advice = "This training batch itself holds NaN: check the data."
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


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser if it trains parameters of this model, else raise `TaskError`."""
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [parameter for parameter in held if id(parameter) not in own]
    if strangers or not any(parameter.requires_grad for parameter in held):
        name = type(model).__name__
        what = (
            f"a parameter of shape {tuple(strangers[0].shape)} that {name} does not have"
            if strangers
            else f"no trainable parameter of {name}"
        )
        raise TaskError(
            f"the {type(optimizer).__name__} holds {what}. Build it from model.parameters(); after a cut, slice it "
            "with slice_optimizer."
        )
    return optimizer


def _set_rate(group: dict[str, object], rate: float) -> None:
    held = group["lr"]
    if isinstance(held, Tensor):
        held.fill_(rate)
    else:
        group["lr"] = rate


def _epoch_length_error(expected: int, actual: str) -> TaskError:
    return TaskError(
        f"an epoch of the 'train' split gave {actual} batches, expected {expected}, its length or that of an earlier "
        "epoch. Give every epoch the same number, or limit the training with steps or minutes instead of epochs."
    )
