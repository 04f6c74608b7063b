"""The reference of recipes: every section and key, from the code that reads them; `docs/recipes.md` ends with it."""

import dataclasses
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from idap.compress.config import Config, FilterStage, LayerStage
from idap.files import write_bytes
from idap.rebalance.run import Rebalance
from idap.training.recovery import Recovery
from idap.zoo.sections import SECTIONS, SHARES, DataSection, ModelSection, OutputSection, TaskSection
from idap.zoo.sources import SOURCES

BEGIN = "<!-- Below this line: written by idap.zoo.recipe_page.write_reference. -->"

WHAT: Mapping[str, tuple[str, Any]] = {
    "model": ("what is compressed", ModelSection),
    "data": ("the task, by the name of its data", DataSection),
    "task": ("a task of one's own, instead of `[data]`", TaskSection),
    "train": ("training before the compression; without the section there is none", Recovery),
    "goals": ("what may be lost, and what is to be reached", Config),
    "compress": ("how the compression goes about it", Config),
    "filters": ("stage 1, width: channels, neurons and heads", FilterStage),
    "layers": ("stage 2, depth: branches and blocks", LayerStage),
    "rebalance": ("the correction in closed form after each cut", Rebalance),
    "recovery": ("training after each step", Recovery),
    "final": ("training of the result; what is left out is as in `[recovery]`", Recovery),
    "output": ("where the run is kept", OutputSection),
}
"""Section -> what it is, and what says what its keys mean."""


def reference() -> str:
    """Write the reference in Markdown: a table per section, one per data set."""
    parts = []
    for name in SECTIONS:
        what, source = WHAT[name]
        parts.append(f"## `[{name}]`: {what}")
        if name in ("recovery", "final"):
            parts.append("The keys of `[train]`.")
        elif name == "data":
            parts += ["`name` and `path` say which data; the other keys depend on them.", _data_tables()]
        elif isinstance(source, type) and dataclasses.is_dataclass(source):
            parts.append(_table(_settings(source, list(SECTIONS[name].model_fields))))
        else:
            parts.append(_table(_fields(source)))
    return "\n\n".join(parts) + "\n"


def write_reference(file: Path) -> None:
    """Renew the reference in a document, below the line that says so.

    Args:
        file: holds the line `BEGIN`.
    """
    head = file.read_text(encoding="utf-8").partition(BEGIN)[0]
    write_bytes(file, f"{head}{BEGIN}\n\n{reference()}".encode())


def argument_texts(documented: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a function or class says of each argument, in one line each.

    Example:
        >>> argument_texts(argument_texts)
        {'documented': 'has a section Args, indented by four.'}

    Args:
        documented: has a section Args, indented by four.
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
            for key in source.takes()
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
    """Rows of a section of its own."""
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
    """What may be written as a value; None is written "none" where a setting takes it, and left out elsewhere."""
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
