"""The page of one run, and the frame of every page: one HTML file that needs nothing else.

Markup is made by functions that escape all text (`markup`), so no template engine is needed. The policy in the head of
a page lets no address be loaded, and no script run but the one that comes with the package.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from idap.report.decisions import decisions
from idap.report.flow import flow
from idap.report.headline import headline
from idap.report.markup import Html, raw, tag
from idap.report.network import network_map
from idap.report.origin import command, environment, reproduce, settings
from idap.report.reading import Run
from idap.report.recoveries import recoveries
from idap.report.timeline import timeline
from idap.report.tradeoff import COSTS, tradeoff

ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath fill='%230072b2' "
    "d='M1 3h14v3H1zM1 7h9v3H1zM1 11h5v3H1z'/%3E%3C/svg%3E"
)


def run_page(run: Run) -> str:
    """The report of one run.

    Args:
        run: from `read_run`.

    Returns:
        A whole HTML document.
    """
    model = run.settings.model.rpartition(".")[2]
    metric = run.settings.task.metric
    parts = [
        headline(run),
        section("tradeoff", f"Trade-off: {metric} over {COSTS[run.cost]}", tradeoff(run), run.steps != ()),
        section("flow", "Flow: divergence over depth", flow(run)),
        section("map", "Network: widths before and after", network_map(run)),
        section("recoveries", "Recovery", recoveries(run)),
        section("time", "Time", timeline(run)),
        section("decisions", "Decisions", decisions(run)),
        section("reproduce", "Reproduce", tag("div", reproduce(run), class_="half")),
        section("environment", "Environment and settings", tag("div", environment(run), settings(run))),
    ]
    title = f"{model}: {run.name}"
    about = [tag("code", run.name), " · ", tag("code", run.settings.model), " · ", tag("code", command(run))]
    return document(title, tag("h1", model, ", compressed" if run.accepted else ""), about, parts)


def section(name: str, title: str, inside: Html, there: bool = True) -> Html | None:
    """A part of a page under its heading; None where there is nothing to show."""
    if not there:
        return None
    return tag("section", tag("h2", title, id=f"{name}-heading"), inside, id=name, aria_labelledby=f"{name}-heading")


def document(title: str, heading: Html, about: Sequence[Html | str], parts: Sequence[Html | None]) -> str:
    """A whole page.

    Args:
        title: of the window.
        heading: the first line.
        about: the line below it.
        parts: what follows.
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
        tag("a", "To the content", href="#content", class_="skip"),
        tag("header", tag("div", heading, tag("p", about, class_="about")), toggle),
        tag("main", parts, id="content"),
        tag("footer", tag("p", "Made by idap. This file needs no other one, and no network.")),
        tag("script", raw(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def asset(name: str) -> str:
    """A file that comes with the package."""
    return files("idap.report").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
