"""Code that a run folder from elsewhere names runs only if the user agrees."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file

from idap.cli import subject
from idap.cli.failure import Outcome
from idap.errors import TrustError
from tests.cli.commands.test_commands import compress, idap, plain_terminal, script, text  # noqa: F401 - fixtures
from tests.cli.test_terminal import on_a_terminal, strip_codes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def run(script):  # noqa: F811
    assert compress(script, "--run-dir", "run", "--quiet").exit_code == 0
    return Path("run")


COMMANDS = {
    "resume": ["resume", "RUN", "--quiet"],
    "evaluate": ["evaluate", "RUN", "--quiet"],
    "export": ["export", "RUN", "--to", "safetensors", "--out", "net.safetensors", "--quiet"],
    "bench": ["bench", "RUN", "--repeats", "2", "--quiet"],
}


def call(name, folder, *more):
    return idap(*[str(folder) if word == "RUN" else word for word in COMMANDS[name]], *more)


def booby_trap(folder):
    """Code that leaves a mark as soon as it is imported, where the recipe of the run says its code is."""
    settings = json.loads((folder / "run.json").read_text())
    mark = Path("mark").absolute()
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nbuild_model = task = 3\n")
    for section in ("model", "task"):
        name = settings["recipe"][section]["build"].rpartition(":")[2]
        settings["recipe"][section]["build"] = f"python:{folder.absolute()}/evil.py:{name}"
    (folder / "run.json").write_text(json.dumps(settings))
    return mark


def test_a_run_that_was_made_here_asks_nothing(run):
    for name in COMMANDS:
        done = call(name, run)
        assert done.exit_code == 0, (name, done.output)
        assert "trust" not in done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_from_elsewhere_is_refused_without_a_terminal(name, run):
    shutil.copytree(run, "theirs")
    mark = booby_trap(Path("theirs"))
    done = call(name, "theirs")
    assert done.exit_code == 2
    said = text(done.stderr).replace(" ", "")
    for part in (
        "theirs was not made here, as far as idap can tell: it was made in",
        "Its recipe names code, which would run with your rights:",
        f"model.build: build_model in {Path('theirs/evil.py').absolute()}",
        f"task.build: task in {Path('theirs/evil.py').absolute()}",
        "Read that code. If you trust it, run the same command with --trust.",
    ):
        assert part.replace(" ", "") in said
    assert not mark.exists()
    call(name, "theirs", "--trust")
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_that_somebody_changed_is_refused(name, run):
    mark = booby_trap(run)
    done = call(name, run, "--json")
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "TrustError" and "its seal does not fit" in error["message"]
    assert not mark.exists()


def test_trust_says_what_runs(run):
    run.rename("moved")
    done = idap("evaluate", "moved", "--trust")
    assert done.exit_code == 0
    assert "model.build: build_model in" in text(done.stderr) and "(--trust)" in done.stderr
    assert idap("evaluate", "moved", "--trust", "--quiet").stderr == ""


def test_code_that_is_not_there_is_said_to_be_missing(run):
    run.rename("moved")
    Path("mine.py").unlink()
    assert "(this file does not exist now)" in text(idap("evaluate", "moved").stderr)


def test_what_the_user_says_instead_is_the_users_own(run):
    shutil.copytree(run, "theirs")
    mark = booby_trap(Path("theirs"))
    own = ["--model", "python:mine.py:build_model", "--task", "python:mine.py:task"]
    for name in ("evaluate", "export", "bench"):
        assert call(name, "theirs", *own).exit_code == 0
    done = idap("evaluate", "theirs", *own[:2])  # the task is still that of the run
    assert done.exit_code == 2 and "task.build" in done.stderr and "model.build" not in done.stderr
    assert not mark.exists()


def test_a_run_that_names_no_code_is_nobodys_code(run):
    settings = json.loads((run / "run.json").read_text())
    settings["recipe"] = {"model": {"build": "idap:digits_vit"}, "data": {"name": "digits"}}
    (run / "run.json").write_text(json.dumps(settings))
    run.rename("moved")
    # It goes on to the model, which is another one.
    assert "PlanError" in idap("export", "moved", "--out", "x.onnx", "--json").stdout


def test_modules_are_looked_for_in_the_working_folder(run, tmp_path, monkeypatch):
    settings = json.loads((run / "run.json").read_text())
    assert settings["environment"]["folder"] == str(tmp_path)
    from idap.ownership import seal_place

    for section, name in (("model", "build_model"), ("task", "task")):
        settings["recipe"][section]["build"] = f"python:mine:{name}"
    settings["environment"] |= seal_place(run, settings["recipe"])[0]
    (run / "run.json").write_text(json.dumps(settings))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    try:
        assert idap("evaluate", "run", "--quiet").exit_code == 0
        monkeypatch.chdir(tmp_path / "run")
        done = idap("evaluate", str(tmp_path / "run"), "--quiet")
        assert "it was begun in the working folder" in text(done.stderr)
        assert "model.build: build_model in module mine" in text(done.stderr)
    finally:
        sys.modules.pop("mine", None)


def test_a_run_whose_key_is_gone_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "none"))
    assert "can't be told: there is no key" in text(idap("evaluate", "run").stderr)


def test_a_run_that_begins_without_a_key_says_what_follows(script, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    done = compress(script, "--run-dir", "run")
    assert done.exit_code == 0
    assert "Commands will ask before they run code that the recipe of this run names, since the key" in text(
        done.output
    )


@pytest.mark.filterwarnings("default")
def test_files_without_checksums_are_said_in_a_line(run):
    weights = run / "model" / "model.safetensors"
    save_file(load_file(weights), weights)
    done = idap("evaluate", "run")
    assert done.exit_code == 0
    assert "Warning: run/model/model.safetensors was written without checksums" in text(done.stderr)
    assert "checkpoint.py" not in done.stderr
    assert idap("evaluate", "run", "--quiet").stderr == ""


@pytest.mark.parametrize(("answer", "runs"), [("y", True), ("", False), ("n", False)])
def test_on_a_terminal_it_asks(answer, runs, run, monkeypatch, tmp_path):
    run.rename("moved")
    asked = []

    def confirm(question, **settings):
        asked.append((question, settings["default"]))
        return answer == "y"

    monkeypatch.setattr(subject, "_can_ask", lambda _: True)
    monkeypatch.setattr(typer, "confirm", confirm)
    done = idap("evaluate", "moved", "--quiet")
    assert asked == [("Run it?", False)]
    assert done.exit_code == (0 if runs else 2)
    if not runs:
        assert "was not run, since you declined" in text(done.stderr)


@pytest.mark.slow
def test_a_real_terminal(run):
    run.rename("moved")
    shown, code = on_a_terminal("evaluate", "moved", PYTHONPATH=":".join(sys.path), answers=b"n\n")
    assert code == 2
    assert "Run it? [y/N]" in strip_codes(shown) and "was not run, since you declined" in text(strip_codes(shown))


def test_nobody_is_asked_who_cannot_answer(monkeypatch):
    class Input:
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Input())
    settings = {"command": "idap resume", "where": "run"}
    for outcome, count, can in (
        (Outcome(**settings), "1", True),
        (Outcome(**settings, as_json=True), "1", False),
        (Outcome(**settings), "2", False),
    ):
        monkeypatch.setattr(type(outcome.errors), "is_terminal", True)
        monkeypatch.setenv("WORLD_SIZE", count)
        assert subject._can_ask(outcome) is can


@pytest.mark.parametrize("text_of_a_stranger", ["\x1b[2J\x1b[H", "\r", "\n\nAll is well.\n"])
def test_a_stranger_cannot_hide_the_question(text_of_a_stranger, tmp_path):
    from idap.recipes.runs import foreign_code

    recipe = {
        "model": {"build": f"python:/tmp/{text_of_a_stranger}.py:build{text_of_a_stranger}"},
        "data": {"name": "digits"},
    }
    facts = dict.fromkeys(("user", "host", "run_dir", "folder"), text_of_a_stranger)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "environment": facts}))
    found = str(foreign_code(tmp_path, {}))
    assert not set(found) & set("\x1b\r") and found.count("\n") == 1
    with pytest.raises(TrustError):
        subject.check_code(Outcome(command="x", where="y"), tmp_path, {}, trust=False)
