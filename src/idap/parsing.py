"""Check data from elsewhere: JSON of a sane size, exact types, and file names that stay in their folder."""

import reprlib
import stat
from collections.abc import ItemsView, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors

from idap.errors import CheckpointError
from idap.files import load_json, parse_json
from idap.memory import Need, Room, readable

LARGEST = 2**63
"""Every size, index and attribute of a model is below it."""


def items(data: Any) -> ItemsView[str, Any]:
    """The items of an object whose keys are all strings."""
    if not isinstance(data, Mapping):
        raise TypeError(f"expected an object, found {abbreviate(data)}")
    for key in data:
        text(key)
    return data.items()


def sequence(data: Any) -> list[Any] | tuple[Any, ...]:
    """A list."""
    if not isinstance(data, list | tuple):
        raise TypeError(f"expected a list, found {abbreviate(data)}")
    return data


def text(value: Any) -> str:
    """A string."""
    if type(value) is not str:
        raise TypeError(f"expected a string, found {abbreviate(value)}")
    return value


def whole(value: Any) -> int:
    """A whole number that fits into 64 bits; True and 3.0 are refused."""
    if type(value) is not int:
        raise TypeError(f"expected a whole number, found {abbreviate(value)}")
    if not -LARGEST < value < LARGEST:
        raise ValueError("a number is larger than any in a model")
    return value


def sizes(data: Any) -> tuple[int, ...]:
    """A list of whole numbers of at least 0."""
    found = tuple(whole(value) for value in sequence(data))
    if any(value < 0 for value in found):
        raise ValueError(f"expected numbers of at least 0, found {min(found)}")
    return found


def indices(data: Any) -> tuple[int, ...]:
    """A list of whole numbers of at least 0, each larger than the one before.

    >>> indices([0, 2, 5])
    (0, 2, 5)
    """
    found = sizes(data)
    for before, after in pairwise(found):
        if after <= before:
            raise ValueError(f"expected ascending numbers, found {after} after {before}")
    return found


def size(value: Any) -> int | tuple[int, ...]:
    """The value of an attribute: a whole number or a list of them."""
    return tuple(whole(part) for part in value) if isinstance(value, list | tuple) else whole(value)


def dimension(key: str) -> int:
    """The number of a dimension, which is a string in JSON."""
    if not (key.isascii() and key.isdigit() and len(key) <= 2 and str(int(key)) == key):
        raise ValueError(f"expected the number of a dimension, found {abbreviate(key)}")
    return int(key)


def abbreviate(value: Any) -> str:
    """A value for a message, shortened to 60 characters."""
    if isinstance(value, int) and not -LARGEST < value < LARGEST:
        return "a huge number"
    found = reprlib.repr(value)
    return found if len(found) <= 60 else found[:57] + "..."


WEIGHTS, INDEX, PLAN = "model.safetensors", "model.safetensors.index.json", "plan.json"
LARGEST_PLAN = 2**28
"""Bytes of the largest plan that is read: one that cuts every dimension of a Llama with 70 billion parameters, of 80
layers and width 8192, has 17 million slots and 176 MiB."""

LARGEST_JSON = 2**26
"""Bytes of the largest other JSON file that is read: the index of 100,000 tensors has 10 MiB."""

PARSED = 44
"""Most bytes of memory that a byte of JSON takes once it is read: nested lists do; the numbers of a plan take 6."""


def read_json(file: Path, *, largest: int = LARGEST_JSON) -> Any:
    """Read a JSON file strictly, see `idap.files.parse_json`.

    Args:
        file: the file to read.
        largest: most bytes that such a file has.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointError: the file can't be read, is too large, or is broken.
        InsufficientMemoryError: its contents might take more memory than is allowed.
    """
    try:
        check_size(file, largest)
        return load_json(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    except ValueError as error:  # broken JSON or Unicode
        raise CheckpointError(f"{file} is broken: {error}") from error


def check_size(file: Path, largest: int) -> None:
    """Refuse a JSON file that is too large, before any of it is read.

    Args:
        file: the file to check.
        largest: most bytes that such a file has.

    Raises:
        OSError: the file is missing.
        CheckpointError: it is not a regular file, or is too large.
        InsufficientMemoryError: its contents might take more memory than is allowed.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"cannot read {file}: it is not a file")
    if found.st_size > largest:
        raise CheckpointError(
            f"{file} is broken: its {found.st_size:,} bytes are more than the {largest:,} that such a file has at most"
        )
    Room.now().check(
        Need(held=PARSED * found.st_size),
        what=f"reading {file}, which has {readable(found.st_size)} and may take up to {PARSED} times as much memory,",
        way_out="Read it on a machine with more memory.",
    )


def read_object(data: bytes, file: Path) -> Any:
    """Read JSON strictly.

    Args:
        data: the text.
        file: where it comes from, for messages.

    Raises:
        CheckpointError: the text is broken.
    """
    try:
        return parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is broken: {error}") from error


def weight_files(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The safetensors files of a checkpoint.

    Args:
        path: a file, or a folder with `model.safetensors` or the index of a sharded checkpoint.

    Returns:
        The files in order, and the index as tensor -> name of its file; None if there is no index.

    Raises:
        CheckpointError: the index is missing, broken, or leads out of the folder.
    """
    if not path.is_dir():
        return [path], None
    if (path / WEIGHTS).exists() or not (path / INDEX).exists():
        return [path / WEIGHTS], None
    index = path / INDEX
    try:
        description = read_json(index)
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot read {index}: {error}") from error
    places = description.get("weight_map") if isinstance(description, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} is broken: it has no weight_map that says in which file each tensor lies")
    for name, place in places.items():
        if not isinstance(place, str):
            raise CheckpointError(f"{index} is broken: the file of tensor {name!r} is given as {place!r:.60}")
    return [inside(path, name, index.name) for name in sorted(set(places.values()))], places


def inside(folder: Path, name: str, source: str) -> Path:
    """The path of a file that must lie in a folder, or among the blobs that a Hugging Face snapshot links to.

    Args:
        folder: where it must lie.
        name: of the file, as `source` gives it.
        source: what names the file, for the message.

    Raises:
        CheckpointError: the name is a path, or a link that leads elsewhere.
    """
    if name in ("", ".", "..") or any(letter in name for letter in "/\\\0:"):
        raise CheckpointError(
            f"{source} in {folder} names the file {name!r:.80}, which is not the plain name of a file"
        )
    try:
        home, real = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # links that form a circle
        raise CheckpointError(f"cannot follow {folder / name}: {error}") from error
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if real.parent not in homes:
        raise CheckpointError(
            f"{source} in {folder} names the file {name!r:.80}, which is a link out of the folder, to {real}; put the "
            "file itself there"
        )
    return folder / name


def open_tensors(file: Path) -> Any:
    """Open a safetensors file; the library checks the header against the size of the file.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        if not file.exists():
            raise FileNotFoundError
        if not file.is_file():
            raise CheckpointError(f"{file} is not a safetensors file; copy or download it again")
        return safetensors.safe_open(file, framework="pt")
    except FileNotFoundError as error:
        what = "the compressed model has no weights: " if file.name == WEIGHTS else ""
        raise CheckpointError(f"{what}{file} is missing") from error
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error
