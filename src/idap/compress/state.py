"""A state of a run, its judgement on the validation data, and a clock for the kinds of work."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from idap.compress.budget import Budget
from idap.cost.count import Cost
from idap.structure.analysis import Structure
from idap.structure.plan import Plan


class Clock:
    """Adds up seconds by kind of work; work inside other work counts once, as the inner kind.

    Args:
        now: returns the time in seconds.

    Example:
        >>> ticks = iter([0.0, 1.0, 3.0, 7.0, 7.5, 8.0])
        >>> clock = Clock(lambda: next(ticks))
        >>> with clock.on("training"):
        ...     with clock.on("judging"):
        ...         pass
        >>> clock.take()
        {'other': 1.5, 'training': 2.5, 'judging': 4.0}
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since = now()
        self._kinds = ["other"]
        self._seconds: dict[str, float] = {}

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Count what happens inside as `kind`."""
        self._book()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._book()
            self._kinds.pop()

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last call; work of no kind counts as "other"."""
        self._book()
        taken, self._seconds = self._seconds, {}
        return taken

    def _book(self) -> None:
        now = self._now()
        kind = self._kinds[-1]
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._since
        self._since = now


Keep = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class State:
    """A model that a run came to, with the cuts that led to it.

    Attributes:
        model: cut and recovered.
        keep: group name -> units that it has, for every group.
        removed: branches and blocks that are removed.
        plan: from the original to the model.
        cost: of one sample.
        metric: on the validation data.
        error: largest relative difference from the masked original when it was cut.
        latency: as a share of the original's, measured here; None if latency is not a goal.
        fault: why the model can't be used, whatever its metric; "" if it can.
    """

    model: nn.Module
    keep: Keep
    removed: tuple[str, ...]
    plan: Plan
    cost: Cost
    metric: float
    error: float = 0.0
    latency: float | None = None
    fault: str = ""

    def within(self, goal: Budget) -> bool:
        """Whether the model can be used and keeps the accuracy budget."""
        return not self.fault and goal.holds(self.metric)


class Judgement(NamedTuple):
    """The judgement of a model on the validation data.

    Attributes:
        metric: 0 if it is not finite.
        fault: why the model can't be used, whatever its metric; "" if it can.
    """

    metric: float
    fault: str = ""


def merge_removed(structure: Structure, before: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """All removed branches and blocks after some more are removed, without those inside the new ones."""
    inside = {inner for name in new for inner in structure.block(name).contains}
    return tuple(name for name in dict.fromkeys((*before, *new)) if name not in inside)
