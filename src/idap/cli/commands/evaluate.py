"""`idap evaluate`: measure the metric of a compressed model, of its original, or of both."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from idap.cli.failure import Outcome
from idap.cli.options import (
    DataPath,
    Debug,
    EvaluatedModel,
    EvaluatedRecipe,
    Json,
    OnlyNumbers,
    RunOrModelOrNone,
    SplitName,
    TaskSpec,
    Trust,
    Verbose,
    WeightsPath,
)
from idap.cli.subject import check_code
from idap.cli.tables import metric_cells
from idap.errors import ConfigError
from idap.record import RunFolder

if TYPE_CHECKING:
    import torch

    from idap.progress import Progress
    from idap.recipes.recipe import Recipe

EXAMPLES = (
    "idap evaluate runs/digits_resnet",
    "idap evaluate runs/digits_resnet --split test",
    "idap evaluate small --model python:net.py:build --task python:net.py:task --weights net.safetensors",
    "idap evaluate --recipe recipes/cifar10_resnet20.toml --data DATA --weights cifar10_resnet20.safetensors",
)
DOCUMENT = {
    "split": "the data: val or test",
    "metric": "name of the metric",
    "higher_is_better": "whether a higher value is better",
    "original": "the metric of the original; null if it was not measured",
    "compressed": "the metric of the compressed model; null if none was named",
    "folder": "folder of the compressed model; null if none was named",
    "note": "why the original was not measured; empty if it was",
}
_SPLITS = ("val", "test")
_TRAINED = (
    "The recipe trains the original, and the trained weights are missing; give weights with --weights to measure it."
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The metric of the original and of the compressed model.

    Attributes:
        split: the data: "val" or "test".
        metric: name of the metric.
        higher_is_better: whether a higher value is better.
        original: the metric of the original; None if it was not measured.
        compressed: the metric of the compressed model; None if none was named.
        folder: folder of the compressed model; None if none was named.
        note: why the original was not measured; "" if it was.
    """

    split: str
    metric: str
    higher_is_better: bool
    original: float | None
    compressed: float | None
    folder: str | None
    note: str


def evaluate_command(  # noqa: PLR0913 - one argument per option
    folder: RunOrModelOrNone = None,
    *,
    recipe: EvaluatedRecipe = None,
    model: EvaluatedModel = None,
    task: TaskSpec = None,
    data: DataPath = None,
    weights: WeightsPath = None,
    split: SplitName = "val",
    trust: Trust = False,
    quiet: OnlyNumbers = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the metric of a compressed model and of its original.

    A run folder names its model and its data; for a folder that holds only a plan, name a recipe, or a model and a
    task. Without a folder, only the original is measured. Use the test data only at the end: once it has guided a
    choice, its metric is biased. If the run was made elsewhere and its recipe names Python code, the command asks
    before it runs that code.
    """
    where = str(folder or recipe or model or "the command line")
    outcome = Outcome(command="idap evaluate", where=where, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with outcome.report():
        if split not in _SPLITS:
            raise ConfigError(f"--split must be {' or '.join(_SPLITS)}, found {split!r}.")
        from idap.training.processes import is_main, join_processes, on_main  # noqa: PLC0415 - torch is slow to import

        replaced = {"model.build": model, "task.build": task, "data.path": data, "model.weights": weights}
        read, own = _recipe(folder, recipe, replaced)
        with join_processes() as device:
            if folder is not None and not own:
                on_main(lambda: check_code(outcome, folder, replaced, trust=trust))
            progress = outcome.progress(is_main=is_main())
            found = _measure(read, folder, split, device, progress, given=weights is not None)
            if is_main():
                outcome.document = asdict(found)
                if not as_json:
                    _show(outcome.console, found, quiet=quiet)


def _recipe(
    folder: Path | None, recipe: Path | None, replaced: "dict[str, str | Path | None]"
) -> "tuple[Recipe, bool]":
    """The recipe, and whether the user named it: False if it is the run's."""
    from idap.recipes.recipe import read_recipe  # noqa: PLC0415 - torch is slow to import
    from idap.recipes.runs import model_folder, recipe_of_run, settings_of_run  # noqa: PLC0415 - as above

    if recipe is not None or (replaced["model.build"] is not None and replaced["task.build"] is not None):
        return read_recipe(recipe, replaced=replaced), True
    if folder is not None:
        model_folder(folder)
    if folder is None or "recipe" not in settings_of_run(folder):
        raise ConfigError(
            f"{folder or 'the command line'} does not name a model and data; give --recipe FILE, or both --model and "
            "--task."
        )
    return recipe_of_run(folder, replaced), False


def _measure(
    recipe: "Recipe", folder: Path | None, split: Any, device: "torch.device", progress: "Progress", *, given: bool
) -> Measurement:
    from idap.models.weights import load_weights  # noqa: PLC0415 - as above
    from idap.recipes.runs import model_folder  # noqa: PLC0415 - as above
    from idap.saving.checkpoint import load  # noqa: PLC0415 - torch is slow to import
    from idap.training.evaluate import evaluate  # noqa: PLC0415 - as above

    place = None if folder is None else model_folder(folder)
    small = None if place is None else load(place, recipe.model(weights=False)).to(device)
    task = recipe.task()
    # If the recipe trains its model first, a freshly built one is untrained and not worth measuring.
    trained = None if folder is None or given or recipe.training() is None else RunFolder(folder).original
    known = recipe.training() is None or given or (trained is not None and trained.exists())
    original = None
    if known:
        whole = recipe.model(weights=trained is None)
        if trained is not None:
            load_weights(whole, trained, of_run=True)
        original = evaluate(whole.to(device), task, split=split, progress=progress)
    compressed = None if small is None else evaluate(small, task, split=split, progress=progress)
    if original is None and compressed is None:
        raise ConfigError(f"{recipe.where} trains its model first ([train]), so there is nothing to measure yet; "
                          "name a run, or give weights with --weights.")  # fmt: skip
    return Measurement(
        split=split,
        metric=task.metric_name,
        higher_is_better=task.higher_is_better,
        original=original,
        compressed=compressed,
        folder=None if place is None else str(place),
        note="" if known else _TRAINED,
    )


def _show(console: Console, found: Measurement, *, quiet: bool) -> None:
    values = {"original": found.original, "compressed": found.compressed}
    known = {name: value for name, value in values.items() if value is not None}
    if quiet:
        for value in known.values():
            console.print(repr(value), markup=False)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in (*known, *(["change"] if len(known) == 2 else [])):
        table.add_column(name, justify="right")
    table.add_row(f"{found.metric} ({found.split})", *metric_cells(found.metric, list(known.values())))
    console.print(table)
    if found.note:
        console.print(found.note, markup=False, soft_wrap=not console.is_terminal)
