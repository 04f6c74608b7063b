"""A layer goes only where filters that save as much would lose more, if both may go for a target."""

import copy

import pytest
import torch
from torch.testing import assert_close

from idap.compress import layers
from idap.compress import run as running
from idap.compress.change import make_cut
from idap.compress.config import FilterStage, LayerStage
from idap.compress.journal import Journal
from idap.compress.layers import layer_stage
from idap.compress.run import compress
from idap.compress.trial import calibration_loss
from idap.progress import Silent
from idap.record import read_steps
from idap.training.evaluate import evaluate
from idap.training.recovery import Recovery
from tests.compress.tiny import Noting, config, task, trained

NET = trained()
UNTRAINED = {"max_drop": None, "recovery": Recovery(epochs=0)}
CONTESTED = {**UNTRAINED, "layers": LayerStage(removals=2)}


def idle() -> torch.nn.Module:
    """A net whose second block adds nothing."""
    net = copy.deepcopy(NET)
    torch.nn.init.zeros_(net.blocks[1].fc2.weight)
    torch.nn.init.zeros_(net.blocks[1].fc2.bias)
    return net


def stage(model, *, contested=True, **changes):
    """Stage 2 alone, from the original; what it came to, and its decisions."""
    setting, start, removable = running._prepare(model, task(), config(**changes), None, Silent())[:3]
    journal = Journal(setting, start.metric)
    end = layer_stage(setting, start, setting.budget, journal, removable, contested=contested)
    return setting, start, end, journal.steps


def test_a_layer_stays_where_filters_lose_less():
    setting, start, end, (step,) = stage(NET, macs=0.8, **CONTESTED)
    assert end is start
    assert not step.accepted
    assert step.contest.filters < step.contest.layer
    assert step.reason == (
        f"filters that save as much lose less: a loss of {step.contest.filters:.4g} in place of "
        f"{step.contest.layer:.4g} on calibration data"
    )
    made = make_cut(setting, start, start.keep, [step.removed[0].name])
    assert step.contest.layer == pytest.approx(calibration_loss(setting, made.model))
    assert step.metric == pytest.approx(evaluate(made.model, setting.task))  # as it was cut, untrained
    assert step.shares["macs"] == pytest.approx(
        setting.costs.cost(start.keep, made.plan.removed).macs / start.cost.macs
    )


def test_a_layer_goes_where_filters_lose_more():
    held = FilterStage(keep={"blocks.1.*": 1.0})
    _, _, end, steps = stage(idle(), macs=0.8, filters=held, rebalance=None, **CONTESTED)
    assert end.removed == ("blocks.1",)
    assert [step.accepted for step in steps] == [True]
    assert steps[0].contest.layer <= steps[0].contest.filters
    assert not steps[0].contest.lost


def test_a_layer_goes_where_filters_cannot_save_as_much():
    held = FilterStage(keep={"*": 0.95})
    _, _, end, steps = stage(NET, macs=0.8, filters=held, **CONTESTED)
    assert len(end.removed) == 1
    assert [(step.accepted, step.contest) for step in steps] == [(True, None)]


@pytest.mark.parametrize(("wanted", "asked"), [(0.83, 0.83), (0.5, 0.69)])
def test_filters_have_to_save_as_much_as_the_layer_but_no_more_than_is_wanted(monkeypatch, wanted, asked):
    """A block saves three tenths of this net."""
    aims, real = [], layers.filters_instead
    monkeypatch.setattr(layers, "filters_instead", lambda *args: aims.append(args[2].targets) or real(*args))
    _, _, _, (step,) = stage(NET, macs=wanted, **CONTESTED)
    assert step.shares["macs"] == pytest.approx(0.69, abs=0.005)
    assert aims == [{"macs": pytest.approx(asked, abs=0.005)}]


def test_layers_go_unasked_where_that_is_set_and_where_layers_come_first():
    _, _, end, steps = stage(NET, macs=0.8, contested=False, **CONTESTED)
    assert len(end.removed) == 1
    assert steps[0].contest is None
    unasked = {**UNTRAINED, "layers": LayerStage(removals=1, against="nothing")}
    first = {**CONTESTED, "order": "layers-filters"}
    for settings in (unasked, first):
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
        "the steps were used up, and none of them left the accuracy budget" in result.message
    )  # a lost contest neither


@pytest.mark.parametrize("word", ["layers 1: measure filters", "filters 2: measure"])
def test_a_run_that_stops_at_a_contest_goes_on_to_the_same_result(tmp_path, word):
    settings = config(macs=0.6, **CONTESTED)
    whole = compress(NET, task(), settings)
    assert whole.steps[1].contest.lost
    with pytest.raises(KeyboardInterrupt):
        compress(NET, task(), settings, run_dir=tmp_path / "run", progress=Noting(fail_at=word))
    heard = Noting()
    resumed = compress(NET, task(), settings, run_dir=tmp_path / "run", resume=True, progress=heard)
    assert resumed.plan == whole.plan
    assert [step.contest for step in resumed.steps] == [step.contest for step in whole.steps]
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    written = read_steps(tmp_path / "run")
    assert written[1]["contest"] == {"layer": whole.steps[1].contest.layer, "filters": whole.steps[1].contest.filters}
    assert sum("(recalled)" in line for line in heard.lines) == (1 if "layers" in word else 2)
