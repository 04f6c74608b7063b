"""End a run: train once more, measure the result, and say what was reached, or what was not and why."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from idap.compress.change import recover
from idap.compress.context import RunContext
from idap.compress.folder import keep_end, past_result
from idap.compress.journal import COST_NAMES, Decision, Journal
from idap.compress.result import Result
from idap.compress.state import State
from idap.errors import TaskError
from idap.saving.checkpoint import origin, remember_
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.training.evaluate import output_error
from idap.training.processes import on_main


def finish_run(
    context: RunContext, start: State, state: State, journal: Journal, recipe: Mapping[str, Any] | None = None
) -> Result:
    """Measure the model that is returned once more, after the last change, and say what was reached.

    A run that was finished before keeps the end that it wrote, since every measurement of latency differs a little.
    """
    past = past_result(context.services.folder)
    with context.services.clock.on("judging"):
        metric, fault = (start.metric, "") if state is start else context.judge(state.model)
        error = _output_error(context, state)
    latency = None if past is None else past.latency
    if latency is None and state is not start:
        latency = context.latency_of(state.model)
    final = replace(state, metric=metric, latency=latency if latency is not None else state.latency, fault=fault)
    reached, message = _verdict(context, final, journal, untouched=state is start)
    message += _training_faults(journal)
    base = origin(context.subject.original)
    result = Result(
        model=final.model,
        plan=final.plan,
        steps=tuple(journal.steps),
        baseline=start.metric,
        metric=final.metric,
        macs=(start.cost.macs, final.cost.macs),
        parameters=(start.cost.parameters, final.cost.parameters),
        size=(start.cost.size, final.cost.size),
        latency=final.latency,
        output_error=error,
        reached=reached,
        message=message,
        metric_name=context.subject.task.metric_name,
        seconds=_seconds(context, journal),
        base=base,
        build=None if base is not None else _build(recipe or {}),
    )
    if context.services.folder is not None:
        on_main(partial(result.save, context.services.folder.model))
        if past is None:
            keep_end(context, final, result, untouched=state is start)
    remember_(result.model, result.whole_plan)
    return result


def _output_error(context: RunContext, state: State) -> float:
    """The relative error of the outputs against the original's; NaN, with a line that says why, if it is not known."""
    try:
        return output_error(state.model, context.subject.original, context.subject.task)
    except TaskError as error:
        context.services.progress.say(f"The relative output error is not known: {error}")
        return math.nan


def _build(recipe: Mapping[str, Any]) -> str | None:
    """The call that builds the original of a recipe; None if the recipe alone does not determine it."""
    model = recipe.get("model", {})
    spec, classes = model.get("build"), model.get("classes")
    if not isinstance(spec, str) or (spec.startswith("hf:") and "data" in recipe):  # data determine its head
        return None
    return f"idap.models.resolve.build_model({spec!r}{'' if classes is None else f', classes={classes}'})"


def _seconds(context: RunContext, journal: Journal) -> dict[str, float]:
    """Seconds by kind of work, of all steps and of the work before and after them."""
    found: dict[str, float] = {}
    for phases in (journal.preparation, *(step.phases for step in journal.steps), context.services.clock.take()):
        for kind, seconds in phases.items():
            found[kind] = found.get(kind, 0.0) + seconds
    return found


def _training_faults(journal: Journal) -> str:
    """The part of the message about trainings that ended early; "" if none did."""
    broken = [step.curve for step in journal.steps if step.curve is not None and step.curve.diverged]
    if not broken:
        return ""
    first = f"{broken[0].title}: {broken[0].diverged.rstrip('.')}"
    return f"; {len(broken)} of the trainings ended early, and the best states before that were kept ({first})"


def _verdict(context: RunContext, state: State, journal: Journal, *, untouched: bool) -> tuple[bool, str]:
    goal, shares = context.goals.budget, context.shares(state)
    if untouched and not journal.steps:
        filters, layers = context.goals.config.filters, context.goals.config.layers
        units = (
            "filters.steps is 0"
            if filters.steps == 0
            else "filters.min_keep, keep, multiples and streams keep every group whole"
        )
        blocks = "layers.removals is 0" if layers.removals == 0 else "no branch or block may be removed"
        return False, f"nothing may be removed: {units}, and {blocks}; the result is the original"
    if untouched:
        return False, "nothing could be removed within the budget; the result is the original. Allow a larger max_drop"
    if not state.within(goal):
        found = state.fault or f"the {context.subject.task.metric_name} was {state.metric:.4f}"
        worst = "" if state.fault else f", and {goal.worst:.4f} is the worst allowed"
        return False, (
            f"{found} when it was measured once more after the last change{worst}: the validation data or the model "
            "change from one reading to the next. Make the validation loader give the same batches each time"
        )
    missed = [
        f"{COST_NAMES[name]} came down to {shares[name]:.1%}, not to {goal.targets[name]:.1%}"
        for name in goal.misses(shares)
    ]
    if missed:
        return False, f"{' and '.join(missed)}: {_obstacle(context, journal)}"
    return True, "every goal was reached"


def _obstacle(context: RunContext, journal: Journal) -> str:
    """Why a run did not reach its targets, and what would help."""
    decided = [step for step in journal.steps if step.stage != "final"]
    if not any(step.is_refused for step in decided):
        return (
            "the steps were used up, and none of them exceeded the accuracy budget. Allow more of them "
            "(filters.steps, layers.removals), or larger ones (filters.first_share)"
        )
    why = "every further step exceeded the accuracy budget"
    last = journal.steps[-1]
    before = next(step.metric for step in reversed(decided) if step.accepted)
    told = f"from {before:.4f} to {last.metric:.4f}"
    if last.stage == "final" and last.accepted and f"{before:.4f}" != f"{last.metric:.4f}":
        return (
            f"{why}; only the last training then took the {context.subject.task.metric_name} {told}. Train longer "
            "after each step (recovery), allow a larger max_drop, or compress the result again with what is left of "
            "the budget"
        )
    return f"{why}. Allow a larger max_drop, more steps or a longer recovery"


def final_recovery(context: RunContext, start: State, state: State, journal: Journal) -> State:
    """Train the last accepted state once more; keep the better of the two."""
    recovery = context.goals.config.final or context.goals.config.recovery
    if state is start or not recovery.trains:
        return state
    journal.begin()
    found = journal.recall("final", state)
    if found is None:
        model = apply_plan(
            state.model, Plan(shapes={name: state.plan.shape_after(name) for name in _tensor_names(state)})
        )
        metric, fault = recover(context, model, state.plan, "final recovery", recovery)
        latency = context.latency_of(model)
        found = Decision(replace(state, model=model, metric=metric, latency=latency, fault=fault), [])
    metric, fault, higher = found.state.metric, found.state.fault, context.subject.task.higher_is_better
    accepted = not fault and (metric >= state.metric if higher else metric <= state.metric)
    equal = "as good as before" if metric == state.metric else "the best so far"
    reason = fault or (equal if accepted else "worse than before")
    journal.note("final", found, accepted=accepted, reason=reason)
    return found.state if accepted else state


def _tensor_names(state: State) -> list[str]:
    return [name for name in state.plan.shapes if not state.plan.removes(name)]
