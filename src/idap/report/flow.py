"""The network from input to output: the map of its groups, and divergence over depth, before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from idap.report import numbers
from idap.report.contents import Block, Profile, Spread
from idap.report.markup import Html, Plot, join, legend, table, tag
from idap.report.reading import Run
from idap.steps import numbers_of


@dataclass(frozen=True)
class Section:
    """Groups in a row that lie in the same outermost part; the part is "" where they lie in none.

    Attributes:
        part: name of the branch or block.
        groups: that it holds whole.
    """

    part: str
    groups: tuple[str, ...]


def sections_of(groups: Sequence[str], blocks: Mapping[str, Block]) -> list[Section]:
    """Put the groups of a network into its outermost branches and blocks; both come in the order of the network.

    A part that holds no group stands where it begins: behind the part before it.
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
    explained = (
        "Each bar is a group of units that go one by one: its full length is the width of the original, the solid part "
        "is what is left. Frames are branches and blocks, which can go whole."
    )
    return tag("div", tag("p", explained, class_="quiet"), tag("div", rows, class_="map"))


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
    # A root makes 16 beside 2048 visible; the share that is left is true to scale within each bar.
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
    stream = tag("span", "stream", class_="kind", title="a residual stream carries these units") if group.stream else ""
    return tag(
        "li",
        tag("span", tag("code", name), stream, class_="name"),
        tag("span", bar, class_="track"),
        tag("span", change, f" {kind}{share}", class_="width"),
        class_="gone" if not left else None,
    )


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
    return join([_key(run), *found])


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
    drawn = field.draw(
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
    def describe(spread: Spread | None) -> str:
        if spread is None:
            return ""
        if spread.low == spread.high:
            return numbers.small(spread.mean)
        return f"{numbers.small(spread.mean)} ({numbers.small(spread.low)} to {numbers.small(spread.high)})"

    rows = [
        [part.name, describe(part.before), "gone" if part.gone else describe(part.after), part.told] for part in parts
    ]
    return table(title, ["part", "original", "result", ""], rows)
