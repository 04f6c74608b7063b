"""The page of one run, and displays of results and tables for notebooks."""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from idap.report.decisions import COSTS, Tradeoff, curve, curve_points, decisions, tradeoff
from idap.report.flow import flow, network_map
from idap.report.headline import SIGNS, Fact, card, headline
from idap.report.markup import Html, raw, tag
from idap.report.reading import Run
from idap.report.timeline import recoveries, timeline
from idap.steps import Step

WORDS = {
    "idap": "idap",
    "torch": "PyTorch",
    "python": "Python",
    "platform": "platform",
    "device": "device",
    "threads": "threads",
    "processes": "processes",
    "begun": "started (UTC)",
    "folder": "working folder",
}


def command(run: Run) -> str:
    """The command that started the run, as the user typed it: `idap compress ...`, or `python script.py`.

    Example:
        >>> shell_command(["/usr/bin/idap", "compress", "my recipe.toml"])
        "idap compress 'my recipe.toml'"
        >>> shell_command(["/lib/idap/__main__.py", "demo"]), shell_command(["/home/me/train.py"]), shell_command([""])
        ('idap demo', 'python /home/me/train.py', 'python')
    """
    return shell_command(run.settings.environment.get("command", []))


def shell_command(arguments: list[str]) -> str:
    """The line for a shell that runs a command with these arguments."""
    first, rest = (arguments or [""])[0], (arguments or [""])[1:]
    path = PurePath(first)
    if path.stem == "idap" or (path.name == "__main__.py" and path.parent.name == "idap"):
        return shlex.join(["idap", *rest])
    return shlex.join(["python", *([first] if first not in ("", "-c") else []), *rest])


def reproduction(run: Run) -> Html:
    """The commands that repeat the run, and those that use its result."""
    environment, folder = run.settings.environment, str(run.folder)
    versions = [f"{name} {environment[name]}" for name in ("idap", "torch", "python") if name in environment]
    lines = [f"# {', '.join(versions)}"]
    if environment.get("folder"):
        lines.append(f"cd {shlex.quote(environment['folder'])}")
    lines.append(command(run))
    use = []
    if run.reached is None:
        use = [_resume_code(run)]
    elif run.settings.recipe is not None:
        use.append(f"idap export {shlex.quote(folder)} --out model.onnx")
        use.append(f"idap bench {shlex.quote(folder)}")
    return tag(
        "div",
        tag("p", "Started with:"),
        _code("\n".join(lines)),
        [tag("p", "Resume with:" if run.reached is None else "Use with:"), _code("\n".join(use))] if use else None,
        [tag("p", "In Python:"), _code(_load_code(run))] if run.reached is not None else None,
    )


def _resume_code(run: Run) -> str:
    """The command that resumes a run; a run that was started from Python is resumed in Python."""
    if run.settings.recipe is not None:
        return f"idap resume {shlex.quote(str(run.folder))}"
    return f"{command(run)}  # with idap.compress(..., run_dir={str(run.folder)!r}, resume=True)"


def _load_code(run: Run) -> str:
    where = str(run.folder / "model")
    return f"import idap\n\nmodel = idap.load({where!r}, original)  # original: a freshly built {run.settings.model}"


def _code(text: str) -> Html:
    return tag("div", tag("pre", tag("code", text), tabindex="0"), class_="copied")


def environment(run: Run) -> Html:
    """The environment of the run: versions, machine, times."""
    found = run.settings.environment
    rows = [(WORDS[name], found[name]) for name in WORDS if name in found]
    if run.reached is not None:
        rows.append(("ended (UTC)", run.reached.ended))
    rows.append(("model", run.settings.model))
    rows.append(("fingerprint", run.settings.fingerprint[:16]))
    return tag("dl", [(tag("dt", name), tag("dd", str(value))) for name, value in rows], class_="facts")


def settings(run: Run) -> Html:
    """All settings of the run, written as in recipes."""
    parts = [("settings", run.settings.config)]
    if run.settings.recipe:
        parts.insert(0, ("model and data", run.settings.recipe))
    if run.settings.optimizer:
        parts.append(("optimiser", {"optimizer": run.settings.optimizer}))
    tables = []
    for title, values in parts:
        lines = tag("tbody", [_line(key, value) for key, value in flatten(values)])
        tables.append(tag("details", tag("summary", title), tag("div", tag("table", lines), class_="scroll")))
    return tag("div", tables)


