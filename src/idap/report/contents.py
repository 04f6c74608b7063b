"""The contents of the files of a run folder, as types that are checked when the files are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

LARGEST = 2**63
"""Every count of a model is below this number."""

Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Share = Annotated[float, Field(ge=0, le=1e6)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The metric of a model and its costs for one sample; `size` is in bytes."""

    metric: Number
    macs: Count
    parameters: Count
    size: Count


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """The metric of the task: its name, whether higher is better, and the worst value allowed (None: any)."""

    metric: str
    higher_is_better: bool
    worst: Number | None


@dataclass(frozen=True, kw_only=True)
class Group:
    """One group of the original: kind and number of its units, and whether they belong to a residual stream."""

    kind: str
    size: Count
    stream: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """A branch or block of the original: the parts that are removed with it, and the groups that lie inside it."""

    kind: str
    contains: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The lowest, mean and highest divergence of the units of one group."""

    low: Number
    mean: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The divergence of the groups and blocks of one model."""

    criterion: str
    units: Mapping[str, Spread]
    blocks: Mapping[str, Number]
    unmeasured: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run wrote before its first decision; `preparation` maps kinds of work to seconds."""

    model: str
    fingerprint: str
    config: Mapping[str, Any]
    task: TaskInfo
    baseline: Costs
    environment: Mapping[str, Any]
    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
    preparation: Mapping[str, Seconds]
    optimizer: Any = None
    recipe: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class RunEnd(Costs):
    """The end of a finished run; `latency` is a share of the original's, None if it was no goal."""

    reached: bool
    message: str
    latency: Share | None
    output_error: Number | None
    removed: tuple[str, ...]
    seconds: Mapping[str, Seconds]
    ended: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A number of the original, and of the result."""

    before: Number
    after: Number


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The metric on the test data and the median seconds of one forward pass, of the original and of the result."""

    test: Pair | None
    latency: Pair | None
    batch: Count


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """The recipe of a run, as sections; empty if the run was started from Python."""

    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The number of a decision, and whether it was accepted."""

    index: Count
    accepted: bool
