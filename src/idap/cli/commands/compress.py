"""`idap compress`: run both stages, from a recipe or from a model and a task."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from idap.cli.failure import GOAL_MISSED, Outcome
from idap.cli.options import (
    DataPath,
    Debug,
    Json,
    LatencyShare,
    Macs,
    MaxDrop,
    ModelSpec,
    Overrides,
    Parameters,
    Quiet,
    RecipeFile,
    Resume,
    RunDir,
    Size,
    TaskSpec,
    TensorBoardDir,
    Verbose,
    WeightsPath,
)
from idap.cli.subject import claim_folder
from idap.cli.tables import Comparison, comparison_table
from idap.errors import ConfigError, RunFolderError
from idap.files import number_paths
from idap.progress import Progress
from idap.record import MEASURED, RunFolder, read_steps
from idap.tensorboard import TensorBoard

if TYPE_CHECKING:
    import torch
    from torch import nn

    from idap.compress.result import Result
    from idap.recipes.recipe import Recipe
    from idap.training.recovery import Recovery
    from idap.training.task import Task

MADE_BY = "idap.recipe"
"""Key of the note in a trained original's file of weights that holds the recipe that trained them."""

_MAKES = ("model", "data", "task", "train")
"""Sections of a recipe that determine the weights of the original."""

EXAMPLES = (
    "idap compress recipes/digits_resnet.toml --set goals.macs=40%",
    "idap compress --model python:net.py:build --task python:net.py:task --max-drop 0.01 --macs 0.5",
)
DOCUMENT = {
    "reached": "whether every goal was reached",
    "message": "what was reached, or why a goal was missed",
    "parameters": "`before` and `after`: number of parameters",
    "macs": "`before` and `after`: multiply-adds for one sample",
    "metric_name": "name of the metric",
    "val": "`before` and `after`: the metric on the validation data",
    "test": "`before` and `after`: the metric on the test data, which is used only once; null if there is none",
    "latency": "`before` and `after`: median seconds of one forward pass",
    "batch": "number of samples in that pass",
    "output_error": "squared difference of the outputs over the original's squared outputs, on the validation data",
    "run_dir": "folder of the run",
    "model": "folder of the result, for `idap.load`",
    "steps": "the decisions, as in `steps.jsonl`",
}
LATENCY_REPEATS = 30


