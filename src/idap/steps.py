"""The record of the decisions of a run, and the rule when a goal counts as met."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LATENCY_NOISE = 0.02
"""How far a final measurement of latency may lie above its target and still meet it, as a share of the target."""


def is_met(goal: str, share: float, wanted: float) -> bool:
    """Whether a cost is down to its target; a latency may lie above it by the noise of a measurement.

    Args:
        goal: name of the cost.
        share: what is left of the original's cost.
        wanted: the share that may be left.

    Example:
        >>> is_met("macs", 0.505, 0.5), is_met("latency", 0.505, 0.5)
        (False, True)
    """
    return share <= wanted * (1 + (LATENCY_NOISE if goal == "latency" else 0))


def numbers_of(kind: str, count: int) -> str:
    """The name of a kind of units in the singular or plural that suits a number of them.

    >>> numbers_of("heads", 1), numbers_of("head width", 1), numbers_of("channels", 3)
    ('head', 'head width', 'channels')
    """
    return kind.removesuffix("s") if count == 1 else kind


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What a step removed from one group, or one branch or block that it removed.

    Attributes:
        name: of the group, branch or block.
        kind: "channels", "neurons", "heads", "head width", "branch", "block" or "projection" (a
            block that became a linear map).
        units: the units removed, in the original's indices; empty for branches and blocks.
        left: number of units that the group has left; 0 for branches and blocks.
        divergence: lowest and highest divergence among what was removed.
        scores: the score of each unit, in the order of `units`.
        ranks: place of each unit in the ranking of its step; 0 is removed first.
        cost: of one more unit of the group when it was ranked: multiply-adds, parameters or seconds, as the run's
            settings say; of a branch or block, its whole cost.
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
    """The losses and metrics of one recovery.

    Attributes:
        title: of the recovery.
        steps: optimiser steps taken.
        losses: training loss, as means over equal numbers of steps, in order.
        metrics: (steps taken, validation metric at that moment); the first is from before any step.
        diverged: what ended it early; "" if nothing did.
        average: validation metric of the average of the first and the last weights, if that was the best; else None.
    """

    title: str
    steps: int
    losses: tuple[float, ...]
    metrics: tuple[tuple[int, float], ...]
    diverged: str = ""
    average: float | None = None


@dataclass(frozen=True)
class Contest:
    """A layer compared with filters that save as much; neither cut was trained.

    Attributes:
        layer: mean loss on the calibration data without the layer; None if it is not finite.
        filters: the same without the filters; None if filters can't save as much, or the loss is not finite.
    """

    layer: float | None
    filters: float | None

    @property
    def is_lost(self) -> bool:
        """Whether cutting filters loses less, so that the layer is kept."""
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
        metric: on the validation data, after the step's recovery; without recovery if a layer lost its contest; 0
            if it was not finite.
        accepted: whether the step was accepted; otherwise it was rolled back.
        reason: why it was accepted or rolled back.
        error: largest relative difference between the cut model and the masked original, before recovery.
        seconds: that the step took.
        shares: what is left of each of the original's costs: "macs", "parameters", "size", and "latency" if it is a
            goal.
        phases: kind of work -> seconds of the step that went into it.
        curve: of the step's recovery; None if nothing was trained.
        contest: of a layer with filters; None if they were not compared.
        fault: why the model of the step can't be used, whatever its metric; "" if it can.
        turn: number of the call of a stage that took the decision, from 0; a stage may be called more than once.
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
        """Whether a layer was kept because cutting filters loses less; the budget played no part."""
        return self.contest is not None and self.contest.is_lost

    @property
    def is_refused(self) -> bool:
        """Whether the step was rolled back for its metric or a fault, not because filters were better."""
        return not self.accepted and not self.is_beaten


CHECKSUM = "checksum"
"""Key of the checksum of a line, in that line."""


def seal_line(decision: Mapping[str, Any]) -> dict[str, Any]:
    """A decision, as JSON holds it, with its checksum: a line of steps.jsonl.

    >>> is_intact(seal_line({"index": 0})), is_intact({**seal_line({"index": 0}), "index": 1}), is_intact({"index": 0})
    (True, False, True)
    """
    return {**decision, CHECKSUM: _line_checksum(decision)}


def is_intact(line: Mapping[str, Any]) -> bool:
    """Whether a line of steps.jsonl holds what was written; one without a checksum counts as intact."""
    rest = {key: value for key, value in line.items() if key != CHECKSUM}
    return CHECKSUM not in line or line[CHECKSUM] == _line_checksum(rest)


def _line_checksum(decision: Mapping[str, Any]) -> str:
    text = json.dumps(decision, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
