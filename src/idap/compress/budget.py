"""The goals of a run in absolute numbers, and whether a state keeps them."""

from dataclasses import dataclass

from idap.compress.config import Config
from idap.cost.count import Cost
from idap.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What must hold.

    Attributes:
        worst: the worst metric allowed, None if any is.
        higher_is_better: how to read the metric.
        macs: multiply-adds per sample wanted at most, None if there is no target.
        parameters: parameters wanted at most, likewise.
    """

    worst: float | None
    higher_is_better: bool
    macs: float | None
    parameters: float | None

    def holds(self, metric: float) -> bool:
        """Whether a metric keeps the accuracy budget."""
        if self.worst is None:
            return True
        return metric >= self.worst if self.higher_is_better else metric <= self.worst

    def reached(self, cost: Cost) -> bool:
        """Whether a cost meets every target; False if there is none, since there is always more to gain."""
        if self.macs is None and self.parameters is None:
            return False
        return self.shortfall(cost) <= 0

    def shortfall(self, cost: Cost) -> float:
        """How far a cost is above the targets, as a share of the worse one; at most 0 when they are met."""
        parts = [
            wanted_ratio
            for wanted, found in ((self.macs, cost.macs), (self.parameters, cost.parameters))
            if wanted is not None
            for wanted_ratio in [found / wanted - 1]
        ]
        return max(parts, default=0.0)

    def part_way(self, start: Cost, share: float) -> "Budget":
        """The same budget with targets that are only `share` of the way from `start` to the real ones."""
        return Budget(
            self.worst,
            self.higher_is_better,
            None if self.macs is None else start.macs - share * (start.macs - self.macs),
            None if self.parameters is None else start.parameters - share * (start.parameters - self.parameters),
        )


def budget_of(config: Config, baseline: float, cost: Cost, *, higher_is_better: bool, least: Cost) -> Budget:
    """The goals of a configuration for one model.

    Args:
        config: with relative goals.
        baseline: metric of the original on the validation data.
        cost: of the original.
        higher_is_better: how to read the metric.
        least: the lowest cost that removing everything removable would leave.

    Raises:
        BudgetError: no compression can meet a target.
    """
    worst = None
    if config.max_drop is not None:
        worst = baseline - config.max_drop if higher_is_better else baseline + config.max_drop
    for name, share, whole, floor in (
        ("macs", config.macs, cost.macs, least.macs),
        ("parameters", config.parameters, cost.parameters, least.parameters),
    ):
        if share is not None and share * whole < floor:
            raise BudgetError(
                f"{name}={share:g} can't be reached: even with everything removable gone, {floor / whole:.1%} of the "
                f"{name} would stay. Ask for {name}={_rounded_up(floor / whole):g} or more, or lower filters.min_keep."
            )
    return Budget(
        worst,
        higher_is_better,
        None if config.macs is None else config.macs * cost.macs,
        None if config.parameters is None else config.parameters * cost.parameters,
    )


def _rounded_up(share: float) -> float:
    return min(0.99, int(share * 100 + 1) / 100)
