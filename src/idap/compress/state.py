"""One state of a run, and the way from one state to the next: cut, prove, recover, judge."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from idap.compress.budget import Budget, shares_of
from idap.compress.clock import Clock
from idap.compress.config import Config
from idap.compress.features import BlockOutputs
from idap.compress.latencies import block_latencies, gone_nodes, latency_share
from idap.compress.layer_times import LayerTimes
from idap.compress.neighbours import only_training
from idap.cost.count import Cost, CostModel
from idap.cost.table import above_zero
from idap.divergence.criteria import LIKE_PROJECTIONS, WITH_BLOCKS, Criterion, opener_of
from idap.divergence.measure import Divergence, measure_all
from idap.divergence.observe import Pass
from idap.errors import StructureError
from idap.progress import Progress
from idap.rebalance.projections import FittedMap, fit_projections
from idap.rebalance.run import rebalance_
from idap.record import Curve, RunFolder
from idap.structure.analysis import Structure
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from idap.training.batch import Inputs, device_of, merged, move
from idap.training.evaluate import evaluate
from idap.training.fit import fit
from idap.training.loop import FitReport
from idap.training.processes import align_, by_itself, mine, on_main, process_count, together
from idap.training.recovery import Recovery
from idap.training.task import Task

Keep = Mapping[str, tuple[int, ...]]

POINTS = 40
"""Points of a recovery's loss that are kept at most."""


@dataclass(frozen=True)
class State:
    """A model on the way, with what led to it.

    Attributes:
        model: cut and recovered.
        keep: group name -> units it has, for every group.
        removed: branches and blocks that are gone.
        plan: from the original to the model.
        cost: of one sample.
        metric: on the validation data.
        error: largest relative difference from the masked original when it was cut.
        latency: as a share of the original's, measured here; None where it is no goal.
    """

    model: nn.Module
    keep: Keep
    removed: tuple[str, ...]
    plan: Plan
    cost: Cost
    metric: float
    error: float = 0.0
    latency: float | None = None


