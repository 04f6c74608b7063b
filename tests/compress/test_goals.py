"""Goals of every kind, orders, schedules: what is returned is what was asked for."""

import dataclasses
import re
import statistics

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from idap.compress import change, latency_table
from idap.compress import change as change_module
from idap.compress import context as context_module
from idap.compress import outcome as outcome_module
from idap.compress import prepare as prepare_module
from idap.compress import run as running
from idap.compress.change import make_cut, neighbours, only_training
from idap.compress.config import FilterStage, LayerStage
from idap.compress.run import compress
from idap.compress.stages.filters import Pace
from idap.compress.state import Clock, Judgement
from idap.cost.latency import Latency
from idap.errors import ConfigError, RunFolderError, TaskError
from idap.graph.trace import trace
from idap.models.nets import cifar_resnet20
from idap.record import RunFolder, read_steps
from idap.selection import reach
from idap.selection.reach import cost_at_latency
from idap.structure.analysis import analyze
from idap.training.check import with_validation
from idap.training.evaluate import Score
from idap.training.recovery import Recovery
from idap.training.task import classification
from tests import nets
from tests.compress.stages.test_stages import prepare
from tests.compress.test_compress import imitation
from tests.compress.tiny import Noting, batches, clusters, config, task, train_net

NET = train_net()
FREE = {"max_drop": None, "recovery": Recovery(epochs=0.25, lr=0.02)}


def saved_bytes(folder):
    """Bytes of the tensors in a safetensors file, without its header."""
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


# -------------------------------------------------------------------------------------------------------- goals


def test_a_goal_of_file_size_is_met_by_the_file(tmp_path):
    result = compress(NET, task(), config(macs=None, size=0.6, **FREE))
    assert result.reached
    NET_SIZE = sum(t.numel() * t.element_size() for t in NET.state_dict().values())  # noqa: N806
    assert result.size[0] == NET_SIZE
    result.save(tmp_path)
    assert saved_bytes(tmp_path) == result.size[1] <= 0.6 * NET_SIZE


def test_several_targets_are_all_met():
    result = compress(NET, task(), config(macs=0.6, parameters=0.5, size=0.9, **FREE))
    assert result.reached
    assert result.macs[1] <= 0.6 * result.macs[0]
    assert result.parameters[1] <= 0.5 * result.parameters[0]


def test_a_relative_budget_of_a_metric_where_less_is_better():
    def loss(outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])

    own = dataclasses.replace(task(), metric=loss, metric_name="loss", higher_is_better=False)
    result = compress(NET, own, config(macs=None, max_drop=None, max_relative_drop=0.2))
    assert result.metric <= 1.2 * result.baseline
    assert result.macs[1] < result.macs[0]


@pytest.fixture
def latency_is(monkeypatch):
    """Let latency be what a function of the multiply-adds says, in place of the clock."""

    def install(function):
        def share_of(original, model, example):
            weights = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
            return function(weights(model) / weights(original))

        monkeypatch.setattr(context_module, "latency_share", share_of)
        monkeypatch.setattr(latency_table, "latency_share", share_of)

    return install


def test_a_goal_of_latency_is_met_by_what_is_measured(latency_is):
    latency_is(lambda share: 0.3 + 0.7 * share)
    result = compress(NET, task(), config(macs=None, latency=0.7, **FREE))
    assert result.reached, result.message
    assert 0.6 < result.latency <= 0.7
    assert result.steps[-1].shares["latency"] == result.latency


def test_a_latency_out_of_reach_is_an_error_before_any_work(latency_is):
    latency_is(lambda share: 0.5 + 0.5 * share)
    with pytest.raises(ConfigError, match=r"^latency=0\.4 can't be reached: even with everything removable gone, 5"):
        compress(NET, task(), config(macs=None, latency=0.4, **FREE))


@pytest.fixture
def short_measurements(monkeypatch):
    """Let the clock be read for a moment only, where how exactly is not what is asked."""
    monkeypatch.setattr(latency_table, "SECONDS", 0.1)
    monkeypatch.setattr(latency_table, "LONGEST", 0.2)


