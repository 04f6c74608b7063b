"""A layer goes only where filters that save as much would lose more, if both may go for a target."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from idap.compress import run as running
from idap.compress.change import make_cut
from idap.compress.config import FilterStage, LayerStage
from idap.compress.journal import Journal
from idap.compress.run import compress
from idap.compress.stages import choice, layers
from idap.compress.stages.cut import calibration_loss
from idap.compress.stages.layers import layer_stage
from idap.progress import Silent
from idap.record import read_steps
from idap.training.evaluate import evaluate
from idap.training.recovery import Recovery
from tests.compress.tiny import Noting, config, task, train_net

NET = train_net()
UNTRAINED = {"max_drop": None, "recovery": Recovery(epochs=0)}
CONTESTED = {**UNTRAINED, "layers": LayerStage(removals=2)}


def idle() -> torch.nn.Module:
    """A net whose second block adds nothing."""
    net = copy.deepcopy(NET)
    torch.nn.init.zeros_(net.blocks[1].fc2.weight)
    torch.nn.init.zeros_(net.blocks[1].fc2.bias)
    return net


def strict():
    """A task whose metric any change makes worse: how far the logits are from the original's."""

    def distance(outputs, batch):
        with torch.no_grad():
            return (outputs - NET(batch[0])).square().mean()

    changes = {"metric": distance, "metric_name": "distance", "higher_is_better": False}
    return dataclasses.replace(task(), **changes, update=None)


def stage(model, *, contested=True, **changes):
    """Stage 2 alone, from the original; what it came to, and its decisions."""
    context, start, removable = running.prepare_run(model, task(), config(**changes), None, Silent())[:3]
    journal = Journal(context, start.metric)
    end = layer_stage(context, start, context.goals.budget, journal, removable, contested=contested)
    return context, start, end, journal.steps


def test_a_layer_stays_where_filters_lose_less():
    context, start, end, (step,) = stage(NET, macs=0.8, **CONTESTED)
    assert end is start
    assert not step.accepted
    assert step.contest.filters < step.contest.layer
    assert step.reason == (
        f"cutting filters instead would lose less ({step.contest.filters:.4g} against {step.contest.layer:.4g} on "
        "calibration data)"
    )
    made = make_cut(context, start, start.keep, [step.removed[0].name])
    assert step.contest.layer == pytest.approx(calibration_loss(context, made.model))
    assert step.metric == pytest.approx(evaluate(made.model, context.subject.task))  # as it was cut, untrained
    assert step.shares["macs"] == pytest.approx(
        context.subject.costs.cost(start.keep, made.plan.removed).macs / start.cost.macs
    )


def test_a_layer_goes_where_filters_lose_more():
    held = FilterStage(keep={"blocks.1.*": 1.0})
    _, _, end, steps = stage(idle(), macs=0.8, filters=held, rebalance=None, **CONTESTED)
    assert end.removed == ("blocks.1",)
    assert [step.accepted for step in steps] == [True]
    assert steps[0].contest.layer <= steps[0].contest.filters
    assert not steps[0].contest.is_lost


def test_a_layer_goes_where_filters_cannot_save_as_much():
    held = FilterStage(keep={"*": 0.95})
    _, _, end, steps = stage(NET, macs=0.8, filters=held, **CONTESTED)
    assert len(end.removed) == 1
    assert [(step.accepted, step.contest.filters) for step in steps] == [(True, None)]
    assert steps[0].reason == "within the budget; filters can't save as much"


@pytest.mark.parametrize(("wanted", "asked"), [(0.83, 0.83), (0.5, 0.69)])
def test_filters_have_to_save_as_much_as_the_layer_but_no_more_than_is_wanted(monkeypatch, wanted, asked):
    """A block saves three tenths of this net."""
    aims, real = [], layers.filters_instead
    monkeypatch.setattr(layers, "filters_instead", lambda *args: aims.append(args[2].targets) or real(*args))
    _, _, _, (step,) = stage(NET, macs=wanted, **CONTESTED)
    assert step.shares["macs"] == pytest.approx(0.69, abs=0.005)
    assert aims == [{"macs": pytest.approx(asked, abs=0.005)}]


