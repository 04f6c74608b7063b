"""One folder, one process: the lock ends with its process, whatever ends it, and leaves nothing that is in the way."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from idap.errors import RunFolderError
from idap.ownership import HOLDER, LOCK, Claim, InUseError
from idap.record import RunFolder

ROOT = Path(__file__).parents[1]
HOLDS = """
import sys, time
from pathlib import Path
from idap.record import RunFolder
folder = RunFolder(sys.argv[1])
folder.claim()
print("held", flush=True)
time.sleep(60)
"""
TAKES = """
import sys
from pathlib import Path
from idap.record import RunFolder
sys.stdin.readline()
folder = RunFolder.claim_free(Path(sys.argv[1]))
print(folder.path.name, flush=True)
sys.stdin.readline()
folder.release()
"""


def start(code, *words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_second_claim_is_refused_and_says_who_holds_the_first(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert first.claim() and not first.claim()
    with pytest.raises(RunFolderError, match=rf"run is in use by process {os.getpid()} on .* since 20.*: only one"):
        second.claim()
    (tmp_path / "run" / HOLDER).write_text("half")
    with pytest.raises(RunFolderError, match="run is in use by another process: only one process may work on a run"):
        second.claim()
    first.release()
    assert second.claim()
    second.release()
    second.release()


def test_another_thread_is_refused(tmp_path):
    found = []

    def other():
        try:
            Claim(tmp_path).acquire()
        except InUseError as error:
            found.append(str(error))

    claim = Claim(tmp_path)
    claim.acquire()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(found) == 1
    claim.release()


def test_what_was_made_and_is_empty_goes_again(tmp_path):
    claim = Claim(tmp_path / "deep" / "run")
    claim.acquire()
    assert sorted(each.name for each in (tmp_path / "deep" / "run").iterdir()) == [HOLDER, LOCK]
    claim.release()
    assert list(tmp_path.iterdir()) == []
    claim.acquire()
    (tmp_path / "deep" / "run" / "file").touch()
    claim.release()
    assert [each.name for each in (tmp_path / "deep" / "run").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    claim = Claim(tmp_path / "empty")
    claim.acquire()
    claim.release()
    assert (tmp_path / "empty").is_dir()  # somebody else made it


def test_a_killed_process_holds_nothing_and_leaves_a_folder_that_is_welcome(tmp_path):
    process = start(HOLDS, str(tmp_path / "run"))
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match=rf"in use by process {process.pid} on "):
        RunFolder(tmp_path / "run").claim()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "run" / LOCK).exists()
    folder = RunFolder(tmp_path / "run")
    folder.check()
    folder.claim()
    folder.open({"seed": 1})
    folder.release()
    assert sorted(each.name for each in (tmp_path / "run").iterdir()) == ["checkpoints", "run.json"]


def test_processes_that_start_at_once_get_folders_of_their_own(tmp_path):
    (tmp_path / "runs").mkdir()
    processes = [start(TAKES, str(tmp_path / "runs" / "net")) for _ in range(4)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    names = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.communicate("\n")
    assert names == ["net", "net-2", "net-3", "net-4"]
    assert not any((tmp_path / "runs").iterdir())  # they wrote nothing


def test_free_folders_pass_over_what_is_there(tmp_path):
    (tmp_path / "net").touch()
    (tmp_path / "net-2").symlink_to(tmp_path / "nowhere")
    (tmp_path / "net-3").mkdir()
    assert RunFolder.claim_free(tmp_path / "net").path == tmp_path / "net-4"
    with pytest.raises(RunFolderError, match=r"net.* (is not a folder|can't be written), so no run can be kept in it"):
        RunFolder.claim_free(tmp_path / "net" / "run")
    with pytest.raises(RunFolderError, match=r"net-2 is not a folder, so no run can be kept in it"):
        RunFolder.claim_free(tmp_path / "net-2" / "run")


def test_what_can_not_be_written_is_refused(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"run can't be written, so no run can be kept in it: .*No space left"):
        RunFolder(tmp_path / "run").claim()
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(RunFolderError, match=r"link is a link to .*nowhere, which does not exist; make that"):
            RunFolder(path).check()
        with pytest.raises(RunFolderError, match="can't be written, so no run can be kept in it"):
            RunFolder(path).claim()
    assert [each.name for each in tmp_path.iterdir()] == ["link"]


def test_the_holder_is_noted(tmp_path):
    claim = Claim(tmp_path)
    claim.acquire()
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    claim.release()
