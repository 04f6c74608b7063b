"""Make the next state of a run: cut, verify, rebalance, recover and judge a model."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, pairwise
from math import inf, isfinite
from typing import NamedTuple

from torch import nn

from idap.compress.context import RunContext
from idap.compress.features import BlockOutputs
from idap.compress.state import Judgement, Keep, State
from idap.errors import StructureError
from idap.graph.ir import Node
from idap.rebalance.run import rebalance_
from idap.steps import Curve
from idap.structure.analysis import Structure
from idap.structure.blocks import Block, Reach
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from idap.training.batch import device_of, merge_batches
from idap.training.fit import fit
from idap.training.loop import FitReport
from idap.training.processes import align_
from idap.training.recovery import Recovery
from idap.training.speed import channels_last_fault


def neighbours(structure: Structure, block: Block, removed: Sequence[str]) -> frozenset[str]:
    """Names of the weights next to a block: those of the nearest layers before and after it, and of norms between.

    The weights of a projection that replaces the block are among them. If the stream is a sum, the nearest layer is the
    last one of the branch that was added.

    Args:
        structure: of the original.
        block: the branch or block that is removed.
        removed: all branches and blocks that are removed, this one included.

    Returns:
        Canonical names of parameters; empty if the block lies between an input and an output.
    """
    made = block.projected.tensors(block.name) if block.projected is not None else ()
    structure = structure.after(removed)
    graph, reach = structure.graph, Reach(structure.graph)
    dead, skips, users = structure.dead_nodes(removed), structure.skips(removed), graph.users()

    def apart(node: Node) -> tuple[str, str] | None:
        """Skip and branch of an addition of two values of which one depends on the other."""
        data = [name for name in dict.fromkeys(node.inputs()) if name in reach.before]
        for skip, branch in (data, data[::-1]) if len(data) == 2 else ():
            if reach.is_before(skip, branch):
                return skip, branch
        return None

    def backward(node: Node) -> Iterator[str]:
        sides = apart(node)
        for name in (sides[1],) if sides is not None else node.inputs():
            yield skips.get(name, name)

    def forward(node: Node) -> Iterator[str]:
        for exit_ in (name for name, entry in skips.items() if entry == node.name and name != block.exit):
            yield from forward(graph.nodes[exit_])
        for name in users[node.name]:
            if name in dead or name in block.nodes or name in skips:
                continue
            sides = apart(graph.nodes[name])
            if sides is None or sides[0] != node.name:
                yield name

    before = _nearest(structure, [skips.get(block.entry, block.entry)], backward)
    behind = _nearest(structure, list(forward(graph.nodes[block.exit])), forward)
    return before | behind | set(made)


def _nearest(structure: Structure, start: list[str], onward: Callable[[Node], Iterator[str]]) -> frozenset[str]:
    """The parameters of the first layers with a matrix on every path, and of the layers on the way to them."""
    graph = structure.graph
    found: set[str] = set()
    seen: set[str] = set()
    queue = list(start)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        node = graph.nodes[name]
        parameters = [graph.nodes[used] for used in node.inputs() if graph.nodes[used].op == "parameter"]
        found |= {parameter.target for parameter in parameters}
        if not any(len(parameter.shape) > 1 for parameter in parameters):
            queue += onward(node)
    return frozenset(found)


@contextmanager
def only_training(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Allow only some parameters of a model to be trained inside this context."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in names)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


POINTS = 40
"""Most points of a recovery's loss that are recorded."""


class CutModel(NamedTuple):
    """A model that was cut and rebalanced, but not trained.

    Attributes:
        model: the cut model.
        plan: from the original to the model.
        error: the largest relative difference from the masked original.
    """

    model: nn.Module
    plan: Plan
    error: float


def make_cut(context: RunContext, state: State, keep: Keep, removed: Sequence[str]) -> CutModel:
    """Cut a copy of a state's model further, verify the cut, and rebalance what is left.

    Projections that replace blocks which the state still has are fitted to these. If nothing is trained between the
    cuts, each of them starts from the original again: corrections of corrected weights lose more than one correction
    does (docs/results.md#several-cuts).

    Args:
        context: of the run.
        state: where to start; it is not changed.
        keep: group name -> units that are kept.
        removed: all branches and blocks that are removed after the cut.

    Raises:
        VerificationError: the cut model does not equal the masked original; the state is not changed.
        StructureError: the values of a block that should become a projection can't be observed.
    """
    structure, clock = context.subject.structure, context.services.clock
    if not context.goals.config.recovery.trains:
        state = context.initial_state()
    with clock.on("cut"):
        plan = structure.plan(keep, tuple(removed))
        new = [path for path in plan.projections if path not in state.plan.projections]
        maps = {path: fitted.map for path, fitted in context.projections(state, new).items()}
        if len(maps) < len(new):
            missing = min(set(new) - set(maps))
            raise StructureError(f"the values of block {missing!r} can't be observed, so no projection can be fitted")
        model = apply_plan(state.model, plan.since(state.plan), maps)
    with clock.on("proof"):
        proof = verify(structure, state.model, model, plan, context.subject.example, since=state.plan, maps=maps)
    if context.goals.config.rebalance:
        at_once = merge_batches(context.subject.calibration)
        passes = context.passes([at_once]) if at_once is not None else context.passes()
        settings = context.goals.config.rebalance
        with clock.on("rebalance"):
            done = rebalance_(
                model, context.subject.original, structure, plan, passes, settings, progress=context.services.progress
            )
        align_(model)
        for correction in done:
            if correction.too_wide:
                context.tell(
                    f"{correction.weight} reads more than {settings.columns:,} columns, so only its bias is corrected."
                )
    return CutModel(model, plan, proof.error)


