"""How far a training has come and how fast it learns there, counted in steps or by the clock."""

import math
import time
from collections.abc import Callable

from idap.training.processes import from_main

TICKS = 1000
"""A training that ends by the clock follows the schedule of so many steps."""


class Pace:
    """Counts the steps of one training, and says when it is over.

    Args:
        steps: after which it is over; None: the clock says.
        seconds: after which it is over, but for one step at least.
        clock: gives the time in seconds.
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
        """One step is done. Of several processes the first one's clock counts."""
        self.done += 1
        if self._seconds is not None:
            elapsed = from_main((self._clock() - self._begun) / self._seconds if self._seconds else 1.0)
            self._tick = min(TICKS, int(elapsed * TICKS))

    def learning_rate(self, lr: float, warmup: float) -> float:
        """The learning rate of the next step, see `learning_rate`."""
        place, steps = (self.done, self.steps) if self.steps is not None else (min(self._tick, TICKS - 1), TICKS)
        return learning_rate(place, steps, lr=lr, warmup=warmup)

    def __str__(self) -> str:
        return f"step {self.done}" + ("" if self.steps is None else f" of {self.steps}")


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
