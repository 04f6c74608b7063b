"""A task says what it lacks; the ready-made classification measures what it should."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from idap.errors import ConfigError, TaskError
from idap.training.task import Task, classification

X = torch.arange(6.0).reshape(2, 3)
BATCH = (X, torch.tensor([0, 2]))


def custom(**changes):
    settings = {
        "train": [BATCH],
        "val": [BATCH],
        "loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        "metric": lambda outputs, batch: 0.5,
        "metric_name": "score",
    }
    return Task(**(settings | changes))


def test_each_split_gives_its_own_batches():
    task = custom(train=[1], val=[2], test=[3], calibration=[4])
    assert [task.batches(split) for split in ("train", "val", "test", "calibration")] == [[1], [2], [3], [4]]


def test_calibration_falls_back_to_train():
    assert custom(train=[1]).batches("calibration") == [1]


def test_missing_split_names_the_argument():
    with pytest.raises(TaskError, match=r"the task has no 'test' split\. Pass test=batches"):
        custom().batches("test")


def test_unknown_split_lists_the_known():
    with pytest.raises(TaskError, match=r"there is no split 'dev'; splits are train, val, test, calibration\."):
        custom().batches("dev")


def test_torchmetrics_metric_needs_update():
    with pytest.raises(TaskError, match=r"metric 'score' is a torchmetrics MulticlassAccuracy, and nothing updates it"):
        custom(metric=MulticlassAccuracy(3))


def test_update_without_a_torchmetrics_metric_is_refused():
    with pytest.raises(TaskError, match=r"metric 'score' is a function, which is called as metric\(outputs, batch\)"):
        custom(update=lambda metric, outputs, batch: None)


def test_example_gives_the_first_calibration_inputs_on_the_device():
    args, kwargs = custom(calibration=[(X[:1], BATCH[1])]).example("meta")
    assert [(value.device.type, value.shape) for value in args] == [("meta", (1, 3))]
    assert kwargs == {}


@pytest.mark.parametrize(("empty", "named"), [({"calibration": []}, "calibration"), ({"train": []}, "train")])
def test_example_of_an_empty_split_is_refused(empty, named):
    with pytest.raises(TaskError, match=rf"the '{named}' split gave no batches\. .* pass a DataLoader"):
        custom(**empty).example("cpu")


def test_run_passes_keywords():
    class Named(nn.Module):
        def forward(self, *, a, b):
            return a - b

    assert custom().run(Named(), {"a": 3, "b": 2, "labels": 0}) == 1


def test_printing_a_task_does_not_print_its_data():
    assert "tensor" not in repr(custom())


class TestClassification:
    logits = torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]])

    def task(self, **changes):
        return classification([BATCH], [BATCH], **({"num_classes": 3} | changes))

    def test_metric_is_the_share_of_correct_answers(self):
        task = self.task()
        assert task.metric(self.logits, BATCH) == 0.5
        assert task.metric_name == "accuracy"
        assert task.higher_is_better

    def test_loss_is_cross_entropy_with_smoothing(self):
        expected = F.cross_entropy(self.logits, BATCH[1], label_smoothing=0.1)
        assert self.task(label_smoothing=0.1).loss(self.logits, BATCH) == expected

    def test_small_integer_types_will_do(self):
        batch = {"x": X, "labels": BATCH[1].to(torch.uint8)}
        assert self.task().loss(self.logits, batch) == F.cross_entropy(self.logits, BATCH[1])

    @pytest.mark.parametrize(("label", "named"), [(3, "3"), (-1, "-1")])
    def test_label_outside_the_outputs_is_named(self, label, named):
        with pytest.raises(TaskError, match=rf"label {named} is outside 0\.\.2: the model has 3 outputs\. Renumber"):
            self.task().loss(self.logits, (X, torch.tensor([0, label])))

    @pytest.mark.parametrize(
        ("labels", "described"),
        [
            (torch.eye(3)[:2], "a float32 tensor of shape \\(2, 3\\)"),
            (torch.tensor([[0], [1]]), "an int64 tensor of shape \\(2, 1\\)"),
            (torch.tensor([0.0, 1.0]), "a float32 tensor of shape \\(2,\\)"),
            (torch.tensor([True, False]), "a bool tensor of shape \\(2,\\)"),
        ],
    )
    def test_labels_that_are_no_indices_are_described(self, labels, described):
        with pytest.raises(TaskError, match=rf"the labels are {described}; expected integers of shape \(2,\)"):
            self.task().metric(self.logits, (X, labels))

    def test_other_number_of_outputs_is_refused(self):
        with pytest.raises(TaskError, match=r"logits have shape \(2, 3\); classification with num_classes=10 expects"):
            self.task(num_classes=10).loss(self.logits, BATCH)

    def test_settings_are_checked(self):
        with pytest.raises(ConfigError, match="num_classes must be 2 or more, got 1"):
            self.task(num_classes=1)
        with pytest.raises(ConfigError, match=r"label_smoothing must be in \[0, 1\), got 1"):
            self.task(label_smoothing=1.0)
