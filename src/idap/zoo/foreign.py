"""Code that a run folder from elsewhere names in its recipe, and what speaks against that it is the user's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from idap.trust import foreign_signs, printable
from idap.zoo.recipe_file import read_changes, with_changes
from idap.zoo.runs import settings_of_run
from idap.zoo.script import place_of


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
    return Foreign(folder, tuple(signs), tuple(_told(name, *found) for name, found in places.items()))


def _told(name: str, file: Path | None, place: str, function: str) -> str:
    where = f"module {printable(place)}" if file is None else printable(str(file))
    missing = "" if file is None or file.is_file() else " (there is no such file now)"
    return f"{name}: {printable(function)} in {where}{missing}"
