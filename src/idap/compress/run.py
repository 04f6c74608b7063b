"""The story of a run: look at the model, cut width, cut depth, finish, and say what was reached."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from idap.compress.budget import budget_of
from idap.compress.change import recover
from idap.compress.clock import Clock
from idap.compress.config import Config, checked
from idap.compress.features import check_features
from idap.compress.filters import filter_stage
from idap.compress.folder import begin_run, claimed, resumable, run_size, settings_of
from idap.compress.journal import Decision, Journal
from idap.compress.layer_times import LayerTimes, measured, recalled
from idap.compress.layers import layer_stage
from idap.compress.least import least_shares
from idap.compress.outcome import concluded
from idap.compress.proving import proved
from idap.compress.result import Result
from idap.compress.samples import calibration_batches, few_samples, samples_digest
from idap.compress.state import Setting, State
from idap.cost.count import CostModel, saved_tensors
from idap.errors import ConfigError, TaskError
from idap.files import plain
from idap.graph.trace import trace
from idap.progress import Phase, Progress, Silent
from idap.record import RunFolder
from idap.saving.checkpoint import fingerprint, weights_digest
from idap.saving.origin import checked_origin
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.compare import batch_size, resized_inputs
from idap.surgery.optimizer import hyperparameters, slice_optimizer
from idap.training.batch import Inputs, describe, device_of
from idap.training.check import check_model, check_task
from idap.training.evaluate import Score, score
from idap.training.processes import align_, is_main, on_main
from idap.training.split import with_validation
from idap.training.task import Task

TRACED_SAMPLES = 2


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
        model: the trained model; it is left exactly as it is, and is the teacher of its successors.
        task: its data, loss and metric. Training data train and calibrate, validation data decide.
        config: goals and settings.
        optimizer: of the model's parameters, left as it is. Each recovery trains with a copy of it that is cut as the
            model was, momentum included, instead of the optimiser that the settings describe; of these, warmup and
            the fall of the learning rate stay. None: the settings say all.
        run_dir: a new or empty folder for the record of the run, its accepted states and the result; None keeps none.
            It is claimed for this process until the run ends, unless it is a `RunFolder` that the caller has claimed.
        resume: go on with the run in `run_dir` that was stopped, at whatever moment; a run that was never begun there
            begins. Decisions that were taken are recalled, not taken again, and the result is that of a run that was
            not stopped.
        recipe: how model, task and `config` are made, as sections of a recipe file; kept in `run_dir` for whoever makes
            them again, as `idap resume` and `idap export` do, and for the card of the result.
        progress: hears of every phase and every decision.

    In a distributed run (`torch.distributed` initialised) every process calls this with the same arguments: all decide
    the same and end with the same model, and process 0 alone writes the folder, which all must be able to read.

    Returns:
        The smaller model with its plan, costs, metrics and decisions. It keeps the accuracy budget on the validation
        data, measured after the last change; if a target was not reached, the message says why.

    Raises:
        TaskError, TraceError, StructureError, BudgetError, ConfigError, RunFolderError: before any work is done.
        VerificationError: a cut did not equal the masked original; names the axis.
    """
    _check_arguments(model, task, optimizer, run_dir, recipe)
    config, progress = checked(config), (progress if is_main() else None) or Silent()
    if resume and run_dir is None:
        raise ConfigError("to go on with a run, say where it is: resume=True needs run_dir.")
    folder = RunFolder(run_dir) if isinstance(run_dir, str | Path) else run_dir
    with claimed(folder, resume=resume):
        return _carried_out(model, task, config, folder, progress, optimizer=optimizer, resume=resume, recipe=recipe)