def test_layers_are_not_compared_where_that_is_set_and_where_layers_come_first():
    _, _, end, steps = stage(NET, macs=0.8, contested=False, **CONTESTED)
    assert len(end.removed) == 1
    assert steps[0].contest is None
    uncompared = {**UNTRAINED, "layers": LayerStage(removals=1, against="nothing")}
    first = {**CONTESTED, "order": "layers-filters"}
    for settings in (uncompared, first):
        result = compress(NET, task(), config(macs=0.6, **settings))
        assert result.plan.removed
        assert all(step.contest is None for step in result.steps)


def test_filters_go_on_in_place_of_the_layer():
    result = compress(NET, task(), config(macs=0.6, **CONTESTED))
    assert result.reached
    assert result.plan.removed == ()
    stages = [(step.stage, step.accepted) for step in result.steps]
    assert stages.count(("layers", False)) == 1
    assert stages[-1] == ("filters", True)
    unasked = compress(NET, task(), config(macs=0.6, max_drop=None, recovery=Recovery(epochs=0)))
    assert unasked.plan.removed
    assert result.metric >= unasked.metric


def test_a_layer_that_saves_nothing_has_to_beat_doing_nothing(monkeypatch):
    """As where the clock says that the network without it is as slow as with it."""
    monkeypatch.setattr(layers, "left_after", lambda *_: {"macs": 1.01})
    context, start, end, (step,) = stage(NET, macs=0.8, **CONTESTED)
    assert end is start
    assert step.contest.filters == pytest.approx(calibration_loss(context, start.model))


def test_layers_are_asked_again_only_where_one_was_beaten_and_the_essential_ones_are_remembered(monkeypatch):
    held = {**UNTRAINED, "max_drop": 0.0, "filters": FilterStage(keep={"*": 0.95}, steps=1)}
    layers_of = {"layers": LayerStage(removals=2)}
    result = compress(NET, strict(), config(macs=0.5, **held, **layers_of))
    asked = [step.removed[0].name for step in result.steps if step.stage == "layers"]
    assert asked  # all are essential
    assert len(asked) == len(set(asked))
    assert not result.reached


def test_layers_go_after_all_where_filters_do_not_come_to_the_target():
    few = FilterStage(steps=1, first_share=0.1)
    result = compress(NET, task(), config(macs=0.5, filters=few, **CONTESTED))
    told = [(step.stage, step.accepted, step.contest is not None) for step in result.steps]
    assert told[:4] == [
        ("filters", True, False),
        ("layers", False, True),
        ("filters", True, False),
        ("layers", True, False),
    ]
    assert result.plan.removed


def test_removals_count_over_all_rounds():
    few = FilterStage(steps=1, first_share=0.02)
    held = {**UNTRAINED, "layers": LayerStage(removals=1)}
    result = compress(NET, task(), config(macs=0.3, filters=few, **held))
    assert not result.reached
    assert len(result.plan.removed) == 1
    assert (
        "the steps were used up, and none of them exceeded the accuracy budget" in result.message
    )  # a lost contest neither


@pytest.mark.parametrize("word", ["layers 1: measure filters", "filters 3: measure"])
def test_a_run_that_stops_at_a_contest_goes_on_to_the_same_result(tmp_path, word):
    settings = config(macs=0.6, **CONTESTED)
    whole = compress(NET, task(), settings)
    assert whole.steps[1].contest.is_lost
    with pytest.raises(KeyboardInterrupt):
        compress(NET, task(), settings, run_dir=tmp_path / "run", progress=Noting(fail_at=word))
    heard = Noting()
    resumed = compress(NET, task(), settings, run_dir=tmp_path / "run", resume=True, progress=heard)
    assert resumed.plan == whole.plan
    assert [step.contest for step in resumed.steps] == [step.contest for step in whole.steps]
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    written = read_steps(tmp_path / "run")
    assert written[1]["contest"] == {"layer": whole.steps[1].contest.layer, "filters": whole.steps[1].contest.filters}
    assert sum("(recalled)" in line for line in heard.lines) == (1 if "layers" in word else 3)


