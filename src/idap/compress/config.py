"""What a compression may cost and how it goes about it."""

from dataclasses import dataclass, field
from typing import Literal

from idap.errors import BudgetError, ConfigError
from idap.training.fit import Recovery

Criterion = Literal["relative", "paper"]


@dataclass(frozen=True, kw_only=True)
class FilterStage:
    """Stage 1, filters: which share of the units goes in each step (method.md 3.1).

    Args:
        steps: T, the number of accepted steps at most.
        first_share: rho_0, share of the remaining units that the first step removes, in (0, 1).
        growth: alpha; step t removes rho_0 (1 + t/T)^alpha.
        min_share: a step that was rejected is halved until it would remove less than this share of the units.
        min_keep: share of each group that always stays, in (0, 1].

    Raises:
        ConfigError: a setting is out of range.
    """

    steps: int = 10
    first_share: float = 0.1
    growth: float = 1.5
    min_share: float = 0.01
    min_keep: float = 0.1

    def __post_init__(self) -> None:
        _between("filters.first_share", self.first_share, 0, 1)
        _between("filters.min_share", self.min_share, 0, 1)
        _between("filters.min_keep", self.min_keep, 0, 1, closed=True)
        _at_least("filters.steps", self.steps, 0)
        _at_least("filters.growth", self.growth, 0)


@dataclass(frozen=True, kw_only=True)
class LayerStage:
    """Stage 2, layers: how many branches and blocks may go (method.md 3.2).

    Args:
        removals: branches and blocks removed at most.
        short_list: how many of the lowest divergence are tried on calibration data before one is chosen.
        patience: give up after so many rejections in a row.

    Raises:
        ConfigError: a setting is out of range.
    """

    removals: int = 5
    short_list: int = 3
    patience: int = 3

    def __post_init__(self) -> None:
        _at_least("layers.removals", self.removals, 0)
        _at_least("layers.short_list", self.short_list, 1)
        _at_least("layers.patience", self.patience, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Goals and settings of one compression.

    Args:
        max_drop: largest loss of the validation metric, in the metric's own units (0.01 is one point of accuracy), at
            least 0; None: the metric is reported but does not bind.
        macs: target, as a share of the original's multiply-adds, in (0, 1); None: as small as the budget allows.
        parameters: target, as a share of the original's parameters, likewise.
        criterion: "relative" (method.md 2.2) or "paper" (2.1).
        cost_power: p in score / cost^p, in [0, 1]; None takes what suits the criterion (0 for relative, 1 for paper).
        filters: stage 1.
        layers: stage 2.
        filters_share: share of the way to the target that stage 1 goes before stage 2 begins, in [0, 1]; what
            stage 2 leaves over is taken by a second round of stage 1.
        recovery: training after each change.
        final: training of the final model; None trains it as `recovery` says.
        contracts: outputs whose shape must stay, such as ``logits``; None: all that the model returns. Others, such as
            hidden states, may shrink.
        swap: write the code of a module anew where its own code can't come to the sizes of a cut; False leaves whole
            what would need it.
        calibration_batches: batches on which divergence is measured, at least 1.
        seed: of everything that is random.

    Raises:
        BudgetError: a goal is impossible.
        ConfigError: a setting is out of range.
    """

    max_drop: float | None = 0.01
    macs: float | None = None
    parameters: float | None = None
    criterion: Criterion = "relative"
    cost_power: float | None = None
    filters: FilterStage = field(default_factory=FilterStage)
    layers: LayerStage = field(default_factory=LayerStage)
    filters_share: float = 0.7
    recovery: Recovery = field(default_factory=Recovery)
    final: Recovery | None = None
    contracts: tuple[str, ...] | None = None
    swap: bool = True
    calibration_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_drop is not None and not self.max_drop >= 0:
            raise BudgetError(f"max_drop must be at least 0, found {self.max_drop}; 0.01 allows one point of accuracy.")
        for name in ("macs", "parameters"):
            self._check_share(name)
        if self.max_drop is None and self.macs is None and self.parameters is None:
            raise BudgetError(
                "there is no goal: set max_drop (how much worse it may get), macs or parameters (targets)."
            )
        if self.criterion not in ("relative", "paper"):
            raise ConfigError(f"criterion must be 'relative' or 'paper', found {self.criterion!r}.")
        if self.cost_power is not None:
            _between("cost_power", self.cost_power, 0, 1, closed=True, open_low=False)
        _between("filters_share", self.filters_share, 0, 1, closed=True, open_low=False)
        _at_least("calibration_batches", self.calibration_batches, 1)
        if self.filters.steps == 0 and self.layers.removals == 0:
            raise ConfigError("filters.steps and layers.removals are both 0, so nothing could be removed.")

    def _check_share(self, name: str) -> None:
        share = getattr(self, name)
        if share is None:
            return
        if not 0 < share < 1:
            hint = f"; for {share:g} % write {share / 100:g}" if 1 < share < 100 else ""
            raise BudgetError(
                f"{name} is the share of the original that may stay and must lie between 0 and 1, "
                f"found {share:g}{hint}. {name}=0.5 asks for half."
            )

    @property
    def power(self) -> float:
        """P in score / cost^p."""
        if self.cost_power is not None:
            return self.cost_power
        return 1.0 if self.criterion == "paper" else 0.0


def _between(name: str, value: float, low: float, high: float, *, closed: bool = False, open_low: bool = True) -> None:
    above = value > low if open_low else value >= low
    below = value <= high if closed else value < high
    if not (above and below):
        left, right = "(" if open_low else "[", "]" if closed else ")"
        raise ConfigError(f"{name} must lie in {left}{low:g}, {high:g}{right}, found {value}.")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name} must be at least {low:g}, found {value}.")