@pytest.mark.slow
def test_latency_by_the_clock(short_measurements):
    filters = FilterStage(steps=2, min_keep=0.5)
    result = compress(NET, task(), config(macs=None, latency=0.99, cost="macs", filters=filters, **FREE))
    assert result.latency is not None
    assert result.latency > 0
    found = latency_table.latency_share(NET, NET, ((torch.zeros(4, 6),), {}))
    assert 0.3 < found < 3


@pytest.mark.parametrize(
    ("shares", "seconds", "rounds"),
    [
        ([0.5, 0.501, 0.502], 1e-3, 3),  # sure at once
        ([0.4, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5] + [0.5] * 20, 1e-3, 7),  # until the middle is known well
        ([0.3, 0.7] * 20, 1e-3, 20),  # never
        ([0.3, 0.7] * 20, 0.5, 3),  # a slow model has had its time
    ],
)
def test_a_latency_is_measured_until_it_is_known(monkeypatch, shares, seconds, rounds):
    left = iter(shares)

    def give_times(models, args, kwargs, *, repeats, warmup):
        return {
            name: Latency(time, (time, time)) for name, time in (("original", seconds), ("model", seconds * next(left)))
        }

    monkeypatch.setattr(latency_table, "measure_latency", give_times)
    assert latency_table.latency_share(NET, NET, ((), {})) == pytest.approx(statistics.median(shares[:rounds]))
    assert len(shares) - len(list(left)) == rounds


@pytest.mark.slow
def test_latency_is_that_of_the_batch_that_is_asked_for(monkeypatch, short_measurements):
    seen = []
    real = latency_table.measure_latency

    def record_batch(models, args, kwargs, **settings):
        seen.append(len(args[0]))
        return real(models, args, kwargs, **settings)

    monkeypatch.setattr(latency_table, "measure_latency", record_batch)
    compress(NET, task(), config(macs=None, latency=0.999, latency_batch=40, cost="macs", **FREE))
    assert set(seen) == {40}  # more than a batch of the data holds


def test_a_recovery_that_breaks_ends_early_and_is_judged_as_it_is(tmp_path):
    listener, calls = Noting(), []

    def loss(outputs, batch):
        calls.append(None)
        value = nn.functional.cross_entropy(outputs, batch[1])
        return value * float("inf") if len(calls) % 11 == 0 else value

    result = compress(NET, dataclasses.replace(task(), loss=loss), config(rebalance=None), progress=listener)
    told = [
        line for line in listener.lines if "ended early, and the best state before that is kept: the loss is " in line
    ]
    said = (
        f"; {len(told)} of the trainings ended early, and the best states before that were kept (filters 0: recovery: "
    )
    assert said in result.message
    assert told
    assert all("inf at step" in line for line in told)
    assert result.steps


@pytest.mark.parametrize("fixed", [0.0, 0.2, 0.45])
@pytest.mark.parametrize("wanted", [0.9, 0.6, 0.5])
def test_coming_down_to_a_latency(fixed, wanted):
    calls = []

    def latency(cost):
        calls.append(cost)
        return fixed + (1 - fixed) * cost**1.5

    cost = cost_at_latency(latency, (1.0, 1.0), wanted)
    assert wanted * 0.93 <= latency(cost) <= wanted
    assert len(calls) <= reach.TRIES + 1


def test_coming_down_where_it_is_impossible_ends_at_the_least():
    assert cost_at_latency(lambda cost: 0.8 + 0.2 * cost, (1.0, 1.0), 0.5, least=0.1) == pytest.approx(0.1, abs=0.2)


# ------------------------------------------------------------------------------------------------ orders, schedules


def stages(result):
    names = [step.stage for step in result.steps]
    return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]


def test_layers_before_filters():
    result = compress(NET, task(), config(order="layers-filters", layers=LayerStage(removals=1), **FREE))
    assert stages(result) == ["layers", "filters", "final"]
    assert result.reached


