"""Where every unit of every group lies in every tensor of a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from idap.graph.ir import Expression
from idap.graph.labels import Dim
from idap.graph.rules import Contraction, Pin, SizeUse

Presence = NDArray[np.bool_]
"""For each label whether it is present, shape (labels,)."""


class Dims(Protocol):
    """What demands are read from: a `Layout`, or a `Flow` before its layout is made."""

    @property
    def dims(self) -> Mapping[str, Sequence[Sequence[Dim]]]:
        """Node -> for each tensor it produces, its dims."""

    @property
    def sizes(self) -> Sequence[SizeUse]:
        """Ints that follow a dim."""

    @property
    def pins(self) -> Sequence[Pin]:
        """Dims whose number of slots the results depend on."""

    @property
    def escaped(self) -> Mapping[Expression, Mapping[str, str]]:
        """Attributes and shapes whose value the results depend on."""


@dataclass(frozen=True, repr=False)
class Layout:
    """Labels of every tensor dimension, and the unit each label stands for.

    Attributes:
        dims: node -> for each tensor it produces, its dims in terms of final labels.
        tensors: canonical name of a parameter or buffer -> its dims.
        group_of: label -> index of its group, -1 if it can't be removed, shape (labels,).
        unit_of: label -> index of its unit in the group, shape (labels,).
        sizes: ints that follow a dim.
        contractions: where units are written and read.
        crossings: node -> what it computes over a dimension that may shrink.
        escaped: attributes and shapes whose value the results depend on, each with the modules whose code computes
            with it and the place.
        pins: dims whose number of slots the results depend on.
    """

    dims: Mapping[str, tuple[tuple[Dim, ...], ...]]
    tensors: Mapping[str, tuple[Dim, ...]]
    group_of: NDArray[np.int64]
    unit_of: NDArray[np.int64]
    sizes: tuple[SizeUse, ...]
    contractions: tuple[Contraction, ...]
    crossings: Mapping[str, str]
    escaped: Mapping[Expression, Mapping[str, str]] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()

    def presence(self, kept: Mapping[int, Iterable[int]]) -> Presence:
        """Which labels are present when group `index` keeps only the units `kept[index]`."""
        present = np.ones(len(self.group_of), dtype=bool)
        groups = self.group_of[self._by_group]
        for group, units in kept.items():
            start, end = np.searchsorted(groups, [group, group + 1])
            mine = self._by_group[start:end]
            present[mine] = np.isin(self.unit_of[mine], np.fromiter(units, dtype=np.int64))
        return present

    @cached_property
    def _by_group(self) -> NDArray[np.int64]:
        """The labels, sorted by group."""
        return np.argsort(self.group_of, kind="stable")

    def units(self, dim: Dim, group: int) -> NDArray[np.int64]:
        """For each slot of a dim, the unit of the group that it belongs to, -1 for none; shape (size,)."""
        found = np.full(dim.shape[1], -1, dtype=np.int64)
        for row in dim:
            mine = self.group_of[row] == group
            found[mine] = self.unit_of[row[mine]]
        return found

    def groups_in(self, dim: Dim) -> set[int]:
        """The groups that slots of a dim belong to."""
        return {int(index) for index in np.unique(self.group_of[dim])} - {-1}


def slots(dim: Dim, present: Presence) -> Presence:
    """Which slots of a dim are present, shape (size,)."""
    return np.asarray(present[dim].all(axis=0))


def count(dim: Dim, present: Presence) -> int:
    """Number of slots of a dim that are present."""
    return int(slots(dim, present).sum()) if len(dim) else dim.shape[1]
