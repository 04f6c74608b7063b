"""What a run writes down for its report: profiles, curves, time, what was reached; whatever the order, also resumed."""

import json

import pytest

from idap.compress import folder as folders
from idap.compress.config import LayerStage
from idap.compress.run import compress
from idap.errors import StructureError
from idap.record import AFTER, BEFORE, RESULT, RUN, read_steps
from idap.report.reading import read_run
from idap.training.recovery import Recovery
from tests.compress.tiny import Noting, config, task, train_net

NET = train_net()
GROUPS = ["stem", "blocks.0.fc1", "blocks.1.fc1", "blocks.2.fc1"]


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "net"
    return folder, compress(NET, task(), config(), run_dir=folder)


def test_what_was_before_any_decision(finished_run):
    folder, _ = finished_run
    settings = read(folder, RUN)
    assert settings["task"]["metric"] == "accuracy" and settings["task"]["higher_is_better"]
    assert settings["task"]["worst"] == pytest.approx(settings["baseline"]["metric"] - 0.05)
    assert settings["groups"]["stem"] == {"kind": "neurons", "size": 12, "stream": True}
    assert not settings["groups"]["blocks.0.fc1"]["stream"]
    assert settings["blocks"]["blocks.1"] == {"kind": "block", "contains": [], "groups": ["blocks.1.fc1"]}
    assert settings["preparation"]["structure"] > 0
    assert {"idap", "device", "begun", "folder", "command"} <= set(settings["environment"])


def test_the_profiles_are_of_the_original_and_of_the_result(finished_run):
    folder, result = finished_run
    before, after = read(folder, BEFORE), read(folder, AFTER)
    assert list(before["units"]) == GROUPS
    assert list(before["blocks"]) == ["blocks.0", "blocks.1", "blocks.2"]
    for spread in before["units"].values():
        assert spread["low"] <= spread["mean"] <= spread["high"]
    run = read_run(folder)
    assert set(after["blocks"]) == set(before["blocks"]) - set(run.removed)
    assert list(after["units"]) == [name for name in GROUPS if run.widths[name]]
    assert run.widths == {name: len(result.plan.keep.get(name, range(run.settings.groups[name].size)))
                          if run.widths[name] else 0 for name in GROUPS}  # fmt: skip
    assert set(run.removed) == set(result.plan.removed)


@pytest.mark.parametrize("order", ["filters-layers", "layers-filters"])
def test_the_original_is_measured_whole_whichever_stage_comes_first(tmp_path, order):
    changes = {"order": order, "layers": LayerStage(removals=1), "recovery": Recovery(epochs=0)}
    with_folder = compress(NET, task(), config(**changes), run_dir=tmp_path / "run")
    before = read(tmp_path / "run", BEFORE)
    assert list(before["units"]) == GROUPS and len(before["blocks"]) == 3
    without = compress(NET, task(), config(**changes))
    assert (with_folder.plan, with_folder.metric) == (without.plan, without.metric)


def test_each_recovery_has_its_curve(finished_run):
    folder, result = finished_run
    for step in read_run(folder).steps:
        assert step.curve is not None
        assert step.curve.steps == 8 == len(step.curve.losses)  # one epoch of 256 samples by 32
        assert [steps for steps, _ in step.curve.metrics] == [0, 8]
        trained = max(value for _, value in step.curve.metrics)
        assert step.metric == (trained if step.curve.average is None else step.curve.average)
    assert read_steps(folder)[0]["curve"]["title"] == "filters 0: recovery"
    assert result.steps[0].curve is not None


def test_without_training_there_is_no_curve_and_many_steps_are_drawn_together(tmp_path):
    quick = config(recovery=Recovery(epochs=0), final=Recovery(steps=100))
    compress(NET, task(), quick, run_dir=tmp_path / "run")
    *steps, last = read_run(tmp_path / "run").steps
    assert all(step.curve is None for step in steps)
    assert last.curve is not None and (last.curve.steps, len(last.curve.losses)) == (100, 40)


def test_the_end_is_written_with_all_the_time(finished_run):
    folder, result = finished_run
    end = read(folder, RESULT)
    assert (end["reached"], end["message"], end["metric"]) == (result.reached, result.message, result.metric)
    assert (end["macs"], end["size"]) == (result.macs[1], result.size[1])
    assert end["removed"] == list(result.plan.removed)
    run = read_run(folder)
    for step in run.steps:
        assert sum(step.phases.values()) == pytest.approx(step.seconds)
    told = sum(run.settings.preparation.values()) + sum(step.seconds for step in run.steps)
    assert told < sum(end["seconds"].values())
    assert sum(end["seconds"].values()) >= sum(result.seconds.values())


class Stopped(Exception):  # noqa: N818 - it stands for a kill
    pass


class StopsAfter(Noting):
    """Stops when it hears of the second decision."""

    def say(self, line):
        super().say(line)
        if len(self.lines) == 2:
            raise Stopped


def test_a_run_that_goes_on_keeps_what_it_wrote_and_adds_the_rest(finished_run, tmp_path):
    folder = tmp_path / "net"
    with pytest.raises(Stopped):
        compress(NET, task(), config(), run_dir=folder, progress=StopsAfter())
    half = read_run(folder)
    assert half.reached is None and half.before is not None and len(half.steps) == 2
    settings, before = (folder / RUN).read_bytes(), (folder / BEFORE).read_bytes()
    compress(NET, task(), config(), run_dir=folder, resume=True)
    assert ((folder / RUN).read_bytes(), (folder / BEFORE).read_bytes()) == (settings, before)
    whole, undisturbed = read_run(folder), read_run(finished_run[0])
    assert whole.steps[:2] == half.steps
    assert [step.curve for step in whole.steps] == [step.curve for step in undisturbed.steps]
    assert whole.after == undisturbed.after
    assert whole.reached is not None and whole.reached.macs == undisturbed.reached.macs


def test_a_result_that_can_not_be_measured_is_still_a_result(tmp_path, monkeypatch):
    def refuse(*_):
        raise StructureError("no unit can be seen")

    monkeypatch.setattr(folders, "profile_of", refuse)
    heard = Noting()
    result = compress(NET, task(), config(), run_dir=tmp_path / "run", progress=heard)
    assert heard.lines[-1].startswith("The divergence of the result could not be measured")
    run = read_run(tmp_path / "run")
    assert run.after is None and run.reached is not None and run.reached.metric == result.metric


def test_where_nothing_went_nothing_new_is_measured(tmp_path):
    strict = config(max_drop=0.0, worst_metric=None, recovery=Recovery(epochs=0), macs=0.2)
    result = compress(NET, task(), strict, run_dir=tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert (result.macs[0] == result.macs[1]) == (run.after is None)