def test_interleaved_is_one_ranking():
    result = compress(NET, task(), config(order="interleaved", criterion="share", cost_power=1.0, **FREE))
    assert stages(result) == ["interleaved", "final"]
    assert result.reached
    taken = [removal for step in result.steps for removal in step.removed]
    assert {removal.kind for removal in taken} >= {"block", "neurons"}
    for step in result.steps[:-1]:
        ranks = [rank for removal in step.removed for rank in removal.ranks]
        assert len(ranks) == len(set(ranks))
    assert sum(not removal.units for removal in taken) <= 2  # layers.removals


def test_interleaved_takes_no_more_layers_than_allowed():
    settings = {"order": "interleaved", "criterion": "share", "cost_power": 1.0, "macs": 0.3, **FREE}
    result = compress(NET, task(), config(layers=LayerStage(removals=1), **settings))
    assert sum(not removal.units for step in result.steps for removal in step.removed) == 1
    assert len(result.plan.removed) == 1


def test_one_shot_gets_there_in_one_step():
    settings = config(filters=FilterStage(schedule="one-shot", steps=3), layers=LayerStage(removals=0), **FREE)
    result = compress(NET, task(), settings)
    assert [step.stage for step in result.steps] == ["filters", "final"]
    assert result.reached


def test_even_steps_are_even():
    settings = config(filters=FilterStage(schedule="even", steps=4), layers=LayerStage(removals=0), **FREE)
    result = compress(NET, task(), settings)
    found = [step.shares["macs"] for step in result.steps[:-1]]
    assert found == pytest.approx([0.875, 0.75, 0.625, 0.5], abs=0.03)
    assert result.reached


def test_a_pace_is_halved_after_a_rejection():
    context, _, _ = prepare(filters=FilterStage(schedule="even", steps=4, min_share=0.05))
    pace, now = Pace(context.goals.config.filters, context.goals.budget), {"macs": 1.0}
    assert pace.next(now)[0].targets == {"macs": 0.875}
    assert pace.reject(now, 9, 70) == "6.2% of the cost"
    assert pace.next(now)[0].targets["macs"] == pytest.approx(0.9375)
    assert not pace.reject(now, 4, 70)  # 3 % is not worth it
    straight = Pace(FilterStage(schedule="one-shot"), context.goals.budget)
    assert straight.next(now) == (context.goals.budget, 1.0)
    assert straight.reject(now, 30, 70) == "25.0% of the cost"


def test_without_training_several_cuts_are_corrected_like_one():
    """Corrections do not pile up: the last cut is made of the original, whatever lay between."""
    settings = {"max_drop": None, "macs": 0.5, "recovery": Recovery(epochs=0), "layers": LayerStage(removals=0)}
    result = compress(NET, task(), config(filters=FilterStage(schedule="even", steps=3), **settings))
    assert len(result.steps) == 3
    context, start, _ = prepare(**settings)
    model, _, _ = make_cut(context, start, {**start.keep, **result.plan.keep}, ())
    assert_close(result.model.state_dict(), model.state_dict())


# ----------------------------------------------------------------------------------------------------- neighbours


def test_only_the_neighbours_of_what_went_recover(monkeypatch):
    trained_names = []
    real = change.recover

    def recover(context, model, plan, title, recovery):
        trained_names.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
        return real(context, model, plan, title, recovery)

    for module in (change_module, outcome_module):
        monkeypatch.setattr(module, "recover", recover)
    settings = config(filters=FilterStage(steps=0), layers=LayerStage(removals=1, tune="neighbours"), macs=0.7, **FREE)
    result = compress(NET, task(), settings)
    (gone,) = result.plan.removed
    assert trained_names[0] < trained_names[1] == {name for name, _ in result.model.named_parameters()}
    assert trained_names[0]
    assert not any(name.startswith(gone) for name in trained_names[0])
    assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_neighbours_along_the_stream():
    net = cifar_resnet20().eval()
    found = analyze(trace(net, (torch.randn(2, 3, 32, 32),)))
    near = neighbours(found, found.block("layer1.1"), ["layer1.1"])
    before = {"layer1.0.conv2.weight", "layer1.0.bn2.weight", "layer1.0.bn2.bias"}
    assert near == before | {"layer1.2.conv1.weight"}
    alone = neighbours(found, found.block("layer3.1"), [block.name for block in found.blocks])
    assert {"linear.weight", "linear.bias", "layer3.0.conv2.weight"} <= alone
    assert not any(name.startswith(("layer3.1", "layer3.2")) for name in alone)


