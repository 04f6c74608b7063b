"""Two processes compute what one process computes: sums, gradients, metrics, whole trainings."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from idap.errors import TaskError
from idap.training.batch import default_size
from idap.training.evaluate import evaluate, output_error
from idap.training.fit import fit
from idap.training.processes import (
    Draw,
    align_,
    from_main,
    is_main,
    local_items,
    on_main,
    process_count,
    process_rank,
    raise_everywhere,
    share,
    sum_gradients_,
    totals,
    work_locally,
)
from idap.training.recovery import Recovery
from idap.training.task import Task, classification
from tests.together import in_two

SAMPLES = torch.randn(75, 6, generator=torch.Generator().manual_seed(0))
LABELS = (SAMPLES[:, 0] > 0).long() + (SAMPLES[:, 1] > 0).long()


class Net(nn.Module):
    """Has a parameter that nothing uses, and one that only some batches use."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.ReLU())
        self.head, self.unused = nn.Linear(10, 3), nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += len(x)
        return self.head(self.body(x))


class Sums:
    """Features: what the body of each model gives."""

    def __init__(self, student, teacher):
        self._models = {"student": student, "teacher": teacher}

    def _look(self, name, run):
        found = []
        handle = self._models[name].body.register_forward_hook(lambda _module, _args, output: found.append(output))
        outputs = run()
        handle.remove()
        return outputs, found

    def student(self, run):
        return self._look("student", run)

    def teacher(self, run):
        return self._look("teacher", run)


def batches(size):
    return list(zip(SAMPLES.split(size), LABELS.split(size), strict=True))


def task(size=16, **changes):
    shuffled = DataLoader(TensorDataset(SAMPLES, LABELS), size, shuffle=True)
    return classification(**({"train": shuffled, "val": batches(20), "num_classes": 3} | changes))


def train_beside_teacher(size):
    """Train beside a teacher with everything that is summed: uneven last batches, features, a judge."""
    model, teacher, own = Net(process_rank()), Net(1), task(size)
    if process_count() == 1:
        model = Net(0)
    recovery = Recovery(epochs=2, lr=0.1, features=0.5, norm_batches=2)
    features = Sums(model, teacher)
    report = fit(model, own, recovery, teacher=teacher, features=features, judge=lambda judged: evaluate(judged, own))
    return dict(model.state_dict()), (report.steps, report.first_loss, report.last_loss, report.best)


def measure_splits():
    model, reference = Net(0), Net(1)
    accuracy = task()
    own = {"train": [], "loss": lambda outputs, batch: outputs.sum(), "metric_name": "score"}
    meters = {
        metric: Task(**own, val=val, metric=metric, update=lambda m, outputs, batch: m.update(outputs, batch[1]))
        for metric, val in (
            (MulticlassAccuracy(3, average="micro"), batches(20)),
            (MulticlassAUROC(3), batches(20)),
            (MulticlassAccuracy(3, average="micro"), batches(75)),
            (MulticlassAUROC(3), batches(75)),
        )
    }
    found = [evaluate(model, own) for own in (accuracy, *meters.values())]
    found.append(evaluate(model, task(val=batches(75))))
    return [*found, output_error(model, reference, accuracy), output_error(model, reference, task(val=batches(75)))]


def sum_shuffled_samples():
    """The order of a loader that shuffles is the same in both, whatever else they draw."""
    torch.manual_seed(process_rank())
    own = task(val=DataLoader(TensorDataset(SAMPLES, LABELS), 7, shuffle=True))
    counted = Task(
        train=[], val=own.val, loss=own.loss, metric=lambda outputs, batch: float(batch[0].sum()), metric_name="sum"
    )
    return evaluate(Net(), counted)


def tools():
    found = {}
    found["who"] = (process_count(), process_rank(), is_main())
    found["totals"] = totals(1.5, process_rank())
    found["from main"] = from_main(float(process_rank()))
    found["local items"] = local_items([0, 1, 2, 3, 4])
    found["on main"] = on_main(lambda: {"rank": process_rank()})
    with work_locally():
        found["locally"] = (process_count(), process_rank(), totals(2.0), on_main(process_rank), local_items([1, 2]))
    model = Net(process_rank())
    align_(model)
    found["aligned"] = float(model.head.weight[0, 0].detach())
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 2), 1.0 + process_rank())
    if process_rank() == 1:
        parameters[1].grad = torch.ones(2, 2)
    sum_gradients_(parameters)
    found["gradients"] = [None if parameter.grad is None else float(parameter.grad.sum()) for parameter in parameters]
    torch.manual_seed(process_rank())
    draw, loader = Draw(seed=3), DataLoader(TensorDataset(torch.arange(6)), 3, shuffle=True)
    found["drawn"] = [
        [batch.tolist(), torch.rand(process_rank() + 1).shape][0] for _ in range(2) for (batch,) in draw.batches(loader)
    ]
    return found


