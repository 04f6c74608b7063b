"""Write files whole or not at all, whatever ends the process, and read JSON strictly."""

import json
import math
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

if sys.platform != "win32":
    import fcntl

LARGEST_JSON = 2**29
"""Bytes of the largest JSON file that is read. The decisions of a run on 70 billion parameters take about 300 MB."""

DEEPEST_JSON = 100
"""Most levels of nested lists and objects that are read."""

LONGEST_NUMBER = 20
"""Most digits of a whole number that is read: 2**64 has as many."""

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# ------------------------------------------------------------------------------------------------------------- writing


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, (json_text(data, indent=1) + "\n").encode())


def json_text(data: Any, *, indent: int | None = None) -> str:
    """Data as JSON text. JSON has only finite numbers, so null is written for any other.

    >>> json_text({"loss": float("inf"), "steps": (1, 2)})
    '{"loss": null, "steps": [1, 2]}'
    """
    try:
        return json.dumps(data, indent=indent, default=plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(json.loads(json.dumps(data, default=plain))), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as file:
        file.write(data)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears whole or not at all: a temporary file beside it is written, then renamed.

    Half-written versions of this file that killed processes left are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(path)
    neighbour, file = _open_beside(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":  # while its lock is held, so that no process takes it for a leftover
                neighbour.replace(path)
        if sys.platform == "win32":  # an open file can't be renamed there, but no other process can remove it either
            neighbour.replace(path)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside a path, for the contents that belong at the path; it is removed at the end.

    Half-written folders for this path that killed processes left are removed.

    Yields:
        The folder. The caller moves its contents to the path, or renames the folder itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(path)
    folder = _beside(path)
    folder.mkdir()
    try:
        with hold(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_aside(path: Path) -> Path:
    """Rename the file or folder at a path to make room for another one; returns its new path."""
    aside = _beside(path)
    path.rename(aside)
    return aside


def is_leftover(name: str) -> bool:
    """Whether this is the name of a half-written file that a killed process left."""
    return _UNFINISHED.fullmatch(name) is not None


def clear_unfinished(path: Path) -> None:
    """Remove half-written files that killed processes left beside a path, but none that a process is still writing."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}")
    if path.parent.is_dir():
        for each in [each for each in path.parent.iterdir() if name.fullmatch(each.name)]:
            remove_unfinished(each)


def remove_unfinished(file: Path) -> None:
    """Remove a file or folder that a killed process left half-written, unless a process holds it."""
    if file.is_symlink():
        return
    if sys.platform == "win32":
        with suppress(OSError):  # an open file: another process is still writing it
            file.unlink()
        return
    with suppress(OSError):  # another user's file, or removed meanwhile: leaving it does no harm
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(descriptor):
                shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from taking a folder for a leftover; the folder may be renamed meanwhile."""
    if sys.platform == "win32":  # leftover folders are not removed there
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or the process ends; False if another process holds the lock."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _open_beside(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside a path, open and locked."""
    while True:
        neighbour = _beside(path)
        file = neighbour.open("xb")
        _lock(file.fileno())
        if sys.platform == "win32" or os.fstat(file.fileno()).st_nlink:
            return neighbour, file
        file.close()  # another process took it for a leftover and removed it before it was locked


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def plain(value: object) -> object:
    """The JSON form of a value: text for a path, an object for a dataclass, a number for a tensor of one element."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} can't be written as JSON")


def nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def number_paths(first: Path) -> Iterator[Path]:
    """Yield NAME, NAME-2, NAME-3, ... without end."""
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in count(2))


# ------------------------------------------------------------------------------------------------------------- reading


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """Read a text file of a sane size.

    Raises:
        OSError: the file is missing, is not a regular file, or can't be read.
        ValueError: the file is too large, or not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a file")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"its {path.stat().st_size} bytes are more than the {largest} that such a file may have")
    return data.decode("utf-8")


def load_json(path: Path) -> Any:
    """Read a JSON file strictly, see `parse_json`.

    Raises:
        OSError: the file is missing, is not a regular file, or can't be read.
        ValueError: the file is too large, or broken.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Read JSON strictly: only finite numbers of a sane length, unique keys, valid Unicode, and limited nesting.

    Raises:
        ValueError: the text is broken; the message says what was found.

    Example:
        >>> parse_json('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
        >>> parse_json('{"a": NaN}')
        Traceback (most recent call last):
        ValueError: NaN is not valid JSON
    """
    try:
        found = json.loads(
            text, parse_constant=_constant, parse_int=_whole, parse_float=_number, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if text.count("[") + text.count("{") > DEEPEST_JSON:
        _check_depth(found)
    if _SURROGATE.search(text) is not None:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            letter = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"it holds {letter}, half of a surrogate pair, which is not a character") from error
    return found


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST_JSON):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deep")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _whole(text: str) -> int:
    if len(text.removeprefix("-")) > LONGEST_NUMBER:
        raise ValueError(f"the whole number {text[:12]}... has {len(text.removeprefix('-'))} digits")
    return int(text)


def _number(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"the number {text[:20]} is too large")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return found


def difference(one: Any, other: Any) -> str:
    """The first place at which two JSON values differ, and both values there.

    >>> difference({"a": {"b": 1}}, {"a": {"b": 2}})
    'a.b was 1 and is now 2'
    """
    path: list[str] = []
    while isinstance(one, dict) and isinstance(other, dict):
        name = next((name for name in sorted({*one, *other}) if one.get(name) != other.get(name)), None)
        if name is None:
            break
        path.append(name)
        one, other = one.get(name), other.get(name)
    return f"{'.'.join(path)} was {_short(one)} and is now {_short(other)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
