"""The recipes that come with the package: TOML files in `idap/recipes/`, found by their names."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """List the recipes of the package.

    Returns:
        Name -> file, in the order of the names.

    Example:
        >>> "digits_resnet" in shipped_recipes()
        True
    """
    return {file.stem: file for file in sorted(FOLDER.glob("*.toml"))}


def summary(file: Path) -> str:
    """The first sentence of a recipe, from its first comment."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def recipe_path(path: str | Path) -> Path:
    """Find a recipe: a file, or the name of one that comes with the package.

    Args:
        path: as it was given; a file goes before a name.

    Returns:
        The path of the file, which need not exist.
    """
    path = Path(path)
    named = path.name.removesuffix(".toml") if path.parent == Path() else ""
    return path if path.exists() else shipped_recipes().get(named, path)
