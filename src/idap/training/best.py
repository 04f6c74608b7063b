"""Keep the best state of a model; last, try an average of states, and whether batch norms can be estimated better."""

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
        model: judged at once.
        judge: scores it; of several processes the first one's score counts.

    Attributes:
        value: the highest score; None without a judge.
        scores: (steps taken, score then), in the order of judging; the average is left out.
        averaged: whether the best state is the average.
    """

    def __init__(self, model: nn.Module, judge: Judge | None) -> None:
        self._model, self._judge = model, judge
        self._state: Weights = {}
        self.value: float | None = None
        self.scores: list[tuple[int, float]] = []
        self.averaged = False
        self.look(0)
        self._first = self._state

    def look(self, steps: int) -> None:
        """Judge the model as it is now, after so many steps; of equals, the later state is the better one."""
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
        """Judge the average of the first state and that of the model as it is now; it is kept only if it is better.

        The model is left as the average; `restore` brings the best state back.

        The weights and all statistics are averaged. Training from a good state wanders about it, and what is half-way
        back has less of the noise (Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903, who find
        the middle to be good everywhere). Other shares are not tried: choosing among them fits the validation data.
        """
        if self._judge is None or self.value is None:
            return
        middle = {name: _middle(self._first[name], kept) for name, kept in self._model.state_dict().items()}
        self._model.load_state_dict(middle)
        try:
            value = self._score(self._judge)
        except DivergedError:  # between two states far apart, a metric such as the perplexity may not be finite
            return
        if value > self.value:
            self.value, self._state, self.averaged = value, middle, True

    def restore(self) -> None:
        """Bring the model back to its best state."""
        if self._judge is not None:
            self._model.load_state_dict(self._state)

    def try_norms(self, task: Task, batches: int, draw: Draw) -> None:
        """Estimate the batch norms of the best state anew, and keep that if it is no worse; see `reestimate_norms_`."""
        if self._judge is not None and reestimate_norms_(self._model, task, batches, draw):
            with suppress(DivergedError):  # no better, then
                self.look(self.scores[-1][0])
            self.restore()


def _weights(model: nn.Module) -> Weights:
    return {name: _copy(kept) for name, kept in model.state_dict().items()}


def _copy(kept: Any) -> Any:
    return kept.detach().to("cpu", copy=True) if isinstance(kept, Tensor) else copy.deepcopy(kept)


def _middle(first: Any, last: Any) -> Any:
    """The average of two values, on the CPU; what is no floating-point number is a copy of the last one."""
    if not isinstance(last, Tensor) or not last.is_floating_point():
        return _copy(last)
    last = last.detach().cpu()
    return torch.where(first == last, last, torch.lerp(first, last, 0.5))  # infinite values, as in masks, stay


def reestimate_norms_(model: nn.Module, task: Task, batches: int, draw: Draw) -> bool:
    """Estimate the statistics of batch norms anew, as plain averages over training batches, in place.

    Training leaves them behind as averages over weights that have moved on since.

    Args:
        model: run in evaluation mode, but for its batch norms.
        task: gives the training batches.
        batches: how many, at most one pass.
        draw: of the training batches.

    Returns:
        Whether there is a batch norm that keeps statistics.
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
