"""Write HTML and SVG with escaped text; the letters of a chart have the same size at every width."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

from idap.report.numbers import Axis

VOID = frozenset(("br", "col", "input", "link", "meta"))
"""Elements of HTML without an end tag."""


class Html(str):
    """Markup; only `tag`, `raw` and `join` make it."""

    __slots__ = ()


Child: TypeAlias = "Html | str | float | Iterable[Child] | None"
"""What an element may contain: markup, text (which is escaped), a number, nothing, or several of these."""
Attribute: TypeAlias = "str | float | bool | None"


def tag(element: str, *children: Child, **attributes: Attribute) -> Html:
    """Write one element.

    Args:
        element: its name.
        children: its content; text is escaped.
        attributes: `class_` becomes class, other underscores become hyphens (`aria_sort`). An attribute that is None or
            False is left out; one that is True has no value.

    Returns:
        The markup.

    Example:
        >>> tag("p", "a < b", tag("b", 3), class_="note", data_kind='"')
        '<p class="note" data-kind="&quot;">a &lt; b<b>3</b></p>'
    """
    head = "".join([element, *(_attribute(name, value) for name, value in attributes.items())])
    if element in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(children)}</{element}>")


def join(children: Child) -> Html:
    """Join children, as in an element.

    >>> join(["<i>", tag("b", "x"), None, 2])
    '&lt;i&gt;<b>x</b>2'
    """
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return Html(escape(children))
    if isinstance(children, int | float):
        return Html(str(children))
    return Html("".join(map(join, children)))


def raw(text: str) -> Html:
    """Trust text as markup: only for style sheets and scripts of the package, never for data of a run."""
    return Html(text)


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    plain = name.rstrip("_").replace("_", "-")
    return f" {plain}" if value is True else f' {plain}="{escape(str(value))}"'


TOP, BOTTOM = 8, 26
"""Margins of the plot in pixels; the labels of the axis are at the bottom."""
SHAPES = {
    "square": "M-4.5 -4.5h9v9h-9z",
    "diamond": "M0 -6.5l6.5 6.5l-6.5 6.5l-6.5 -6.5z",
    "triangle": "M0 -6l5.5 10h-11z",
    "cross": "M-4 -4l8 8M4 -4l-8 8",
}
ROUND = {"circle": 4.5, "dot": 2.5}
"""Shapes that are circles, with their radius."""


@dataclass(frozen=True)
class Plot:
    """A chart with two axes.

    Attributes:
        x: the horizontal axis.
        y: the vertical axis, upwards.
        height: height in pixels, including the labels of the axis.
    """

    x: Axis
    y: Axis
    height: int = 260

    def across(self, value: float) -> str:
        """The horizontal position of a number, in percent."""
        return f"{self.x.place(value) * 100:.2f}%"

    def down(self, value: float) -> float:
        """The vertical position of a number, in pixels from the top."""
        return round(self.height - BOTTOM - self.y.place(value) * (self.height - TOP - BOTTOM), 1)

    def mark(self, at: tuple[float, float], shape: str, style: str, title: str) -> Html:
        """A mark at a point; its title, if it has one, is shown when the pointer rests on it."""
        x, y, name = self.across(at[0]), self.down(at[1]), tag("title", title) if title else None
        if shape in ROUND:
            return tag("circle", name, cx=x, cy=y, r=ROUND[shape], class_=f"mark {style}")
        path = tag("path", d=SHAPES[shape], class_=f"mark {style}")
        return tag("svg", name, path, x=x, y=y, overflow="visible")

    def text(self, at: tuple[float, float], words: str, *, anchor: str = "start", dx: int = 0, dy: int = 0) -> Html:
        """A label next to a point."""
        x, y = self.across(at[0]), self.down(at[1])
        return tag("svg", tag("text", words, x=dx, y=dy, text_anchor=anchor), x=x, y=y, overflow="visible")

    def line(self, points: Sequence[tuple[float, float]], style: str) -> Html:
        """A line through points."""
        if len(points) < 2:
            return Html("")
        high = self.height - TOP - BOTTOM
        places = " ".join(f"{self.x.place(x) * 1000:.0f},{(1 - self.y.place(y)) * 1000:.0f}" for x, y in points)
        drawn = tag("polyline", points=places, class_=f"line {style}", vector_effect="non-scaling-stroke")
        box: dict[str, Attribute] = {
            "y": TOP,
            "width": "100%",
            "height": high,
            "viewBox": "0 0 1000 1000",
            "preserveAspectRatio": "none",
        }
        return tag("svg", drawn, **box)

    def upright(self, at: float, style: str) -> Html:
        """A vertical line over the whole height."""
        x = self.across(at)
        return tag("line", x1=x, x2=x, y1=TOP, y2=self.height - BOTTOM, class_=f"line {style}")

    def level(self, at: float, style: str) -> Html:
        """A horizontal line over the whole width."""
        return tag("line", x1="0%", x2="100%", y1=self.down(at), y2=self.down(at), class_=f"line {style}")

    def area(self, x: tuple[float, float], y: tuple[float, float], style: str, title: str = "") -> Html:
        """A filled rectangle."""
        left, right = sorted(self.x.place(value) * 100 for value in x)
        low, high = sorted(self.down(value) for value in y)
        return tag(
            "rect",
            tag("title", title) if title else None,
            x=f"{left:.2f}%",
            y=low,
            width=f"{max(0.15, right - left):.2f}%",
            height=round(max(1.0, high - low), 1),
            class_=style,
        )

    def draw(
        self,
        name: str,
        title: str,
        description: str,
        marks: Iterable[Html],
        *,
        x_labels: Sequence[tuple[float, str]],
        y_labels: Sequence[tuple[float, str]],
    ) -> Html:
        """Draw the whole chart.

        Args:
            name: name of the element; the ids of its title and description begin with it.
            title: what the chart shows, for screen readers.
            description: what can be seen in it, for screen readers.
            marks: the marks of the chart.
            x_labels: (number, text) along the horizontal axis.
            y_labels: (number, text) along the vertical axis.
        """
        ground = self.height - BOTTOM
        grid = [self.level(value, "grid") for value, _ in y_labels]
        grid.append(tag("line", x1="0%", x2="100%", y1=ground, y2=ground, class_="line axis"))
        numbers = [
            tag("svg", tag("text", text, x=-8, y=4, text_anchor="end"), y=self.down(value), overflow="visible")
            for value, text in y_labels
        ]
        for value, text in x_labels:
            place = self.x.place(value)
            anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
            numbers.append(tag("text", text, x=self.across(value), y=self.height - 8, text_anchor=anchor))
        picture = tag(
            "svg",
            tag("title", title, id=f"{name}-title"),
            tag("desc", description, id=f"{name}-desc"),
            tag("g", grid, aria_hidden="true"),
            join(marks),
            tag("g", numbers, class_="numbers", aria_hidden="true"),
            role="img",
            aria_labelledby=f"{name}-title {name}-desc",
            width="100%",
            height=self.height,
            overflow="visible",
        )
        return tag("div", picture, class_="plot")


def legend(entries: Iterable[tuple[str, str, str]]) -> Html:
    """The legend of a chart.

    Args:
        entries: (shape, style, meaning); the shape "line" is a stroke, "area" a filled rectangle.
    """
    return tag("ul", [tag("li", _sign(shape, style), meaning) for shape, style, meaning in entries], class_="legend")


def _sign(shape: str, style: str) -> Html:
    if shape == "area":
        drawn = tag("rect", x=-8, y=-5, width=16, height=10, class_=style)
    elif shape == "line":
        drawn = tag("line", x1=-9, x2=9, y1=0, y2=0, class_=f"line {style}")
    elif shape in ROUND:
        drawn = tag("circle", r=ROUND[shape], class_=f"mark {style}")
    else:
        drawn = tag("path", d=SHAPES[shape], class_=f"mark {style}")
    return tag("svg", drawn, viewBox="-10 -8 20 16", width=20, height=16, aria_hidden="true")


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Html | str]], *, class_: str = "") -> Html:
    """A collapsed table with the numbers of a chart, for screen readers and for copying."""
    head = tag("tr", [tag("th", text, scope="col") for text in heads])
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    inner = tag(
        "table", tag("caption", caption, class_="unseen"), tag("thead", head), tag("tbody", body), class_=class_
    )
    scrolled = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("details", tag("summary", "The numbers"), scrolled)
