"""The latency table of a run: it guides the widths, is kept, and is used again when the run goes on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from idap.compress import context as context_module
from idap.compress import latency_table
from idap.compress.config import FilterStage, LayerStage
from idap.compress.journal import Journal
from idap.compress.latency_table import least_share
from idap.compress.run import compress
from idap.compress.stages import choice
from idap.compress.stages.filters import filter_stage
from idap.cost.latency import Curve, LatencyTable
from idap.errors import BudgetError, RunFolderError
from idap.training.recovery import Recovery
from tests.compress.stages.test_stages import prepare
from tests.compress.test_resume import Interrupted, StopsAt, outcome
from tests.compress.tiny import Noting, config, task, train_net

NET = train_net()
ONLY = {"max_drop": None, "macs": None, "latency": 0.7, "recovery": Recovery(epochs=0.25, lr=0.02)}


def stairs(_model, structure, _example, widths_of, *, progress):
    """A device on which every layer is padded to a multiple of 4 units."""
    curves, layers = [], {}
    for group in structure.groups:
        widths = tuple(widths_of(group.size))
        seconds = tuple(1e-3 * -(-width // 4) for width in widths)
        layers[group.writers[0].node] = {group.name: len(curves)}
        curves.append(Curve(widths, seconds, (1e-6,) * len(widths)))
    return LatencyTable(1, "cpu", torch.get_num_threads(), tuple(curves), layers)


@pytest.fixture
def clock(monkeypatch):
    """Every layer is padded to a multiple of 4 units, in the whole and by itself; counts the tables measured."""
    measured = []

    def share(original, model, example):
        def padded_macs(net):
            return sum(-(-layer.out_features // 4) for layer in net.modules() if isinstance(layer, nn.Linear))

        return 0.3 + 0.7 * padded_macs(model) / padded_macs(original)

    def table(*args, **settings):
        measured.append(args)
        return stairs(*args, **settings)

    monkeypatch.setattr(context_module, "latency_share", share)
    monkeypatch.setattr(latency_table, "latency_share", share)
    monkeypatch.setattr(latency_table, "measure_table", table)
    return measured


def widths(result):
    return {name: len(units) for name, units in result.plan.keep.items()}


def at_once(**changes):
    return config(**{**ONLY, "layers": LayerStage(removals=0), "filters": FilterStage(schedule="one-shot"), **changes})


def test_widths_are_chosen_at_the_steps(clock):
    heard = Noting()
    result = compress(NET, task(), at_once(), progress=heard)
    assert result.reached, result.message
    assert widths(result)
    assert all(width % 4 == 0 for width in widths(result).values())
    assert any(line.startswith("The latency has steps of 4 units in ") for line in heard.lines)
    assert len(clock) == 1


def test_steps_that_are_none_are_not_followed(clock, monkeypatch):
    """Where whole passes know nothing of the steps of single layers, any width may be better."""

    def share(original, model, example):
        weights = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
        return 0.3 + 0.7 * weights(model) / weights(original)

    monkeypatch.setattr(context_module, "latency_share", share)
    losses = []

    def loss(trial, cut):
        losses.append(sum(width % 4 == 0 for width in map(len, cut.keep.values())))
        return float(losses[-1])  # fewer such widths are better

    monkeypatch.setattr(choice._Trial, "loss", loss)
    result = compress(NET, task(), at_once())
    assert result.reached, result.message
    assert losses[-1] == 4 > min(losses)
    assert any(width % 4 for width in widths(result).values())


@pytest.mark.parametrize("filters", [{"multiple": 5}, {"multiples": {"*": 5}}])
def test_multiples_that_are_set_come_before_the_steps(clock, filters):
    settings = {**ONLY, "layers": LayerStage(removals=0), "filters": FilterStage(steps=5, first_share=0.2, **filters)}
    found = widths(compress(NET, task(), config(**settings)))
    assert found
    assert all(width % 5 == 0 for width in found.values())


def test_what_is_gone_costs_no_seconds_either(clock):
    """A group that was still paid for would hold back those that are to end like it."""
    paid = {}
    for cost in ("macs", "latency"):
        context, start, _ = prepare(cost=cost, latency=0.7)
        costs = context.unit_costs(replace(start, removed=("blocks.1",)))
        paid[cost] = {name for name, each in costs.items() if each > 0}
    assert paid["latency"] == paid["macs"]
    assert "blocks.1.fc1" not in paid["latency"]


def test_without_a_goal_of_latency_nothing_is_measured(clock):
    compress(NET, task(), config(max_drop=None, recovery=Recovery(epochs=0)))
    assert not clock


@pytest.mark.parametrize("moment", [9, 12, 14])
def test_a_run_that_goes_on_uses_the_table_that_it_had(clock, monkeypatch, tmp_path, moment):
    with pytest.raises(Interrupted):
        compress(NET, task(), config(**ONLY), run_dir=tmp_path / "a", progress=StopsAt(moment))
    kept = json.loads((tmp_path / "a" / "latency.json").read_text())
    assert kept["least"] < 0.7
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def refuse(*args, **settings):
        raise AssertionError("measured again")

    monkeypatch.setattr(latency_table, "measure_table", refuse)
    monkeypatch.setattr(latency_table, "latency_share", refuse)
    first, second = (compress(NET, task(), config(**ONLY), run_dir=tmp_path / name, resume=True) for name in ("a", "b"))
    assert outcome(first) == outcome(second)
    assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    assert json.loads((tmp_path / "a" / "latency.json").read_text()) == kept


def test_what_can_be_reached_is_kept_also_where_no_table_is_needed(clock, monkeypatch, tmp_path):
    filters = FilterStage(steps=5, first_share=0.2, multiple=2)
    settings = config(**{**ONLY, "macs": 0.7, "filters": filters})
    with pytest.raises(Interrupted):
        compress(NET, task(), settings, run_dir=tmp_path / "run", progress=StopsAt(9))
    assert json.loads((tmp_path / "run" / "latency.json").read_text())["table"] is None
    # The machine is slow now: measured again, the goal would be out of reach.
    monkeypatch.setattr(latency_table, "latency_share", lambda *_: 0.9)
    assert compress(NET, task(), settings, run_dir=tmp_path / "run", resume=True).reached
    assert not clock


@pytest.mark.parametrize("other", [{"device": "NVIDIA T4"}, {"threads": 77}])
def test_a_table_of_another_device_or_other_threads_is_measured_again(clock, tmp_path, other):
    with pytest.raises(Interrupted):
        compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run", progress=StopsAt(9))
    file, heard = tmp_path / "run" / "latency.json", Noting()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "table": {**kept["table"], **other}}))
    assert compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run", resume=True, progress=heard).reached
    value = next(iter(other.values()))
    assert any(line.startswith("The layers are timed anew: ") and str(value) in line for line in heard.lines)
    assert len(clock) == 2
    assert json.loads(file.read_text())["table"] == kept["table"]


def test_what_another_model_can_reach_says_nothing_of_this_one(clock, tmp_path):
    """The folder is the mistake, not the budget."""
    with pytest.raises(Interrupted):
        compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run", progress=StopsAt(14))
    file = tmp_path / "run" / "latency.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "least": 0.99}))
    with pytest.raises(RunFolderError, match="holds a different run: "):
        compress(train_net(blocks=4), task(), config(**ONLY), run_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_a_finished_run_keeps_the_latency_and_the_end_that_it_wrote(clock, monkeypatch, tmp_path, late):
    first = compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run")
    assert first.reached
    files = [(tmp_path / "run" / name) for name in ("result.json", "divergence-after.json")]
    written = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    share = latency_table.latency_share
    monkeypatch.setattr(context_module, "latency_share", lambda *models: share(*models) + late)
    again = compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run", resume=True)
    assert (again.latency, again.reached, again.message) == (first.latency, first.reached, first.message)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == written


@pytest.mark.parametrize("text", ["{", "[]", '{"latency": "fast"}', "{}"])
def test_a_broken_end_is_an_error(clock, tmp_path, text):
    compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"result\.json (can't be read: |is not what this version of idap)"):
        compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("text", "what"), [("{", "can't be read: Expecting"), ('{"least": 2}', "'table'"), ('{"least": "x"}', "is 'x'")]
)
def test_a_broken_table_is_an_error(clock, tmp_path, text, what):
    with pytest.raises(Interrupted):
        compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run", progress=StopsAt(14))
    (tmp_path / "run" / "latency.json").write_text(text)
    with pytest.raises(RunFolderError, match=rf"^the latency table .*latency\.json can't be read.*{what}|{what}"):
        compress(NET, task(), config(**ONLY), run_dir=tmp_path / "run", resume=True)


def test_one_disturbed_measurement_puts_nothing_out_of_reach(monkeypatch):
    found = iter([0.9, 0.4, 0.9])
    monkeypatch.setattr(latency_table, "latency_share", lambda *_: next(found))
    assert least_share(NET, NET, ((), {}), 0.5) == 0.4
    assert next(found) == 0.9  # it was asked for no more than that


def test_what_is_out_of_reach_every_time_is(clock, monkeypatch):
    asked = []

    def share(*_):
        asked.append(None)
        return 0.8 + 0.01 * len(asked)

    monkeypatch.setattr(latency_table, "latency_share", share)
    with pytest.raises(
        BudgetError, match=r"^latency=0\.7 can't be reached: even with everything removable gone, 81\.0%"
    ):
        compress(NET, task(), config(**ONLY))
    assert len(asked) == latency_table.DOUBTS


def test_ways_to_rank_are_compared_at_the_same_latency(clock, monkeypatch):
    found = []

    def record_latencies(ways, loss):
        found.append({way: choice.left_after(*setting_and_state, cut)["latency"] for way, cut in ways.items()})
        return next(iter(ways))

    settings = {**ONLY, "filters": FilterStage(schedule="one-shot"), "layers": LayerStage(removals=0)}
    context, start, _ = prepare(**settings)
    setting_and_state = context, start
    monkeypatch.setattr(choice, "best_of", record_latencies)
    filter_stage(context, start, context.goals.budget, Journal(context, start.metric))
    assert {way.power for way in found[0]} == {0.0, 1.0}
    first, *others = found[0].values()
    assert first <= 0.7
    assert all(0.9 * first <= latency <= 1.02 * first for latency in others)


def test_a_cut_measured_too_slow_lets_no_way_win_that_cuts_nothing(clock, monkeypatch):
    """Whoever removes nothing has the lowest loss."""
    settings = {**ONLY, "filters": FilterStage(schedule="one-shot"), "layers": LayerStage(removals=0)}
    context, start, _ = prepare(**settings)
    real, asked = choice.left_after, []

    def disturb_first(*given):
        asked.append(given)
        return {**real(*given), "latency": 1.05} if len(asked) == 1 else real(*given)

    monkeypatch.setattr(choice, "left_after", disturb_first)
    monkeypatch.setattr(
        choice, "best_of", lambda ways, loss: max(ways, key=lambda way: sum(map(len, ways[way].keep.values())))
    )
    state = filter_stage(context, start, context.goals.budget, Journal(context, start.metric))
    assert asked
    assert state is not start
    assert state.latency <= 0.7
