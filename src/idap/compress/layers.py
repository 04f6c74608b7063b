"""Stage 2, layers: remove the branches and blocks that change the flow least (method.md 3.2)."""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from idap.compress.budget import Budget, shares_of
from idap.compress.change import next_state
from idap.compress.journal import Journal, block_removal
from idap.compress.neighbours import neighbours
from idap.compress.state import Setting, State
from idap.divergence.observe import result_of, tensors_in
from idap.divergence.ports import Wiring
from idap.graph.calls import intercept
from idap.graph.ir import Graph
from idap.record import Removal
from idap.structure.analysis import Structure
from idap.structure.blocks import Block
from idap.surgery.bypass import LinearMap, Projection
from idap.training.batch import device_of, move
from idap.training.evaluate import modes_kept
from idap.training.processes import mine, totals


def layer_stage(setting: Setting, state: State, goal: Budget, journal: Journal, removable: Sequence[str]) -> State:
    """Remove layers until the goal is reached, the removals are used up, or all that is left is essential.

    Args:
        setting: of the run.
        state: where to start; it is not changed.
        goal: targets and the accuracy budget.
        journal: gets one entry per decision.
        removable: branches and blocks whose removal was proved on the original.

    Returns:
        The last accepted state.
    """
    stage = setting.config.layers
    essential: set[str] = set()
    rejected = accepted = 0
    while accepted < stage.removals and rejected < stage.patience and not goal.reached(setting.shares(state)):
        found = journal.recall("layers", state)
        found = found or _candidate(setting, state, goal, set(removable) - essential, journal)
        if found is None:
            break
        candidate, removed = found
        if goal.holds(candidate.metric):
            journal.note("layers", candidate, removed, accepted=True, reason="within the budget")
            state, rejected, accepted = candidate, 0, accepted + 1
        else:
            essential.add(removed[0].name)
            rejected += 1
            journal.note("layers", candidate, removed, accepted=False, reason="outside the budget: it is essential")
    return state


def _candidate(
    setting: Setting, state: State, goal: Budget, allowed: Set[str], journal: Journal
) -> tuple[State, list[Removal]] | None:
    """Measure, try the lowest few, remove the best of them and recover; None if nothing more may go."""
    number = len(journal.steps)
    measured = setting.divergence(state, units=journal.opening, title=f"layers {number}: measure")
    journal.show("layers", state, measured)
    scores = measured.blocks
    left = [name for name in scores if name in allowed and not _overshoots(setting, state, goal, name)]
    short_list = sorted(left, key=lambda name: scores[name])[: setting.config.layers.short_list]
    if not short_list:
        return None
    costs = setting.block_costs(state, short_list)
    with setting.clock.on("trial"):
        chosen = _cheapest(setting, state, short_list, costs)
    block = setting.structure.block(chosen)
    removed = joined(setting.structure, state.removed, [chosen])
    tuned = frozenset[str]()
    if setting.config.layers.tune == "neighbours":
        tuned = neighbours(setting.structure, block, removed)
    candidate = next_state(setting, state, state.keep, removed, f"layers {number}: recovery", tuned=tuned)
    rank = sorted(scores, key=lambda name: scores[name]).index(chosen)
    return candidate, [block_removal(block, scores[chosen], rank, costs[chosen])]


def _overshoots(setting: Setting, state: State, goal: Budget, name: str) -> bool:
    """Whether removing a layer saves more than twice what is still wanted: filters come closer, and cost less.

    A projection that saves nothing does not come closer either.
    """
    if setting.structure.block(name).projected and setting.costs.block_macs(name, state.keep, state.removed) <= 0:
        return True
    if not goal.targets or not setting.config.filters.steps:
        return False
    now = setting.shares(state)
    without = shares_of(setting.costs.cost(state.keep, [*state.removed, name]), setting.whole)
    if "latency" in goal.targets:  # not measured for each; about as the multiply-adds
        without["latency"] = now["latency"] * without["macs"] / now["macs"]
    return all(now[cost] - without[cost] > 2 * (now[cost] - wanted) for cost, wanted in goal.targets.items())


def joined(structure: Structure, before: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """All that is gone once some more blocks are removed, without those that lie inside others."""
    inside = {inner for name in new for inner in structure.block(name).contains}
    return tuple(name for name in dict.fromkeys((*before, *new)) if name not in inside)


def _cheapest(setting: Setting, state: State, names: Sequence[str], costs: Mapping[str, float]) -> str:
    """The candidate whose removal costs least calibration loss for what it saves."""
    maps = {name: fitted.map for name, fitted in setting.projections(state, names).items()}
    with setting.progress.phase("layers: trial", len(names) + 1) as phase:
        before = calibration_loss(setting, state.model)
        phase.advance()
        price: dict[str, float] = {}
        for name in names:
            loss = loss_without(setting, state, setting.structure.block(name), maps.get(name))
            saved = max(1e-12, costs[name])
            price[name] = (loss - before) / saved if loss > before else (loss - before) * saved
            phase.advance(name)
    return min(names, key=lambda name: price[name])


@torch.no_grad()
def calibration_loss(setting: Setting, model: nn.Module, run: Callable[[Any], Any] | None = None) -> float:
    """Mean loss of a model on the calibration batches, perhaps run in another way."""
    task, total, count = setting.task, 0.0, 0
    with modes_kept(model):
        for batch in mine(setting.calibration):
            moved = move(batch, device_of(model))
            outputs = task.run(model, moved) if run is None else run(moved)
            size = task.size(moved)
            total += float(task.loss(outputs, moved)) * size
            count += size
    total, samples = totals(total, count)
    return total / max(1, samples)


def loss_without(setting: Setting, state: State, block: Block, given: LinearMap | None = None) -> float:
    """Mean calibration loss with one more branch or block bypassed, by a linear map if given; nothing is copied."""
    way: nn.Module = nn.Identity()
    if given is not None:
        projected = setting.structure.projected(block.name, setting.structure.presence(state.keep))
        way = Projection(projected)
        way.take(given, projected)
    return calibration_loss(setting, state.model, partial(_run_without, setting, state, block, way))


def _run_without(setting: Setting, state: State, block: Block, way: nn.Module, batch: Any) -> Any:
    """Run a model with a branch or block bypassed: its result is replaced by the stream, as it is or as it goes on."""
    wiring = Wiring(setting.structure, state.removed)
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
            # In place, since code that works in place may not look at what a call returns.
            _tensor(graph, block.exit, result).copy_(way.to(seen[-1])(seen[-1]))
        return result

    with intercept(state.model, handle):
        return setting.task.run(state.model, batch)


def _tensor(graph: Graph, name: str, result: Any) -> Tensor:
    value = result_of(graph, name, result)
    assert value is not None  # otherwise it would have no divergence
    return value
