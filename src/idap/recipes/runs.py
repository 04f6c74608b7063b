"""What a run folder knows: its recipe, where its model is, and which code it names that may not be the user's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idap.errors import ConfigError, RunFolderError
from idap.ownership import foreign_signs, printable
from idap.parsing import PLAN
from idap.recipes.file import read_changes, with_changes
from idap.recipes.recipe import Recipe, make_recipe
from idap.record import CHECKPOINTS, RUN, RunFolder, read_object
from idap.report.reading import read_recipe_sections
from idap.script import place_of


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


@dataclass(frozen=True)
class Foreign:
    """Code of a run folder that was not made here.

    Attributes:
        folder: of the run.
        signs: parts of a sentence that say what speaks against that it was made here.
        code: for each key of the recipe that names code, what would run, in words.
    """

    folder: Path
    signs: tuple[str, ...]
    code: tuple[str, ...]

    def __str__(self) -> str:
        listed = "\n".join(f"  {line}" for line in self.code)
        return (
            f"{self.folder} was not made here, as far as is known: {'; '.join(self.signs)}. Its recipe names code, "
            f"which would run with your rights:\n{listed}"
        )


def foreign_code(folder: Path, replaced: Mapping[str, str | Path | None]) -> Foreign | None:
    """Find code that a run folder from elsewhere names; nothing is run.

    Args:
        folder: of the run.
        replaced: `section.key` -> what the user gave instead, as for `recipe_of_run`; that is the user's own.

    Returns:
        The code; None where the recipe names none, or the run was made here.

    Raises:
        RunFolderError: the settings of the run can't be read.
        ConfigError: the recipe is wrong.
    """
    settings = settings_of_run(folder)
    changes = read_changes((), replaced)
    recipe = with_changes(settings.get("recipe") or {}, changes)
    specs = {
        f"{section}.{key}": value
        for section, values in recipe.items()
        for key, value in (values.items() if isinstance(values, dict) else ())
        if (section, key) not in changes
    }
    places = {name: found for name, value in specs.items() if (found := place_of(value)) is not None}
    if not places:
        return None
    modules = any(file is None for file, _, _ in places.values())
    signs = foreign_signs(folder, settings, folder_matters=modules)
    if not signs:
        return None
    return Foreign(folder, tuple(signs), tuple(_describe(name, *found) for name, found in places.items()))


def _describe(name: str, file: Path | None, place: str, function: str) -> str:
    where = f"module {printable(place)}" if file is None else printable(str(file))
    missing = "" if file is None or file.is_file() else " (there is no such file now)"
    return f"{name}: {printable(function)} in {where}{missing}"
