"""docs/cli.md agrees with the help of the commands, and that with their JSON documents."""

import importlib
import json
from pathlib import Path

import pytest

from idap.cli.commands import apply, bench, evaluate, export, inspect
from idap.cli.commands.evaluate import Measurement
from idap.cli.demo import NetworkResult
from idap.cli.main import COMMANDS
from idap.cli.reference import page
from idap.cli.views import Profile, StructureView
from idap.deploy.bench import Bench
from idap.deploy.export import Exported
from idap.saving.stream import Applied
from tests.cli.commands.test_commands import compress, idap, numbers, plain_terminal, script  # noqa: F401 - fixtures

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m idap.cli.reference > docs/cli.md"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_says_what_its_document_holds(command):
    module = importlib.import_module(command.place.partition(":")[0])
    assert module.DOCUMENT
    assert f"## idap {command.name}\n" in page()


@pytest.mark.parametrize(
    ("documented", "kind", "more"),
    [
        (inspect.DOCUMENT, StructureView, ()),
        (inspect.DOCUMENT_OF_DIVERGENCE, Profile, ()),
        (evaluate.DOCUMENT, Measurement, ()),
        (bench.DOCUMENT, Bench, ()),
        (apply.DOCUMENT, Applied, ()),
        (export.DOCUMENT, Exported, ("finalized", "pretrained")),
    ],
)
def test_documents_of_dataclasses(documented, kind, more):
    assert list(documented) == [*kind.__dataclass_fields__, *more]


def test_documents_of_others(script):  # noqa: F811
    from idap.cli.commands import completion, demo, listing, resume  # fmt: skip
    from idap.cli.commands import compress as compressing

    found = json.loads(compress(script, "--json", "--quiet").stdout)
    assert set(found) == set(compressing.DOCUMENT) == set(resume.DOCUMENT)
    assert set(NetworkResult("net", True, "done", numbers()).to_json()) == set(demo.DOCUMENT)
    assert set(json.loads(idap("completion", "bash", "--json").stdout)) == set(completion.DOCUMENT)
    assert set(json.loads(idap("list", "--json").stdout)[0]) == set(listing.DOCUMENT)
