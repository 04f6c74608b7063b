"""`idap apply` as a user types it."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from idap.cli.commands import apply as command
from idap.cli.main import app
from idap.errors import ConfigError
from idap.saving.checkpoint import load, save
from tests import nets
from tests.saving.test_checkpoint import cut
from tests.saving.test_stream import ORIGINALS, write_checkpoint


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    save("saved", *cut("mlp"))
    write_checkpoint(tmp_path / "original", ORIGINALS["mlp"])
    return tmp_path


def idap(*words: str):
    return CliRunner().invoke(app, ["apply", *words], prog_name="idap")


def text(*streams: str) -> str:
    return re.sub(r"[\s│╭╮╰╯─]+", " ", "".join(streams))


COMMAND = ("saved/plan.json", "--checkpoint", "original", "--out", "small")


def test_the_result_is_what_was_saved(folder: Path) -> None:
    done = idap(*COMMAND, "--max-shard-size", "1KB")
    assert done.exit_code == 0, done.stderr
    assert "The weights are in small (model.safetensors)." in text(done.stdout)
    small, _ = cut("mlp")
    for found, wanted in zip(load("small", nets.mlp()).parameters(), small.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_json(folder: Path) -> None:
    done = idap("saved", *COMMAND[1:], "--max-shard-size", "60", "--json")
    document = json.loads(done.stdout)
    assert document["folder"] == "small" and len(document["files"]) > 1
    assert document["size"]["after"] < document["size"]["before"]


def test_quiet(folder: Path) -> None:
    done = idap(*COMMAND, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_help_has_an_example_and_says_what_is_not_done() -> None:
    shown = text(idap("--help").stdout)
    assert "Example: idap apply" in shown and "nothing is renumbered" in shown


def test_an_error_is_one_panel(folder: Path) -> None:
    write_checkpoint(folder / "original", nets.VGG())
    done = idap(*COMMAND)
    assert done.exit_code == 2 and done.stdout == ""
    assert "A saved file is broken or does not belong to this model" in text(done.stderr)
    assert "which the plan does not know" in text(done.stderr) and "idap apply --help" in text(done.stderr)
    document = json.loads(idap(*COMMAND, "--json").stdout)
    assert document["error"]["kind"] == "CheckpointError"
    assert not (folder / "small").exists()


def test_a_stopped_command_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("idap.saving.stream.write_tensors", stop)
    done = idap(*COMMAND)
    assert done.exit_code == 130 and "small is not complete; run the same command again." in text(done.stderr)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert idap(*COMMAND).exit_code == 0


@pytest.mark.parametrize(
    ("size", "found"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("7", 7), ("1e3", 1000)]
)
def test_sizes(size: str, found: int) -> None:
    assert command._bytes(size) == found


@pytest.mark.parametrize("size", ["", "GB", "5XB", "-1", "0", "nan", "inf", "1GGB"])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-shard-size .* write 5GB, 500MB or a number of bytes"):
        command._bytes(size)
