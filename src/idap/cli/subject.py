"""What a command works on: a model with inputs, or a run folder, whose code runs only if the user agrees."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from idap.cli.failure import Outcome
from idap.errors import ConfigError, RunFolderError, TrustError
from idap.files import number_paths
from idap.record import RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from idap.recipes.recipe import Recipe

    Subject = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@contextmanager
def claim_folder(wanted: Path | None, name: str, *, resume: bool) -> Iterator[RunFolder]:
    """Choose and claim the run folder before any work is done; of several processes, process 0 does so for all."""
    from idap.training.processes import on_main  # noqa: PLC0415 - torch is slow to import

    mine: list[RunFolder] = []

    def choose() -> Path:
        mine.append(_choose(wanted, name, resume=resume))
        return mine[0].path

    try:
        path = on_main(choose)
        yield mine[0] if mine else RunFolder(path)
    finally:
        for folder in mine:
            folder.release()


def _choose(wanted: Path | None, name: str, *, resume: bool) -> RunFolder:
    """Choose and claim the run folder.

    If no folder is given, it is the first free one in `runs/`, or with `resume` the last one that has the name.
    """
    first = Path("runs") / name
    if wanted is None and resume:
        wanted = _last(first)
    if wanted is None:
        return RunFolder.claim_free(first)
    folder = RunFolder(wanted)
    if not resume:
        folder.check()  # reports what is wrong before anything is written
    folder.claim()
    if not resume and folder.original.exists():
        folder.release()
        raise RunFolderError(
            f"{wanted} holds an original that was trained for a run which was stopped before it began. Go on with it "
            "by --resume, or choose another folder."
        )
    return folder


def _last(first: Path) -> Path | None:
    """The last folder of NAME, NAME-2, NAME-3, ... that exists."""
    last = None
    for each in number_paths(first):
        if not each.exists():
            return last
        last = each
    return last


def check_code(outcome: Outcome, folder: Path, replaced: Mapping[str, str | Path | None], *, trust: bool) -> None:
    """Ask before code that a foreign run names is run; called before any of it is imported.

    Args:
        outcome: reports the outcome of the command.
        folder: folder of the run whose recipe is used.
        replaced: `section.key` -> value from the command line, instead of the recipe's.
        trust: whether the user gave --trust.

    Raises:
        TrustError: the run was not made here, its recipe names code, and the user has not agreed to run it.
    """
    from idap.recipes.runs import foreign_code  # noqa: PLC0415 - torch is slow to import

    found = foreign_code(folder, replaced)
    if found is None:
        return
    if trust:
        if not outcome.quiet:
            outcome.errors.print(f"{found}\n(--trust)", markup=False, soft_wrap=not outcome.errors.is_terminal)
        return
    if not _can_ask(outcome):
        raise TrustError(f"{found}\nRead that code. If you trust it, run the same command with --trust.")
    outcome.errors.print(str(found), markup=False)
    try:
        agreed = typer.confirm("Run it?", default=False, err=True)
    except typer.Abort as error:  # Ctrl-C, or the end of the input
        raise KeyboardInterrupt from error
    if not agreed:
        raise TrustError(f"The code that {folder} names was not run, since you declined.")


def _can_ask(outcome: Outcome) -> bool:
    """Whether the user can be asked on a terminal; several processes of a run can't share one."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return alone and not outcome.as_json and sys.stdin.isatty() and outcome.errors.is_terminal


def recipe_of(spec: str, task: str | None = None, data: Path | None = None) -> "Recipe | None":
    """The recipe that a spec names, or the one made from a model with a task or data; None for a model alone.

    Raises:
        ConfigError: the recipe is wrong.
    """
    if not spec.endswith(".toml") and task is None and data is None:
        return None
    from idap.recipes.recipe import read_recipe  # noqa: PLC0415 - imports torch

    replaced = {"task.build": task, "data.path": data}
    if spec.endswith(".toml"):
        return read_recipe(spec, replaced=replaced)
    return read_recipe(None, replaced={**replaced, "model.build": spec})


def model_and_inputs(spec: str, recipe: "Recipe | None", shapes: list[str], *, weights: bool = True) -> "Subject":
    """Build a model and inputs for it.

    Args:
        spec: spec of the model; not used if there is a recipe.
        recipe: from `recipe_of`.
        shapes: shapes of the positional inputs, as text; empty: those of the model's family, or of the task's data.
        weights: whether the recipe's weights are loaded.

    Returns:
        The model in evaluation mode, positional and keyword inputs.

    Raises:
        ConfigError: the model can't be built, or its inputs are not known.
    """
    from idap.models.resolve import build_model, example_inputs  # noqa: PLC0415 - imports torch

    inputs = tuple(_input(text) for text in shapes)
    model = build_model(spec) if recipe is None else recipe.model(weights=weights)
    if inputs:
        return model, inputs, {}
    known = example_inputs(spec, model) if recipe is None else recipe.example_inputs(model)
    if known is not None:
        return model, *known
    if recipe is None:
        raise ConfigError(
            f"the inputs of {spec} are not known; give --input-shape 1,3,32,32, once per input, or its --task or "
            "--data."
        )
    args, kwargs = recipe.task().example("cpu")
    return model, args, kwargs


def _input(text: str) -> "Tensor":
    import torch  # noqa: PLC0415 - slow to import

    sizes, _, kind = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--input-shape {text!r} is not a shape; write sizes with commas, as in 1,3,32,32."
        ) from error
    if kind not in ("", "int") or min(shape) < 1:
        raise ConfigError(f"--input-shape {text!r} is not a shape; write sizes above 0, and :int for whole numbers.")
    return torch.zeros(shape, dtype=torch.int64 if kind else torch.float32)
