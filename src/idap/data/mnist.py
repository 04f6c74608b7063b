"""Loads MNIST and sets of its form, such as Fashion-MNIST, from `.npz` files or from `idx` files."""

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from idap.data.layout import check_path, split_off
from idap.data.tensors import Splits, TensorLoader
from idap.errors import TaskError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
_BYTES = 8
"""Code of unsigned bytes in an idx file."""


def mnist(path: str | Path, *, batch_size: int = 128, val_share: float = 0.1, seed: int = 0) -> Splits:
    """Load MNIST, Fashion-MNIST or another set of grey images in their form.

    Args:
        path: a `.npz` file with x_train, y_train, x_test and y_test, a folder that holds one, or a folder with the four
            `idx` files, compressed with gzip or not.
        batch_size: samples in a batch.
        val_share: share of the training images that is used for validation.
        seed: seed of that choice.

    Returns:
        `Splits` with images of shape `(1, H, W)`, scaled so that the training pixels have mean 0 and deviation 1.

    Raises:
        TaskError: a file or an array is missing, broken, or does not fit the others.
        ConfigError: a setting is out of range.
    """
    arrays = _read(check_path(path, "a .npz file, or a folder with the four idx files"))
    images = {part: _images(arrays, part) for part in ("train", "test")}
    labels = {part: _labels(arrays, part, len(images[part])) for part in ("train", "test")}
    classes = int(labels["train"].max()) + 1
    strange = sorted(set(labels["test"].tolist()) - set(labels["train"].tolist()))
    if strange:
        raise TaskError(f"{path}: label {strange[0]} of y_test is not in y_train.")
    rest, chosen, note = split_off(len(images["train"]), val_share, seed, "images")
    seen = images["train"][rest].float()
    centre, width = seen.mean(), seen.std()

    def loader(part: str, places: Sequence[int] | slice, shuffle: bool = False) -> TensorLoader:
        scaled = (images[part][places].float() - centre) / width
        return TensorLoader((scaled, labels[part][places]), batch_size, shuffle=shuffle)

    return Splits(
        train=loader("train", rest, shuffle=True),
        val=loader("train", chosen),
        test=loader("test", slice(None)),
        num_classes=classes,
        shape=tuple(images["train"].shape[1:]),
        notes=(note,),
    )


def mnist_classes(path: str | Path) -> int:
    """Count the classes of a set of MNIST's form.

    Raises:
        TaskError: as for `mnist`.
    """
    arrays = _read(check_path(path, "a .npz file, or a folder with the four idx files"))
    return int(_labels(arrays, "train", len(_images(arrays, "train"))).max()) + 1


def read_idx(file: Path) -> Tensor:
    """Read an idx file of unsigned bytes, compressed with gzip or not.

    Args:
        file: two zeros, the code of bytes, the number of dimensions, their sizes (big-endian), and the bytes.

    Returns:
        uint8 of the shape that the file states.

    Raises:
        TaskError: the file is truncated, or not an idx file of bytes.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{file} can't be read: {error}.") from error
    zeros, kind, dims = content[:2], content[2:3], content[3] if len(content) > 3 else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * dims], dtype=">u4") if len(content) >= 4 + 4 * dims else ()
    shape = tuple(int(size) for size in sizes)
    if zeros != b"\0\0" or kind != bytes([_BYTES]) or not shape or len(content) != 4 + 4 * dims + math.prod(shape):
        raise TaskError(f"{file} is truncated, or not an idx file of bytes; copy it again.")
    return torch.tensor(np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape))


def _read(path: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each of the four arrays."""
    if path.is_file():
        return _of_npz(path)
    found = {name: _idx_file(path, stem) for name, stem in _FILES.items()}
    packed = sorted(path.glob("*.npz"))
    if not any(found.values()) and len(packed) == 1:
        return _of_npz(packed[0])
    missing = [_FILES[name] for name, file in found.items() if file is None]
    if missing:
        raise TaskError(
            f"{path} lacks {missing[0]}; expected {', '.join(_FILES.values())}, each as it is or with .gz, or one .npz "
            f"with {', '.join(ARRAYS)}."
        )
    return {name: partial(read_idx, file) for name, file in found.items() if file is not None}


def _idx_file(folder: Path, stem: str) -> Path | None:
    names = (f"{name}{ending}" for name in (stem, stem.replace("-idx", ".idx")) for ending in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _of_npz(file: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            missing = [name for name in ARRAYS if name not in stored]
            if missing:
                raise TaskError(f"{file} lacks the array {missing[0]}; it holds {', '.join(stored) or 'nothing'}.")
            arrays = {name: torch.from_numpy(stored[name]) for name in ARRAYS}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise TaskError(f"{file} can't be read as .npz with plain arrays: {error}.") from error
    return {name: partial(_same, array) for name, array in arrays.items()}


def _same(array: Tensor) -> Tensor:
    return array


def _images(arrays: dict[str, Callable[[], Tensor]], part: str) -> Tensor:
    images = arrays[f"x_{part}"]()
    if images.dtype != torch.uint8 or images.ndim != 3 or not len(images):
        raise TaskError(
            f"x_{part} is {images.dtype} of shape {tuple(images.shape)}, expected grey images as bytes of shape "
            "(N, H, W)."
        )
    return images[:, None]


def _labels(arrays: dict[str, Callable[[], Tensor]], part: str, images: int) -> Tensor:
    labels = arrays[f"y_{part}"]()
    if labels.shape != (images,) or labels.is_floating_point() or int(labels.min()) < 0:
        raise TaskError(
            f"y_{part} is {labels.dtype} of shape {tuple(labels.shape)}, expected one class number from 0 for each of "
            f"the {images} images."
        )
    return labels.long()
