"""Measure the divergence of every unit, branch and block of a model in one pass over calibration data."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from idap.divergence.observe import Probe, observe
from idap.divergence.paper import HeadProbe, WriterProbe
from idap.divergence.ports import Wiring
from idap.divergence.relative import BlockProbe, BranchProbe, ReaderProbe, model_tensors
from idap.errors import ConfigError, TaskError
from idap.structure.analysis import Structure
from idap.structure.blocks import Block
from idap.structure.groups import Group, Port
from idap.structure.layout import Presence

Criterion = Literal["relative", "paper"]
Run = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Divergence:
    """Scores of one model; a low score says that removing the part would change the flow little.

    Attributes:
        criterion: which form was measured.
        units: group name -> score of each unit in the original's indices, float64 of shape (group.size,). Units that
            the model no longer has are NaN.
        blocks: name of a branch or block -> score.
        unmeasured: groups and blocks that are there and that nothing could be seen of: they run inside one opaque call,
            or no weight reads their units.
    """

    criterion: Criterion
    units: Mapping[str, Tensor]
    blocks: Mapping[str, float]
    unmeasured: tuple[str, ...] = field(default=())


def measure(
    model: nn.Module,
    structure: Structure,
    passes: Iterable[Run],
    *,
    criterion: Criterion = "relative",
    keep: Mapping[str, Sequence[int]] | None = None,
    removed: Sequence[str] = (),
) -> Divergence:
    """Measure the divergence of everything that may still be removed.

    Args:
        model: the original, or the model that the plan of `keep` and `removed` made of it. Left as it was.
        structure: of the original.
        passes: each runs the model on one calibration batch when called with it.
        criterion: "relative" (method.md 2.2) or "paper" (D2 to D7; D6 for branches, D1b for blocks).
        keep: group name -> units that the model still has; groups that are not named are whole.
        removed: branches and blocks that the model no longer has.

    Returns:
        The scores.

    Raises:
        ConfigError: the criterion is unknown.
        TaskError: there is no calibration batch.
        StructureError: the model does not run on this data as it was traced.
    """
    if criterion not in ("relative", "paper"):
        raise ConfigError(f"criterion must be 'relative' or 'paper', found {criterion!r}.")
    keep = keep or {}
    probes = _Probes(model, structure, structure.presence(keep), criterion, removed)
    passes = iter(passes)
    first = next(passes, None)
    if first is None:
        raise TaskError("there is no calibration batch; divergence is measured on at least one.")
    observe(model, probes.all(), itertools.chain([first], passes))
    return Divergence(criterion, probes.units(keep), probes.block_scores(), probes.unmeasured())


class _UnitProbe(Probe, Protocol):
    """What scores the units of one group at one place."""

    @property
    def observable(self) -> bool:
        """Whether the place can be seen in the running model."""

    @property
    def seen(self) -> bool:
        """Whether anything went by."""

    def scores(self) -> Tensor:
        """One score per unit, shape (group.size,)."""


class _Probes:
    """The probes of one measurement, by group and by block; only of what the model still has."""

    def __init__(
        self, model: nn.Module, structure: Structure, present: Presence, criterion: Criterion, removed: Sequence[str]
    ) -> None:
        self._structure, self._present, self._criterion = structure, present, criterion
        self._wiring = Wiring(structure, removed)
        self._tensors = model_tensors(model)
        make = self._readers if criterion == "relative" else self._writers
        self._groups: dict[str, list[_UnitProbe]] = {
            group.name: [probe for probe in make(group) if probe.observable]
            for group in structure.groups
            if self._alive([*group.readers, *group.writers])
        }
        self._blocks = {block.name: self._block(block) for block in structure.blocks if self._stays(block, removed)}

    def all(self) -> list[Probe]:
        """Every probe that can see something."""
        probes: list[Probe] = [probe for group in self._groups.values() for probe in group]
        return probes + [probe for probe in self._blocks.values() if probe.observable]

    def units(self, keep: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Scores of the units of each group that was seen: mean over the readers, or sum over the writers."""
        found = {}
        for name, probes in self._groups.items():
            parts = [probe.scores() for probe in probes if probe.seen]
            if not parts:
                continue
            scores = torch.stack(parts).mean(0) if self._criterion == "relative" else torch.stack(parts).sum(0)
            gone = torch.ones(len(scores), dtype=torch.bool)
            gone[list(keep.get(name, range(len(scores))))] = False
            found[name] = scores.masked_fill(gone, float("nan"))
        return found

    def block_scores(self) -> dict[str, float]:
        """Scores of the branches and blocks that were seen."""
        return {
            name: probe.relative if self._criterion == "relative" else probe.paper
            for name, probe in self._blocks.items()
            if probe.seen
        }

    def unmeasured(self) -> tuple[str, ...]:
        """Groups and blocks that are there and were not seen."""
        groups = [name for name, probes in self._groups.items() if not any(probe.seen for probe in probes)]
        return (*groups, *(name for name, probe in self._blocks.items() if not probe.seen))

    def _alive(self, ports: Iterable[Port]) -> list[Port]:
        return [port for port in ports if port.node not in self._wiring.gone]

    def _stays(self, block: Block, removed: Sequence[str]) -> bool:
        gone = {name for other in removed for name in (other, *self._structure.block(other).contains)}
        return block.name not in gone and block.exit not in self._wiring.gone

    def _readers(self, group: Group) -> Sequence[_UnitProbe]:
        return [
            ReaderProbe(self._structure, self._present, group, port, self._wiring, self._tensors)
            for port in self._alive(group.readers)
        ]

    def _writers(self, group: Group) -> Sequence[_UnitProbe]:
        if group.kind == "heads":
            return [
                HeadProbe(self._structure, self._present, group, port, self._wiring, self._tensors)
                for port in self._alive(group.readers)
            ]
        return [
            WriterProbe(self._structure, self._present, group, port, self._wiring)
            for port in self._alive(group.writers)
        ]

    def _block(self, block: Block) -> BranchProbe:
        if block.kind == "branch":
            return BranchProbe(self._structure.graph, block.addition, block.branch)
        return BlockProbe(self._wiring, block)
