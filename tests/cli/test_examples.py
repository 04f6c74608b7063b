"""The examples run."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idap.cli.main import app

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_model_and_a_task_of_ones_own(tmp_path):
    script = f"python:{EXAMPLES / 'own_model.py'}"
    words = [
        *("compress", "--model", f"{script}:build_model", "--task", f"{script}:task", "--max-drop", "5%"),
        *("--macs", "80%", "--set", "recovery.epochs=0.5", "--run-dir", str(tmp_path / "run"), "--json", "--quiet"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["val"]["before"] > 0.9
    assert found["macs"]["after"] <= 0.8 * found["macs"]["before"]


def test_a_task_that_is_no_classification(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    result = import_module("custom_task").main(epochs=4.0)
    assert result.metric <= result.baseline + 0.05


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_recovery_by_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lightning", reason="lightning is not installed, and make leaves it out; it is large")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    result = import_module("lightning_recovery").main(epochs=1)
    assert result.macs[1] <= result.macs[0] / 2
    assert (tmp_path / "small-lightning" / "plan.json").exists()
