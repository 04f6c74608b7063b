"""What may be believed of files that came from elsewhere: JSON of a sane size and form, names that stay in a folder."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from idap.errors import CheckpointError
from idap.files import load_json, parse_json
from idap.memory import Need, Room, readable

WEIGHTS, INDEX, PLAN = "model.safetensors", "model.safetensors.index.json", "plan.json"
LARGEST_PLAN = 2**28
"""Bytes of the largest plan that is read: one that cuts every dimension of a Llama with 70 billion parameters, of 80
layers and width 8192, has 17 million slots and 176 MiB."""

LARGEST_JSON = 2**26
"""Bytes of the largest other JSON file that is read: the index of 100,000 tensors has 10 MiB."""

PARSED = 44
"""Bytes of memory that a byte of JSON takes at most once it is read: lists in lists; the numbers of a plan take 6."""


def read_json(file: Path, *, largest: int = LARGEST_JSON) -> Any:
    """Read a JSON file strictly, see `idap.files.parse_json`.

    Args:
        file: which.
        largest: most bytes that such a file has.

    Raises:
        FileNotFoundError: it is missing.
        CheckpointError: it can't be read, is too large, or is broken.
        InsufficientMemoryError: what it holds may take more memory than may be taken.
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
        file: which.
        largest: most bytes that such a file has.

    Raises:
        OSError: it is missing.
        CheckpointError: it is no file, or too large.
        InsufficientMemoryError: what it holds may take more memory than may be taken.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"cannot read {file}: it is no file")
    if found.st_size > largest:
        raise CheckpointError(
            f"{file} is broken: its {found.st_size:,} bytes are more than the {largest:,} that such a file has at most"
        )
    Room.now().check(
        Need(held=PARSED * found.st_size),
        what=f"reading {file}, which has {readable(found.st_size)} and may hold up to {PARSED} times as much,",
        way_out="Read it on a machine with more memory.",
    )


def read_object(data: bytes, file: Path) -> Any:
    """Read JSON strictly.

    Args:
        data: the text.
        file: where it comes from, for messages.

    Raises:
        CheckpointError: it is broken.
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
        The files in order, and what the index says: tensor -> name of its file; None where there is no index.

    Raises:
        CheckpointError: there are none, the index is broken, or it leads out of the folder.
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
    """A file that must lie in a folder; in a snapshot of the Hugging Face cache, in the blobs that it links to.

    Args:
        folder: where it must lie.
        name: of the file, as `source` says it.
        source: what is to blame if it does not.

    Raises:
        CheckpointError: the name is a path, or a link that leads elsewhere.
    """
    if name in ("", ".", "..") or any(letter in name for letter in "/\\\0:"):
        raise CheckpointError(
            f"{source} in {folder} names the file {name!r:.80}, which is not the plain name of a file"
        )
    try:
        home, real = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise CheckpointError(f"cannot follow {folder / name}: {error}") from error
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if real.parent not in homes:
        raise CheckpointError(
            f"{source} in {folder} names the file {name!r:.80}, which is a link out of the folder, to {real}; put the "
            "file itself there"
        )
    return folder / name


def open_tensors(file: Path) -> Any:
    """Open a safetensors file, whose header the library checks against the size of the file.

    Raises:
        CheckpointError: it is missing, truncated or none.
    """
    try:
        if not file.exists():
            raise FileNotFoundError
        if not file.is_file():
            raise CheckpointError(f"{file} is no safetensors file; copy or download it again")
        return safetensors.safe_open(file, framework="pt")
    except FileNotFoundError as error:
        what = "the compressed model has no weights: " if file.name == WEIGHTS else ""
        raise CheckpointError(f"{what}{file} is missing") from error
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); copy or download it again"
        ) from error
