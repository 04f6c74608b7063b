"""Read a run folder, finished or not, into plain data: here, and nowhere else, its files are checked."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from idap.errors import RunFolderError
from idap.record import AFTER, BEFORE, MEASURED, RESULT, RUN, STEPS, read_json, read_object, read_steps, remedy
from idap.report.contents import LARGEST, Begun, Costs, Decided, Measured, Profile, Reached, Settings
from idap.steps import Removal, Step

Kind = TypeVar("Kind")
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
GOALS = ("macs", "parameters", "size", "latency")


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
        return {name: float(self.settings.config[name]) for name in GOALS if self.settings.config.get(name) is not None}

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
        RunFolderError: the folder holds no run, or a file or line of it is broken or lacks something; names it, what is
            wrong, and the way out.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    return Run(
        folder=folder,
        settings=settings,
        steps=read_decisions(folder, settings, whole=False),
        before=_read(folder / BEFORE, Profile),
        after=_read(folder / AFTER, Profile),
        reached=_read(folder / RESULT, Reached),
        measured=_read(folder / MEASURED, Measured),
        name=folder.resolve().name,
    )


def read_settings(folder: Path) -> Settings:
    """Read what a run noted before any decision.

    Raises:
        RunFolderError: the folder holds no run, or its settings are broken.
    """
    if not _lies(folder / RUN):
        what = f"holds no run: there is no {RUN}" if _lies(folder) else "does not exist"
        raise RunFolderError(
            f"{folder} {what}. Name the folder that `idap compress` wrote, such as runs/NAME (--run-dir)."
        )
    found = _validate(read_json(folder / RUN), Settings, folder / RUN)
    wrong = _wrong_settings(found)
    if wrong:
        raise _change_error(folder / RUN, wrong)
    return found


def read_decisions(folder: Path, settings: Settings, *, whole: bool = True) -> tuple[Step, ...]:
    """Read the decisions of a run, in order.

    Args:
        folder: of the run.
        settings: of the run, whose groups and blocks the decisions are about.
        whole: expect whole lines; False leaves out a last line that is being written, or was cut short.

    Raises:
        RunFolderError: a line is broken, or says what can't be.
    """
    steps = []
    for number, line in enumerate(read_steps(folder, whole=whole), 1):
        where = f"line {number} of {folder / STEPS}"
        step = _validate(line, Step, folder / STEPS, where)
        wrong = _wrong_step(step, number - 1, settings)
        if wrong:
            raise _change_error(folder / STEPS, wrong, where)
        steps.append(step)
    return tuple(steps)


def read_end(folder: Path) -> Reached | None:
    """Read what a finished run came to; None where it is not finished.

    Raises:
        RunFolderError: the file is broken.
    """
    return _read(folder / RESULT, Reached)


def read_recipe_sections(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read the recipe that a run was begun with; empty where it has none, or where there is no run.

    Raises:
        RunFolderError: the settings are broken.
    """
    if not _lies(folder / RUN):
        return {}
    return _validate(read_object(folder / RUN), Begun, folder / RUN).recipe


def read_progress(folder: Path) -> list[Decided]:
    """Read how far a run has come: of each decision whether it was kept.

    Raises:
        RunFolderError: a line is broken.
    """
    lines = enumerate(read_steps(folder), 1)
    return [_validate(line, Decided, folder / STEPS, f"line {number} of {folder / STEPS}") for number, line in lines]


def _lies(path: Path) -> bool:
    """Whether something lies at a path, be it a link that leads nowhere."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} can't be the path of a run: {error}.") from error


def _read(file: Path, kind: type[Kind]) -> Kind | None:
    """A file of the folder; None where there is none."""
    return _validate(read_json(file), kind, file) if _lies(file) else None


def _validate(found: Any, kind: type[Kind], file: Path, where: str = "") -> Kind:
    """Data as a type; strictly: a number as text is none."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    try:
        return cast("Kind", _ADAPTERS[kind].validate_json(json.dumps(found), strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise _change_error(file, f"{place}: {first['msg']}{more}", where) from error


def _change_error(file: Path, wrong: str, where: str = "") -> RunFolderError:
    return RunFolderError(
        f"{where or file} is not what this version of idap writes: {wrong}; it was made by another version, or changed "
        f"by hand. {remedy(file)}"
    )


def _wrong_settings(settings: Settings) -> str:
    """What of the settings can't be; "" if all can."""
    for name in GOALS:
        wanted = settings.config.get(name)
        if wanted is not None and (type(wanted) not in (int, float) or not 0 <= wanted <= 1e6):
            return f"config.{name}: expected a share of the original's, found {wanted!r:.60}"
    environment = settings.environment
    if not isinstance(environment.get("folder", ""), str):
        return f"environment.folder: expected text, found {environment['folder']!r:.60}"
    words = environment.get("command", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return f"environment.command: expected a list of words, found {words!r:.60}"
    for name, block in settings.blocks.items():
        unknown = sorted(set(block.groups) - set(settings.groups))
        if unknown:
            return f"blocks.{name}: there is no group {unknown[0]!r:.60}"
    return ""


def _wrong_step(step: Step, index: int, settings: Settings) -> str:
    """What of a decision can't be; "" if all can."""
    missing = [name for name in ("macs", "parameters", "size") if name not in step.shares]
    if missing:
        return f"it does not say which share of the {missing[0]} is left"
    if step.index != index:
        return f"it has the index {step.index:.0f}, expected {index}"
    if not (0 <= step.macs < LARGEST and 0 <= step.parameters < LARGEST and 0 <= step.turn < LARGEST):
        return "macs, parameters and turn are numbers from 0 on"
    if not all(0 <= share <= 1e6 for share in step.shares.values()):
        return "shares are numbers from 0 on"
    if not all(0 <= seconds <= 1e12 for seconds in (step.seconds, *step.phases.values())):
        return "seconds are numbers from 0 on"
    curve = step.curve
    if curve is not None and not all(0 <= place < LARGEST for place in (curve.steps, *(at for at, _ in curve.metrics))):
        return "the steps of the curve are numbers from 0 on"
    return next(filter(None, (_wrong_removal(removal, settings) for removal in step.removed)), "")


def _wrong_removal(removal: Removal, settings: Settings) -> str:
    if not removal.units:
        return "" if removal.name in settings.blocks else f"there is no branch or block {removal.name!r:.60}"
    group = settings.groups.get(removal.name)
    if group is None:
        return f"there is no group {removal.name!r:.60}"
    if not (min(removal.units) >= 0 and max(removal.units) < group.size and 0 <= removal.left <= group.size):
        return f"group {removal.name!r:.60} has {group.size} units, and not those that it names"
    per_unit = (removal.scores, removal.ranks)
    if any(values and len(values) != len(removal.units) for values in per_unit):
        return f"group {removal.name!r:.60} has another number of scores or ranks than of units"
    return ""
