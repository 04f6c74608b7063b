"""Training learns, can be repeated, keeps the best state and stops when numbers break."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from idap.data.tensors import digits
from idap.errors import ConfigError, TaskError
from idap.models.nets import DigitsResNet
from idap.training.evaluate import evaluate
from idap.training.fit import fit
from idap.training.recovery import Recovery, learning_rate
from idap.training.task import Task, classification


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


@pytest.fixture
def task():
    """Two clouds of points around (-1, -1) and (1, 1); 8 shuffled training batches."""
    noise = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 2
    points = (labels[:, None] * 2 - 1) + 0.5 * torch.randn(128, 2, generator=noise)
    data = TensorDataset(points, labels)
    return classification(DataLoader(data, 16, shuffle=True), DataLoader(data, 64), num_classes=2)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_and_reports(task):
    model = net()
    report = fit(model, task, Recovery(epochs=3, lr=0.1))
    assert evaluate(model, task) > 0.95
    assert report.steps == 24
    assert len(report.losses) == 3
    assert report.losses[-1] < 0.5 * report.first_loss
    assert math.isfinite(report.last_loss)
    assert report.best is None
    assert report.seconds > 0


def test_no_epochs_train_nothing(task):
    model = net()
    before = copy.deepcopy(model.state_dict())
    assert fit(model, task, Recovery(epochs=0)).steps == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("epochs", "steps", "passes"), [(0.5, 4, 1), (0.01, 1, 1), (1, 8, 1), (1.25, 10, 2)])
def test_epochs_may_be_fractions(task, epochs, steps, passes):
    report = fit(net(), task, Recovery(epochs=epochs))
    assert (report.steps, len(report.losses)) == (steps, passes)


def test_a_loader_without_length_is_counted(task):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from task.train.dataset

    stream = classification(DataLoader(Stream(), 16), task.val, num_classes=2)
    assert fit(net(), stream, Recovery(epochs=1.5)).steps == 12


def test_same_seed_same_weights_and_the_random_state_stays(task):
    first, second, other = net(), net(), net()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    fit(first, task, Recovery(epochs=2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    fit(second, task, Recovery(epochs=2))
    fit(other, task, Recovery(epochs=2, seed=1))
    assert same(first.state_dict(), second.state_dict())
    assert not same(first.state_dict(), other.state_dict())


def test_modes_come_back_and_gradients_are_cleared(task):
    model, teacher = net(), net(1)
    model[1].eval()
    teacher[3].eval()
    fit(model, task, Recovery(), teacher=teacher)
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True]
    assert [module.training for module in teacher.modules()] == [True, True, True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_matrices_decay(task, optimizer):
    model = net()
    nn.init.ones_(model[0].bias)
    before = copy.deepcopy(model.state_dict())
    still = Task(
        train=task.train,
        val=task.val,
        loss=lambda outputs, batch: (outputs * 0).sum(),
        metric=task.metric,
        metric_name="accuracy",
    )
    fit(model, still, Recovery(optimizer=optimizer, weight_decay=0.1, lr=0.1))
    assert model[0].weight.norm() < before["0.weight"].norm()
    assert torch.equal(model[0].bias, before["0.bias"])
    assert torch.equal(model[1].weight, before["1.weight"])


def test_frozen_parameters_stay(task):
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, task, Recovery())
    assert torch.equal(model[0].weight, before)


class TestTeacher:
    def test_the_student_comes_near_and_the_teacher_stays(self, task):
        teacher, student = net(1), net(2)
        fit(teacher, task, Recovery(epochs=5, lr=0.1))
        before = copy.deepcopy(teacher.state_dict())
        report = fit(student, task, Recovery(epochs=5, lr=0.1, distil=1.0), teacher=teacher)
        assert report.losses[-1] < 0.3 * report.losses[0]
        assert same(before, teacher.state_dict())
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_the_loss_is_the_weighted_mean_of_both(self, task):
        teacher = net(1)
        ends = {
            distil: fit(net(2), task, Recovery(distil=distil, epochs=0.1), teacher=teacher).first_loss
            for distil in (0.0, 0.25, 1.0)
        }
        assert ends[0.25] == pytest.approx(0.75 * ends[0.0] + 0.25 * ends[1.0])

    def test_without_a_teacher_the_weight_does_not_count(self, task):
        first, second = (fit(net(), task, Recovery(distil=distil)).last_loss for distil in (0.0, 1.0))
        assert first == second

    def test_the_model_itself_is_refused(self, task):
        model = net()
        with pytest.raises(TaskError, match="the teacher is the model itself"):
            fit(model, task, Recovery(), teacher=model)

    def test_another_device_is_refused(self, task):
        with pytest.raises(TaskError, match=r"the teacher is on meta, the model on cpu\. Call teacher\.to\('cpu'\)"):
            fit(net(), task, Recovery(), teacher=net().to("meta"))


class TestJudge:
    def fit_with_scores(self, task, values, **settings):
        """Fit with a judge that returns these values; gives the report, the states it scored, and the last state."""
        settings = {"average": False, **settings}
        model, seen, answers = net(), [], iter(values)

        def judge(judged):
            assert not judged.training
            seen.append(copy.deepcopy(judged.state_dict()))
            return next(answers)

        report = fit(model, task, Recovery(epochs=2.5, **settings), judge=judge)
        return report, seen, model.state_dict()

    def test_it_is_asked_before_and_after_each_epoch(self, task):
        report, seen, _ = self.fit_with_scores(task, [0.1, 0.2, 0.3, 0.4])
        assert len(seen) == 4
        assert report.best == 0.4

    @pytest.mark.parametrize(
        ("values", "best"), [([9, 1, 2, 3], 0), ([0, 9, 2, 3], 1), ([0, 1, 2, 3], 3), ([5, 5, 5, 4], 2)]
    )
    def test_the_best_state_is_the_last(self, task, values, best):
        report, seen, final = self.fit_with_scores(task, values)
        assert same(seen[best], final)
        assert report.best == max(values)

    def test_buffers_come_back_too(self, task):
        _, seen, final = self.fit_with_scores(task, [9, 1, 2, 3])
        assert torch.equal(final["1.running_mean"], seen[0]["1.running_mean"])
        assert final["1.num_batches_tracked"] == 0

    @pytest.mark.parametrize(
        ("values", "best"),
        [
            ([1, 2, 3, 4, 5], 4),
            ([1, 2, 3, 4, 4], 3),  # no better than a trained state
            ([9, 1, 2, 3, 8], 0),
            ([9, 1, 2, 3, 10], 4),  # although no trained state is better than the first
        ],
    )
    def test_the_average_of_the_first_and_the_last_state_is_tried(self, task, values, best):
        report, seen, final = self.fit_with_scores(task, values, average=True)
        assert len(seen) == 5
        assert same(seen[best], final)
        assert (report.best, report.averaged) == (max(values), best == 4)
        assert [score for _, score in report.scores] == values[:4]
        for name, value in seen[4].items():
            first, last = seen[0][name], seen[3][name]
            torch.testing.assert_close(value, (first + last) / 2 if value.is_floating_point() else last)

    def test_infinite_values_are_not_averaged(self, task):
        model, seen = net(), []
        model.register_buffer("mask", torch.tensor([0.0, -math.inf]))

        def judge(judged):
            seen.append(judged.mask.tolist())
            return len(seen)

        assert fit(model, task, Recovery(epochs=1), judge=judge).averaged  # each state is better than the last
        assert seen == [[0.0, -math.inf]] * 3

    def test_an_average_that_can_not_be_judged_is_not_kept(self, task):
        report, seen, final = self.fit_with_scores(task, [1, 2, 3, 4, math.nan], average=True)
        assert same(seen[3], final)
        assert (report.best, report.averaged) == (4, False)

    def test_nan_is_refused(self, task):
        with pytest.raises(TaskError, match="the judge gave nan; expected a number that is higher for a better model"):
            self.fit_with_scores(task, [0.1, math.nan])


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(task):
    def loss(outputs, batch, calls=[]):  # noqa: B006 - counts the steps
        calls.append(1)
        return outputs.sum() * (math.nan if len(calls) == 3 else 1)

    broken = Task(train=task.train, val=task.val, loss=loss, metric=task.metric, metric_name="accuracy")
    model = net()
    with pytest.raises(TaskError, match=r"the loss is nan at step 2 of 8, learning rate 0\.0095\d*\. Lower lr"):
        fit(model, broken, Recovery())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_holds_nan_is_named_as_the_cause(task):
    (images, labels), *others = task.train
    broken = classification([*others, (images * math.nan, labels)], task.val, num_classes=2)
    with pytest.raises(TaskError, match=r"the loss is nan at step .*\. This training batch itself holds NaN: check"):
        fit(net(), broken, Recovery())


def test_a_gradient_that_is_not_finite_stops_too(task):
    broken = Task(
        train=task.train,
        val=task.val,
        loss=lambda outputs, batch: (outputs * 0).sum().sqrt(),
        metric=task.metric,
        metric_name="accuracy",
    )
    with pytest.raises(TaskError, match=r"the gradient norm is nan at step 0 of 8"):
        fit(net(), broken, Recovery())


def test_nothing_to_train_is_refused(task):
    with pytest.raises(TaskError, match="no parameter of Sequential requires a gradient"):
        fit(net().requires_grad_(False), task, Recovery())


@pytest.mark.parametrize("batches", [[], iter([])])
def test_nothing_to_train_on_is_refused(task, batches):
    with pytest.raises(TaskError, match="the 'train' split gave no batches"):
        fit(net(), classification(batches, task.val, num_classes=2), Recovery())


def test_a_generator_is_noticed_even_without_a_check(task):
    once = classification((batch for batch in list(task.train)), task.val, num_classes=2)
    with pytest.raises(TaskError, match=r"the 'train' split gave no batches\. .* it can be read only once"):
        fit(net(), once, Recovery())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"optimizer": "adam"}, "optimizer must be 'sgd' or 'adamw', got 'adam'"),
        ({"epochs": -1}, "epochs must be 0 or more and finite, got -1"),
        ({"lr": math.nan}, "lr must be above 0 and finite, got nan"),
        ({"temperature": -1}, "temperature must be above 0 and finite, got -1"),
        ({"clip_norm": 0}, "clip_norm must be above 0 and finite, got 0"),
        ({"momentum": 1}, r"momentum must be in \[0, 1\), got 1"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\), got -0.1"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more and finite, got -1"),
        ({"distil": 1.5}, r"distil must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_are_checked(setting, expected):
    with pytest.raises(ConfigError, match=expected):
        Recovery(**setting)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (3, 0.99), (100, 0.1)])
def test_learning_rate_rises_then_falls_and_is_never_zero(steps, warmup):
    rates = [learning_rate(step, steps, lr=1.0, warmup=warmup) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1
    assert min(rates) > 0


def test_digits_are_learned():
    parts = digits()
    task = classification(parts.train, parts.val, num_classes=parts.num_classes)
    torch.manual_seed(0)
    model = DigitsResNet(width=8, blocks=(1, 1, 1))
    fit(model, task, Recovery(epochs=4, lr=0.05))
    assert evaluate(model, task) > 0.95
