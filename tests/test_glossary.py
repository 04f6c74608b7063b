"""Pages use the words of the glossary: phrases that confused readers do not come back."""

import re
from collections.abc import Iterator

import pytest

from tests.pages import PAGES, ROOT

CHECKS_CODE = True
"""Whether src/ is checked as well; set it to True once the messages and docstrings there are rewritten."""
GLOSSARY = ROOT / "docs" / "contributing.md"
CODE = [file for ending in ("*.py", "*.toml") for file in sorted((ROOT / "src" / "idap").rglob(ending))]
CHECKED = [*PAGES, *(CODE if CHECKS_CODE else [])]
WRONG = {
    r"\bunasked\b": "without a comparison (`layers.against=nothing`)",
    r"\bc[oa]mes? to the (same )?result of one\b": "takes the decisions of a single-process run",
    r"\bwhoever asks\b": "however many need it",
    r"\bgets? its turn\b": "is removed",
    r"\blos(e|es|ing) no less\b": "would lose more",
    r"\bin its place los(e|es|ing)\b": "instead would lose",
    r"\bgo(es)? in its place\b": "is cut instead",
    r"\bthat go(es)? besides\b": "that is removed as well",
    r"\b(knows?|known|knew) (\w+ ){0,3}by heart\b": "has memorised",
    r"\b(behavior|neighbor|favorite|color scheme)": "British spelling",
}
"""Phrase -> what to write instead. Short on purpose: only what readers did not understand, and the other spelling."""


def faults(text: str) -> Iterator[str]:
    """The phrases of a text that the glossary does not want, with the line and with what to write instead."""
    # the right column of the glossary's examples holds wrong sentences; keep the lines, so that numbers stay true
    text = re.sub(r"\| do not write \|.*?\n\n", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    for phrase, better in WRONG.items():
        for match in re.finditer(phrase.replace(" ", r"\s+"), text, flags=re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            yield f"line {line}: {' '.join(match[0].split())!r}; write: {better}"


def test_pages_hold_no_phrase_that_confused_readers() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}, {fault}" for file in CHECKED for fault in faults(file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "It was measured when layers went unasked.",
        "Several processes share the work and come to the result of one.",
        "each tensor is looked at once, whoever\nasks for it",
        "filters in its place lose no less, 0.02914 in place of 0.02895",
        "the network knows all images by heart",
        "the neighbors of a layer",
    ],
)
def test_a_wrong_phrase_is_found(text: str) -> None:
    assert list(faults(text))


def test_the_line_of_a_wrong_phrase_is_told() -> None:
    assert next(iter(faults("one\ntwo\nlayers go\nunasked"))).startswith("line 4: 'unasked'; write: without")


@pytest.mark.parametrize("text", ["Measured with `layers.against=nothing`.", "the neighbours of a layer", "ask for it"])
def test_a_right_phrase_passes(text: str) -> None:
    assert not list(faults(text))


def test_the_glossary_defines_each_word_once() -> None:
    text = GLOSSARY.read_text(encoding="utf-8").partition("\n## Glossary\n")[2].partition("\n## ")[0]
    defined = re.findall(r"^\| \*\*(.+?)\*\*", text, flags=re.MULTILINE)
    assert len(defined) > 30
    assert len(set(defined)) == len(defined)
