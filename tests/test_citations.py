"""Every citation of a page or of a section leads to one that exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT

DOCS = ROOT / "docs"
CODE = [
    file
    for folder in ("src", "tests", "benchmarks", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file != Path(__file__).resolve()
]
PAGE = re.compile(r"\bdocs/(?P<page>[\w/-]+\.md)(?:#(?P<anchor>[\w-]+))?")
"""A citation in code: a page from the root, and perhaps a section of it."""
LINK = re.compile(r"\]\((?P<page>(?!https?:)[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
"""A link of a page, from the page's own folder; without a file it leads to the page itself."""
NUMBERED = re.compile(r"\bmethod\.md`? \d|\bsections? \d[\d.]* of (?:`?docs/)?`?method")
"""A section cited by its number, which changes when sections move."""
BY_SECTION = "method.md"
"""The page that code cites by section only."""


def anchors_of(text: str) -> set[str]:
    """The anchors of a page: those that its headings name, and those that are made of headings without one."""
    found = set()
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose, flags=re.MULTILINE):
        named = re.search(r"\{ *#([\w-]+) *\}$", heading)
        words = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(named[1] if named else re.sub(r"[-\s]+", "-", words))
    return found


def faults_of_code(text: str) -> Iterator[str]:
    """What is wrong with the citations in a file of code."""
    for match in NUMBERED.finditer(text):
        yield f"{match[0]!r} cites a number; cite the anchor, as docs/method.md#innovation"
    for match in PAGE.finditer(text):
        page, anchor = DOCS / match["page"], match["anchor"]
        if not page.is_file():
            yield f"there is no page docs/{match['page']}"
        elif anchor and anchor not in anchors_of(page.read_text(encoding="utf-8")):
            yield f"docs/{match['page']} has no section #{anchor}"
        elif not anchor and match["page"] == BY_SECTION:
            yield "docs/method.md is cited without a section"


def faults_of_page(text: str, folder: Path) -> Iterator[str]:
    """What is wrong with the citations of a page; names of the package are anchors that mkdocs checks."""
    for match in NUMBERED.finditer(text):
        yield f"{match[0]!r} cites a number; link to the anchor"
    for match in LINK.finditer(re.sub(r"`[^`\n]*`", "", text)):
        page, anchor = folder / match["page"], match["anchor"]
        if match["page"] and not page.exists():
            yield f"there is no file {match['page']}"
        elif anchor and not anchor.startswith("idap."):
            target = page.read_text(encoding="utf-8") if match["page"] else text
            if anchor not in anchors_of(target):
                yield f"{match['page'] or 'the page'} has no section #{anchor}"


def test_code_cites_sections_that_exist() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}: {fault}"
        for file in CODE
        for fault in faults_of_code(file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_some_code_cites_a_section() -> None:
    cited = [match for file in CODE for match in PAGE.finditer(file.read_text(encoding="utf-8")) if match["anchor"]]
    assert len(cited) > 10


def test_pages_link_to_sections_that_exist() -> None:
    wrong = [
        f"{page.relative_to(ROOT)}: {fault}"
        for page in PAGES
        for fault in faults_of_page(page.read_text(encoding="utf-8"), page.parent)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_section_of_the_method_names_its_anchor() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    headings = re.findall(r"^##+ .+$", text, flags=re.MULTILINE)
    assert len(headings) > 15
    for heading in headings:
        assert re.search(r"^##+ \d+(\.\d+)?\.? .+ \{#[\w-]+\}$", heading), heading


def test_no_anchor_of_the_method_stands_twice() -> None:
    named = re.findall(r"\{#([\w-]+)\}", (DOCS / "method.md").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(set(named))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see docs/method.md#inovation", "has no section #inovation"),
        ("see docs/methods.md#innovation", "no page docs/methods.md"),
        ("the form (method.md 2.3)", "cites a number"),
        ("section 3.5 of `docs/method.md`", "cites a number"),
        ("see docs/method.md", "without a section"),
    ],
)
def test_a_wrong_citation_in_code_is_found(text: str, fault: str) -> None:
    assert any(fault in found for found in faults_of_code(text)), list(faults_of_code(text))


@pytest.mark.parametrize("text", ["docs/method.md#innovation", "docs/cli.md", "docs/method.md#kept-state, half-way"])
def test_a_right_citation_in_code_passes(text: str) -> None:
    assert not list(faults_of_code(text))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[x](method.md#nothing)", "method.md has no section #nothing"),
        ("[x](nothing.md)", "no file nothing.md"),
        ("# Words\n[x](#work)", "the page has no section #work"),
        ("as method.md 2.2 says", "cites a number"),
    ],
)
def test_a_wrong_link_of_a_page_is_found(text: str, fault: str) -> None:
    assert any(fault in found for found in faults_of_page(text, DOCS))


def test_a_right_link_of_a_page_passes() -> None:
    text = "# Some words\n[x](method.md#innovation) [y](#some-words) [z](reference/task.md#idap.Task)\n[w](https://a.b)"
    assert not list(faults_of_page(text, DOCS))


def test_anchors_are_those_of_the_site() -> None:
    markdown = pytest.importorskip("markdown", reason="markdown is not installed; make installs it")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = markdown.markdown(text, extensions=["attr_list", "toc", "fenced_code", "tables"])
        site = set(re.findall(r"<h[1-6] id=\"([^\"]+)\"", made))
        ours = anchors_of(text)
        assert {anchor for anchor in ours if re.fullmatch(r"[\w-]+", anchor)} >= {
            anchor for anchor in site if not re.search(r"_\d+$", anchor)
        }, page
