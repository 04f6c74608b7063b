"""Loads images from folders, one folder per class: `PATH/train/CLASS/*.jpg`, and the same below val and test."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from idap.data.layout import check_colours, check_count, check_path, parts_in, with_val
from idap.data.tensors import IMAGENET_MEAN, IMAGENET_STD, Splits
from idap.errors import TaskError

if TYPE_CHECKING:
    from PIL.Image import Image

Sample = tuple[Path, int]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
CROP = 0.875
"""Side of the central crop, as a share of the shorter side; ImageNet models are evaluated this way."""
LEAST_AREA = 0.35
"""Smallest share of an image in a random crop: milder than for training from scratch, since recoveries are short."""
CHECKED = 10_000
"""How many images of a part are opened before any work, evenly spread; opening all of a million takes minutes."""


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Images with their labels, read on access.

    Args:
        samples: file and label of each image.
        change: turns an image into a tensor.
    """

    def __init__(self, samples: Sequence[Sample], change: "Callable[[Image], Tensor]") -> None:
        self.samples, self.change = samples, change

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        file, label = self.samples[place]
        return self.change(read_image(file)), label


def imagefolder(  # noqa: PLR0913 - one argument per key of a recipe
    path: str | Path,
    *,
    size: int = 224,
    batch_size: int = 32,
    workers: int = 0,
    augment: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    val_share: float = 0.1,
    seed: int = 0,
) -> Splits:
    """Load images from folders named after their classes.

    Args:
        path: a folder with `train`, and optionally `val` and `test`; each holds one folder per class.
        size: side of the square that the model sees, in pixels; the shorter side of an image is resized to 1/0.875 of
            it, and the centre is cropped.
        batch_size: images in a batch.
        workers: processes that read images; 0: the training process reads them itself.
        augment: train on random crops of the images, half of them mirrored.
        mean: mean of each colour, subtracted from pixels in [0, 1].
        std: standard deviation of each colour, by which they are then divided.
        val_share: share of the training images that is used for validation if there is no `val`.
        seed: seed of that choice.

    Returns:
        `Splits` with images of shape `(3, size, size)`; labels number the classes of train in the order of their names.

    Raises:
        TaskError: a folder is missing or empty, a class has no images, an image can't be read, or Pillow is missing.
        ConfigError: a setting is out of range.
    """
    check_count("size", size)
    check_colours(mean, std)
    folder = check_path(path, "a folder with train/CLASS/*.jpg")
    parts = parts_in(folder, Path.is_dir, "a folder of classes")
    classes = class_names(folder)
    listed: Mapping[str, Sequence[Sample]] = {part: _list_images(where, classes, part) for part, where in parts.items()}
    for samples in listed.values():
        check_images([file for file, _ in samples])
    listed, notes = with_val(listed, val_share, seed, "images")
    plain, changed = _Middle(size, mean, std), _Crop(size, mean, std)
    made = partial(image_loader, batch_size=batch_size, workers=workers)
    return Splits(
        train=made(FolderImages(listed["train"], changed if augment else plain), shuffle=True),
        val=made(FolderImages(listed["val"], plain)),
        test=made(FolderImages(listed["test"], plain)) if "test" in listed else None,
        calibration=made(FolderImages(listed["train"], plain), shuffle=True),
        num_classes=len(classes),
        shape=(3, size, size),
        notes=notes,
    )


def class_names(path: str | Path) -> list[str]:
    """The classes of an image folder: the names of the folders below train, in order.

    Raises:
        TaskError: there are none, or only one.
    """
    folder = check_path(path, "a folder with train/CLASS/*.jpg")
    if not folder.is_dir():
        raise TaskError(f"{folder} is a file, expected a folder with train/CLASS/*.jpg.")
    train = parts_in(folder, Path.is_dir, "a folder of classes")["train"]
    names = [each.name for each in _visible(train) if each.is_dir()]
    if len(names) < 2:
        raise TaskError(
            f"{train} holds {len(names)} folders, expected one for each of two or more classes, as in "
            f"{train / 'cat'}/1.jpg."
        )
    return names


def image_loader(data: Dataset[Any], *, batch_size: int, workers: int, shuffle: bool = False) -> DataLoader[Any]:
    """Make a loader for a data set whose samples are read one by one."""
    check_count("batch_size", batch_size)
    check_count("workers", workers, 0)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0)


