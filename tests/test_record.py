"""The run folder: whole files or none, one line per decision, never two runs in one folder."""

import json
import math
import os
import stat

import numpy as np
import pytest
import torch

from idap import record
from idap.errors import RunFolderError
from idap.files import write_bytes, write_json
from idap.record import RunFolder, read_steps
from idap.steps import Removal, Step

EACH = {"scores": (0.25, 0.5), "ranks": (0, 3), "cost": 9.0}


def step(index, **changes):
    settings = {
        "index": index,
        "stage": "filters",
        "removed": (Removal(name="conv", kind="channels", units=(1, 4), left=6, divergence=(0.25, 0.5), **EACH),),
        "macs": 10,
        "parameters": 5,
        "metric": 0.75,
        "accepted": True,
        "reason": "within the budget",
        "error": 0.0,
        "seconds": 1.5,
    }
    return Step(**(settings | changes))


def test_settings_and_decisions_come_back(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.open({"data": tmp_path, "config": step(7), "share": np.float64(0.5), "seed": torch.tensor(3)})
    settings = json.loads((folder.path / "run.json").read_text())
    assert settings == {
        "data": str(tmp_path),
        "config": json.loads(json.dumps(vars_of(step(7)))),
        "share": 0.5,
        "seed": 3,
    }
    for index in range(3):
        folder.add(step(index, metric=np.float32(0.5), phases={"cut": 0.5}))
    steps = read_steps(folder.path)
    assert [found["index"] for found in steps] == [0, 1, 2]
    assert steps[0]["removed"] == [
        {"name": "conv", "kind": "channels", "units": [1, 4], "left": 6, "divergence": [0.25, 0.5]}
        | {"scores": [0.25, 0.5], "ranks": [0, 3], "cost": 9.0}
    ]
    assert (steps[0]["metric"], steps[0]["phases"], steps[0]["accepted"]) == (0.5, {"cut": 0.5}, True)


def vars_of(found):
    return {
        **vars(found),
        "removed": [vars(removal) for removal in found.removed],
        "shares": {},
        "phases": {},
        "curve": None,
    }


def test_each_decision_is_on_the_disk_at_once(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.open({})
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    folder.add(step(0))
    assert len(synced) == 1
    assert len((folder.path / "steps.jsonl").read_text().splitlines()) == 1


def test_decisions_are_not_written_through_a_link(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open({})
    outside = tmp_path / "outside"
    outside.write_text("kept")
    (folder.path / "steps.jsonl").symlink_to(outside)
    with pytest.raises(RunFolderError, match=r"steps\.jsonl: it is a link"):
        folder.add(step(0))
    assert outside.read_text() == "kept"


def test_places_in_the_folder(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.checkpoint(7) == tmp_path / "checkpoints" / "step-007"
    assert folder.model == tmp_path / "model"


def test_an_empty_folder_is_welcome(tmp_path):
    RunFolder(tmp_path).open({"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "run.json"]


def test_checking_writes_nothing(tmp_path):
    RunFolder(tmp_path / "run").check()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    RunFolder(tmp_path).open({"seed": 1})
    for attempt in (RunFolder(tmp_path).check, lambda: RunFolder(tmp_path).open({"seed": 2})):
        with pytest.raises(
            RunFolderError, match=r"already holds a run \(run\.json\); choose another folder, or delete"
        ):
            attempt()
    assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 1}


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"exists and is not an empty folder; choose another one for the run\."):
        RunFolder(tmp_path).open({})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_way_is_refused(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(RunFolderError, match=r"exists and is not an empty folder|is a file, so no run can be kept in"):
        RunFolder(file / below).open({})
    assert file.read_text() == "text"


def test_a_decision_that_cannot_be_written_says_where(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open({})
    (folder.path / "steps.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"cannot write decision 4 to .*steps\.jsonl: "):
        folder.add(step(4))


def test_a_run_that_has_not_decided_yet_has_no_steps(tmp_path):
    RunFolder(tmp_path).open({})
    assert read_steps(tmp_path) == []


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no run: .*steps\.jsonl can't be read"):
        read_steps(tmp_path)


def test_a_broken_line_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.open({})
    folder.add(step(0))
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"index": 1, "sta')
    with pytest.raises(RunFolderError, match=r"line 2 of .*steps\.jsonl is broken: "):
        read_steps(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    write_bytes(file, b"old")

    def crash(_handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(file, b"new and much longer")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_crash_before_the_last_move_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    write_bytes(file, b"old")

    def crash(_self, _target):
        raise KeyboardInterrupt

    monkeypatch.setattr(record.Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_files_are_readable_for_whom_the_user_says(tmp_path):
    before = os.umask(0o022)
    try:
        write_bytes(tmp_path / "shared", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o644


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"object can't be written as JSON"):
        write_json(tmp_path / "run.json", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_numbers_keep_their_digits(tmp_path):
    write_json(tmp_path / "a.json", {"pi": math.pi})
    assert json.loads((tmp_path / "a.json").read_text()) == {"pi": math.pi}


def test_a_run_below_a_file_or_with_an_impossible_name_is_refused(tmp_path):
    (tmp_path / "notes").write_text("x")
    with pytest.raises(
        RunFolderError, match=r"notes is a file, so no run can be kept in .*notes/runs/a; choose another"
    ):
        RunFolder(tmp_path / "notes" / "runs" / "a").check()
    with pytest.raises(RunFolderError, match=r"can't be the folder of a run: .*[Tt]oo long"):
        RunFolder(tmp_path / ("n" * 300)).check()
