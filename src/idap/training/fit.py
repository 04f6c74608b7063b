"""Train a model, with or without a teacher, in one process or several, and keep its best state.

The loop never wraps the user's model. With several processes, each computes the gradient of its samples; the sum is the
gradient of the whole batch, and updates the same weights in every process.

In a distributed run (`torch.distributed` is initialised) every process gets the same task, with whole batches. Each
process trains on its share of every batch, and all end with the same weights. The loss is assumed to be a mean over the
samples. Batch norms see the share of their own process, and keep the statistics of process 0.
"""

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from idap.errors import ConfigError, DivergedError, TaskError
from idap.progress import Progress, Silent
from idap.training.batch import device_of, seed_loader
from idap.training.best import Best, Judge
from idap.training.distill import Features
from idap.training.evaluate import keep_modes
from idap.training.loop import FitReport, Loop
from idap.training.processes import Draw, align_, process_rank
from idap.training.recovery import Pace, Recovery
from idap.training.task import Task, empty_split


def fit(  # noqa: PLR0913 - the public function of this module has one argument per option
    model: nn.Module,
    task: Task,
    recovery: Recovery,
    *,
    teacher: nn.Module | None = None,
    features: Features | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    judge: Judge | None = None,
    salvage: bool = False,
    progress: Progress | None = None,
    title: str = "recovery",
) -> FitReport:
    """Train a model in place.

    The same seed on the same device gives the same weights if the loader draws from torch's global random state or from
    its generators (`DataLoader(generator=...)`), and the length is not set in minutes. Random states are restored.

    Args:
        model: trained in place, in training mode; the mode of every module is restored, and gradients are cleared.
        task: gives the training batches, the loss and the logits.
        recovery: how to train.
        teacher: a model on the same device, whose logits are learned with weight `recovery.distil`; it is not changed.
        features: collects the features of both models, which are compared with weight `recovery.features`; needs a
            teacher.
        optimizer: an optimiser of the model's parameters; None: the one that `recovery` describes. The learning rate of
            each of its groups is the highest rate of the schedule, and is restored at the end.
        judge: scores the model, higher is better: before training, after each epoch, and the average of the first and
            last weights. The best state is kept, the later one of equal states; the average only if it is better.
        salvage: if a loss or gradient is not finite, stop there, keep the judge's best state, and report the cause.
        progress: the listener that receives each step.
        title: title of the progress bar.

    Returns:
        A report of the training.

    Raises:
        TaskError: there is nothing to train or to train on, the teacher is on another device, epochs differ in length,
            the model can't be compiled, or a loss, gradient or score is not finite.
        ConfigError: `recovery.features` is set, and `features` or `teacher` is missing.
    """
    started = time.perf_counter()
    _check_features(recovery, teacher, features)
    with _training(model, teacher, task, seed=recovery.seed) as (draw, contexts):
        steps, batches = _count_steps(task, recovery, draw)
        best = Best(model, judge)
        phase = contexts.enter_context((progress or Silent()).phase(title, steps))
        pace = Pace(steps=steps, seconds=None if recovery.minutes is None else 60 * recovery.minutes)
        loop = Loop(model, task, recovery, pace, phase, optimizer=optimizer)
        loop.learn_from(teacher, features)
        contexts.callback(loop.restore_rates)
        epoch = partial(loop.train_epoch, draw, contexts, expected=batches)
        diverged = _train(epoch, best, pace if recovery.trains else None, salvage=salvage and judge is not None)
        if recovery.trains and recovery.average and not diverged:
            best.try_average()
        best.restore()
        if recovery.trains:
            best.try_norms(task, recovery.norm_batches, draw)
        align_(model)  # a model may change its buffers while it is scored
    return loop.report(best, time.perf_counter() - started, diverged)


def _train(epoch: Callable[[], None], best: Best, pace: Pace | None, *, salvage: bool) -> str:
    """Train to the end, if there is anything to train; returns what ended it early, or ""."""
    try:
        while pace is not None and not pace.over:
            epoch()
            best.consider(pace.done)
    except DivergedError as error:
        if not salvage:
            raise
        return str(error)
    return ""


@contextmanager
def _training(
    model: nn.Module, teacher: nn.Module | None, task: Task, *, seed: int
) -> Iterator[tuple[Draw, ExitStack]]:
    """Fork and seed the random state, set the modes, and restore everything but the weights afterwards.

    Gradients are on, even if the caller switched them off around the call.

    Yields:
        The drawer of batches, and a stack for contexts that stay open during the training.
    """
    if teacher is not None:
        _check_teacher(model, teacher)
    teacher_modes = nullcontext() if teacher is None else keep_modes(teacher)
    with (
        torch.enable_grad(),
        seed_loader(task.train, seed),
        teacher_modes,
        keep_modes(model, training=True),
        ExitStack() as contexts,
    ):
        draw = Draw()
        if process_rank() > 0:
            torch.manual_seed(seed + process_rank())  # so that dropout differs
        align_(model)
        try:
            yield draw, contexts
        finally:
            model.zero_grad()


def _check_features(recovery: Recovery, teacher: nn.Module | None, features: Features | None) -> None:
    if recovery.features > 0 and (features is None or teacher is None):
        raise ConfigError(
            f"features={recovery.features:g} compares the features of a model with those of its teacher, but teacher= "
            "or features= is missing. Set features to 0, or pass both teacher= and features=."
        )


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    if teacher is model:
        raise TaskError("the teacher is the model itself, which teaches nothing. Pass a copy made before the cut.")
    ours, theirs = device_of(model), device_of(teacher)
    if ours != theirs:
        raise TaskError(f"the teacher is on {theirs}, the model on {ours}. Call teacher.to({str(ours)!r}) first.")


def _count_steps(task: Task, recovery: Recovery, draw: Draw) -> tuple[int | None, int | None]:
    """The number of steps (None: time ends the training), and of batches in an epoch (None: it may change)."""
    if recovery.steps is not None or recovery.minutes is not None:
        return recovery.steps, None
    if recovery.epochs == 0:
        return 0, None
    # A loader without a length is read once to count its batches, because the schedule must know the last step.
    batches = operator.length_hint(task.train) or sum(1 for _ in draw.batches(task.train))
    if batches == 0:
        raise empty_split("train")
    return max(1, round(recovery.epochs * batches)), batches
