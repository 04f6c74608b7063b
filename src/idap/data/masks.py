"""Segmentation: images in `PATH/train/images` and masks in `PATH/train/masks`, and the same below val and test.

A mask is an image of one number per pixel, the class. It has the name of its image; the suffix may differ.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from idap.data.images import decode as decode_image
from idap.data.images import image_loader, image_size, open_image, read_image, to_tensor, visible_images
from idap.data.layout import check_colours, check_count, check_path, parts_in, with_val
from idap.data.tensors import IMAGENET_MEAN, IMAGENET_STD
from idap.errors import ConfigError, TaskError
from idap.training.batch import Batch, Outputs, default_logits
from idap.training.task import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Pair = tuple[Path, Path]
CHECKED = 50
"""How many masks of a part are read and checked before any work, evenly spread."""


class FolderMasks(Dataset[tuple[Tensor, Tensor]]):
    """Images `(3, H, W)` with their masks `(H, W)`, read on access.

    Args:
        pairs: pairs of an image and its mask.
        classes: number of classes; a mask that holds another number is an error.
        size: H and W; None: images and masks keep their size.
        ignore: class number of pixels that don't count.
        mirror: whether each image is mirrored, with its mask, with probability 1/2.
        scale: mean and deviation of each colour.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        classes: int,
        size: tuple[int, int] | None,
        ignore: int,
        mirror: bool,
        scale: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        self.pairs, self.classes, self.size = pairs, classes, size
        self.ignore, self.mirror, self.scale = ignore, mirror, scale

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        file, mask_file = self.pairs[place]
        image, mask = read_image(file), read_mask(mask_file, self.size)
        _check_numbers(mask, self.classes, self.ignore, mask_file)
        if self.size is not None:
            image = image.resize(self.size[::-1])
        pixels = to_tensor(image, *self.scale)
        if self.mirror and torch.rand(1) < 0.5:
            return pixels.flip(-1), mask.flip(-1)
        return pixels, mask


def masks(  # noqa: PLR0913 - one argument per key of a recipe
    path: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    classes: int | None = None,
    ignore: int = 255,
    batch_size: int = 8,
    workers: int = 0,
    augment: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    val_share: float = 0.1,
    seed: int = 0,
) -> Task:
    """Load images and masks, for the task of predicting the class of every pixel.

    Args:
        path: a folder with train, and optionally val and test; each holds `images` and `masks`.
        size: height and width to which images and masks are resized, in pixels, or one number for both; not needed if
            all have the same size.
        classes: number of classes; if left out, they are counted in the masks of train.
        ignore: class number of pixels that don't count.
        batch_size: images in a batch.
        workers: processes that read images; 0: the training process reads them itself.
        augment: mirror half of the training images.
        mean: mean of each colour, subtracted from pixels in [0, 1].
        std: standard deviation of each colour, by which they are then divided.
        val_share: share of the training images that is used for validation if there is no `val`.
        seed: seed of that choice.

    Returns:
        A `Task` with cross-entropy, and mean intersection over union (mIoU, in [0, 1]) over all pixels of a split. The
        model gives `(B, C, h, w)`, `.logits`, or a dict with "out"; logits smaller than the mask are enlarged.

    Raises:
        TaskError: a folder is missing or empty, an image has no mask or one of another size, a file can't be read, or
            a mask holds a number that is no class.
        ConfigError: a setting is out of range.
    """
    listed = _list_pairs(path)
    count = check_count("classes", mask_classes(path, ignore=ignore) if classes is None else classes, 2)
    class_notes = () if classes is not None else (f"the masks of train hold {count} classes",)
    check_colours(mean, std)
    shape = _shape(size, listed)
    _check_some(listed, count, ignore)
    pairs, split_notes = with_val(listed, val_share, seed, "images")
    made = partial(FolderMasks, classes=count, size=shape, ignore=ignore, scale=(mean, std))
    loader = partial(image_loader, batch_size=batch_size, workers=workers)
    parts = {
        "train": loader(made(pairs["train"], mirror=augment), shuffle=True),
        "val": loader(made(pairs["val"], mirror=False)),
        "test": loader(made(pairs["test"], mirror=False)) if "test" in pairs else None,
        "calibration": loader(made(pairs["train"], mirror=False), shuffle=True),
    }
    return segmentation(parts, num_classes=count, ignore=ignore, notes=(*class_notes, *split_notes))


