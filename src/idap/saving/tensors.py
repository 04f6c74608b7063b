"""Read and write tensors in safetensors files, a piece at a time.

The library's own writer needs all tensors of a file in memory. The format is simple enough to be written here: 8 bytes
with the length of the header, a JSON header (name -> dtype, shape, place), then the data. Only one piece of one tensor
is in memory, however large the files are. Pieces are read, not mapped: mapped pages would count as memory of the
process until the file is closed, and reading is faster in the order of a file.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import safetensors
import torch
from torch import Tensor

from idap.errors import CheckpointError
from idap.files import atomic_write
from idap.parsing import open_tensors, read_object, weight_files
from idap.saving.checksums import (
    EMPTY,
    Checksum,
    bytes_of,
    compare_checksum,
    header_text,
    read_checksums,
    tensor_checksum,
)
from idap.surgery.apply import cut_tensor

PIECE = 2**24
"""About the most bytes that are in memory at a time, unless one row of a tensor is larger."""

PLAN_DIGEST = "idap_plan"

CODES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Codes of the format -> the types that are read and written."""

SLOW = (torch.float32, torch.float64, torch.bfloat16)
"""Types with subnormal numbers that make convolutions slow on x86; those of float16 are normal numbers in float32."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        dtype: type of its numbers.
        shape: shape of the whole tensor.
        pieces: gives its parts along the first dimension, in order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def entry_of(name: str, tensor: Tensor) -> Entry:
    """Make the entry of a tensor in memory."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor.cpu()])


def write_tensors(
    file: Path, entries: Sequence[Entry], metadata: Mapping[str, str], *, exact: bool = False
) -> dict[str, int]:
    """Write a safetensors file whole or not at all, with a checksum of each tensor and of the header.

    Args:
        file: path of the file; an existing file is replaced.
        entries: the tensors; in the file they are sorted by type, so that every tensor is aligned.
        metadata: free text in the header, by key.
        exact: whether every number is written as it is; if not, subnormal numbers are written as zeros.

    Returns:
        Tensor name -> number of subnormal numbers that were written as zeros, for tensors that had any.

    Raises:
        CheckpointError: a tensor is of a type that the format does not have.
        OSError: the file can't be written.
    """
    codes = {dtype: code for code, dtype in CODES.items()}
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in ordered:
        if entry.dtype not in codes:
            raise CheckpointError(f"tensor {entry.name!r} is {entry.dtype}, which safetensors files can't hold here")
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": codes[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    checksums = dict.fromkeys((entry.name for entry in ordered), EMPTY)
    subnormal: dict[str, int] = {}
    with atomic_write(file) as out:
        text = header_text(header, checksums)
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            checksums[entry.name], count = _write_entry(out, entry, exact=exact)
            if count:
                subnormal[entry.name] = count
        out.seek(8)
        out.write(header_text(header, checksums))
    return subnormal


def _write_entry(out: BinaryIO, entry: Entry, *, exact: bool) -> tuple[str, int]:
    """Write one tensor; returns its checksum, and the number of subnormal numbers that were written as zeros."""
    before, count, checksum = out.tell(), 0, Checksum()
    for piece in entry.pieces():
        clean, found = (piece, 0) if exact else without_subnormals(piece)
        count += found
        whole = clean.contiguous()
        checksum.add(whole)
        out.write(bytes_of(whole))
    if out.tell() - before != entry.nbytes:
        raise CheckpointError(f"tensor {entry.name!r} changed while it was written")
    return checksum.hex(), count


def without_subnormals(tensor: Tensor) -> tuple[Tensor, int]:
    """Replace subnormal numbers of a tensor by zeros; returns the tensor, and their number.

    Subnormal numbers (below 1.18e-38 in float32 and bfloat16, and below 2.23e-308 in float64) change no result, but x86
    processors compute with them many times slower.

    >>> without_subnormals(torch.tensor([1.0, 1e-40, 0.0]))
    (tensor([1., 0., 0.]), 1)
    """
    if tensor.dtype not in SLOW or not tensor.numel():
        return tensor, 0
    small = (tensor.abs() < torch.finfo(tensor.dtype).tiny) & (tensor != 0)
    count = int(small.sum())
    return (tensor.masked_fill(small, 0.0), count) if count else (tensor, 0)


