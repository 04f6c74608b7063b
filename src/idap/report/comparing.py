"""Compare runs: a table, one chart of trade-offs and one of divergence, and reasons why they can't be compared."""

from collections.abc import Sequence
from typing import Any

from idap.errors import ConfigError
from idap.report import numbers
from idap.report.contents import Spread
from idap.report.decisions import COSTS, describe_step, metric_labels
from idap.report.flow import section_names
from idap.report.headline import Fact, facts, verdict
from idap.report.markup import Html, Plot, join, legend, table, tag
from idap.report.page import document, flatten, section
from idap.report.reading import Run

SIGNS = ("circle", "square", "diamond", "triangle")
MOST = len(SIGNS)
"""The most runs that one chart can show; they differ in shape as well as in colour."""


def names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: the name of its folder, with parent folders if names are equal.

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
    """Refuse a number of runs that can't be drawn.

    Raises:
        ConfigError: there are fewer than two runs, or more than `MOST`.
    """
    if not 2 <= len(runs) <= MOST:
        raise ConfigError(f"a comparison needs 2 to {MOST} run folders, got {len(runs)}.")


def obstacles(runs: Sequence[Run]) -> list[str]:
    """The reasons why the numbers of runs can't be compared, as sentences; empty if they can."""
    first, found = runs[0], []
    labels = names(runs)
    for name, run in zip(labels[1:], runs[1:], strict=True):
        ours, theirs = first.settings, run.settings
        pair = f"{labels[0]} and {name}"
        if (ours.model, ours.fingerprint) != (theirs.model, theirs.fingerprint):
            same = " of another size" if ours.model == theirs.model else ""
            found.append(f"{pair} compress different models{same}: {ours.model} and {theirs.model}.")
        if _data_settings(first) != _data_settings(run):
            difference = _describe_difference(_data_settings(first), _data_settings(run))
            found.append(f"{pair} were evaluated on different data: {difference}.")
        if (ours.task.metric, ours.task.higher_is_better) != (theirs.task.metric, theirs.task.higher_is_better):
            found.append(f"{pair} have different metrics: {ours.task.metric} and {theirs.task.metric}.")
        elif ours.fingerprint == theirs.fingerprint and ours.baseline.metric != theirs.baseline.metric:
            metric = ours.task.metric
            before, after = (numbers.metric(metric, each.baseline.metric) for each in (ours, theirs))
            found.append(
                f"{pair} start from different originals: their {metric} is {before} and {after}, so the weights or the "
                "validation data differ."
            )
        if first.measured and run.measured and _machine(first) != _machine(run):
            found.append(f"{pair} were timed on different machines or threads, so their latencies can't be compared.")
    return found


def _data_settings(run: Run) -> dict[str, Any]:
    """The settings of the data in the recipe; empty if there is no recipe."""
    recipe = run.settings.recipe or {}
    return dict(flatten({key: recipe[key] for key in ("data", "task") if key in recipe}))


def _describe_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if not ours or not theirs:
        return "one of them has no recipe, so its data are unknown"
    shown = [{key: repr(value) for key, value in each.items()} for each in (ours, theirs)]
    key = next(key for key in {**ours, **theirs} if (key in ours) != (key in theirs) or ours[key] != theirs[key])
    return f"{key} is {' and '.join(each.get(key, 'not set') for each in shown)}"


