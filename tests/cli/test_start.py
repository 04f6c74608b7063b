"""The command starts fast: what is slow to import is imported when a command runs, not to show help or names."""

import subprocess
import sys

import pytest

from idap.cli.main import COMMANDS

HEAVY = {"torch", "numpy", "torchmetrics", "safetensors", "accelerate", "scipy", "timm", "torchvision"}
CODE = """
import json, sys
from idap.cli.main import app
for words in {calls!r}:
    try:
        app(words, prog_name="idap")
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
heavy = {heavy!r} & set(sys.modules)
assert not heavy, heavy
commands = {{name for name in sys.modules if name.startswith("idap.")}}
print(json.dumps(sorted(commands)), file=sys.stderr)
"""


def run(*calls, heavy=HEAVY):
    code = CODE.format(calls=list(calls), heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    return done.stderr


def test_help_imports_no_command():
    modules = run(["--help"], heavy=HEAVY | {"pydantic"})
    for command in COMMANDS:
        assert command.place.partition(":")[0] not in modules


@pytest.mark.parametrize(
    "calls",
    # Recent versions of typer use pydantic for the arguments of a command; nothing here can help that.
    [
        [["--version"]],
        [[command.name, "--help"] for command in COMMANDS],
        [["list"], ["list", "models", "--json"], ["completion", "bash"]],
    ],
    ids=["version", "help of every command", "names"],
)
def test_nothing_heavy(calls):
    run(*calls)


def test_metrics_of_torchmetrics_are_imported_by_those_who_use_them():
    code = "import sys, idap\nidap.Task, idap.evaluate, idap.compress\nassert 'torchmetrics' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "idap", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage: idap" in done.stdout
