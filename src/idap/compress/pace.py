"""How far each step of stage 1 goes."""

from idap.compress.budget import Budget, Shares
from idap.compress.config import FilterStage
from idap.selection.schedule import step_share


class Pace:
    """Says how far the next step goes, and halves it after a rejection.

    Args:
        stage: settings of stage 1.
        goal: targets of the stage.
    """

    def __init__(self, stage: FilterStage, goal: Budget) -> None:
        self._stage, self._goal = stage, goal
        self._factor = 1.0
        self.step = 0

    def next(self, shares: Shares) -> tuple[Budget, float]:
        """What the next step aims at.

        Args:
            shares: of the original's costs that are left.

        Returns:
            The targets of the step, and the share of the units that may go at most.
        """
        if self._stage.schedule == "growing":
            return self._goal, self._units()
        return self._goal.part_way(shares, self._part()), 1.0

    def accept(self) -> None:
        """The step was kept."""
        self.step += 1

    def reject(self, shares: Shares, taken: int, units: int) -> str:
        """The step was rolled back: halve what is tried next.

        Args:
            shares: of the original's costs that are left.
            taken: units that the rejected step took; its goal may have asked for less than it might take.
            units: that there are.

        Returns:
            What is tried next; "" if it would be too little to be worth trying.
        """
        if self._stage.schedule == "growing":
            self._factor *= min(1.0, taken / max(1, round(self._units() * units))) / 2
            smaller = self._units()
        else:
            self._factor /= 2
            smaller = self._part() * max(shares[name] - end for name, end in self._goal.targets.items())
        of = "the units" if self._stage.schedule == "growing" else "the cost"
        return "" if smaller < self._stage.min_share else f"{smaller:.1%} of {of}"

    def _units(self) -> float:
        return self._factor * step_share(self._stage.first_share, self.step, self._stage.steps, self._stage.growth)

    def _part(self) -> float:
        steps_left = 1 if self._stage.schedule == "one-shot" else max(1, self._stage.steps - self.step)
        return self._factor / steps_left