@pytest.mark.parametrize("against", ["filters", "nothing"])
def test_a_finished_run_is_recalled_as_it_was_though_some_turns_decided_nothing(tmp_path, against):
    """The first turn of stage 1 may take nothing here, and the next ones must not take its decisions for theirs."""
    held = FilterStage(steps=5, first_share=0.5, min_keep=0.95, streams="keep")
    layers_of = LayerStage(removals=2, patience=5, against=against)
    settings = config(max_drop=0.01, macs=0.5, recovery=Recovery(epochs=0), filters=held, layers=layers_of)
    whole = compress(NET, strict(), settings, run_dir=tmp_path / "run")
    written = (tmp_path / "run" / "steps.jsonl").read_bytes()
    heard = Noting()
    again = compress(NET, strict(), settings, run_dir=tmp_path / "run", resume=True, progress=heard)
    assert [step.reason for step in again.steps] == [step.reason for step in whole.steps]
    assert (tmp_path / "run" / "steps.jsonl").read_bytes() == written
    assert sum("(recalled)" in line for line in heard.lines) == len(whole.steps)


# ------------------------------------------------------------------------------------------------ what is left undone


def test_a_layer_that_saves_too_much_goes_where_filters_end_above_the_target():
    few = FilterStage(steps=1, first_share=0.12)
    held = {**UNTRAINED, "filters": few, "layers": LayerStage(removals=4)}
    result = compress(train_net(blocks=3), task(), config(macs=0.72, **held))
    assert result.reached
    assert len(result.plan.removed) == 1  # one that saves more than twice what was still wanted
    before, layer = result.steps[-2:]
    assert 0.72 < before.shares["macs"] < 0.76
    assert layer.shares["macs"] < 0.65


def test_what_the_budget_refused_stage_1_is_not_tried_again():
    tight = config(max_drop=0.0005, macs=0.3, layers=LayerStage(removals=2), recovery=Recovery(epochs=0))
    steps = compress(NET, strict(), tight).steps
    refused = [step.removed for step in steps if step.stage == "filters" and not step.accepted]
    assert refused
    assert all(one != other for place, one in enumerate(refused) for other in refused[:place])
    assert all(step.contest is None for step in steps)  # filters that save as much were refused


def test_filters_without_a_finite_loss_are_no_rival(monkeypatch):
    monkeypatch.setattr(choice, "calibration_loss", lambda *_: math.nan)
    _, _, end, (step, *_) = stage(NET, macs=0.8, **CONTESTED)
    assert end.removed
    assert step.contest.filters is None


def test_a_layer_without_which_the_loss_is_not_finite_is_not_chosen(monkeypatch):
    asked, real = [], layers.loss_without

    def break_first(context, state, block, *given):
        asked.append(block.name)
        return math.nan if len(asked) == 1 else real(context, state, block, *given)

    monkeypatch.setattr(layers, "loss_without", break_first)
    _, _, end, _ = stage(NET, macs=0.8, contested=False, **CONTESTED)
    assert end.removed
    assert asked[0] not in end.removed
    asked.clear()
    one_by_one = {**CONTESTED, "layers": LayerStage(removals=1, short_list=1)}
    _, _, end, _ = stage(NET, macs=0.8, contested=False, **one_by_one)
    assert end.removed == (asked[1],)
    monkeypatch.setattr(layers, "loss_without", lambda *_: math.inf)
    _, start, end, steps = stage(NET, macs=0.8, contested=False, **CONTESTED)
    assert end is start
    assert not steps


def test_a_layer_that_the_budget_refused_is_not_asked_again_once_filters_took_something():
    held = FilterStage(steps=5, first_share=0.1, min_keep=0.55)
    settings = {"max_drop": 0.01, "macs": 0.4, "filters_share": 0.35, "filters": held, "recovery": Recovery(epochs=0)}
    steps = compress(NET, strict(), config(**settings, layers=LayerStage(removals=2))).steps
    stayed = [step for step in steps if step.stage == "layers" and not step.accepted]
    refused = [step.removed[0].name for step in stayed if not step.is_beaten]
    assert any(step.is_beaten for step in stayed)
    assert len(refused) > 1
    assert len(refused) == len(set(refused))
    first = next(place for place, step in enumerate(steps) if step.stage == "layers")
    assert any(step.stage == "filters" and step.accepted for step in steps[first:])
