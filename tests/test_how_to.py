"""What the how-to pages promise: their Python runs."""

import re
from pathlib import Path

import pytest

import idap
from tests.conformance import vision_operators

PAGES = Path(__file__).parents[1] / "docs" / "how-to"


@pytest.mark.filterwarnings("ignore")
def test_the_python_about_hugging_face_runs(tmp_path, monkeypatch, capsys):
    vision_operators.make_importable()
    pytest.importorskip("transformers", reason="transformers is not installed; make installs it")
    (code,) = re.findall(r"```python\n(.*?)```", (PAGES / "hugging_face.md").read_text(encoding="utf-8"), re.DOTALL)
    smaller = (
        ("epochs=20", "epochs=0.05"),
        ("epochs=2", "epochs=0.05"),
        ("max_drop=0.02", "max_drop=1.0"),
        ('"patch_size": 2', '"patch_size": 4'),
        ('"num_hidden_layers": 4', '"num_hidden_layers": 2'),
        ("alike=", 'schedule="one-shot", alike='),
    )
    for long, short in smaller:
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(compile(code, "hugging_face.md", "exec"), found)
    result, saved, small = found["result"], found["saved"], found["small"]
    assert isinstance(result, idap.Result) and result.reached
    assert saved.plain and set(saved.changed) == {"intermediate_size"}
    assert small.config.intermediate_size % 8 == 0
    assert sum(p.numel() for p in small.parameters()) == result.parameters[1]
    assert "is a plain folder (intermediate_size 192 -> " in capsys.readouterr().out
