"""Completions of arguments, called by the completion script of a shell and never by a command that runs."""

import ast
from collections.abc import Callable, Iterable
from pathlib import Path

Completer = Callable[[str], list[tuple[str, str]]]
"""What was typed so far -> values with a line about each; if there are none, the shell completes files."""


def one_of(values: Iterable[str]) -> Completer:
    """Complete to one of a few words.

    >>> one_of(["val", "test"])("")
    [('val', ''), ('test', '')]
    """
    pairs = [(value, "") for value in values]

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [pair for pair in pairs if pair[0].startswith(incomplete)]

    return complete


def models(incomplete: str) -> list[tuple[str, str]]:
    """Complete to the name of a model: first where it comes from, then which one it is.

    >>> models("idap:digits")[0][0]
    'idap:digits_resnet'
    """
    from idap.recipes import catalogue  # noqa: PLC0415 - needed when a shell asks

    scheme, colon, _ = incomplete.partition(":")
    if not colon:
        found = [(f"{name}:", about) for name, about in catalogue.SCHEMES.items() if name.startswith(incomplete)]
        # If there are values, the shell shows nothing else, so the files have to be among them.
        return found + files(incomplete, ".toml") if incomplete else found
    if scheme == "python":
        return [(f"python:{name}", about) for name, about in _own(incomplete.removeprefix("python:"))]
    if scheme not in catalogue.SCHEMES:
        return []
    return [(each.name, each.about) for each in catalogue.models([scheme]) if each.name.startswith(incomplete)]


def _own(incomplete: str) -> list[tuple[str, str]]:
    """Complete to a Python file, then to what it defines; the file is read, not run."""
    file, colon, name = incomplete.rpartition(":")
    if not colon:
        found = files(incomplete, ".py")
        return [(path if path.endswith("/") else f"{path}:", about) for path, about in found]
    try:
        defined = ast.parse(Path(file).read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return []  # the file may be missing or half-written
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [(f"{file}:{each.name}", "") for each in defined if isinstance(each, kinds) and each.name.startswith(name)]


def scripts(incomplete: str) -> list[tuple[str, str]]:
    """Complete to a Python file of one's own, as in `python:tasks.py`."""
    return [(name, about) for name, about in [*models(incomplete)] if name.startswith("python:")]


def criteria(incomplete: str) -> list[tuple[str, str]]:
    """Complete to a criterion.

    >>> criteria("inn")[0][0]
    'innovation'
    """
    from idap.recipes import catalogue  # noqa: PLC0415 - needed when a shell asks

    return [(each.name, each.about) for each in catalogue.criteria() if each.name.startswith(incomplete)]


def kinds(incomplete: str) -> list[tuple[str, str]]:
    """Complete to a kind that `idap list` lists."""
    from idap.recipes import catalogue  # noqa: PLC0415 - needed when a shell asks

    return [(name, about) for name, (_, about) in catalogue.LISTS.items() if name.startswith(incomplete)]


def files(incomplete: str, ending: str) -> list[tuple[str, str]]:
    """Complete to a folder, or to a file with an ending.

    Args:
        incomplete: beginning of a path.
        ending: such as ".toml".
    """
    folder, _, name = incomplete.rpartition("/")
    place = Path(folder or ("/" if incomplete.startswith("/") else "."))
    if not place.is_dir():
        return []
    before = f"{folder}/" if "/" in incomplete else ""
    found = [each for each in sorted(place.iterdir()) if each.name.startswith(name) and not each.name.startswith(".")]
    return [
        (f"{before}{each.name}{'/' if each.is_dir() else ''}", "")
        for each in found
        if each.is_dir() or each.suffix == ending
    ]
