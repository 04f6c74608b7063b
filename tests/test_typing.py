"""The types of the public API are complete: a strict type checker understands a user's script."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import idap

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed; make installs it")
def test_a_users_script_passes_mypy_strictly() -> None:
    """With the cache that `make check` leaves this takes seconds, without it a minute: torch is large."""
    words = [sys.executable, "-m", "mypy", "--strict", "src/idap", "tests/typed_user.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _callables(value: Any) -> list[Any]:
    if not inspect.isclass(value):
        return [value]
    return [member for name, member in vars(value).items() if name[0] != "_" and inspect.isfunction(member)]


@pytest.mark.parametrize("name", idap.__all__)
def test_every_public_function_is_annotated(name: str) -> None:
    for function in _callables(getattr(idap, name)):
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        bare = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare, f"{function} does not say what {bare} are"


def test_every_public_name_is_used_by_the_script() -> None:
    text = (ROOT / "tests" / "typed_user.py").read_text(encoding="utf-8")
    unused = [name for name in idap.__all__ if not re.search(rf"\bidap\.{name}\b", text)]
    assert not unused
    assert (ROOT / "src" / "idap" / "py.typed").exists()
