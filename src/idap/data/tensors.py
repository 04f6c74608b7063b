"""Data sets held as whole tensors, and loaders that index them without a loop over samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from idap.errors import ConfigError, TaskError
from idap.training.batch import Batch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TensorLoader:
    """Yields batches of tensors, anew at each iteration; shuffles with torch's global random state.

    Args:
        tensors: tensors of equal length N; a batch is a tuple with a part of each.
        batch_size: samples in a batch; the last one may be smaller.
        shuffle: take the samples in a new order at each iteration.
        augment: changes the first tensor of each batch, for example `crop_and_flip`.
        drop_last: leave out a smaller last batch.

    Raises:
        ConfigError: the batch size is not above 0.
        TaskError: there is no tensor, or lengths differ.

    Example:
        >>> loader = TensorLoader((torch.arange(5), torch.arange(5) * 10), 2)
        >>> len(loader), list(loader)[-1]
        (3, (tensor([4]), tensor([40])))
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {batch_size}.")
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) != 1:
            raise TaskError(f"a TensorLoader needs one or more tensors of equal length, got lengths {lengths}.")
        self.tensors = tuple(tensors)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last

    def __len__(self) -> int:
        samples = len(self.tensors[0])
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.tensors[0])) if self.shuffle else None
        for number in range(len(self)):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            first, *others = (tensor[part if order is None else order[part]] for tensor in self.tensors)
            yield (first if self.augment is None else self.augment(first), *others)


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set of images `(B, *shape)` and labels `(B,)`, split into parts that share no sample.

    Args:
        train: training batches, shuffled.
        val: validation batches.
        test: test batches, which are used only once, at the end; None if there are none.
        num_classes: number of classes.
        shape: shape of one image.
        calibration: training images without augmentation, as in an evaluation; None: `train` is used.
        notes: what a reader of a run should know, such as where validation data were taken from.
    """

    train: Iterable[Batch]
    val: Iterable[Batch]
    test: Iterable[Batch] | None
    num_classes: int
    shape: tuple[int, ...]
    calibration: Iterable[Batch] | None = None
    notes: tuple[str, ...] = ()


def digits(seed: int = 0, batch_size: int = 64) -> Splits:
    """Load the 1,797 handwritten digits that come with scikit-learn, 8×8 pixels.

    Args:
        seed: seed of the split into 60 % train, 20 % val and 20 % test, each with the same share of every class.
        batch_size: samples in a batch.

    Returns:
        `Splits` with images of shape `(1, 8, 8)`, scaled so that the training pixels have mean 0 and deviation 1.

    Raises:
        TaskError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional extra
        from sklearn.model_selection import train_test_split  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise TaskError("the digits come with scikit-learn, which is missing. Run: pip install 'idap[demo]'") from error
    bunch = load_digits()
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    train, rest = train_test_split(np.arange(len(labels)), test_size=0.4, stratify=bunch.target, random_state=seed)
    val, test = train_test_split(rest, test_size=0.5, stratify=bunch.target[rest], random_state=seed)
    images = (images - images[train].mean()) / images[train].std()
    return Splits(
        train=TensorLoader((images[train], labels[train]), batch_size, shuffle=True),
        val=TensorLoader((images[val], labels[val]), batch_size),
        test=TensorLoader((images[test], labels[test]), batch_size),
        num_classes=10,
        shape=(1, 8, 8),
    )


def cifar10(
    path: str | Path,
    *,
    batch_size: int = 128,
    val_size: int = 5000,
    val_from: Literal["train", "test"] = "train",
    seed: int = 0,
    augment: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Splits:
    """Load CIFAR-10 from `cifar10_train.npz` and `cifar10_test.npz`, which hold pixel differences.

    Args:
        path: the folder of the two files.
        batch_size: samples in a batch.
        val_size: number of images that are used for validation.
        val_from: the set from which they are taken. Weights that were trained on the whole training set have memorised
            it, so that a loss of accuracy would not show there: "test" takes the validation images from the test set
            and leaves the rest of it for the test.
        seed: seed of the choice of the validation images.
        augment: crop and flip the training images at random.
        mean: mean of each colour, subtracted from pixels in [0, 1].
        std: standard deviation of each colour, by which they are then divided.

    Returns:
        `Splits` with images of shape `(3, 32, 32)`.

    Raises:
        ConfigError: `val_size` leaves nothing of the set it is taken from, or is not above 0.
        TaskError: a file is missing.
    """
    if val_from not in ("train", "test"):
        raise ConfigError(f"val_from must be 'train' or 'test', got {val_from!r}.")
    sets = {name: read_delta_images(Path(path) / f"cifar10_{name}.npz") for name in ("train", "test")}
    available = len(sets[val_from][1])
    if not 0 < val_size < available:
        raise ConfigError(f"val_size must be in 1..{available - 1}, got {val_size}.")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    sets["val"] = _take(sets[val_from], order[:val_size])
    sets[val_from] = _take(sets[val_from], order[val_size:])
    scale = partial(normalise, mean=mean, std=std)
    images, labels = sets["train"]
    # Augmented images stay bytes until they are cropped: the border is black, and they take a quarter of the memory.
    learn = images if augment else scale(images)
    change = (lambda pixels: scale(crop_and_flip(pixels))) if augment else None
    return Splits(
        train=TensorLoader((learn, labels), batch_size, shuffle=True, augment=change),
        val=TensorLoader((scale(sets["val"][0]), sets["val"][1]), batch_size),
        test=TensorLoader((scale(sets["test"][0]), sets["test"][1]), batch_size),
        num_classes=10,
        shape=(3, 32, 32),
        notes=(f"{val_size:,} of the {available:,} images of {val_from}, drawn with seed {seed}, are for validation",),
    )


def _take(samples: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    return samples[0][places], samples[1][places]


def read_delta_images(file: Path) -> tuple[Tensor, Tensor]:
    """Decode colour images that are stored as differences of pixels, which compress well.

    Args:
        file: a `.npz` with `delta`, uint8 `(3, N, H, W)`, and `labels`, `(N,)`.

    Returns:
        Images, uint8 RGB `(N, 3, H, W)`, and labels, int64 `(N,)`.

    Raises:
        TaskError: the file is missing.
    """
    if not file.is_file():
        raise TaskError(
            f"{file} is missing; CIFAR-10 is read from cifar10_train.npz and cifar10_test.npz in one folder. "
            "Give the folder that holds both."
        )
    with np.load(file, allow_pickle=False) as stored:
        delta, labels = torch.from_numpy(stored["delta"]), torch.tensor(stored["labels"], dtype=torch.int64)
    # Sums wrap modulo 256, as the encoder's differences did.
    planes = delta.cumsum(2, dtype=torch.uint8).cumsum(3, dtype=torch.uint8)
    return torch.stack([planes[0] + planes[1], planes[1], planes[2] + planes[1]], dim=1), labels


def normalise(pixels: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale bytes to [0, 1], subtract each colour's mean and divide by its deviation.

    Args:
        pixels: uint8 `(N, C, H, W)`.
        mean: C numbers.
        std: C numbers.

    Returns:
        float32 `(N, C, H, W)`.
    """
    centre, width = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (pixels.float() / 255 - centre) / width


def crop_and_flip(pixels: Tensor, *, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels, filling with zeros, and mirror half of them, drawn at random.

    Args:
        pixels: `(N, C, H, W)`.
        pad: the largest shift, in pixels.

    Returns:
        A tensor of the same shape and type.
    """
    count, channels, height, width = pixels.shape
    padded = F.pad(pixels, (pad, pad, pad, pad))
    rows = torch.randint(2 * pad + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * pad + 1, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
