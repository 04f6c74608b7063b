"""The course of a run as its listener sees it: where it stands, since when, and how long the rest may take."""

from collections.abc import Callable

from idap.progress import Status


class Course:
    """Follows one run after another; a run lasts as long as its outermost phase.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open = 0
        self._began = clock()
        self.status: Status | None = None
        self._worked = False  # a phase was opened since the last decision
        self._start = self._last = (0.0, 0.0, 0)  # time, way to the target, decisions

    @property
    def running(self) -> bool:
        """Whether any phase is open."""
        return self._open > 0

    def open(self) -> None:
        """A phase begins."""
        if not self.running:
            self._began = self._clock()
        self._open += 1
        self._worked = True

    def close(self) -> None:
        """A phase ends; with the last one the run is over, and forgotten."""
        self._open -= 1
        if not self.running:
            self.status = None

    def show(self, status: Status) -> None:
        """Take in where the run stands."""
        before, self.status = self.status, status
        way = way_to_target(status)
        here = (self._clock(), 0.0 if way is None else way, status.step)
        if before is None:
            self._start = self._last = here
        elif status.step != before.step:
            if not self._worked:  # the decision was recalled, which says nothing about how long one takes
                self._start = here
            self._last, self._worked = here, False

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._began

    def left(self) -> float | None:
        """Estimate the seconds to the target, from the way that was made with the decisions so far.

        What comes after the target, such as a last recovery, is not counted.

        Returns:
            Seconds, at least 0; None where there is no target, before anything was gained, and once it is reached.
        """
        (began, behind, first), (ended, way, last) = self._start, self._last
        if self.status is None or way_to_target(self.status) is None or way <= behind or way >= 1:
            return None
        total = (ended - began) * (1 - way) / (way - behind)
        one = (ended - began) / (last - first)  # a decision that takes longer than usual brings the end no closer
        return max(0.0, total - min(self._clock() - ended, one))


def way_to_target(status: Status) -> float | None:
    """The share of the way to the target that is made, of several the one that is furthest off; None without a target.

    A target that is not below the original is reached from the start.
    """
    wanted = [(now, target) for now, target in status.costs.values() if target is not None]
    return min(((1 - now) / (1 - target) if target < 1 else 1.0 for now, target in wanted), default=None)


def budget_used(status: Status) -> float | None:
    """The share of the budget of the metric that is used, 0 where the metric got better; None where there is none."""
    if status.worst is None or status.worst == status.baseline:
        return None
    return max(0.0, (status.baseline - status.metric) / (status.baseline - status.worst))
