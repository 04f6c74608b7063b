"""What a run decided, step by step, and when a goal counts as met."""

from collections.abc import Mapping
from dataclasses import dataclass, field

LATENCY_NOISE = 0.02
"""By how much a last measurement of latency may be above what is wanted, as a share of it, and count as reached."""


def is_met(goal: str, share: float, wanted: float) -> bool:
    """Whether a cost came down to its target; a latency also within what a measurement of it is worth.

    Args:
        goal: name of the cost.
        share: of the original's that is left.
        wanted: the share that may be left.

    Example:
        >>> is_met("macs", 0.505, 0.5), is_met("latency", 0.505, 0.5)
        (False, True)
    """
    return share <= wanted * (1 + (LATENCY_NOISE if goal == "latency" else 0))


def numbers_of(kind: str, count: int) -> str:
    """The name of a kind of units for a number of them.

    >>> numbers_of("heads", 1), numbers_of("head width", 1), numbers_of("channels", 3)
    ('head', 'head width', 'channels')
    """
    return kind.removesuffix("s") if count == 1 else kind


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What one group or block lost in a step.

    Attributes:
        name: of the group, branch or block.
        kind: "channels", "neurons", "heads", "head width", "branch", "block" or "projection" (a
            block that became a linear map).
        units: the units removed, in the original's indices; empty for branches and blocks.
        left: units that the group has left; 0 for branches and blocks.
        divergence: lowest and highest divergence among what was removed.
        scores: of each unit, beside `units`.
        ranks: place of each unit in the ranking of its step, from 0 for the first to go.
        cost: of one more unit of the group when it was ranked: multiply-adds, parameters or seconds, as the run's
            settings say; for a branch or block all that it cost.
    """

    name: str
    kind: str
    units: tuple[int, ...]
    left: int
    divergence: tuple[float, float]
    scores: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How one recovery went.

    Attributes:
        title: of the recovery.
        steps: optimiser steps taken.
        losses: training loss, as means over equal stretches of the steps, in order.
        metrics: (steps taken, validation metric then), from before the first step on.
        diverged: what ended it early; "" if nothing did.
        average: validation metric of the average of the first and the last weights, where that was the best; else None.
    """

    title: str
    steps: int
    losses: tuple[float, ...]
    metrics: tuple[tuple[int, float], ...]
    diverged: str = ""
    average: float | None = None


@dataclass(frozen=True)
class Contest:
    """A layer against filters that save as much; neither was trained.

    Attributes:
        layer: mean loss on the calibration data without the layer; None if it is no finite number.
        filters: the same without the filters; None if filters can't save as much, or leave no finite loss.
    """

    layer: float | None
    filters: float | None

    @property
    def is_lost(self) -> bool:
        """Whether the filters lose less, so that the layer stays."""
        return self.filters is not None and (self.layer is None or self.layer > self.filters)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The record of one decision.

    Attributes:
        index: place in the run, from 0.
        stage: "filters", "layers", "interleaved" or "final".
        removed: what the step removed.
        macs: multiply-adds for one sample after the step.
        parameters: after the step.
        metric: on the validation data, after the step's recovery; of a layer that lost its contest, without one; 0
            where it was no finite number.
        accepted: whether the step was kept; otherwise everything was rolled back.
        reason: why it was kept or not.
        error: largest relative difference between the pruned model and the masked original, before recovery.
        seconds: that the step took.
        shares: what is left of each of the original's costs: "macs", "parameters", "size", and "latency" where it is a
            goal.
        phases: kind of work -> seconds of the step that it took.
        curve: of the step's recovery; None where nothing was trained.
        contest: with filters, where a layer had to beat them.
        fault: why what the step came to can't be used, whatever its metric; "" if it can.
        turn: which call of a stage decided, from 0; each stage may have its turn more than once.
    """

    index: int
    stage: str
    removed: tuple[Removal, ...]
    macs: int
    parameters: int
    metric: float
    accepted: bool
    reason: str
    error: float
    seconds: float
    shares: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    curve: Curve | None = None
    contest: Contest | None = None
    fault: str = ""
    turn: int = 0

    @property
    def is_beaten(self) -> bool:
        """Whether a layer stayed because filters were better, which says nothing about the budget."""
        return self.contest is not None and self.contest.is_lost

    @property
    def is_refused(self) -> bool:
        """Whether it was rolled back for what it did to the metric."""
        return not self.accepted and not self.is_beaten
