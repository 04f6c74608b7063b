"""Prepare a run before the first cut: check the arguments, analyse and judge the model, set up measurements."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from idap.compress.budget import Budget, budget_of
from idap.compress.config import Config
from idap.compress.context import Goals, RunContext, Services, Subject
from idap.compress.features import check_features
from idap.compress.folder import run_size, settings_of
from idap.compress.latency_table import LayerTimes, load_times, measure_times
from idap.compress.limits import smallest_shares, verify_cuts
from idap.compress.state import Clock, State
from idap.cost.count import CostModel, tensor_bytes
from idap.divergence.measure import Divergence
from idap.errors import ConfigError, TaskError
from idap.files import plain
from idap.graph.trace import trace
from idap.progress import Phase, Progress, Silent
from idap.record import RunFolder
from idap.saving.checkpoint import check_origin, fingerprint
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.compare import batch_size, resize_inputs
from idap.surgery.optimizer import slice_optimizer
from idap.training.batch import Batch, Inputs, describe, device_of, move, seed_loader, tensors_of
from idap.training.check import check_model, check_task, with_validation
from idap.training.evaluate import Score, score
from idap.training.processes import align_, on_main
from idap.training.task import Task


def calibration_batches(task: Task, config: Config) -> tuple[Any, ...]:
    """The first batches of the calibration data; a loader that shuffles uses the run's seed."""
    batches = task.batches("calibration")
    with seed_loader(batches, config.seed):
        return tuple(islice(batches, config.calibration_batches))


def samples_digest(batches: Sequence[Batch]) -> str:
    """A short hash of every tensor in some batches."""
    found = hashlib.sha256()
    for tensor in tensors_of(move(batches, "cpu")):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def few_samples(example: Inputs, count: int) -> Inputs:
    """The first samples of example inputs; tensors whose first dimension is the batch are shortened."""
    return resize_inputs(*example, min(count, batch_size(*example) or 1))


def profile(
    model: nn.Module, task: Task, config: Config | None = None, *, progress: Progress | None = None
) -> tuple[Structure, Divergence]:
    """Measure the divergence of every unit, branch and block of a model.

    Args:
        model: the trained model; it is not changed.
        task: its data; the calibration split is used for the measurement.
        config: of its settings, the criterion, the calibration batches, contracts, swap, freeze_unknown,
            `layers.replacement` and the seed have an effect.
        progress: the listener that receives the phases; None: nothing is reported.

    Returns:
        The structure, which says what may be removed, and the divergence of each part. Branches and blocks have the
        relative form if the criterion does not score them. A block that may become a projection has the error that the
        best one leaves.

    Raises:
        TaskError, TraceError, StructureError: the model and its data don't fit together.
    """
    config, progress = config or Config(), progress or Silent()
    with progress.phase("divergence", 3) as phase:
        structure, example = analyze_model(model, task, config, phase)
        costs = CostModel(structure, 1)
        context = RunContext(
            Subject(
                original=model,
                task=task,
                structure=structure,
                costs=costs,
                example=example,
                whole=costs.cost(),
                calibration=calibration_batches(task, config),
                timed=example,
            ),
            Goals(config=config, budget=Budget(None, task.higher_is_better)),
            Services(
                progress=progress,
                folder=None,
                layer_times=LayerTimes(partial(measure_times, model, structure, example, progress)),
            ),
        )
        found = context.divergence(context.initial_state())
        phase.advance("divergence")
    return structure, found


TRACED_SAMPLES = 2


def check_arguments(model: nn.Module, task: object, optimizer: object, run_dir: object, recipe: object) -> None:
    """Refuse arguments of the wrong type.

    Raises:
        TaskError, ConfigError: the message names the argument.
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


def optimizer_slicer(
    optimizer: torch.optim.Optimizer, model: nn.Module, context: RunContext
) -> Callable[[nn.Module, Plan], torch.optim.Optimizer]:
    """The function that cuts a user's optimiser; it is tried once, before any work."""

    def slice_for(small: nn.Module, plan: Plan) -> torch.optim.Optimizer:
        return slice_optimizer(optimizer, model, small, plan)

    plan = context.subject.structure.plan(
        {group.name: range(0, group.size, 2) for group in context.subject.structure.groups}
    )
    slice_for(apply_plan(context.subject.original, plan), plan)
    return slice_for


def prepare_run(
    model: nn.Module,
    task: Task,
    config: Config,
    folder: RunFolder | None,
    progress: Progress,
    *,
    resume: bool = False,
) -> tuple[RunContext, State, list[str], dict[str, Any]]:
    """Check everything that can be checked before any work, and judge the original."""
    if folder is not None and not resume:
        on_main(partial(folder.check, size=run_size(model)))
    clock = Clock()
    task = _add_validation(task, config, progress)
    with progress.phase("check", 4) as phase, clock.on("structure"):
        structure, example = analyze_model(model, task, config, phase)
        check_origin(model, structure.plan({}))
        check_features(structure, config.recovery, config.final)
        original = apply_plan(model, Plan(shapes=structure.graph.shapes))  # a copy: the teacher
        align_(original)
        with clock.on("proof"):
            removable, config = verify_cuts(original, structure, example, progress, config)
        phase.advance("proof")
        with clock.on("judging"):
            val = _judge_original(original, task, progress)
        phase.advance("baseline")
    costs = CostModel(structure, batch_size(*example) or 1, tensor_bytes(model))
    whole = costs.cost()
    timed = resize_inputs(*task.example(device_of(model)), config.latency_batch)
    at_least, table = load_times(folder, model, fingerprint(structure.graph.shapes), progress, resume=resume)
    with clock.on("latency"):
        least = smallest_shares(original, structure, costs, config, removable, timed, at_least)
    budget = budget_of(
        config, val.metric, higher_is_better=task.higher_is_better, least=least, blocked=structure.blocked
    )
    layer_times = LayerTimes(
        partial(measure_times, original, structure, timed, progress, few=example),
        file=None if folder is None else folder.latency,
        least=least.get("latency"),
        known=table,
        progress=progress,
    )
    context = RunContext(
        Subject(original, task, structure, costs, example, whole, calibration_batches(task, config), timed, val),
        Goals(config=config, budget=budget),
        Services(progress=progress, folder=folder, layer_times=layer_times, clock=clock),
    )
    settings = settings_of(model, task, config, structure, val.metric, whole, budget)
    return context, context.initial_state(val.metric), removable, settings


def _add_validation(task: Task, config: Config, progress: Progress) -> Task:
    """The task with validation data; what the user should know of the data is reported."""
    task, told = with_validation(task, seed=config.seed)
    for note in (*task.notes, told):
        if note:
            progress.say(f"{note[:1].upper()}{note[1:]}.")
    return task


def _judge_original(original: nn.Module, task: Task, progress: Progress) -> Score:
    """Judge the original, and report if its own outputs hold NaN."""
    found = score(original, task)
    if found.broken:
        progress.say(f"The original's outputs hold NaN on {found.broken} of {found.batches} validation batches.")
    return found


def analyze_model(model: nn.Module, task: Task, config: Config, phase: Phase) -> tuple[Structure, Inputs]:
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
