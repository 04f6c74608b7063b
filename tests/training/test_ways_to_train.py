"""Other budgets, precisions and memory orders train the same model; norms are re-estimated only for the better."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from idap.errors import ConfigError, TaskError
from idap.training.best import reestimate_norms_
from idap.training.evaluate import evaluate
from idap.training.fit import fit
from idap.training.processes import Draw
from idap.training.recovery import TICKS, Pace, Recovery
from idap.training.speed import channels_last_fault
from idap.training.task import Task, classification

LABELS = torch.arange(64) % 2
IMAGES = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + LABELS[:, None, None, None]
BATCHES = list(zip(IMAGES.split(16), LABELS.split(16), strict=True))


def task(train=BATCHES):
    return classification(train, BATCHES, num_classes=2)


class Net(nn.Module):
    """A small convolutional net; `view` is how it flattens."""

    def __init__(self, flatten="reshape"):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4 * 16, 2)
        self.flatten = flatten

    def forward(self, x):
        x = self.deep(torch.relu(self.norm(self.conv(x))))
        return self.head(getattr(x, self.flatten)(len(x), -1))


def net(seed=0, flatten="reshape"):
    torch.manual_seed(seed)
    return Net(flatten)


def weights(recovery, *, teacher=None, model=None):
    model = model or net()
    fit(model, task(), recovery, teacher=teacher)
    return model.state_dict()


class TestBudgets:
    def test_steps_count_over_epochs_of_any_size(self):
        sizes = iter([3, 1, 4, 4])

        class Uneven:
            def __iter__(self):
                return iter(BATCHES[: next(sizes)])

        report = fit(net(), task(Uneven()), Recovery(steps=6))
        assert (report.steps, len(report.losses)) == (6, 3)

    def test_an_endless_loader_ends_with_the_steps(self):
        class Endless:
            def __iter__(self):
                while True:
                    yield BATCHES[0]

        assert fit(net(), task(Endless()), Recovery(steps=5)).steps == 5

    def test_no_minutes_take_no_step_and_few_take_one(self):
        assert fit(net(), task(), Recovery(minutes=0)).steps == 0
        assert fit(net(), task(), Recovery(minutes=1e-9)).steps == 1

    def test_the_rate_follows_the_clock(self):
        now = [0.0]
        pace = Pace(seconds=10, clock=lambda: now[0])
        rates = []
        while not pace.over:
            rates.append(pace.learning_rate(1.0, 0.5))
            now[0] += 2.5
            pace.advance()
        assert rates == pytest.approx([1 / (TICKS / 2), 0.502, 1.0, 0.5])

    @pytest.mark.parametrize(("second", "found"), [(3, "3"), (5, "more")])
    def test_an_epoch_of_another_length_is_refused(self, second, found):
        sizes = iter([4, 4, second, 4])  # counted, then trained on

        class Uneven:
            def __iter__(self):
                return iter([*BATCHES, BATCHES[0]][: next(sizes)])

        with pytest.raises(TaskError, match=f"gave {found} batches, expected 4, .* with steps or minutes instead"):
            fit(net(), task(Uneven()), Recovery(epochs=3))

    def test_a_loader_that_announces_too_many_is_refused(self):
        class Wrong(list):
            def __len__(self):
                return 6

        with pytest.raises(TaskError, match="gave 4 batches, expected 6"):
            fit(net(), task(Wrong(BATCHES)), Recovery())


class TestPrecision:
    def test_auto_is_float32_on_a_cpu(self):
        assert_close(weights(Recovery()), weights(Recovery(precision="float32")), rtol=0, atol=0)

    def test_bf16_runs_both_models_low_and_computes_losses_in_full(self):
        seen = {}

        class Seen(Net):
            def forward(self, x):
                found = super().forward(x)
                seen.setdefault(self.name, found.dtype)
                return found

        student, teacher = Seen(), Seen()
        student.name, teacher.name = "student", "teacher"

        def loss(outputs, batch):
            seen.setdefault("loss", outputs.dtype)
            return nn.functional.cross_entropy(outputs, batch[1])

        own = task()
        own = Task(train=own.train, val=own.val, loss=loss, metric=own.metric, metric_name="accuracy")
        report = fit(student, own, Recovery(epochs=8, lr=0.05, precision="bf16"), teacher=teacher)
        assert seen == {"student": torch.bfloat16, "teacher": torch.bfloat16, "loss": torch.float32}
        assert {tensor.dtype for tensor in student.parameters()} == {torch.float32}
        assert report.last_loss < report.first_loss


class TestChannelsLast:
    def test_it_learns_the_same_and_leaves_the_memory_as_it_was(self):
        plain, teacher = net(), net(1)
        before = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in plain.named_parameters()}
        taught = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in teacher.named_parameters()}
        expected = weights(Recovery(channels_last=False), teacher=net(1))
        found = weights(Recovery(channels_last=True), teacher=teacher, model=plain)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in plain.named_parameters()} == before
        for name, tensor in teacher.named_parameters():
            assert tensor.data_ptr() == taught[name][0]
            assert torch.equal(tensor, taught[name][1])

    @pytest.mark.parametrize("setting", ["auto", True, False])
    def test_weights_are_in_that_order_while_it_trains(self, setting):
        seen = []

        class Seen(Net):
            def forward(self, x):
                seen.append(self.deep.weight.is_contiguous(memory_format=torch.channels_last))
                return super().forward(x)

        fit(Seen(), task(), Recovery(channels_last=setting, steps=2))
        assert seen[-1] is (setting is not False)

    def test_code_that_asks_for_views_trains_in_the_usual_order(self):
        found = weights(Recovery(), model=net(flatten="view"))
        assert_close(found, weights(Recovery(channels_last=False)), rtol=0, atol=0)
        with pytest.raises(TaskError, match="channels_last=True, but the model can't run in that format: view size"):
            fit(net(flatten="view"), task(), Recovery(channels_last=True))

    @pytest.mark.parametrize(
        ("layer", "broken"),
        [
            (nn.Conv2d(15, 32, 1, stride=2), True),
            (nn.Conv2d(6, 12, 1, stride=(1, 2), bias=False), True),
            (nn.Conv2d(16, 32, 1, stride=2), False),
            (nn.Conv2d(6, 12, 1), False),
            (nn.Conv2d(6, 12, (3, 1), stride=2), False),
            (nn.Conv2d(6, 12, 3, stride=2), False),
        ],
    )
    def test_what_would_overwrite_memory_on_a_cpu_is_known(self, layer, broken):
        model = nn.Sequential(nn.ReLU(), layer)
        assert bool(channels_last_fault(model, torch.device("cpu"))) == broken
        assert channels_last_fault(model, torch.device("cuda")) is None

    def test_it_is_left_out_where_it_would_overwrite_memory(self):
        """Narrow shortcuts with a stride crash oneDNN; `auto` must not come to that, and True says why not."""
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, stride=2), nn.Flatten(), nn.Linear(36, 2))
        expected = weights(Recovery(channels_last=False, epochs=5), model=copy.deepcopy(model))
        assert_close(weights(Recovery(epochs=5), model=copy.deepcopy(model)), expected, rtol=0, atol=0)
        with pytest.raises(
            TaskError, match=r"layer '1' \(1×1, stride 2, 6 input channels\) runs into a fault of oneDNN"
        ):
            fit(model, task(), Recovery(channels_last=True))


class TestCompile:
    def test_the_compiled_model_is_the_one_that_trains(self, monkeypatch):
        calls = []

        def fake(model):
            class Compiled(nn.Module):
                def forward(self, x):
                    calls.append(self.training)
                    return model(x)

            return Compiled()

        monkeypatch.setattr(torch, "compile", fake)
        found = weights(Recovery(compile=True))
        assert len(calls) == 4
        assert_close(found, weights(Recovery()), rtol=0, atol=0)

    def test_a_model_that_can_not_be_compiled_is_named_as_such(self, monkeypatch):
        real = torch.compile

        def broken(graph, inputs):
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=broken))
        with pytest.raises(TaskError, match=r"compile=True, but the model can't be compiled here: .*no compiler here"):
            fit(net(), task(), Recovery(compile=True))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning:torch")
    def test_compiled_for_real_it_learns_the_same(self):
        expected = weights(Recovery(steps=3))
        try:
            found = weights(Recovery(steps=3, compile=True))
        except TaskError as error:
            pytest.skip(str(error))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TestNorms:
    def test_statistics_become_plain_averages(self):
        model = net()
        modes = [module.training for module in model.eval().modules()]
        assert reestimate_norms_(model, task(), 3, Draw())
        with torch.no_grad():
            seen = [model.conv(images) for images, _ in BATCHES[:3]]
        means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
        variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
        assert_close(model.norm.running_mean, means)
        assert_close(model.norm.running_var, variances)
        assert model.norm.momentum == 0.1
        assert [module.training for module in model.modules()] == modes

    @pytest.mark.parametrize("setting", [{"norm_batches": 0}, {"norm_batches": 4}])
    def test_models_without_such_norms_stay(self, setting):
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4, track_running_stats=False))
        assert not reestimate_norms_(model, task(), setting["norm_batches"], Draw())

    @pytest.mark.parametrize(("last", "kept"), [(5, True), (3, True), (2, False), (math.nan, False)])
    def test_they_are_kept_only_if_no_worse(self, last, kept):
        scores, states = iter([0, 3, last]), []

        def judge(model):
            states.append(copy.deepcopy(model.state_dict()))
            return next(scores)

        model = net()
        report = fit(model, task(), Recovery(norm_batches=4, average=False), judge=judge)
        assert report.best == max(3, last)
        assert not torch.equal(states[1]["norm.running_var"], states[2]["norm.running_var"])
        assert torch.equal(states[1]["conv.weight"], states[2]["conv.weight"])
        assert_close(model.state_dict(), states[2 if kept else 1], rtol=0, atol=0)

    def test_it_helps_where_the_statistics_lag_behind(self):
        model, own = net(), task()
        lagging = copy.deepcopy(model)
        lagging.norm.momentum = model.norm.momentum = 0.001
        judge = lambda judged: evaluate(judged, own)  # noqa: E731
        settings = {"epochs": 10, "lr": 0.1, "weight_decay": 0.0}
        without = fit(lagging, own, Recovery(**settings), judge=judge).best
        assert fit(model, own, Recovery(**settings, norm_batches=4), judge=judge).best >= without


class TestOptimizer:
    def test_the_users_own_trains_at_its_own_rates(self):
        model = net()
        groups = [{"params": model.head.parameters(), "lr": 0.5}, {"params": model.conv.parameters(), "lr": 0.0}]
        own = torch.optim.Adam(groups)
        seen = []
        own.register_step_pre_hook(lambda optimizer, *_: seen.append([g["lr"] for g in optimizer.param_groups]))
        before = copy.deepcopy(model.state_dict())
        fit(model, task(), Recovery(steps=4, warmup=0.5), optimizer=own)
        assert seen == [[0.25, 0], [0.5, 0], [0.5, 0], [0.25, 0]]
        assert [group["lr"] for group in own.param_groups] == [0.5, 0.0]
        assert torch.equal(model.conv.weight, before["conv.weight"])
        assert torch.equal(model.deep.weight, before["deep.weight"])
        assert not torch.equal(model.head.weight, before["head.weight"])

    def test_one_of_another_model_is_refused(self):
        with pytest.raises(TaskError, match=r"SGD holds a parameter of shape \(6, 3, 3, 3\) that Net does not have"):
            fit(net(), task(), Recovery(), optimizer=torch.optim.SGD(net().parameters(), lr=0.1))


def test_features_that_nothing_collects_are_refused():
    with pytest.raises(ConfigError, match=r"features=0\.5 compares the features of a model with those of its teacher"):
        fit(net(), task(), Recovery(features=0.5), teacher=net(1))
