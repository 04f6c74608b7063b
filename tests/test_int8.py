"""The recipe of docs/int8.md runs as it stands there, and eight bits cost little accuracy."""

import importlib.util
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "int8.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is missing; make installs it")
def test_the_recipe_runs_and_loses_little(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    for long, short in (("epochs=8", "epochs=1"), ("epochs=3", "epochs=0.5"), ("max_drop=0.01", "max_drop=0.5")):
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    found: dict[str, float] = {}
    exec(compile(code, "int8.md", "exec"), found)
    assert found["float_accuracy"] > 0.8
    assert found["int8_accuracy"] > found["float_accuracy"] - 0.02
    assert Path("small.int8.onnx").stat().st_size < Path("small.onnx").stat().st_size / 2
