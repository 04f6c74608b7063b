"""Read the folder of a run, finished or not, into plain data, and check its files."""

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
from idap.report.contents import LARGEST, Costs, Measurement, Profile, RunEnd, RunRecipe, Settings, Verdict
from idap.steps import Removal, Step, is_intact

Kind = TypeVar("Kind")
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
GOALS = ("macs", "parameters", "size", "latency")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, up to its last decision.

    Attributes:
        folder: the folder of the run.
        settings: what the run wrote before its first decision.
        steps: the decisions of the run.
        before: divergence of the original; None if it is not measured yet.
        after: divergence of the result; None if it is not measured.
        reached: the end of the run; None while it is not finished.
        measured: the result measured beside the original; None if it was not measured.
        name: name of the folder.
    """

    folder: Path
    settings: Settings
    steps: tuple[Step, ...]
    before: Profile | None = None
    after: Profile | None = None
    reached: RunEnd | None = None
    measured: Measurement | None = None
    name: str = field(default="")

    @property
    def accepted(self) -> tuple[Step, ...]:
        """The accepted decisions."""
        return tuple(step for step in self.steps if step.accepted)

    @property
    def now(self) -> Costs:
        """The metric and costs of the result, or of the last accepted state."""
        if self.reached is not None:
            return self.reached
        if not self.accepted:
            return self.settings.baseline
        last = self.accepted[-1]
        size = round(self.settings.baseline.size * last.shares["size"])
        return Costs(metric=last.metric, macs=last.macs, parameters=last.parameters, size=size)

    @cached_property
    def removed(self) -> dict[str, str]:
        """Removed branches and blocks -> "removed", "projection", or "inside" (removed with a larger block)."""
        found: dict[str, str] = {}
        for step in self.accepted:
            for removal in step.removed:
                if not removal.units:
                    found[removal.name] = "projection" if removal.kind == "projection" else "removed"
                    if removal.name in self.settings.blocks:
                        found |= dict.fromkeys(self.settings.blocks[removal.name].contains, "inside")
        for name in self.reached.removed if self.reached is not None else ():
            found.setdefault(name, "removed")  # a branch whose units were all removed
        return found

    @cached_property
    def widths(self) -> dict[str, int]:
        """The number of units that each group has now; 0 if it was removed with a branch or block."""
        found = {name: group.size for name, group in self.settings.groups.items()}
        for step in self.accepted:
            found |= {removal.name: removal.left for removal in step.removed if removal.units}
        for name in self.removed:
            if name in self.settings.blocks:
                found |= dict.fromkeys(self.settings.blocks[name].groups, 0)
        return found

    @property
    def targets(self) -> dict[str, float]:
        """Cost -> its target, as a share of the original's."""
        return {name: float(self.settings.config[name]) for name in GOALS if self.settings.config.get(name) is not None}

    @property
    def cost(self) -> str:
        """The cost in the charts: the first one with a target that every decision has measured, else multiply-adds."""
        measured = [name for name in self.targets if all(name in step.shares for step in self.steps)]
        return measured[0] if measured else "macs"

    def share(self, step: Step, cost: str) -> float:
        """The share of a cost of the original that is left after a decision; NaN if it was not measured."""
        return step.shares.get(cost, math.nan)

    def is_within_budget(self) -> bool:
        """Whether the metric is within the budget."""
        worst, metric = self.settings.task.worst, self.now.metric
        if worst is None:
            return True
        return metric >= worst if self.settings.task.higher_is_better else metric <= worst


