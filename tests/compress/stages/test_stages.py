"""The two stages one by one: what they decide, how they roll back, and that a trial run is the real thing."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from idap.compress import change
from idap.compress import change as change_module
from idap.compress import outcome as outcome_module
from idap.compress import run as running
from idap.compress.change import next_state
from idap.compress.config import FilterStage, LayerStage
from idap.compress.context import RunContext
from idap.compress.journal import Journal, describe
from idap.compress.prepare import few_samples
from idap.compress.stages.choice import Candidates, Way, rank
from idap.compress.stages.cut import calibration_loss, loss_without
from idap.compress.stages.filters import filter_stage
from idap.compress.stages.layers import layer_stage
from idap.compress.state import Judgement, State
from idap.progress import Silent
from idap.steps import Removal, Step
from idap.surgery.apply import apply_plan
from idap.training.evaluate import evaluate
from idap.training.recovery import Recovery
from idap.training.task import classification
from tests.compress.tiny import assert_untouched, batches, config, snapshot, task, train_net

NET = train_net()


def prepare(**changes) -> tuple[RunContext, State, list[str]]:
    return running.prepare_run(NET, task(), config(**changes), None, Silent())[:3]


@pytest.fixture
def script_metrics(monkeypatch):
    """Let recoveries train for real, and then say that the metric is what a script says."""

    def script(*metrics):
        left = iter(metrics)
        real = change.recover

        def recover(context, model, plan, title, recovery):
            real(context, model, plan, title, recovery)
            return Judgement(next(left))

        for module in (change_module, outcome_module):
            monkeypatch.setattr(module, "recover", recover)

    return script


# ----------------------------------------------------------------------------------------------------- filters


def test_a_rejected_step_is_rolled_back_exactly_and_halved(script_metrics):
    context, start, _ = prepare(max_drop=0.01, macs=None, filters=FilterStage(steps=5, first_share=0.4, min_share=0.04))
    before, journal = snapshot(start.model), Journal(context, start.metric)
    script_metrics(*[0.0] * 9)
    end = filter_stage(context, start, context.goals.budget, journal)
    assert end is start
    assert_untouched(start.model, before)
    units = sum(group.size for group in context.subject.structure.groups)
    gone = [sum(len(removal.units) for removal in step.removed) for step in journal.steps]
    assert gone == [29, 14, 7, 4]
    assert units == 72
    assert [step.accepted for step in journal.steps] == [False] * 4
    assert [step.reason for step in journal.steps] == [
        "outside the budget; next step 20.0% of the units",
        "outside the budget; next step 10.0% of the units",
        "outside the budget; next step 5.0% of the units",
        "outside the budget; no smaller step is worth trying",
    ]
    lowest = [{(removal.name, unit) for removal in step.removed for unit in removal.units} for step in journal.steps]
    assert lowest[0] > lowest[1] > lowest[2] > lowest[3]  # measured on the same state again: the same ranking


def test_where_the_goal_asked_for_less_than_the_share_what_was_really_taken_is_halved(script_metrics):
    context, start, _ = prepare(max_drop=0.01, macs=0.8, filters=FilterStage(steps=5, first_share=0.9, min_share=0.01))
    journal = Journal(context, start.metric)
    script_metrics(*[0.0] * 9)
    filter_stage(context, start, context.goals.budget, journal)
    gone = [sum(len(removal.units) for removal in step.removed) for step in journal.steps]
    assert gone[0] < 0.5 * 72
    assert all(abs(smaller - larger / 2) <= 1 for larger, smaller in itertools.pairwise(gone))


def test_after_a_rejection_the_last_accepted_state_goes_on(script_metrics):
    context, start, _ = prepare(max_drop=0.01, macs=None, filters=FilterStage(steps=2, first_share=0.2))
    journal = Journal(context, start.metric)
    script_metrics(1.0, 0.0, 1.0)
    end = filter_stage(context, start, context.goals.budget, journal)
    assert [step.accepted for step in journal.steps] == [True, False, True]
    first, rejected, second = ({(r.name, u) for r in step.removed for u in r.units} for step in journal.steps)
    assert first.isdisjoint(rejected)
    assert second < rejected
    kept = {(name, unit) for name, units in end.keep.items() for unit in units}
    everything = {(group.name, unit) for group in context.subject.structure.groups for unit in range(group.size)}
    assert kept == everything - first - second
    assert end.cost == context.subject.costs.cost(end.keep)


def test_a_step_stops_at_the_target_and_goes_no_further():
    context, start, _ = prepare(max_drop=None, macs=0.8, filters=FilterStage(steps=9, first_share=0.6, streams="cut"))
    journal = Journal(context, start.metric)
    end = filter_stage(context, start, context.goals.budget, journal)
    assert len(journal.steps) == 1
    assert end.cost.macs <= 0.8 * start.cost.macs
    ranking = rank(
        context, start, Candidates.of(context, start, context.divergence(start).units, {}), Way(0.0, streams=True)
    )
    last = sum(len(removal.units) for removal in journal.steps[0].removed)
    assert context.subject.costs.cost(ranking.keep(last)).macs == end.cost.macs
    assert context.subject.costs.cost(ranking.keep(last - 1)).macs > 0.8 * start.cost.macs


def test_floors_hold_to_the_end():
    context, start, _ = prepare(
        max_drop=None,
        macs=0.25,
        filters=FilterStage(steps=9, first_share=0.5, min_keep=0.4),
        layers=LayerStage(removals=3),
    )
    journal = Journal(context, start.metric)
    end = filter_stage(context, start, dataclasses.replace(context.goals.budget, targets={"macs": 0.001}), journal)
    sizes = {group.name: group.size for group in context.subject.structure.groups}
    assert {name: len(units) for name, units in end.keep.items()} == {
        name: round(0.4 * size) for name, size in sizes.items()
    }
    assert (
        filter_stage(context, end, dataclasses.replace(context.goals.budget, targets={"macs": 0.001}), journal) is end
    )


def test_a_goal_of_parameters_ranks_by_parameters():
    context, start, _ = prepare(macs=None, parameters=0.5, cost_power=1.0)
    scores = context.divergence(start).units
    ranking = rank(context, start, Candidates.of(context, start, scores, {}), Way(1.0, streams=True))
    costs = context.subject.costs.unit_parameters()
    values = [float(scores[name][u]) / costs[name] for name, u in zip(ranking.groups, ranking.units, strict=True)]
    assert values == sorted(values)


# ------------------------------------------------------------------------------------------------------ layers


def blocks_of(context):
    return [block.name for block in context.subject.structure.blocks]


@pytest.mark.parametrize("already", [(), ("blocks.0",), ("blocks.0", "blocks.1"), ("blocks.1",)])
def test_a_trial_has_the_loss_of_the_model_that_is_really_cut(already):
    context, start, removable = prepare()
    assert removable == blocks_of(context) == ["blocks.0", "blocks.1", "blocks.2"]
    model = apply_plan(start.model, context.subject.structure.plan({}, already))
    state = dataclasses.replace(start, model=model, removed=already)

    def loss(judged):
        with torch.no_grad():
            each = [F.cross_entropy(judged(x), y) * len(y) for x, y in context.subject.calibration]
        return float(sum(each)) / sum(len(y) for _, y in context.subject.calibration)

    assert calibration_loss(context, state.model) == pytest.approx(loss(model))
    for name in set(removable) - set(already):
        real = apply_plan(start.model, context.subject.structure.plan({}, (*already, name)))
        assert loss_without(context, state, context.subject.structure.block(name)) == pytest.approx(loss(real))
    assert_close(model.state_dict(), apply_plan(start.model, context.subject.structure.plan({}, already)).state_dict())


class Hasty(nn.Module):
    """Blocks that work in place on the stream, and whose last line nobody looks at."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.parts = nn.Sequential(*(HastyBlock() for _ in range(3)))

    def forward(self, x):
        return self.head(self.parts(self.stem(x)))


class HastyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x += self.one(x)
        x.add_(self.two(x))
        F.relu(x, inplace=True)
        return x


def test_a_trial_is_right_for_code_that_works_in_place():
    torch.manual_seed(0)
    net = Hasty().eval()
    settings = config(macs=0.9, recovery=Recovery(epochs=0))  # its gradient can't be computed
    context, start, removable, _ = running.prepare_run(net, task(), settings, None, Silent())
    assert removable
    for name in removable:
        real = apply_plan(net, context.subject.structure.plan({}, (name,)))
        expected = calibration_loss(context, real)
        assert loss_without(context, start, context.subject.structure.block(name)) == pytest.approx(expected), name


def test_removals_stop_at_their_number_and_are_measured_anew():
    context, start, removable = prepare(max_drop=None, macs=None, parameters=0.3, layers=LayerStage(removals=2))
    journal = Journal(context, start.metric)
    end = layer_stage(context, start, context.goals.budget, journal, removable)
    assert len(end.removed) == len(journal.steps) == 2
    assert [step.removed[0].kind for step in journal.steps] == ["block", "block"]
    assert end.cost == context.subject.costs.cost(end.keep, end.removed)
    assert type(end.model.blocks) is nn.Sequential
    assert [len(list(block.parameters())) for block in end.model.blocks].count(0) == 2


def test_rejected_layers_are_essential_and_patience_ends(script_metrics):
    context, start, removable = prepare(max_drop=0.01, macs=None, layers=LayerStage(removals=3, patience=2))
    before, journal = snapshot(start.model), Journal(context, start.metric)
    script_metrics(0.0, 0.0, 0.0)
    end = layer_stage(context, start, context.goals.budget, journal, removable)
    assert end is start
    assert_untouched(start.model, before)
    tried = [step.removed[0].name for step in journal.steps]
    assert len(tried) == len(set(tried)) == 2
    assert {step.reason for step in journal.steps} == {"outside the budget: the layer is essential"}


