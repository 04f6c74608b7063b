"""The flow picture: divergence over depth, before and after, with what was removed marked."""

from collections.abc import Sequence
from dataclasses import dataclass

from idap.report import numbers
from idap.report.contents import Profile, Spread
from idap.report.markup import Html, joined, tag
from idap.report.plot import Plot, legend, table
from idap.report.reading import Run
from idap.steps import numbers_of

LETTER = 7
"""Pixels of a letter, about."""
SCREENS = {"narrow": 270, "medium": 600, "wide": 900}
"""Screens, as the style sheet tells them apart -> pixels that a chart has there at least."""


@dataclass(frozen=True)
class Part:
    """One place in the depth of the network.

    Attributes:
        name: of the group, branch or block.
        before: its divergence in the original; None where nothing was seen.
        after: in the result.
        gone: whether it is there no more.
        told: what happened to it.
    """

    name: str
    before: Spread | None
    after: Spread | None
    gone: bool
    told: str


def flow(run: Run) -> Html:
    """Draw the divergence of all groups, and of all branches and blocks, in the order of the network."""
    if run.before is None:
        return tag("p", "The divergence of the original was not measured yet.", class_="quiet")
    criterion = run.before.criterion
    units = [
        Part(
            name,
            run.before.units.get(name),
            None if run.after is None else run.after.units.get(name),
            gone=run.widths[name] == 0,
            told=f"{group.size} {numbers_of(group.kind, group.size)}, {run.widths[name]} left",
        )
        for name, group in run.settings.groups.items()
    ]
    parts = [
        Part(
            name,
            _alone(run.before, name),
            _alone(run.after, name),
            gone=name in run.removed,
            told={"removed": "removed", "projection": "became a projection", "inside": "went with a larger block"}.get(
                run.removed.get(name, ""), block.kind
            ),
        )
        for name, block in run.settings.blocks.items()
    ]
    found = [_picture("flow", "Units: mean divergence of each group, with its range", units, criterion)]
    if parts:
        found.append(_picture("flow-blocks", "Branches and blocks", parts, criterion))
    return joined([_key(run), *found])


def _alone(profile: Profile | None, name: str) -> Spread | None:
    score = None if profile is None else profile.blocks.get(name)
    return None if score is None else Spread(low=score, mean=score, high=score)


def _picture(name: str, title: str, parts: Sequence[Part], criterion: str) -> Html:
    seen = [spread for part in parts for spread in (part.before, part.after) if spread is not None]
    values = [value for spread in seen for value in (spread.low, spread.mean, spread.high)]
    # Few units of hardly any divergence would stretch the axis over many decades.
    y = numbers.logarithmic([*(spread.mean for spread in seen), *(spread.high for spread in seen)])
    low = min((value for value in values if value > 0), default=y.low)
    y = numbers.logarithmic([max(low, y.low / 30), *(spread.high for spread in seen)])
    field = Plot(numbers.Axis(-0.6, len(parts) - 0.4, ()), y, 250)
    marks: list[Html] = []
    for place, part in enumerate(parts):
        if part.gone:
            marks.append(field.area((place - 0.42, place + 0.42), (y.low, y.high), "gone", f"{part.name}: {part.told}"))
    for spread_of, style, shift in ((_before, "before", -0.12), (_after, "after", 0.12)):
        line = [(place + shift, spread.mean) for place, part in enumerate(parts) if (spread := spread_of(part))]
        marks.append(field.line(line, f"{style} thin"))
        for place, part in enumerate(parts):
            spread = spread_of(part)
            if spread is None:
                continue
            if spread.high > spread.low:
                marks.append(_range(field, place + shift, spread, style))
            said = f"{part.name}, {'original' if style == 'before' else 'result'}: {numbers.small(spread.mean)}"
            shape = "square" if style == "before" else "circle"
            marks.append(field.mark((place + shift, max(spread.mean, y.low)), shape, style, f"{said}; {part.told}"))
    lost = [part.name for part in parts if part.gone]
    drawn = field.drawn(
        name,
        f"{title} ({criterion}), over depth",
        f"{len(parts)} places; gone are {', '.join(lost) or 'none'}.",
        [*marks, section_names(field, [part.name for part in parts])],
        x_labels=[],
        y_labels=[(tick, numbers.small(tick)) for tick in y.ticks],
    )
    return tag("div", tag("h3", title), drawn, _rows(title, parts), class_="chart")


def _before(part: Part) -> Spread | None:
    return part.before


def _after(part: Part) -> Spread | None:
    return part.after


def _range(field: Plot, place: float, spread: Spread, style: str) -> Html:
    x = field.across(place)
    return tag("line", x1=x, x2=x, y1=field.down(spread.low), y2=field.down(spread.high), class_=f"range {style}")


def section_names(field: Plot, names: Sequence[str]) -> Html:
    """Names along the axis: what successive places have in common, as closely as each screen has room for."""
    marks = []
    for screen, pixels in SCREENS.items():
        found = sections(names, _depth(names, pixels))
        for word, first, last in found:
            if first:
                marks.append(tag("g", field.upright(first - 0.5, "border"), class_=screen))
            if _room(word, (last - first + 1) / len(names)) <= pixels:
                at = field.across((first + last) / 2)
                marks.append(tag("text", word, x=at, y=field.height - 8, text_anchor="middle", class_=screen))
    return tag("g", marks, aria_hidden="true")


def _depth(names: Sequence[str], pixels: int) -> int:
    """How much of the names is written, so that all fit; the least where none does."""

    def fits(depth: int) -> bool:
        found = sections(names, depth)
        return all(_room(word, (last - first + 1) / len(names)) <= pixels for word, first, last in found)

    return next((depth for depth in (4, 3, 2) if fits(depth)), 1)


def _room(word: str, share: float) -> float:
    """Pixels that a chart needs for a word to fit into a share of it."""
    return (len(word) + 1) * LETTER / share


def sections(names: Sequence[str], depth: int) -> list[tuple[str, int, int]]:
    """Successive names with the same beginning: (beginning, first place, last place).

    >>> sections(["stem.0", "layer1.0.conv1", "layer1.1.conv1", "fc"], 1)
    [('stem', 0, 0), ('layer1', 1, 2), ('fc', 3, 3)]
    """
    found: list[tuple[str, int, int]] = []
    for place, name in enumerate(names):
        word = ".".join(name.split(":")[0].split(".")[:depth])
        if found and found[-1][0] == word:
            found[-1] = (word, found[-1][1], place)
        else:
            found.append((word, place, place))
    return found


def _key(run: Run) -> Html:
    entries = [("square", "before", "original")]
    if run.after is not None:
        entries.append(("circle", "after", "result"))
    if run.removed or 0 in run.widths.values():
        entries.append(("area", "gone", "removed"))
    return legend(entries)


def _rows(title: str, parts: Sequence[Part]) -> Html:
    def said(spread: Spread | None) -> str:
        if spread is None:
            return ""
        if spread.low == spread.high:
            return numbers.small(spread.mean)
        return f"{numbers.small(spread.mean)} ({numbers.small(spread.low)} to {numbers.small(spread.high)})"

    rows = [[part.name, said(part.before), "gone" if part.gone else said(part.after), part.told] for part in parts]
    return table(title, ["part", "original", "result", ""], rows)
