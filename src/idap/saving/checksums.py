"""Write checksums with saved tensors, and compare them when the tensors are read.

The metadata in the header of a file of weights contain the SHA-256 of the bytes of each tensor, and the SHA-256 of the
rest of the header. The header is at the beginning of the file, so space is reserved for the checksums, and they are
filled in after the tensors are written: nothing is read twice. Only idap compares them; other readers of safetensors
files ignore them.

They find damage, such as by a failing disk or an incomplete copy. They don't protect against changes on purpose, since
the checksums can be changed as well.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idap.errors import CheckpointError, UncheckedFileWarning
from idap.parsing import read_object

TENSORS, HEADER = "idap_sha256", "idap_header_sha256"
"""Keys in the metadata: JSON with tensor name -> checksum; and the checksum of the rest of the header."""
EMPTY = "0" * hashlib.sha256().digest_size * 2
"""Placeholder of a checksum that is not known yet."""
CHUNK = 2**20
"""Bytes of a file that are read at a time."""


class Checksum:
    """The checksum of bytes that are added part by part."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, tensor: Tensor) -> None:
        """Add the bytes of a contiguous tensor on the CPU."""
        self._hash.update(bytes_of(tensor))

    def hex(self) -> str:
        """The checksum of all bytes added so far, as hexadecimal text."""
        return self._hash.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; they share its memory."""
    found: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return found


def tensor_checksum(tensor: Tensor) -> str:
    """The checksum of a contiguous tensor on the CPU."""
    found = Checksum()
    found.add(tensor)
    return found.hex()


def file_checksum(file: Path) -> str:
    """The checksum of a whole file, which is read part by part.

    Raises:
        OSError: the file can't be read.
    """
    found = hashlib.sha256()
    with file.open("rb") as source:
        while part := source.read(CHUNK):
            found.update(part)
    return found.hexdigest()


def header_text(header: Mapping[str, Any], checksums: Mapping[str, str]) -> bytes:
    """The header of a file of weights as bytes; its length does not depend on the values of the checksums.

    Args:
        header: tensor name -> type, shape and place; and the metadata.
        checksums: tensor name -> its checksum, or `EMPTY`.
    """
    metadata = {**header["__metadata__"], TENSORS: json.dumps(checksums, separators=(",", ":"))}
    whole = {**header, "__metadata__": metadata}
    metadata[HEADER] = _header_checksum(whole)
    text = json.dumps(whole, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def read_checksums(header: Mapping[str, Any], names: Iterable[str], file: Path) -> Mapping[str, str] | None:
    """Read the checksums in the header of a file of weights.

    Args:
        header: the header that was read.
        names: names of the tensors in the file.
        file: path of the file, for messages.

    Returns:
        Tensor name -> its checksum; None for a file that was written without checksums.

    Raises:
        CheckpointError: the header was damaged, or lacks the checksum of a tensor.
    """
    metadata = header.get("__metadata__") or {}
    if TENSORS not in metadata and HEADER not in metadata:
        return None
    if metadata.get(HEADER) != _header_checksum(header):
        raise CheckpointError(
            f"the header of {file} is not what was written there: its checksum does not match, so the file was damaged "
            "or changed; copy it again from where it was saved"
        )
    found = read_object(str(metadata.get(TENSORS)).encode(), file)
    if not isinstance(found, dict) or found.keys() != set(names):
        raise CheckpointError(f"{file} does not hold a checksum for each of its tensors; copy or save it again")
    return found


def compare_checksum(name: str, file: Path, found: str, wanted: str) -> None:
    """Refuse a tensor that differs from what was written.

    Args:
        name: name of the tensor.
        file: file that holds it.
        found: checksum of the bytes that were read.
        wanted: checksum that was written with the tensor.

    Raises:
        CheckpointError: they differ.
    """
    if found != wanted:
        raise CheckpointError(
            f"tensor {name!r} in {file} is not what was written there: its checksum does not match, so the file was "
            "damaged or changed; copy it again from where it was saved. If you changed the weights on purpose, save "
            "the model with idap.save, or write the tensors without the metadata of the old file"
        )


def warn_unchecked(file: Path) -> None:
    """Warn that a file holds no checksums, so that damage to it can't be found."""
    warnings.warn(
        f"{file} was written without checksums, so damage to it can't be found; save the model with idap.save to have "
        "checksums",
        UncheckedFileWarning,
        stacklevel=3,
    )


def _header_checksum(header: Mapping[str, Any]) -> str:
    """The checksum of a header without this checksum."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != HEADER}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
