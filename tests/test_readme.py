"""What README promises: its Python runs, and the terms and files it speaks of are there."""

import re
from pathlib import Path

import idap

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for long, short in (("epochs=8", "epochs=1"), ("epochs=3", "epochs=0.5"), ("max_drop=0.01", "max_drop=0.5")):
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), found)
    result = found["result"]
    assert isinstance(result, idap.Result)
    assert result.macs[1] <= result.macs[0] / 2
    assert {file.name for file in Path("small").iterdir()} == {"model.safetensors", "plan.json", "card.md"}
    assert "every goal was reached" in capsys.readouterr().out


def test_the_python_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "compress.md").read_text("utf-8"), flags=re.DOTALL)
    for long, short in (("epochs=8", "epochs=1"), ("epochs=2", "epochs=0.3"), ("max_drop=0.02", "max_drop=0.5")):
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(code, "compress.md", "exec"), found)
    result = found["result"]
    assert isinstance(result, idap.Result)
    assert result.reached
    assert result.size[1] <= 0.6 * result.size[0]
    assert "every goal was reached" in capsys.readouterr().out


def test_every_file_that_the_readme_names_is_there():
    links = re.findall(r"\]\(([^)]+)\)", README)
    paths = re.findall(r"`((?:src|recipes|docs)/[^`*]+)`", README)
    for name in [*links, *paths]:
        assert (ROOT / name).exists(), name


def test_every_command_of_the_readme_has_its_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
