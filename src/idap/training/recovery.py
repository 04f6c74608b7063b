"""The settings of a training, and the pace that follows them: steps, time and learning rate."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from idap.errors import ConfigError, check_kinds
from idap.training.processes import from_main


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How to train.

    Args:
        epochs: passes over the training batches; a fraction ends within a pass, 0 trains nothing.
        steps: optimiser steps instead of epochs; also for a loader whose passes differ in length or never end.
        minutes: wall-clock time instead of epochs, validation included; at least one step is taken. The result depends
            on the speed of the machine.
        optimizer: 'sgd' or 'adamw'.
        lr: the highest learning rate.
        momentum: momentum of SGD, or the first beta of AdamW.
        weight_decay: for parameters with two or more dimensions; biases and norms are never decayed.
        warmup: share of the training during which the learning rate rises, in [0, 1); then it falls to 0 as a cosine.
        temperature: softens the logits for distillation, above 0.
        distil: weight of the distillation loss in [0, 1], used only with a teacher; the task's loss has the rest.
        features: weight of the distance to the teacher's features, at least 0; see `idap.training.distill`.
        clip_norm: the largest gradient norm, above 0; None: gradients are not clipped.
        precision: 'float32' keeps the model's own precision; 'bf16' computes the forward pass in bfloat16 where that is
            accurate enough (autocast), and keeps weights and losses in float32; 'auto' does so on a GPU that supports
            bfloat16. A CPU without instructions for it takes several times longer.
        channels_last: store the weights of convolutions in channels-last memory format during training, which is
            faster; 'auto' does so if the model has 2-d convolutions and runs in this format, and would not trigger a
            known fault of the CPU's library.
        compile: compile the model with `torch.compile` during training; not together with `features`.
        average: evaluate the average of the weights before and after training as well, and keep it if it is better:
            after a small cut, the noise of a short training can do more harm than the cut. This takes one more
            evaluation on the validation data, and memory for the untrained weights.
        norm_batches: number of training batches on which the statistics of batch norms are re-estimated at the end; the
            new statistics are kept if the validation is no worse. 0: training's own statistics stay.
        seed: seed of torch's random state during training.

    Raises:
        ConfigError: a setting is out of range, or two exclude each other.
    """

    epochs: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    temperature: float = 4.0
    distil: float = 0.5
    features: float = 0.0
    clip_norm: float | None = 5.0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    compile: bool = False
    average: bool = True
    norm_batches: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        check_kinds(self, word="got")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed must fit into 64 bits, got {self.seed}.")
        for name in ("epochs", "steps", "minutes", "weight_decay", "features", "norm_batches"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be 0 or more and finite, got {value}.")
        for name in ("lr", "temperature", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite, got {value}.")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.distil <= 1:
            raise ConfigError(f"distil must be in [0, 1], got {self.distil}.")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError(f"steps={self.steps} and minutes={self.minutes:g} are both given; give only one of them.")
        if self.compile and self.features > 0:
            raise ConfigError("compile and features exclude each other: compiled code hides features. Leave out one.")

    def _check_choices(self) -> None:
        for name, allowed in (("optimizer", ("sgd", "adamw")), ("precision", ("auto", "float32", "bf16"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be {_join_choices(allowed)}, got {getattr(self, name)!r}.")
        if self.channels_last not in ("auto", True, False):
            raise ConfigError(f"channels_last must be 'auto', True or False, got {self.channels_last!r}.")

    @property
    def trains(self) -> bool:
        """Whether the settings ask for any step."""
        if self.steps is not None:
            return self.steps > 0
        return (self.epochs if self.minutes is None else self.minutes) > 0


def _join_choices(allowed: tuple[str, ...]) -> str:
    *first, last = map(repr, allowed)
    return f"{', '.join(first)} or {last}"


TICKS = 1000
"""A training whose length is set in minutes follows a schedule of this many steps."""


class Pace:
    """Counts the steps of one training, and decides when it is over.

    Args:
        steps: number of steps; None: `seconds` ends the training.
        seconds: duration of the training, which has at least one step.
        clock: returns the time in seconds.
    """

    def __init__(
        self, *, steps: int | None = None, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps, self._seconds, self._clock = steps, seconds, clock
        self._begun = clock()
        self._tick = 0
        self.done = 0

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        if self.steps is not None:
            return self.done >= self.steps
        return self.done > 0 and self._tick >= TICKS

    def advance(self) -> None:
        """Count one step. With several processes, the clock of process 0 counts."""
        self.done += 1
        if self._seconds is not None:
            elapsed = from_main((self._clock() - self._begun) / self._seconds if self._seconds else 1.0)
            self._tick = min(TICKS, int(elapsed * TICKS))

    def learning_rate(self, lr: float, warmup: float) -> float:
        """The learning rate of the next step; see the function `learning_rate`."""
        place, steps = (self.done, self.steps) if self.steps is not None else (min(self._tick, TICKS - 1), TICKS)
        return learning_rate(place, steps, lr=lr, warmup=warmup)

    def __str__(self) -> str:
        return f"step {self.done}" + ("" if self.steps is None else f" of {self.steps}")


def learning_rate(step: int, steps: int, *, lr: float, warmup: float) -> float:
    """Compute the learning rate of one step: a linear rise, then a cosine fall towards 0.

    Args:
        step: number of the step, from 0.
        steps: number of steps of the training.
        lr: the highest learning rate.
        warmup: share of the steps during which the rate rises.

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
