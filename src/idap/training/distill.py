"""The losses of distillation: from the outputs of a teacher, and from its features (`Loop` adds them up)."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from idap.errors import ConfigError, TaskError
from idap.training.batch import Outputs
from idap.training.processes import totals


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Measure how far the student's softened class probabilities are from the teacher's.

    KL(teacher ‖ student) of softmax(logits / T), times T², so that the size of the gradient does not depend on T.

    Args:
        student: logits of shape `(..., C)`.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T, above 0; the larger it is, the more the small probabilities count.

    Returns:
        A scalar: the mean over all dimensions but the last, in float32 or wider.

    Raises:
        ConfigError: the temperature is not above 0.
        TaskError: the shapes differ.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
        >>> distillation_loss(student, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), temperature=2.0).item()
        0.0
        >>> round(distillation_loss(student, torch.tensor([[2.0, 0.0], [1.0, 0.0]]), temperature=1.0).item(), 3)
        0.164
    """
    if temperature <= 0:
        raise ConfigError(f"temperature must be above 0, got {temperature}.")
    if student.shape != teacher.shape:
        raise TaskError(
            f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            "they must be equal. Make logits= of the task return the same tensor of both."
        )
    classes = student.shape[-1]
    ours, theirs = _wide(student), _wide(teacher.detach())
    divergence = F.kl_div(
        F.log_softmax(ours.reshape(-1, classes) / temperature, dim=1),
        F.log_softmax(theirs.reshape(-1, classes) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


class Features(Protocol):
    """Collects features of a student and of its teacher while they run: pairs of tensors that should be equal."""

    def student(self, run: Callable[[], Outputs]) -> tuple[Outputs, list[Tensor]]:
        """Run the student, and return its outputs and its features in order."""

    def teacher(self, run: Callable[[], Outputs]) -> tuple[Outputs, list[Tensor]]:
        """Run the teacher, and return its outputs and its features, in the order and shapes of the student's."""


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Measure how far a student's features are from its teacher's, relative to the size of the teacher's.

    The mean over all pairs of E‖s − t‖² / E‖t‖², with expectations over the batch; a pair counts 0 if t is 0.

    Args:
        student: features, at least one.
        teacher: features of the same shapes; no gradient flows into them.

    Returns:
        A scalar in float32 or wider; with several processes, the distance is the sum of what they return.

    Raises:
        TaskError: there are no features, or the shapes differ.

    Example:
        >>> feature_distance([torch.ones(2, 3)], [torch.full((2, 3), 2.0)]).item()
        0.25
    """
    shapes = [[tuple(tensor.shape) for tensor in features] for features in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        raise TaskError(f"the student's features have shapes {shapes[0]}, the teacher's {shapes[1]}; must be equal.")
    theirs = [_wide(tensor.detach()) for tensor in teacher]
    sizes = totals(*torch.stack([tensor.square().sum() for tensor in theirs]).tolist())
    parts = [
        (_wide(ours) - target).square().sum() / (size or math.inf)
        for ours, target, size in zip(student, theirs, sizes, strict=True)
    ]
    return torch.stack(parts).mean()


def _wide(tensor: Tensor) -> Tensor:
    """Widen half precision, which has too few digits for logarithms of small probabilities and for sums."""
    return tensor if tensor.dtype.itemsize > 2 else tensor.float()
