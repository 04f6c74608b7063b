"""Properties of every command: help with examples, the common options, and the same exit codes."""

import importlib
import json
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from idap.cli import main
from idap.cli.lazy import Lazy, examples_of
from idap.errors import RunFolderError
from tests.cli.commands.test_commands import plain_terminal, text  # noqa: F401 - a fixture

COMMANDS = {each.name: each for each in main.COMMANDS}
GROUPS = {"recipe": ("new", "list", "show")}  # commands that have commands of their own
GROUP = typer.main.get_command(main.app)
CALLS = {  # a call of each command, and what it calls when it works
    "demo": ([], "idap.cli.demo:run_demo"),
    "inspect": (["idap:digits_vit"], "idap.models.resolve:build_model"),
    "compress": (["r.toml"], "idap.recipes.recipe:read_recipe"),
    "resume": (["run"], "idap.recipes.runs:settings_of_run"),
    "evaluate": (["run"], "idap.recipes.runs:model_folder"),
    "bench": (["run"], "idap.recipes.runs:model_folder"),
    "export": (["run", "--out", "a.onnx"], "idap.recipes.runs:model_folder"),
    "apply": (["plan.json", "--checkpoint", "big", "--out", "small"], "idap.saving.stream:apply_to_checkpoint"),
    "report": (["run"], "idap.report.reading:read_run"),
    "compare": (["run", "run"], "idap.report.reading:read_run"),
    "list": (["models"], "idap.recipes.catalogue:find_entries"),
    "completion": (["bash"], "idap.cli.commands.completion:script"),
    "recipe new": (["--data", "digits"], "idap.recipes.new:compose_recipe"),
    "recipe list": ([], "idap.cli.commands.recipe:shipped_recipes"),
    "recipe show": (["digits_resnet"], "idap.cli.commands.recipe:shipped_recipes"),
}
LEAVES = [f"{name} {inner}".strip() for name in COMMANDS for inner in GROUPS.get(name, ("",))]
SHOWN = pytest.mark.parametrize("name", LEAVES)
PLAIN = {"completion", "recipe new", "recipe list", "recipe show"}
"""Commands that say so little that neither less nor more can be asked for."""


def idap(*words):
    return CliRunner().invoke(main.app, list(words), prog_name="idap")


def module_of(name: str):
    return importlib.import_module(COMMANDS[name.split(maxsplit=1)[0]].place.partition(":")[0])


def load_command(name: str):
    """The command that runs, also one of a group."""
    first, _, inner = name.partition(" ")
    command = COMMANDS[first].load()
    return command.commands[inner] if inner else command


@pytest.fixture
def fail_in(monkeypatch, tmp_path):
    """A call of a command that ends with an error in the middle of its work."""
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")

    def call(name, error, *words):
        def fail(*args, **kwargs):
            raise error

        arguments, target = CALLS[name]
        place, _, attribute = target.partition(":")
        monkeypatch.setattr(importlib.import_module(place), attribute, fail)
        return idap(*name.split(), *arguments, *words)

    return call


def test_groups_are_known():
    found = {name: tuple(each.load().commands) for name, each in COMMANDS.items() if hasattr(each.load(), "commands")}
    assert found == GROUPS
    assert all(COMMANDS[name].about in text(idap("--help").stdout) for name in GROUPS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in GROUPS])
def test_the_list_says_what_the_command_says(name):
    assert COMMANDS[name].load().help.partition("\n")[0].replace("\\[", "[") == COMMANDS[name].about
    assert COMMANDS[name].about in text(idap("--help").stdout)


@SHOWN
def test_every_example_of_the_help_is_a_command_line(name):
    words = name.split()
    examples = [line for line in examples_of(module_of(name)) if shlex.split(line)[1 : 1 + len(words)] == words]
    shown = text(idap(*words, "--help").stdout)
    assert examples
    for example in examples:
        assert example in shown
        rest = shlex.split(example)[1 + len(words) :]
        assert shlex.split(example)[0] == "idap"
        with typer.Context(GROUP, info_name="idap") as context:
            load_command(name).make_context(
                words[-1], rest, parent=context
            )  # an unknown option or a wrong value raises


