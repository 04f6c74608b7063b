"""Completion as a shell asks for it, names with a colon included."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from idap.cli import completions
from idap.cli.commands.completion import SHELLS, script
from tests.cli.commands.test_commands import idap, plain_terminal, text  # noqa: F401 - a fixture

BASH = shutil.which("bash")
ASK = """
eval "$(idap completion bash)"
compopt() { :; }
while read -r line; do
    COMP_LINE=${line%|}; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    _idap_completion idap
    echo "${COMPREPLY[*]}" | tr '\\n' ' '; echo
done
"""


@pytest.fixture
def shell(tmp_path):
    """Ask bash what it would complete; a command named idap is on its path."""
    command = tmp_path / "bin/idap"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m idap "$@"\n')
    command.chmod(0o755)

    def ask(*lines):
        path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
        asked = "".join(f"{line}|\n" for line in lines)
        done = subprocess.run(
            [BASH, "--norc", "-c", ASK],
            input=asked,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": path},
            check=False,
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    return ask


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash(shell):
    Path("net.py").write_text("def build(): ...\nclass Net: ...\nother = 1\n")
    Path("mine.toml").touch()
    asked = {
        "idap ev": ["evaluate"],
        "idap inspect idap:digits_v": ["digits_vit"],  # bash has taken `idap:` as a word of its own
        "idap inspect tor": ["torchvision:"],
        "idap inspect mi": ["mine.toml"],
        "idap compress --model python:ne": ["net.py:"],
        "idap compress --model python:net.py:": ["build", "Net"],
        "idap inspect x --criterion tay": ["taylor"],
        "idap list ": ["models", "data", "criteria", "recipes"],
        "idap evaluate run --split ": ["val", "test"],
        "idap evaluate ru": [],  # left to the shell, which completes files
    }
    assert dict(zip(asked, shell(*asked), strict=True)) == asked


@pytest.mark.parametrize(
    ("which", "environment", "expected"),
    [
        ("zsh", {"_TYPER_COMPLETE_ARGS": "idap inspect idap:digits_v"}, '"idap\\\\:digits_vit"'),
        (
            "fish",
            {"_TYPER_COMPLETE_ARGS": "idap inspect idap:digits_v", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
            "idap:digits_vit\ta vision transformer",
        ),
    ],
)
def test_other_shells(which, environment, expected):
    asked = os.environ | environment | {"_IDAP_COMPLETE": f"complete_{which}"}
    done = subprocess.run([sys.executable, "-m", "idap"], env=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize("name", SHELLS)
def test_the_scripts(name, monkeypatch):
    assert idap("completion", name).stdout.strip() == script(name).strip()
    assert "_IDAP_COMPLETE" in script(name)
    assert json.loads(idap("completion", name, "--json").stdout) == {"shell": name, "script": script(name)}
    monkeypatch.setenv("SHELL", f"/usr/bin/{name}")
    assert idap("completion").stdout.strip() == script(name).strip()


@pytest.mark.parametrize(("words", "found"), [(["csh"], "'csh'"), ([], "'no shell'")])
def test_a_shell_that_is_not_known(words, found, monkeypatch):
    monkeypatch.delenv("SHELL", raising=False)
    result = idap("completion", *words)
    assert result.exit_code == 2
    assert f"there is no completion script for {found}; name one of bash, zsh, fish." in text(result.stderr)


def test_files_and_folders():
    Path("sub/deeper").mkdir(parents=True)
    for name in ("sub/a.toml", "sub/b.py", "sub/.hidden.toml", "c.toml"):
        Path(name).write_text("def f(:\n")
    assert [path for path, _ in completions.files("", ".toml")] == ["c.toml", "sub/"]
    assert [path for path, _ in completions.files("sub/", ".toml")] == ["sub/a.toml", "sub/deeper/"]
    assert completions.files("nowhere/x", ".toml") == []
    assert [path for path, _ in completions.models("python:sub/")] == ["python:sub/b.py:", "python:sub/deeper/"]
    assert completions.models("python:sub/b.py:") == []  # half-written
    assert completions.models("python:sub/none.py:") == []
    assert completions.models("nothing:x") == []
    assert completions.scripts("") == [("python:", completions.models("python")[0][1])]
