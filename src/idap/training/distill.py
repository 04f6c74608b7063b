"""Learn from the outputs of another model."""

from torch import Tensor
from torch.nn import functional as F

from idap.errors import ConfigError, TaskError


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Measure how far the student's softened class probabilities are from the teacher's.

    KL(teacher ‖ student) of the softmax of logits / T, times T², which keeps the gradient's size independent of T.

    Args:
        student: logits of shape `(..., C)`.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T, above 0; the larger, the more the small probabilities count.

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
            "they must be equal. Let logits= of the task pick the same tensor from both."
        )
    classes = student.shape[-1]
    # Half precision has too few digits for the logarithms of small probabilities.
    ours, theirs = (logits if logits.dtype.itemsize > 2 else logits.float() for logits in (student, teacher.detach()))
    divergence = F.kl_div(
        F.log_softmax(ours.reshape(-1, classes) / temperature, dim=1),
        F.log_softmax(theirs.reshape(-1, classes) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2