def check_images(files: Sequence[Path]) -> None:
    """Open images without decoding them, to find files that are no images before any work; of many, only some.

    Raises:
        TaskError: a file is not an image.
    """
    for file in files[:: -(-len(files) // CHECKED) or 1]:
        image_size(file)


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of an image, in pixels.

    Raises:
        TaskError: the file is not an image.
    """
    with open_image(file) as image:
        found: tuple[int, int] = image.size
        return found


def read_image(file: Path) -> "Image":
    """Read an image as red, green and blue.

    Raises:
        TaskError: it can't be read.
    """
    with open_image(file) as image:
        return decode(file, lambda: image.convert("RGB"))


def open_image(file: Path) -> "Image":
    """Open an image.

    Raises:
        TaskError: it is not an image, or Pillow is missing.
    """
    try:
        from PIL import Image  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise TaskError("images are read by Pillow, which is missing. Run: pip install 'idap[vision]'") from error
    return decode(file, lambda: Image.open(file))


def decode(file: Path, call: "Callable[[], Image]") -> "Image":
    """Run a call of Pillow on a file; if it fails, the error names the file.

    Raises:
        TaskError: the call fails.
    """
    try:
        return call()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's own errors are of these kinds
        raise TaskError(f"{file} can't be read as an image ({error}); replace it, or delete it.") from error


def visible_images(folder: Path) -> list[Path]:
    """The images in a folder, in the order of their names."""
    return [file for file in _visible(folder) if file.suffix.lower() in SUFFIXES]


def to_tensor(image: "Image", mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn an image into float32 `(3, H, W)`, scaled to [0, 1], then normalised by each colour's mean and deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
    centre, width = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return ((pixels - centre) / width).contiguous()


class _Middle:
    """Resizes the shorter side to `size / CROP` and crops the centre."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size, self.mean, self.std = size, mean, std

    def __call__(self, image: "Image") -> Tensor:
        side = CROP * min(image.size)
        return _resize_crop(image, (image.width - side) / 2, (image.height - side) / 2, side, side, self)


class _Crop(_Middle):
    """Crops a random part of the image, stretches it slightly, and mirrors it with probability 1/2."""

    def __call__(self, image: "Image") -> Tensor:
        area = float(torch.empty(1).uniform_(LEAST_AREA, 1)) * image.width * image.height
        ratio = float(torch.empty(1).uniform_(-0.288, 0.288).exp())  # 3/4 to 4/3
        width, height = min((area * ratio) ** 0.5, image.width), min((area / ratio) ** 0.5, image.height)
        x, y = (float(torch.rand(1)) * rest for rest in (image.width - width, image.height - height))
        pixels = _resize_crop(image, x, y, width, height, self)
        return pixels.flip(-1) if torch.rand(1) < 0.5 else pixels


def _resize_crop(image: "Image", x: float, y: float, width: float, height: float, to: _Middle) -> Tensor:
    from PIL.Image import Resampling  # noqa: PLC0415 - installed, since there is an image

    box = (x, y, x + width, y + height)
    return to_tensor(image.resize((to.size, to.size), Resampling.BILINEAR, box=box), to.mean, to.std)


def _list_images(folder: Path, classes: Sequence[str], part: str) -> list[Sample]:
    """The images of a part with their labels."""
    samples: list[Sample] = []
    for each in _visible(folder):
        if each.is_dir() and each.name not in classes:
            raise TaskError(
                f"{each} is a class that train does not have; its classes are {', '.join(classes[:8])}"
                f"{', ...' if len(classes) > 8 else ''}. Add it to train, or remove it."
            )
    for label, name in enumerate(classes):
        found = visible_images(folder / name) if (folder / name).is_dir() else []
        # Train and val need every class; in test, classes may be missing.
        if not found and part != "test":
            what = "is empty" if (folder / name).is_dir() else "is missing"
            raise TaskError(
                f"class {name!r} has no images in {part}: {folder / name} {what}; expected {', '.join(SUFFIXES[:4])}, "
                "... there. Add some, or remove the class from every part."
            )
        samples += [(file, label) for file in found]
    if not samples:
        raise TaskError(f"{folder} holds no images; expected {', '.join(SUFFIXES[:4])}, ... in a folder per class.")
    return samples


def _visible(folder: Path) -> Iterator[Path]:
    return (each for each in sorted(folder.iterdir()) if not each.name.startswith("."))
