"""The page docs/cli.md, written from the commands themselves: `python -m idap.cli.reference > docs/cli.md`."""

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import typer

from idap.cli.lazy import Lazy, examples_of, flowing
from idap.cli.main import COMMANDS, EXIT_CODES, app

_BEGIN = """\
# Command line

<!-- Written by `python -m idap.cli.reference > docs/cli.md`; a test compares. Change the commands, not this page. -->

<!-- parsed here: the examples name runs and files of yours; tests/cli/ runs the commands -->

`idap COMMAND --help` says the same on the terminal. `python -m idap` is the same command, also for launchers:
`accelerate launch -m idap compress ...`.
"""
_ALL = """\
## What holds for every command

| option | |
|---|---|
| `--json` | The standard output is one JSON document and nothing else; progress goes to the standard error. |
| `--quiet`, `-q` | Nothing but errors; `list` prints only names, `evaluate` only numbers. A `--json` document stays. |
| `--verbose`, `-v` | Also how long each part took, and with which versions; on the standard error, or above the bars. |
| `--debug` | An error shows its traceback; so does `IDAP_DEBUG=1` in the environment. |

Results go to the standard output, errors to the standard error. Colours follow `NO_COLOR` and `FORCE_COLOR`, the width
follows `COLUMNS`; what is no terminal gets plain lines.

An error is one panel: what is wrong and how to mend it, where, and where to read more. With `--json` it is a document
on the standard output, also when the words of the command line are wrong:

```json
{"error": {"kind": "ConfigError", "message": "what was found, what was expected, the way out", "where": "r.toml"}}
```

`kind` is the name of a class of `idap.errors`, `UsageError` for wrong words, `KeyboardInterrupt` after Ctrl-C, or that
of whatever nobody expected.
"""


def page() -> str:
    """The whole page in Markdown."""
    codes = ["| exit code | |", "|---|---|", *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())]
    listed = [f"| [`idap {each.name}`](#idap-{each.name}) | {each.about} |" for each in COMMANDS]
    parts = [_BEGIN, "\n".join(["| command | |", "|---|---|", *listed]), _ALL, "\n".join(codes)]
    with typer.Context(typer.main.get_command(app), info_name="idap") as context:
        for each in COMMANDS:
            parts += _described(each, context)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _described(lazy: Lazy, context: Any) -> Iterator[str]:
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
    yield flowing(inspect.getdoc(inspect.unwrap(function)) or "")
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
