"""The distillation loss is the divergence it claims to be."""

import pytest
import torch
from torch.nn import functional as F

from idap.errors import ConfigError, TaskError
from idap.training.distill import distillation_loss, feature_distance


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


class TestFeatures:
    def test_each_pair_counts_alike_whatever_its_size(self):
        ours = [torch.zeros(4, 2, requires_grad=True), torch.full((1, 30), 2.0)]
        theirs = [torch.full((4, 2), 5.0), torch.full((1, 30), 1.0)]
        distance = feature_distance(ours, theirs)
        assert distance.item() == pytest.approx((1 + 1) / 2)
        distance.backward()
        assert ours[0].grad is not None

    def test_half_precision_is_summed_in_full(self):
        ours, theirs = torch.full((300, 300), 1.0, dtype=torch.bfloat16), torch.full((300, 300), 2.0)
        distance = feature_distance([ours], [theirs.bfloat16()])
        assert distance.dtype == torch.float32
        assert distance.item() == pytest.approx(0.25)

    def test_a_teacher_that_is_silent_teaches_nothing(self):
        assert feature_distance([torch.ones(2, 2)], [torch.zeros(2, 2)]).item() == 0

    @pytest.mark.parametrize(("ours", "theirs"), [([], []), ([(2, 3)], [(2, 4)]), ([(2, 3)], [(2, 3), (2, 3)])])
    def test_other_shapes_are_refused(self, ours, theirs):
        with pytest.raises(TaskError, match=r"the student's features have shapes .* must be equal"):
            feature_distance([torch.zeros(shape) for shape in ours], [torch.zeros(shape) for shape in theirs])
