"""Measurements that need much memory at once; `idap.memory.packed` distributes them over passes over the data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from idap.divergence.observe import Probe
from idap.memory import Need

MEMORY = 2 * 2**30
"""Bytes that the second moments of one pass may take."""


@dataclass(frozen=True)
class Job:
    """One measurement that gives back its memory when it is finished.

    Attributes:
        name: of the group that it measures.
        need: bytes that it takes.
        probes: what it looks at.
        settle: called once, after its pass and before sums are added up over processes.
        sums: what is added up over processes; filled by then.
        finish: called once, after that.
    """

    name: str
    need: Need
    probes: Sequence[Probe]
    settle: Callable[[], None]
    sums: Sequence[dict[str, Tensor]]
    finish: Callable[[], None]
