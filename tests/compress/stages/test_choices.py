"""What a user may choose: criteria, rankings, costs, floors, multiples and rebalancing, each seen in what comes out."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from idap.compress.change import make_cut, next_state
from idap.compress.config import Config, FilterStage, LayerStage
from idap.compress.journal import Journal
from idap.compress.prepare import profile
from idap.compress.run import compress
from idap.compress.stages import choice
from idap.compress.stages.choice import least_units, match_name
from idap.compress.stages.filters import filter_stage
from idap.divergence.criteria import CRITERIA
from idap.divergence.scene import Scene
from idap.errors import ConfigError, UnknownOperatorError
from idap.rebalance.run import Rebalance
from idap.selection.ranking import best_of
from idap.training.batch import default_padding, merge_batches
from idap.training.evaluate import evaluate
from idap.training.recovery import Recovery
from tests.compress.stages.test_stages import prepare
from tests.compress.tiny import assert_untouched, config, snapshot, task, train_net

NET = train_net()
ONCE = {"layers": LayerStage(removals=0), "filters_share": 1.0, "filters": FilterStage(steps=9, first_share=0.5)}


def cut_once(**changes):
    """One run of stage 1 to half of the multiply-adds, without any budget of accuracy and without training."""
    context, start, _ = prepare(**(ONCE | {"max_drop": None, "macs": 0.5} | changes))
    journal = Journal(context, start.metric)
    return context, filter_stage(context, start, context.goals.budget, journal), journal


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "bn_scale"])
def test_every_criterion_comes_to_the_target(criterion):
    result = compress(NET, task(), config(criterion=criterion, max_drop=None, recovery=Recovery(epochs=0.1), **ONCE))
    assert result.reached
    one_unit = 30  # at most, in this net
    assert 0.5 * result.macs[0] - one_unit <= result.macs[1] <= 0.5 * result.macs[0]


def score_nothing(_scene: Scene):
    return {}


def test_a_criterion_that_finds_nothing_to_score_says_so():
    with pytest.raises(ConfigError, match=r"^criterion 'score_nothing' could score no group of this model; take"):
        compress(NET, task(), config(criterion=score_nothing))


def largest_first(scene: Scene):
    """A criterion of a user's own: units with high numbers go first."""
    return {group.name: torch.arange(group.size, 0, -1) for group in scene.groups}


def test_a_function_of_the_users_own():
    context, end, journal = cut_once(criterion=largest_first, cost_power=0.0)
    assert all(units == tuple(range(len(units))) for units in end.keep.values())
    assert journal.steps[0].removed[0].scores == tuple(
        float(context.subject.structure.group(journal.steps[0].removed[0].name).size - unit)
        for unit in journal.steps[0].removed[0].units
    )


def test_uniform_takes_the_same_share_of_every_group():
    context, end, _ = cut_once(ranking="uniform", criterion="magnitude")
    shares = [len(end.keep[group.name]) / group.size for group in context.subject.structure.groups]
    assert max(shares) - min(shares) < 0.2  # the last step may not get round to every group


def test_what_is_left_is_a_multiple():
    context, end, _ = cut_once(
        filters=FilterStage(steps=9, first_share=0.5, multiple=4, multiples={"blocks.0.*": 5}), criterion="relative"
    )
    for group in context.subject.structure.groups:
        left = len(end.keep[group.name])
        assert left == group.size or left % (5 if group.name.startswith("blocks.0") else 4) == 0, group.name
    assert end.cost.macs <= 0.5 * context.subject.costs.cost().macs


def test_floors_by_pattern():
    context, end, _ = cut_once(filters=FilterStage(steps=9, first_share=0.5, keep={"blocks.*": 0.3, "blocks.1.*": 1}))
    for group in context.subject.structure.groups:
        if group.name.startswith("blocks.1."):
            assert len(end.keep[group.name]) == group.size
        elif group.name.startswith("blocks."):
            assert len(end.keep[group.name]) >= round(0.3 * group.size)
    assert match_name({"a*": 0.5, "ab": 0.1}, "ab", 0.9) == 0.1
    with pytest.raises(ConfigError, match=r"^filters\.keep names 'layer9\.\*', which fits no group"):
        least_units(context.subject.structure, FilterStage(keep={"layer9.*": 0.5}))


def test_a_floor_that_makes_the_target_impossible_is_an_error_before_any_work():
    with pytest.raises(Exception, match=r"macs=0\.2 can't be reached: even with everything removable gone, "):
        compress(NET, task(), config(macs=0.2, filters=FilterStage(keep={"*": 0.9}), layers=LayerStage(removals=0)))


