"""Validation data for a task that has none: a part of its training data, which then no longer trains."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from idap.errors import TaskError
from idap.training.batch import Batch, describe
from idap.training.task import Task

SHARE = 0.1
"""Of the training data that decides."""


def with_validation(task: Task, *, seed: int = 0) -> tuple[Task, str]:
    """Give a task validation data, split off its training data, where it has none.

    Args:
        task: left as it is.
        seed: of the choice.

    Returns:
        The task with validation data, and what was done in one sentence; the task itself and "" if it has some.

    Raises:
        TaskError: the training data can't be split.

    Example:
        >>> from idap.training.task import classification
        >>> batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))] * 20
        >>> task, told = with_validation(classification(batches, num_classes=2))
        >>> len(task.train), len(task.val), told
        (18, 2, 'the task has no validation data: 2 of its 20 training batches decide, the others train')
    """
    if task.val is not None:
        return task, ""
    if isinstance(task.train, DataLoader):
        train, val, counts = _split_loader(task.train, seed)
    elif isinstance(task.train, Sequence) and len(task.train) > 1:
        chosen = _chosen(len(task.train), _tenth(len(task.train)), seed)
        train = [batch for place, batch in enumerate(task.train) if place not in chosen]
        val = [batch for place, batch in enumerate(task.train) if place in chosen]
        counts = f"{len(val)} of its {len(task.train)} training batches decide, the others train"
    else:
        raise TaskError(
            f"the task has no validation data, and its training data is {describe(task.train)}, which can't be split: "
            "pass val=batches."
        )
    return replace(task, train=train, val=val), f"the task has no validation data: {counts}"


def _split_loader(loader: DataLoader[Batch], seed: int) -> tuple[Iterable[Batch], Iterable[Batch], str]:
    data = loader.dataset
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler) and loader.batch_size is not None
    if isinstance(data, IterableDataset) or not plain or len(data) < 2:  # type: ignore[arg-type]
        raise TaskError(
            f"the task has no validation data, and its training loader, over {describe(data)}, has its own way of "
            "choosing samples: split the data yourself and pass val=batches."
        )
    total = len(data)  # type: ignore[arg-type]
    count = _tenth(total)
    if _leaves_one(loader, total - count) and not _leaves_one(loader, total):
        count += 1 if total - count > 1 else 0
    chosen = _chosen(total, count, seed)
    rest = [place for place in range(total) if place not in chosen]

    def made(places: list[int], *, training: bool) -> DataLoader[Batch]:
        return DataLoader(
            Subset(data, places),
            batch_size=loader.batch_size,
            shuffle=training and isinstance(loader.sampler, RandomSampler),
            drop_last=training and loader.drop_last,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator if training else None,
            persistent_workers=loader.persistent_workers,
        )

    counts = (
        f"{len(chosen)} of its {total} training samples decide, as the training loader gives them, augmentations "
        "included; the others train"
    )
    return made(rest, training=True), made(sorted(chosen), training=False), counts


def _leaves_one(loader: DataLoader[Batch], samples: int) -> bool:
    """Whether the last batch would hold a single sample, which a batch norm can't learn from."""
    size = loader.batch_size or 1
    return not loader.drop_last and size > 1 and samples % size == 1


def _tenth(total: int) -> int:
    return max(1, round(SHARE * total))


def _chosen(total: int, count: int, seed: int) -> set[int]:
    dice = torch.Generator().manual_seed(seed)
    return set(torch.randperm(total, generator=dice)[:count].tolist())