def _machine(run: Run) -> tuple[Any, ...]:
    environment = run.settings.environment
    return tuple(environment.get(key) for key in ("platform", "device", "threads"))


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table of a comparison: a row for each number, a column for each run."""
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


def setting_differences(runs: Sequence[Run]) -> list[list[str]]:
    """The settings that differ between the runs: the key, and the value in each run."""
    flats = [dict(flatten({**run.settings.config, **_recipe_settings(run)})) for run in runs]
    keys = dict.fromkeys(key for each in flats for key in each)
    return [
        [key, *(str(each.get(key, "")) for each in flats)]
        for key in keys
        if any(each.get(key) != flats[0].get(key) for each in flats)
    ]


def _recipe_settings(run: Run) -> dict[str, Any]:
    """The sections of a recipe that are not among the settings; the settings hold the others, with their defaults."""
    recipe = run.settings.recipe or {}
    return {name: recipe[name] for name in ("model", "data", "task", "train") if name in recipe}


def comparison_data(runs: Sequence[Run]) -> dict[str, Any]:
    """A comparison as plain data, for JSON."""
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
        "settings": {key: values for key, *values in setting_differences(runs)},
    }


_COUNTS = ("macs", "parameters", "size")


def compare_page(runs: Sequence[Run]) -> str:
    """A comparison as one HTML page.

    Args:
        runs: 2 to `MOST` runs.

    Raises:
        ConfigError: there are fewer or more runs.
    """
    check_runs(runs)
    labels, reasons = names(runs), obstacles(runs)
    warning = tag(
        "section", [tag("p", tag("b", "Not comparable: "), line) for line in reasons], class_="warning", role="note"
    )
    changed = setting_differences(runs)
    metric = runs[0].settings.task.metric
    parts = [
        warning if reasons else None,
        section("numbers", "Numbers", _number_table(runs)),
        section("tradeoff", f"Trade-off: {metric} over {COSTS[runs[0].cost]}", _tradeoff_plot(runs)),
        section("flow", "Flow: divergence of the results over depth", _flow_plot(runs)),
        section("settings", "Settings that differ", _settings_table(changed, labels)),
    ]
    return document(" · ".join(labels), tag("h1", f"{len(runs)} runs compared"), [", ".join(labels)], parts)


def _number_table(runs: Sequence[Run]) -> Html:
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


def _settings_table(changed: Sequence[Sequence[str]], labels: Sequence[str]) -> Html:
    if not changed:
        return tag("p", "The runs have the same settings.", class_="quiet")
    body = [
        tag("tr", tag("th", tag("code", key), scope="row"), [tag("td", tag("code", value)) for value in values])
        for key, *values in changed
    ]
    head = tag("tr", [tag("th", text, scope="col") for text in ("setting", *labels)])
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="scroll")


def _legend(runs: Sequence[Run]) -> Html:
    return legend([(SIGNS[place], f"run-{place}", name) for place, name in enumerate(names(runs))])


def _tradeoff_plot(runs: Sequence[Run]) -> Html:
    """Draw the accepted states of every run, by the cost in the charts of the first run."""
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
            field.mark(at, SIGNS[place], f"run-{place}", f"{run.name}: {describe_step(step, at, metric, cost)}")
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
    listing = table("The accepted states of all runs", ["run", COSTS[cost], metric], lines)
    return join([_legend(runs), tag("p", metric, class_="over"), drawn, below, listing])


def _flow_plot(runs: Sequence[Run]) -> Html:
    """Draw the mean divergence of each group in the result of every run; removed groups leave a gap."""
    groups = list(runs[0].settings.groups)
    if any(list(run.settings.groups) != groups for run in runs):
        return tag("p", "The runs have different groups, so one chart can't show their divergence.", class_="quiet")
    spreads: list[dict[str, Spread]] = [{} if run.after is None else dict(run.after.units) for run in runs]
    if not any(spreads):
        return tag("p", "The divergence of no result was measured.", class_="quiet")
    y = numbers.logarithmic([spread.mean for units in spreads for spread in units.values()])
    field = Plot(numbers.Axis(-0.6, len(groups) - 0.4, ()), y, 260)
    marks: list[Html] = []
    for place, (run, units) in enumerate(zip(runs, spreads, strict=True)):
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
        "Removed groups have no mark.",
        [*marks, section_names(field, groups)],
        x_labels=[],
        y_labels=[(tick, numbers.small(tick)) for tick in y.ticks],
    )
    lines = [
        [name, *(numbers.small(units[name].mean) if name in units else "removed" for units in spreads)]
        for name in groups
    ]
    return join([_legend(runs), drawn, table("Mean divergence of each group", ["group", *names(runs)], lines)])
