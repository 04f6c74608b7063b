"""A few kills of every command that writes. The long run is `make fuzz`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.killing import differences
from tests.fuzz.known import cause_of
from tests.fuzz.pool import ROOT, environment

KILLS = 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_that_were_killed_and_run_again_leave_what_undisturbed_ones_do(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    words = [sys.executable, "-m", "tests.fuzz.kills", "--kills", str(KILLS), "--json", str(told)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert told.exists(), done.stderr
    found = json.loads(told.read_text())
    assert [problem for problem in found["problems"] if not cause_of(problem)] == []
    assert sum(found["killed"].values()) >= KILLS // 2  # the others had come to their end


def test_what_a_folder_should_not_hold_is_told() -> None:
    expected = {"plan": b"1", "weights": b"2", "result": b"3"}
    assert differences(expected, expected, {}) == []
    found = {"plan": b"0", "weights": b"0", "rest": b""}
    told = ["input changed: plan", "left over: rest", "missing: result", "differs: weights"]
    assert differences(found, expected, {"plan": b"1"}) == told
