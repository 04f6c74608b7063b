"""The reference of recipes in the documentation is complete and up to date."""

import re
import tomllib
from pathlib import Path

from idap.cli.reference import BEGIN, WHAT, reference, write_reference
from idap.recipes.file import split_name
from idap.recipes.recipe import make_recipe
from idap.recipes.sections import SECTIONS, DataSection
from idap.recipes.sources import SOURCES

FILE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_the_document_is_of_today(tmp_path):
    copy = tmp_path / "recipes.md"
    copy.write_text(FILE.read_text())
    write_reference(copy)
    advice = "from idap.cli.reference import write_reference; write_reference(Path('docs/recipes.md'))"
    assert copy.read_text() == FILE.read_text(), f"renew it: {advice}"


def test_every_key_of_every_section_is_explained():
    text = reference()
    assert set(WHAT) == set(SECTIONS)
    for name, section in SECTIONS.items():
        rows = text.partition(f"## `[{name}]`")[2].partition("\n## ")[0]
        if name in ("recovery", "final"):
            assert list(section.model_fields) == list(SECTIONS["train"].model_fields)
            continue
        found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", rows, re.MULTILINE)
        assert {key for key, *_ in found} == set(section.model_fields), name
        assert all(kind and meaning for _, kind, _, meaning in found), name


def test_every_data_set_has_its_keys_and_every_key_a_data_set():
    keys = {key for source in SOURCES.values() for key in source.key_names()}
    assert keys | {"name"} == set(DataSection.model_fields)
    text = reference()
    for name in SOURCES:
        assert f"### `{name}" in text


def test_the_recipe_on_the_page_is_one():
    head = FILE.read_text().partition(BEGIN)[0]
    [block] = re.findall(r"```toml\n(.*?)```", head, re.DOTALL)
    table = tomllib.loads(block)
    assert make_recipe(table, "the page").config().macs == 0.5
    assert split_name(table["data"], "the page")["path"] == "pets"
