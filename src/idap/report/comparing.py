"""Several runs side by side: a table, trade-off curves and profiles in one picture, and what can't be compared."""

from collections.abc import Sequence
from typing import Any

from idap.errors import ConfigError
from idap.report import numbers
from idap.report.contents import Spread
from idap.report.decisions import COSTS, metric_labels, tell
from idap.report.flow import section_names
from idap.report.headline import Fact, facts, verdict
from idap.report.markup import Html, Plot, join, legend, table, tag
from idap.report.page import document, flat, section
from idap.report.reading import Run

SIGNS = ("circle", "square", "diamond", "triangle")
MOST = len(SIGNS)
"""Runs that can be told apart in one picture; forms differ as well as colours."""


def names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: that of its folder, with its parents where they are the same.

    Args:
        runs: at least one.
    """
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        found = ["/".join(each[-depth:]) for each in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{run.name} ({place})" for place, run in enumerate(runs, start=1)]


def check_runs(runs: Sequence[Run]) -> None:
    """Refuse what can't be drawn.

    Raises:
        ConfigError: there are fewer than two runs, or more than forms to tell them apart.
    """
    if not 2 <= len(runs) <= MOST:
        raise ConfigError(f"to compare, name 2 to {MOST} run folders; found {len(runs)}.")


def obstacles(runs: Sequence[Run]) -> list[str]:
    """Why the numbers of some runs can't be compared, one sentence each; none if they can."""
    first, found = runs[0], []
    called = names(runs)
    for name, run in zip(called[1:], runs[1:], strict=True):
        ours, theirs = first.settings, run.settings
        pair = f"{called[0]} and {name}"
        if (ours.model, ours.fingerprint) != (theirs.model, theirs.fingerprint):
            same = " of another size" if ours.model == theirs.model else ""
            found.append(f"{pair} compress different models{same}: {ours.model} and {theirs.model}.")
        if _data(first) != _data(run):
            found.append(f"{pair} were judged on different data: {_difference(_data(first), _data(run))}.")
        if (ours.task.metric, ours.task.higher_is_better) != (theirs.task.metric, theirs.task.higher_is_better):
            found.append(f"{pair} have different metrics: {ours.task.metric} and {theirs.task.metric}.")
        elif ours.fingerprint == theirs.fingerprint and ours.baseline.metric != theirs.baseline.metric:
            metric = ours.task.metric
            before, after = (numbers.metric(metric, each.baseline.metric) for each in (ours, theirs))
            found.append(
                f"{pair} begin with different originals: their {metric} is {before} and {after}, so the weights or the "
                "validation data differ."
            )
        if first.measured and run.measured and _place(first) != _place(run):
            found.append(f"{pair} were timed on different machines or with other threads: latencies don't compare.")
    return found


def _data(run: Run) -> dict[str, Any]:
    """What a recipe says about the data; where there is none, nothing is known."""
    recipe = run.settings.recipe or {}
    return dict(flat({key: recipe[key] for key in ("data", "task") if key in recipe}))


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if not ours or not theirs:
        return "one of them has no recipe that says which"
    key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
    return f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}"


