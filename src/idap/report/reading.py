"""Read a run folder, finished or not, into plain data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from idap.errors import RunFolderError
from idap.record import AFTER, BEFORE, MEASURED, RESULT, RUN, STEPS, read_json, read_steps
from idap.steps import Step

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model is worth and what it costs, for one sample."""

    metric: float
    macs: int
    parameters: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How models are judged: name of the metric, how to read it, and the worst value allowed (None: any)."""

    metric: str
    higher_is_better: bool
    worst: float | None


@dataclass(frozen=True, kw_only=True)
class Group:
    """One width of the original: kind of its units, how many, and whether a residual stream carries them."""

    kind: str
    size: int
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

    low: float
    mean: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The divergence of one model, part by part."""

    criterion: str
    units: Mapping[str, Spread]
    blocks: Mapping[str, float]
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
    preparation: Mapping[str, float]
    optimizer: Any = None
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Reached(Costs):
    """What a finished run came to; `latency` as a share of the original's, where it was a goal."""

    reached: bool
    message: str
    latency: float | None
    output_error: float | None
    removed: tuple[str, ...]
    seconds: Mapping[str, float]
    ended: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A number of the original and of the result."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Original and result side by side: the metric on the test data, and the median seconds of one forward pass."""

    test: Pair | None
    latency: Pair | None
    batch: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as far as it has come.

    Attributes:
        folder: that holds it.
        settings: that it was begun with.
        steps: its decisions.
        before: divergence of the original, None where it was not measured yet.
        after: of the result.
        reached: None while the run is not finished.
        measured: None where nobody measured the result beside the original.
    """

    folder: Path
    settings: Settings
    steps: tuple[Step, ...]
    before: Profile | None = None
    after: Profile | None = None
    reached: Reached | None = None
    measured: Measured | None = None
    name: str = field(default="")

    @property
    def accepted(self) -> tuple[Step, ...]:
        """The decisions that were kept."""
        return tuple(step for step in self.steps if step.accepted)

    @property
    def now(self) -> Costs:
        """Of the result, or of the last accepted state."""
        if self.reached is not None:
            return self.reached
        if not self.accepted:
            return self.settings.baseline
        last = self.accepted[-1]
        size = round(self.settings.baseline.size * last.shares["size"])
        return Costs(metric=last.metric, macs=last.macs, parameters=last.parameters, size=size)

    @cached_property
    def removed(self) -> dict[str, str]:
        """Branches and blocks that are gone, also those inside others -> "removed", "projection" or "inside"."""
        found: dict[str, str] = {}
        for step in self.accepted:
            for removal in step.removed:
                if not removal.units:
                    found[removal.name] = "projection" if removal.kind == "projection" else "removed"
                    if removal.name in self.settings.blocks:
                        found |= dict.fromkeys(self.settings.blocks[removal.name].contains, "inside")
        for name in self.reached.removed if self.reached is not None else ():
            found.setdefault(name, "removed")  # a branch whose group lost all units
        return found

    @cached_property
    def widths(self) -> dict[str, int]:
        """Units that each group has now; 0 for what went with a branch or block."""
        found = {name: group.size for name, group in self.settings.groups.items()}
        for step in self.accepted:
            found |= {removal.name: removal.left for removal in step.removed if removal.units}
        for name in self.removed:
            if name in self.settings.blocks:
                found |= dict.fromkeys(self.settings.blocks[name].groups, 0)
        return found

    @property
    def targets(self) -> dict[str, float]:
        """Cost -> the share of the original's that was wanted at most."""
        names = ("macs", "parameters", "size", "latency")
        return {name: float(self.settings.config[name]) for name in names if self.settings.config.get(name) is not None}

    @property
    def cost(self) -> str:
        """The cost that the pictures show: the first goal that every decision tells of, else multiply-adds."""
        told = [name for name in self.targets if all(name in step.shares for step in self.steps)]
        return told[0] if told else "macs"

    def share(self, step: Step, cost: str) -> float:
        """What is left of a cost of the original after a decision; NaN where it was not measured."""
        return step.shares.get(cost, math.nan)

    def keeps_budget(self) -> bool:
        """Whether the metric is not worse than allowed."""
        worst, metric = self.settings.task.worst, self.now.metric
        if worst is None:
            return True
        return metric >= worst if self.settings.task.higher_is_better else metric <= worst


def read_run(folder: str | Path) -> Run:
    """Read a run, which may be under way; of a decision that was cut short nothing is taken.

    Args:
        folder: that `compress` wrote.

    Returns:
        The run.

    Raises:
        RunFolderError: the folder holds no run, or a file or line of it is broken or lacks something.
    """
    folder = Path(folder)
    if not (folder / RUN).is_file():
        what = "does not exist" if not folder.exists() else f"holds no run: there is no {RUN}"
        raise RunFolderError(
            f"{folder} {what}. Name the folder that `idap compress` wrote, such as runs/NAME (--run-dir)."
        )
    settings = _read(folder / RUN, Settings)
    assert settings is not None
    lines = read_steps(folder, whole=False)
    steps = tuple(_step(line, f"line {number} of {folder / STEPS}") for number, line in enumerate(lines, 1))
    return Run(
        folder=folder,
        settings=settings,
        steps=steps,
        before=_read(folder / BEFORE, Profile),
        after=_read(folder / AFTER, Profile),
        reached=_read(folder / RESULT, Reached),
        measured=_read(folder / MEASURED, Measured),
        name=folder.resolve().name,
    )


def _read(file: Path, kind: type[Kind]) -> Kind | None:
    """A file of the folder; None where there is none."""
    if not file.is_file():
        return None
    return _checked(read_json(file), kind, str(file))


def _step(line: Any, where: str) -> Step:
    step = _checked(line, Step, where)
    missing = [name for name in ("macs", "parameters", "size") if name not in step.shares]
    if missing:
        raise RunFolderError(f"{where} does not say which share of the {missing[0]} is left; {_AGAIN}")
    return step


_AGAIN = "it was made by another version of idap, or changed by hand. Run the compression again to have a report."


def _checked(found: Any, kind: type[Kind], where: str) -> Kind:
    try:
        return TypeAdapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise RunFolderError(
            f"{where} is not what this version of idap writes: {place}: {first['msg']}{more}; {_AGAIN}"
        ) from error
