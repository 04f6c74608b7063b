"""Every code block of README.md and docs/ runs; every page is in the site, and every public name in its reference."""

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import idap
from tests.conformance import vision_operators
from tests.pages import PAGES, ROOT, Story, blocks_of

NOT_RUN_AT_MOST = 4
"""Blocks that are not run stay few; each says why, before the block."""
NEEDS = {"onnxruntime": "int8.md"}


def _readme(names: dict[str, Any]) -> None:
    result = names["result"]
    assert result.macs[1] <= result.macs[0] / 2
    assert {file.name for file in Path("small").iterdir()} == {"model.safetensors", "plan.json", "card.md"}


def _guide(names: dict[str, Any]) -> None:
    assert names["result"].reached
    assert names["result"].size[1] <= 0.6 * names["result"].size[0]


def _hugging_face(names: dict[str, Any]) -> None:
    result, saved, small = names["result"], names["saved"], names["small"]
    assert result.reached and saved.plain and set(saved.changed) == {"intermediate_size"}
    assert small.config.intermediate_size % 8 == 0
    assert sum(p.numel() for p in small.parameters()) == result.parameters[1]


def _int8(names: dict[str, Any]) -> None:
    assert names["float_accuracy"] > 0.8
    assert names["int8_accuracy"] > names["float_accuracy"] - 0.02
    assert Path("small.int8.onnx").stat().st_size < Path("small.onnx").stat().st_size / 2


AFTERWARDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": _readme,
    "docs/compress.md": _guide,
    "docs/how-to/hugging_face.md": _hugging_face,
    "docs/int8.md": _int8,
}
"""What must be so when a page has run, beyond that nothing failed."""


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore")  # those of other packages, which a reader sees as well
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    for package in ("torchvision", "transformers", "timm", "diffusers", "onnxruntime"):
        if any(re.search(rf"^(?:from|import) {package}\b", block.code, re.MULTILINE) for block in blocks):
            vision_operators.make_importable()
            pytest.importorskip(package, reason=f"{package} is not installed; make installs it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    story = Story(page, tmp_path)
    for block in blocks:
        story.run(block)
    AFTERWARDS.get(_name(page), lambda names: None)(story.names)
    story.names.clear()
    gc.collect()
