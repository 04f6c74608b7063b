"""The context of a run, which is the same for all its states, and the measurements of a state."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

from idap.compress.budget import Budget, shares_of
from idap.compress.config import Config
from idap.compress.latency_table import LayerTimes, block_latencies, inactive_nodes, latency_share
from idap.compress.state import Clock, Judgement, State
from idap.cost.count import Cost, CostModel
from idap.cost.latency import positive_seconds
from idap.divergence.criteria import LIKE_PROJECTIONS, WITH_BLOCKS, Criterion, opener_of
from idap.divergence.measure import Divergence, measure_all
from idap.divergence.observe import Pass
from idap.errors import DivergedError, TaskError
from idap.progress import Progress
from idap.rebalance.projections import FittedMap, fit_projections
from idap.record import RunFolder
from idap.steps import Curve
from idap.structure.analysis import Structure
from idap.structure.plan import Plan
from idap.training.batch import Inputs, device_of, move
from idap.training.evaluate import Score, score
from idap.training.processes import call_locally, local_items, on_main, process_count, raise_everywhere
from idap.training.task import Task


@dataclass(frozen=True)
class Subject:
    """The model that a run compresses, and what is known of it and its data."""

    original: nn.Module
    task: Task
    structure: Structure
    costs: CostModel
    example: Inputs
    whole: Cost
    """The cost of the original."""
    calibration: tuple[Any, ...]
    """The calibration batches: the same ones at every step, so that scores can be compared."""
    timed: Inputs
    """The inputs whose latency counts."""
    val: Score | None = None
    """The score of the original. Other models must be judged on as many batches, with NaN on no more of them."""


@dataclass(frozen=True)
class Goals:
    """The goals of a run, and its settings."""

    config: Config
    budget: Budget


@dataclass(frozen=True)
class Services:
    """The services of a run: its listener, its folder, its clocks, and what it keeps from step to step."""

    progress: Progress
    folder: RunFolder | None
    layer_times: LayerTimes
    clock: Clock = field(default_factory=Clock)
    curves: list[Curve] = field(default_factory=list)
    """The curves of the recoveries since the last decision; the journal takes them when it records a decision."""
    optimizer: Callable[[nn.Module, Plan], torch.optim.Optimizer] | None = None
    """Cuts the user's optimiser as a plan cuts the model; None: the optimiser that the recovery describes is used."""
    measured: dict[str, tuple[ReferenceType[State], Divergence]] = field(default_factory=dict)
    """The last divergence by criterion, with its state: a state that has not changed is not measured again."""
    told: set[str] = field(default_factory=set)
    """Lines that are reported only once in a run, and have been."""


