"""The samples that a run works with: for calibration, for tracing, for the clock."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from idap.compress.config import Config
from idap.training.batch import Inputs
from idap.training.task import Task


def calibration_batches(task: Task, config: Config) -> tuple[Any, ...]:
    """The first batches of the calibration data; a loader that shuffles does so by the run's seed."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        return tuple(islice(task.batches("calibration"), config.calibration_batches))


def few_samples(example: Inputs, count: int) -> Inputs:
    """The first samples of example inputs: tensors whose first dimension is the batch are shortened."""
    batch = samples_in(example, default=0)

    def shorten(leaf: Any) -> Any:
        return leaf[:count].clone() if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch else leaf

    args, kwargs = tree_map(shorten, example)
    return tuple(args), dict(kwargs)


def samples_in(example: Inputs, *, default: int = 1) -> int:
    """The number of samples of example inputs: the first dimension of the first tensor that has one."""
    return next(
        (int(leaf.shape[0]) for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()), default
    )
