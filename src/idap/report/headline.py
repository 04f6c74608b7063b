"""What a run came to, at a glance: verdict, goals, and the numbers before and after."""

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
    """One number of the headline, written out.

    Attributes:
        name: what it is.
        before: of the original.
        after: of the result.
        change: from one to the other.
        left: share of the original, drawn as a bar; None for what is no cost.
    """

    name: str
    before: str
    after: str
    change: str
    left: float | None = None


@dataclass(frozen=True)
class Goal:
    """One goal: what was wanted, what came of it, and whether that is "good", "bad" or still "open"."""

    wanted: str
    found: str
    state: str


def facts(run: Run) -> list[Fact]:
    """The numbers of the original and of what the run came to."""
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


def cost_fact(name: str, before: float, after: float, said: Callable[[float], str]) -> Fact:
    """A cost before and after."""
    return Fact(name, said(before), said(after), numbers.change(before, after), after / before if before else None)


def metric_fact(name: str, split: str, before: float, after: float) -> Fact:
    """A metric before and after."""
    change = numbers.metric_change(name, before, after)
    return Fact(f"{name} ({split})", numbers.metric(name, before), numbers.metric(name, after), change)


def goals(run: Run) -> list[Goal]:
    """Every goal of a run with what came of it."""
    judged, now, found = run.settings.task, run.now, []
    if judged.worst is not None:
        sign = "≥" if judged.higher_is_better else "≤"
        wanted = f"{judged.metric} {sign} {numbers.metric(judged.metric, judged.worst)}"
        value = f"{numbers.metric(judged.metric, now.metric)}, budget {'kept' if run.keeps_budget() else 'not kept'}"
        found.append(Goal(wanted, value, "good" if run.keeps_budget() else "bad"))
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
    """How the run stands: state ("good", "bad" or "open"), in few words, and in a sentence."""
    if run.reached is None:
        decided = f"{len(run.steps)} decision{'' if len(run.steps) == 1 else 's'} so far, {len(run.accepted)} kept"
        return "open", "Not finished", f"The run is under way or was stopped: {decided}. It can be resumed."
    message = f"{run.reached.message[:1].upper()}{run.reached.message[1:]}."
    if run.reached.reached:
        return "good", "Goals reached", message
    return "bad", "Goals not reached", message


def headline(run: Run) -> Html:
    """The first thing on the page."""
    state, words, sentence = verdict(run)
    chip = tag("span", tag("span", SIGNS[state], aria_hidden="true"), f" {words}", class_=f"chip {state}")
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
    """One number in a frame of a `dl`."""
    share = None if fact.left is None else f"width:{100 * min(1.0, max(0.0, fact.left)):.1f}%"
    bar = None if share is None else tag("span", tag("span", style=share), class_="meter", aria_hidden="true")
    return tag(
        "div",
        tag("dt", fact.name),
        tag("dd", tag("span", fact.after, class_="big"), bar),
        tag("dd", tag("b", f"{fact.change} ") if fact.change else None, f"from {fact.before}", class_="quiet"),
    )