def test_streams_that_stay_whole_make_a_target_impossible_before_any_work():
    goal = {"macs": 0.15, "layers": LayerStage(removals=0)}
    prepare(filters=FilterStage(streams="cut"), **goal)
    with pytest.raises(ConfigError, match=r"^macs=0\.15 can't be reached: even with everything removable gone, "):
        compress(NET, task(), config(filters=FilterStage(streams="keep"), **goal))


def test_auto_takes_the_power_with_the_lowest_calibration_loss(monkeypatch):
    seen = []
    real = best_of

    def record_best(powers, loss):
        losses = {power: loss(keep) for power, keep in powers.items()}
        chosen = real(powers, loss)
        seen.append((losses, chosen))
        return chosen

    monkeypatch.setattr(choice, "best_of", record_best)
    cut_once(cost_power="auto", criterion="relative")
    assert seen
    for losses, chosen in seen:
        assert {way.power for way in losses} == {0.0, 0.5, 1.0}
        assert losses[chosen] == min(losses.values())


def stream(context):
    """The group that the residual stream of the tiny net carries."""
    (name,) = context.subject.structure.streams
    assert name == "stem"
    return name


def test_streams_stay_whole_on_request():
    context, end, _ = cut_once(filters=FilterStage(steps=9, first_share=0.5, streams="keep"))
    assert len(end.keep[stream(context)]) == 12
    assert end.cost.macs <= 0.5 * context.subject.whole.macs
    context, end, _ = cut_once(filters=FilterStage(steps=9, first_share=0.5, streams="cut"))
    assert len(end.keep[stream(context)]) < 12


@pytest.mark.parametrize("better", [True, False])
def test_auto_cuts_streams_where_that_costs_less_loss(monkeypatch, better):
    seen = []

    def choose(ways, loss):
        seen.append({way.streams: setting_costs(cut) for way, cut in ways.items()})
        return next(way for way in ways if way.streams is better)

    def setting_costs(cut):
        return sum(map(len, cut.keep.values())), len(cut.keep["stem"])

    monkeypatch.setattr(choice, "best_of", choose)
    _, end, _ = cut_once(criterion=largest_first, cost_power=0.0, filters=FilterStage(schedule="one-shot"))
    assert (len(end.keep["stem"]) < 12) is better
    assert seen[0][False][1] == 12


def test_ways_are_compared_at_the_same_cost(monkeypatch):
    costs = []

    def record_costs(ways, loss):
        costs.append([context.subject.costs.cost(cut.keep, cut.removed).macs for cut in ways.values()])
        return next(iter(ways))

    monkeypatch.setattr(choice, "best_of", record_costs)
    context, start, _ = prepare(**(ONCE | {"max_drop": None, "macs": 0.3, "cost_power": "auto"}))
    filter_stage(context, start, context.goals.budget, Journal(context, start.metric))
    assert costs
    for macs in costs:
        assert len(macs) > 1
        assert max(macs) == macs[0]
        assert min(macs) >= macs[0] - 130  # a unit of the stream


def test_latency_as_the_cost():
    context, start, _ = prepare(cost="latency")
    costs = context.unit_costs(start)
    assert set(costs) == {group.name for group in context.subject.structure.groups}
    assert all(seconds > 0 for seconds in costs.values())
    cut = dataclasses.replace(start, removed=("blocks.0",))
    assert set(costs) - set(context.unit_costs(cut)) == {"blocks.0.fc1"}  # no layer of it is left


def test_each_removed_unit_is_recorded_with_score_rank_and_cost():
    _, _, journal = cut_once(criterion="relative")
    for step in journal.steps:
        ranks = [rank for removal in step.removed for rank in removal.ranks]
        assert sorted(ranks) == sorted(set(ranks))
        for removal in step.removed:
            assert len(removal.units) == len(removal.scores) == len(removal.ranks)
            assert removal.cost > 0
            assert removal.divergence == (min(removal.scores), max(removal.scores))