@dataclass(frozen=True)
class Setting:
    """All that stays the same during a run."""

    original: nn.Module
    task: Task
    config: Config
    structure: Structure
    costs: CostModel
    example: Inputs
    whole: Cost
    """Of the original."""
    budget: Budget
    progress: Progress
    folder: RunFolder | None
    calibration: tuple[Any, ...]
    """The calibration batches: the same ones at every step, so that scores can be compared."""
    timed: Inputs
    """The inputs whose latency counts."""
    layer_times: LayerTimes
    clock: Clock = field(default_factory=Clock)
    curves: list[Curve] = field(default_factory=list)
    """Of the recoveries since the last decision; who notes the decision takes them."""
    optimizer: Callable[[nn.Module, Plan], torch.optim.Optimizer] | None = None
    """Makes the user's optimiser fit for what a plan made of the original; None: recovery describes one."""

    def shares(self, state: State) -> dict[str, float]:
        """What is left of each of the original's costs; latency only where it is a goal."""
        found = shares_of(state.cost, self.whole)
        return found if state.latency is None else {**found, "latency": state.latency}

    def passes(self, batches: Sequence[Any] | None = None) -> list[Pass]:
        """The calibration batches, ready to be run; or other batches."""
        device = device_of(self.original)

        def on(batch: Any) -> Pass:
            padding = self.task.padding(batch)
            return Pass(
                run=lambda model: self.task.run(model, move(batch, device)),
                loss=lambda outputs: self.task.loss(outputs, move(batch, device)),
                padding=None if padding is None else padding.bool(),
            )

        return [on(batch) for batch in (self.calibration if batches is None else batches)]

    def divergence(
        self, state: State, *, units: bool = True, blocks: bool = True, title: str = "measure"
    ) -> Divergence:
        """The divergence of what may still go; of blocks in the relative form if the criterion knows none.

        Of what may become a projection it is what the best one leaves over, E‖y - P(x)‖² / E‖y‖². With such candidates
        all blocks are measured in the relative form, so that they can be compared.

        Args:
            state: what is left.
            units: measure units, which may cost much more than blocks.
            blocks: measure branches and blocks.
            title: what the progress bar is called.
        """
        name, _ = opener_of(self.config.criterion)
        comparable = WITH_BLOCKS if self.config.layers.replacement == "identity" else LIKE_PROJECTIONS
        knows_blocks = name in comparable
        criteria: list[Criterion] = [self.config.criterion] if units or knows_blocks else []
        if blocks and not knows_blocks:
            criteria.append("relative")
        with self.clock.on("measurement"):
            found = self._measured(state, criteria, title)
        own = found.get(name, found.get("relative"))
        assert own is not None
        other = found.get("relative", own)
        scores = dict((own if knows_blocks else other).blocks if blocks else {})
        if blocks:
            fits = self.projections(state, [block.name for block in self.structure.blocks])
            scores |= {part: fitted.residual for part, fitted in fits.items()}
        unmeasured = dict.fromkeys([*own.unmeasured, *(part for part in other.unmeasured if part not in own.units)])
        return Divergence(name, own.units, scores, tuple(unmeasured))

    def projections(self, state: State, names: Iterable[str]) -> dict[str, FittedMap]:
        """The best linear maps in place of those of some blocks that may become projections and are still there."""
        gone = {inner for name in state.removed for inner in (name, *self.structure.block(name).contains)}
        blocks = [self.structure.block(name) for name in names if name not in gone]
        wanted = [block.name for block in blocks if block.projected is not None]
        present = self.structure.presence(state.keep)
        fit_all = partial(
            fit_projections, state.model, self.structure, self.passes(), wanted, present=present, removed=state.removed
        )
        with self.clock.on("measurement"):
            return by_itself(fit_all)  # alike in every process

    def _measured(self, state: State, criteria: Sequence[Criterion], title: str) -> dict[str, Divergence]:
        """Measure by several criteria; every process takes some of the calibration batches if there are enough."""

        def found() -> dict[str, Divergence]:
            return measure_all(
                state.model,
                self.structure,
                self.passes(mine(self.calibration)),
                criteria=criteria,
                keep=state.keep,
                removed=state.removed,
                seed=self.config.seed,
                progress=self.progress,
                title=title,
            )

        if len(self.calibration) < process_count():
            return on_main(lambda: by_itself(found))
        with together():
            return found()

    @property
    def counted(self) -> str:
        """What a part is divided by: "macs", "parameters" or "latency"."""
        if self.config.cost != "auto":
            return self.config.cost
        targets = {"parameters" if name == "size" else name for name, share in self.config.targets.items() if share}
        return targets.pop() if len(targets) == 1 else "macs"

    def unit_costs(self, state: State) -> dict[str, float]:
        """What the next unit of each group costs, in what is counted."""
        if self.counted == "latency":
            with self.clock.on("latency"):
                return self.layer_times.table.unit_seconds(*self._left(state))
        if self.counted == "parameters":
            return self.costs.unit_parameters(state.keep, state.removed)
        return self.costs.unit_macs(state.keep, state.removed)

    def _left(self, state: State) -> tuple[dict[str, int], set[str]]:
        """Number of units of each group, and the nodes that are gone."""
        return {name: len(units) for name, units in state.keep.items()}, gone_nodes(self.structure, state.removed)

    def block_costs(self, state: State, names: Sequence[str]) -> dict[str, float]:
        """What some branches and blocks cost, in what is counted."""
        if self.counted == "latency":
            with self.clock.on("latency"):
                return self._block_seconds(state, names)
        costs = {name: self.costs.cost(state.keep, [*state.removed, name]) for name in names}
        present = self.costs.cost(state.keep, state.removed)
        if self.counted == "parameters":
            return {name: float(present.parameters - cost.parameters) for name, cost in costs.items()}
        return {name: float(present.macs - cost.macs) for name, cost in costs.items()}

    def _block_seconds(self, state: State, names: Sequence[str]) -> dict[str, float]:
        if any(self.structure.block(name).projected for name in names):  # what a projection takes is not in the table
            return block_latencies(self.original, self.structure, self.timed, state.keep, state.removed, names)
        numbers, gone = self._left(state)
        whole = self.layer_times.table.seconds(numbers, gone)
        after = {name: gone | gone_nodes(self.structure, [*state.removed, name]) for name in names}
        return above_zero(
            {name: whole - self.layer_times.table.seconds(numbers, nodes) for name, nodes in after.items()}
        )

    def cut(self, state: State, keep: Keep, removed: Sequence[str]) -> tuple[nn.Module, Plan, float]:
        """Cut a copy of a state's model further, prove the cut, and rebalance what is left.

        Projections that stand in for blocks which the state still has are fitted to these. Where nothing is trained
        between the cuts, each of them begins with the original anew: corrections of corrected weights lose more than
        one correction does (docs/results.md).

        Returns:
            The model, the plan from the original, and the largest relative difference from the masked original.

        Raises:
            VerificationError: the cut model is not the masked original; the state is as it was.
            StructureError: a block that should become a projection can't be seen while the model runs.
        """
        if not self.config.recovery.trains:
            state = self.untouched()
        with self.clock.on("cut"):
            plan = self.structure.plan(keep, tuple(removed))
            new = [path for path in plan.projections if path not in state.plan.projections]
            maps = {path: fitted.map for path, fitted in self.projections(state, new).items()}
            if len(maps) < len(new):
                missing = min(set(new) - set(maps))
                raise StructureError(f"block {missing!r} can't be seen while the model runs, so no projection fits it")
            model = apply_plan(state.model, plan.since(state.plan), maps)
        with self.clock.on("proof"):
            proof = verify(self.structure, state.model, model, plan, self.example, since=state.plan, maps=maps)
        if self.config.rebalance:
            at_once = merged(self.calibration)
            passes = self.passes([at_once]) if at_once is not None else self.passes()
            settings = self.config.rebalance
            with self.clock.on("rebalance"):
                rebalance_(model, self.original, self.structure, plan, passes, settings, progress=self.progress)
            align_(model)
        return model, plan, proof.error

    def untouched(self, metric: float = math.nan) -> State:
        """The original as a state.

        Args:
            metric: of it; NaN where nobody asks.
        """
        keep = {group.name: tuple(range(group.size)) for group in self.structure.groups}
        latency = 1.0 if "latency" in self.budget.targets else None
        return State(self.original, keep, (), self.structure.plan(keep), self.whole, metric, latency=latency)

    def next_state(
        self, state: State, keep: Keep, removed: Sequence[str], title: str, *, tuned: frozenset[str] = frozenset()
    ) -> State:
        """Cut a copy of a state's model further, prove the cut, rebalance it, let it recover, and judge it.

        Args:
            state: where to start; it is not changed.
            keep: group name -> units that stay.
            removed: branches and blocks that are gone then.
            title: of the recovery, for the progress.
            tuned: names of the parameters that recover; empty: all.

        Raises:
            VerificationError: the cut model is not the masked original; the state is as it was.
        """
        model, plan, error = self.cut(state, keep, removed)
        with only_training(model, tuned) if tuned else nullcontext():
            metric = self.recover(model, plan, title, self.config.recovery)
        cost = self.costs.cost(keep, removed)
        return State(model, keep, tuple(removed), plan, cost, metric, max(state.error, error), self.latency_of(model))

    def latency_of(self, model: nn.Module) -> float | None:
        """The latency of a model as a share of the original's, measured now; None where it is no goal."""
        if "latency" not in self.budget.targets:
            return None
        with self.clock.on("latency"):
            return latency_share(self.original, model, self.timed)

    def recover(self, model: nn.Module, plan: Plan, title: str, recovery: Recovery) -> float:
        """Train what a plan made of the original beside it, keep its best state, and judge it on the validation data.

        Returns:
            The metric.
        """
        sign = 1.0 if self.task.higher_is_better else -1.0

        def judge(judged: nn.Module) -> float:
            with self.clock.on("judging"):
                return sign * evaluate(judged, self.task)

        if not recovery.trains:
            return sign * judge(model)
        features = BlockOutputs(self.structure, plan, model, self.original) if recovery.features > 0 else None
        if features is not None and not len(features):
            recovery = replace(recovery, features=0.0)  # no block is left
        with self.clock.on("recovery"):
            report = fit(
                model,
                self.task,
                recovery,
                teacher=self.original,
                features=features,
                optimizer=None if self.optimizer is None else self.optimizer(model, plan),
                judge=judge,
                salvage=True,
                progress=self.progress,
                title=title,
            )
        self.curves.append(_curve(title, report, sign))
        if report.diverged:
            self.progress.say(f"{title} ended early, and the best state before that is kept: {report.diverged}")
        assert report.best is not None  # there was a judge
        return sign * report.best


def _curve(title: str, report: FitReport, sign: float) -> Curve:
    """What is kept of a training: its losses as means over equal stretches, and the metric whenever it was judged."""
    losses = report.curve
    count = min(len(losses), POINTS)
    edges = [index * len(losses) // count for index in range(count + 1)] if count else []
    return Curve(
        title=title,
        steps=report.steps,
        losses=tuple(statistics.fmean(losses[start:end]) for start, end in pairwise(edges)),
        metrics=tuple((steps, sign * score) for steps, score in report.scores),
        diverged=report.diverged,
    )
