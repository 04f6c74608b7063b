"""The house keeps its shape: imports run one way, rooms and functions stay small, nothing is swallowed or printed."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "idap"
FILES = sorted(SOURCE.rglob("*.py"))
LEVELS = {
    **dict.fromkeys(("errors", "files", "progress", "steps"), 0),
    **dict.fromkeys(("memory", "ownership", "script", "selection"), 1),
    **dict.fromkeys(("graph", "linalg", "parsing", "record", "tensorboard", "training"), 2),
    **dict.fromkeys(("data", "report"), 3),
    "structure": 4,
    **dict.fromkeys(("cost", "divergence", "surgery"), 5),
    **dict.fromkeys(("rebalance", "saving"), 6),
    **dict.fromkeys(("compress", "deploy", "models"), 7),
    **dict.fromkeys(("hugging_face", "recipes"), 8),
    "cli": 9,
}
MOST_FILES = 15  # in one folder: a room is read as a whole


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported_rooms(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree_of(file)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "idap":
                assert len(parts) > 1, f"{file}:{node.lineno} imports the package inside the package"
                yield parts[1], node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_from_high_to_low(file: Path) -> None:
    room = room_of(file)
    if room in ("__init__", "__main__"):
        return
    assert room in LEVELS, f"{room} has no level; give it one here and in docs/architecture.md"
    for other, line in imported_rooms(file):
        assert other == room or LEVELS[other] < LEVELS[room], f"{file}:{line}: {room} must not import {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_stay_small_and_honest(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 350, f"{file} is too long; split it"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{file}:{node.lineno} {node.name} has {length} lines; split it"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{file}:{node.lineno} catches everything"
            assert not all(isinstance(inner, ast.Pass) for inner in node.body), f"{file}:{node.lineno} swallows"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert room_of(file) == "cli", f"{file}:{node.lineno} prints"


def test_the_levels_in_the_documentation_are_these() -> None:
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in LEVELS:
        assert f"`{room}/`" in text or f"`{room}`" in text, f"docs/architecture.md does not know {room}"


def test_rooms_stay_small() -> None:
    counts = Counter(file.parent for file in FILES)
    crowded = {str(folder.relative_to(SOURCE)): count for folder, count in counts.items() if count > MOST_FILES}
    assert not crowded, f"{crowded} hold more than {MOST_FILES} files; make a room of what belongs together"
