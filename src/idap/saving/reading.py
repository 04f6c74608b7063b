"""What may be believed of files that came from elsewhere: JSON of a sane size and form, names that stay in a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idap.errors import CheckpointError
from idap.files import load_json, parse_json

WEIGHTS, INDEX, PLAN = "model.safetensors", "model.safetensors.index.json", "plan.json"


def read_json(file: Path) -> Any:
    """Read a JSON file strictly, see `idap.files.parse_json`.

    Raises:
        FileNotFoundError: it is missing.
        CheckpointError: it can't be read, or is broken.
    """
    try:
        return load_json(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    except ValueError as error:  # broken JSON or Unicode
        raise CheckpointError(f"{file} is broken: {error}") from error


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