def next_state(
    context: RunContext,
    state: State,
    keep: Keep,
    removed: Sequence[str],
    title: str,
    *,
    tuned: frozenset[str] = frozenset(),
    made: CutModel | None = None,
) -> State:
    """Cut a copy of a state's model further, let it recover, and judge it.

    Args:
        context: of the run.
        state: where to start; it is not changed.
        keep: group name -> units that are kept.
        removed: all branches and blocks that are removed after the cut.
        title: of the recovery, for the progress.
        tuned: names of the parameters that are trained in the recovery; empty: all.
        made: the cut, if it was made before, whose model becomes that of the next state; None: it is made now.

    Raises:
        VerificationError: the cut model does not equal the masked original; the state is not changed.
    """
    model, plan, error = made or make_cut(context, state, keep, removed)
    with only_training(model, tuned) if tuned else nullcontext():
        metric, fault = recover(context, model, plan, title, context.goals.config.recovery)
    cost, error = context.subject.costs.cost(keep, removed), max(state.error, error)
    return State(model, keep, tuple(removed), plan, cost, metric, error, context.latency_of(model), fault)


def _feasible_recovery(
    context: RunContext, model: nn.Module, plan: Plan, title: str, recovery: Recovery
) -> tuple[Recovery, BlockOutputs | None]:
    """The recovery without what the model does not allow, and the outputs of blocks that it compares, if any."""
    if recovery.channels_last is True and (fault := channels_last_fault(model, device_of(model))):
        context.services.progress.say(f"{title}: channels_last is left out: {fault}.")
        recovery = replace(recovery, channels_last=False)
    if recovery.features <= 0:
        return recovery, None
    features = BlockOutputs(context.subject.structure, plan, model, context.subject.original)
    return recovery if len(features) else replace(recovery, features=0.0), features  # perhaps no block is left


def recover(context: RunContext, model: nn.Module, plan: Plan, title: str, recovery: Recovery) -> Judgement:
    """Train a cut model with the original as teacher, keep its best state, and judge it on the validation data.

    Args:
        context: of the run; the curve of the training is added to its curves.
        model: is trained in place.
        plan: from the original to the model.
        title: of the recovery, for the progress.
        recovery: how it is trained.

    Returns:
        The judgement of the best state on the validation data; it has a fault only if every state has one.
    """
    sign, faults = 1.0 if context.subject.task.higher_is_better else -1.0, [""]

    def judge_model(candidate: nn.Module) -> Judgement:
        with context.services.clock.on("judging"):
            return context.judge(candidate)

    def judge(candidate: nn.Module) -> float:
        metric, fault = judge_model(candidate)
        if fault:
            faults.append(fault)
        return -inf if fault else sign * metric

    if not recovery.trains:
        return judge_model(model)
    optimizer = None if context.services.optimizer is None else context.services.optimizer(model, plan)
    learned = model.parameters() if optimizer is None else chain(*(g["params"] for g in optimizer.param_groups))
    if not any(parameter.requires_grad for parameter in learned):
        context.services.progress.say(
            f"{title}: no parameter that is left is trained, so the model is judged as it is."
        )
        return judge_model(model)
    recovery, features = _feasible_recovery(context, model, plan, title, recovery)
    with context.services.clock.on("recovery"):
        report = fit(
            model,
            context.subject.task,
            recovery,
            teacher=context.subject.original,
            features=features,
            optimizer=optimizer,
            judge=judge,
            salvage=True,
            progress=context.services.progress,
            title=title,
        )
    best = report.best
    assert best is not None  # there was a judge
    if not report.diverged and any(value == -inf for steps, value in report.scores if steps):
        report = replace(report, diverged=faults[-1])
    context.services.curves.append(_curve(title, report, sign))
    if report.diverged:
        context.services.progress.say(f"{title} ended early, and the best state before that is kept: {report.diverged}")
    return Judgement(0.0, faults[-1]) if best == -inf else Judgement(sign * best)


def _curve(title: str, report: FitReport, sign: float) -> Curve:
    """The record of a training: its losses as means over equal stretches, and the metric at each judgement."""
    losses = report.curve
    count = min(len(losses), POINTS)
    edges = [index * len(losses) // count for index in range(count + 1)] if count else []
    return Curve(
        title=title,
        steps=report.steps,
        losses=tuple(statistics.fmean(losses[start:end]) for start, end in pairwise(edges)),
        metrics=tuple((steps, sign * score) for steps, score in report.scores if isfinite(score)),
        diverged=report.diverged,
        average=sign * report.best if report.averaged and report.best is not None else None,
    )
