"""A run belongs to one process from before any work to its end; what fails beside the result loses nothing."""

import json
import shutil
import threading

import pytest

from idap.compress import folder as folders
from idap.compress.run import compress
from idap.errors import RunFolderError, TaskError
from idap.ownership import HOLDER, LOCK
from idap.record import AFTER, RESULT, STEPS, RunFolder, read_steps
from idap.report.reading import read_run
from idap.training.recovery import Recovery
from tests.compress.tiny import Noting, config, task, train_net

NET = train_net()
QUICK = {"recovery": Recovery(epochs=0), "macs": 0.7}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run that was stopped after its first decision."""
    folder = tmp_path_factory.mktemp("runs") / "net"
    compress(NET, task(), config(**QUICK), run_dir=folder)
    (folder / STEPS).write_text((folder / STEPS).read_text().splitlines(keepends=True)[0])
    (folder / RESULT).unlink()
    shutil.rmtree(folder / "model")
    return folder


class Meets(Noting):
    """Tries the same run a second time when it hears of the first decision: in this thread, or in another."""

    def __init__(self, again, *, elsewhere: bool) -> None:
        super().__init__()
        self._again, self._elsewhere = again, elsewhere
        self.refused: list[str] = []

    def say(self, line):
        super().say(line)
        if not self.refused and "filters 0" in line:
            if self._elsewhere:
                thread = threading.Thread(target=self._try)
                thread.start()
                thread.join()
            else:
                self._try()

    def _try(self):
        try:
            self._again()
        except RunFolderError as error:
            self.refused.append(str(error))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_second_of_two_that_go_on_is_refused(stopped_run, tmp_path, elsewhere):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    meets = Meets(lambda: compress(NET, task(), config(**QUICK), run_dir=folder, resume=True), elsewhere=elsewhere)
    compress(NET, task(), config(**QUICK), run_dir=folder, resume=True, progress=meets)
    assert len(meets.refused) == 1 and f"{folder} is in use by process " in meets.refused[0]
    assert [step["index"] for step in read_steps(folder)] == list(range(len(read_steps(folder))))
    assert len(read_run(folder).steps) > 1
    assert not any((folder / name).exists() for name in (LOCK, HOLDER))


def test_a_new_run_is_refused_where_one_is_being_prepared(tmp_path):
    folder = tmp_path / "run"
    holder = RunFolder(folder)
    holder.claim()
    heard = Noting()
    with pytest.raises(RunFolderError, match=r"run is in use by process \d+ on "):
        compress(NET, task(), config(**QUICK), run_dir=folder, progress=heard)
    assert not heard.phases and not heard.lines
    result = compress(NET, task(), config(**QUICK), run_dir=holder)  # the one who claimed it may hand it on
    assert read_run(folder).reached.metric == result.metric
    assert (folder / LOCK).exists()  # and still holds it
    holder.release()


def test_a_mistake_before_any_work_leaves_no_folder(tmp_path):
    for resume in (False, True):
        with pytest.raises(TaskError):
            compress(NET, task(train=[]), config(**QUICK), run_dir=tmp_path / "deep" / "run", resume=resume)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), RunFolderError("cannot write it: the disk is full")])
def test_a_profile_that_fails_after_the_last_decision_is_said(tmp_path, monkeypatch, error):
    keep = RunFolder.keep

    def full(folder, name, data):
        if name == AFTER:
            raise error
        keep(folder, name, data)

    monkeypatch.setattr(RunFolder, "keep", full)
    heard = Noting()
    result = compress(NET, task(), config(**QUICK), run_dir=tmp_path / "run", progress=heard)
    said = [line for line in heard.lines if line.startswith("The divergence of the result could not be measured")]
    assert len(said) == 1 and str(error) in said[0]
    run = read_run(tmp_path / "run")
    assert run.after is None and run.reached is not None and run.reached.metric == result.metric


def test_where_several_work_only_what_all_hear_of_is_spared(monkeypatch):
    assert folders.tolerable_errors() == (Exception,)
    monkeypatch.setattr(folders, "process_count", lambda: 2)
    assert RuntimeError not in folders.tolerable_errors()


def test_an_end_that_is_broken_is_named_with_the_way_out(stopped_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    (folder / RESULT).write_text(json.dumps({"reached": True}))
    with pytest.raises(RunFolderError, match=r"result\.json is not what this version .*Delete it to have it measured"):
        compress(NET, task(), config(**QUICK), run_dir=folder, resume=True)
    (folder / RESULT).unlink()
    compress(NET, task(), config(**QUICK), run_dir=folder, resume=True)
    assert read_run(folder).reached is not None