def read_run(folder: str | Path) -> Run:
    """Read a run, which may be under way; an incomplete last decision is ignored.

    Args:
        folder: a folder that `compress` wrote.

    Returns:
        The run.

    Raises:
        RunFolderError: the folder holds no run, or a file or line of it is broken or incomplete; the error names it,
            the fault and the remedy.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    return Run(
        folder=folder,
        settings=settings,
        steps=read_decisions(folder, settings, whole=False),
        before=_read(folder / BEFORE, Profile),
        after=_read(folder / AFTER, Profile),
        reached=_read(folder / RESULT, RunEnd),
        measured=_read(folder / MEASURED, Measurement),
        name=folder.resolve().name,
    )


def read_settings(folder: Path) -> Settings:
    """Read what a run wrote before its first decision.

    Raises:
        RunFolderError: the folder holds no run, or its settings are broken.
    """
    if not _exists(folder / RUN):
        what = f"holds no run: there is no {RUN}" if _exists(folder) else "does not exist"
        raise RunFolderError(
            f"{folder} {what}. Name the folder that `idap compress` wrote, such as runs/NAME (--run-dir)."
        )
    settings = _validate(read_json(folder / RUN), Settings, folder / RUN)
    fault = _settings_fault(settings)
    if fault:
        raise _format_error(folder / RUN, fault)
    return settings


def read_decisions(folder: Path, settings: Settings, *, whole: bool = True) -> tuple[Step, ...]:
    """Read the decisions of a run, in order.

    Args:
        folder: folder of the run.
        settings: settings of the run, with the groups and blocks that the decisions name.
        whole: whether the last line must be complete; False: a last line that is incomplete is left out.

    Raises:
        RunFolderError: a line is broken, or contradicts the settings.
    """
    steps = []
    for number, line in enumerate(read_steps(folder, whole=whole), 1):
        where = f"line {number} of {folder / STEPS}"
        step = _validate(line, Step, folder / STEPS, where)
        fault = _step_fault(step, number - 1, settings)
        if not fault and not is_intact(line):
            fault = "its checksum does not match what it holds"
        if fault:
            raise _format_error(folder / STEPS, fault, where)
        steps.append(step)
    return tuple(steps)


def read_end(folder: Path) -> RunEnd | None:
    """Read the end of a run; None if it is not finished.

    Raises:
        RunFolderError: the file is broken.
    """
    return _read(folder / RESULT, RunEnd)


def read_recipe_sections(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read the recipe of a run; empty if the run has no recipe, or there is no run.

    Raises:
        RunFolderError: the settings are broken.
    """
    if not _exists(folder / RUN):
        return {}
    return _validate(read_object(folder / RUN), RunRecipe, folder / RUN).recipe


def read_progress(folder: Path) -> list[Verdict]:
    """Read for each decision of a run whether it was accepted.

    Raises:
        RunFolderError: a line is broken.
    """
    lines = enumerate(read_steps(folder), 1)
    return [_validate(line, Verdict, folder / STEPS, f"line {number} of {folder / STEPS}") for number, line in lines]


def _exists(path: Path) -> bool:
    """Whether a path exists; a broken link exists as well."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} can't be the path of a run: {error}.") from error


def _read(file: Path, kind: type[Kind]) -> Kind | None:
    """The contents of a file of the folder; None if it does not exist."""
    return _validate(read_json(file), kind, file) if _exists(file) else None


def _validate(data: Any, kind: type[Kind], file: Path, where: str = "") -> Kind:
    """Convert data to a type, strictly: text with a number is no number."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    try:
        return cast("Kind", _ADAPTERS[kind].validate_json(json.dumps(data), strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole content"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise _format_error(file, f"{place}: {first['msg']}{more}", where) from error


def _format_error(file: Path, fault: str, where: str = "") -> RunFolderError:
    return RunFolderError(
        f"{where or file} is not what this version of idap writes: {fault}; it was written by another version, or "
        f"changed by hand. {remedy(file)}"
    )


def _settings_fault(settings: Settings) -> str:
    """What is wrong with the settings; "" if nothing is."""
    for name in GOALS:
        target = settings.config.get(name)
        if target is not None and (type(target) not in (int, float) or not 0 <= target <= 1e6):
            return f"config.{name}: expected a share of the original's, found {target!r:.60}"
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


def _step_fault(step: Step, index: int, settings: Settings) -> str:
    """What is wrong with a decision; "" if nothing is."""
    missing = [name for name in ("macs", "parameters", "size") if name not in step.shares]
    if missing:
        return f"it does not say which share of the {missing[0]} is left"
    if step.index != index:
        return f"it has the index {step.index:.0f}, expected {index}"
    if not (0 <= step.macs < LARGEST and 0 <= step.parameters < LARGEST and 0 <= step.turn < LARGEST):
        return "macs, parameters and turn must be 0 or more"
    if not all(0 <= share <= 1e6 for share in step.shares.values()):
        return "shares must be 0 or more"
    if not all(0 <= seconds <= 1e12 for seconds in (step.seconds, *step.phases.values())):
        return "seconds must be 0 or more"
    curve = step.curve
    if curve is not None and not all(0 <= place < LARGEST for place in (curve.steps, *(at for at, _ in curve.metrics))):
        return "the steps of the curve must be 0 or more"
    return next(filter(None, (_removal_fault(removal, settings) for removal in step.removed)), "")


def _removal_fault(removal: Removal, settings: Settings) -> str:
    if not removal.units:
        return "" if removal.name in settings.blocks else f"there is no branch or block {removal.name!r:.60}"
    group = settings.groups.get(removal.name)
    if group is None:
        return f"there is no group {removal.name!r:.60}"
    if not (min(removal.units) >= 0 and max(removal.units) < group.size and 0 <= removal.left <= group.size):
        return f"group {removal.name!r:.60} has {group.size} units, which do not fit those that the step names"
    per_unit = (removal.scores, removal.ranks)
    if any(values and len(values) != len(removal.units) for values in per_unit):
        return f"group {removal.name!r:.60} has a different number of scores or ranks than of units"
    return ""
