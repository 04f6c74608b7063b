"""Each decision in a table that can be sorted."""

from collections import Counter
from collections.abc import Sequence

from idap.report import numbers
from idap.report.markup import Html, tag
from idap.report.reading import Run
from idap.report.tradeoff import COSTS
from idap.steps import Removal, Step, numbers_of


def decisions(run: Run) -> Html:
    """The table of all decisions: what went, what was left, and why it was kept or not."""
    if not run.steps:
        return tag("p", "No decision was taken yet.", class_="quiet")
    metric = run.settings.task.metric
    costs = list(dict.fromkeys(["macs", "parameters", *run.targets]))
    heads = [
        "step",
        "stage",
        "decision",
        *(COSTS[cost] for cost in costs),
        metric,
        _unit(metric, run.settings.baseline.metric),
        "divergence",
        "time",
    ]
    numeric = {0, *range(3, len(heads))}
    head = [
        tag(
            "th",
            tag("button", name, tag("span", class_="arrow", aria_hidden="true"), type="button"),
            scope="col",
            aria_sort="ascending" if place == 0 else "none",
            class_="number" if place in numeric else None,
        )
        for place, name in enumerate(heads)
    ]
    head.append(tag("th", "removed, and why", scope="col"))
    before, rows = run.settings.baseline.metric, []
    for step in run.steps:
        rows.append(_row(run, step, costs, before))
        before = step.metric if step.accepted else before
    inner = tag(
        "table",
        tag("caption", "All decisions, in order; sort them by the buttons of the header", class_="unseen"),
        tag("thead", tag("tr", head)),
        tag("tbody", rows),
        class_="decisions",
        data_sortable=True,
    )
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label="All decisions")


def _row(run: Run, step: Step, costs: Sequence[str], before: float) -> Html:
    metric = run.settings.task.metric
    low = min((removal.divergence[0] for removal in step.removed), default=None)
    high = max((removal.divergence[1] for removal in step.removed), default=None)
    verdict = tag("span", "kept" if step.accepted else "rolled back", class_="kept" if step.accepted else "rolled")
    shares = [run.share(step, cost) for cost in costs]
    return tag(
        "tr",
        tag("th", step.index, scope="row", data_value=step.index, class_="number"),
        tag("td", step.stage, data_value=step.stage),
        tag("td", verdict, data_value=int(step.accepted)),
        [_number(numbers.share(share), share) for share in shares],
        _number(numbers.metric(metric, step.metric), step.metric),
        _number(_change(metric, before, step.metric), step.metric - before),
        _number("" if low is None or high is None else _spread(low, high), -1.0 if high is None else high),
        _number(numbers.time(step.seconds), step.seconds),
        tag("td", _removed(step), tag("p", step.reason, class_="quiet"), class_="wide"),
        id=f"step-{step.index}",
    )


def _unit(metric: str, value: float) -> str:
    return "points" if numbers.percent(metric, value) else "change"


def _change(metric: str, before: float, after: float) -> str:
    """From the last accepted state on; the head of the column says the unit."""
    return numbers.metric_change(metric, before, after).removesuffix(" points") if after != before else "0"


def _number(text: str, value: float) -> Html:
    return tag("td", text, data_value=f"{value:.9g}", class_="number")


def _spread(low: float, high: float) -> str:
    return numbers.small(low) if low == high else f"{numbers.small(low)} – {numbers.small(high)}"


def _removed(step: Step) -> Html:
    if not step.removed:
        return tag("p", "nothing; the last accepted state was trained on" if step.stage == "final" else "nothing")
    units: Counter[str] = Counter()
    for removal in step.removed:
        if removal.units:
            units[removal.kind] += len(removal.units)
    parts = [f"{_part(removal)}" for removal in step.removed if not removal.units]
    said = ", ".join([*(f"{count} {numbers_of(kind, count)}" for kind, count in units.items()), *parts])
    groups = [removal for removal in step.removed if removal.units]
    if not groups:
        return tag("p", said)
    lines = [
        tag("li", f"{removal.name}: {numbers.MINUS}{len(removal.units)}, {removal.left} left") for removal in groups
    ]
    where = f"{said}, of {len(groups)} group{'s' if len(groups) > 1 else ''}"
    return tag("details", tag("summary", where), tag("ul", lines))


def _part(removal: Removal) -> str:
    return (
        f"block {removal.name} for a projection" if removal.kind == "projection" else f"{removal.kind} {removal.name}"
    )
