"""What a run folder knows: the recipe it was begun with, and where its model is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idap.errors import ConfigError, RunFolderError
from idap.record import CHECKPOINTS, RUN, RunFolder, read_object
from idap.report.reading import read_recipe_sections
from idap.saving.reading import PLAN
from idap.zoo.recipe import Recipe, make_recipe
from idap.zoo.recipe_file import read_changes, with_changes


def model_folder(folder: str | Path) -> Path:
    """Find the folder that holds a compressed model.

    Args:
        folder: such a folder itself, or a run.

    Returns:
        The folder itself, or the result of the run in it.

    Raises:
        RunFolderError: there is neither; names the last accepted state of a run that is not finished.
    """
    folder = Path(folder)
    result = RunFolder(folder).model
    if (folder / PLAN).exists():
        return folder
    if (result / PLAN).exists():
        return result
    if (folder / RUN).exists():
        steps = sorted(each for each in (folder / CHECKPOINTS).glob("*") if (each / PLAN).exists())
        advice = f"name an accepted state of it, such as {steps[-1]}" if steps else "it has no accepted state either"
        raise RunFolderError(f"the run in {folder} has no result yet; {advice}.")
    raise RunFolderError(f"{folder} holds neither a run ({RUN}) nor a compressed model ({PLAN}).")


def settings_of_run(folder: str | Path) -> dict[str, Any]:
    """Read the settings that a run noted before it began.

    Returns:
        What `run.json` holds; empty where there is none. A recipe in it has sections.

    Raises:
        RunFolderError: the file can't be read, or holds something else.
    """
    file = Path(folder) / RUN
    if not file.exists():
        return {}
    read_recipe_sections(file.parent)
    return read_object(file)


def recipe_of_run(folder: str | Path, replaced: Mapping[str, str | Path | None] | None = None) -> Recipe:
    """Make the recipe that a run was begun with.

    Args:
        folder: of the run.
        replaced: `section.key` -> text that stands instead, as for `read_recipe`.

    Returns:
        The recipe, with the paths that held when the run began.

    Raises:
        RunFolderError: the settings can't be read.
        ConfigError: the run was begun from Python, without a recipe.
    """
    noted = settings_of_run(folder)
    if "recipe" not in noted:
        raise ConfigError(
            f"{folder} does not say how its original is built; say it: --model python:net.py:build, or --model and the "
            "recipe."
        )
    if not isinstance(noted["recipe"], dict):
        raise RunFolderError(
            f"{Path(folder) / RUN} holds {type(noted['recipe']).__name__} as the recipe, expected its sections; the "
            "file was changed by hand. Begin the run anew in another folder."
        )
    return make_recipe(with_changes(noted["recipe"], read_changes((), replaced or {})), str(Path(folder) / RUN))
