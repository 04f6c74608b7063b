"""The command line claims the folder of a run before it trains anything, and keeps the decisions."""

import errno
import importlib
import json
import shutil
from pathlib import Path

import pytest

from idap.cli.failure import message_of, printable, state_of
from idap.errors import RunFolderError, TaskError
from idap.record import MEASURED, ORIGINAL, RunFolder
from tests.cli.commands.test_commands import compress, idap, plain_terminal, script, text  # noqa: F401 - fixtures

TRAINS = (
    '[model]\nbuild="python:mine.py:build_model"\n[task]\nbuild="python:mine.py:task"\n[train]\nepochs=2\n'
    "[goals]\nmacs=0.6\n[layers]\nremovals=0\n[recovery]\nepochs=0\n"
)


@pytest.fixture
def training_recipe(script, tmp_path, monkeypatch):  # noqa: F811
    """A recipe that trains its original; the training fails the test if it is called."""
    (tmp_path / "mine.toml").write_text(TRAINS)
    importlib.import_module("idap.compress.change")  # keeps the function that it imports here, whatever runs first
    monkeypatch.setattr(importlib.import_module("idap.training.fit"), "fit", None)  # can't be called
    return "mine.toml"


def test_a_folder_that_is_in_use_keeps_its_original(training_recipe, tmp_path):
    holder = RunFolder(tmp_path / "run")
    holder.claim()
    holder.original.write_bytes(b"weights of the first")
    for words in (
        ("compress", training_recipe, "--run-dir", "run"),
        ("compress", training_recipe, "--run-dir", "run", "--resume"),
    ):
        result = idap(*words)
        assert result.exit_code == 2 and "run is in use by process" in text(result.stderr)
    sections = {"model": {"build": "python:mine.py:build_model"}, "task": {"build": "python:mine.py:task"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": sections}))
    result = idap("resume", "run", "--trust")
    assert result.exit_code == 2 and "run is in use by process" in text(result.stderr)
    assert (tmp_path / "run" / ORIGINAL).read_bytes() == b"weights of the first"
    holder.release()


@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_is_found_before_the_original_is_trained(training_recipe, tmp_path, monkeypatch, resume):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    result = idap("compress", training_recipe, "--run-dir", "run", *(["--resume"] if resume else []))
    assert result.exit_code == 2
    assert "has room for 1 kB, and the run needs about 1 kB" in text(result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_link_that_leads_nowhere_is_found_before_the_original_is_trained(training_recipe, tmp_path, resume):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    result = idap("compress", training_recipe, "--run-dir", "run", *(["--resume"] if resume else []))
    assert result.exit_code == 2
    assert "can't be written, so no run" in text(result.stderr) or "which does not exist" in text(result.stderr)


def test_a_folder_that_can_not_be_written_is_found_before_the_original_is_trained(
    training_recipe, tmp_path, monkeypatch
):
    def refuse(_descriptor):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("idap.ownership.os.fsync", refuse)
    result = idap("compress", training_recipe, "--run-dir", "run")
    assert result.exit_code == 2 and "Read-only file system" in text(result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [TaskError("the test data are broken"), RuntimeError("out of memory")])
def test_a_comparison_that_fails_leaves_the_result(script, tmp_path, monkeypatch, error):  # noqa: F811
    def fail(*_args, **_named):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module("idap.cli.commands.compress"), "compare", fail)
        result = compress(script, "--run-dir", "run")
    assert result.exit_code == 0, result.stderr
    assert f"run/measured.json, with the latency and the metric on the test data, was not written: {error}" in text(
        result.stdout
    )
    assert "accuracy (validation)" in result.stdout and "accuracy (test)" not in result.stdout
    assert not (tmp_path / "run" / MEASURED).exists()
    assert idap("report", "run").exit_code == 0
    again = idap("resume", "run", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["test"] is not None


def test_numbers_that_can_not_be_written_leave_the_result(script, monkeypatch):  # noqa: F811
    keep = RunFolder.keep

    def full(folder, name, data):
        if name == MEASURED:
            raise RunFolderError("cannot write measured.json: no space left")
        keep(folder, name, data)

    monkeypatch.setattr(RunFolder, "keep", full)
    result = compress(script, "--run-dir", "run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["test"] is not None
    assert "was not written: cannot write measured.json: no space left" in text(result.stderr)


def test_what_was_killed_before_it_began_begins_with_the_same_command(script, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    for name in (".idap-lock", ".idap-holder.json", f".original.safetensors.{'a' * 32}", f".run.json.{'b' * 32}"):
        (tmp_path / "run" / name).write_text("{")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert compress(script, "--run-dir", "run", "--quiet").exit_code == 0
    assert not [each for each in (tmp_path / "run").iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize(
    "content", ['{"turn": 1}', "[" * 100_000, '{"index": "\\ud800"}', "9" * 5000, "NaN", "\0", '{"accepted": null}']
)
def test_what_a_stopped_run_left_is_said_whatever_it_is(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    (tmp_path / "run/steps.jsonl").write_text(content + "\n")
    assert "The interruption came in the middle of writing: line 1 of" in state_of(Path("run"))
    (tmp_path / "run/steps.jsonl").unlink()
    (tmp_path / "run/steps.jsonl").mkdir()
    assert "steps.jsonl can't be read: it is not a file" in state_of(Path("run"))
    assert "can't be read" in state_of(Path("n" * 300))


class Odd(Exception):  # noqa: N818 - what user code may raise
    def __str__(self):
        raise ValueError("no text")


def test_every_error_can_be_shown(script, monkeypatch):  # noqa: F811
    assert message_of(Odd()) == "Odd: its message can't be read (ValueError)"
    assert message_of(RunFolderError("text")) == "text"
    assert printable("\ud800\x1b[2Jé\n") == "\\ud800\\x1b[2Jé\n"

    def fail(*_args, **_named):
        raise RunFolderError("bad \ud800 \x1b[31m name")

    monkeypatch.setattr(importlib.import_module("idap.compress.run"), "compress", fail)
    result = compress(script, "--run-dir", "run")
    assert result.exit_code == 2 and "bad \\ud800 \\x1b[31m name" in text(result.stderr)
    assert compress(script, "--run-dir", "run", "--debug").exit_code == 2
    shutil.rmtree("run", ignore_errors=True)
