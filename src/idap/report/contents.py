"""What the files of a run folder hold, as types that a reader checks them by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

LARGEST = 2**63
"""No count of a model reaches it."""

Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Share = Annotated[float, Field(ge=0, le=1e6)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model is worth and what it costs, for one sample."""

    metric: Number
    macs: Count
    parameters: Count
    size: Count


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How models are judged: name of the metric, how to read it, and the worst value allowed (None: any)."""

    metric: str
    higher_is_better: bool
    worst: Number | None


@dataclass(frozen=True, kw_only=True)
class Group:
    """One width of the original: kind of its units, how many, and whether a residual stream carries them."""

    kind: str
    size: Count
    stream: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """A branch or block of the original: the parts that vanish with it, and the groups that it holds whole."""

    kind: str
    contains: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Divergence of the units of one group."""

    low: Number
    mean: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The divergence of one model, part by part."""

    criterion: str
    units: Mapping[str, Spread]
    blocks: Mapping[str, Number]
    unmeasured: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was written before any decision; `preparation` is seconds by kind of work; the last two may lack."""

    model: str
    fingerprint: str
    config: Mapping[str, Any]
    task: Judged
    baseline: Costs
    environment: Mapping[str, Any]
    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
    preparation: Mapping[str, Seconds]
    optimizer: Any = None
    recipe: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Reached(Costs):
    """What a finished run came to; `latency` as a share of the original's, where it was a goal."""

    reached: bool
    message: str
    latency: Share | None
    output_error: Number | None
    removed: tuple[str, ...]
    seconds: Mapping[str, Seconds]
    ended: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A number of the original and of the result."""

    before: Number
    after: Number


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Original and result side by side: the metric on the test data, and the median seconds of one forward pass."""

    test: Pair | None
    latency: Pair | None
    batch: Count


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The recipe that a run was begun with, as sections; empty where it was begun from Python."""

    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Decided:
    """The number of a decision, and whether it was kept."""

    index: Count
    accepted: bool