def test_neighbours_of_a_branch():
    net = nets.Encoder(4, 8, nets.PreNorm(8, nets.FusedAttention(8, 3, 4), nets.FeedForward(8, 10))).eval()
    found = analyze(trace(net, (torch.randn(2, 5, 4),)))
    branch = next(block for block in found.blocks if block.name.endswith("mlp"))
    near = neighbours(found, branch, [branch.name])
    assert {name for name in near if name.startswith("blocks")} == {
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias",
    }
    assert {"head.weight", "head.bias"} <= near


def test_flags_come_back_after_training_some():
    net = train_net()
    net.head.bias.requires_grad_(False)
    with only_training(net, frozenset({"head.weight", "head.bias"})):
        assert [name for name, p in net.named_parameters() if p.requires_grad] == ["head.weight"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["head.bias"]


# ------------------------------------------------------------------------------------------------ time and place


def test_the_time_of_a_run_adds_up():
    result = compress(NET, task(), config(**FREE))
    assert set(result.seconds) >= {"structure", "proof", "measurement", "cut", "rebalance", "recovery", "judging"}
    assert all(seconds >= 0 for seconds in result.seconds.values())
    for step in result.steps:
        assert sum(step.phases.values()) == pytest.approx(step.seconds, abs=0.05)


def test_work_inside_work_counts_once():
    ticks = iter(range(100))
    clock = Clock(lambda: next(ticks))
    with clock.on("a"), clock.on("b"):
        pass
    assert clock.take() == {"other": 2, "a": 2, "b": 1}
    with pytest.raises(ZeroDivisionError), clock.on("a"):
        _ = 1 / 0
    assert clock.take() == {"other": 2, "a": 1}


def test_what_is_shown(tmp_path):
    class Watching(Noting):
        def __init__(self):
            super().__init__()
            self.seen = []

        def show(self, status):
            self.seen.append(status)

    watching = Watching()
    result = compress(NET, task(), config(), progress=watching)
    first, last = watching.seen[0], watching.seen[-1]
    assert first.costs == {"MACs": (1.0, 0.5)}
    assert first.metric == first.baseline == result.baseline
    assert len(first.profile) >= 4
    assert last.costs["MACs"][0] == result.macs[1] / result.macs[0]
    assert last.accepted == sum(step.accepted for step in result.steps)
    assert last.worst == pytest.approx(result.baseline - 0.05)


def test_a_full_disk_and_a_read_only_folder_are_refused_before_any_work(tmp_path, monkeypatch):
    listener = Noting()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(RunFolderError, match=r"has room for 1 kB, and the run needs about 2\d kB"):
        compress(NET, task(), config(), run_dir=tmp_path / "run", progress=listener)
    assert not listener.phases
    assert not (tmp_path / "run").exists()
    RunFolder(tmp_path / "run").check(size=999)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(
        RunFolderError, match=r"can't be written, so no run can be kept in .*run; choose another folder\.$"
    ):
        RunFolder(tmp_path / "run").check()


# ------------------------------------------------------------------------------------------------------------ data


def test_without_validation_data_some_training_data_decide():
    listener = Noting()
    result = compress(NET, task(val=None), config(**FREE), progress=listener)
    assert result.reached
    assert listener.lines[0] == (
        "The task has no validation data: 1 of its 8 training batches are used for validation."
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_is_split_by_samples(shuffle):
    samples, labels = clusters(100, 3)
    loader = DataLoader(TensorDataset(samples, labels), batch_size=16, shuffle=shuffle, drop_last=True)
    split, told = with_validation(classification(loader, num_classes=3), seed=5)
    train = torch.cat([x for x, _ in split.train])
    val = torch.cat([x for x, _ in split.val])
    assert (len(train), len(val)) == (80, 10)  # 90 for training, in whole batches
    rows = {tuple(row) for row in samples.tolist()}
    assert {tuple(row) for row in [*train.tolist(), *val.tolist()]} <= rows
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in val.tolist()}
    assert "10 of its 100 training samples are used for validation" in told
    assert_close(torch.cat([x for x, _ in split.val]), val, rtol=0, atol=0)  # the same each time
    again = torch.cat([x for x, _ in split.train])
    assert torch.equal(again, train) != shuffle


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(6), 0)])


