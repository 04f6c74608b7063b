"""Writes docs/cli.md and docs/recipes.md from the code: `python -m idap.cli.reference > docs/cli.md`."""

import dataclasses
import importlib
import inspect
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import typer

from idap.cli.lazy import Lazy, examples_of, reflow
from idap.cli.main import COMMANDS, EXIT_CODES, app
from idap.compress.config import Config, FilterStage, LayerStage
from idap.files import write_bytes
from idap.rebalance.run import Rebalance
from idap.recipes.sections import SECTIONS, SHARES, DataSection, ModelSection, OutputSection, TaskSection
from idap.recipes.sources import SOURCES
from idap.training.recovery import Recovery

BEGIN = "<!-- Below this line: written by idap.cli.reference.write_reference. -->"

WHAT: Mapping[str, tuple[str, Any]] = {
    "model": ("what is compressed", ModelSection),
    "data": ("the task, by the name of its data", DataSection),
    "task": ("a task of your own, instead of `[data]`", TaskSection),
    "train": ("training before the compression; without this section there is none", Recovery),
    "goals": ("the budget of the metric, and the targets of the costs", Config),
    "compress": ("how the model is compressed", Config),
    "filters": ("stage 1, width: channels, neurons and heads", FilterStage),
    "layers": ("stage 2, depth: branches and blocks", LayerStage),
    "rebalance": ("the correction in closed form after each cut", Rebalance),
    "recovery": ("training after each step", Recovery),
    "final": ("training of the result; keys that are left out are as in `[recovery]`", Recovery),
    "output": ("where the run is kept", OutputSection),
}
"""Section -> its title, and the class whose texts explain its keys."""


def reference() -> str:
    """Write the reference in Markdown: a table per section, one per data set."""
    parts = []
    for name in SECTIONS:
        what, source = WHAT[name]
        parts.append(f"## `[{name}]`: {what}")
        if name in ("recovery", "final"):
            parts.append("The keys of `[train]`.")
        elif name == "data":
            parts += ["`name` and `path` choose the data; the other keys depend on `name`.", _data_tables()]
        elif isinstance(source, type) and dataclasses.is_dataclass(source):
            parts.append(_table(_settings(source, list(SECTIONS[name].model_fields))))
        else:
            parts.append(_table(_fields(source)))
    return "\n\n".join(parts) + "\n"


def write_reference(file: Path) -> None:
    """Rewrite the reference in a document, below the line `BEGIN`.

    Args:
        file: the document, which holds that line.
    """
    head = file.read_text(encoding="utf-8").partition(BEGIN)[0]
    write_bytes(file, f"{head}{BEGIN}\n\n{reference()}".encode())