def _line(key: str, value: Any) -> Html:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return tag("tr", tag("th", tag("code", key), scope="row"), tag("td", tag("code", text)))


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables.

    >>> list(flatten({"a": 1, "b": {"c": 2, "d": {}}}))
    [('a', 1), ('b.c', 2), ('b.d', {})]
    """
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath fill='%230072b2' "
    "d='M1 3h14v3H1zM1 7h9v3H1zM1 11h5v3H1z'/%3E%3C/svg%3E"
)


def run_page(run: Run) -> str:
    """The report of one run.

    Args:
        run: from `read_run`.

    Returns:
        A complete HTML document.
    """
    model = run.settings.model.rpartition(".")[2]
    metric = run.settings.task.metric
    parts = [
        headline(run),
        section("tradeoff", f"Trade-off: {metric} over {COSTS[run.cost]}", tradeoff(run), shown=run.steps != ()),
        section("flow", "Flow: divergence over depth", flow(run)),
        section("map", "Network: widths before and after", network_map(run)),
        section("recoveries", "Recovery", recoveries(run)),
        section("time", "Time", timeline(run)),
        section("decisions", "Decisions", decisions(run)),
        section("reproduce", "Reproduce", tag("div", reproduction(run), class_="half")),
        section("environment", "Environment and settings", tag("div", environment(run), settings(run))),
    ]
    title = f"{model}: {run.name}"
    about = [tag("code", run.name), " · ", tag("code", run.settings.model), " · ", tag("code", command(run))]
    return document(title, tag("h1", model, ", compressed" if run.accepted else ""), about, parts)


def section(name: str, title: str, content: Html, *, shown: bool = True) -> Html | None:
    """A part of a page under its heading; None if it is not shown."""
    if not shown:
        return None
    return tag("section", tag("h2", title, id=f"{name}-heading"), content, id=name, aria_labelledby=f"{name}-heading")


def document(title: str, heading: Html, about: Sequence[Html | str], parts: Sequence[Html | None]) -> str:
    """A complete page.

    Args:
        title: title of the window.
        heading: the first line.
        about: the line below the heading.
        parts: the sections of the page.
    """
    style, script = asset("page.css"), asset("page.js")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{_digest(script)}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · idap"),
        tag("link", rel="icon", href=ICON),
        tag("style", raw(style)),
    )
    toggle = tag("button", "Dark", type="button", id="theme", hidden=True)
    body = tag(
        "body",
        tag("a", "Skip to content", href="#content", class_="skip"),
        tag("header", tag("div", heading, tag("p", about, class_="about")), toggle),
        tag("main", parts, id="content"),
        tag("footer", tag("p", "Made by idap. This file needs no other file and no network.")),
        tag("script", raw(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def asset(name: str) -> str:
    """The text of a file that comes with the package."""
    return files("idap.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


MOST = 60
"""The most rows of a table that are shown."""


def result_display(
    *,
    title: str,
    reached: bool,
    message: str,
    facts: Sequence[Fact],
    metric: str,
    baseline: float,
    steps: Sequence[Step],
) -> str:
    """A compression for a notebook: whether its goals were reached, the numbers, and the curve of all steps.

    Args:
        title: for example the class of the model.
        reached: whether every goal was reached.
        message: one sentence about the goals.
        facts: the numbers before and after.
        metric: name of the metric.
        baseline: metric of the original.
        steps: every decision.

    Returns:
        HTML without scripts.
    """
    state, verdict = ("good", "Goals reached") if reached else ("bad", "Goals not reached")
    chip = tag("span", f"{SIGNS[state]} {verdict}", class_=f"chip {state}")
    parts = [
        tag("p", tag("b", title), " ", chip, " ", f"{message[:1].upper()}{message[1:]}.", class_="verdict"),
        tag("dl", [card(fact) for fact in facts], class_="cards"),
    ]
    points = curve_points([step for step in steps if "macs" in step.shares], lambda step: step.shares["macs"])
    if points:
        data = Tradeoff(metric=metric, baseline=baseline, cost="macs", points=points)
        unique = hashlib.sha256(repr((title, message, points)).encode()).hexdigest()[:12]
        parts.append(curve(data, name=f"idap-{unique}", height=200))
    return _frame(parts)


def table_display(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "", bars: Sequence[float] = ()
) -> str:
    """A table of plain text under a title.

    Args:
        title: one line.
        heads: headings of the columns.
        rows: rows of the table; those beyond `MOST` are only counted.
        note: a line below the table.
        bars: length of a bar for each row, in [0, 1]; empty: there are no bars.

    Returns:
        HTML without scripts.
    """
    lines = []
    for place, row in enumerate(rows[:MOST]):
        cells = [tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])]
        if bars:
            inner = tag("span", style=f"width:{100 * bars[place]:.1f}%")
            cells.append(tag("td", tag("span", inner, class_="meter"), class_="wide"))
        lines.append(tag("tr", cells))
    more = [f"{len(rows) - MOST:,} more rows are not shown."] if len(rows) > MOST else []
    footnote = " ".join([*more, *([note] if note else [])])
    head = tag("tr", [tag("th", text, scope="col") for text in (*heads, *([""] if bars else []))])
    parts = [
        tag("p", tag("b", title)),
        tag("table", tag("thead", head), tag("tbody", lines)) if rows else None,
        tag("p", footnote, class_="quiet") if footnote else None,
    ]
    return _frame(parts)


def _frame(parts: Sequence[Html | None]) -> str:
    return tag("div", tag("style", raw(asset("notebook.css"))), parts, class_="idap")
