"""The story of a run: look at the model, cut width, cut depth, finish, and say what was reached."""

import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from idap.compress.budget import budget_of
from idap.compress.config import Config
from idap.compress.filters import filter_stage, least_units
from idap.compress.journal import Journal
from idap.compress.layers import layer_stage
from idap.compress.result import Result
from idap.compress.state import Setting, State, calibration_batches, few_samples
from idap.cost.count import Cost, CostModel
from idap.divergence.criteria import opener_of
from idap.errors import ConfigError, PlanError, VerificationError
from idap.graph.trace import trace
from idap.progress import Phase, Progress, Silent
from idap.record import RunFolder
from idap.saving.checkpoint import fingerprint, save
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from idap.training.batch import Inputs, device_of
from idap.training.check import check_task
from idap.training.evaluate import evaluate, output_error
from idap.training.task import Task

TRACED_SAMPLES = 2


def compress(
    model: nn.Module,
    task: Task,
    config: Config | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Compress a trained model in two stages, filters and then layers, within a budget.

    Args:
        model: the trained model; it is left exactly as it is, and is the teacher of its successors.
        task: its data, loss and metric. Training data train and calibrate, validation data decide.
        config: goals and settings.
        run_dir: a new or empty folder for the record of the run, its accepted states and the result; None keeps none.
        resume: go on with the run in `run_dir` that was stopped, at whatever moment; a run that was never begun there
            begins. Decisions that were taken are recalled, not taken again, and the result is that of a run that was
            not stopped.
        progress: hears of every phase and every decision.

    Returns:
        The smaller model with its plan, costs, metrics and decisions. It keeps the accuracy budget on the validation
        data, measured after the last change; if a target was not reached, the message says why.

    Raises:
        TaskError, TraceError, StructureError, BudgetError, ConfigError, RunFolderError: before any work is done.
        VerificationError: a cut did not equal the masked original; names the axis.
    """
    config, progress = config or Config(), progress or Silent()
    if resume and run_dir is None:
        raise ConfigError("to go on with a run, say where it is: resume=True needs run_dir.")
    folder = RunFolder(run_dir) if run_dir is not None else None
    setting, state, removable, settings = _prepare(model, task, config, folder, progress, resume=resume)
    past: list[dict[str, Any]] = []
    if folder is not None and resume:
        past = folder.reopen(settings)
    elif folder is not None:
        folder.open(settings)
    journal = Journal(setting, state.cost, past)
    start, goal = state, setting.budget
    if config.filters.steps:
        state = filter_stage(setting, state, goal.part_way(state.cost, config.filters_share), journal)
    if config.layers.removals:
        state = layer_stage(setting, state, goal, journal, removable)
    if config.filters.steps and (goal.macs or goal.parameters):
        state = filter_stage(setting, state, goal, journal)  # what stage 2 left over
    state = _finish(setting, start, state, journal)
    return _conclude(setting, start, state, journal)


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
        folder.check()
    with progress.phase("check", 4) as phase:
        structure, example = looked_at(model, task, config, phase)
        original = apply_plan(model, Plan(shapes=structure.graph.shapes))  # a copy: the teacher
        removable = _proved(original, structure, example, progress)
        phase.advance("proof")
        costs = CostModel(structure, _batch(example))
        keep = {group.name: tuple(range(group.size)) for group in structure.groups}
        baseline = evaluate(original, task)
        phase.advance("baseline")
    whole = costs.cost(keep)
    least = _least(structure, costs, config, removable)
    budget = budget_of(config, baseline, whole, higher_is_better=task.higher_is_better, least=least)
    batches = calibration_batches(task, config)
    setting = Setting(original, task, config, structure, costs, example, budget, progress, folder, batches)
    state = State(original, keep, (), structure.plan(keep), whole, baseline)
    return setting, state, removable, _settings(model, config, structure, baseline, whole)


def looked_at(model: nn.Module, task: Task, config: Config, phase: Phase) -> tuple[Structure, Inputs]:
    """Check a model and its data together, and find its structure.

    Returns:
        The structure, and the few samples that the model was traced with.
    """
    check_task(model, task)
    phase.advance("task")
    example = few_samples(task.example(device_of(model)), TRACED_SAMPLES)
    structure = analyze(trace(model, *example), contracts=config.contracts, swap=config.swap)
    phase.advance("structure")
    return structure, example


def _proved(original: nn.Module, structure: Structure, example: Inputs, progress: Progress) -> list[str]:
    """Try the structure on the real model before hours of work: every group cut at once, every block removed singly.

    Returns:
        The branches and blocks that may be removed; those whose removal could not be proved are reported.

    Raises:
        VerificationError: a group's cut is not what was planned; names the group.
    """
    halves = {group.name: tuple(range(0, group.size, 2)) for group in structure.groups}
    try:
        _try(original, structure, example, halves, ())
    except (VerificationError, PlanError):
        for name, units in halves.items():
            _try(original, structure, example, {name: units}, ())
        raise
    removable = []
    for block in structure.blocks:
        try:
            _try(original, structure, example, {}, (block.name,))
            removable.append(block.name)
        except (VerificationError, PlanError) as error:
            progress.say(f"{block.kind} {block.name} stays: {error}")
    return removable


def _try(
    original: nn.Module,
    structure: Structure,
    example: Inputs,
    keep: dict[str, tuple[int, ...]],
    removed: tuple[str, ...],
) -> None:
    plan = structure.plan(keep, removed)
    verify(structure, original, apply_plan(original, plan), plan, example)


def _least(structure: Structure, costs: CostModel, config: Config, removable: list[str]) -> Cost:
    """The lowest cost that the settings allow."""
    keep = {group.name: tuple(range(group.size)) for group in structure.groups}
    if config.filters.steps:
        keep = {name: tuple(range(count)) for name, count in least_units(structure, config.filters).items()}
    removed: list[str] = []
    if config.layers.removals:
        blocks = [structure.block(name) for name in removable]
        whole = {inner for block in blocks for inner in block.contains}
        removed = [block.name for block in blocks if block.name not in whole]
    return costs.cost(keep, removed)


_FINAL = {True: "the best so far", False: "no better than before"}


def _finish(setting: Setting, start: State, state: State, journal: Journal) -> State:
    """Train the last accepted state once more; keep the better of the two."""
    recovery = setting.config.final or setting.config.recovery
    if state is start or not recovery.trains:
        return state
    recalled = journal.recall("final", state)
    if recalled is not None:
        metric, better = recalled[0].metric, setting.task.higher_is_better
        accepted = metric >= state.metric if better else metric <= state.metric
        journal.note("final", recalled[0], [], accepted=accepted, reason=_FINAL[accepted])
        return recalled[0] if accepted else state
    model = apply_plan(state.model, Plan(shapes={name: state.plan.shape_after(name) for name in _held(state)}))
    metric = setting.recover(model, "final recovery", recovery)
    accepted = metric >= state.metric if setting.task.higher_is_better else metric <= state.metric
    candidate = replace(state, model=model, metric=metric)
    journal.note("final", candidate, [], accepted=accepted, reason=_FINAL[accepted])
    return candidate if accepted else state


def _held(state: State) -> list[str]:
    return [name for name in state.plan.shapes if not state.plan.gone(name)]


def _conclude(setting: Setting, start: State, state: State, journal: Journal) -> Result:
    reached, message = _verdict(setting, start, state, journal)
    result = Result(
        model=state.model,
        plan=state.plan,
        steps=tuple(journal.steps),
        baseline=start.metric,
        metric=state.metric,
        macs=(start.cost.macs, state.cost.macs),
        parameters=(start.cost.parameters, state.cost.parameters),
        output_error=output_error(state.model, setting.original, setting.task),
        reached=reached,
        message=message,
        metric_name=setting.task.metric_name,
    )
    if setting.folder is not None:
        save(setting.folder.model, state.model, state.plan)
    return result


def _verdict(setting: Setting, start: State, state: State, journal: Journal) -> tuple[bool, str]:
    goal, cost = setting.budget, state.cost
    if state is start:
        return False, "nothing could be removed within the budget; this is the original. Allow a larger max_drop"
    parts = []
    for name, wanted, found, whole in (
        ("MACs", goal.macs, cost.macs, start.cost.macs),
        ("parameters", goal.parameters, cost.parameters, start.cost.parameters),
    ):
        if wanted is not None and found > wanted:
            parts.append(f"{name} came down to {found / whole:.1%}, not to {wanted / whole:.1%}")
    if parts:
        rejected = any(not step.accepted for step in journal.steps if step.stage != "final")
        why = "every further step left the accuracy budget" if rejected else "the steps were used up"
        return False, f"{' and '.join(parts)}: {why}. Allow a larger max_drop, more steps or a longer recovery"
    return True, "every goal was reached"


def _batch(example: Inputs) -> int:
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    return int(tensors[0].shape[0]) if tensors else 1


def _settings(model: nn.Module, config: Config, structure: Structure, baseline: float, cost: Cost) -> dict[str, Any]:
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "fingerprint": fingerprint(structure.graph.shapes),
        "config": asdict(config) | {"criterion": opener_of(config.criterion)[0]},
        "baseline": {"metric": baseline, "macs": cost.macs, "parameters": cost.parameters},
        "environment": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "command": sys.argv,
        },
        "groups": {group.name: {"kind": group.kind, "size": group.size} for group in structure.groups},
        "blocks": [block.name for block in structure.blocks],
    }
