"""What killed processes leave half-written is removed by the same command when it runs again; what is written stays."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from idap.deploy.export import export_weights
from idap.files import atomic_write, folder_beside, is_leftover, write_bytes
from idap.hugging_face.folder import _put
from idap.ownership import HOLDER, LOCK
from idap.record import RunFolder
from idap.saving.stream import MARKER, apply_to_checkpoint
from idap.structure.plan import Plan
from tests.cli.commands.test_commands import idap
from tests.report.runs import write_run

ROOT = Path(__file__).parents[1]
DIES = """
import os, signal, sys
from pathlib import Path
moves = {number}
def die(self, target):
    global moves
    moves -= 1
    if not moves:
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename(self, target)
Path.replace = Path.rename = die
"""


def run_until_killed(code, folder, number=1):
    """Run code in a process that is killed when it renames for the n-th time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", DIES.format(number=number) + code],
        cwd=folder, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def leftovers(folder):
    return [each.name for each in folder.iterdir() if is_leftover(each.name)]


def test_a_report(tmp_path, monkeypatch):
    write_run(tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    run_until_killed("from idap.cli.main import app; app(['report', 'net'])", tmp_path)
    assert len(leftovers(tmp_path / "net")) == 1 and not (tmp_path / "net" / "report.html").exists()
    assert idap("report", "net").exit_code == 0
    assert not leftovers(tmp_path / "net") and (tmp_path / "net" / "report.html").exists()


def test_an_export(tmp_path):
    code = "from torch import nn; from idap.deploy.export import export_weights; "
    run_until_killed(f"{code}export_weights(nn.Linear(2, 2), 'net.safetensors')", tmp_path)
    (left,) = leftovers(tmp_path)
    assert list((tmp_path / left).iterdir())
    export_weights(nn.Linear(2, 2), tmp_path / "net.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_of_transformers(tmp_path, number):
    """The first move takes the old folder aside, the second brings the new one."""
    _put(tmp_path / "net", lambda new: (new / "old").touch())
    code = "from pathlib import Path; from idap.hugging_face.folder import _put; "
    run_until_killed(f"{code}_put(Path('net'), lambda new: (new / 'new').touch())", tmp_path, number)
    assert len(leftovers(tmp_path)) == number
    _put(tmp_path / "net", lambda new: (new / "new").touch())
    assert [each.name for each in tmp_path.rglob("*")] == ["net", "new"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_plan_that_is_applied_to_files(tmp_path, number):
    save_file({"weight": torch.arange(8.0).reshape(4, 2)}, tmp_path / "big.safetensors")
    plan = Plan(tensors={"weight": {0: (0, 2)}}, shapes={"weight": (4, 2)})
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    code = (
        "import json; from idap.saving.stream import apply_to_checkpoint; from idap.structure.plan import Plan; "
        "plan = Plan.from_json(json.load(open('plan.json'))); apply_to_checkpoint(plan, 'big.safetensors', 'small')"
    )
    run_until_killed(code, tmp_path, number)
    assert (tmp_path / "small" / MARKER).exists() and leftovers(tmp_path / "small")
    apply_to_checkpoint(plan, tmp_path / "big.safetensors", tmp_path / "small")
    assert sorted(each.name for each in (tmp_path / "small").iterdir()) == ["model.safetensors", "plan.json"]


def test_nothing_lies_in_the_folder_before_its_marker(tmp_path):
    """A process that is killed while it makes the marker leaves a folder with its lock alone, which is welcome."""
    save_file({"weight": torch.zeros(4, 2)}, tmp_path / "big.safetensors")
    code = "from idap.saving import stream; from idap.structure.plan import Plan\n"
    code += "Path.touch = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "plan = Plan(tensors={'weight': {0: (0, 2)}}, shapes={'weight': (4, 2)})\n"
    run_until_killed(f"{code}stream.apply_to_checkpoint(plan, 'big.safetensors', 'small')", tmp_path)
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == [HOLDER, LOCK]
    plan = Plan(tensors={"weight": {0: (0, 2)}}, shapes={"weight": (4, 2)})
    apply_to_checkpoint(plan, tmp_path / "big.safetensors", tmp_path / "small")


def test_a_run_that_was_killed_while_it_wrote_its_settings_begins_with_the_same_call(tmp_path):
    code = "from idap.record import RunFolder; folder = RunFolder('run'); folder.claim(); folder.open({'seed': 1})"
    run_until_killed(code, tmp_path)
    assert len(list((tmp_path / "run").iterdir())) == 4  # lock, holder, checkpoints, unfinished settings
    folder = RunFolder(tmp_path / "run")
    folder.check()
    folder.claim()
    folder.open({"seed": 1})
    folder.release()
    assert sorted(each.name for each in (tmp_path / "run").iterdir()) == ["checkpoints", "run.json"]


def test_what_somebody_still_writes_is_left_alone(tmp_path):
    with atomic_write(tmp_path / "page") as file:
        file.write(b"slow")
        write_bytes(tmp_path / "page", b"fast")
        assert (tmp_path / "page").read_bytes() == b"fast"
    assert (tmp_path / "page").read_bytes() == b"slow"
    with folder_beside(tmp_path / "net") as folder:
        (folder / "file").touch()
        with folder_beside(tmp_path / "net") as other:
            assert other != folder
        assert (folder / "file").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["page"]


def test_files_of_others_with_such_names_stay(tmp_path):
    others = [f".page2.{'a' * 32}", f".page.{'a' * 31}", f"page.{'a' * 32}", f".page.{'g' * 32}"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / f".page.{'b' * 32}").symlink_to(tmp_path / others[0])
    (tmp_path / f".page.{'a' * 32}").touch()
    write_bytes(tmp_path / "page", b"x")
    assert {each.name for each in tmp_path.iterdir()} == {*others, f".page.{'b' * 32}", "page"}
