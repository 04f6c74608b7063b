"""The code blocks of a page of documentation, and how each is run.

A page is README.md or any file below docs/. Its blocks run in order, in one namespace and one folder, so that a page is
one story. What a block is, its language says:

- `python` is executed; with ``title="net.py"`` it is written to that file, for the blocks behind it.
- `console` is run line by line: `idap`, `python`, and what `make` and `pip` would do is looked up.
- `toml` and `json` must be readable; with a title they are written to a file.
- `text`, or no language, is no code: a picture, or what a block prints.

A comment before a block says what is special about it:

- ``<!-- test: epochs=8 -> epochs=1; steps=9 -> steps=1 -->`` is less work in the test; each left side must be there.
- ``<!-- output -->`` before a `text` block: the block before it prints these lines, ``...`` stands for others.
- ``<!-- parsed: needs a run -->`` before `console`: commands and options must exist, and nothing runs, for this reason.
- ``<!-- parsed here: needs a run -->`` anywhere on a page says so of all its `console` blocks.
- ``<!-- not run: needs two GPUs -->`` is not run, for this reason.
"""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!--\s*(?P<kind>test:|not run:|parsed:|output)(?P<note>.*?)-->\s*?\n\s*?)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of the page, where its code begins.
        language: as the page says.
        title: the file that it is written to, "" for none.
        code: without the indentation of the fence, and with less work if the page says so.
        reason: why it is not run, "" if it is.
        shown: whether it shows what the block before it prints.
        parsed: whether its commands are only looked up.
    """

    line: int
    language: str
    title: str
    code: str
    reason: str = ""
    shown: bool = False
    parsed: bool = False


def blocks_of(text: str) -> list[Block]:
    """Find the blocks of a page, in order."""
    found = []
    all_parsed = re.search(r"^<!--\s*parsed here:\s*\S.*?-->", text, re.DOTALL | re.MULTILINE) is not None
    for match in _BLOCK.finditer(text):
        kind, note = match["kind"] or "", " ".join((match["note"] or "").split())
        line = text.count("\n", 0, match.start("code")) + 1
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        if kind == "test:":
            code = _lessened(code, note, line)
        title = re.search(r'title="([^"]+)"', match["info"])
        found.append(
            Block(
                line,
                match["language"],
                title[1] if title else "",
                code,
                reason=note if kind == "not run:" else "",
                shown=kind == "output",
                parsed=kind == "parsed:" or all_parsed,
            )
        )
        assert kind not in ("not run:", "parsed:") or note, f"line {line}: say why this block is not run"
    assert sum(line.lstrip().startswith("```") for line in text.splitlines()) == 2 * len(found), "a fence is not closed"
    return found


def _lessened(code: str, note: str, line: int) -> str:
    for change in filter(None, map(str.strip, note.split(";"))):
        long, arrow, short = map(str.strip, change.partition("->"))
        assert arrow and long in code, f"line {line}: the block does not hold {long!r}"
        code = code.replace(long, short)
    return code


class Story:
    """Runs the blocks of one page.

    Args:
        page: for tracebacks.
        folder: where they run; recipes/ and examples/ are there, as they are in a clone.
    """

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict[str, Any] = {"__name__": "__page__"}
        self.printed = ""
        for name in ("recipes", "examples"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, block: Block) -> None:
        """Run one block in the current folder, which must be the story's."""
        if block.reason:
            return
        if block.title:
            (self.folder / block.title).write_text(block.code, encoding="utf-8")
        if block.language == "python":
            # Lines of the file are those of the page, so that a traceback points there.
            code = compile("\n" * (block.line - 1) + block.code, str(self.page), "exec")
            if not block.title:
                self.printed = self._captured(code)
        elif block.language in ("console", "bash", "sh"):
            self.printed = "".join(self._command(words, parsed=block.parsed) for words in _commands(block.code))
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "json":
            json.loads(block.code)
        elif block.language not in ("text", ""):
            raise AssertionError(f"{self.page}:{block.line}: nothing runs {block.language!r} here; see tests/pages.py")
        if block.shown:
            self._compare(block)

    def _captured(self, code: Any) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, self.names)
        return out.getvalue()

    def _command(self, words: list[str], *, parsed: bool) -> str:
        program, *rest = words
        program = program.removeprefix(".venv/bin/")
        if program == "idap":
            return _looked_up(rest) if parsed else _idap(rest)
        if program == "python":
            done = subprocess.run([sys.executable, *rest], cwd=self.folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
            return done.stdout
        if program == "make":
            subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, capture_output=True, check=True)
            return ""
        assert words[:2] == ["pip", "install"], f"nothing runs {shlex.join(words)!r} here; see tests/pages.py"
        _known_extras(rest)
        return ""

    def _compare(self, block: Block) -> None:
        printed = [line.strip() for line in self.printed.splitlines()]
        for line in filter(None, map(str.strip, block.code.splitlines())):
            assert line == "..." or line in printed, f"{self.page}:{block.line}: {line!r} is not in\n{self.printed}"


def _commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def _idap(words: list[str]) -> str:
    from typer.testing import CliRunner

    from idap.cli.main import app

    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"idap {shlex.join(words)} ended with {done.exit_code}\n{done.output}"
    return done.output


def _looked_up(words: list[str]) -> str:
    """Parse a command as `idap` would, without running it."""
    import typer

    from idap.cli.main import app

    command: Any = typer.main.get_command(app)
    above, name = None, "idap"
    try:
        while True:
            context = command.make_context(name, list(words), parent=above)
            if not hasattr(command, "resolve_command"):
                return ""
            above, words = context, [*context._protected_args, *context.args]
            name, command, words = command.resolve_command(context, words)
    except Exception as error:
        raise AssertionError(f"idap {shlex.join(words)}: {getattr(error, 'message', None) or error}") from error


def _known_extras(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {*project["optional-dependencies"]}
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        unknown = {*extras.split(",")} - known
        assert not unknown, f"pyproject.toml has no extra {sorted(unknown)}"
