"""`idap inspect --divergence`: a profile on the screen, as JSON, and in a file."""

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idap.cli.main import app
from idap.cli.views import GroupDivergence, PartDivergence, Profile, profile_tree
from tests.cli.commands.test_commands import SCRIPT, text

RECIPE = """
[model]
build = "idap:digits_resnet"
[data]
name = "digits"
[compress]
calibration_batches = 2
"""


def idap(*words):
    return CliRunner().invoke(app, list(words), prog_name="idap")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text(SCRIPT)


def test_a_recipe_by_the_criterion_that_is_named():
    result = idap("inspect", "r.toml", "--divergence", "--criterion", "paper", "--out", "kept/profile.json")
    assert result.exit_code == 0, result.output
    assert "divergence (paper), measured on 2 calibration batches" in result.stdout
    assert "branches and blocks, over depth" in result.stdout
    kept = json.loads(Path("kept/profile.json").read_text())
    printed = json.loads(idap("inspect", "r.toml", "--divergence", "--criterion", "paper", "--json").stdout)
    assert kept == printed
    assert kept["groups"]
    assert kept["parts"]
    assert all(group["units"] for group in kept["groups"])


def test_a_model_beside_a_task():
    result = idap("inspect", "python:mine.py:build_model", "--task", "python:mine.py:task", "--divergence")
    assert result.exit_code == 0, result.output
    assert "divergence (innovation)" in result.stdout


def test_divergence_needs_data():
    result = idap("inspect", "idap:digits_vit", "--divergence")
    assert result.exit_code == 2
    assert "divergence is measured on data: inspect a recipe, or name the data with --task." in text(result.stderr)


def test_an_unknown_criterion():
    result = idap("inspect", "r.toml", "--divergence", "--criterion", "best")
    assert result.exit_code == 2
    assert "there is no criterion 'best'" in text(result.stderr)


def test_bars_are_as_long_as_the_divergence():
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    groups = tuple(GroupDivergence(name=n, kind="channels", units=(u, u, u)) for n, u in (("a", 1.0), ("b", 0.5)))
    parts = (PartDivergence(name="blocks.0", kind="block", divergence=0.25, inside=0.1),)
    console.print(profile_tree(Profile(criterion="x", batches=1, groups=groups, parts=parts, unmeasured=("c",))))
    lines = console.export_text().splitlines()
    assert [line.count("█") for line in lines if " a " in line or " b " in line] == [20, 10]
    assert any(line.count("█") == 20 for line in lines if "blocks.0" in line)
    assert "c" in lines[-1]