def fail_in(where, kind):
    """Fail in one process; the other raises the same error."""

    def fail():
        if process_rank() == where:
            raise kind(f"in process {where}")

    if where == 0:
        on_main(fail)
    with raise_everywhere():
        fail()


class Foreign(Exception):  # noqa: N818 - it is no error
    def __init__(self, one, two):
        super().__init__(one)


def fail_strangely():
    with raise_everywhere():
        if process_rank() == 1:
            raise Foreign("a", "b")


SIZES = (16, 8, 37)
FAILURES = ((0, TaskError), (1, TaskError), (0, ValueError))


def failure(call, *args):
    with pytest.raises(Exception) as caught:
        call(*args)
    return type(caught.value).__name__, str(caught.value)


def everything():
    return {
        "trained": {size: train_beside_teacher(size) for size in SIZES},
        "measured": measure_splits(),
        "shuffled": sum_shuffled_samples(),
        "tools": tools(),
        "failed": [failure(fail_in, where, kind) for where, kind in FAILURES],
        "failed strangely": failure(fail_strangely),
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes find that do all of it."""
    found = in_two(everything, tmp_path_factory.mktemp("two"))
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


@pytest.mark.slow
class TestTwo:
    """Two processes give the result of one."""

    @pytest.mark.parametrize("size", SIZES)
    def test_they_train_what_one_trains(self, both, size):
        """75 samples: the last batches have 11, 3 and 1."""
        (first, reported), (second, other) = (each["trained"][size] for each in both)
        assert_close(first, second, rtol=0, atol=0)
        assert reported == other
        expected, expected_report = train_beside_teacher(size)
        counted = {"seen"}
        for name in expected.keys() - counted:
            assert_close(first[name], expected[name], rtol=1e-4, atol=1e-5)
        assert reported == pytest.approx(expected_report, rel=1e-4)

    def test_they_measure_what_one_measures(self, both):
        first, second = (each["measured"] for each in both)
        assert first == second
        assert first == pytest.approx(measure_splits(), rel=1e-6)

    def test_loaders_that_shuffle_give_both_the_same(self, both):
        first, second = (each["shuffled"] for each in both)
        assert first == second

    def test_their_tools(self, both):
        first, second = (dict(each["tools"]) for each in both)
        assert (first.pop("who"), second.pop("who")) == ((2, 0, True), (2, 1, False))
        assert (first.pop("local items"), second.pop("local items")) == ([0, 2, 4], [1, 3])
        assert first == second
        assert first["totals"] == (3.0, 1.0)
        assert first["from main"] == 0
        assert first["on main"] == {"rank": 0}
        assert first["locally"] == (1, 0, (2.0,), 0, [1, 2])
        assert first["aligned"] == float(Net(0).head.weight[0, 0].detach())
        assert first["gradients"] == [12.0, 4.0, None]
        assert len(first["drawn"]) == 4

    def test_what_fails_in_one_fails_in_both(self, both):
        expected = [(kind.__name__, f"in process {where}") for where, kind in FAILURES]
        assert [each["failed"] for each in both] == [expected, expected]

    def test_an_error_that_can_not_be_sent_is_told(self, both):
        first, second = (each["failed strangely"] for each in both)
        assert first == ("TaskError", "process 1 failed: Foreign: a")
        assert second == ("Foreign", "a")


class TestShare:
    """Which samples a process gets."""

    @pytest.fixture(autouse=True)
    def two(self, monkeypatch):
        monkeypatch.setattr("idap.training.processes.process_count", lambda: 2)
        monkeypatch.setattr("idap.training.processes.process_rank", lambda: 1)

    def test_every_tensor_of_the_batch_is_sliced(self):
        Pair = namedtuple("Pair", ["x", "y"])
        x, whole = torch.arange(5), torch.zeros(3)
        batch = {"x": x, "more": [Pair(x, (x, whole)), 7], "names": list("abcde")}
        found, weight = share(batch, default_size)
        sliced = torch.tensor([1, 3])
        assert weight == 2 / 5
        assert_close(found["x"], sliced)
        assert_close(found["more"][0].x, sliced)
        assert_close(found["more"][0].y, (sliced, whole))
        assert found["more"][1] == 7
        assert found["names"] == ["b", "d"]

    @pytest.mark.parametrize("batch", [(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(1, 2), torch.zeros(1))])
    def test_small_batches_are_whole_everywhere(self, batch):
        found, weight = share(batch, default_size)
        assert found is batch
        assert weight == 0.5

    def test_what_can_not_be_sliced_is_whole_everywhere(self):
        class Graphs:
            """Holds samples in its own way."""

        batch = Graphs()
        assert share(batch, lambda _: 8) == (batch, 0.5)


def test_one_process_is_all_there_is():
    batch = (torch.zeros(5),)
    assert share(batch, default_size) == (batch, 1.0)
    assert (process_count(), process_rank(), is_main(), totals(1.0, 2.0)) == (1, 0, True, (1.0, 2.0))
    assert on_main(lambda: 5) == 5
    with pytest.raises(ValueError, match="no"), raise_everywhere():
        raise ValueError("no")
