"""What a model loses on the calibration data, as it is or with a branch or block bypassed."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from idap.compress.state import Setting, State
from idap.divergence.observe import result_of, tensors_in
from idap.divergence.ports import Wiring
from idap.graph.calls import intercept
from idap.graph.ir import Graph
from idap.structure.blocks import Block
from idap.surgery.bypass import LinearMap, Projection
from idap.training.batch import device_of, move
from idap.training.evaluate import modes_kept
from idap.training.processes import mine, totals


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
