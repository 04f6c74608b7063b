"""Files that appear whole or not at all, whatever ends the process."""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, (json.dumps(data, indent=1, default=plain) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with written(path) as file:
        file.write(data)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears whole or not at all: a neighbour is written, and takes its name in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with neighbour.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        neighbour.replace(path)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise


def unfinished(name: str) -> bool:
    """Whether a file of this name is what a killed process left half-written."""
    return _UNFINISHED.fullmatch(name) is not None


def plain(value: object) -> object:
    """What stands for a value in JSON: text for a path, an object for a dataclass, a number for a tensor of one."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)  # type: ignore[call-overload]
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} can't be written as JSON")
