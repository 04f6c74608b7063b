"""The headline of a run: verdict, goals, and the numbers before and after."""

from collections.abc import Callable
from dataclasses import dataclass

from idap.report import numbers
from idap.report.decisions import COSTS
from idap.report.markup import Html, tag
from idap.report.reading import Run
from idap.steps import is_met

SIGNS = {"good": "✓", "bad": "✗", "open": "…"}


@dataclass(frozen=True)
class Fact:
    """One number of the headline, as text.

    Attributes:
        name: name of the number.
        before: value of the original.
        after: value of the result.
        change: the change from `before` to `after`.
        left: share of the original that is left, drawn as a bar; None if the number is not a cost.
    """

    name: str
    before: str
    after: str
    change: str
    left: float | None = None


@dataclass(frozen=True)
class Goal:
    """One goal: what was wanted, what was found, and the state of the goal: "good", "bad" or "open"."""

    wanted: str
    found: str
    state: str


def facts(run: Run) -> list[Fact]:
    """The numbers of the original, and of the result or the last accepted state."""
    old, new, metric = run.settings.baseline, run.now, run.settings.task.metric
    found = [
        cost_fact("multiply-adds", old.macs, new.macs, numbers.count),
        cost_fact("parameters", old.parameters, new.parameters, numbers.count),
        cost_fact("file size", old.size, new.size, numbers.size),
    ]
    measured = run.measured
    if measured is not None and measured.latency is not None:
        pair = measured.latency
        found.append(cost_fact(f"latency, batch of {measured.batch}", pair.before, pair.after, numbers.time))
    elif run.reached is not None and run.reached.latency is not None:
        found.append(Fact("latency", "100 %", numbers.share(run.reached.latency), "", run.reached.latency))
    found.append(metric_fact(metric, "validation", old.metric, new.metric))
    if measured is not None and measured.test is not None:
        found.append(metric_fact(metric, "test", measured.test.before, measured.test.after))
    return found


def cost_fact(name: str, before: float, after: float, write: Callable[[float], str]) -> Fact:
    """A cost before and after a run."""
    return Fact(name, write(before), write(after), numbers.change(before, after), after / before if before else None)


def metric_fact(name: str, split: str, before: float, after: float) -> Fact:
    """A metric before and after a run."""
    change = numbers.metric_change(name, before, after)
    return Fact(f"{name} ({split})", numbers.metric(name, before), numbers.metric(name, after), change)


def goals(run: Run) -> list[Goal]:
    """Every goal of a run, with its state."""
    task, now, found = run.settings.task, run.now, []
    if task.worst is not None:
        sign = "≥" if task.higher_is_better else "≤"
        wanted = f"{task.metric} {sign} {numbers.metric(task.metric, task.worst)}"
        value = f"{numbers.metric(task.metric, now.metric)}, budget {'kept' if run.is_within_budget() else 'not kept'}"
        found.append(Goal(wanted, value, "good" if run.is_within_budget() else "bad"))
    for cost, target in run.targets.items():
        left = _left(run, cost)
        good = left is not None and is_met(cost, left, target)
        state = "good" if good else "open" if run.reached is None else "bad"
        value = "not measured yet" if left is None else f"{numbers.share(left)} left"
        found.append(Goal(f"at most {numbers.share(target, 0)} of the {COSTS[cost]}", value, state))
    return found


def _left(run: Run, cost: str) -> float | None:
    old, new = run.settings.baseline, run.now
    if cost == "latency":
        if run.reached is not None:
            return run.reached.latency
        return run.share(run.accepted[-1], "latency") if run.accepted else 1.0
    return float(getattr(new, cost) / max(1, getattr(old, cost)))


def verdict(run: Run) -> tuple[str, str, str]:
    """The verdict on a run: its state ("good", "bad" or "open"), a heading, and a sentence."""
    if run.reached is None:
        decided = f"{len(run.steps)} decision{'' if len(run.steps) == 1 else 's'} so far, {len(run.accepted)} kept"
        return "open", "Not finished", f"The run is under way or was stopped: {decided}. It can be resumed."
    message = f"{run.reached.message[:1].upper()}{run.reached.message[1:]}."
    if run.reached.reached:
        return "good", "Goals reached", message
    return "bad", "Goals not reached", message


def headline(run: Run) -> Html:
    """Draw the first section of the page."""
    state, heading, sentence = verdict(run)
    chip = tag("span", tag("span", SIGNS[state], aria_hidden="true"), f" {heading}", class_=f"chip {state}")
    lines = [
        tag(
            "li",
            tag("span", SIGNS[goal.state], class_=f"sign {goal.state}", aria_hidden="true"),
            tag("span", tag("b", goal.wanted), f": {goal.found}"),
        )
        for goal in goals(run)
    ]
    cards = [card(fact) for fact in facts(run)]
    return tag(
        "section",
        tag("p", chip, tag("span", sentence), class_="verdict"),
        tag("ul", lines, class_="goals", aria_label="Goals") if lines else None,
        tag("dl", cards, class_="cards"),
        class_="headline",
    )


def card(fact: Fact) -> Html:
    """Draw one number as an entry of a `dl`."""
    share = None if fact.left is None else f"width:{100 * min(1.0, max(0.0, fact.left)):.1f}%"
    bar = None if share is None else tag("span", tag("span", style=share), class_="meter", aria_hidden="true")
    return tag(
        "div",
        tag("dt", fact.name),
        tag("dd", tag("span", fact.after, class_="big"), bar),
        tag("dd", tag("b", f"{fact.change} ") if fact.change else None, f"from {fact.before}", class_="quiet"),
    )
