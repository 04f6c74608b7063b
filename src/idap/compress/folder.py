"""Write what a run folder holds beside the decisions: the settings, the profiles over depth, the result."""

import math
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from idap.compress.budget import Budget
from idap.compress.config import Config
from idap.compress.context import RunContext
from idap.compress.result import Result
from idap.compress.state import Keep, State
from idap.cost.count import Cost, tensor_bytes
from idap.divergence.criteria import opener_of
from idap.divergence.measure import Divergence
from idap.errors import IdapError, RunFolderError
from idap.ownership import seal_place
from idap.progress import Progress
from idap.record import AFTER, RESULT, RUN, RunFolder, read_object
from idap.report.contents import RunEnd
from idap.report.reading import read_decisions, read_end, read_settings
from idap.saving.checkpoint import fingerprint
from idap.steps import Step
from idap.structure.analysis import Structure
from idap.training.batch import device_name, device_of
from idap.training.processes import on_main, process_count
from idap.training.task import Task

CHECKPOINTS_AT_LEAST = 3
"""Models of the original's size for which a run folder needs room."""


@contextmanager
def claim_run(folder: RunFolder | None, *, resume: bool) -> Iterator[None]:
    """Claim a run folder for this run, unless the caller has claimed it; process 0 holds it for all processes.

    Raises:
        RunFolderError: another process works on the run, or nothing can be written there; or the run is new, and the
            folder holds a run or other files.
    """
    if folder is None:
        yield
        return
    if not resume:
        on_main(folder.check)  # says what is wrong before anything is made
    mine = on_main(folder.claim)
    try:
        yield
    finally:
        if mine:
            folder.release()  # does nothing in processes that claimed nothing


def run_size(model: nn.Module) -> int:
    """Bytes for which a run folder needs room: accepted states and the result are smaller than the original."""
    return CHECKPOINTS_AT_LEAST * sum(tensor_bytes(model).values())


def tolerable_errors() -> tuple[type[Exception], ...]:
    """Errors of extra work after which the result is still kept; with several processes, those that all raise."""
    return (Exception,) if process_count() == 1 else (IdapError,)


@contextmanager
def resumable(folder: RunFolder | None) -> Iterator[None]:
    """Add to any exception that ends the work, Ctrl-C included, how a run with a folder can go on."""
    try:
        yield
    except BaseException as error:
        if folder is not None and not isinstance(error, RunFolderError):
            error.add_note(f"Every decision so far is in {folder.path}: the same call with resume=True goes on there.")
        raise


def begin_run(folder: RunFolder, settings: dict[str, Any], progress: Progress, *, resume: bool) -> tuple[Step, ...]:
    """Begin a run in its folder, or go on with it.

    Args:
        folder: of the run, claimed by this process.
        settings: of the run as it is now; the place and its seal are added to the environment.
        progress: receives what the user should know.
        resume: whether to go on with the run that the folder holds.

    Returns:
        The decisions that were taken, in order.

    Raises:
        RunFolderError: the folder can't be written, or holds another run.
    """
    place, keyless = seal_place(folder.path, settings.get("recipe"))
    settings["environment"] |= place
    if keyless:
        progress.say(
            f"Commands will ask before they run code that the recipe of this run names, since {keyless}. "
            "--trust runs it without asking."
        )
    if not resume:
        folder.open(settings)
        return ()
    folder.reopen(settings)
    past = read_decisions(folder.path, read_settings(folder.path))
    if read_object(folder.path / RUN).get("calibration") != settings["calibration"]:
        progress.say(
            "The calibration data are not those that the run was begun with: the data have changed, or the loader "
            "gives different samples each time. Earlier decisions stand; later ones may differ from those of an "
            "uninterrupted run."
        )
    return past


