"""One state of a run, and the way from one state to the next: cut, prove, recover, judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from idap.compress.budget import Budget
from idap.compress.config import Config
from idap.compress.latencies import unit_latencies
from idap.cost.count import Cost, CostModel
from idap.divergence.criteria import WITH_BLOCKS, Criterion, opener_of
from idap.divergence.measure import Divergence, measure_all
from idap.divergence.observe import Pass
from idap.progress import Progress
from idap.rebalance.run import rebalance_
from idap.record import RunFolder
from idap.structure.analysis import Structure
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from idap.training.batch import Inputs, device_of, merged, move
from idap.training.evaluate import evaluate
from idap.training.fit import Recovery, fit
from idap.training.task import Task

Keep = Mapping[str, tuple[int, ...]]


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
    """

    model: nn.Module
    keep: Keep
    removed: tuple[str, ...]
    plan: Plan
    cost: Cost
    metric: float
    error: float = 0.0


@dataclass(frozen=True)
class Setting:
    """All that stays the same during a run."""

    original: nn.Module
    task: Task
    config: Config
    structure: Structure
    costs: CostModel
    example: Inputs
    budget: Budget
    progress: Progress
    folder: RunFolder | None
    calibration: tuple[Any, ...]
    """The calibration batches: the same ones at every step, so that scores can be compared."""

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

    def divergence(self, state: State, *, units: bool = True, blocks: bool = True) -> Divergence:
        """The divergence of what may still go; of blocks in the relative form if the criterion knows none.

        Args:
            state: what is left.
            units: measure units, which may cost much more than blocks.
            blocks: measure branches and blocks.
        """
        name, _ = opener_of(self.config.criterion)
        knows_blocks = name in WITH_BLOCKS
        criteria: list[Criterion] = [self.config.criterion] if units or knows_blocks else []
        if blocks and not knows_blocks:
            criteria.append("relative")
        found = measure_all(
            state.model,
            self.structure,
            self.passes(),
            criteria=criteria,
            keep=state.keep,
            removed=state.removed,
            seed=self.config.seed,
        )
        own = found.get(name, found.get("relative"))
        assert own is not None
        other = found.get("relative", own)
        unmeasured = dict.fromkeys([*own.unmeasured, *(part for part in other.unmeasured if part not in own.units)])
        return Divergence(name, own.units, own.blocks or other.blocks, tuple(unmeasured))

    def unit_costs(self, state: State) -> dict[str, float]:
        """What the next unit of each group costs, in what the settings count."""
        kind, only_parameters = self.config.cost, self.config.parameters is not None and self.config.macs is None
        if kind == "latency":
            return unit_latencies(self.original, self.structure, self.example, state.keep, state.removed)
        if kind == "parameters" or (kind == "auto" and only_parameters):
            return self.costs.unit_parameters(state.keep, state.removed)
        return self.costs.unit_macs(state.keep, state.removed)

    def cut(self, state: State, keep: Keep, removed: Sequence[str]) -> tuple[nn.Module, Plan, float]:
        """Cut a copy of a state's model further, prove the cut, and rebalance what is left.

        Returns:
            The model, the plan from the original, and the largest relative difference from the masked original.

        Raises:
            VerificationError: the cut model is not the masked original; the state is as it was.
        """
        plan = self.structure.plan(keep, tuple(removed))
        model = apply_plan(state.model, plan.since(state.plan))
        proof = verify(self.structure, state.model, model, plan, self.example, since=state.plan)
        if self.config.rebalance:
            at_once = merged(self.calibration)
            passes = self.passes([at_once]) if at_once is not None else self.passes()
            rebalance_(
                model, self.original, self.structure, plan, passes, self.config.rebalance, progress=self.progress
            )
        return model, plan, proof.error

    def next_state(
        self, state: State, keep: Keep, removed: Sequence[str], title: str, recovery: Recovery | None = None
    ) -> State:
        """Cut a copy of a state's model further, prove the cut, rebalance it, let it recover, and judge it.

        Raises:
            VerificationError: the cut model is not the masked original; the state is as it was.
        """
        model, plan, error = self.cut(state, keep, removed)
        metric = self.recover(model, title, recovery or self.config.recovery)
        return State(model, keep, tuple(removed), plan, self.costs.cost(keep, removed), metric, max(state.error, error))

    def recover(self, model: nn.Module, title: str, recovery: Recovery) -> float:
        """Train a model beside the original, keep its best state, and return its metric on the validation data."""
        sign = 1.0 if self.task.higher_is_better else -1.0

        def judge(judged: nn.Module) -> float:
            return sign * evaluate(judged, self.task)

        if not recovery.trains:
            return evaluate(model, self.task)

        report = fit(
            model, self.task, recovery, teacher=self.original, progress=self.progress, title=title, judge=judge
        )
        assert report.best is not None  # there was a judge
        return sign * report.best


def calibration_batches(task: Task, config: Config) -> tuple[Any, ...]:
    """The first batches of the calibration data; a loader that shuffles does so by the run's seed."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        return tuple(islice(task.batches("calibration"), config.calibration_batches))


def few_samples(example: Inputs, count: int) -> Inputs:
    """The first samples of example inputs: tensors whose first dimension is the batch are shortened."""
    sizes = [leaf.shape[0] for leaf in _tensors(example) if leaf.dim() > 0]
    batch = sizes[0] if sizes else 0

    def shorten(leaf: Any) -> Any:
        return leaf[:count].clone() if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    args, kwargs = tree_map(shorten, example)
    return tuple(args), dict(kwargs)


def _tensors(example: Inputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
