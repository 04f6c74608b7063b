"""Run a compression: analyse the model, cut width, cut depth, finish, and say what was reached."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from idap.compress.config import Config, check_config
from idap.compress.context import RunContext
from idap.compress.folder import begin_run, claim_run, resumable
from idap.compress.journal import Journal
from idap.compress.outcome import final_recovery, finish_run
from idap.compress.prepare import check_arguments, optimizer_slicer, prepare_run, samples_digest
from idap.compress.result import Result
from idap.compress.stages.filters import filter_stage
from idap.compress.stages.layers import layer_stage
from idap.compress.state import State
from idap.errors import ConfigError
from idap.progress import Progress, Silent
from idap.record import RunFolder
from idap.saving.checkpoint import weights_digest
from idap.surgery.optimizer import hyperparameters
from idap.training.processes import is_main, on_main
from idap.training.task import Task


def compress(
    model: nn.Module,
    task: Task,
    config: Config | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    run_dir: str | Path | RunFolder | None = None,
    resume: bool = False,
    recipe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compress a trained model in two stages, filters and then layers, within a budget.

    Args:
        model: the trained model; it is not changed. It is the teacher in every recovery.
        task: its data, loss and metric. Training data train and calibrate, validation data decide.
        config: goals and settings.
        optimizer: an optimiser of the model's parameters; it is not changed. Each recovery trains with a copy of it
            that is cut like the model, momentum included, instead of the optimiser that the settings describe; their
            warmup and decay of the learning rate still apply. None: the optimiser that the settings describe is used.
        run_dir: a new or empty folder for the record of the run, its accepted states and the result; None: nothing is
            written. The folder is claimed for this process until the run ends, unless it is a `RunFolder` that the
            caller has claimed.
        resume: go on with the run in `run_dir`, which may have been stopped at any moment; if no run was begun there,
            begin it. Decisions that were taken are recalled, not taken again, and the result is that of a run that
            was not stopped.
        recipe: how model, task and `config` are made, as sections of a recipe file; it is written to `run_dir`, so that
            `idap resume` and `idap export` can make them again, and serves the card of the result.
        progress: the listener that receives every phase and every decision; None: nothing is reported.

    In a distributed run (`torch.distributed` initialised) every process calls this with the same arguments. All take
    the same decisions and end with the same model. Process 0 alone writes the folder, and all must be able to read it.

    Returns:
        The compressed model with its plan, costs, metrics and decisions. It keeps the accuracy budget on the validation
        data, measured after the last change; if a target was not reached, the message says why.

    Raises:
        TaskError, TraceError, StructureError, BudgetError, ConfigError, RunFolderError: before any work is done.
        VerificationError: a cut model did not equal the masked original; the message names the axis.
    """
    check_arguments(model, task, optimizer, run_dir, recipe)
    config, progress = check_config(config), (progress if is_main() else None) or Silent()
    if resume and run_dir is None:
        raise ConfigError("to go on with a run, say where it is: resume=True needs run_dir.")
    folder = RunFolder(run_dir) if isinstance(run_dir, str | Path) else run_dir
    with claim_run(folder, resume=resume):
        return _compress(model, task, config, folder, progress, optimizer=optimizer, resume=resume, recipe=recipe)


def _compress(
    model: nn.Module,
    task: Task,
    config: Config,
    folder: RunFolder | None,
    progress: Progress,
    *,
    optimizer: torch.optim.Optimizer | None,
    resume: bool,
    recipe: Mapping[str, Any] | None,
) -> Result:
    """Compress a model; the folder is claimed already."""
    context, state, removable, settings = prepare_run(model, task, config, folder, progress, resume=resume)
    if optimizer is not None:
        context = replace(
            context, services=replace(context.services, optimizer=optimizer_slicer(optimizer, model, context))
        )
        settings["optimizer"] = hyperparameters(optimizer)
    if recipe is not None:
        settings["recipe"] = dict(recipe)
    if folder is not None:  # only then, since every weight is read
        settings["weights"] = weights_digest(model)
        settings["calibration"] = samples_digest(context.subject.calibration)
    settings["preparation"] = preparation = context.services.clock.take()
    past = () if folder is None else on_main(partial(begin_run, folder, settings, progress, resume=resume))
    context.services.layer_times.keep_least()
    journal = Journal(context, state.metric, past, preparation)
    with resumable(folder):
        end = final_recovery(context, state, _stages(context, state, removable, journal), journal)
        return finish_run(context, state, end, journal, recipe)


def _stages(context: RunContext, state: State, removable: list[str], journal: Journal) -> State:
    """Cut width and depth in the order that the settings give."""
    config, goal = context.goals.config, context.goals.budget
    width, depth = config.filters.steps > 0, config.layers.removals > 0
    if config.order == "interleaved" and width:
        return filter_stage(context, state, goal, journal, blocks=removable if depth else ())
    if config.order == "layers-filters" and depth:
        shares = context.shares(state)
        aim = goal.part_way(shares, 1 - config.filters_share) if width else goal
        state = layer_stage(context, state, aim, journal, removable)
        return filter_stage(context, state, goal, journal) if width else state
    if width:
        aim = goal.part_way(context.shares(state), config.filters_share) if depth else goal
        state = filter_stage(context, state, aim, journal)
    if not depth:
        return state
    if not width or not goal.targets:
        return layer_stage(context, state, goal, journal, removable)
    return _depth_and_rest(context, state, journal, removable)


def _depth_and_rest(context: RunContext, state: State, journal: Journal, removable: list[str]) -> State:
    """Cut depth, then width to the targets; if filters don't reach them, the remaining layers are tried after all."""
    goal, before = context.goals.budget, len(journal.steps)
    refused = before > 0 and not journal.steps[-1].accepted  # the budget ended stage 1, and would do so again
    contested = context.goals.config.layers.against == "filters" and not refused
    shallow = layer_stage(context, state, goal, journal, removable, contested=contested)
    turn = journal.steps[before:]
    in_a_row = len(list(takewhile(lambda step: step.is_refused, reversed(turn))))
    narrow = shallow  # filters save what stage 2 left over
    if shallow is not state or not refused:
        narrow = filter_stage(context, shallow, goal, journal)
    if not goal.misses(context.shares(narrow)) or in_a_row >= context.goals.config.layers.patience:
        return narrow
    essential = {step.removed[0].name for step in turn if step.is_refused}
    remaining = [name for name in removable if name not in essential]
    last = layer_stage(context, narrow, goal, journal, remaining, alone=True)
    return last if last is narrow else filter_stage(context, last, goal, journal)
