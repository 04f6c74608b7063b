"""Files that appear whole or not at all, whatever ends the process, and JSON that is read strictly."""

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
"""Bytes of the largest JSON file that is read: the decisions of a run on 70 billion parameters have about 300 MB."""

DEEPEST_JSON = 100
"""Levels of lists and objects in each other that are read."""

LONGEST_NUMBER = 20
"""Digits of the longest whole number that is read: those of 2**64."""

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# ------------------------------------------------------------------------------------------------------------- writing


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, (json_text(data, indent=1) + "\n").encode())


def json_text(data: Any, *, indent: int | None = None) -> str:
    """Data as JSON, which has no numbers that are not finite: null stands for them.

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
    """Open a file that appears whole or not at all: a neighbour is written, and takes its name in the end.

    What earlier processes left of this file when they were killed is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(path)
    neighbour, file = _open_beside(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":  # while its lock is held, so that nobody takes it for a leftover
                neighbour.replace(path)
        if sys.platform == "win32":  # where an open file can't be renamed, and nobody else can remove it
            neighbour.replace(path)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Make a folder beside a path, in which what is to come there is written; it is removed in the end.

    What earlier processes left of this path when they were killed is removed.

    Yields:
        The folder, whose contents are to be moved, or which itself is to be renamed.
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
    """Rename what lies at a path, so that something else can take its place; gives where it lies now."""
    aside = _beside(path)
    path.rename(aside)
    return aside


def is_leftover(name: str) -> bool:
    """Whether a file of this name is what a killed process left half-written."""
    return _UNFINISHED.fullmatch(name) is not None


def clear_unfinished(path: Path) -> None:
    """Remove what killed processes left half-written beside a path; what a process still writes stays."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}")
    if path.parent.is_dir():
        for each in [each for each in path.parent.iterdir() if name.fullmatch(each.name)]:
            remove_unfinished(each)


def remove_unfinished(file: Path) -> None:
    """Remove a file or folder that a killed process left half-written, unless a process holds it."""
    if file.is_symlink():
        return
    if sys.platform == "win32":
        with suppress(OSError):  # it is open, so somebody still writes it
            file.unlink()
        return
    with suppress(OSError):  # somebody else's, or gone in the meantime: it stays, and harms nobody
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(descriptor):
                shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Let no other process take a folder for what a killed one left; it may be renamed."""
    if sys.platform == "win32":  # where folders that were left are not removed
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed: whether nobody else held it. It dies with the process."""
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
        file.close()  # it was taken for a leftover before it was locked


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def plain(value: object) -> object:
    """What stands for a value in JSON: text for a path, an object for a dataclass, a number for a tensor of one."""
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
    """NAME, NAME-2, NAME-3, ... without an end."""
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in count(2))


# ------------------------------------------------------------------------------------------------------------- reading


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """Read a text file of a sane size.

    Raises:
        OSError: it is missing, no file, or can't be read.
        ValueError: it is too large, or not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no file")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{path.stat().st_size} bytes are more than any {path.name} has")
    return data.decode("utf-8")


def load_json(path: Path) -> Any:
    """Read a JSON file strictly, see `parse_json`.

    Raises:
        OSError: it is missing, no file, or can't be read.
        ValueError: it is too large, or broken.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Read JSON strictly: finite numbers of a sane length, no key twice, no broken letters, nothing nested too deep.

    Raises:
        ValueError: it is broken; says what was found.

    Example:
        >>> parse_json('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
        >>> parse_json('{"a": NaN}')
        Traceback (most recent call last):
        ValueError: NaN is no JSON
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
            raise ValueError(f"it holds {letter}, half of a pair of surrogates, which is no letter") from error
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
    raise ValueError(f"{name} is no JSON")


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
        raise ValueError(f"the key {twice!r} comes twice")
    return found


def difference(one: Any, other: Any) -> str:
    """Where two things that JSON holds differ, and how.

    >>> difference({"a": {"b": 1}}, {"a": {"b": 2}})
    'a, b, 1 then, 2 now'
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other}):
            if one.get(name) != other.get(name):
                return f"{name}, {difference(one.get(name), other.get(name))}"
    return f"{_short(one)} then, {_short(other)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
