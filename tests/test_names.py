"""Functions are named by verbs, or by plain nouns for what they return; a participle says neither."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "idap"

PARTICIPLE = re.compile(
    r"[a-z]{2,}(?:ed|ing)|beaten|begun|bent|bound|bought|broken|brought|built|caught|chosen|clung|dealt|done|drawn|driven|"
    r"dug|eaten|fallen|fed|felt|fought|found|flown|forbidden|forgotten|frozen|fled|given|gone|grown|hidden|held|heard|"
    r"kept|known|laid|led|lent|lost|made|meant|met|paid|proven|ridden|risen|said|seen|sent|shaken|shown|shrunk|slept|slid|"
    r"sold|sought|spent|spoken|spun|stolen|stood|struck|stuck|sworn|taught|thought|thrown|told|torn|undone|understood|"
    r"unseen|woken|won|worn|woven|written|overwritten"
)
"""First words of names; a participle that is a plain form as well, such as `cut` or `read`, is not among them."""
PLAIN = re.compile(
    r"bring|embed|embedding|(?:ex|pro|suc)ceed|feed|need|padding|red|ring|s[eh]ed|setting|speed|string|thing|timing|"
    r"training|warning"
)
"""Words that only look like participles."""
ALLOWED = {
    "allowed_bytes",
    "blocked_dims",
    "changed_nodes",
    "frozen_parameters",
    "learning_rate",
    "masked_outputs",
    "running_mean",
    "scaled_dot_product_attention",
    "shipped_recipes",
    "squared_norms",
    "tied_dims",
}
"""Nouns of the field, and plain nouns for what is returned, that begin with a participle."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods, without properties: those are read like the data beside them."""
    for node in ast.walk(tree):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and not any("property" in ast.unparse(item) for item in node.decorator_list):
            yield node


def is_participle(name: str) -> bool:
    """Whether a function is named by a participle.

    >>> [name for name in ("looked_at", "_told", "look_at", "needs", "feed", "learning_rate") if is_participle(name)]
    ['looked_at', '_told']
    """
    name = name.strip("_")
    first = name.split("_")[0].lower()
    return name not in ALLOWED and not PLAIN.fullmatch(first) and PARTICIPLE.fullmatch(first) is not None


def test_functions_are_named_by_verbs_and_nouns() -> None:
    found = [
        f"{file.relative_to(SOURCE)}:{node.lineno} {node.name}"
        for file in sorted(SOURCE.rglob("*.py"))
        for node in functions(ast.parse(file.read_text(encoding="utf-8")))
        if not node.name.startswith("__") and is_participle(node.name)
    ]
    assert not found, "name these by what they do or return: " + ", ".join(found)
