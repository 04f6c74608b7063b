"""Every mistake in a task is found before work begins, and named; finding it leaves no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from idap.errors import TaskError
from idap.training.check import check_task
from idap.training.task import Task, classification

X = torch.arange(12.0).reshape(4, 3)
Y = torch.tensor([0, 1, 2, 1])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))


def custom(**changes):
    settings = {
        "train": [(X, Y)],
        "val": [(X, Y)],
        "loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        "metric": lambda outputs, batch: 0.5,
        "metric_name": "score",
    }
    return Task(**(settings | changes))


def test_a_good_task_passes_and_leaves_the_model_and_the_random_state_alone():
    model = net()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    check_task(model, classification(loader, loader, num_classes=3, test=loader, calibration=loader))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("worst", torch.tensor(torch.nan))

    def forward(self, x):
        self.calls += 1
        self.worst = torch.zeros(())  # another tensor under the same name
        return self.layer(x)


def test_buffers_that_a_pass_changes_are_put_back():
    model = Counting()
    calls = model.calls
    check_task(model, custom())
    assert model.calls is calls and float(calls) == 0
    assert model.worst.isnan()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda model: torch.compile(model, backend="eager"),
            r"^the model was compiled by torch\.compile, .* Pass .*, model\._orig_mod, and",
        ),
        (
            lambda model: nn.Sequential(torch.compile(model, backend="eager")),
            r"^module '0' was compiled .*, model\.0\._orig_mod, and compile the",
        ),
        (lambda model: model.forward, r"^the model is a method; expected a torch\.nn\.Module\.$"),
    ],
)
def test_what_can_not_be_traced_is_refused_at_once(wrap, message):
    with pytest.raises(TaskError, match=message):
        check_task(wrap(net()), custom())


def test_inference_mode_is_refused_by_name():
    with torch.inference_mode(), pytest.raises(TaskError, match=r"^this was called within torch\.inference_mode\(\), "):
        check_task(net(), custom())


def test_modes_come_back_after_a_failure_too():
    model = net()
    model[1].eval()
    with pytest.raises(TaskError):
        check_task(model, custom(train=[(X[:, :2], Y)]))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_a_torchmetrics_metric_is_not_touched():
    metric = MulticlassAccuracy(3)
    check_task(net(), custom(metric=metric, update=lambda m, outputs, batch: m.update(outputs, batch[1])))
    assert metric.update_count == 0


class Once:
    def __init__(self, batches):
        self.iterator = iter(batches)

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize("split", ["train", "val", "test", "calibration"])
@pytest.mark.parametrize("once", [lambda batches: (batch for batch in batches), Once])
def test_batches_that_can_be_read_once_are_refused_unread(split, once):
    batches = once([(X, Y)])
    with pytest.raises(
        TaskError, match=rf"the '{split}' split is a.*, which can be read only once, .*Pass a DataLoader"
    ):
        check_task(net(), custom(**{split: batches}))
    assert len(list(batches)) == 1


def test_a_loader_with_persistent_workers_is_not_taken_for_a_generator():
    class Persistent(DataLoader):
        """Hands out one iterator, as persistent workers make a DataLoader do; without their processes."""

        kept = None

        def __iter__(self):
            self.kept = self.kept or super().__iter__()
            return self.kept

    loader = Persistent(TensorDataset(X, Y), batch_size=2)
    check_task(net(), custom(train=loader))


@pytest.mark.parametrize("split", ["train", "val", "test", "calibration"])
def test_empty_split_is_refused(split):
    with pytest.raises(TaskError, match=f"the '{split}' split gave no batches"):
        check_task(net(), custom(**{split: []}))


def test_what_cannot_be_iterated_is_refused():
    with pytest.raises(TaskError, match=r"the 'val' split is an int, which cannot be iterated; expected batches"):
        check_task(net(), custom(val=3))


def test_inputs_the_model_does_not_take_are_described():
    expected = (
        r"Sequential failed on the first batch of 'train', called with \(a float32 tensor of shape \(4, 2\)\): "
        r"RuntimeError: .*\. Pass inputs= to the task"
    )
    with pytest.raises(TaskError, match=expected):
        check_task(net(), custom(train=[(X[:, :2], Y)]))


def test_failing_inputs_function_is_named():
    with pytest.raises(TaskError, match=r"inputs= of the task failed on the first batch of 'train': KeyError: 'x'"):
        check_task(net(), custom(inputs=lambda batch: {}["x"]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda o, b: F.cross_entropy(o, b[1], reduction="none"), r"the loss is a float32 tensor of shape \(4,\)"),
        (lambda o, b: 0.5, "the loss is a float on the first batch of 'train'; expected a tensor of shape"),
        (lambda o, b: o.sum() * torch.nan, "the loss is nan on the first batch of 'train'; expected a finite number"),
        (lambda o, b: o.sum().detach(), "the loss has no gradient on the first batch of 'train'.*detach"),
        (lambda o, b: o[7, 7], "the loss failed on the first batch of 'train': IndexError"),
    ],
)
def test_bad_loss_is_named(loss, expected):
    with pytest.raises(TaskError, match=expected):
        check_task(net(), custom(loss=loss))


def test_the_loss_is_tried_on_calibration_batches_too():
    with pytest.raises(TaskError, match=r"label 9 is outside 0\.\.2: the model has 3 outputs"):
        check_task(net(), classification([(X, Y)], [(X, Y)], num_classes=3, calibration=[(X, Y.clone().fill_(9))]))


def test_frozen_model_is_named():
    with pytest.raises(TaskError, match=r"no parameter of Sequential requires a gradient\. Call model\.requires_grad_"):
        check_task(net().requires_grad_(False), custom())


def test_gradients_are_wanted_even_where_the_caller_switched_them_off():
    with torch.no_grad():
        check_task(net(), custom())


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (lambda o, b: torch.nan, "metric 'score' is nan on batch 0 of the 'val' split; expected a finite number"),
        (lambda o, b: {"map": 0.1}, r"metric 'score' gave a dict of \(map: a float\) on batch 0 of the 'val' split"),
        (lambda o, b: o, r"metric 'score' gave a float32 tensor of shape \(4, 3\) .*; expected one number"),
        (lambda o, b: 1 / 0, "metric 'score' failed on the first batch of 'val': ZeroDivisionError: division by zero"),
    ],
)
def test_bad_metric_is_named(metric, expected):
    with pytest.raises(TaskError, match=expected):
        check_task(net(), custom(metric=metric))


def test_a_dead_model_is_told_from_a_loss_that_looks_away():
    dead = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    nn.init.zeros_(dead[0].weight)
    nn.init.constant_(dead[0].bias, -1.0)
    with pytest.raises(TaskError, match=r"Sequential gives the same outputs for each of the 4 samples .* it is dead, "):
        check_task(dead, custom())
    with pytest.raises(TaskError, match=r"the loss does not depend on the model: .*Make loss= use the outputs"):
        check_task(net(), custom(loss=lambda outputs, batch: 0 * outputs.sum()))


def test_bad_logits_are_named():
    with pytest.raises(TaskError, match=r"logits= of the task failed on the first batch of 'val': KeyError: 'x'"):
        check_task(net(), custom(logits=lambda outputs: {}["x"]))
    with pytest.raises(
        TaskError, match=r"logits= of the task gave a list of .* on the first batch of 'val'; expected a ten"
    ):
        check_task(net(), custom(logits=lambda outputs: [outputs]))


@pytest.mark.parametrize(("split", "label"), [("train", 3), ("val", 37), ("test", -2)])
def test_label_outside_the_outputs_is_named_in_each_split(split, label):
    batches = {"train": [(X, Y)], "val": [(X, Y)], "test": [(X, Y)]} | {split: [(X, torch.tensor([0, 1, 2, label]))]}
    task = classification(batches["train"], batches["val"], test=batches["test"], num_classes=3)
    with pytest.raises(TaskError, match=rf"label {label} is outside 0\.\.2: the model has 3 outputs"):
        check_task(net(), task)
