"""What the run was made of and where: settings, environment, and the commands that reproduce it."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from idap.report.markup import Html, tag
from idap.report.reading import Run

WORDS = {
    "idap": "idap",
    "torch": "PyTorch",
    "python": "Python",
    "platform": "platform",
    "device": "device",
    "threads": "threads",
    "processes": "processes",
    "begun": "begun (UTC)",
    "folder": "working folder",
}


def command(run: Run) -> str:
    """The command that began the run, as it is typed: `idap compress ...`, or `python script.py`.

    Example:
        >>> words(["/usr/bin/idap", "compress", "my recipe.toml"])
        "idap compress 'my recipe.toml'"
        >>> words(["/lib/idap/__main__.py", "demo"]), words(["/home/me/train.py"]), words([""])
        ('idap demo', 'python /home/me/train.py', 'python')
    """
    return words(run.settings.environment.get("command", []))


def words(arguments: list[str]) -> str:
    """The words of a command, quoted for a shell."""
    first, rest = (arguments or [""])[0], (arguments or [""])[1:]
    path = PurePath(first)
    if path.stem == "idap" or (path.name == "__main__.py" and path.parent.name == "idap"):
        return shlex.join(["idap", *rest])
    return shlex.join(["python", *([first] if first not in ("", "-c") else []), *rest])


def reproduce(run: Run) -> Html:
    """The commands that make the run again, and that use its result."""
    environment, folder = run.settings.environment, str(run.folder)
    versions = [f"{name} {environment[name]}" for name in ("idap", "torch", "python") if name in environment]
    lines = [f"# {', '.join(versions)}"]
    if environment.get("folder"):
        lines.append(f"cd {shlex.quote(environment['folder'])}")
    lines.append(command(run))
    use = []
    if run.reached is None:
        use = [_resuming(run)]
    elif run.settings.recipe is not None:
        use.append(f"idap export {shlex.quote(folder)} --out model.onnx")
        use.append(f"idap bench {shlex.quote(folder)}")
    return tag(
        "div",
        tag("p", "Begun with:"),
        _code("\n".join(lines)),
        [tag("p", "And then:" if run.reached is not None else "To go on:"), _code("\n".join(use))] if use else None,
        [tag("p", "In Python:"), _code(_loading(run))] if run.reached is not None else None,
    )


def _resuming(run: Run) -> str:
    """What goes on with a run; one that was begun from Python has to say it there."""
    if run.settings.recipe is not None:
        return f"idap resume {shlex.quote(str(run.folder))}"
    return f"{command(run)}  # with idap.compress(..., run_dir={str(run.folder)!r}, resume=True)"


def _loading(run: Run) -> str:
    where = str(run.folder / "model")
    return f"import idap\n\nmodel = idap.load({where!r}, original)  # original: a freshly built {run.settings.model}"


def _code(text: str) -> Html:
    return tag("div", tag("pre", tag("code", text), tabindex="0"), class_="copied")


def environment(run: Run) -> Html:
    """Where the run took place."""
    found = run.settings.environment
    rows = [(WORDS[name], found[name]) for name in WORDS if name in found]
    if run.reached is not None:
        rows.append(("ended (UTC)", run.reached.ended))
    rows.append(("model", run.settings.model))
    rows.append(("fingerprint", run.settings.fingerprint[:16]))
    return tag("dl", [(tag("dt", name), tag("dd", str(value))) for name, value in rows], class_="facts")


def settings(run: Run) -> Html:
    """Every setting of the run, in the notation of recipes."""
    parts = [("settings", run.settings.config)]
    if run.settings.recipe:
        parts.insert(0, ("model and data", run.settings.recipe))
    if run.settings.optimizer:
        parts.append(("optimiser", {"optimizer": run.settings.optimizer}))
    tables = [
        tag(
            "details",
            tag("summary", title),
            tag("div", tag("table", tag("tbody", [_line(key, value) for key, value in flat(found)])), class_="scroll"),
        )
        for title, found in parts
    ]
    return tag("div", tables)


def _line(key: str, value: Any) -> Html:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return tag("tr", tag("th", tag("code", key), scope="row"), tag("td", tag("code", text)))


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables.

    >>> list(flat({"a": 1, "b": {"c": 2, "d": {}}}))
    [('a', 1), ('b.c', 2), ('b.d', {})]
    """
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