def compress_command(  # noqa: PLR0913 - one argument per option
    recipe: RecipeFile = None,
    *,
    model: ModelSpec = None,
    task: TaskSpec = None,
    data: DataPath = None,
    weights: WeightsPath = None,
    max_drop: MaxDrop = None,
    macs: Macs = None,
    parameters: Parameters = None,
    size: Size = None,
    latency: LatencyShare = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    tensorboard: TensorBoardDir = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress a trained model: remove filters, then layers, within a budget of accuracy.

    The run folder holds every decision, the accepted models and the result, which idap.load reads. If a run is stopped,
    or even killed, `idap resume` continues it and comes to the same result.
    """
    where = str(recipe) if recipe is not None else model or "the command line"
    outcome = Outcome(command="idap compress", where=where, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    goals = {"max_drop": max_drop, "macs": macs, "parameters": parameters, "size": size, "latency": latency}
    settings = [*(overrides or []), *(f"goals.{name}={value}" for name, value in goals.items() if value is not None)]
    replaced = {"model.build": model, "task.build": task, "data.path": data, "model.weights": weights}
    with outcome.report():
        if recipe is None and (model is None or (task is None and data is None)):
            raise ConfigError("nothing to compress was given; give a recipe, or --model and either --data or --task.")
        from idap.recipes.recipe import read_recipe  # noqa: PLC0415 - torch is slow to import

        read = read_recipe(recipe, settings, replaced=replaced)
        reached = compress_recipe(outcome, read, run_dir or read.run_dir, resume=resume, tensorboard=tensorboard)
    if not reached:
        raise typer.Exit(GOAL_MISSED)


def compress_recipe(
    outcome: Outcome, recipe: "Recipe", wanted: Path | None, *, resume: bool, tensorboard: Path | None
) -> bool:
    """Compress as a recipe says, and show the result; if several processes were launched, they share the work.

    Args:
        outcome: reports the outcome of the command.
        recipe: names model, data, goals and settings.
        wanted: the run folder; None: a folder in `runs/` is chosen.
        resume: whether to continue the run in that folder.
        tensorboard: folder for the logs; None: no logs are written.

    Returns:
        Whether every goal was reached.
    """
    from idap.training.processes import is_main, join_processes  # noqa: PLC0415 - torch is slow to import

    with join_processes() as device:
        main = is_main()
        with claim_folder(wanted, recipe.name, resume=resume) as folder:
            outcome.run_dir = run_dir = folder.path
            progress = outcome.progress(is_main=main)
            board = tensorboard if main else None
            with nullcontext(progress) if board is None else _board(board, run_dir, progress) as listening:
                result, numbers = _run(recipe, folder, listening, device, resume=resume)
            if main:
                outcome.document = _document(result, numbers, run_dir)
            if main and not (outcome.as_json or outcome.quiet):
                _show(outcome.console, result, numbers, run_dir)
    return result.reached


def _board(folder: Path, run_dir: Path, progress: Progress) -> TensorBoard:
    """Pass progress on and log it; each start gets its own folder, so that the logs of a resumed run stay apart."""
    free = next(each for each in number_paths(folder / run_dir.resolve().name) if not each.exists())
    return TensorBoard(free, progress)


def _run(
    recipe: "Recipe", folder: RunFolder, progress: Progress, device: "torch.device", *, resume: bool
) -> tuple["Result", Comparison]:
    from idap.compress.folder import run_size  # noqa: PLC0415 - torch is slow to import
    from idap.compress.run import compress  # noqa: PLC0415 - as above
    from idap.training.processes import align_, on_main  # noqa: PLC0415 - as above

    config, about = recipe.config(), recipe.table()
    model, task = recipe.model().to(device), recipe.task()
    align_(model)
    if not resume:
        on_main(partial(folder.check, size=run_size(model)))
    training = recipe.training()
    if training is not None:
        made_by = json.dumps({name: about.get(name) for name in _MAKES}, sort_keys=True, default=str)
        _train(model, task, training, made_by, folder, progress, resume=resume)
    if _has_random_weights(recipe):
        progress.say(
            f"{recipe.network.build} has random weights: no file of weights is given (--weights FILE), and it is not "
            "trained first (--set train.epochs=10). The result says nothing about a trained model."
        )
    progress.say(f"Compressing {recipe.network.build} into {folder.path}: {_goals(config, task.metric_name)}.")
    with progress.phase("compress", None):
        result = compress(model, task, config, run_dir=folder, resume=resume, recipe=about, progress=progress)
    return result, _measure(model, result, task, folder, progress)


def _measure(model: "nn.Module", result: "Result", task: "Task", folder: RunFolder, progress: Progress) -> Comparison:
    """Measure the original and the result and write the numbers; if that fails, report it and keep the result."""
    from idap.compress.folder import tolerable_errors  # noqa: PLC0415 - torch is slow to import
    from idap.training.processes import on_main  # noqa: PLC0415 - as above

    numbers = _basic_numbers(result, task)
    try:
        numbers = compare(model, result, task, progress)
        on_main(lambda: folder.keep(MEASURED, numbers.to_json()))
    except tolerable_errors() as error:
        progress.say(
            f"The run is finished, but {folder.path / MEASURED}, with the latency and the metric on the test data, was "
            f"not written: {error}. To try again: idap resume {folder.path}"
        )
    return numbers


def _basic_numbers(result: "Result", task: "Task") -> Comparison:
    """The numbers of the original and the result that need no further measurement."""
    return Comparison(
        parameters=result.parameters,
        macs=result.macs,
        metric_name=task.metric_name,
        val=(result.baseline, result.metric),
    )


def _train(
    model: "nn.Module",
    task: "Task",
    training: "Recovery",
    made_by: str,
    folder: RunFolder,
    progress: Progress,
    *,
    resume: bool,
) -> None:
    """Train the original first and save its weights, so that a resumed run can load them."""
    from idap.compress.folder import run_size  # noqa: PLC0415 - torch is slow to import
    from idap.models.weights import check_keepable, keep_weights, load_weights, notes_in  # noqa: PLC0415 - as above
    from idap.training.fit import fit  # noqa: PLC0415 - as above
    from idap.training.processes import on_main  # noqa: PLC0415 - as above

    file = folder.original
    if resume and on_main(file.exists):
        if on_main(lambda: notes_in(file).get(MADE_BY)) != made_by:
            raise RunFolderError(
                f"{file} was trained with another [model], [data], [task] or [train] than the recipe has now. Go on "
                "with the recipe that trained it, or choose another folder."
            )
        load_weights(model, file, of_run=True)
        progress.say(f"The original was trained before: its weights are loaded from {file}.")
        return
    check_keepable(model)
    if resume:
        on_main(lambda: folder.check_room(run_size(model)))
    fit(model, task, training, progress=progress, title="train")
    on_main(lambda: keep_weights(model, file, {MADE_BY: made_by}))


def _has_random_weights(recipe: "Recipe") -> bool:
    """Whether the model's weights are random numbers: none are loaded, and it is not trained first."""
    network = recipe.network
    bare = network.build.partition(":")[0] in ("idap", "torchvision", "timm")
    return bare and network.weights is None and recipe.training() is None


def compare(model: "nn.Module", result: "Result", task: "Task", progress: Progress) -> Comparison:
    """Measure the original and the result side by side: latency, and the metric on the test data.

    Args:
        model: the original.
        result: the result of its compression.
        task: the task of both; its test data is used here for the first time.
        progress: receives the progress.

    Returns:
        The numbers of the closing table.
    """
    from idap.cost.latency import measure_latency  # noqa: PLC0415 - torch is slow to import
    from idap.training.batch import device_of  # noqa: PLC0415 - as above
    from idap.training.evaluate import evaluate  # noqa: PLC0415 - as above
    from idap.training.processes import on_main  # noqa: PLC0415 - as above

    test = None
    if task.test is not None:
        before, after = (evaluate(each, task, split="test", progress=progress) for each in (model, result.model))
        test = (before, after)
    args, kwargs = task.example(device_of(model))
    with progress.phase("latency", 1) as phase:
        models = {"before": model, "after": result.model}
        times = on_main(lambda: measure_latency(models, args, kwargs, repeats=LATENCY_REPEATS))
        phase.advance()
    return replace(
        _basic_numbers(result, task),
        test=test,
        latency=(times["before"].median, times["after"].median),
        batch=next((len(value) for value in args if hasattr(value, "__len__")), 1),
    )


def _goals(config: Any, metric: str) -> str:
    from idap.report.decisions import COSTS  # noqa: PLC0415 - its checks of run folders are slow to import

    parts = [] if config.drop is None else [f"{metric} within {config.drop:g} of the original's"]
    if config.max_relative_drop is not None:
        parts.append(f"{metric} within {config.max_relative_drop:.2%} of the original's")
    if config.worst_metric is not None:
        parts.append(f"{metric} no worse than {config.worst_metric:g}")
    parts += [f"{100 * share:.3g}% of the {COSTS[name]}" for name, share in config.targets.items() if share is not None]
    return ", ".join(parts)


def _show(console: Console, result: "Result", numbers: Comparison, run_dir: Path) -> None:
    console.print()
    console.print(comparison_table(numbers))
    style = "green" if result.reached else "yellow"
    console.print(Text.assemble((result.message[:1].upper() + result.message[1:], style), "."))
    console.print(
        f"The model is in {RunFolder(run_dir).model}, every decision in {run_dir}. To see what happened: "
        f"idap report {run_dir}",
        markup=False,
        soft_wrap=not console.is_terminal,
    )


def _document(result: "Result", numbers: Comparison, run_dir: Path) -> dict[str, Any]:
    return {
        "reached": result.reached,
        "message": result.message,
        **numbers.to_json(),
        "output_error": result.output_error,
        "run_dir": str(run_dir),
        "model": str(RunFolder(run_dir).model),
        "steps": read_steps(run_dir),
    }
