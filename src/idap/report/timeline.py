"""Draw the run over time: the time by kind of work, and the curves of the recoveries."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from idap.report import numbers
from idap.report.decisions import metric_labels
from idap.report.markup import Html, Plot, join, legend, table, tag
from idap.report.reading import Run
from idap.steps import Curve, Step


def recoveries(run: Run) -> Html:
    """Draw all recoveries of a run."""
    curves = [(step, step.curve) for step in run.steps if step.curve is not None and step.curve.losses]
    if not curves:
        refit = "Nothing was trained: the layers behind each cut were refitted in closed form."
        return tag("p", refit if run.steps else "There is no recovery yet.", class_="quiet")
    starts = [0, *accumulate(curve.steps for _, curve in curves)]
    x = numbers.linear([0, starts[-1]], whole=True)
    hint = tag("p", "The recoveries in order, on alternating grounds.", class_="quiet") if len(curves) > 1 else None
    return join(
        [hint, _loss_chart(curves, starts, x), _metric_chart(run, curves, starts, x), _recovery_table(run, curves)]
    )


def _loss_chart(curves: list[tuple[Step, Curve]], starts: list[int], x: numbers.Axis) -> Html:
    values = [loss for _, curve in curves for loss in curve.losses]
    positive = min(values) > 0
    wide = positive and max(values) > 30 * min(values)
    y = numbers.logarithmic(values) if wide else numbers.linear([*values, *([0.0] if positive else [])], room=0.02)
    field = Plot(x, y, 200)
    marks = _backgrounds(field, curves, starts)
    for start, (step, curve) in zip(starts, curves, strict=False):
        width = curve.steps / len(curve.losses)
        line = [(start + (place + 0.5) * width, loss) for place, loss in enumerate(curve.losses)]
        marks.append(field.line(line, "accepted" if step.accepted else "rejected"))
        if len(line) == 1:
            marks.append(field.mark(line[0], "dot", "accepted" if step.accepted else "rejected", curve.title))
    drawn = field.draw(
        "losses",
        "Training loss of the recoveries, over optimiser steps",
        f"{len(curves)} recoveries; the loss of the last one went from {curves[-1][1].losses[0]:.4g} to "
        f"{curves[-1][1].losses[-1]:.4g}.",
        marks,
        x_labels=[(tick, numbers.count(tick)) for tick in x.ticks],
        y_labels=[(tick, f"{tick:g}") for tick in y.ticks],
    )
    entries = [("line", "accepted", "step kept")]
    if any(not step.accepted for step, _ in curves):
        entries.append(("line", "rejected", "rolled back"))
    return tag("div", tag("h3", "Training loss"), legend(entries), drawn, class_="chart")


def _metric_chart(run: Run, curves: list[tuple[Step, Curve]], starts: list[int], x: numbers.Axis) -> Html:
    task = run.settings.task
    values = [value for _, curve in curves for _, value in curve.metrics]
    if not values:
        return Html("")
    worst = [] if task.worst is None else [task.worst]
    field = Plot(x, numbers.linear([*values, run.settings.baseline.metric, *worst], room=0.08), 200)
    marks = [*_backgrounds(field, curves, starts), *(field.level(value, "limit") for value in worst)]
    marks.append(field.level(run.settings.baseline.metric, "before thin"))
    for start, (step, curve) in zip(starts, curves, strict=False):
        style = "accepted" if step.accepted else "rejected"
        line = [(start + steps, value) for steps, value in curve.metrics]
        marks.append(field.line(line, style))
        marks += [field.mark(at, "dot", style, "") for at in line]
    drawn = field.draw(
        "recovered",
        f"{task.metric} on the validation data while recovering, over optimiser steps",
        f"From {numbers.metric(task.metric, values[0])} to {numbers.metric(task.metric, values[-1])}.",
        marks,
        x_labels=[(tick, numbers.count(tick)) for tick in x.ticks],
        y_labels=metric_labels(task.metric, field.y.ticks),
    )
    entries = [("line", "before thin", "original")]
    if worst:
        entries.append(("line", "limit", "worst allowed"))
    title = f"{task.metric[:1].upper()}{task.metric[1:]} on the validation data"
    return tag(
        "div", tag("h3", title), legend(entries), drawn, tag("p", "optimiser steps", class_="under"), class_="chart"
    )


def _backgrounds(field: Plot, curves: list[tuple[Step, Curve]], starts: list[int]) -> list[Html]:
    """The backgrounds of the recoveries; every other one is darker."""
    y = (field.y.low, field.y.high)
    return [
        field.area((start, start + curve.steps), y, "ground odd" if place % 2 else "ground", curve.title)
        for place, (start, (_, curve)) in enumerate(zip(starts, curves, strict=False))
    ]


def _recovery_table(run: Run, curves: list[tuple[Step, Curve]]) -> Html:
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
        for _, curve in curves
    ]
    return table("The recoveries", ["recovery", "steps", "loss", name, "average kept", "ended early"], rows)


KINDS = {
    "structure": "analysis of the model",
    "proof": "verification",
    "measurement": "measurement of divergence",
    "selection": "selection",
    "trial": "trials of layers",
    "cut": "cutting",
    "rebalance": "rebalancing",
    "recovery": "recovery",
    "judging": "judging",
    "latency": "latency",
    "other": "other",
}
"""Kind of work in the record -> its name on the page, in the order of drawing."""
LABELLED = 40
"""The most rows that are drawn with labels."""


@dataclass(frozen=True)
class Stretch:
    """A part of the run, such as one decision.

    Attributes:
        label: a short name.
        outcome: what was decided.
        seconds: kind of work -> seconds.
    """

    label: str
    outcome: str
    seconds: Mapping[str, float]

    @property
    def length(self) -> float:
        """The sum of the seconds."""
        return sum(self.seconds.values())


def stretches(run: Run) -> list[Stretch]:
    """Divide a run: the preparation, each decision, and the end."""
    found = [Stretch("start", "preparation", run.settings.preparation)]
    found += [
        Stretch(f"{step.stage} {step.index}", "kept" if step.accepted else "rolled back", step.phases)
        for step in run.steps
    ]
    if run.reached is not None:
        spent: Counter[str] = Counter()
        for stretch in found:
            spent.update({kind: stretch.seconds[kind] for kind in stretch.seconds})
        rest = {kind: seconds - spent[kind] for kind, seconds in run.reached.seconds.items()}
        rest = {kind: seconds for kind, seconds in rest.items() if seconds > 1e-3}
        if rest:
            found.append(Stretch("end", "final measurements", rest))
    return found


def timeline(run: Run) -> Html:
    """Draw how much time each kind of work took."""
    parts = stretches(run)
    whole = sum(stretch.length for stretch in parts)
    totals = {kind: sum(stretch.seconds.get(kind, 0.0) for stretch in parts) for kind in _kinds(parts)}
    elapsed, rows = 0.0, []
    for stretch in parts:
        rows.append(_lane(stretch, elapsed / whole, whole, labelled=len(parts) <= LABELLED))
        elapsed += stretch.length
    bars = tag("div", rows, class_="gantt" if len(parts) <= LABELLED else "gantt dense", aria_hidden="true")
    line = tag("p", f"0{numbers.SPACE}s", tag("span", numbers.time(whole)), class_="ends", aria_hidden="true")
    return join([_legend(totals, whole), bars, line, _time_table(run, parts, totals)])


def _kinds(parts: list[Stretch]) -> list[str]:
    known = {kind for stretch in parts for kind in stretch.seconds}
    return [kind for kind in KINDS if kind in known] + sorted(known - set(KINDS))


def _lane(stretch: Stretch, start: float, whole: float, *, labelled: bool) -> Html:
    parts = [
        tag(
            "span",
            class_=f"work {_style(kind)}",
            style=f"width:{100 * stretch.seconds[kind] / whole:.2f}%",
            title=f"{stretch.label}: {KINDS.get(kind, kind)}, {numbers.time(stretch.seconds[kind])}",
        )
        for kind in _kinds([stretch])
        if stretch.seconds[kind] / whole > 5e-5
    ]
    space = tag("span", style=f"width:{100 * start:.2f}%", class_="space")
    label = tag("span", stretch.label, class_="label") if labelled else None
    length = tag("span", numbers.time(stretch.length), class_="length") if labelled else None
    style = "row rejected" if stretch.outcome == "rolled back" else "row"
    return tag("div", label, tag("span", space, parts, class_="lane"), length, class_=style)


def _style(kind: str) -> str:
    """The CSS class of a kind of work; an unknown one is drawn as "other"."""
    return f"work-{kind}" if kind in KINDS else "work-other"


def _legend(totals: Mapping[str, float], whole: float) -> Html:
    items = [
        tag(
            "li",
            tag("span", class_=f"work {_style(kind)}", aria_hidden="true"),
            f"{KINDS.get(kind, kind)} ",
            tag("b", numbers.time(seconds)),
            f" ({numbers.share(seconds / whole, 0)})",
        )
        for kind, seconds in sorted(totals.items(), key=lambda item: -item[1])
        if seconds / whole >= 0.005
    ]
    return tag("ul", items, class_="legend")


def _time_table(run: Run, parts: list[Stretch], totals: Mapping[str, float]) -> Html:
    kinds = list(totals)
    rows = [
        [
            stretch.label,
            stretch.outcome,
            numbers.time(stretch.length),
            *(numbers.time(stretch.seconds[kind]) if kind in stretch.seconds else "" for kind in kinds),
        ]
        for stretch in parts
    ]
    rows.append(["all", "", numbers.time(sum(totals.values())), *(numbers.time(totals[kind]) for kind in kinds)])
    heads = ["", "decision", "time", *(KINDS.get(kind, kind) for kind in kinds)]
    return table("Time by decision and kind of work", heads, rows)
