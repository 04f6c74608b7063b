"""What docs/report.md promises: its Python runs, its commands are there, its picture is small."""

import re
from pathlib import Path

from typer.testing import CliRunner

from idap.cli.main import app
from tests.report.runs import write_run

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "report.md").read_text(encoding="utf-8")


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    write_run(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "report.md", "exec"), {})
    assert capsys.readouterr().out.startswith("0.48 {'stem': 16, ")
    assert Path("digits.html").stat().st_size > 10_000


def test_the_options_are_there():
    for command in ("report", "compare"):
        said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        for line in re.findall(rf"idap {command} [^#\n]*", GUIDE):
            for option in re.findall(r"--\w+", line):
                assert option in said, line


def test_the_picture_is_there_and_small():
    for name in re.findall(r"\]\((img/[^)]+)\)", GUIDE):
        assert 10_000 < (DOCS / name).stat().st_size < 200_000
