"""A run that is killed at any moment goes on to the same result; a run that is another one is refused."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from idap.compress.config import Config, FilterStage
from idap.compress.run import compress
from idap.errors import ConfigError, RunFolderError
from idap.record import RUN, STEPS, read_steps
from idap.saving.checkpoint import load
from idap.steps import CHECKSUM
from idap.training.recovery import Recovery
from tests.compress.tiny import Noting, batches, config, task, train_net

NET = train_net()
SETTINGS = {"max_drop": 0.03, "macs": 0.4}


def outcome(result):
    return result.plan, result.metric, [(s.stage, s.metric, s.accepted, s.removed) for s in result.steps]


@pytest.fixture(scope="module")
def whole_run():
    result = compress(NET, task(), config(**SETTINGS))
    assert len(result.steps) >= 4
    return result


class Interrupted(BaseException):
    """Stands for a signal in the middle of the work."""


class StopsAt(Noting):
    """Raises at the n-th thing that it hears."""

    def __init__(self, moment: int) -> None:
        super().__init__()
        self._left = moment

    def say(self, text: str) -> None:
        self._count()
        super().say(text)

    def phase(self, title, total):
        self._count()
        return super().phase(title, total)

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Interrupted


@pytest.mark.parametrize("moment", [1, 3, 6, 9, 14, 20])
def test_a_run_stopped_anywhere_goes_on_to_the_same_result(whole_run, tmp_path, moment):
    with pytest.raises(Interrupted) as stop:
        compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run", progress=StopsAt(moment))
    told = [f"Every decision so far is in {tmp_path / 'run'}: the same call with resume=True goes on there."]
    assert getattr(stop.value, "__notes__", []) == (told if (tmp_path / "run" / RUN).exists() else [])
    resumed = compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run", resume=True)
    assert outcome(resumed) == outcome(whole_run)
    assert_close(resumed.model.state_dict(), whole_run.model.state_dict(), rtol=0, atol=0)
    assert len(read_steps(tmp_path / "run")) == len(whole_run.steps)
    assert_close(load(tmp_path / "run" / "model", NET).state_dict(), whole_run.model.state_dict(), rtol=0, atol=0)


def test_a_finished_run_is_recalled_without_training(whole_run, tmp_path):
    compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run")
    heard = Noting()
    again = compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run", resume=True, progress=heard)
    assert outcome(again) == outcome(whole_run)
    assert sum("(recalled)" in line for line in heard.lines) == len(whole_run.steps)


def test_what_a_killed_process_leaves_half_written_is_cleared_away(whole_run, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        compress(NET, task(), config(**SETTINGS), run_dir=folder, progress=StopsAt(14))
    with (folder / STEPS).open("a") as file:
        file.write('{"index": 9, "stage": "fil')
    (folder / "checkpoints" / f".plan.json.{'a' * 32}").write_text("{")
    resumed = compress(NET, task(), config(**SETTINGS), run_dir=folder, resume=True)
    assert outcome(resumed) == outcome(whole_run)
    assert not list(folder.rglob(".*"))


def test_a_run_that_never_began_begins(whole_run, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / f".run.json.{'b' * 32}").write_text("{")
    assert outcome(compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run", resume=True)) == outcome(
        whole_run
    )


def test_another_run_is_refused_by_the_setting_that_differs(tmp_path):
    with pytest.raises(Interrupted):
        compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run", progress=StopsAt(14))
    before = (tmp_path / "run" / STEPS).read_text()
    with pytest.raises(
        RunFolderError, match=r"holds a different run: config\.macs was 0\.4 and is now 0\.6\. Go on with"
    ):
        compress(NET, task(), config(max_drop=0.03, macs=0.6), run_dir=tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match=r"holds a different run: baseline\.macs was "):
        compress(train_net(blocks=4), task(), config(**SETTINGS), run_dir=tmp_path / "run", resume=True)
    other = copy.deepcopy(NET)
    with torch.no_grad():
        other.head.bias.mul_(1.0001)  # names every sample as the original does
    with pytest.raises(RunFolderError, match=r'different run: weights was "\w{16}" and is now "\w{16}"\. Go on'):
        compress(other, task(), config(**SETTINGS), run_dir=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / STEPS).read_text() == before
    with pytest.raises(ConfigError, match=r"^to go on with a run, say where it is"):
        compress(NET, task(), Config(), resume=True)
    with pytest.raises(RunFolderError, match="already holds a run"):
        compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run")


def test_other_calibration_data_are_said(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        compress(NET, task(), config(**SETTINGS), run_dir=folder, progress=StopsAt(14))
    decided = read_steps(folder)
    same, other = Noting(), Noting()
    compress(NET, task(train=batches(256, 9)), config(**SETTINGS), run_dir=folder, resume=True, progress=other)
    compress(NET, task(), config(**SETTINGS), run_dir=folder, resume=True, progress=same)
    said = "The calibration data are not those that the run was begun with: "
    assert [line.startswith(said) for line in other.lines].count(True) == 1
    assert not any(line.startswith(said) for line in same.lines)
    assert read_steps(folder)[: len(decided)] == decided


KILLED = """
import sys
from idap.compress.run import compress
from tests.compress.tiny import config, task, train_net
compress(train_net(), task(), config(max_drop=0.03, macs=0.4), run_dir=sys.argv[1], resume=True)
"""


@pytest.mark.slow
def test_one_run_killed_again_and_again(whole_run, tmp_path):
    """Kill -9, each time a little later, until the run has come to its end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    folder, root = tmp_path / "run", Path(__file__).parents[2]
    for number in range(20):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment, cwd=root)
        begun = time.monotonic()
        while process.poll() is None and not (folder / "run.json").exists() and time.monotonic() - begun < 60:
            time.sleep(0.01)
        try:
            process.wait(timeout=0.05 + 0.13 * number)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if process.returncode == 0:
            break
    resumed = compress(NET, task(), config(**SETTINGS), run_dir=folder, resume=True)
    assert outcome(resumed) == outcome(whole_run)
    lines = (folder / STEPS).read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(len(whole_run.steps)))


