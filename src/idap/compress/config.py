"""What a compression may cost and how it goes about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from idap.divergence.criteria import opener_of
from idap.errors import BudgetError, ConfigError
from idap.rebalance.run import Rebalance
from idap.training.fit import Recovery


@dataclass(frozen=True, kw_only=True)
class FilterStage:
    """Stage 1, filters: which share of the units goes in each step (method.md 3.1).

    Args:
        steps: T, the number of accepted steps at most.
        first_share: rho_0, share of the remaining units that the first step removes, in (0, 1).
        growth: alpha; step t removes rho_0 (1 + t/T)^alpha.
        min_share: a step that was rejected is halved until it would remove less than this share of the units.
        min_keep: share of each group that always stays, in (0, 1].
        keep: the same for some groups only, by name or pattern, such as ``{"layer1.*": 0.5}``; the last one that
            matches counts.
        multiple: in the end, the number of units left of each group is a multiple of this where that is possible
            (8, 16 or 32 suit the hardware); groups no larger stay whole.
        multiples: the same for some groups only, by name or pattern.

    Raises:
        ConfigError: a setting is out of range.
    """

    steps: int = 10
    first_share: float = 0.1
    growth: float = 1.5
    min_share: float = 0.01
    min_keep: float = 0.1
    keep: Mapping[str, float] = field(default_factory=dict)
    multiple: int = 1
    multiples: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least("filters.multiple", self.multiple, 1)
        for pattern, share in self.keep.items():
            _between(f"filters.keep[{pattern!r}]", share, 0, 1, closed=True, open_low=False)
        for pattern, multiple in self.multiples.items():
            _at_least(f"filters.multiples[{pattern!r}]", multiple, 1)
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
        criterion: what ranks units: a name (`idap.divergence.criteria.CRITERIA`), or a function of a `Scene`. Where it
            knows no branches and blocks, stage 2 takes "relative".
        ranking: "global" compares the units of all groups; "uniform" takes the same share of each.
        cost: what a unit is divided by: "macs", "parameters", "latency" (measured here, on this machine), or "auto":
            parameters where only parameters are a goal, else multiply-adds.
        cost_power: p in score / cost^p, in [0, 1]; None takes what suits the criterion; "auto" tries 0, 0.5 and 1 at
            each step and takes the one with the lowest calibration loss.
        rebalance: what is corrected in closed form after a cut; None corrects nothing.
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
    criterion: str | Callable[..., Any] = "innovation"
    ranking: Literal["global", "uniform"] = "global"
    cost: Literal["auto", "macs", "parameters", "latency"] = "auto"
    cost_power: float | Literal["auto"] | None = None
    rebalance: Rebalance | None = field(default_factory=Rebalance)
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
        opener_of(self.criterion)
        _one_of("ranking", self.ranking, ("global", "uniform"))
        _one_of("cost", self.cost, ("auto", "macs", "parameters", "latency"))
        if isinstance(self.cost_power, str):
            _one_of("cost_power", self.cost_power, ("auto",))
        elif self.cost_power is not None:
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
    def powers(self) -> tuple[float, ...]:
        """The p in score / cost^p that are tried."""
        if isinstance(self.cost_power, str):
            return (0.0, 0.5, 1.0)
        if self.cost_power is not None:
            return (self.cost_power,)
        return (1.0 if self.criterion in PER_COST else 0.0,)


PER_COST = ("paper", "share", "taylor", "fisher")
"""Criteria that rank better per cost (docs/results.md)."""


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, allowed))}, found {value!r}.")


def _between(name: str, value: float, low: float, high: float, *, closed: bool = False, open_low: bool = True) -> None:
    above = value > low if open_low else value >= low
    below = value <= high if closed else value < high
    if not (above and below):
        left, right = "(" if open_low else "[", "]" if closed else ")"
        raise ConfigError(f"{name} must lie in {left}{low:g}, {high:g}{right}, found {value}.")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name} must be at least {low:g}, found {value}.")