@dataclass(frozen=True)
class RunContext:
    """Everything that stays the same during a run."""

    subject: Subject
    goals: Goals
    services: Services

    def tell(self, line: str) -> None:
        """Report a line, unless this run has reported it before."""
        if line not in self.services.told:
            self.services.told.add(line)
            self.services.progress.say(line)

    def shares(self, state: State) -> dict[str, float]:
        """What is left of each of the original's costs; latency only if it is a goal."""
        found = shares_of(state.cost, self.subject.whole)
        return found if state.latency is None else {**found, "latency": state.latency}

    def judge(self, model: nn.Module) -> Judgement:
        """Judge a model on the validation data.

        Raises:
            TaskError: the data are not those that the original was judged on.
        """
        try:
            found = score(model, self.subject.task)
        except DivergedError as error:
            return Judgement(0.0, str(error).rstrip("."))
        first = self.subject.val
        if first is not None and found.batches != first.batches:
            raise TaskError(
                f"the 'val' split gave {found.batches} batches, and {first.batches} when the original was judged. "
                "Metrics on different data can't be compared: make its loader give the same samples every time."
            )
        if found.broken > (0 if first is None else first.broken):
            return Judgement(found.metric, f"outputs hold NaN on {found.broken} of {found.batches} validation batches")
        return Judgement(found.metric)

    def passes(self, batches: Sequence[Any] | None = None) -> list[Pass]:
        """The calibration batches, or other batches, ready to be run."""
        device = device_of(self.subject.original)

        def on(batch: Any) -> Pass:
            padding = self.subject.task.padding(batch)
            return Pass(
                run=lambda model: self.subject.task.run(model, move(batch, device)),
                loss=lambda outputs: self.subject.task.loss(outputs, move(batch, device)),
                padding=None if padding is None else padding.bool(),
            )

        return [on(batch) for batch in (self.subject.calibration if batches is None else batches)]

    def divergence(
        self, state: State, *, units: bool = True, blocks: bool = True, title: str = "measure"
    ) -> Divergence:
        """The divergence of what may still be removed; of blocks in the relative form if the criterion scores none.

        For a block that may become a projection it is the error that the best one leaves, E‖y - P(x)‖² / E‖y‖². If
        there are such blocks, all blocks are measured in the relative form, so that they can be compared.

        Args:
            state: the state that is measured.
            units: measure units, which may cost much more than blocks.
            blocks: measure branches and blocks.
            title: of the progress bar.
        """
        name, _ = opener_of(self.goals.config.criterion)
        comparable = WITH_BLOCKS if self.goals.config.layers.replacement == "identity" else LIKE_PROJECTIONS
        knows_blocks = name in comparable
        criteria: list[Criterion] = [self.goals.config.criterion] if units or knows_blocks else []
        if blocks and not knows_blocks:
            criteria.append("relative")
        with self.services.clock.on("measurement"):
            found = self._once(state, criteria, title)
        own = found.get(name, found.get("relative"))
        assert own is not None
        other = found.get("relative", own)
        scores = dict((own if knows_blocks else other).blocks if blocks else {})
        if blocks:
            fits = self.projections(state, [block.name for block in self.subject.structure.blocks])
            scores |= {part: fitted.residual for part, fitted in fits.items()}
        unmeasured = dict.fromkeys([*own.unmeasured, *(part for part in other.unmeasured if part not in own.units)])
        return Divergence(name, own.units, scores, tuple(unmeasured), own.notes)

    def projections(self, state: State, names: Iterable[str]) -> dict[str, FittedMap]:
        """The best linear map for each of some blocks that may become a projection and is not removed yet."""
        gone = {inner for name in state.removed for inner in (name, *self.subject.structure.block(name).contains)}
        blocks = [self.subject.structure.block(name) for name in names if name not in gone]
        wanted = [block.name for block in blocks if block.projected is not None]
        present = self.subject.structure.presence(state.keep)
        fit_all = partial(
            fit_projections,
            state.model,
            self.subject.structure,
            self.passes(),
            wanted,
            present=present,
            removed=state.removed,
        )
        with self.services.clock.on("measurement"):
            return call_locally(fit_all)  # the same in every process

    def _once(self, state: State, criteria: Sequence[Criterion], title: str) -> dict[str, Divergence]:
        """Measure a state by some criteria, unless it was measured by them before."""
        names = {opener_of(criterion)[0]: criterion for criterion in criteria}
        known = {name: found for name, (of, found) in self.services.measured.items() if name in names and of() is state}
        missing = [names[name] for name in names if name not in known]
        new = self._measure(state, missing, title) if missing else {}
        for note in (note for found in new.values() for note in found.notes):
            self.tell(note)
        self.services.measured.update({name: (ref(state), found) for name, found in new.items()})
        return known | new

    def _measure(self, state: State, criteria: Sequence[Criterion], title: str) -> dict[str, Divergence]:
        """Measure by several criteria; the processes share the calibration batches if there are enough for all."""

        def measure_here() -> dict[str, Divergence]:
            return measure_all(
                state.model,
                self.subject.structure,
                self.passes(local_items(self.subject.calibration)),
                criteria=criteria,
                keep=state.keep,
                removed=state.removed,
                seed=self.goals.config.seed,
                progress=self.services.progress,
                title=title,
            )

        if len(self.subject.calibration) < process_count():
            return on_main(lambda: call_locally(measure_here))
        with raise_everywhere():
            return measure_here()

    @property
    def cost_kind(self) -> str:
        """The cost that a score is divided by: "macs", "parameters" or "latency"."""
        if self.goals.config.cost != "auto":
            return self.goals.config.cost
        targets = {
            "parameters" if name == "size" else name for name, share in self.goals.config.targets.items() if share
        }
        return targets.pop() if len(targets) == 1 else "macs"

    def unit_costs(self, state: State) -> dict[str, float]:
        """The cost of the next unit of each group, of the kind `cost_kind`."""
        if self.cost_kind == "latency":
            with self.services.clock.on("latency"):
                return self.services.layer_times.table.unit_seconds(*self._left(state))
        if self.cost_kind == "parameters":
            return self.subject.costs.unit_parameters(state.keep, state.removed)
        return self.subject.costs.unit_macs(state.keep, state.removed)

    def _left(self, state: State) -> tuple[dict[str, int], set[str]]:
        """Number of units of each group, and the nodes that are not computed any more."""
        return {name: len(units) for name, units in state.keep.items()}, inactive_nodes(
            self.subject.structure, state.removed
        )

    def block_costs(self, state: State, names: Sequence[str]) -> dict[str, float]:
        """The cost of each of some branches and blocks, of the kind `cost_kind`."""
        if self.cost_kind == "latency":
            with self.services.clock.on("latency"):
                return self._block_seconds(state, names)
        costs = {name: self.subject.costs.cost(state.keep, [*state.removed, name]) for name in names}
        present = self.subject.costs.cost(state.keep, state.removed)
        if self.cost_kind == "parameters":
            return {name: float(present.parameters - cost.parameters) for name, cost in costs.items()}
        return {name: float(present.macs - cost.macs) for name, cost in costs.items()}

    def _block_seconds(self, state: State, names: Sequence[str]) -> dict[str, float]:
        if any(self.subject.structure.block(name).projected for name in names):  # the table has no projections
            return block_latencies(
                self.subject.original, self.subject.structure, self.subject.timed, state.keep, state.removed, names
            )
        numbers, gone = self._left(state)
        whole = self.services.layer_times.table.seconds(numbers, gone)
        after = {name: gone | inactive_nodes(self.subject.structure, [*state.removed, name]) for name in names}
        return positive_seconds(
            {name: whole - self.services.layer_times.table.seconds(numbers, nodes) for name, nodes in after.items()}
        )

    def initial_state(self, metric: float = math.nan) -> State:
        """The original as a state.

        Args:
            metric: of the original; NaN if it is not needed.
        """
        keep = {group.name: tuple(range(group.size)) for group in self.subject.structure.groups}
        latency = 1.0 if "latency" in self.goals.budget.targets else None
        return State(
            self.subject.original,
            keep,
            (),
            self.subject.structure.plan(keep),
            self.subject.whole,
            metric,
            latency=latency,
        )

    def latency_of(self, model: nn.Module) -> float | None:
        """The latency of a model as a share of the original's, measured now; None if latency is not a goal."""
        if "latency" not in self.goals.budget.targets:
            return None
        with self.services.clock.on("latency"):
            return latency_share(self.subject.original, model, self.subject.timed)