KILLS = 20
TWENTY = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)  # a process that was forked has none of the other threads
from idap.compress.run import compress
from idap.steps import CHECKSUM
from tests.compress.tiny import config, task, train_net

def run(folder):
    result = compress(train_net(), task(), config(max_drop=0.03, macs=0.4), run_dir=folder, resume=True)
    numbers = [value for tensor in result.model.state_dict().values() for value in tensor.flatten().tolist()]
    told = [result.metric, repr(result.plan), [(s.metric, s.accepted, repr(s.removed)) for s in result.steps], numbers]
    Path(f"{folder}.json").write_text(json.dumps(told))

def forked(folder):
    pid = os.fork()
    if pid == 0:
        try:
            run(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def ended(folder):
    Path(f"{folder}.json").unlink(missing_ok=True)  # of one that was killed after its end
    assert os.waitpid(forked(folder), 0)[1] == 0
    return json.loads(Path(f"{folder}.json").read_text())

root, kills = Path(sys.argv[1]), int(sys.argv[2])
run(root / "warm")  # what is imported late is there then, so that kills come in the middle of the work
begun = time.monotonic()
whole = ended(root / "whole")
seconds = time.monotonic() - begun
dice, killed, steps = random.Random(0), 0, []
for number in range(kills):
    folder = root / f"run{number}"
    pid = forked(folder)
    time.sleep(dice.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    lines = folder / "steps.jsonl"
    steps.append(len(lines.read_text().splitlines()) if lines.exists() else 0)
    assert ended(folder) == whole, f"kill {number}, after {steps[-1]} decisions"
print(json.dumps([killed, steps, len(whole[2])]))
"""


@pytest.mark.slow
def test_twenty_runs_killed_at_random_moments_each_go_on_to_the_same_result(tmp_path):
    """Kill -9 twenty times, each a run of its own; decisions, metrics and every weight are those of the whole run."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWENTY, str(tmp_path), str(KILLS)]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    killed, steps, decisions = json.loads(done.stdout)
    assert killed >= KILLS // 2  # the others had come to their end
    assert len(set(steps)) > decisions // 2  # in the middle of the work, not all before it


def test_a_turn_that_ended_of_itself_ends_there_again_on_other_data(tmp_path):
    """Stage 1 found nothing more to take; on other calibration data it would, and what was decided stays."""

    def distance(outputs, batch):
        with torch.no_grad():
            return (outputs - NET(batch[0])).square().mean()

    def strict(**parts):
        changes = {"metric": distance, "metric_name": "distance", "higher_is_better": False, "update": None}
        return dataclasses.replace(task(**parts), **changes)

    filters = FilterStage(steps=5, first_share=0.2, multiple=4)
    settings = config(max_drop=0.002, macs=0.3, filters=filters, recovery=Recovery(epochs=0))
    compress(NET, strict(), settings, run_dir=tmp_path / "run")
    written = read_steps(tmp_path / "run")
    assert {step["turn"] for step in written} > {0}
    (tmp_path / "run" / "result.json").unlink()
    heard = Noting()
    other = strict(train=batches(256, 9))
    again = compress(NET, other, settings, run_dir=tmp_path / "run", resume=True, progress=heard)
    kept = json.loads(json.dumps([dataclasses.asdict(step) for step in again.steps]))
    assert kept[: len(written)] == [without_checksum(step) for step in written]
    assert [without_checksum(step) for step in read_steps(tmp_path / "run")] == kept


def without_checksum(step):
    return {key: value for key, value in step.items() if key != CHECKSUM}


def test_a_decision_that_the_run_does_not_come_to_is_refused(whole_run, tmp_path):
    compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run")
    file = tmp_path / "run" / STEPS
    lines = [without_checksum(json.loads(line)) for line in file.read_text().splitlines()]
    lines[-1]["turn"] += 1
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunFolderError, match=r"^decision \d+ of the run is one of stage 'final', and the run now"):
        compress(NET, task(), config(**SETTINGS), run_dir=tmp_path / "run", resume=True)
