"""The map of the network: every group in order with its width before and after, in the blocks that hold it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from idap.report import numbers
from idap.report.contents import Block
from idap.report.markup import Html, tag
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


def sections(groups: Sequence[str], blocks: Mapping[str, Block]) -> list[Section]:
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
    for section in sections(list(groups), run.settings.blocks):
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
