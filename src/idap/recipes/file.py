"""Read a TOML file, overrides and environment variables into one plain table."""

import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from idap.errors import ConfigError
from idap.models import pretrained
from idap.recipes.catalogue import shipped_recipes
from idap.recipes.sections import nearest_key
from idap.recipes.sources import advise_name, parse_data
from idap.script import PREFIX, is_script

Table = dict[str, Any]
Changes = Mapping[tuple[str, str], Any]

_PATHS = ("model.weights", "data.path", "output.run_dir")
_SPECS = ("model.build", "task.build", "data.name")
_OPTIONS = {
    "model.build": "--model SPEC",
    "model.weights": "--weights PATH",
    "data.path": "--data PATH",
    "output.run_dir": "--run-dir PATH",
}
_FOLDERS = ("data.tokenizer",)
"""Keys whose value is a folder or a name on the hub."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def read_changes(overrides: Sequence[str], replaced: Mapping[str, str | Path | None]) -> Changes:
    """Read the changes that the command line makes to a file.

    Args:
        overrides: `section.key=value`, with the value as in TOML; text needs no quotes.
        replaced: `section.key` -> text that is taken as it is; None: no change. `data.path` may also name the data.

    Returns:
        (section, key) -> value; None: the key is removed.

    Raises:
        ConfigError: an override has another form.

    Example:
        >>> read_changes(["goals.macs=0.5", "compress.criterion=paper"], {"data.path": None})
        {('goals', 'macs'): 0.5, ('compress', 'criterion'): 'paper'}
    """
    changes = dict(_parse_override(text) for text in overrides)
    changes |= {("data", key): value for key, value in split_name(_section(changes, "data"), "--set").items()}
    given: dict[tuple[str, str], str | None] = {
        _key(name): str(value) for name, value in replaced.items() if value is not None
    }
    named = parse_data(str(replaced.get("data.path") or ""))
    if named is not None:
        # A name without a path removes the path of the file, but not a path among the overrides.
        kept = {key: value for key, value in named.items() if value is not None or ("data", key) not in changes}
        given |= {("data", key): value for key, value in kept.items()}
    return changes | given


def split_name(values: Mapping[str, Any], where: str) -> Table:
    """Split a `data.name` of the form NAME:PATH into `name` and `path`.

    Args:
        values: keys and values of the section `[data]`.
        where: name of the recipe, with which the error begins.

    Raises:
        ConfigError: the path is given twice.

    Example:
        >>> split_name({"name": "csv:reviews.tsv", "seed": 3}, "here")
        {'name': 'csv', 'seed': 3, 'path': 'reviews.tsv'}
    """
    name = values.get("name")
    if not isinstance(name, str) or is_script(name) or ":" not in name:
        return dict(values)
    kind, _, path = name.partition(":")
    if values.get("path", path) != path:
        raise ConfigError(f"{where}: data.name is {name!r}, and data.path is {values['path']!r}; write the path once.")
    return {**values, "name": kind, "path": path}


def _section(changes: Changes, wanted: str) -> Table:
    return {key: value for (section, key), value in changes.items() if section == wanted}


def read_table(path: Path, without: Collection[tuple[str, str]] = ()) -> Table:
    """Read a file; resolves its paths against its folder, and fills in environment variables.

    Args:
        path: a TOML file.
        without: (section, key) pairs that are left out because they will be replaced; their variables need not be set.

    Returns:
        Section -> key -> value, not checked.

    Raises:
        ConfigError: the file can't be read, or a variable is not set.
    """
    table = _parse(path)
    if isinstance(table.get("data"), dict):
        table["data"] = split_name(table["data"], str(path))
    for section, values in table.items():
        if isinstance(values, dict):
            kept = {key: value for key, value in values.items() if (section, key) not in without}
            table[section] = {key: _resolve(f"{section}.{key}", value, path) for key, value in kept.items()}
    return table


def apply_changes(table: Table, changes: Changes) -> Table:
    """Apply changes to a copy of a table; missing sections are added.

    Raises:
        ConfigError: `data.path` is given without a name of the data.
    """
    changed = {section: dict(values) if isinstance(values, dict) else values for section, values in table.items()}
    for (section, key), value in changes.items():
        values = changed.setdefault(section, {})
        if isinstance(values, dict):
            values[key] = value
            if value is None:
                del values[key]
    path = changes.get(("data", "path"))
    if path is not None and "task" not in changed and "name" not in changed["data"]:
        raise ConfigError(advise_name(str(path)))
    return changed


def make_paths_absolute(table: Table) -> Table:
    """Make the paths of a table absolute, so that they are valid in any working folder.

    Example:
        >>> make_paths_absolute({"model": {"build": "idap:digits_vit", "weights": "/tmp/digits.safetensors"}})
        {'model': {'build': 'idap:digits_vit', 'weights': '/tmp/digits.safetensors'}}
    """

    def make_absolute(name: str, value: Any) -> Any:
        if name in _PATHS and isinstance(value, str):
            return str(Path(value).absolute())
        if name in _SPECS and is_script(value) and ".py:" in value:
            return f"{PREFIX}{Path(value.removeprefix(PREFIX)).absolute()}"
        return _resolve_folder(name, value, Path())

    return {
        section: {key: make_absolute(f"{section}.{key}", value) for key, value in values.items()}
        for section, values in table.items()
    }


def _key(name: str) -> tuple[str, str]:
    section, _, key = name.strip().partition(".")
    return section, key


def _parse_override(text: str) -> tuple[tuple[str, str], Any]:
    name, equals, written = text.partition("=")
    section, key = _key(name)
    if not equals or not section or not key:
        advice = f" ({nearest_key('', section)})" if section and not key else ""
        raise ConfigError(f"--set {text!r} is not section.key=value, as in --set goals.macs=0.5{advice}.")
    try:
        return (section, key), tomllib.loads(f"value = {written.strip()}")["value"]
    except RecursionError as error:
        raise ConfigError(f"--set {name} is nested too deep; no setting is nested.") from error
    except ValueError:
        # A shell removes quotes, so a value that is not valid TOML is text.
        return (section, key), written.strip()


def _parse(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no recipe {path}. Recipes are TOML files; idap brings {', '.join(shipped_recipes())}, and "
            "`idap recipe new` writes one."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} can't be read: {error}.") from error
    except RecursionError as error:
        raise ConfigError(
            f"the recipe {path} is nested too deep; a recipe has sections, keys, and lists of values."
        ) from error
    except ValueError as error:  # wrong syntax, or a number with thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}. Text needs quotes; keys must differ.") from error


def _resolve(name: str, value: Any, path: Path) -> Any:
    if not isinstance(value, str):
        return value
    for variable in _VARIABLE.findall(value):
        if variable not in os.environ:
            option = f", or pass {_OPTIONS[name]}" if name in _OPTIONS else ""
            raise ConfigError(
                f"{path}: {name} is {value!r}, but the environment variable {variable} is not set. "
                f"Run: export {variable}=...{option}."
            )
        value = value.replace(f"${{{variable}}}", os.environ[variable])
    if name in _PATHS:
        return str(path.parent / Path(value).expanduser())
    if name in _SPECS and is_script(value) and ".py:" in value:
        return f"{PREFIX}{path.parent / Path(value.removeprefix(PREFIX)).expanduser()}"
    return _resolve_folder(name, value, path.parent)


def _resolve_folder(name: str, value: Any, folder: Path) -> Any:
    """The absolute path of a folder of transformers; a value that is not a folder is a name on the hub, and stays."""
    prefix = pretrained.PREFIX if name in _SPECS else ""
    if not isinstance(value, str) or not (name in _FOLDERS or (prefix and value.startswith(prefix))):
        return value
    inner = folder / Path(value.removeprefix(prefix)).expanduser()
    return f"{prefix}{inner.absolute()}" if inner.is_dir() else value