def argument_texts(documented: Callable[..., Any]) -> dict[str, str]:
    """The texts about the arguments in the docstring of a function or class, each as one line.

    Example:
        >>> argument_texts(argument_texts)
        {'documented': 'its docstring has a section Args, indented by four.'}

    Args:
        documented: its docstring has a section Args, indented by four.
    """
    lines = inspect.getdoc(documented) or ""
    inside = re.search(r"^Args:\n((?:    .*\n|\n)+)", lines + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", inside[1].rstrip()) if inside else []:
        name, _, text = entry.strip().partition(":")
        found[name] = " ".join(text.split())
    return found


def _data_tables() -> str:
    parts = [_table(_fields(DataSection)[:2])]
    for name, source in SOURCES.items():
        texts = argument_texts(source.build)
        parameters = inspect.signature(source.build).parameters
        hints = typing.get_type_hints(source.build)
        path = f":PATH`, PATH is {source.path}" if source.path else "`"
        parts.append(f"### `{name}{path}: {source.what}")
        rows = [
            (key, _kind(_without_none(hints[key]), key), _default(parameters[key].default), texts[key])
            for key in source.key_names()
            if key != "path"
        ]
        parts.append(_table(rows))
    return "\n\n".join(parts)


Row = tuple[str, str, str, str]


def _settings(settings: type, keys: list[str]) -> list[Row]:
    """Rows of a section that fills a dataclass."""
    texts, hints = argument_texts(settings), typing.get_type_hints(settings)
    rows: list[Row] = []
    for each in dataclasses.fields(settings):
        if each.name in keys:
            default = "" if each.default is dataclasses.MISSING else _default(each.default)
            rows.append((each.name, _kind(hints[each.name], each.name), default, texts[each.name]))
    return rows


def _fields(section: Any) -> list[Row]:
    """Rows of a section that has its own model."""
    return [
        (
            name,
            _kind(_without_none(field.annotation), name),
            "needed" if field.is_required() else "",
            " ".join((field.description or "").split()),
        )
        for name, field in section.model_fields.items()
    ]


def _table(rows: list[Row]) -> str:
    def cell(text: str) -> str:
        return re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|")

    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {cell(kind)} | {cell(default)} | {cell(text)} |" for key, kind, default, text in rows]
    return "\n".join(lines)


def _kind(hint: Any, name: str) -> str:
    """The values that a key takes, as text; None is written "none" where a setting takes it, and omitted elsewhere."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if name == "criterion":
        return "text"
    if origin is typing.Annotated:
        return _kind(inner[0], name)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(each, name) for each in inner))
    if origin is typing.Literal:
        return " or ".join(f'`"{each}"`' if isinstance(each, str) else str(each).lower() for each in inner)
    if origin is not None and issubclass(origin, Mapping):
        return f"a table of {_kind(inner[1], name)}s"
    if origin is not None:
        return f"a list of {_kind(inner[0], name)}s"
    share = name in SHARES
    kinds = {float: "share" if share else "number", int: "whole number", bool: "true or false", str: "text"}
    return kinds.get(hint, '`"none"`')


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    return reduce(operator.or_, (each for each in typing.get_args(hint) if each is not types.NoneType))


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "needed"
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'`"{value}"`'
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


_BEGIN = """\
# Command line

<!-- Written by `python -m idap.cli.reference > docs/cli.md`; a test compares. Change the commands, not this page. -->

<!-- parsed here: the examples name runs and files of yours; tests/cli/ runs the commands -->

`idap COMMAND --help` shows the same on the terminal. `python -m idap` is the same command, also for launchers:
`accelerate launch -m idap compress ...`.
"""
_ALL = """\
## Options of every command

| option | |
|---|---|
| `--json` | The standard output is one JSON document and nothing else; progress goes to the standard error. |
| `--quiet`, `-q` | Only errors are shown; `list` prints only names, `evaluate` only numbers. `--json` still prints. |
| `--verbose`, `-v` | Also shows the time of each part and the versions, on the standard error or above the bars. |
| `--debug` | Errors are shown with their traceback; `IDAP_DEBUG=1` in the environment does the same. |

Results go to the standard output, errors to the standard error. Colours follow `NO_COLOR` and `FORCE_COLOR`, the width
follows `COLUMNS`; output that does not go to a terminal is plain lines.

An error is shown in one panel: what is wrong and how to mend it, where it happened, and where to read more. With
`--json` it is a document on the standard output, even if the command line itself is wrong:

```json
{"error": {"kind": "ConfigError", "message": "what was found, what was expected, the way out", "where": "r.toml"}}
```

`kind` is the name of a class of `idap.errors`, `UsageError` for a wrong command line, `KeyboardInterrupt` after Ctrl-C,
or the class of an unexpected error.
"""


def page() -> str:
    """The whole page in Markdown."""
    codes = ["| exit code | |", "|---|---|", *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())]
    listed = [f"| [`idap {each.name}`](#idap-{each.name}) | {each.about} |" for each in COMMANDS]
    parts = [_BEGIN, "\n".join(["| command | |", "|---|---|", *listed]), _ALL, "\n".join(codes)]
    with typer.Context(typer.main.get_command(app), info_name="idap") as context:
        for each in COMMANDS:
            parts += _describe(each, context)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _describe(lazy: Lazy, context: Any) -> Iterator[str]:
    module = importlib.import_module(lazy.place.partition(":")[0])
    command = lazy.load()
    yield f"## idap {lazy.name}"
    inner = getattr(command, "commands", None)
    if inner is None:
        yield from _help(command, getattr(module, lazy.place.partition(":")[2]), f"idap {lazy.name}", context)
    else:
        yield lazy.about
        for name, each in inner.items():
            yield f"### idap {lazy.name} {name}"
            yield from _help(each, each.callback, f"idap {lazy.name} {name}", context)
    yield "\n".join(["```console", *examples_of(module), "```"])
    documents = {
        "": "DOCUMENT",
        " with `--divergence`": "DOCUMENT_OF_DIVERGENCE",
        " with `--latency`": "DOCUMENT_OF_LATENCY",
    }
    for title, name in documents.items():
        document = getattr(module, name, None)
        if document is not None:
            yield _document(title, document)


def _help(command: Any, function: Any, words: str, context: Any) -> Iterator[str]:
    yield reflow(inspect.getdoc(inspect.unwrap(function)) or "")
    with command.make_context(words, [], parent=context, resilient_parsing=True) as inside:
        known = [parameter for parameter in command.get_params(inside) if not getattr(parameter, "hidden", False)]
    pieces = [_piece(parameter) for parameter in known if parameter.param_type_name == "argument"]
    rows = [_row(parameter) for parameter in known]
    yield f"Usage: `{' '.join([words, *pieces, '[OPTIONS]'])}`"
    yield "\n".join(["| | | |", "|---|---|---|", *(row for row in rows if row)])


def _piece(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def _row(parameter: Any) -> str:
    if "--help" in parameter.opts:
        return ""
    metavar = parameter.metavar or ""
    is_argument = parameter.param_type_name == "argument"
    name = f"`{metavar}`" if is_argument else ", ".join(f"`{option}`" for option in parameter.opts)
    facts = [(parameter.help or "").strip()]
    default = parameter.default
    if parameter.required:
        facts.append("Required.")
    elif getattr(parameter, "show_default", True) and isinstance(default, str | int) and not isinstance(default, bool):
        facts.append(f"Default: `{default}`.")
    value = f"`{metavar}`" if metavar and not is_argument else ""
    return f"| {name} | {value} | {' '.join(facts).replace('|', '/')} |"


def _document(title: str, document: Mapping[str, str]) -> str:
    rows: Iterable[str] = (f"| `{name}` | {about} |" for name, about in document.items())
    return "\n".join([f"| `--json`{title} | |", "|---|---|", *rows])


if __name__ == "__main__":
    sys.stdout.write(page())
