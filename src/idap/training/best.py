"""Keep the best state of a model during training; at the end, try averaged weights and re-estimated batch norms."""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from idap.errors import DivergedError
from idap.training.batch import device_of, move
from idap.training.evaluate import keep_modes
from idap.training.processes import Draw, align_, from_main
from idap.training.task import Task

Judge = Callable[[nn.Module], float]
"""Scores a model, higher is better."""

Weights = dict[str, Any]
"""A model's state, on the CPU."""


class Best:
    """Keeps the best state of a model so far, on the CPU; does nothing without a judge.

    Args:
        model: its current state is scored at once.
        judge: scores the model; with several processes, the score of process 0 counts.

    Attributes:
        value: the highest score; None without a judge.
        scores: (steps taken, score at that step), in order; the score of the average is not among them.
        averaged: whether the best state is the average.
    """

    def __init__(self, model: nn.Module, judge: Judge | None) -> None:
        self._model, self._judge = model, judge
        self._state: Weights = {}
        self.value: float | None = None
        self.scores: list[tuple[int, float]] = []
        self.averaged = False
        self.consider(0)
        self._first = self._state

    def consider(self, steps: int) -> None:
        """Score the model as it is after a number of steps; of equal scores, the later state is the best."""
        if self._judge is None:
            return
        value = self._score(self._judge)
        self.scores.append((steps, value))
        if self.value is None or value >= self.value:
            self.value, self._state = value, _weights(self._model)

    def _score(self, judge: Judge) -> float:
        with keep_modes(self._model):
            value = from_main(float(judge(self._model)))
        if math.isnan(value):
            raise DivergedError("the judge gave nan; expected a number that is higher for a better model.")
        return value

    def try_average(self) -> None:
        """Score the average of the first and the current state of the model; it is kept only if it is better.

        The model is left in the averaged state; `restore` loads the best state.

        The weights and all statistics are averaged. Training from a good state moves around it at random, and the
        average has less of this noise (Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903, who
        find equal weights to be good everywhere). Other weights are not tried: choosing among them would overfit the
        validation data.
        """
        if self._judge is None or self.value is None:
            return
        middle = {name: _middle(self._first[name], kept) for name, kept in self._model.state_dict().items()}
        self._model.load_state_dict(middle)
        try:
            value = self._score(self._judge)
        except DivergedError:  # half-way between two distant states, a metric such as the perplexity may not be finite
            return
        if value > self.value:
            self.value, self._state, self.averaged = value, middle, True

    def restore(self) -> None:
        """Load the best state into the model."""
        if self._judge is not None:
            self._model.load_state_dict(self._state)

    def try_norms(self, task: Task, batches: int, draw: Draw) -> None:
        """Re-estimate the batch norms of the best state, and keep that if it is no worse; see `reestimate_norms_`."""
        if self._judge is not None and reestimate_norms_(self._model, task, batches, draw):
            with suppress(DivergedError):  # then the best state stays
                self.consider(self.scores[-1][0])
            self.restore()


def _weights(model: nn.Module) -> Weights:
    return {name: _copy(kept) for name, kept in model.state_dict().items()}


def _copy(kept: Any) -> Any:
    return kept.detach().to("cpu", copy=True) if isinstance(kept, Tensor) else copy.deepcopy(kept)


def _middle(first: Any, last: Any) -> Any:
    """The average of two values, on the CPU; for values that are not floating-point, a copy of the last one."""
    if not isinstance(last, Tensor) or not last.is_floating_point():
        return _copy(last)
    last = last.detach().cpu()
    return torch.where(first == last, last, torch.lerp(first, last, 0.5))  # infinite values, as in masks, stay infinite


def reestimate_norms_(model: nn.Module, task: Task, batches: int, draw: Draw) -> bool:
    """Re-estimate the statistics of batch norms, as plain averages over training batches, in place.

    After training, the statistics are averages over passes with weights that have changed since.

    Args:
        model: run in evaluation mode, except for its batch norms.
        task: gives the training batches.
        batches: how many batches are used; at most one pass.
        draw: iterates the training batches.

    Returns:
        Whether the statistics of any batch norm were re-estimated.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms or not batches:
        return False
    momenta = [norm.momentum for norm in norms]
    device = device_of(model)
    try:
        with keep_modes(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average
                norm.train()
            for batch in islice(draw.batches(task.train), batches):
                task.run(model, move(batch, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    align_(model)
    return True
