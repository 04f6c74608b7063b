"""`idap report` and `idap compare`: files, texts, JSON, and errors that say what to do."""

import json
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest

from idap.report import printing
from tests.cli.commands.test_commands import compress, idap, plain_terminal, script, text  # noqa: F401 - fixtures
from tests.report.runs import settings, steps, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "net")


def test_a_page_is_written_into_the_run(run):
    result = idap("report", "net")
    assert result.exit_code == 0, result.stderr
    assert text(result.stdout) == "Every goal was reached. The report is in net/report.html. "
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_page_elsewhere_is_opened(run, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert idap("report", "net", "--out", "deep/page.html", "--open", "--quiet").stdout == ""
    assert opened == [Path("deep/page.html").resolve().as_uri()]
    assert not (run / "report.html").exists()


def test_a_report_for_machines(run):
    found = json.loads(idap("report", "net", "--json").stdout)
    assert (found["state"], found["message"], found["files"]) == (
        "reached",
        "Every goal was reached.",
        ["net/report.html"],
    )
    assert found["widths"]["blocks.0.fc"] == [20, 9]
    assert found["removed"] == {"blocks.1": "removed"}
    assert [goal["state"] for goal in found["goals"]] == ["good", "good"]
    assert {number["name"] for number in found["numbers"]} >= {"multiply-adds", "accuracy (test)"}


def test_a_run_under_way(tmp_path):
    write_run(tmp_path / "net", finished=False, decided=steps()[:1])
    assert "The run is under way or was stopped: 1 decision so far, 1 kept." in text(idap("report", "net").stdout)


def test_printing_without_a_browser_is_an_error_but_the_page_is_there(run, monkeypatch):
    monkeypatch.setattr(printing.shutil, "which", lambda _: None)
    monkeypatch.setattr(printing, "PLACES", ())
    result = idap("report", "net", "--pdf", "net.pdf")
    assert result.exit_code == 2
    assert "Install Chromium, Chrome or Edge, or open the page in any browser" in text(result.stderr)
    assert (run / "report.html").exists() and not Path("net.pdf").exists()


def test_what_is_no_run(tmp_path):
    result = idap("report", "nowhere")
    assert result.exit_code == 2
    assert "nowhere does not exist. Name the folder that `idap compress` wrote" in text(result.stderr)
    error = json.loads(idap("report", "nowhere", "--json").stdout)["error"]
    assert (error["kind"], error["where"]) == ("RunFolderError", "nowhere")


def test_a_page_that_can_not_be_written(run):
    Path("file").write_text("text")
    result = idap("report", "net", "--out", "file/page.html")
    assert result.exit_code == 2
    assert "cannot write the page file/page.html: " in text(result.stderr)


def test_the_run_of_the_command_line_has_a_report(script):  # noqa: F811 - the fixture
    assert compress(script, "--run-dir", "run", "--quiet").exit_code == 0
    found = json.loads(idap("report", "run", "--json").stdout)
    assert {number["name"] for number in found["numbers"]} >= {"latency, batch of 16", "accuracy (test)"}
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "mine.py:build_model" in page


class TestCompare:
    def test_a_table_and_a_page(self, tmp_path):
        config = settings()["config"]
        write_run(tmp_path / "one")
        write_run(tmp_path / "two", config=config | {"macs": 0.4})
        result = idap("compare", "one", "two", "--html", "both.html")
        assert result.exit_code == 0, result.stderr
        said = text(result.stdout)
        assert "multiply-adds 960 k (−52.0 %) 960 k (−52.0 %)" in said.replace("\xa0", " ")
        assert "macs 0.5 0.4" in said and "Not comparable" not in said and "The page is both.html." in said
        assert Path("both.html").read_text(encoding="utf-8").startswith("<!doctype html>")

    def test_other_models_are_said_not_to_compare(self, tmp_path):
        write_run(tmp_path / "one")
        write_run(tmp_path / "two", model="other.Net", fingerprint="0")
        said = text(idap("compare", "one", "two").stdout)
        assert "Not comparable: one and two compress different models: mine.Net and other.Net." in said
        found = json.loads(idap("compare", "one", "two", "--json").stdout)
        assert not found["comparable"] and len(found["runs"]) == 2

    def test_one_run_is_none_to_compare(self, run):
        result = idap("compare", "net")
        assert result.exit_code == 2
        assert "a comparison needs 2 to 4 run folders, got 1." in text(result.stderr)


def test_a_report_does_not_wait_for_torch(run):
    code = "import sys; from idap.cli.main import app; app(['report', 'net', '-q'], standalone_mode=False); print('torch' in sys.modules)"  # noqa: E501 - one program
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
