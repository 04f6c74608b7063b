"""Every code block of README.md and docs/ runs; every page is in the site, and every public name in its reference."""

import gc
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import idap
from tests.conformance import vision_operators
from tests.pages import PAGES, ROOT, Block, Story, blocks_of
from tests.test_architecture import LEVELS

NOT_RUN_AT_MOST = 3
"""Blocks that are not run stay few; each says why, before the block."""
PACKAGES = ("torchvision", "transformers", "timm", "diffusers", "onnxruntime")
"""Packages that a page may need and that idap itself does not."""
DOCS = ROOT / "docs"


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


def _needs(blocks: list[Block]) -> list[str]:
    code = "\n".join(block.code for block in blocks if not block.reason)
    return [name for name in PACKAGES if re.search(rf"^(?:from|import) {name}\b|\b{name}:\w", code, re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of other packages, which a reader sees as well
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    for package in _needs(blocks):
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


def test_blocks_that_are_not_run_stay_few() -> None:
    reasons = [
        f"{_name(page)}:{block.line}: {block.reason}"
        for page in PAGES
        for block in blocks_of(page.read_text(encoding="utf-8"))
        if block.reason
    ]
    assert len(reasons) <= NOT_RUN_AT_MOST, reasons


def test_every_page_is_in_the_navigation_and_every_entry_is_there() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"^ *- [^#\n]*?(\S+\.md)$", nav, flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_reference_holds_every_public_name() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE))
    homes = {f"{getattr(idap, name).__module__}.{name}" for name in idap.__all__} - {"idap.errors.IdapError"}
    assert homes <= shown
    assert "idap.errors" in shown


def test_formulas_lead_to_code_that_is_there() -> None:
    links = re.findall(r"\(reference/\w+\.md#([\w.]+)\)", (DOCS / "method.md").read_text(encoding="utf-8"))
    assert len(links) > 20
    for target in links:
        assert _resolves(target), target


def _resolves(path: str) -> bool:
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        if importlib.util.find_spec(".".join(parts[:1])) and _is_module(".".join(parts[:count])):
            found: Any = importlib.import_module(".".join(parts[:count]))
            for name in parts[count:]:
                found = getattr(found, name, None)
            return found is not None
    return False


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def test_the_picture_of_the_rooms_shows_the_rooms() -> None:
    picture = ElementTree.parse(DOCS / "assets" / "rooms.svg")
    texts = [(float(node.attrib["y"]), node.text) for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    height = {text: y for y, text in texts if text in LEVELS}
    assert height.keys() == LEVELS.keys()
    for one, level in LEVELS.items():
        for other, below in LEVELS.items():
            assert (height[one] < height[other]) == (level > below), f"{one} and {other}"


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"`((?:src|recipes|docs|examples)/[^`*]+)`", text)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed; make installs it")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    fetched = re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(https?://[^"'> ]+)""", index)
    assert not fetched, "the site fetches from elsewhere"