def test_rebalancing_without_training_keeps_more():
    def error_after_cut(rebalance):
        context, start, _ = prepare(**(ONCE | {"max_drop": None, "rebalance": rebalance}))
        keep = {group.name: tuple(range(group.size // 2)) for group in context.subject.structure.groups}
        model, _, error = make_cut(context, start, keep, ())
        assert error < 1e-4  # proved before it is corrected
        with torch.no_grad():
            return sum(
                float((model(x) - context.subject.original(x)).square().sum()) for x, _ in task().batches("val")
            ), model

    (plain, _), (corrected, _) = error_after_cut(None), error_after_cut(Rebalance())
    assert corrected < 0.5 * plain


def test_a_run_without_rebalancing_and_the_model_stay_as_they_were():
    net = train_net()
    before = snapshot(net)
    result = compress(net, task(), config(rebalance=None))
    assert result.reached
    assert_untouched(net, before)


def test_blocks_are_scored_where_the_criterion_knows_none():
    context, start, _ = prepare(criterion="magnitude")
    found = context.divergence(start)
    assert set(found.blocks) == {block.name for block in context.subject.structure.blocks}
    again, same, _ = prepare(criterion="relative")
    assert found.blocks == pytest.approx(again.divergence(same).blocks)


def test_profile_measures_and_changes_nothing():
    net = train_net()
    before = snapshot(net)
    structure, found = profile(net, task(), Config(criterion="paper"))
    assert set(found.units) == {group.name for group in structure.groups}
    assert set(found.blocks) == {block.name for block in structure.blocks}
    assert_untouched(net, before)


def test_one_batch_of_several():
    one, two = torch.zeros(2, 3), torch.ones(3, 3)
    assert_close(merge_batches([one, two]), torch.cat([one, two]))
    both = merge_batches([{"x": one, "y": [one]}, {"x": two, "y": [two]}])
    assert_close(both["y"][0], torch.cat([one, two]))
    assert merge_batches([one, torch.zeros(2, 4)]) is None  # other lengths
    assert merge_batches([(one, "a"), (two, "b")]) is None
    assert merge_batches([{"x": one}, {"z": one}]) is None
    assert merge_batches([one]) is one


def test_padding_by_default():
    mask = torch.ones(2, 5)
    assert default_padding({"input_ids": mask, "attention_mask": mask}) is mask
    assert default_padding(({"attention_mask": mask}, mask)) is mask
    assert default_padding((mask, mask)) is None
    assert dataclasses.replace(task(), padding=lambda _: mask).padding(None) is mask


def test_metric_is_measured_after_rebalancing():
    context, start, _ = prepare(**(ONCE | {"max_drop": None, "recovery": Recovery(epochs=0)}))
    keep = {group.name: tuple(range(group.size // 2)) for group in context.subject.structure.groups}
    state = next_state(context, start, keep, (), "x")
    assert state.metric == pytest.approx(evaluate(state.model, task()))


@pytest.mark.parametrize("ranking", ["global", "uniform"])
def test_groups_that_are_alike_end_with_the_same_number(ranking):
    stage = FilterStage(steps=9, first_share=0.3, alike="layers", multiples={"blocks.1.*": 2}, keep={"blocks.2.*": 0.3})
    context, end, journal = cut_once(filters=stage, criterion="magnitude", ranking=ranking)
    widths = {name: len(units) for name, units in end.keep.items()}
    inner = {name: width for name, width in widths.items() if name.startswith("blocks.")}
    assert len(inner) == 3 and len(set(inner.values())) == 1
    assert 6 <= next(iter(inner.values())) < 20 and next(iter(inner.values())) % 2 == 0
    assert end.cost.macs <= 0.5 * context.subject.costs.cost().macs
    assert all(step.error < 1e-4 for step in journal.steps)


def test_a_step_that_may_take_little_still_takes_one_of_each_group_alike():
    stage = FilterStage(steps=1, first_share=0.011, growth=0.0, alike="layers", keep={"stem": 1.0})
    context, end, _ = cut_once(filters=stage, criterion=largest_first, cost_power=0.0, macs=None, max_drop=1.0)
    gone = {group.name: group.size - len(end.keep[group.name]) for group in context.subject.structure.groups}
    assert sorted(gone.values()) == [0, 1, 1, 1]


class Cell(nn.Module):
    """A layer whose operator has no rule, and one that can be cut."""

    def __init__(self):
        super().__init__()
        self.cell, self.hidden, self.head = nn.LSTMCell(6, 8), nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.hidden(self.cell(x)[0]).relu())


def test_what_no_rule_knows_may_be_left_whole():
    torch.manual_seed(0)
    goal = {"max_drop": None, "macs": 0.8}
    with pytest.raises(
        UnknownOperatorError, match=r"aten\.lstm_cell\.default .* freeze_unknown=True in Config or analyze"
    ):
        compress(Cell().eval(), task(), config(**goal))
    result = compress(Cell().eval(), task(), config(**goal, freeze_unknown=True))
    assert result.reached
    assert result.model.cell.weight_hh.shape == (32, 8)
    assert result.model.hidden.out_features < 32
