"""Measuring gives the true value and leaves the model as it was."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from idap.errors import DivergedError, TaskError
from idap.progress import Silent
from idap.training.evaluate import evaluate, keep_modes, output_error, score
from idap.training.task import Task, classification

X = torch.eye(3)
# As a model, the identity answers 0, 1, 2: right twice in the first batch, never in the second.
BATCHES = [(X, torch.tensor([0, 1, 1])), (X[:1], torch.tensor([2]))]


def custom(metric, **changes):
    settings = {"train": BATCHES, "val": BATCHES, "loss": lambda outputs, batch: outputs.sum(), "metric_name": "score"}
    return Task(metric=metric, **(settings | changes))


def test_a_function_is_averaged_over_samples_not_batches():
    assert evaluate(nn.Identity(), classification([], BATCHES, num_classes=3)) == 0.5


def test_own_size_weighs_the_batches():
    task = custom(lambda outputs, batch: float(len(outputs)), size=lambda batch: 1)
    assert evaluate(nn.Identity(), task) == 2.0


def test_a_torchmetrics_metric_gives_the_same_and_stays_untouched():
    metric = MulticlassAccuracy(3, average="micro")
    metric.update(X, torch.tensor([0, 0, 0]))
    task = custom(metric, update=lambda m, outputs, batch: m.update(outputs, batch[1]))
    assert evaluate(nn.Identity(), task) == 0.5
    assert metric.update_count == 1


def test_the_model_runs_in_evaluation_mode_without_gradients_and_gets_its_modes_back():
    seen = []

    class Probe(nn.Linear):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return super().forward(x)

    model = nn.Sequential(Probe(3, 3), nn.Dropout(0.9).eval())
    evaluate(model, classification([], BATCHES, num_classes=3))
    assert seen == [(False, False, False)] * 2
    assert [module.training for module in model.modules()] == [True, True, False]


def test_modes_come_back_after_a_failure():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(TaskError), keep_modes(model):
        assert not model.training
        raise TaskError
    assert [module.training for module in model.modules()] == [True, True, False]


def test_each_batch_is_reported():
    class Told(Silent):
        def __init__(self):
            self.heard = []

        def phase(self, title, total):
            self.heard.append((title, total))
            return super().phase(title, total)

        def advance(self, note=""):
            self.heard.append("step")

    progress = Told()
    evaluate(nn.Identity(), classification([], [], test=BATCHES, num_classes=3), split="test", progress=progress)
    assert progress.heard == [("evaluate test", 2), "step", "step"]


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)])
def test_metric_that_is_not_finite_is_refused(value):
    with pytest.raises(
        TaskError, match=r"metric 'score' is (nan|inf) on batch 0 of the 'val' split; expected a finite"
    ):
        evaluate(nn.Identity(), custom(lambda outputs, batch: value))


def test_torchmetrics_metric_that_is_not_finite_is_refused():
    task = custom(MeanMetric(), update=lambda m, outputs, batch: m.update(outputs.mean(), weight=0))
    with pytest.raises(TaskError, match=r"metric 'score' is nan on the 'val' split; expected a finite number"):
        evaluate(nn.Identity(), task)


def test_metric_that_is_no_number_is_refused():
    with pytest.raises(
        TaskError, match=r"metric 'score' gave a str on batch 0 of the 'val' split; expected one number"
    ):
        evaluate(nn.Identity(), custom(lambda outputs, batch: "good"))


def test_outputs_that_hold_nan_are_counted_where_the_metric_hides_them():
    def hidden(outputs, batch):
        return torch.nan_to_num(outputs, nan=0.0).mean()

    found = score(nn.Identity(), custom(hidden, val=[*BATCHES, (X * math.nan, torch.tensor([0, 0, 0]))]))
    assert math.isfinite(found.metric)
    assert (found.batches, found.broken) == (3, 1)

    class Words(nn.Module):
        def forward(self, x):
            return "no tensor"

    assert score(Words(), custom(lambda outputs, batch: 1.0)) == (1.0, 2, 0)


@pytest.mark.parametrize(
    ("outputs", "broken"),
    [
        (types.SimpleNamespace(logits=X * math.nan), 2),
        ({"logits": X, "all": [X, X * math.nan]}, 2),
        ((X, X.to_sparse()), 0),
        ((X, torch.tensor([1, 2]), torch.full_like(X, math.inf)), 0),
    ],
)
def test_nan_is_found_in_outputs_of_every_kind(outputs, broken):
    class Gives(nn.Module):
        def forward(self, x):
            return outputs

    assert score(Gives(), custom(lambda outputs, batch: 1.0)).broken == broken


def test_a_metric_that_can_not_take_nan_says_what_the_model_did():
    def strict(outputs, batch):
        if outputs.isnan().any():
            raise ValueError("Input contains NaN.")
        return 1.0

    with pytest.raises(
        DivergedError, match=r"^the model's outputs hold NaN, and the metric raised ValueError: Input con"
    ):
        score(nn.Identity(), custom(strict, val=[(X * math.nan, torch.tensor([0, 0, 0]))]))


def test_empty_and_missing_splits_are_refused():
    with pytest.raises(TaskError, match="the 'val' split gave no batches"):
        evaluate(nn.Identity(), custom(lambda outputs, batch: 1.0, val=[]))
    with pytest.raises(TaskError, match="the task has no 'test' split"):
        evaluate(nn.Identity(), custom(lambda outputs, batch: 1.0), split="test")
    with pytest.raises(TaskError, match="all batches of the 'val' split have size 0"):
        evaluate(nn.Identity(), custom(lambda outputs, batch: 1.0, size=lambda batch: 0))


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_output_error_is_relative_to_the_reference():
    task = custom(lambda outputs, batch: 1.0)
    assert output_error(Scaled(1), Scaled(1), task) == 0
    assert output_error(Scaled(0), Scaled(3), task) == 1
    assert output_error(Scaled(3), Scaled(4), task) == pytest.approx(1 / 16)


def test_output_error_of_different_shapes_is_refused():
    with pytest.raises(TaskError, match=r"the model's logits have shape \(3, 2\), those of the reference \(3, 3\)"):
        output_error(nn.Linear(3, 2), nn.Identity(), custom(lambda outputs, batch: 1.0))


@pytest.mark.parametrize(("ours", "theirs"), [(1, 0), (math.nan, 1), (1, math.inf)])
def test_output_error_that_is_not_known_is_refused(ours, theirs):
    with pytest.raises(TaskError, match=r"on the 'val' split the squared logits of the reference sum to "):
        output_error(Scaled(ours), Scaled(theirs), custom(lambda outputs, batch: 1.0))


def test_output_error_on_an_empty_split_is_refused():
    with pytest.raises(TaskError, match="the 'val' split gave no batches"):
        output_error(nn.Identity(), nn.Identity(), custom(lambda outputs, batch: 1.0, val=[]))


def test_a_loader_that_shuffles_gives_the_same_number_each_time_and_draws_nothing():
    torch.manual_seed(0)
    images, labels = torch.randn(97, 3), torch.randint(0, 3, (97,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    task = custom(lambda outputs, batch: F.cross_entropy(outputs, batch[1]), val=loader)
    model, before = nn.Linear(3, 3), torch.get_rng_state()
    assert len({evaluate(model, task) for _ in range(4)}) == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fails", ["model", "metric"])
def test_an_error_on_a_later_batch_names_it(fails):
    def metric(outputs, batch):
        if len(outputs) == 1:
            raise ValueError("too few")
        return 1.0

    batches = [*BATCHES[:1], (torch.eye(2), BATCHES[1][1])] if fails == "model" else BATCHES
    task = custom(metric if fails == "metric" else lambda outputs, batch: 1.0, val=batches)
    why = "ValueError: too few" if fails == "metric" else "RuntimeError: mat1 and mat2"
    with pytest.raises(TaskError, match=f"^batch 1 of the 'val' split, counted from 0, can't be measured .*{why}"):
        evaluate(nn.Linear(3, 3), task)


def test_an_empty_batch_is_named():
    with pytest.raises(TaskError, match=r"^a batch holds no samples\."):
        evaluate(nn.Identity(), classification([], [(X[:0], torch.zeros(0).long())], num_classes=3))
