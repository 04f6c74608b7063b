"""Measurements that need much memory at once, packed into as few passes over the data as a limit allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from idap.divergence.observe import Probe

MEMORY = 2 * 2**30
"""Bytes that the second moments of one pass may take."""


@dataclass(frozen=True)
class Job:
    """One measurement that gives back its memory when it is finished.

    Attributes:
        size: bytes that it holds during a pass.
        probes: what it looks at.
        settle: called once, after its pass and before sums are added up over processes.
        sums: what is added up over processes; filled by then.
        finish: called once, after that.
    """

    size: int
    probes: Sequence[Probe]
    settle: Callable[[], None]
    sums: Sequence[dict[str, Tensor]]
    finish: Callable[[], None]


def packed(jobs: Sequence[Job], memory: int) -> list[list[Job]]:
    """Rounds of jobs, in order, each within the limit or a single job; at least one round, perhaps empty."""
    rounds: list[list[Job]] = [[]]
    held = 0
    for job in jobs:
        if rounds[-1] and held + job.size > memory:
            rounds.append([])
            held = 0
        rounds[-1].append(job)
        held += job.size
    return rounds
