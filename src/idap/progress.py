"""Report the progress of long work to a listener, whatever the listener does with it.

Nothing below `cli/` prints. Work that takes time is given a `Progress`; the default ignores every report.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands.

    Attributes:
        stage: "filters", "layers", "interleaved" or "final".
        step: number of the decision that is being prepared, from 0; it is also the number of decisions taken before.
        accepted: decisions accepted so far.
        profile: mean divergence of the units of each group, in the order of the network; empty before the first
            measurement.
        costs: "MACs", "parameters", ... -> the share of the original's that is left, and the share wanted (None where
            there is no target).
        metric: on the validation data, of the last accepted state.
        metric_name: name of the metric.
        baseline: metric of the original.
        worst: the worst metric allowed; None if every metric is.
        higher_is_better: how to read the metric.
    """

    stage: str
    step: int
    accepted: int
    profile: tuple[float, ...]
    costs: Mapping[str, tuple[float, float | None]]
    metric: float
    metric_name: str
    baseline: float
    worst: float | None
    higher_is_better: bool = True


class Phase(Protocol):
    """One part of the work, made of steps."""

    def advance(self, note: str = "") -> None:
        """Report that one step is done; `note` is shown beside the bar, and may be logged if it is a `measurement`."""


class Progress(Protocol):
    """Listens to the phases, decisions and measurements of a run."""

    def phase(self, title: str, total: int | None) -> AbstractContextManager[Phase]:
        """Open a phase of `total` steps; None: the number is not known."""

    def say(self, line: str) -> None:
        """Report one finished decision as one line of plain text."""

    def show(self, status: Status) -> None:
        """Report where the run stands, after each measurement and each decision.

        The status is shown until the outermost phase ends, so the whole run should be a phase.
        """


_MEASUREMENT = re.compile(r"(\w+) ([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")


def measurement(note: str) -> tuple[str, float] | None:
    """Read a note as a measurement: one word and a number.

    Args:
        note: the note of a step.

    Returns:
        What was measured, and its value; None if the note is not a measurement.

    Example:
        >>> measurement("loss 0.512"), measurement("blocks.0.attn")
        (('loss', 0.512), None)
    """
    found = _MEASUREMENT.fullmatch(note)
    return (found[1], float(found[2])) if found else None


class Silent:
    """A `Progress` that ignores every report."""

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Phase]:
        """Open a phase that is not reported."""
        yield self

    def advance(self, note: str = "") -> None:
        """Ignore one step."""

    def say(self, line: str) -> None:
        """Ignore one line."""

    def show(self, status: Status) -> None:
        """Ignore one status."""
