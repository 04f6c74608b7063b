"""The features that a cut model learns from the original: the stream after each of its blocks."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from idap.divergence.observe import result_of, tensors_in
from idap.divergence.ports import Sight, Wiring
from idap.errors import ConfigError, StructureError
from idap.graph.calls import intercept
from idap.graph.ir import CallKey, Graph
from idap.structure.analysis import Structure
from idap.structure.layout import slots
from idap.structure.plan import Plan
from idap.training.batch import Outputs
from idap.training.recovery import Recovery


class BlockOutputs:
    """The outputs of the outermost blocks that both models have; implements `idap.training.distill.Features`.

    If the student's stream is narrower, the teacher's is compared at the slots that were kept.

    Args:
        structure: of the original.
        plan: from the original to the student.
        student: the cut model.
        teacher: the original.
    """

    def __init__(self, structure: Structure, plan: Plan, student: nn.Module, teacher: nn.Module) -> None:
        self._graph, self._student, self._teacher = structure.graph, student, teacher
        ours, theirs = _sights(structure, plan.removed), _sights(structure)
        both = [exit_ for exit_ in ours if exit_ in theirs]
        self._ours, self._theirs = ([sights[exit_] for exit_ in both] for sights in (ours, theirs))
        present = structure.presence(plan.keep)
        self._kept: list[list[tuple[int, Tensor]]] = []
        for sight in self._theirs:
            stays = [(place, slots(dim, present)) for place, dim in enumerate(structure.layout.dims[sight.node][0])]
            self._kept.append([(p, torch.from_numpy(np.flatnonzero(s))) for p, s in stays if s.size and not s.all()])

    def __len__(self) -> int:
        return len(self._ours)

    def student(self, run: Callable[[], Outputs]) -> tuple[Outputs, list[Tensor]]:
        """Run the student, and return its outputs and those of its blocks."""
        return _catch(self._graph, self._student, self._ours, run)

    def teacher(self, run: Callable[[], Outputs]) -> tuple[Outputs, list[Tensor]]:
        """Run the teacher, and return its outputs and those of the same blocks, in the sizes of the student."""
        outputs, found = _catch(self._graph, self._teacher, self._theirs, run)
        for index, kept in enumerate(self._kept):
            for place, indices in kept:
                found[index] = found[index].index_select(place, indices.to(found[index].device))
        return outputs, found


def check_features(structure: Structure, *recoveries: Recovery | None) -> None:
    """Check that there are block outputs to compare if a recovery is to learn features.

    Raises:
        ConfigError: no block output can be observed.
    """
    wanted = max((recovery.features for recovery in recoveries if recovery is not None), default=0.0)
    if wanted > 0 and not _sights(structure):
        raise ConfigError(
            f"features={wanted:g} compares the outputs of blocks, and this model has none that can be observed. "
            "Set features to 0."
        )


def _sights(structure: Structure, removed: tuple[str, ...] = ()) -> dict[str, Sight]:
    """Exit of each outermost block that is left -> where its value can be observed."""
    wiring = Wiring(structure, removed)
    inner = {name for block in structure.blocks for name in block.contains}
    exits = [block.exit for block in structure.blocks if block.name not in inner and block.exit not in wiring.gone]
    found = {exit_: wiring.sight(exit_) for exit_ in exits}
    return {exit_: sight for exit_, sight in found.items() if sight is not None}


def _catch(
    graph: Graph, model: nn.Module, sights: list[Sight], run: Callable[[], Outputs]
) -> tuple[Outputs, list[Tensor]]:
    """Run a model, and return its outputs and the values at some sights."""
    wanted: dict[CallKey, list[int]] = {}
    for index, sight in enumerate(sights):
        wanted.setdefault(sight.call, []).append(index)
    caught: dict[int, Tensor] = {}

    def handle(key: CallKey, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        for index in wanted.get(key, ()):
            argument = sights[index].argument
            if argument is not None:
                caught[index] = _snapshot(graph, sights[index], tensors_in(args, dict(kwargs))[argument])
        result = func(*args, **kwargs)
        for index in wanted.get(key, ()):
            value = result_of(graph, sights[index].node, result) if sights[index].argument is None else None
            if value is not None:
                caught[index] = _snapshot(graph, sights[index], value)
        return result

    with intercept(model, handle):
        outputs = run()
    for index, sight in enumerate(sights):
        if index not in caught:
            raise StructureError(
                f"the output of a block, {sight.node!r}, was seen when the model was traced but not now: its forward "
                "takes another way on this data. Set features to 0, or trace it on inputs like the training data."
            )
    return outputs, [caught[index] for index in range(len(sights))]


def _snapshot(graph: Graph, sight: Sight, value: Tensor) -> Tensor:
    """The value as it is now; a copy if the model writes over it later."""
    return value.clone() if graph.memory.writers_before([sight.node], len(graph.nodes)) else value
