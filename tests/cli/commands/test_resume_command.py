"""`idap resume`: what it refuses; that it comes to the same result is in test_commands.py."""

import json
from pathlib import Path

import pytest

from tests.cli.commands.test_commands import compress, idap, plain_terminal, script, text  # noqa: F401 - fixtures


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "run holds no run (run.json), so there is nothing to go on with"),
        ("{}", "was begun from Python and has no recipe; go on there: idap.compress(model, task, config,"),
        ("{", "run.json can't be read"),
        ('{"recipe": {"model": {"build": "idap:digits_vit"}}}', "there is no task"),
    ],
)
def test_nothing_to_go_on_with(content, expected):
    Path("run").mkdir()
    if content is not None:
        Path("run/run.json").write_text(content)
    result = idap("resume", "run")
    assert result.exit_code == 2
    assert expected in text(result.stderr) and "idap resume --help" in text(result.stderr)


def test_a_run_that_is_finished_shows_its_result_again(script, tmp_path, monkeypatch):  # noqa: F811
    first = compress(script, "--run-dir", "here", "--json", "--quiet")
    assert first.exit_code == 0, first.stdout
    monkeypatch.chdir(tmp_path.parent)  # the recipe's paths hold elsewhere too
    again = idap("resume", str(tmp_path / "here"), "--json", "--quiet")
    assert again.exit_code == 0, again.stdout
    before, after = json.loads(first.stdout), json.loads(again.stdout)
    for name in ("reached", "message", "macs", "parameters", "val", "test", "steps"):
        assert before[name] == after[name]


def test_a_goal_that_is_missed(script):  # noqa: F811
    words = ("--set", "filters.steps=1", "--set", "filters.first_share=0.1", "--run-dir", "here", "--quiet")
    assert compress(script, *words).exit_code == 1
    assert idap("resume", "here", "--quiet").exit_code == 1