def _check_some(listed: Mapping[str, list[Pair]], classes: int, ignore: int) -> None:
    """Check some masks of each part for numbers that are not classes."""
    for pairs in listed.values():
        for _, mask in pairs[:: -(-len(pairs) // CHECKED)]:
            _check_numbers(read_mask(mask, None), classes, ignore, mask)


def segmentation(parts: Mapping[str, Any], *, num_classes: int, ignore: int = 255, notes: tuple[str, ...] = ()) -> Task:
    """Build the task of predicting the class of every pixel: cross-entropy and mIoU.

    Args:
        parts: "train" and "val", and optionally "test" and "calibration" -> batches of images `(B, 3, H, W)` and masks
            `(B, H, W)`, int64.
        num_classes: number of classes C.
        ignore: class number of pixels that don't count.
        notes: what a reader of the run should know.
    """
    from torchmetrics.classification import MulticlassJaccardIndex  # noqa: PLC0415 - slow to import

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        return F.cross_entropy(_dense(outputs, batch[1], num_classes), batch[1], ignore_index=ignore)

    def update(metric: "Metric", outputs: Outputs, batch: Batch) -> None:
        metric.update(_dense(outputs, batch[1], num_classes).argmax(1), batch[1])

    return Task(
        **parts,
        loss=loss,
        metric=MulticlassJaccardIndex(num_classes, ignore_index=ignore, validate_args=False),
        metric_name="mIoU",
        update=update,
        logits=lambda outputs: _raw(outputs).movedim(1, -1),
        notes=notes,
    )


def mask_classes(path: str | Path, *, ignore: int = 255) -> int:
    """Count the classes of a folder of masks: the largest number in the masks of train, plus one.

    Raises:
        TaskError: as for `masks`.
    """
    largest = -1
    for _, file in _list_pairs(path)["train"]:
        found = read_mask(file, None)
        largest = max(largest, int(torch.where(found == ignore, -1, found).max()))
    if largest < 1:
        raise TaskError(
            f"the masks of train in {path} hold no class above 0 ({ignore} is ignored); expected two classes or more, "
            "numbered from 0. Store a foreground of 255 as 1."
        )
    return largest + 1


def read_mask(file: Path, size: tuple[int, int] | None) -> Tensor:
    """Read a mask.

    Args:
        file: an image of one number per pixel, grey or with a palette.
        size: height and width of the result, which takes the number of the nearest pixel; None: as in the file.

    Returns:
        int64 `(H, W)`.

    Raises:
        TaskError: it can't be read, or has colours.
    """
    from PIL.Image import Resampling  # noqa: PLC0415 - an optional extra, which `open_image` names

    with open_image(file) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise TaskError(
                f"the mask {file} has colours ({image.mode}), expected one number per pixel, the class; save it as a "
                "grey image of class numbers."
            )
        found = decode_image(file, image.copy)
    if size is not None:
        found = found.resize(size[::-1], Resampling.NEAREST)
    return torch.from_numpy(np.array(found).astype(np.int64))


def _list_pairs(path: str | Path) -> dict[str, list[Pair]]:
    """The pairs of each part, checked."""
    folder = check_path(path, "a folder with train/images and train/masks")
    if not folder.is_dir():
        raise TaskError(f"{folder} is a file, expected a folder with train/images and train/masks.")
    return {part: _pairs(where) for part, where in parts_in(folder, Path.is_dir, "a folder").items()}


def _pairs(folder: Path) -> list[Pair]:
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise TaskError(f"{folder} has no folder {name}; expected {folder / 'images'} and {folder / 'masks'}.")
    images = visible_images(folder / "images")
    found = {file.stem: file for file in visible_images(folder / "masks")}
    if not images:
        raise TaskError(f"{folder / 'images'} holds no images.")
    pairs = []
    for image in images:
        mask = found.pop(image.stem, None)
        if mask is None:
            raise TaskError(f"{image} has no mask; expected {folder / 'masks' / image.stem}.png.")
        if image_size(image) != image_size(mask):
            raise TaskError(
                f"the mask {mask} has {_by(image_size(mask))} pixels, its image {image} {_by(image_size(image))}; they "
                "must be equal. data.size resizes both in the same way."
            )
        pairs.append((image, mask))
    if found:
        raise TaskError(f"the mask {next(iter(found.values()))} has no image in {folder / 'images'}.")
    return pairs


def _shape(size: int | Sequence[int] | None, listed: Mapping[str, list[Pair]]) -> tuple[int, int] | None:
    if size is not None:
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        if len(sizes) != 2 or min(sizes) < 1:
            raise ConfigError(f"size is {list(sizes)}, expected height and width in pixels, or one number for both.")
        return sizes
    first = listed["train"][0][0]
    for pairs in listed.values():
        for image, _ in pairs:
            if image_size(image) != image_size(first):
                raise TaskError(
                    f"{image} has {_by(image_size(image))} pixels, {first} {_by(image_size(first))}; a batch needs one "
                    "size: set data.size = [height, width]."
                )
    return None


def _check_numbers(mask: Tensor, classes: int, ignore: int, file: Path) -> None:
    strange = mask[(mask != ignore) & ((mask >= classes) | (mask < 0))]
    if len(strange):
        raise TaskError(
            f"the mask {file} holds {int(strange[0])}, expected classes 0 to {classes - 1}, or {ignore} where a pixel "
            "does not count. Set data.classes, or data.ignore."
        )


def _raw(outputs: Outputs) -> Tensor:
    inner = outputs["out"] if isinstance(outputs, Mapping) and "out" in outputs else outputs
    return default_logits(inner)


def _dense(outputs: Outputs, mask: Tensor, num_classes: int) -> Tensor:
    """Logits `(B, C, H, W)` at the size of the mask."""
    logits = _raw(outputs)
    if logits.ndim != 4 or logits.shape[1] != num_classes:
        raise TaskError(
            f"the model's logits have shape {tuple(logits.shape)}; segmentation with {num_classes} classes expects "
            f"(B, {num_classes}, H, W). Give the model as many outputs: model.classes = {num_classes}."
        )
    if logits.shape[2:] == mask.shape[1:]:
        return logits
    return F.interpolate(logits, size=mask.shape[1:], mode="bilinear", align_corners=False)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