def _carried_out(
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
    """Compress in a folder that is claimed."""
    setting, state, removable, settings = _prepare(model, task, config, folder, progress, resume=resume)
    if optimizer is not None:
        setting = replace(setting, optimizer=_slicer(optimizer, model, setting))
        settings["optimizer"] = hyperparameters(optimizer)
    if recipe is not None:
        settings["recipe"] = dict(recipe)
    if folder is not None:  # every weight is read
        settings["weights"] = weights_digest(model)
        settings["calibration"] = samples_digest(setting.calibration)
    settings["preparation"] = preparation = setting.clock.take()
    past = () if folder is None else on_main(partial(begin_run, folder, settings, progress, resume=resume))
    setting.layer_times.keep_least()
    journal = Journal(setting, state.metric, past, preparation)
    with resumable(folder):
        end = _finish(setting, state, _stages(setting, state, removable, journal), journal)
        return concluded(setting, state, end, journal, recipe)


def _check_arguments(model: nn.Module, task: object, optimizer: object, run_dir: object, recipe: object) -> None:
    """Refuse what is of another kind than it should be.

    Raises:
        TaskError, ConfigError: names the argument.
    """
    check_model(model)
    if not isinstance(task, Task):
        raise TaskError(f"the task is {describe(task)}; expected an idap.Task, such as idap.classification(...) makes.")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer must be a torch.optim.Optimizer of the model's parameters, found {optimizer!r}.")
    if run_dir is not None and (not isinstance(run_dir, str | Path | RunFolder) or "\0" in str(run_dir)):
        raise ConfigError(f"run_dir must be the path of a folder, found {run_dir!r}.")
    if recipe is None:
        return
    try:
        sections = isinstance(recipe, Mapping) and all(isinstance(part, Mapping) for part in recipe.values())
        json.dumps(recipe, default=plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe can't be written down as JSON: {error}.") from error
    if not sections:
        raise ConfigError(f"recipe must be the sections of a recipe file by name, found {recipe!r:.80}.")


def _stages(setting: Setting, state: State, removable: list[str], journal: Journal) -> State:
    """Cut width and depth in the order that is set."""
    config, goal = setting.config, setting.budget
    width, depth = config.filters.steps > 0, config.layers.removals > 0
    if config.order == "interleaved" and width:
        return filter_stage(setting, state, goal, journal, blocks=removable if depth else ())
    if config.order == "layers-filters" and depth:
        shares = setting.shares(state)
        aim = goal.part_way(shares, 1 - config.filters_share) if width else goal
        state = layer_stage(setting, state, aim, journal, removable)
        return filter_stage(setting, state, goal, journal) if width else state
    if width:
        aim = goal.part_way(setting.shares(state), config.filters_share) if depth else goal
        state = filter_stage(setting, state, aim, journal)
    if not depth:
        return state
    if not width or not goal.targets:
        return layer_stage(setting, state, goal, journal, removable)
    return _depth_and_rest(setting, state, journal, removable)


def _depth_and_rest(setting: Setting, state: State, journal: Journal, removable: list[str]) -> State:
    """Cut depth, then width down to the targets; layers that were spared go after all if filters don't come there."""
    goal, before = setting.budget, len(journal.steps)
    refused = before > 0 and not journal.steps[-1].accepted  # the budget ended stage 1, and would end it again
    contested = setting.config.layers.against == "filters" and not refused
    shallow = layer_stage(setting, state, goal, journal, removable, contested=contested)
    turn = journal.steps[before:]
    in_a_row = len(list(takewhile(lambda step: step.refused, reversed(turn))))
    narrow = shallow  # what stage 2 left over is for filters
    if shallow is not state or not refused:
        narrow = filter_stage(setting, shallow, goal, journal)
    if not goal.missed(setting.shares(narrow)) or in_a_row >= setting.config.layers.patience:
        return narrow
    essential = {step.removed[0].name for step in turn if step.refused}
    spared = [name for name in removable if name not in essential]
    last = layer_stage(setting, narrow, goal, journal, spared, alone=True)
    return last if last is narrow else filter_stage(setting, last, goal, journal)


def _slicer(
    optimizer: torch.optim.Optimizer, model: nn.Module, setting: Setting
) -> Callable[[nn.Module, Plan], torch.optim.Optimizer]:
    """What cuts a user's optimiser; tried once, before any work."""

    def sliced(small: nn.Module, plan: Plan) -> torch.optim.Optimizer:
        return slice_optimizer(optimizer, model, small, plan)

    plan = setting.structure.plan({group.name: range(0, group.size, 2) for group in setting.structure.groups})
    sliced(apply_plan(setting.original, plan), plan)
    return sliced


def _prepare(
    model: nn.Module,
    task: Task,
    config: Config,
    folder: RunFolder | None,
    progress: Progress,
    *,
    resume: bool = False,
) -> tuple[Setting, State, list[str], dict[str, Any]]:
    """Check everything that can be checked before any work; measure where we stand."""
    if folder is not None and not resume:
        on_main(partial(folder.check, size=run_size(model)))
    clock = Clock()
    task = _validated(task, config, progress)
    with progress.phase("check", 4) as phase, clock.on("structure"):
        structure, example = looked_at(model, task, config, phase)
        checked_origin(model, structure.plan({}))
        check_features(structure, config.recovery, config.final)
        original = apply_plan(model, Plan(shapes=structure.graph.shapes))  # a copy: the teacher
        align_(original)
        with clock.on("proof"):
            removable, config = proved(original, structure, example, progress, config)
        phase.advance("proof")
        with clock.on("judging"):
            val = _judged(original, task, progress)
        phase.advance("baseline")
    costs = CostModel(structure, batch_size(*example) or 1, saved_tensors(model))
    whole = costs.cost()
    timed = resized_inputs(*task.example(device_of(model)), config.latency_batch)
    at_least, table = recalled(folder, model, fingerprint(structure.graph.shapes), progress, resume=resume)
    with clock.on("latency"):
        least = least_shares(original, structure, costs, config, removable, timed, at_least)
    budget = budget_of(
        config, val.metric, higher_is_better=task.higher_is_better, least=least, blocked=structure.blocked
    )
    setting = Setting(
        original=original,
        task=task,
        config=config,
        structure=structure,
        costs=costs,
        example=example,
        whole=whole,
        budget=budget,
        progress=progress,
        folder=folder,
        calibration=calibration_batches(task, config),
        timed=timed,
        layer_times=LayerTimes(
            partial(measured, original, structure, timed, progress, few=example),
            file=None if folder is None else folder.latency,
            least=least.get("latency"),
            known=table,
            progress=progress,
        ),
        clock=clock,
        val=val,
    )
    settings = settings_of(model, task, config, structure, val.metric, whole, budget)
    return setting, setting.untouched(val.metric), removable, settings


def _validated(task: Task, config: Config, progress: Progress) -> Task:
    """The task with validation data, and what its reader should know of the data, said."""
    task, told = with_validation(task, seed=config.seed)
    for note in (*task.notes, told):
        if note:
            progress.say(f"{note[:1].upper()}{note[1:]}.")
    return task


def _judged(original: nn.Module, task: Task, progress: Progress) -> Score:
    """Judge the original, and say where it gives no numbers itself."""
    found = score(original, task)
    if found.broken:
        progress.say(f"The original's outputs hold NaN on {found.broken} of {found.batches} validation batches.")
    return found


def looked_at(model: nn.Module, task: Task, config: Config, phase: Phase) -> tuple[Structure, Inputs]:
    """Check a model and its data together, and find its structure.

    Returns:
        The structure, and the few samples that the model was traced with.
    """
    check_task(model, task, trains=config.recovery.trains or (config.final is not None and config.final.trains))
    phase.advance("task")
    example = few_samples(task.example(device_of(model)), TRACED_SAMPLES)
    structure = analyze(
        trace(model, *example),
        freeze_unknown=config.freeze_unknown,
        contracts=config.contracts,
        swap=config.swap,
        replacement=config.layers.replacement,
    )
    phase.advance("structure")
    return structure, example


def _finish(setting: Setting, start: State, state: State, journal: Journal) -> State:
    """Train the last accepted state once more; keep the better of the two."""
    recovery = setting.config.final or setting.config.recovery
    if state is start or not recovery.trains:
        return state
    journal.begin()
    found = journal.recall("final", state)
    if found is None:
        model = apply_plan(state.model, Plan(shapes={name: state.plan.shape_after(name) for name in _held(state)}))
        metric, fault = recover(setting, model, state.plan, "final recovery", recovery)
        latency = setting.latency_of(model)
        found = Decision(replace(state, model=model, metric=metric, latency=latency, fault=fault), [])
    metric, fault, higher = found.state.metric, found.state.fault, setting.task.higher_is_better
    accepted = not fault and (metric >= state.metric if higher else metric <= state.metric)
    equal = "as good as before" if metric == state.metric else "the best so far"
    reason = fault or (equal if accepted else "no better than before")
    journal.note("final", found, accepted=accepted, reason=reason)
    return found.state if accepted else state


def _held(state: State) -> list[str]:
    return [name for name in state.plan.shapes if not state.plan.gone(name)]