def settings_of(
    model: nn.Module, task: Task, config: Config, structure: Structure, baseline: float, cost: Cost, budget: Budget
) -> dict[str, Any]:
    """What is written before any work: the settings, a description of the model, and where the run takes place."""
    groups = structure.groups
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "fingerprint": fingerprint(structure.graph.shapes),
        "config": asdict(config) | {"criterion": opener_of(config.criterion)[0], "max_drop": config.drop},
        "task": {"metric": task.metric_name, "higher_is_better": task.higher_is_better, "worst": budget.worst},
        "baseline": {"metric": baseline, "macs": cost.macs, "parameters": cost.parameters, "size": cost.size},
        "environment": _environment(model),
        "groups": {
            group.name: {"kind": group.kind, "size": group.size, "stream": group.name in structure.streams}
            for group in groups
        },
        "blocks": {
            block.name: {
                "kind": block.kind,
                "contains": block.contains,
                "groups": [group.name for group in structure.groups_inside(block.name)],
            }
            for block in structure.blocks
        },
    }


def _environment(model: nn.Module) -> dict[str, Any]:
    try:
        own = version("idap")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "idap": own,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": device_name(device_of(model)),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }


def profile_of(found: Divergence, structure: Structure, keep: Keep) -> dict[str, Any]:
    """A measurement as plain numbers, in the order of the network.

    Args:
        found: the scores.
        structure: of the original.
        keep: units that the measured model has.

    Returns:
        The lowest, mean and highest divergence of the units of each group, the divergence of each branch and block,
        the parts that could not be measured, and notes, such as on groups that were measured in pieces.
    """
    units = {}
    for group in structure.groups:
        scores = found.units[group.name][list(keep[group.name])] if group.name in found.units else torch.zeros(0)
        if len(scores):
            low, mean, high = (float(value) for value in (scores.min(), scores.mean(), scores.max()))
            units[group.name] = {"low": low, "mean": mean, "high": high}
    blocks = {block.name: found.blocks[block.name] for block in structure.blocks if block.name in found.blocks}
    return {
        "criterion": found.criterion,
        "units": units,
        "blocks": blocks,
        "unmeasured": found.unmeasured,
        "notes": found.notes,
    }


def past_result(folder: RunFolder | None) -> RunEnd | None:
    """The recorded end of a finished run; None if the run is not finished.

    Raises:
        RunFolderError: the file is broken.
    """
    return None if folder is None else on_main(partial(read_end, folder.path))


def keep_end(context: RunContext, state: State, result: Result, *, untouched: bool) -> None:
    """Measure the divergence of the result, part by part, and write what was reached.

    The model is already saved. If the measurement fails, or can't be written, a line says so, and the report lacks it.

    Args:
        context: of the run, which has a folder.
        state: the state that the result was made from.
        result: what `compress` returns, without the seconds of this measurement.
        untouched: whether nothing was removed, so that there is nothing new to measure.
    """
    folder = context.services.folder
    assert folder is not None
    if not untouched:
        try:
            found = context.divergence(state)
            on_main(partial(folder.keep, AFTER, profile_of(found, context.subject.structure, state.keep)))
        except tolerable_errors() as error:
            context.services.progress.say(
                f"The divergence of the result could not be measured, so the report lacks it: {error}"
            )
    seconds = add_seconds(result.seconds, context.services.clock.take())
    on_main(partial(folder.keep, RESULT, _summary(result, seconds)))


def add_seconds(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The sum of seconds by kind of work.

    >>> add_seconds({"cut": 1.0}, {"cut": 2.0, "proof": 1.0})
    {'cut': 3.0, 'proof': 1.0}
    """
    return {kind: one.get(kind, 0.0) + other.get(kind, 0.0) for kind in (*one, *(k for k in other if k not in one))}


def _summary(result: Result, seconds: Mapping[str, float]) -> dict[str, Any]:
    return {
        "reached": result.reached,
        "message": result.message,
        "metric": result.metric,
        "macs": result.macs[1],
        "parameters": result.parameters[1],
        "size": result.size[1],
        "latency": result.latency,
        "output_error": None if math.isnan(result.output_error) else result.output_error,
        "removed": result.plan.removed,
        "seconds": seconds,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }
