"""The decisions of a run: the trade-off curve, and a table that can be sorted."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from idap.report import numbers
from idap.report.markup import Html, Plot, join, legend, table, tag
from idap.report.reading import Run
from idap.steps import Removal, Step, numbers_of

COSTS = {"macs": "multiply-adds", "parameters": "parameters", "size": "file size", "latency": "latency"}
"""The names of the costs on pages."""


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """The data of a trade-off curve.

    Attributes:
        metric: name of the metric.
        baseline: metric of the original.
        cost: name of the cost.
        points: decisions, each with the share of the cost that is left and the metric; see `curve_points`.
        worst: the worst metric allowed; None if there is no budget.
        target: the share of the cost that may stay; None if there is no target.
        higher_is_better: whether a higher metric is better.
    """

    metric: str
    baseline: float
    cost: str
    points: Sequence[tuple[Step, tuple[float, float]]]
    worst: float | None = None
    target: float | None = None
    higher_is_better: bool = True


def tradeoff(run: Run) -> Html:
    """Draw every decision of a run by its cost and its metric."""
    task, cost = run.settings.task, run.cost
    data = Tradeoff(
        metric=task.metric,
        baseline=run.settings.baseline.metric,
        cost=cost,
        points=curve_points(run.steps, lambda step: run.share(step, cost)),
        worst=task.worst,
        target=run.targets.get(cost),
        higher_is_better=task.higher_is_better,
    )
    return join([curve(data), _point_table(data)])


def curve_points(steps: Sequence[Step], share: Callable[[Step], float]) -> list[tuple[Step, tuple[float, float]]]:
    """Each decision with the share of a cost that is left and the metric; without faults and beaten layers."""
    return [(step, (share(step), step.metric)) for step in steps if not (step.is_beaten or step.fault)]


def curve(data: Tradeoff, *, name: str = "tradeoff", height: int = 300) -> Html:
    """Draw a trade-off curve with its legend.

    Args:
        data: the points and the goals.
        name: name of the element.
        height: height in pixels.
    """
    metric, cost, start = data.metric, data.cost, (1.0, data.baseline)
    field = _plot([start, *(at for _, at in data.points)], data.worst, data.target, height)
    marks, rejected, path = [_goal_marks(field, data)], [], [start]
    for step, at in data.points:
        if step.accepted:
            path.append(at)
        else:
            marks.append(field.line([path[-1], at], "rejected dotted"))
            rejected.append(field.mark(at, "cross", "rejected", describe_step(step, at, metric, cost)))
    marks += [field.line(path, "accepted"), *rejected]
    kept = [(step, at) for step, at in data.points if step.accepted]
    for place, (step, at) in enumerate(kept, start=1):
        shape, style = ("diamond", "result") if place == len(kept) else ("circle", "accepted")
        marks.append(field.mark(at, shape, style, describe_step(step, at, metric, cost)))
    marks.append(field.mark(start, "square", "original", f"the original: {numbers.metric(metric, start[1])}"))
    description = (
        f"From {numbers.metric(metric, start[1])} at 100 % of the {COSTS[cost]} to "
        f"{numbers.metric(metric, path[-1][1])} at {numbers.share(path[-1][0])}: {len(kept)} decisions were kept, "
        f"{len(data.points) - len(kept)} rolled back."
    )
    drawn = field.draw(
        name,
        f"{metric} over {COSTS[cost]}",
        description,
        marks,
        x_labels=[(tick, numbers.share(tick, 0)) for tick in field.x.ticks],
        y_labels=metric_labels(metric, field.y.ticks),
    )
    below = tag("p", f"{COSTS[cost]} left, as a share of the original's", class_="under")
    return join([_legend(data), tag("p", metric, class_="over"), drawn, below])


def describe_step(step: Step, at: tuple[float, float], metric: str, cost: str) -> str:
    """Describe one decision in words."""
    verdict = "kept" if step.accepted else "rolled back"
    left = f"{numbers.share(at[0])} of the {COSTS[cost]}"
    return f"{step.stage} {step.index}, {verdict}: {left}, {metric} {numbers.metric(metric, at[1])}; {step.reason}"


def _plot(points: Sequence[tuple[float, float]], worst: float | None, target: float | None, height: int) -> Plot:
    x = numbers.linear([*(x for x, _ in points), *([] if target is None else [target])], room=0.04, most=7)
    y = numbers.linear([*(y for _, y in points), *([] if worst is None else [worst])], room=0.08)
    return Plot(x, y, height)


def _goal_marks(field: Plot, data: Tradeoff) -> Html:
    """Mark the area where the goals are met, and its limits."""
    worst, target = data.worst, data.target
    good, bad = (field.y.high, field.y.low) if data.higher_is_better else (field.y.low, field.y.high)
    parts = []
    if worst is not None or target is not None:
        right = field.x.high if target is None else target
        parts.append(field.area((field.x.low, right), (bad if worst is None else worst, good), "goal"))
    if worst is not None:
        parts.append(field.level(worst, "limit"))
    if target is not None:
        parts.append(field.upright(target, "limit"))
    return join(parts)


def _legend(data: Tradeoff) -> Html:
    goals = [] if data.worst is None else [f"{data.metric} {numbers.metric(data.metric, data.worst)}"]
    goals += [] if data.target is None else [f"{numbers.share(data.target, 0)} of the {COSTS[data.cost]}"]
    entries = [("square", "original", "original"), ("circle", "accepted", "step kept")]
    if any(not step.accepted for step, _ in data.points):
        entries.append(("cross", "rejected", "rolled back"))
    if any(step.accepted for step, _ in data.points):
        entries.append(("diamond", "result", "last kept"))
    if goals:
        entries += [("line", "limit", f"goal: {', '.join(goals)}"), ("area", "goal", "goals met")]
    return legend(entries)


def metric_labels(metric: str, ticks: Sequence[float]) -> list[tuple[float, str]]:
    """The labels of the axis of a metric."""
    if not ticks or not all(numbers.is_percent(metric, tick) for tick in ticks if 0 <= tick <= 1):
        return [(tick, f"{tick:g}".replace("-", numbers.MINUS)) for tick in ticks]
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    digits = next((digits for digits in range(4) if abs(step * 100 - round(step * 100, digits)) < 1e-9), 4)
    return [(tick, numbers.share(tick, digits)) for tick in ticks if tick <= 1 + 1e-9]


def _point_table(data: Tradeoff) -> Html:
    metric = data.metric
    rows = [["original", "100.0 %", numbers.metric(metric, data.baseline), ""]]
    for step, (left, value) in data.points:
        verdict = "kept" if step.accepted else "rolled back"
        rows.append([f"{step.stage} {step.index}", numbers.share(left), numbers.metric(metric, value), verdict])
    return table("The decisions by cost and metric", ["decision", COSTS[data.cost], metric, ""], rows)


def decisions(run: Run) -> Html:
    """The table of all decisions: what each removed, what was left, and why it was accepted or rolled back."""
    if not run.steps:
        return tag("p", "There is no decision yet.", class_="quiet")
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
        tag("caption", "All decisions, in order; the buttons in the header sort them", class_="unseen"),
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
        tag("td", _removals(step), tag("p", step.reason, class_="quiet"), class_="wide"),
        id=f"step-{step.index}",
    )


def _unit(metric: str, value: float) -> str:
    return "points" if numbers.is_percent(metric, value) else "change"


def _change(metric: str, before: float, after: float) -> str:
    """The change from the last accepted state; the heading of the column names the unit."""
    return numbers.metric_change(metric, before, after).removesuffix(" points") if after != before else "0"


def _number(text: str, value: float) -> Html:
    return tag("td", text, data_value=f"{value:.9g}", class_="number")


def _spread(low: float, high: float) -> str:
    return numbers.small(low) if low == high else f"{numbers.small(low)} – {numbers.small(high)}"


def _removals(step: Step) -> Html:
    if not step.removed:
        return tag("p", "nothing; the last accepted state was trained further" if step.stage == "final" else "nothing")
    units: Counter[str] = Counter()
    for removal in step.removed:
        if removal.units:
            units[removal.kind] += len(removal.units)
    parts = [f"{_part(removal)}" for removal in step.removed if not removal.units]
    summary = ", ".join([*(f"{count} {numbers_of(kind, count)}" for kind, count in units.items()), *parts])
    groups = [removal for removal in step.removed if removal.units]
    if not groups:
        return tag("p", summary)
    lines = [
        tag("li", f"{removal.name}: {numbers.MINUS}{len(removal.units)}, {removal.left} left") for removal in groups
    ]
    where = f"{summary}, of {len(groups)} group{'s' if len(groups) > 1 else ''}"
    return tag("details", tag("summary", where), tag("ul", lines))


def _part(removal: Removal) -> str:
    return (
        f"block {removal.name}, now a projection" if removal.kind == "projection" else f"{removal.kind} {removal.name}"
    )
