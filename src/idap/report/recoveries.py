"""The curves of the recoveries, one behind the other: training loss, and validation metric whenever it was judged."""

from itertools import accumulate

from idap.report import numbers
from idap.report.markup import Html, joined, tag
from idap.report.plot import Plot, legend, table
from idap.report.reading import Run
from idap.report.tradeoff import metric_labels
from idap.steps import Curve, Step


def recoveries(run: Run) -> Html:
    """Draw all recoveries of a run."""
    found = [(step, step.curve) for step in run.steps if step.curve is not None and step.curve.losses]
    if not found:
        said = "Nothing was trained: what lies behind a cut was refitted in closed form." if run.steps else "None yet."
        return tag("p", said, class_="quiet")
    begun = [0, *accumulate(curve.steps for _, curve in found)]
    x = numbers.linear([0, begun[-1]], whole=True)
    hint = tag("p", "One recovery behind the other, on changing ground.", class_="quiet") if len(found) > 1 else None
    return joined([hint, _losses(found, begun, x), _metrics(run, found, begun, x), _rows(run, found)])


def _losses(found: list[tuple[Step, Curve]], begun: list[int], x: numbers.Axis) -> Html:
    values = [loss for _, curve in found for loss in curve.losses]
    positive = min(values) > 0
    wide = positive and max(values) > 30 * min(values)
    y = numbers.logarithmic(values) if wide else numbers.linear([*values, *([0.0] if positive else [])], room=0.02)
    field = Plot(x, y, 200)
    marks = _grounds(field, found, begun)
    for start, (step, curve) in zip(begun, found, strict=False):
        width = curve.steps / len(curve.losses)
        line = [(start + (place + 0.5) * width, loss) for place, loss in enumerate(curve.losses)]
        marks.append(field.line(line, "accepted" if step.accepted else "rejected"))
        if len(line) == 1:
            marks.append(field.mark(line[0], "dot", "accepted" if step.accepted else "rejected", curve.title))
    drawn = field.drawn(
        "losses",
        "Training loss of the recoveries, over optimiser steps",
        f"{len(found)} recoveries; the loss of the last one went from {found[-1][1].losses[0]:.4g} to "
        f"{found[-1][1].losses[-1]:.4g}.",
        marks,
        x_labels=[(tick, numbers.count(tick)) for tick in x.ticks],
        y_labels=[(tick, f"{tick:g}") for tick in y.ticks],
    )
    entries = [("line", "accepted", "step kept")]
    if any(not step.accepted for step, _ in found):
        entries.append(("line", "rejected", "rolled back"))
    return tag("div", tag("h3", "Training loss"), legend(entries), drawn, class_="chart")


def _metrics(run: Run, found: list[tuple[Step, Curve]], begun: list[int], x: numbers.Axis) -> Html:
    judged = run.settings.task
    values = [value for _, curve in found for _, value in curve.metrics]
    if not values:
        return Html("")
    worst = [] if judged.worst is None else [judged.worst]
    field = Plot(x, numbers.linear([*values, run.settings.baseline.metric, *worst], room=0.08), 200)
    marks = [*_grounds(field, found, begun), *(field.level(value, "limit") for value in worst)]
    marks.append(field.level(run.settings.baseline.metric, "before thin"))
    for start, (step, curve) in zip(begun, found, strict=False):
        style = "accepted" if step.accepted else "rejected"
        line = [(start + steps, value) for steps, value in curve.metrics]
        marks.append(field.line(line, style))
        marks += [field.mark(at, "dot", style, "") for at in line]
    drawn = field.drawn(
        "recovered",
        f"{judged.metric} on the validation data while recovering, over optimiser steps",
        f"From {numbers.metric(judged.metric, values[0])} to {numbers.metric(judged.metric, values[-1])}.",
        marks,
        x_labels=[(tick, numbers.count(tick)) for tick in x.ticks],
        y_labels=metric_labels(judged.metric, field.y.ticks),
    )
    entries = [("line", "before thin", "original")]
    if worst:
        entries.append(("line", "limit", "worst allowed"))
    title = f"{judged.metric[:1].upper()}{judged.metric[1:]} on the validation data"
    return tag(
        "div", tag("h3", title), legend(entries), drawn, tag("p", "optimiser steps", class_="under"), class_="chart"
    )


def _grounds(field: Plot, found: list[tuple[Step, Curve]], begun: list[int]) -> list[Html]:
    """Every other recovery stands on a darker ground."""
    y = (field.y.low, field.y.high)
    return [
        field.area((start, start + curve.steps), y, "ground odd" if place % 2 else "ground", curve.title)
        for place, (start, (_, curve)) in enumerate(zip(begun, found, strict=False))
    ]


def _rows(run: Run, found: list[tuple[Step, Curve]]) -> Html:
    name = run.settings.task.metric
    rows = [
        [
            curve.title,
            f"{curve.steps:,}",
            f"{curve.losses[0]:.4g} → {curve.losses[-1]:.4g}",
            " → ".join(numbers.metric(name, value) for _, value in curve.metrics),
            "" if curve.average is None else numbers.metric(name, curve.average),
            curve.diverged,
        ]
        for _, curve in found
    ]
    return table("The recoveries", ["recovery", "steps", "loss", name, "average kept", "ended early"], rows)