def test_an_example_with_an_unknown_option_would_be_seen():
    with pytest.raises(Exception, match="No such option") as caught, typer.Context(GROUP, info_name="idap") as context:
        COMMANDS["list"].load().make_context("list", ["--jsn"], parent=context)
    assert caught.value.exit_code == 2


@SHOWN
def test_all_have_the_same_switches(name):
    options = {option for parameter in load_command(name).params for option in parameter.opts}
    expected = {"--json", "--debug"} | ({"--quiet", "-q", "--verbose", "-v"} if name not in PLAIN else set())
    assert expected <= options


@SHOWN
def test_every_command_is_tried_here(name):
    assert name in CALLS, f"say in CALLS how {name} is called"


@SHOWN
def test_an_error_of_the_user(name, fail_in):
    result = fail_in(name, RunFolderError("the run is gone; bring it back."))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the run is gone; bring it back. in " in text(result.stderr)
    assert f"help idap {name} --help" in text(result.stderr)
    assert "Traceback" not in result.stderr
    assert "Traceback" in fail_in(name, RunFolderError("gone"), "--debug").stderr


@SHOWN
def test_an_error_for_machines(name, fail_in):
    result = fail_in(name, RunFolderError("the run is gone"), "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    assert json.loads(result.stdout)["error"]["kind"] == "RunFolderError"
    assert json.loads(result.stdout)["error"]["message"] == "the run is gone"


@SHOWN
@pytest.mark.parametrize("error", [KeyError("boo"), SystemExit(0)], ids=["KeyError", "SystemExit"])
def test_what_nobody_expected(name, fail_in, error):
    result = fail_in(name, error)
    assert (result.exit_code, result.stdout) == (3, "")
    assert type(error).__name__ in result.stderr


@SHOWN
def test_interrupted(name, fail_in):
    result = fail_in(name, KeyboardInterrupt())
    assert (result.exit_code, result.stdout) == (130, "")
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("\nStopped. ")
    found = json.loads(fail_in(name, KeyboardInterrupt(), "--json").stdout)
    assert found["error"]["kind"] == "KeyboardInterrupt" and found["error"]["message"].startswith("Stopped. ")


@SHOWN
def test_the_traceback_by_environment(name, fail_in, monkeypatch):
    monkeypatch.setenv("IDAP_DEBUG", "1")
    assert "Traceback" in fail_in(name, RunFolderError("gone")).stderr


@SHOWN
def test_words_that_are_wrong(name):
    result = idap(*name.split(), "--jsonn")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such option: --jsonn" in text(result.stderr)
    assert f"in idap {name} --jsonn help idap {name} --help" in text(result.stderr)
    result = idap(*name.split(), "--jsonn", "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    assert json.loads(result.stdout)["error"]["kind"] == "UsageError"


def test_no_command_at_all():
    result = idap()
    assert result.exit_code == 2
    assert "Begin with idap demo" in text(result.output)
    assert json.loads(idap("lst", "--json").stdout)["error"]["where"] == "idap lst --json"


def test_quiet_and_verbose_contradict_each_other():
    result = idap("list", "-q", "-v")
    assert result.exit_code == 2 and "--quiet and --verbose contradict each other" in text(result.stderr)


def test_interrupted_before_the_command_is_there(monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Lazy, "load", stop)
    result = idap("list")
    assert (result.exit_code, result.stderr) == (130, "\nStopped. Nothing was written.\n")


def test_the_exit_codes_are_told():
    shown = text(idap("--help").stdout)
    for code, meaning in main.EXIT_CODES.items():
        assert f"{code} {meaning}" in shown
