"""Where the time went: the run from left to right, a line for each decision, coloured by kind of work."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from idap.report import numbers
from idap.report.markup import Html, joined, tag
from idap.report.plot import table
from idap.report.reading import Run

KINDS = {
    "structure": "looking at the model",
    "proof": "proof of cuts",
    "measurement": "measuring divergence",
    "selection": "selection",
    "trial": "trials of layers",
    "cut": "cutting",
    "rebalance": "rebalancing",
    "recovery": "recovery",
    "judging": "judging",
    "latency": "latency",
    "other": "other",
}
"""Kind of work, as the record names it -> in words; also the order in which they are drawn."""
LABELLED = 40
"""Lines that have room for a label."""


@dataclass(frozen=True)
class Stretch:
    """A part of the run.

    Attributes:
        label: short.
        told: what came of it.
        seconds: by kind of work.
    """

    label: str
    told: str
    seconds: Mapping[str, float]

    @property
    def length(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())


def stretches(run: Run) -> list[Stretch]:
    """What lay before the first decision, the decisions, and what lay behind the last one."""
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
            found.append(Stretch("end", "last measurements", rest))
    return found


def timeline(run: Run) -> Html:
    """Draw where the time of a run went."""
    found = stretches(run)
    whole = sum(stretch.length for stretch in found)
    totals = {kind: sum(stretch.seconds.get(kind, 0.0) for stretch in found) for kind in _kinds(found)}
    begun, rows = 0.0, []
    for stretch in found:
        rows.append(_row(stretch, begun / whole, whole, labelled=len(found) <= LABELLED))
        begun += stretch.length
    bars = tag("div", rows, class_="gantt" if len(found) <= LABELLED else "gantt dense", aria_hidden="true")
    line = tag("p", f"0{numbers.SPACE}s", tag("span", numbers.time(whole)), class_="ends", aria_hidden="true")
    return joined([_key(totals, whole), bars, line, _rows(run, found, totals)])


def _kinds(found: list[Stretch]) -> list[str]:
    known = {kind for stretch in found for kind in stretch.seconds}
    return [kind for kind in KINDS if kind in known] + sorted(known - set(KINDS))


def _row(stretch: Stretch, begun: float, whole: float, *, labelled: bool) -> Html:
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
    space = tag("span", style=f"width:{100 * begun:.2f}%", class_="space")
    label = tag("span", stretch.label, class_="label") if labelled else None
    length = tag("span", numbers.time(stretch.length), class_="length") if labelled else None
    style = "row rejected" if stretch.told == "rolled back" else "row"
    return tag("div", label, tag("span", space, parts, class_="lane"), length, class_=style)


def _style(kind: str) -> str:
    """The class of a kind of work; one that is not known is drawn as "other"."""
    return f"work-{kind}" if kind in KINDS else "work-other"


def _key(totals: Mapping[str, float], whole: float) -> Html:
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


def _rows(run: Run, found: list[Stretch], totals: Mapping[str, float]) -> Html:
    kinds = list(totals)
    rows = [
        [
            stretch.label,
            stretch.told,
            numbers.time(stretch.length),
            *(numbers.time(stretch.seconds[kind]) if kind in stretch.seconds else "" for kind in kinds),
        ]
        for stretch in found
    ]
    rows.append(["all", "", numbers.time(sum(totals.values())), *(numbers.time(totals[kind]) for kind in kinds)])
    heads = ["", "decision", "time", *(KINDS.get(kind, kind) for kind in kinds)]
    return table("Time by decision and kind of work", heads, rows)