def test_an_accepted_layer_renews_the_patience(script_metrics):
    context, start, removable = prepare(max_drop=0.01, macs=None, layers=LayerStage(removals=3, patience=2))
    journal = Journal(context, start.metric)
    script_metrics(0.0, 1.0, 0.0, 0.0)
    end = layer_stage(context, start, context.goals.budget, journal, removable)
    assert [step.accepted for step in journal.steps] == [False, True, False]
    assert end.removed == (journal.steps[1].removed[0].name,)


def test_only_what_was_proved_may_go():
    context, start, removable = prepare(max_drop=None, macs=None, parameters=0.3)
    journal = Journal(context, start.metric)
    end = layer_stage(context, start, context.goals.budget, journal, removable[1:2])
    assert end.removed == (removable[1],)


# ------------------------------------------------------------------------------------------------------- pieces


def test_a_state_is_judged_by_what_it_was_restored_to():
    context, start, _ = prepare(recovery=Recovery(epochs=2, lr=0.02))
    keep = {group.name: tuple(range(group.size // 2)) for group in context.subject.structure.groups}
    following = next_state(context, start, keep, (), "recovery")
    assert following.metric == evaluate(following.model, context.subject.task)
    assert following.cost == context.subject.costs.cost(keep)
    assert following.error < 1e-4
    assert following.plan == context.subject.structure.plan(keep)


def test_calibration_data_stay_the_same_for_the_whole_run():
    context, _, _ = prepare(calibration_batches=3)
    assert len(context.subject.calibration) == 3
    assert_close(list(context.subject.calibration), list(batches(256, 1)[:3]), rtol=0, atol=0)


def test_few_samples_shorten_what_has_the_batch_first():
    args, kwargs = few_samples(
        ((torch.zeros(5, 2), 5), {"mask": torch.ones(5, 7), "table": torch.ones(4, 2), "scale": torch.tensor(1.0)}), 2
    )
    assert args[0].shape == (2, 2)
    assert args[1] == 5
    assert {name: tuple(tensor.shape) for name, tensor in kwargs.items()} == {
        "mask": (2, 7),
        "table": (4, 2),
        "scale": (),
    }


def test_a_decision_in_one_line():
    step = Step(
        index=3,
        stage="filters",
        removed=(
            Removal(name="a", kind="channels", units=(0, 1), left=6, divergence=(0.001, 0.002)),
            Removal(name="b", kind="heads", units=(2,), left=3, divergence=(0.01, 0.01)),
            Removal(name="c", kind="channels", units=(5,), left=3, divergence=(0.002, 0.003)),
        ),
        macs=500,
        parameters=30,
        metric=0.91234,
        accepted=True,
        reason="within the budget",
        error=0.0,
        seconds=1.0,
        shares={"macs": 0.5, "parameters": 0.75, "size": 0.76},
    )
    assert describe(step, "accuracy") == (
        "filters 3: removed 3 channels + 1 head in 3 groups, divergence 0.001 to 0.01 | MACs 50.0% | "
        "parameters 75.0% | accuracy 0.9123 | accepted: within the budget"
    )
    block = Removal(name="blocks.1", kind="block", units=(), left=0, divergence=(0.25, 0.25))
    line = describe(dataclasses.replace(step, stage="layers", removed=(block,), accepted=False), "x")
    assert line.startswith("layers 3: removed block blocks.1, divergence 0.25 | ")
    assert line.endswith("| rolled back: within the budget")
    assert "final 3: nothing removed |" in describe(dataclasses.replace(step, stage="final", removed=()), "x")
    mixed = dataclasses.replace(step, stage="interleaved", removed=(*step.removed, block))
    assert "removed 3 channels + 1 head in 3 groups, block blocks.1, divergence 0.001 to 0.25" in describe(mixed, "x")
    assert "| file size 76.0% |" in describe(step, "x", ("macs", "size"))


def test_a_classification_without_calibration_data_uses_training_data():
    own = classification(batches(64, 1), batches(64, 2), num_classes=3, calibration=batches(64, 9))
    context, _, _, _ = running.prepare_run(NET, own, config(), None, Silent())
    assert_close(context.subject.calibration[0], batches(64, 9)[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- whole blocks only


class Twice(nn.Module):
    """A block of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        x = x + F.gelu(self.first(x))
        return x + F.gelu(self.second(x))


def test_single_branches_stay_where_only_whole_blocks_may_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), Twice(), Twice(), nn.Linear(12, 3)).eval()

    def removable(parts):
        settings = config(layers=LayerStage(parts=parts), recovery=Recovery(epochs=0), macs=0.6, max_drop=None)
        context, _, names, _ = running.prepare_run(model, task(), settings, None, Silent())
        return {name: context.subject.structure.block(name).kind for name in names}

    every = removable("all")
    assert set(every.values()) == {"branch", "block"}
    assert removable("blocks") == {name: kind for name, kind in every.items() if kind == "block"}
