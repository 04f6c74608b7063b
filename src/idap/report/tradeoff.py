"""The trade-off curve: what each step left of the cost, and what the metric was then."""

from collections.abc import Sequence
from itertools import pairwise

from idap.record import Step
from idap.report import numbers
from idap.report.markup import Html, joined, tag
from idap.report.plot import Plot, legend, table
from idap.report.reading import Run

COSTS = {"macs": "multiply-adds", "parameters": "parameters", "size": "file size", "latency": "latency"}
"""How costs are called."""


def tradeoff(run: Run, *, name: str = "tradeoff", height: int = 300) -> Html:
    """Draw every decision of a run by its cost and its metric."""
    judged, cost, baseline = run.settings.task, run.cost, run.settings.baseline
    start = (1.0, baseline.metric)
    told = [(step, (run.share(step, cost), step.metric)) for step in run.steps]
    target = run.targets.get(cost)
    field = _field([start, *(at for _, at in told)], judged.worst, target, height)
    state, marks, rejected = start, [_goal(field, judged.worst, target, higher=judged.higher_is_better)], []
    path = [start]
    for step, at in told:
        if step.accepted:
            state = at
            path.append(at)
        else:
            marks.append(field.line([state, at], "rejected dotted"))
            rejected.append(field.mark(at, "cross", "rejected", tell(step, at, judged.metric, cost)))
    marks += [field.line(path, "accepted"), *rejected]
    marks += [
        field.mark(at, "circle", "accepted", tell(step, at, judged.metric, cost)) for step, at in told if step.accepted
    ]
    marks.append(field.mark(start, "square", "original", f"the original: {numbers.metric(judged.metric, start[1])}"))
    kept = sum(step.accepted for step in run.steps)
    said = (
        f"From {numbers.metric(judged.metric, start[1])} at 100 % of the {COSTS[cost]} to "
        f"{numbers.metric(judged.metric, state[1])} at {numbers.share(state[0])}: {kept} decisions were kept, "
        f"{len(run.steps) - kept} rolled back."
    )
    drawn = field.drawn(
        name,
        f"{judged.metric} over {COSTS[cost]}",
        said,
        marks,
        x_labels=[(tick, numbers.share(tick, 0)) for tick in field.x.ticks],
        y_labels=[(tick, label) for tick, label in metric_labels(judged.metric, field.y.ticks)],
    )
    below = tag("p", f"{COSTS[cost]} left, as a share of the original's", class_="under")
    return joined([_key(run, cost), tag("p", judged.metric, class_="over"), drawn, below, _rows(run, told, cost)])


def tell(step: Step, at: tuple[float, float], metric: str, cost: str) -> str:
    """One decision in words."""
    verdict = "kept" if step.accepted else "rolled back"
    left = f"{numbers.share(at[0])} of the {COSTS[cost]}"
    return f"{step.stage} {step.index}, {verdict}: {left}, {metric} {numbers.metric(metric, at[1])}; {step.reason}"


def _field(points: Sequence[tuple[float, float]], worst: float | None, target: float | None, height: int) -> Plot:
    x = numbers.linear([*(x for x, _ in points), *([] if target is None else [target])], room=0.04, most=7)
    y = numbers.linear([*(y for _, y in points), *([] if worst is None else [worst])], room=0.08)
    return Plot(x, y, height)


def _goal(field: Plot, worst: float | None, target: float | None, *, higher: bool) -> Html:
    """Where the goals are met."""
    good = field.y.high if higher else field.y.low
    bad = field.y.low if higher else field.y.high
    parts = []
    if worst is not None or target is not None:
        right = field.x.high if target is None else target
        parts.append(field.area((field.x.low, right), (bad if worst is None else worst, good), "goal"))
    if worst is not None:
        parts.append(field.level(worst, "limit"))
    if target is not None:
        parts.append(field.upright(target, "limit"))
    return joined(parts)


def _key(run: Run, cost: str) -> Html:
    worst, target, metric = run.settings.task.worst, run.targets.get(cost), run.settings.task.metric
    goals = [] if worst is None else [f"{metric} {numbers.metric(metric, worst)}"]
    goals += [] if target is None else [f"{numbers.share(target, 0)} of the {COSTS[cost]}"]
    entries = [("square", "original", "original"), ("circle", "accepted", "step kept")]
    if any(not step.accepted for step in run.steps):
        entries.append(("cross", "rejected", "rolled back"))
    if goals:
        entries += [("line", "limit", f"goal: {', '.join(goals)}"), ("area", "goal", "goals met")]
    return legend(entries)


def metric_labels(metric: str, ticks: Sequence[float]) -> list[tuple[float, str]]:
    """The numbers along the axis of a metric."""
    if not ticks or not all(numbers.percent(metric, tick) for tick in ticks if 0 <= tick <= 1):
        return [(tick, f"{tick:g}".replace("-", numbers.MINUS)) for tick in ticks]
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    digits = next((digits for digits in range(4) if abs(step * 100 - round(step * 100, digits)) < 1e-9), 4)
    return [(tick, numbers.share(tick, digits)) for tick in ticks if tick <= 1 + 1e-9]


def _rows(run: Run, told: Sequence[tuple[Step, tuple[float, float]]], cost: str) -> Html:
    metric, baseline = run.settings.task.metric, run.settings.baseline
    rows = [["original", "100.0 %", numbers.metric(metric, baseline.metric), ""]]
    for step, (left, value) in told:
        verdict = "kept" if step.accepted else "rolled back"
        rows.append([f"{step.stage} {step.index}", numbers.share(left), numbers.metric(metric, value), verdict])
    return table("The decisions by cost and metric", ["decision", COSTS[cost], metric, ""], rows)