class TensorFiles:
    """The tensors of a checkpoint, which are read only when they are needed.

    Args:
        path: a safetensors file, or a folder with `model.safetensors` or a sharded checkpoint.

    Attributes:
        path: the same path.
        shapes: tensor -> its shape.
        dtypes: tensor -> its type.
        digests: digests of the plans with which the files were written; "" for a file without one.
        unchecked: files that were written without checksums; in all others, tensors are compared with theirs.

    Raises:
        CheckpointError: a file is missing, truncated or not a safetensors file, the index is wrong, a header was
            damaged, or a tensor is in two files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.digests: set[str] = set()
        self.unchecked: list[Path] = []
        self._checksums: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._begins: dict[str, int] = {}
        self._mapped: dict[Path, Any] = {}
        self._open: tuple[Path, FileIO] | None = None
        files, index = weight_files(path)
        try:
            for file in files:
                self._survey(file)
            self._check_index(index)
        except BaseException:
            self.close()
            raise

    def _check_index(self, index: Mapping[str, str] | None) -> None:
        path = self.path
        for name, place in (index or {}).items():
            if name not in self._files or self._files[name].name != place:
                raise CheckpointError(f"the index of {path} says that tensor {name!r} is in {place}, but it is not")
        if index is not None and len(index) < len(self._files):
            extra = next(name for name in self._files if name not in index)
            raise CheckpointError(f"{self._files[extra]} holds tensor {extra!r}, which the index of {path} lacks")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._close_read()
        for mapped in self._mapped.values():
            mapped.__exit__(None, None, None)
        self._mapped.clear()

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor; it is a view of the file, so copy it to use it after `close`.

        Raises:
            CheckpointError: the tensor can't be read, or is not what was written.
        """
        found = self._view(name)
        if name in self._checksums:
            compare_checksum(name, self._files[name], tensor_checksum(found), self._checksums[name])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, each a view of its file; as many threads as torch has compare their checksums.

        Raises:
            CheckpointError: a tensor can't be read, or is not what was written.
        """
        views = {name: self._view(name) for name in self.shapes}
        checked = [name for name in views if name in self._checksums]
        with ThreadPoolExecutor(
            max_workers=torch.get_num_threads()
        ) as pool:  # hashlib releases the lock of the interpreter
            for name, found in zip(checked, pool.map(lambda name: tensor_checksum(views[name]), checked), strict=True):
                compare_checksum(name, self._files[name], found, self._checksums[name])
        return views

    def _view(self, name: str) -> Tensor:
        try:
            found: Tensor = self._mapped[self._files[name]].get_tensor(name)
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"tensor {name!r} in {self._files[name]} can't be read: {error}") from error
        return found

    def pieces(self, name: str, kept: Mapping[int, tuple[int, ...]]) -> Iterator[Tensor]:
        """Read the slots that a plan keeps of a tensor, in parts along the first dimension.

        Args:
            name: name of the tensor.
            kept: dimension -> slots, ascending; dimensions that are not named stay whole.

        Yields:
            Parts of about `PIECE` bytes.

        Raises:
            CheckpointError: the tensor can't be read; or, raised after the last part, it is not what was written.
        """
        shape = self.shapes[name]
        if not shape or 0 in shape:
            yield _cut(self.tensor(name), kept)
            return
        rows: Sequence[int] = kept.get(0, range(shape[0]))
        others = {dim: slots for dim, slots in kept.items() if dim}
        span = max(1, PIECE // (math.prod(shape[1:]) * self.dtypes[name].itemsize))
        checksum = Checksum() if name in self._checksums else None
        start = position = 0
        while start < len(rows):
            # A checksum covers all rows, so all are read; without one, reading continues at the next row that is kept.
            first = rows[start] if checksum is None else position
            end = bisect_left(rows, first + span)
            position = first + span if checksum is not None else rows[end - 1] + 1
            part = self._rows(name, first, min(position, shape[0]))
            if checksum is not None:
                checksum.add(part)
            if end > start:
                whole = len(part) == end - start
                inner = {} if whole else {0: tuple(row - first for row in rows[start:end])}
                yield _cut(part, inner | others)
            start = end
        if checksum is not None:
            for first in range(position, shape[0], span):
                checksum.add(self._rows(name, first, min(first + span, shape[0])))
            compare_checksum(name, self._files[name], checksum.hex(), self._checksums[name])

    def _rows(self, name: str, first: int, stop: int) -> Tensor:
        file, shape, dtype = self._files[name], self.shapes[name], self.dtypes[name]
        row = math.prod(shape[1:]) * dtype.itemsize
        buffer = bytearray((stop - first) * row)
        try:
            if self._open is None or self._open[0] != file:
                self._close_read()
                self._open = (file, file.open("rb", buffering=0))
            source = self._open[1]
            source.seek(self._begins[name] + first * row)
            view = memoryview(buffer)
            while view and (count := source.readinto(view)):
                view = view[count:]
        except OSError as error:
            raise CheckpointError(f"tensor {name!r} in {file} can't be read: {error}") from error
        if view:
            raise CheckpointError(f"{file} is truncated; copy or download it again")
        return torch.frombuffer(buffer, dtype=dtype).reshape(stop - first, *shape[1:])

    def _close_read(self) -> None:
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def _survey(self, file: Path) -> None:
        mapped = self._mapped[file] = open_tensors(file)  # checks the whole header
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = read_object(raw.read(length), file)
        for name in mapped.keys():  # noqa: SIM118 - no mapping
            entry = mapped.get_slice(name)
            code = str(entry.get_dtype())
            if name in self._files:
                raise CheckpointError(f"tensor {name!r} is both in {self._files[name]} and in {file}")
            if code not in CODES:
                raise CheckpointError(f"tensor {name!r} in {file} is of type {code}, which can't be read here")
            self._files[name], self.dtypes[name] = file, CODES[code]
            self.shapes[name] = tuple(entry.get_shape())
            self._begins[name] = 8 + length + header[name]["data_offsets"][0]
        checksums = read_checksums(header, mapped.keys(), file)
        if checksums is None:
            self.unchecked.append(file)
        self._checksums |= checksums or {}
        self.digests.add((mapped.metadata() or {}).get(PLAN_DIGEST, ""))


def _cut(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    if not kept:
        return tensor
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:  # torch can't index these types on every device
        return cut_tensor(tensor.view(torch.uint8), kept).view(tensor.dtype)
    return cut_tensor(tensor, kept)
