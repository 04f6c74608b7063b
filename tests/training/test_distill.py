"""The distillation loss is the divergence it claims to be."""

import pytest
import torch
from torch.nn import functional as F

from idap.errors import ConfigError, TaskError
from idap.training.distill import distillation_loss


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_equals_the_formula(shape, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    p, q = F.softmax(teacher / temperature, -1), F.softmax(student / temperature, -1)
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    assert distillation_loss(student, teacher, temperature=temperature).item() == pytest.approx(expected.item())


def test_only_the_student_learns():
    student, teacher = torch.zeros(1, 2, requires_grad=True), torch.tensor([[1.0, 0.0]], requires_grad=True)
    distillation_loss(student, teacher, temperature=1.0).backward()
    assert teacher.grad is None
    assert student.grad[0, 0] < 0 < student.grad[0, 1]


def test_the_gradient_keeps_its_size_at_high_temperatures():
    teacher = torch.tensor([[1.0, 0.0, -1.0]])
    sizes = []
    for temperature in (20.0, 200.0):
        student = torch.zeros(1, 3, requires_grad=True)
        distillation_loss(student, teacher, temperature=temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_half_precision_is_widened():
    student, teacher = torch.tensor([[0.0, 20.0]], dtype=torch.float16), torch.tensor([[0.0, 20.5]])
    assert distillation_loss(student, teacher, temperature=1.0).dtype == torch.float32


def test_different_shapes_are_refused():
    with pytest.raises(TaskError, match=r"the student's logits have shape \(2, 3\), the teacher's \(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4), temperature=1.0)


def test_temperature_is_checked():
    with pytest.raises(ConfigError, match=r"temperature must be above 0, got 0"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)
