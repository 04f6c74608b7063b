"""Run folders as plain data: finished, under way, broken, or none at all."""

import json
import math

import pytest

from idap.errors import RunFolderError
from idap.record import RESULT, RUN, STEPS
from idap.report.reading import read_run
from tests.report.runs import decision, settings, steps, write_run


def test_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "net"))
    assert run.name == "net"
    assert run.steps == tuple(steps())
    assert [step.index for step in run.accepted] == [0, 2, 3, 4]
    assert (run.now.macs, run.now.metric, run.now.size) == (960_000, 0.966, 78_890)
    assert run.removed == {"blocks.1": "removed"}
    assert run.widths == {"stem": 16, "blocks.0.fc": 9, "blocks.1.fc": 0, "blocks.2.fc": 20}
    assert run.targets == {"macs": 0.5}
    assert run.is_within_budget()
    assert run.before is not None and run.after is not None
    assert run.before.units["stem"].mean == 0.01
    assert run.measured is not None and run.measured.latency is not None
    assert run.measured.latency.after == 0.0025


def test_a_run_under_way_is_as_far_as_it_has_come(tmp_path):
    run = read_run(write_run(tmp_path / "net", finished=False, decided=steps()[:2]))
    assert run.reached is None and run.after is None and run.measured is None
    assert (run.now.macs, run.now.metric, run.now.size) == (1_600_000, 0.968, round(161_000 * 0.81))
    assert run.widths["blocks.0.fc"] == 12  # what was rolled back does not count


def test_a_run_without_a_decision(tmp_path):
    run = read_run(write_run(tmp_path / "net", finished=False, decided=[]))
    assert run.steps == ()
    assert run.now == run.settings.baseline
    assert run.widths["blocks.0.fc"] == 20


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "net", finished=False)
    with (folder / STEPS).open("a") as file:
        file.write('{"index": 5, "sta')
    assert len(read_run(folder).steps) == 5


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    folder = write_run(tmp_path / "net")
    lines = (folder / STEPS).read_text().splitlines()
    (folder / STEPS).write_text("\n".join([lines[0], lines[1][:30], *lines[2:]]) + "\n")
    with pytest.raises(RunFolderError, match=r"line 2 of .*steps\.jsonl is broken: "):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (RUN, "{", r"run\.json can't be read: "),
        (
            RUN,
            "{}",
            r"run\.json is not what this version of idap writes: model: Field required \(and",
        ),
        (RESULT, '{"reached": "maybe"}', r"result\.json is not what this version of idap writes: "),
        (
            STEPS,
            '{"index": 0}\n',
            r"line 1 of .*steps\.jsonl is not what this version of idap writes: stage: ",
        ),
        (STEPS, "[]\n", r"line 1 of .*steps\.jsonl is broken: it holds a list, expected an object"),
    ],
)
def test_what_is_not_of_this_version_is_said(tmp_path, name, text, message):
    folder = write_run(tmp_path / "net")
    (folder / name).write_text(text)
    with pytest.raises(RunFolderError, match=message):
        read_run(folder)


def test_a_decision_without_its_costs_is_said(tmp_path):
    folder = write_run(tmp_path / "net")
    line = json.loads((folder / STEPS).read_text().splitlines()[0]) | {"shares": {"macs": 0.5}}
    (folder / STEPS).write_text(json.dumps(line) + "\n")
    with pytest.raises(RunFolderError, match=r"line 1 of .* does not say which share of the parameters is left;"):
        read_run(folder)


@pytest.mark.parametrize("what", ["nowhere", "file", "other"])
def test_what_is_no_run_is_said(tmp_path, what):
    (tmp_path / "file").write_text("text")
    (tmp_path / "other").mkdir()
    expected = "does not exist" if what == "nowhere" else r"holds no run: there is no run\.json"
    with pytest.raises(RunFolderError, match=rf"{what} {expected}\. Name the folder that `idap compress` wrote"):
        read_run(tmp_path / what)


def test_blocks_inside_others_go_with_them_and_take_their_groups(tmp_path):
    blocks = {
        "net.a": {"kind": "branch", "contains": [], "groups": ["stem"]},
        "net": {"kind": "block", "contains": ["net.a"], "groups": ["stem", "blocks.0.fc"]},
    }
    whole = decision(0, 0.5, 0.97, "net", stage="layers")
    run = read_run(write_run(tmp_path / "net", finished=False, decided=[whole], blocks=blocks))
    assert run.removed == {"net": "removed", "net.a": "inside"}
    assert (run.widths["stem"], run.widths["blocks.0.fc"], run.widths["blocks.1.fc"]) == (0, 0, 20)


def test_where_lower_is_better_the_budget_is_a_ceiling(tmp_path):
    task = {"metric": "perplexity", "higher_is_better": False, "worst": 0.965}
    assert not read_run(write_run(tmp_path / "net", task=task)).is_within_budget()


def test_the_picture_shows_a_goal_that_every_decision_tells_of(tmp_path):
    config = settings()["config"]
    latency = read_run(write_run(tmp_path / "a", config=config | {"macs": None, "latency": 0.5}))
    assert latency.cost == "macs"
    assert math.isnan(latency.share(latency.steps[0], "latency"))
    assert read_run(write_run(tmp_path / "b", config=config | {"macs": None, "size": 0.5})).cost == "size"