def _place(run: Run) -> tuple[Any, ...]:
    environment = run.settings.environment
    return tuple(environment.get(key) for key in ("platform", "device", "threads"))


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table of a comparison: a line for each number, a cell for each run."""
    columns = [{fact.name: fact for fact in facts(run)} for run in runs]
    lines = [["", *names(runs)], ["", *(verdict(run)[1].lower() for run in runs)]]
    order = dict.fromkeys(name for column in columns for name in column)
    lines += [[name, *(_cell(column.get(name)) for column in columns)] for name in order]
    lines.append(["decisions kept", *(f"{len(run.accepted)} of {len(run.steps)}" for run in runs)])
    lines.append(["layers removed", *(str(sum(1 for how in run.removed.values() if how != "inside")) for run in runs)])
    spent = [None if run.reached is None else sum(run.reached.seconds.values()) for run in runs]
    lines.append(["time", *("" if seconds is None else numbers.time(seconds) for seconds in spent)])
    return lines


def _cell(fact: Fact | None) -> str:
    if fact is None:
        return "not measured"
    return f"{fact.after} ({fact.change})" if fact.change else fact.after


def different(runs: Sequence[Run]) -> list[list[str]]:
    """The settings that are not the same in all runs: key, and the value of each run."""
    flats = [dict(flat({**run.settings.config, **_recipe_settings(run)})) for run in runs]
    keys = dict.fromkeys(key for each in flats for key in each)
    return [
        [key, *(str(each.get(key, "")) for each in flats)]
        for key in keys
        if any(each.get(key) != flats[0].get(key) for each in flats)
    ]


def _recipe_settings(run: Run) -> dict[str, Any]:
    """What only a recipe says; its other sections fill the settings, which say besides what it left out."""
    recipe = run.settings.recipe or {}
    return {name: recipe[name] for name in ("model", "data", "task", "train") if name in recipe}


def document_of(runs: Sequence[Run]) -> dict[str, Any]:
    """A comparison for machines."""
    return {
        "comparable": not obstacles(runs),
        "obstacles": obstacles(runs),
        "runs": [
            {
                "folder": str(run.folder),
                "name": name,
                "reached": None if run.reached is None else run.reached.reached,
                "metric_name": run.settings.task.metric,
                "before": {key: getattr(run.settings.baseline, key) for key in ("metric", *_COUNTS)},
                "after": {key: getattr(run.now, key) for key in ("metric", *_COUNTS)},
                "decisions": len(run.steps),
                "accepted": len(run.accepted),
            }
            for name, run in zip(names(runs), runs, strict=True)
        ],
        "settings": {key: values for key, *values in different(runs)},
    }


_COUNTS = ("macs", "parameters", "size")


def compare_page(runs: Sequence[Run]) -> str:
    """A comparison as one HTML page.

    Args:
        runs: 2 to `MOST` of them.

    Raises:
        ConfigError: there are fewer or more.
    """
    check_runs(runs)
    called, why = names(runs), obstacles(runs)
    warned = tag(
        "section", [tag("p", tag("b", "Not comparable: "), line) for line in why], class_="warning", role="note"
    )
    changed = different(runs)
    metric = runs[0].settings.task.metric
    parts = [
        warned if why else None,
        section("numbers", "Numbers", _numbers(runs)),
        section("tradeoff", f"Trade-off: {metric} over {COSTS[runs[0].cost]}", _tradeoffs(runs)),
        section("flow", "Flow: divergence of the results over depth", _flows(runs)),
        section("settings", "Settings that differ", _settings(changed, called)),
    ]
    return document(" · ".join(called), tag("h1", f"{len(runs)} runs compared"), [", ".join(called)], parts)


def _numbers(runs: Sequence[Run]) -> Html:
    head, *lines = rows(runs)
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", [tag("th", text, scope="col") for text in head])),
            tag(
                "tbody",
                [tag("tr", tag("th", line[0], scope="row"), [tag("td", cell) for cell in line[1:]]) for line in lines],
            ),
        ),
        class_="scroll",
    )


def _settings(changed: Sequence[Sequence[str]], called: Sequence[str]) -> Html:
    if not changed:
        return tag("p", "None: the runs were begun with the same settings.", class_="quiet")
    body = [
        tag("tr", tag("th", tag("code", key), scope="row"), [tag("td", tag("code", value)) for value in values])
        for key, *values in changed
    ]
    head = tag("tr", [tag("th", text, scope="col") for text in ("setting", *called)])
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="scroll")


def _key(runs: Sequence[Run]) -> Html:
    return legend([(SIGNS[place], f"run-{place}", name) for place, name in enumerate(names(runs))])


def _tradeoffs(runs: Sequence[Run]) -> Html:
    """The accepted path of every run, by the cost that the first one shows."""
    cost, metric = runs[0].cost, runs[0].settings.task.metric
    paths = [
        [(1.0, run.settings.baseline.metric), *((run.share(step, cost), step.metric) for step in run.accepted)]
        for run in runs
    ]
    everything = [at for path in paths for at in path]
    x = numbers.linear([at[0] for at in everything], room=0.04, most=7)
    field = Plot(x, numbers.linear([at[1] for at in everything], room=0.08), 300)
    marks = []
    for place, (run, path) in enumerate(zip(runs, paths, strict=True)):
        marks.append(field.line(path, f"run-{place}"))
        marks += [
            field.mark(at, SIGNS[place], f"run-{place}", f"{run.name}: {tell(step, at, metric, cost)}")
            for step, at in zip(run.accepted, path[1:], strict=True)
        ]
    ends = "; ".join(
        f"{name} ends at {numbers.share(path[-1][0])} with {numbers.metric(metric, path[-1][1])}"
        for name, path in zip(names(runs), paths, strict=True)
    )
    drawn = field.draw(
        "tradeoffs",
        f"{metric} over {COSTS[cost]}, of all runs",
        ends,
        marks,
        x_labels=[(tick, numbers.share(tick, 0)) for tick in field.x.ticks],
        y_labels=metric_labels(metric, field.y.ticks),
    )
    below = tag("p", f"{COSTS[cost]} left, as a share of the original's", class_="under")
    lines = [
        [name, numbers.share(at[0]), numbers.metric(metric, at[1])]
        for name, path in zip(names(runs), paths, strict=True)
        for at in path
    ]
    told = table("The accepted states of all runs", ["run", COSTS[cost], metric], lines)
    return join([_key(runs), tag("p", metric, class_="over"), drawn, below, told])


def _flows(runs: Sequence[Run]) -> Html:
    """The mean divergence of each group in the result of every run; groups that are gone leave a gap."""
    groups = list(runs[0].settings.groups)
    if any(list(run.settings.groups) != groups for run in runs):
        return tag("p", "The runs have different groups, so their profiles have no common depth.", class_="quiet")
    found: list[dict[str, Spread]] = [{} if run.after is None else dict(run.after.units) for run in runs]
    if not any(found):
        return tag("p", "No result was measured.", class_="quiet")
    y = numbers.logarithmic([spread.mean for units in found for spread in units.values()])
    field = Plot(numbers.Axis(-0.6, len(groups) - 0.4, ()), y, 260)
    marks: list[Html] = []
    for place, (run, units) in enumerate(zip(runs, found, strict=True)):
        shift = 0.12 * (place - (len(runs) - 1) / 2)
        line = [(at + shift, units[name].mean) for at, name in enumerate(groups) if name in units]
        marks.append(field.line(line, f"run-{place} thin"))
        marks += [
            field.mark(
                (at + shift, units[name].mean),
                SIGNS[place],
                f"run-{place}",
                f"{run.name}, {name}: {numbers.small(units[name].mean)}, {run.widths[name]} left",
            )
            for at, name in enumerate(groups)
            if name in units
        ]
    drawn = field.draw(
        "flows",
        "Mean divergence of each group in the results, over depth",
        "Groups that are gone have no sign.",
        [*marks, section_names(field, groups)],
        x_labels=[],
        y_labels=[(tick, numbers.small(tick)) for tick in y.ticks],
    )
    lines = [
        [name, *(numbers.small(units[name].mean) if name in units else "gone" for units in found)] for name in groups
    ]
    return join([_key(runs), drawn, table("Mean divergence of each group", ["group", *names(runs)], lines)])
