"""HTML and SVG without a template engine: text can only become markup escaped, since no function takes it otherwise."""

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

VOID = frozenset(("br", "col", "input", "link", "meta"))
"""Elements of HTML that have no end tag."""


class Html(str):
    """Text that is markup already; made by `tag`, `raw` and `joined` only."""

    __slots__ = ()


Child: TypeAlias = "Html | str | float | Iterable[Child] | None"
"""What may stand inside of an element: markup, text (escaped), a number, nothing, or several of these."""
Attribute: TypeAlias = "str | float | bool | None"


def tag(element: str, *children: Child, **attributes: Attribute) -> Html:
    """Write one element.

    Args:
        element: its name.
        children: what stands inside; text is escaped.
        attributes: `class_` is class, other underscores are hyphens (`aria_sort`); None and False leave one out, True
            gives it no value.

    Returns:
        The markup.

    Example:
        >>> tag("p", "a < b", tag("b", 3), class_="note", data_kind='"')
        '<p class="note" data-kind="&quot;">a &lt; b<b>3</b></p>'
    """
    head = "".join([element, *(_attribute(name, value) for name, value in attributes.items())])
    if element in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{joined(children)}</{element}>")


def joined(children: Child) -> Html:
    """Several children in a row, as they would stand in an element.

    >>> joined(["<i>", tag("b", "x"), None, 2])
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
    return Html("".join(map(joined, children)))


def raw(text: str) -> Html:
    """Markup of our own: style sheets and scripts that come with the package; never anything of a run."""
    return Html(text)


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    plain = name.rstrip("_").replace("_", "-")
    return f" {plain}" if value is True else f' {plain}="{escape(str(value))}"'
