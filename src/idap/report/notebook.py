"""How results, structures, measurements and plans show themselves in a notebook: small, and like the report."""

import hashlib
from collections.abc import Sequence

from idap.report.headline import SIGNS, Fact, card
from idap.report.markup import Html, raw, tag
from idap.report.page import asset
from idap.report.tradeoff import Story, curve, told_of
from idap.steps import Step

MOST = 60
"""Lines of a table that are shown at most."""


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
    """A compression at a glance: what was reached, the numbers, the curve of all steps.

    Args:
        title: such as the class of the model.
        reached: whether every goal was.
        message: one sentence about it.
        facts: the numbers before and after.
        metric: its name.
        baseline: metric of the original.
        steps: every decision.

    Returns:
        HTML without any script.
    """
    state, words = ("good", "Goals reached") if reached else ("bad", "Goals not reached")
    chip = tag("span", f"{SIGNS[state]} {words}", class_=f"chip {state}")
    parts = [
        tag("p", tag("b", title), " ", chip, " ", f"{message[:1].upper()}{message[1:]}.", class_="verdict"),
        tag("dl", [card(fact) for fact in facts], class_="cards"),
    ]
    told = told_of([step for step in steps if "macs" in step.shares], lambda step: step.shares["macs"])
    if told:
        story = Story(metric=metric, baseline=baseline, cost="macs", told=told)
        unique = hashlib.sha256(repr((title, message, told)).encode()).hexdigest()[:12]
        parts.append(curve(story, name=f"idap-{unique}", height=200))
    return _framed(parts)


def table_display(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "", bars: Sequence[float] = ()
) -> str:
    """A table of plain text under a title.

    Args:
        title: one line.
        heads: of the columns.
        rows: beyond `MOST` they are counted only.
        note: a line below.
        bars: for each row, where they are given, the length of a bar in [0, 1].

    Returns:
        HTML without any script.
    """
    lines = []
    for place, row in enumerate(rows[:MOST]):
        cells = [tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])]
        if bars:
            inner = tag("span", style=f"width:{100 * bars[place]:.1f}%")
            cells.append(tag("td", tag("span", inner, class_="meter"), class_="wide"))
        lines.append(tag("tr", cells))
    more = [f"{len(rows) - MOST:,} more lines are not shown."] if len(rows) > MOST else []
    said = " ".join([*more, *([note] if note else [])])
    head = tag("tr", [tag("th", text, scope="col") for text in (*heads, *([""] if bars else []))])
    parts = [
        tag("p", tag("b", title)),
        tag("table", tag("thead", head), tag("tbody", lines)) if rows else None,
        tag("p", said, class_="quiet") if said else None,
    ]
    return _framed(parts)


def _framed(parts: Sequence[Html | None]) -> str:
    return tag("div", tag("style", raw(asset("notebook.css"))), parts, class_="idap")
