"""The samples that a run works with: for calibration, and for tracing."""

import hashlib
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from idap.compress.config import Config
from idap.surgery.compare import batch_size, resized_inputs
from idap.training.batch import Batch, Inputs, move, tensors_of
from idap.training.generators import drawn_by
from idap.training.task import Task


def calibration_batches(task: Task, config: Config) -> tuple[Any, ...]:
    """The first batches of the calibration data; a loader that shuffles does so by the run's seed."""
    batches = task.batches("calibration")
    with drawn_by(batches, config.seed):
        return tuple(islice(batches, config.calibration_batches))


def samples_digest(batches: Sequence[Batch]) -> str:
    """A short name for batches: a hash of every tensor in them."""
    found = hashlib.sha256()
    for tensor in tensors_of(move(batches, "cpu")):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def few_samples(example: Inputs, count: int) -> Inputs:
    """The first samples of example inputs: tensors whose first dimension is the batch are shortened."""
    return resized_inputs(*example, min(count, batch_size(*example) or 1))
