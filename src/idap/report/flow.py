"""Draw the network from input to output: a map of its groups, and the divergence over depth, before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from idap.report import numbers
from idap.report.contents import Block, Profile, Spread
from idap.report.markup import Html, Plot, join, legend, table, tag
from idap.report.reading import Run
from idap.steps import numbers_of


@dataclass(frozen=True)
class Section:
    """Consecutive groups that lie in the same outermost branch or block, or in none.

    Attributes:
        part: name of the branch or block; "" if the groups lie in none.
        groups: the groups inside it.
    """

    part: str
    groups: tuple[str, ...]


def sections_of(groups: Sequence[str], blocks: Mapping[str, Block]) -> list[Section]:
    """Divide the groups of a network by its outermost branches and blocks; both are in the order of the network.

    A part without groups has a section of its own, behind the part before it.
    """
    inner = {name for block in blocks.values() for name in block.contains}
    home = {group: name for name, block in blocks.items() if name not in inner for group in block.groups}
    found: list[Section] = []
    outer = [name for name in blocks if name not in inner]

    def empty_before(name: str) -> None:
        while outer and outer[0] != name:
            found.append(Section(outer.pop(0), ()))

    for group in groups:
        part = home.get(group, "")
        if found and found[-1].part == part:
            found[-1] = Section(part, (*found[-1].groups, group))
            continue
        if part in outer:
            empty_before(part)
            outer.remove(part)
        found.append(Section(part, (group,)))
    empty_before("")
    return found


def network_map(run: Run) -> Html:
    """Draw the widths of all groups, before and after."""
    groups = run.settings.groups
    widest = max((group.size for group in groups.values()), default=1)
    rows = []
    for section in sections_of(list(groups), run.settings.blocks):
        lines = [_group(run, name, widest) for name in section.groups]
        rows.append(_part(run, section.part, lines) if section.part else tag("ul", lines, class_="groups"))
    explanation = (
        "Each bar is a group, whose units are removed one by one: the full bar is the width in the original, the solid "
        "part is the width that is left. Each frame is a branch or block, which can be removed as a whole."
    )
    return tag("div", tag("p", explanation, class_="quiet"), tag("div", rows, class_="map"))


def _part(run: Run, name: str, lines: Sequence[Html]) -> Html:
    block, state = run.settings.blocks[name], run.removed.get(name, "")
    words = {"removed": "removed whole", "projection": "became a projection", "inside": "removed whole"}
    inside = [inner for inner in block.contains if inner in run.removed and not state]
    notes = [words[state]] if state else [f"{inner} {words[run.removed[inner]]}" for inner in inside]
    head = tag("p", tag("code", name), tag("span", block.kind, class_="kind"), [_badge(note) for note in notes])
    gone = "part gone" if state else "part"
    return tag("section", head, tag("ul", lines, class_="groups") if lines else None, class_=gone)


def _badge(words: str) -> Html:
    return tag("span", words, class_="badge")


def _group(run: Run, name: str, widest: int) -> Html:
    group, left = run.settings.groups[name], run.widths[name]
    kind = numbers_of(group.kind, group.size)
    lost = group.size - left
    # The length is a square root, so that 16 beside 2048 is visible; within a bar the scale is linear.
    full = 100 * (group.size / widest) ** 0.5
    bar = tag(
        "span",
        tag("span", style=f"width:{100 * left / max(1, group.size):.1f}%", class_="left"),
        class_="bar",
        style=f"width:{full:.1f}%",
        aria_hidden="true",
    )
    change = tag("b", f"{group.size} → {left}") if lost else tag("span", str(group.size))
    share = f" ({numbers.share(-lost / group.size, 0)})" if lost else ""
    stream = tag("span", "stream", class_="kind", title="the units of a residual stream") if group.stream else ""
    return tag(
        "li",
        tag("span", tag("code", name), stream, class_="name"),
        tag("span", bar, class_="track"),
        tag("span", change, f" {kind}{share}", class_="width"),
        class_="gone" if not left else None,
    )


LETTER = 7
"""The approximate width of a letter, in pixels."""
SCREENS = {"narrow": 270, "medium": 600, "wide": 900}
"""Class of screens in the style sheet -> the smallest width of a chart there, in pixels."""
NOTES = {"removed": "removed", "projection": "became a projection", "inside": "removed with a larger block"}
"""How a block was removed, see `Run.removed` -> in words."""


@dataclass(frozen=True)
class Part:
    """One position on the axis of depth.

    Attributes:
        name: name of the group, branch or block.
        before: its divergence in the original; None if it was not measured.
        after: its divergence in the result; None if it was not measured.
        gone: whether it was removed.
        note: a description of what happened to it.
    """

    name: str
    before: Spread | None
    after: Spread | None
    gone: bool
    note: str


def flow(run: Run) -> Html:
    """Draw the divergence of all groups, branches and blocks, in the order of the network."""
    if run.before is None:
        return tag("p", "The divergence of the original is not measured yet.", class_="quiet")
    criterion = run.before.criterion
    units = [
        Part(
            name,
            run.before.units.get(name),
            None if run.after is None else run.after.units.get(name),
            gone=run.widths[name] == 0,
            note=f"{group.size} {numbers_of(group.kind, group.size)}, {run.widths[name]} left",
        )
        for name, group in run.settings.groups.items()
    ]
    parts = [
        Part(
            name,
            _block_spread(run.before, name),
            _block_spread(run.after, name),
            gone=name in run.removed,
            note=NOTES.get(run.removed.get(name, ""), block.kind),
        )
        for name, block in run.settings.blocks.items()
    ]
    found = [_picture("flow", "Units: mean divergence of each group, with its range", units, criterion)]
    if parts:
        found.append(_picture("flow-blocks", "Branches and blocks", parts, criterion))
    return join([_legend(run), *found])


def _block_spread(profile: Profile | None, name: str) -> Spread | None:
    score = None if profile is None else profile.blocks.get(name)
    return None if score is None else Spread(low=score, mean=score, high=score)


def _picture(name: str, title: str, parts: Sequence[Part], criterion: str) -> Html:
    seen = [spread for part in parts for spread in (part.before, part.after) if spread is not None]
    values = [value for spread in seen for value in (spread.low, spread.mean, spread.high)]
    # A few units with almost no divergence would stretch the axis over many decades.
    y = numbers.logarithmic([*(spread.mean for spread in seen), *(spread.high for spread in seen)])
    low = min((value for value in values if value > 0), default=y.low)
    y = numbers.logarithmic([max(low, y.low / 30), *(spread.high for spread in seen)])
    field = Plot(numbers.Axis(-0.6, len(parts) - 0.4, ()), y, 250)
    marks: list[Html] = []
    for place, part in enumerate(parts):
        if part.gone:
            marks.append(field.area((place - 0.42, place + 0.42), (y.low, y.high), "gone", f"{part.name}: {part.note}"))
    for spread_of, style, shift in ((_before, "before", -0.12), (_after, "after", 0.12)):
        line = [(place + shift, spread.mean) for place, part in enumerate(parts) if (spread := spread_of(part))]
        marks.append(field.line(line, f"{style} thin"))
        for place, part in enumerate(parts):
            spread = spread_of(part)
            if spread is None:
                continue
            if spread.high > spread.low:
                marks.append(_range(field, place + shift, spread, style))
            label = f"{part.name}, {'original' if style == 'before' else 'result'}: {numbers.small(spread.mean)}"
            shape = "square" if style == "before" else "circle"
            marks.append(field.mark((place + shift, max(spread.mean, y.low)), shape, style, f"{label}; {part.note}"))
    removed = [part.name for part in parts if part.gone]
    drawn = field.draw(
        name,
        f"{title} ({criterion}), over depth",
        f"{len(parts)} positions; removed: {', '.join(removed) or 'none'}.",
        [*marks, section_names(field, [part.name for part in parts])],
        x_labels=[],
        y_labels=[(tick, numbers.small(tick)) for tick in y.ticks],
    )
    return tag("div", tag("h3", title), drawn, _part_table(title, parts), class_="chart")


def _before(part: Part) -> Spread | None:
    return part.before


def _after(part: Part) -> Spread | None:
    return part.after


def _range(field: Plot, place: float, spread: Spread, style: str) -> Html:
    x = field.across(place)
    return tag("line", x1=x, x2=x, y1=field.down(spread.low), y2=field.down(spread.high), class_=f"range {style}")


def section_names(field: Plot, names: Sequence[str]) -> Html:
    """Names along the axis: the common prefix of consecutive names, as long as each screen has room for."""
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
    """The number of parts of the names that are written so that all fit; 1 if nothing fits."""

    def fits(depth: int) -> bool:
        found = sections(names, depth)
        return all(_room(word, (last - first + 1) / len(names)) <= pixels for word, first, last in found)

    return next((depth for depth in (4, 3, 2) if fits(depth)), 1)


def _room(word: str, share: float) -> float:
    """The width that a chart needs, in pixels, so that a word fits into a share of it."""
    return (len(word) + 1) * LETTER / share


def sections(names: Sequence[str], depth: int) -> list[tuple[str, int, int]]:
    """Consecutive names with the same prefix: (prefix, first place, last place).

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


def _legend(run: Run) -> Html:
    entries = [("square", "before", "original")]
    if run.after is not None:
        entries.append(("circle", "after", "result"))
    if run.removed or 0 in run.widths.values():
        entries.append(("area", "gone", "removed"))
    return legend(entries)


def _part_table(title: str, parts: Sequence[Part]) -> Html:
    def describe(spread: Spread | None) -> str:
        if spread is None:
            return ""
        if spread.low == spread.high:
            return numbers.small(spread.mean)
        return f"{numbers.small(spread.mean)} ({numbers.small(spread.low)} to {numbers.small(spread.high)})"

    rows = [
        [part.name, describe(part.before), "removed" if part.gone else describe(part.after), part.note]
        for part in parts
    ]
    return table(title, ["part", "original", "result", ""], rows)
