"""The goals and settings of a compression."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from idap.divergence.criteria import CRITERIA, LIKE_PROJECTIONS, WITH_BLOCKS, opener_of
from idap.errors import BudgetError, ConfigError, check_kinds
from idap.rebalance.run import Rebalance
from idap.structure.projections import Replacement
from idap.training.recovery import Recovery

GOALS = ("macs", "parameters", "size", "latency")
"""Costs that may have a target."""


MOST_GROWTH = 100
"""Largest alpha: with more, every step but the first would remove all that may be removed."""


@dataclass(frozen=True, kw_only=True)
class FilterStage:
    """Stage 1, filters: which share of the units each step removes (docs/method.md#filters).

    Args:
        schedule: "growing" removes a growing share of the remaining units in each step; "even" reaches the targets in
            T steps of equal cost; "one-shot" reaches them in one, in a fraction of the time. All of them halve a step
            that is rolled back.
        streams: "keep" keeps all channels of residual streams, "cut" ranks them with the other units; "auto" tries
            both at each step, down to the same cost, and takes the one with the lower calibration loss.
        steps: T, the largest number of accepted steps.
        first_share: rho_0, share of the remaining units that the first step removes, in (0, 1).
        growth: alpha; step t removes rho_0 (1 + t/T)^alpha.
        min_share: a step that was rolled back is halved until it would remove less than this share of the units; with
            "even" and "one-shot", less than this share of the original's cost.
        min_keep: share of each group that is always kept, in (0, 1].
        keep: the same for some groups only, by name or pattern, such as ``{"layer1.*": 0.5}``; the last one that
            matches counts.
        multiple: the number of units left of each group that is cut, except heads, is a multiple of this (8, 16 or 32
            suit the hardware), whatever ends the run: units are removed in bundles, down to the next multiple, and at
            least one bundle in each step. A group that is not cut keeps its size, and so does one that is not larger
            than the multiple. Floors are rounded up to it. With 1 and a goal of latency, the latency steps found on
            the device are the multiples, where that loses less.
        multiples: the same for some groups only, by name or pattern; heads may be named too.
        alike: which groups end with the same number of units, so that a configuration with one number for all layers
            can describe them: "layers", groups of one kind and size at the same place of repeated layers; "model", all
            groups of one kind and size; "none". Such groups lose one unit each at a time, ranked by the mean score.

    Raises:
        ConfigError: a setting is out of range.
    """

    schedule: Literal["growing", "even", "one-shot"] = "growing"
    streams: Literal["auto", "cut", "keep"] = "auto"
    steps: int = 10
    first_share: float = 0.1
    growth: float = 1.5
    min_share: float = 0.01
    min_keep: float = 0.1
    keep: Mapping[str, float] = field(default_factory=dict)
    multiple: int = 1
    multiples: Mapping[str, int] = field(default_factory=dict)
    alike: Literal["none", "layers", "model"] = "none"

    def __post_init__(self) -> None:
        check_kinds(self, prefix="filters.")
        _one_of("filters.streams", self.streams, ("auto", "cut", "keep"))
        _one_of("filters.schedule", self.schedule, ("growing", "even", "one-shot"))
        _one_of("filters.alike", self.alike, ("none", "layers", "model"))
        _at_least("filters.multiple", self.multiple, 1)
        for pattern, share in self.keep.items():
            _between(f"filters.keep[{pattern!r}]", share, 0, 1, closed=True, open_low=False)
        for pattern, multiple in self.multiples.items():
            _at_least(f"filters.multiples[{pattern!r}]", multiple, 1)
        _between("filters.first_share", self.first_share, 0, 1)
        _between("filters.min_share", self.min_share, 0, 1)
        _between("filters.min_keep", self.min_keep, 0, 1, closed=True)
        _at_least("filters.steps", self.steps, 0, whole=True)
        _at_least("filters.growth", self.growth, 0)
        if self.growth > MOST_GROWTH:
            raise ConfigError(f"filters.growth must be at most {MOST_GROWTH}, found {self.growth:g}.")


@dataclass(frozen=True, kw_only=True)
class LayerStage:
    """Stage 2, layers: how many branches and blocks may be removed (docs/method.md#layers).

    Args:
        removals: the largest number of branches and blocks that are removed.
        short_list: how many of those with the lowest divergence are tried on calibration data before one is chosen.
        patience: stop after so many steps in a row were rolled back.
        replacement: what replaces a removed branch or block. "identity": the stream passes unchanged, so only branches
            and blocks whose input and output agree in shape can be removed. "auto": where they don't agree, a
            projection, that is a linear map of the channels, fitted by least squares on calibration data and then
            trained. "projection": such a map for every whole block that is removed.
        parts: "all", or "blocks": whole blocks only, never a single branch of one. A configuration of transformers
            can say how many layers there are, but not that one of them lacks its attention.
        against: what a layer is compared with before it is removed, if costs have targets and stage 1 comes first.
            "filters": filters that save as much, or that reach the targets; if they lose less on calibration data,
            stage 2 ends, and resumes only if filters then fail to reach the targets. "nothing": no comparison, which
            makes a network faster than its multiply-adds say. If the budget ended stage 1, nothing is compared.
        tune: which weights are trained after a removal: "all", or "neighbours", those of the layers next to the
            removed part.

    Raises:
        ConfigError: a setting is out of range.
    """

    removals: int = 5
    short_list: int = 3
    patience: int = 3
    replacement: Replacement = "identity"
    parts: Literal["all", "blocks"] = "all"
    against: Literal["filters", "nothing"] = "filters"
    tune: Literal["all", "neighbours"] = "all"

    def __post_init__(self) -> None:
        _at_least("layers.removals", self.removals, 0, whole=True)
        _at_least("layers.short_list", self.short_list, 1, whole=True)
        _at_least("layers.patience", self.patience, 1, whole=True)
        _one_of("layers.replacement", self.replacement, get_args(Replacement))
        _one_of("layers.parts", self.parts, ("all", "blocks"))
        _one_of("layers.against", self.against, ("filters", "nothing"))
        _one_of("layers.tune", self.tune, ("all", "neighbours"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Goals and settings of one compression.

    Args:
        max_drop: largest loss of the validation metric, in the metric's own units (0.01 is one point of accuracy), at
            least 0; "auto": 0.01, unless one of the next two is set; None: no such bound. Without any of the three
            bounds the metric is reported but limits nothing.
        max_relative_drop: the same as a share of the original's metric: 0.01 lets a perplexity of 20 rise to 20.2.
        worst_metric: the same as a value: 0.9 allows no accuracy below it. The tightest of the three counts.
        macs: target, as a share of the original's multiply-adds, in (0, 1); None: as small as the budget allows.
        parameters: target, as a share of the original's parameters, likewise.
        size: target, as a share of the bytes of all tensors in the saved file, likewise.
        latency: target, as a share of the original's latency as measured on this machine, likewise.
        latency_batch: samples in the batch whose latency is measured, at least 1.
        order: "filters-layers" is stage 1, then stage 2; "layers-filters" the reverse; "interleaved" ranks units,
            branches and blocks together, by a criterion that scores all of them.
        criterion: what ranks units: a name (`idap.divergence.criteria.CRITERIA`), or a function of a `Scene`. Where it
            scores no branches and blocks, stage 2 uses "relative".
        ranking: "global" compares the units of all groups; "uniform" removes the same share of each group.
        cost: the cost that a score is divided by: "macs", "parameters", "latency" (measured on this machine), or
            "auto": the one that the goals count if they count only one of these, else multiply-adds.
        cost_power: p in score / cost^p, in [0, 1]; None: the power that suits the criterion, and also 1 if latency is
            counted; "auto" tries 0, 0.5 and 1. If several are tried, each step takes the one with the lowest
            calibration loss at the same cost.
        rebalance: what is corrected in closed form after a cut; None: nothing is corrected.
        filters: stage 1.
        layers: stage 2.
        filters_share: share of the way to the targets that stage 1 goes, in [0, 1], if it comes first; the rest is for
            stage 2, and what stage 2 leaves over is for a second round of stage 1. If stage 2 comes first, it goes the
            other share of the way.
        recovery: training after each change.
        final: training of the final model; None: as `recovery` says.
        contracts: outputs whose shape must not change, such as ``logits``; None: all that the model returns. Others,
            such as hidden states, may shrink.
        swap: rewrite the code of a module if its own code can't run at the sizes of a cut; False: groups that would
            need this stay whole.
        freeze_unknown: leave whole what an operator without a rule touches; False: the model is refused, and the
            message names the operator.
        calibration_batches: batches on which divergence is measured, at least 1.
        seed: of everything that is random.

    Raises:
        BudgetError: a goal is impossible.
        ConfigError: a setting is out of range.
    """

    max_drop: float | Literal["auto"] | None = "auto"
    max_relative_drop: float | None = None
    worst_metric: float | None = None
    macs: float | None = None
    parameters: float | None = None
    size: float | None = None
    latency: float | None = None
    latency_batch: int = 1
    order: Literal["filters-layers", "layers-filters", "interleaved"] = "filters-layers"
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
    freeze_unknown: bool = False
    calibration_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, value in (("max_drop", self.drop), ("max_relative_drop", self.max_relative_drop)):
            if value is not None and not 0 <= value < math.inf:
                raise BudgetError(
                    f"{name} must be at least 0 and finite, found {value}; 0.01 allows one point or percent."
                )
        if self.worst_metric is not None and not math.isfinite(self.worst_metric):
            raise BudgetError(f"worst_metric must be a finite number, found {self.worst_metric}.")
        for name in GOALS:
            self._check_share(name)
        bounds = (self.drop, self.max_relative_drop, self.worst_metric)
        if all(value is None for value in (*bounds, *self.targets.values())):
            raise BudgetError(
                "there is no goal: set max_drop (how much worse the metric may get), or a target such as macs or "
                "parameters."
            )
        opener_of(self.criterion)
        _one_of("ranking", self.ranking, ("global", "uniform"))
        _one_of("cost", self.cost, ("auto", "macs", "parameters", "latency"))
        _one_of("order", self.order, ("filters-layers", "layers-filters", "interleaved"))
        if isinstance(self.cost_power, str):
            _one_of("cost_power", self.cost_power, ("auto",))
        elif self.cost_power is not None:
            _between("cost_power", self.cost_power, 0, 1, closed=True, open_low=False)
        _between("filters_share", self.filters_share, 0, 1, closed=True, open_low=False)
        _at_least("calibration_batches", self.calibration_batches, 1, whole=True)
        _at_least("latency_batch", self.latency_batch, 1, whole=True)
        _between("seed", self.seed, 0, 2**63, open_low=False)
        self._check_stages()

    @property
    def drop(self) -> float | None:
        """The loss of the metric that `max_drop` allows, in the metric's units; None if it sets no bound."""
        if self.max_drop != "auto":
            return self.max_drop
        return 0.01 if self.max_relative_drop is None and self.worst_metric is None else None

    def _check_kinds(self) -> None:
        for name in ("max_drop", "max_relative_drop", "worst_metric", *GOALS):
            value = getattr(self, name)
            if value is not None and not (name == "max_drop" and value == "auto"):
                _number(name, value)
        kinds = {"filters": FilterStage, "layers": LayerStage, "recovery": Recovery, "final": Recovery}
        for name, kind in (kinds | {"rebalance": Rebalance}).items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name not in ("final", "rebalance")):
                raise ConfigError(f"{name} must be an idap.{kind.__name__}(...), found {value!r}.")
        if isinstance(self.contracts, str):
            raise ConfigError(
                f"contracts must be several names, found {self.contracts!r}; write ({self.contracts!r},)."
            )
        check_kinds(self, only=("swap", "freeze_unknown", "seed", "contracts"))

    def _check_stages(self) -> None:
        if self.filters.steps == 0 and self.layers.removals == 0:
            raise ConfigError("filters.steps and layers.removals are both 0, so nothing could be removed.")
        if self.filters.schedule != "growing" and not any(self.targets.values()):
            raise ConfigError(
                f"filters.schedule={self.filters.schedule!r} needs a target, and there is none: set macs, "
                'parameters, size or latency, or take "growing".'
            )
        if self.order == "interleaved":
            name, opener = opener_of(self.criterion)
            if CRITERIA.get(name) is opener and name not in WITH_BLOCKS:  # others are checked when they score
                raise ConfigError(
                    f"order='interleaved' compares units with blocks, and criterion {name!r} scores no blocks; take "
                    f"one of {', '.join(map(repr, WITH_BLOCKS))}."
                )
            if self.layers.replacement != "identity" and name not in LIKE_PROJECTIONS:
                raise ConfigError(
                    f"order='interleaved' with layers.replacement={self.layers.replacement!r} compares units with "
                    f"projections, which score as criterion {' or '.join(map(repr, LIKE_PROJECTIONS))} does, not as "
                    f"{name!r}; take one of these."
                )
            if self.ranking != "global":
                raise ConfigError("order='interleaved' is one ranking over everything: it needs ranking='global'.")

    @property
    def targets(self) -> dict[str, float | None]:
        """The target of each cost."""
        return {name: getattr(self, name) for name in GOALS}

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
        name, opener = opener_of(self.criterion)
        return (1.0 if CRITERIA.get(name) is opener and name in PER_COST else 0.0,)


def check_config(config: Config | None) -> Config:
    """The settings of a run, or the defaults if none are given.

    Raises:
        ConfigError: `config` is not a `Config`.
    """
    if config is None:
        return Config()
    if not isinstance(config, Config):
        raise ConfigError(f"config must be an idap.Config(...), found {config!r:.60}.")
    return config


PER_COST = ("paper", "share", "activation", "taylor", "fisher", "bn_scale", "fpgm")
"""Criteria that rank better per cost (docs/results.md#criteria)."""


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, allowed))}, found {value!r}.")


def _number(name: str, value: object, *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ConfigError(f"{name} must be a {'whole ' if whole else ''}number, found {value!r}.")


def _between(name: str, value: float, low: float, high: float, *, closed: bool = False, open_low: bool = True) -> None:
    _number(name, value)
    above = value > low if open_low else value >= low
    below = value <= high if closed else value < high
    if not (above and below):
        left, right = "(" if open_low else "[", "]" if closed else ")"
        raise ConfigError(f"{name} must lie in {left}{low:g}, {high:g}{right}, found {value}.")


def _at_least(name: str, value: float, low: float, *, whole: bool = False) -> None:
    _number(name, value, whole=whole)
    if not value >= low:
        raise ConfigError(f"{name} must be at least {low:g}, found {value}.")
