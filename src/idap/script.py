"""Load objects from a user's own code: `python:path/to/file.py:name` and `python:package.module:name`."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from idap.errors import ConfigError, IdapError

Made = TypeVar("Made")

PREFIX = "python:"
_PACKAGE = Path(__file__).resolve().parent
_STDLIB = Path(sysconfig.get_path("stdlib"))


def is_script(spec: str) -> bool:
    """Whether a spec names an object of the user's own code."""
    return spec.startswith(PREFIX)


def place_of(value: object) -> tuple[Path | None, str, str] | None:
    """The place of the code that a value of a recipe names; nothing is imported.

    Args:
        value: any value.

    Returns:
        The file (None for a module), the place as written, and the name in it; None if the value names no code.

    Example:
        >>> place_of("python:math:floor"), place_of("idap:digits_vit")
        ((None, 'math', 'floor'), None)
    """
    if not isinstance(value, str) or not is_script(value):
        return None
    place, _, name = value.removeprefix(PREFIX).rpartition(":")
    return Path(place).expanduser().resolve() if _is_file(place) else None, place, name


def load_object(spec: str) -> Any:
    """Load an object from a file or an installed module, which runs the code there.

    A file gets a module name of its own, and its folder is importable while it runs. It runs once, unless it changes.

    Args:
        spec: `python:path/to/file.py:name` or `python:package.module:name`; paths are relative to the working folder.

    Returns:
        The object of that name.

    Raises:
        ConfigError: the spec has another form, or the code can't be found, fails, or has no such name.

    Example:
        >>> load_object("python:math:floor")(2.5)
        2
    """
    place, name = _parts(spec)
    with _importable(_folder(place)):
        module = _file_module(place, spec) if _is_file(place) else _import_module(place, spec)
        if not hasattr(module, name):
            raise ConfigError(f"{spec}: there is no {name!r} in {place}. {_nearest_name(name, module)}")
        return getattr(module, name)


def call_object(spec: str, build: Callable[[Any], Made]) -> Made:
    """Load an object and hand it to a function while its folder is importable, so that late imports work too.

    Args:
        spec: as for `load_object`.
        build: receives the object, and calls it with its arguments.

    Returns:
        What `build` returns.

    Raises:
        ConfigError: the object can't be loaded, or fails in `build`; the message names the line of the user's code.
    """
    found = load_object(spec)
    with _importable(_folder(_parts(spec)[0])):
        try:
            return build(found)
        except IdapError:
            raise
        except Exception as error:
            raise ConfigError(f"{spec} failed: {type(error).__name__}: {error}{_line_of(error)}.") from error


def _parts(spec: str) -> tuple[str, str]:
    place, _, name = spec.removeprefix(PREFIX).rpartition(":")
    if not is_script(spec) or not place or not name.isidentifier():
        raise ConfigError(
            f"{spec!r} does not say where to look; write python:path/to/file.py:name or python:package.module:name."
        )
    return place, name


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _folder(place: str) -> Path:
    return Path(place).expanduser().resolve().parent if _is_file(place) else Path.cwd()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        # The user's code may have changed the list; only our own entry is removed.
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _file_module(place: str, spec: str) -> ModuleType:
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], n=1)
        advice = f" Did you mean {Path(place).with_name(near[0])}?" if near else ""
        raise ConfigError(f"{spec}: {file} does not exist.{advice}")
    version = f"{file}:{file.stat().st_mtime_ns}:{file.stat().st_size}"
    name = f"idap_script_{file.stem}_{hashlib.sha256(version.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise ConfigError(f"{spec}: {file} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_error(spec, error) from error
    return module


def _import_module(place: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{spec}: there is no module {error.name!r} here. Install its package, or name the file: "
                "python:path/to/file.py:name."
            ) from error
        raise _import_error(spec, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(spec, error) from error


def _import_error(spec: str, error: BaseException) -> ConfigError:
    place = _parts(spec)[0]
    if isinstance(error, SystemExit):
        return ConfigError(
            f"{spec}: {place} ends the program when it is imported; move that under if __name__ == '__main__'."
        )
    return ConfigError(f"{spec}: importing {place} failed: {type(error).__name__}: {error}{_line_of(error)}.")


def _line_of(error: BaseException) -> str:
    """The line of the user's own code in which an error arose, for a message; "" if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        foreign = file.is_relative_to(_PACKAGE) or file.is_relative_to(_STDLIB) or "site-packages" in file.parts
        if not foreign and file.is_file():
            return f" ({file.name}, line {frame.lineno}: {frame.line})"
    return ""


def _nearest_name(name: str, module: ModuleType) -> str:
    known = [other for other in vars(module) if not other.startswith("_")]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    own = [other for other in known if getattr(vars(module)[other], "__module__", None) == module.__name__]
    return f"It defines {', '.join(own[:8])}." if own else "It defines nothing."
