"""The goals of a run as shares of the original, and the checks that a state meets them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from idap.compress.config import GOALS, Config
from idap.cost.count import Cost
from idap.errors import BudgetError
from idap.steps import is_met
from idap.structure.groups import Blocked, obstacles

Shares = Mapping[str, float]
"""The share that is left of each of the original's costs, by name of the goal."""


@dataclass(frozen=True)
class Budget:
    """The accuracy budget and the targets of a run.

    Attributes:
        worst: the worst metric allowed; None if every metric is.
        higher_is_better: how to read the metric.
        targets: name of a goal -> the share of the original's cost that may be left; empty: as small as possible.
    """

    worst: float | None
    higher_is_better: bool
    targets: Shares = field(default_factory=dict)

    def holds(self, metric: float) -> bool:
        """Whether a metric keeps the accuracy budget."""
        if self.worst is None:
            return True
        return metric >= self.worst if self.higher_is_better else metric <= self.worst

    def is_reached(self, shares: Shares) -> bool:
        """Whether every target is met; False if there are none, since there is always more to gain."""
        return bool(self.targets) and self.shortfall(shares) <= 0

    def shortfall(self, shares: Shares) -> float:
        """The largest excess of a cost over its target, as a share of the target; at most 0 when all are met.

        Args:
            shares: what is left of the costs that are known; targets of others are ignored.
        """
        return max((shares[name] / wanted - 1 for name, wanted in self.targets.items() if name in shares), default=0.0)

    def misses(self, shares: Shares) -> list[str]:
        """Names of the goals that are not met; a latency may lie above its target by the noise of a measurement.

        Args:
            shares: what is left of the costs that are known; targets of others are ignored.
        """
        return [
            name for name, wanted in self.targets.items() if name in shares and not is_met(name, shares[name], wanted)
        ]

    def part_way(self, start: Shares, share: float) -> "Budget":
        """The same budget with targets `share` of the way from `start` to the real ones, but not below these."""
        targets = {name: start[name] - share * (start[name] - end) for name, end in self.targets.items()}
        return replace(
            self, targets={name: max(end, min(start[name], targets[name])) for name, end in self.targets.items()}
        )


def shares_of(cost: Cost, whole: Cost) -> dict[str, float]:
    """The share that is left of each of a model's costs."""
    return {
        "macs": cost.macs / max(1, whole.macs),
        "parameters": cost.parameters / max(1, whole.parameters),
        "size": cost.size / max(1, whole.size),
    }


def budget_of(
    config: Config, baseline: float, *, higher_is_better: bool, least: Shares, blocked: Sequence[Blocked] = ()
) -> Budget:
    """The goals of a configuration for one model.

    Args:
        config: with its goals.
        baseline: metric of the original on the validation data.
        higher_is_better: how to read the metric.
        least: what is left of each cost when all that may be removed is removed.
        blocked: dimensions that can't shrink; the message names some if hardly anything may be removed.

    Raises:
        BudgetError: no compression can meet a target, or the original does not keep the budget itself.
    """
    sign = 1 if higher_is_better else -1
    bounds = [] if config.worst_metric is None else [config.worst_metric]
    if config.drop is not None:
        bounds.append(baseline - sign * config.drop)
    if config.max_relative_drop is not None:
        bounds.append(baseline - sign * config.max_relative_drop * abs(baseline))
    if config.worst_metric is not None and sign * baseline < sign * config.worst_metric:
        raise BudgetError(
            f"the original itself does not keep the budget: its metric on the validation data is {baseline:g}, "
            f"worst_metric allows {config.worst_metric:g}. Train it further, or allow more."
        )
    targets = {name: share for name in GOALS if (share := getattr(config, name)) is not None}
    for name, share in targets.items():
        if share < least[name]:
            raise BudgetError(
                f"{name}={share:g} can't be reached: even with everything removable gone, {least[name]:.1%} of the "
                f"{name} would stay. {_way_out(config, name, least[name])}{_describe_obstacles(blocked, least[name])}"
            )
    return Budget(
        sign * max((sign * bound for bound in bounds), default=0) if bounds else None, higher_is_better, targets
    )


HARDLY = 0.9
"""If a cost can't come below this share, the message names what stands in the way."""


def _describe_obstacles(blocked: Sequence[Blocked], least: float) -> str:
    if least <= HARDLY or not blocked:
        return ""
    lines = "\n".join(f"  {line}" for line in obstacles(blocked, most=3))
    return f" What stands in the way (idap inspect shows all of it):\n{lines}"


def _way_out(config: Config, name: str, least: float) -> str:
    """The advice in the message: a target that can be reached, and the settings that keep it from being lower."""
    filters, layers = config.filters, config.layers
    held = [] if filters.steps else ["let stage 1 take steps (filters.steps is 0)"]
    if filters.steps:
        several = max((filters.multiple, *filters.multiples.values())) > 1
        names = {"keep": bool(filters.keep), "min_keep": True, "multiple": several}
        held.append(f"lower {' or '.join(f'filters.{each}' for each, counts in names.items() if counts)}")
    if not layers.removals:
        held.append("let stage 2 remove layers (layers.removals is 0)")
    ask = int(least * 100 + 1) / 100
    asked = f"Ask for {name}={ask:g} or more, or " if ask < 1 else "Hardly anything may be removed: "
    return f"{asked}{', or '.join(held)}."
