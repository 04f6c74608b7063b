"""A cut that a stage considers: what it leaves of each cost, and the loss on the calibration data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from idap.compress.budget import Budget, Shares, shares_of
from idap.compress.context import RunContext
from idap.compress.state import Keep, State
from idap.divergence.observe import result_of, tensors_in
from idap.divergence.ports import Wiring
from idap.graph.calls import intercept
from idap.graph.ir import Graph
from idap.selection.ranking import Ranking
from idap.selection.reach import cost_at_latency
from idap.structure.blocks import Block
from idap.surgery.apply import apply_plan
from idap.surgery.stand_ins import LinearMap, Projection
from idap.training.batch import device_of, move
from idap.training.evaluate import keep_modes
from idap.training.processes import local_items, totals


@torch.no_grad()
def calibration_loss(context: RunContext, model: nn.Module, run: Callable[[Any], Any] | None = None) -> float:
    """Mean loss of a model on the calibration batches; `run` replaces the usual way to run it."""
    task, total, count = context.subject.task, 0.0, 0
    with keep_modes(model):
        for batch in local_items(context.subject.calibration):
            moved = move(batch, device_of(model))
            outputs = task.run(model, moved) if run is None else run(moved)
            size = task.size(moved)
            total += float(task.loss(outputs, moved)) * size
            count += size
    total, samples = totals(total, count)
    return total / max(1, samples)


def loss_without(context: RunContext, state: State, block: Block, given: LinearMap | None = None) -> float:
    """Mean calibration loss with one more branch or block bypassed, by a linear map if one is given."""
    way: nn.Module = nn.Identity()
    if given is not None:
        projected = context.subject.structure.projection_of(block.name, context.subject.structure.presence(state.keep))
        way = Projection(projected)
        way.take(given, projected)
    return calibration_loss(context, state.model, partial(_run_without, context, state, block, way))


def _run_without(context: RunContext, state: State, block: Block, way: nn.Module, batch: Any) -> Any:
    """Run a model with a branch or block bypassed: its result is replaced by the stream, as `way` maps it."""
    wiring = Wiring(context.subject.structure, state.removed)
    graph, entry = wiring.graph, wiring.sight(block.entry)
    assert entry is not None  # otherwise it would have no divergence
    seen: list[Tensor] = []

    def handle(key: Any, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if key == entry.call and entry.argument is not None:
            seen.append(tensors_in(args, dict(kwargs))[entry.argument].clone())
        result = func(*args, **kwargs)
        if key == entry.call and entry.argument is None:
            seen.append(_tensor(graph, entry.node, result).clone())
        if key == graph.nodes[block.exit].call:
            # In place, since code that works in place may ignore what a call returns.
            _tensor(graph, block.exit, result).copy_(way.to(seen[-1])(seen[-1]))
        return result

    with intercept(state.model, handle):
        return context.subject.task.run(state.model, batch)


def _tensor(graph: Graph, name: str, result: Any) -> Tensor:
    value = result_of(graph, name, result)
    assert value is not None  # otherwise it would have no divergence
    return value


@dataclass(frozen=True)
class Cut:
    """What is left after a step.

    Attributes:
        keep: group name -> units that are kept.
        removed: branches and blocks that are removed.
    """

    keep: Keep
    removed: tuple[str, ...]

    def takes_from(self, state: State) -> bool:
        """Whether the cut removes anything from a state."""
        return dict(self.keep) != dict(state.keep) or self.removed != state.removed


def left_after(context: RunContext, state: State, cut: Cut, model: nn.Module | None = None) -> dict[str, float]:
    """What a cut leaves of each of the original's costs; latency is measured now, if it is a goal.

    Args:
        context: of the run.
        state: before the cut.
        cut: what is kept.
        model: the cut model, if it was made.
    """
    found = shares_of(context.subject.costs.cost(cut.keep, cut.removed), context.subject.whole)
    if "latency" not in context.goals.budget.targets:
        return found
    latency = context.latency_of(_apply(context, state, cut) if model is None else model)
    assert latency is not None  # it is a goal
    return {**found, "latency": latency}


def _apply(context: RunContext, state: State, cut: Cut) -> nn.Module:
    """A state's model after a cut, only to be timed: projections are not fitted."""
    plan = context.subject.structure.plan(cut.keep, cut.removed).since(state.plan)
    return apply_plan(state.model, plan)


def _hardware_steps(context: RunContext) -> Mapping[str, int]:
    """Group name -> the step of its latency, see `LayerTimes.steps`."""
    with context.services.clock.on("latency"):
        return context.services.layer_times.steps


def _down_to_latency(
    context: RunContext, state: State, ranking: Ranking, aim: Budget, down_to: Callable[[Shares], Cut]
) -> Cut:
    """Cut down to the multiply-adds at which the measured latency meets its target, and the other targets are met."""
    others = {name: share for name, share in aim.targets.items() if name != "latency"}
    shares = context.shares(state)
    cuts: dict[float, Cut] = {}

    def at(macs: float) -> Cut:
        if macs not in cuts:
            cuts[macs] = down_to({**others, "macs": min(macs, others.get("macs", 1.0))})
        return cuts[macs]

    def latency_at(macs: float) -> float:
        found = context.latency_of(_apply(context, state, at(macs)))
        assert found is not None  # it is a goal
        return found

    everything = context.subject.costs.cost(ranking.keep(len(ranking)), state.removed)
    least = shares_of(everything, context.subject.whole)["macs"]
    start = (shares["macs"], shares["latency"])
    if start[1] <= aim.targets["latency"]:
        return down_to(others)
    return at(cost_at_latency(latency_at, start, aim.targets["latency"], least=least))
