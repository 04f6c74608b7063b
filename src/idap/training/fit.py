"""Train a model for a while, alone or beside a teacher, in one process or several, and keep its best state.

A plain loop that never wraps the user's model. Of several processes each computes the gradient of its samples, and the
sum, which is the gradient of the whole batch, moves the same weights everywhere.

In a distributed run (`torch.distributed` initialised) every process is given the same task, with whole batches; each
trains on its share of every batch, and all end with the same weights. The loss is taken for a mean over the samples.
Batch norms see their own process's share, and keep the statistics of process 0.
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


def fit(  # noqa: PLR0913 - one argument for each thing that a caller may bring
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
    its generators (`DataLoader(generator=...)`), and the end is not set in minutes. These states are put back.

    Args:
        model: trained in place, in training mode; every module gets its mode back, gradients are cleared.
        task: gives the training batches, the loss and the logits.
        recovery: how to train.
        teacher: its logits are learned too, with weight `recovery.distil`; stays as it is, on the model's device.
        features: sees what is compared with weight `recovery.features`; needs a teacher.
        optimizer: of the model's parameters, instead of the one that `recovery` describes; the learning rate that each
            of its groups has is the highest one, and is put back at the end.
        judge: scores the model, higher is better, before training and after each epoch, and the average of both ends;
            the best state is kept, the later one of equals, and the average only where it is better.
        salvage: where a loss or gradient is not finite, end there with the judge's best state, and report it.
        progress: told of each step.
        title: what the progress bar is called.

    Returns:
        What was done.

    Raises:
        TaskError: nothing to train or train on, a teacher elsewhere, an epoch of another length, a model that can't be
            compiled, or a loss, gradient or score that is not finite.
        ConfigError: features are wanted and nobody sees them.
    """
    started = time.perf_counter()
    _check_features(recovery, teacher, features)
    with _training(model, teacher, task, seed=recovery.seed) as (draw, lasting):
        steps, batches = _length(task, recovery, draw)
        best = Best(model, judge)
        phase = lasting.enter_context((progress or Silent()).phase(title, steps))
        pace = Pace(steps=steps, seconds=None if recovery.minutes is None else 60 * recovery.minutes)
        loop = Loop(model, task, recovery, pace, phase, optimizer=optimizer)
        loop.learn_from(teacher, features)
        lasting.callback(loop.put_back_rates)
        epoch = partial(loop.epoch, draw, lasting, expected=batches)
        diverged = _train(epoch, best, pace if recovery.trains else None, salvage=salvage and judge is not None)
        if recovery.trains and recovery.average and not diverged:
            best.try_average()
        best.restore()
        if recovery.trains:
            best.try_norms(task, recovery.norm_batches, draw)
        align_(model)  # a model may change buffers while it is judged
    return loop.report(best, time.perf_counter() - started, diverged)


def _train(epoch: Callable[[], None], best: Best, pace: Pace | None, *, salvage: bool) -> str:
    """Train to the end, if there is anything to do; what ended it early."""
    try:
        while pace is not None and not pace.over:
            epoch()
            best.look(pace.done)
    except DivergedError as error:
        if not salvage:
            raise
        return str(error)
    return ""


@contextmanager
def _training(
    model: nn.Module, teacher: nn.Module | None, task: Task, *, seed: int
) -> Iterator[tuple[Draw, ExitStack]]:
    """Fork and seed the random state, set the modes, and put everything back but the weights.

    Gradients are on, whatever the caller switched off around the call.

    Yields:
        What draws batches, and a stack for what lasts as long as the training.
    """
    if teacher is not None:
        _check_teacher(model, teacher)
    teacher_modes = nullcontext() if teacher is None else keep_modes(teacher)
    with (
        torch.enable_grad(),
        seed_loader(task.train, seed),
        teacher_modes,
        keep_modes(model, training=True),
        ExitStack() as lasting,
    ):
        draw = Draw()
        if process_rank() > 0:
            torch.manual_seed(seed + process_rank())  # so that dropout differs
        align_(model)
        try:
            yield draw, lasting
        finally:
            model.zero_grad()


def _check_features(recovery: Recovery, teacher: nn.Module | None, features: Features | None) -> None:
    if recovery.features > 0 and (features is None or teacher is None):
        raise ConfigError(
            f"features={recovery.features:g} compares a model with its teacher from the inside, and this training has "
            "nothing that does so. Set features to 0, or pass both teacher= and features=."
        )


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    if teacher is model:
        raise TaskError("the teacher is the model itself, it would teach nothing. Pass a copy taken before the cut.")
    ours, theirs = device_of(model), device_of(teacher)
    if ours != theirs:
        raise TaskError(f"the teacher is on {theirs}, the model on {ours}. Call teacher.to({str(ours)!r}) first.")


def _length(task: Task, recovery: Recovery, draw: Draw) -> tuple[int | None, int | None]:
    """How many steps there will be, None where the clock says; and batches in an epoch, None where that may change."""
    if recovery.steps is not None or recovery.minutes is not None:
        return recovery.steps, None
    if recovery.epochs == 0:
        return 0, None
    # A loader without a length is read through once, since the schedule must know its end.
    batches = operator.length_hint(task.train) or sum(1 for _ in draw.batches(task.train))
    if batches == 0:
        raise empty_split("train")
    return max(1, round(recovery.epochs * batches)), batches
