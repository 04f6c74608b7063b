"""Read from a run folder its recipe, the folder of its model, and code that may come from another user."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idap.errors import ConfigError, RunFolderError
from idap.ownership import foreign_signs, printable
from idap.parsing import PLAN
from idap.recipes.file import apply_changes, read_changes
from idap.recipes.recipe import Recipe, make_recipe
from idap.record import CHECKPOINTS, RUN, RunFolder, read_object
from idap.report.reading import read_recipe_sections
from idap.script import place_of


def model_folder(folder: str | Path) -> Path:
    """Find the folder that holds a compressed model.

    Args:
        folder: the folder of a compressed model, or of a run.

    Returns:
        The folder itself, or the folder of the run's result.

    Raises:
        RunFolderError: there is neither; for a run without a result, the error names its last accepted state.
    """
    folder = Path(folder)
    result = RunFolder(folder).model
    if (folder / PLAN).exists():
        return folder
    if (result / PLAN).exists():
        return result
    if (folder / RUN).exists():
        steps = sorted(each for each in (folder / CHECKPOINTS).glob("*") if (each / PLAN).exists())
        advice = f"use an accepted state of it, such as {steps[-1]}" if steps else "it has no accepted state either"
        raise RunFolderError(f"the run in {folder} has no result yet; {advice}.")
    raise RunFolderError(f"{folder} holds neither a run ({RUN}) nor a compressed model ({PLAN}).")


def settings_of_run(folder: str | Path) -> dict[str, Any]:
    """Read the settings that a run wrote at its beginning.

    Returns:
        The content of `run.json`, with the sections of its recipe checked; empty if there is no such file.

    Raises:
        RunFolderError: the file can't be read, or holds something else.
    """
    file = Path(folder) / RUN
    if not file.exists():
        return {}
    read_recipe_sections(file.parent)
    return read_object(file)


def recipe_of_run(folder: str | Path, replaced: Mapping[str, str | Path | None] | None = None) -> Recipe:
    """Make the recipe that a run was started with.

    Args:
        folder: folder of the run.
        replaced: `section.key` -> text that replaces the value, as for `read_recipe`.

    Returns:
        The recipe, with the paths of the time when the run was started.

    Raises:
        RunFolderError: the settings can't be read.
        ConfigError: the run was started from Python, without a recipe.
    """
    settings = settings_of_run(folder)
    if "recipe" not in settings:
        raise ConfigError(
            f"{folder} does not say how its original is built. Pass --model python:net.py:build, or --model and the "
            "recipe."
        )
    if not isinstance(settings["recipe"], dict):
        raise RunFolderError(
            f"{Path(folder) / RUN} holds {type(settings['recipe']).__name__} as the recipe, expected its sections; the "
            "file was changed by hand. Start a new run in another folder."
        )
    return make_recipe(apply_changes(settings["recipe"], read_changes((), replaced or {})), str(Path(folder) / RUN))


@dataclass(frozen=True)
class Foreign:
    """Code that is named in a run folder from elsewhere.

    Attributes:
        folder: folder of the run.
        signs: the signs that the folder was not made here, as parts of a sentence.
        code: for each key of the recipe that names code, a description of what would run.
    """

    folder: Path
    signs: tuple[str, ...]
    code: tuple[str, ...]

    def __str__(self) -> str:
        listed = "\n".join(f"  {line}" for line in self.code)
        return (
            f"{self.folder} was not made here, as far as idap can tell: {'; '.join(self.signs)}. Its recipe names "
            f"code, which would run with your rights:\n{listed}"
        )


def foreign_code(folder: Path, replaced: Mapping[str, str | Path | None]) -> Foreign | None:
    """Find code that is named in a run folder from elsewhere, without running it.

    Args:
        folder: folder of the run.
        replaced: `section.key` -> the user's own value, as for `recipe_of_run`; such values are trusted.

    Returns:
        The code; None if the recipe names none, or the run was made here.

    Raises:
        RunFolderError: the settings of the run can't be read.
        ConfigError: the recipe is wrong.
    """
    settings = settings_of_run(folder)
    changes = read_changes((), replaced)
    recipe = apply_changes(settings.get("recipe") or {}, changes)
    specs = {
        f"{section}.{key}": value
        for section, values in recipe.items()
        for key, value in (values.items() if isinstance(values, dict) else ())
        if (section, key) not in changes
    }
    places = {name: place for name, value in specs.items() if (place := place_of(value)) is not None}
    if not places:
        return None
    modules = any(file is None for file, _, _ in places.values())
    signs = foreign_signs(folder, settings, folder_matters=modules)
    if not signs:
        return None
    return Foreign(folder, tuple(signs), tuple(_describe(name, *place) for name, place in places.items()))


def _describe(name: str, file: Path | None, place: str, function: str) -> str:
    where = f"module {printable(place)}" if file is None else printable(str(file))
    missing = "" if file is None or file.is_file() else " (this file does not exist now)"
    return f"{name}: {printable(function)} in {where}{missing}"