@pytest.mark.parametrize("train", [DataLoader(Endless()), iter(()), [(torch.zeros(1, 6), torch.zeros(1))]])
def test_what_can_not_be_split_is_refused(train):
    with pytest.raises(TaskError, match=r"^the task has no validation data, and its training .*[Pp]ass val=batches\.$"):
        with_validation(classification(train, num_classes=3))


@pytest.mark.parametrize(("count", "size"), [(190, 10), (40, 5), (23, 2)])
def test_what_is_split_off_leaves_no_batch_of_one_sample(count, size):
    loader = DataLoader(TensorDataset(*clusters(count, 1)), size)
    split, _ = with_validation(classification(loader, num_classes=3))
    assert all(len(x) > 1 for x, _ in split.train) or count % size == 1
    assert sum(len(x) for part in (split.train, split.val) for x, _ in part) == count


def test_a_validation_that_changes_is_said(monkeypatch):
    end = running.finish_run

    def change_score(*given):
        monkeypatch.setattr(context_module, "score", lambda *_, **__: Score(0.2, 4))
        return end(*given)

    for module in (prepare_module, context_module):
        monkeypatch.setattr(module, "score", lambda *_, **__: Score(0.9, 4))
    monkeypatch.setattr(running, "finish_run", change_score)
    result = compress(NET, task(), config(max_drop=0.1, macs=0.9, recovery=Recovery(epochs=0)))
    assert not result.reached
    assert result.metric == 0.2
    assert result.message.startswith(
        "the accuracy was 0.2000 when it was measured once more after the last change, and 0.8000 is the worst allowed"
    )


class Varying:
    """Gives one batch fewer each time."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        self.data = self.data[:-1]
        return iter(self.data)


def test_validation_data_of_another_length_are_refused_at_the_first_step(tmp_path):
    listener = Noting()
    with pytest.raises(TaskError, match=r"^the 'val' split gave \d batches, and \d when the original was judged\."):
        compress(NET, task(val=Varying(batches(320, 2))), config(), run_dir=tmp_path / "run", progress=listener)
    assert read_steps(tmp_path / "run") == []


def test_a_target_that_the_last_training_would_have_made_room_for_is_told(monkeypatch):
    """Without training after the steps the budget ends them; the last training brings the metric back."""
    monkeypatch.setattr(outcome_module, "recover", lambda *_: Judgement(0.0))
    settings = config(max_drop=0.01, macs=0.3, recovery=Recovery(epochs=0), final=Recovery(epochs=1))
    result = compress(NET, imitation(), settings)
    assert not result.reached
    assert re.search(
        r"not to 30\.0%: every further step exceeded the accuracy budget; only the last training then took the "
        r"distance from 0\.00\d+ to 0\.0000\. Train longer after each step",
        result.message,
    )


def test_channels_last_is_left_out_where_a_cut_runs_into_the_fault(monkeypatch):
    monkeypatch.setattr(change, "channels_last_fault", lambda *_: "layer 'short' runs into a fault")
    used, real = [], change.fit
    monkeypatch.setattr(change, "fit", lambda *given, **named: used.append(given[2]) or real(*given, **named))
    heard = Noting()
    settings = config(macs=0.8, recovery=Recovery(epochs=0.25, channels_last=True), layers=LayerStage(removals=0))
    compress(NET, task(), settings, progress=heard)
    assert {recovery.channels_last for recovery in used} == {False}
    assert any("channels_last is left out: layer 'short' runs into a fault." in line for line in heard.lines)
