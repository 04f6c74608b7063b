"""Draw the pictures of docs/results.md from the results: accuracy over multiply-adds, as cut and as recovered.

python benchmarks/plots.py
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compression_tables import Row
from benchmarks.criteria_tables import HALF, RESNETS, SQUARES, THIRD, chosen
from benchmarks.headline import METHODS, TARGETS, Point, original, point

ROOT = Path(__file__).resolve().parents[1]
RESULTS, ASSETS = ROOT / "benchmarks" / "results", ROOT / "docs" / "assets"

WIDTH, HEIGHT = 880, 472
TOP, FIELD = 84, 264
"""Where the fields begin, and how high they are."""
LEFT, BETWEEN, ACROSS = 60, 60, 368
FEWER = (0.9, 3.4)
"""The axis across: how many times fewer multiply-adds."""

# The series: method -> (class of its colour, shape of its mark). Ours are blue, Torch-Pruning's warm, the others grey.
SERIES = {
    "idap: defaults": ("ours", "diamond"),
    "idap: filters": ("filters", "circle"),
    "idap: layers": ("layers", "triangle"),
    "torch-pruning fpgm": ("fpgm", "square"),
    "torch-pruning magnitude_l2": ("l2", "triangle"),
    "torch-pruning taylor": ("taylor", "diamond"),
    "uniform L2": ("uniform", "square"),
    "random": ("random", "circle"),
}
CORRECTED = ("fpgm dashed", "square", "FPGM, rebalanced by idap *")
"""Torch-Pruning's FPGM with the rebalancing of idap, from criteria.json."""
SCALES = {"cut": {"resnet56": (0, 100, 20), "resnet20": (0, 100, 20)}}
SCALES["recovered"] = {"resnet56": (82, 94, 2), "resnet20": (68, 92, 4)}
"""Picture -> network -> the axis upwards: from, to, and the step between its numbers."""
COLOURS = {
    "ours": ("#0b3d91", "#9ecbff"),
    "filters": ("#2b7bd6", "#58a6ff"),
    "layers": ("#5aa9e6", "#2f81f7"),
    "fpgm": ("#c2410c", "#ff9d57"),
    "l2": ("#d98a00", "#e3b341"),
    "taylor": ("#9d174d", "#f778ba"),
    "uniform": ("#4b5563", "#c9d1d9"),
    "random": ("#9ca3af", "#6e7681"),
}
"""Class -> colour on a light and on a dark ground."""
SHAPES = {
    "square": "M-4.5-4.5h9v9h-9z",
    "diamond": "M0-6.5l6.5 6.5l-6.5 6.5l-6.5-6.5z",
    "triangle": "M0-6l6 10.5h-12z",
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
}


@dataclass(frozen=True)
class Line:
    """A method in one field.

    Attributes:
        style: class of its colour.
        shape: of its marks.
        title: what it is called.
        points: (times fewer multiply-adds, accuracy, whether only the earlier protocol has it).
    """

    style: str
    shape: str
    title: str
    points: tuple[tuple[float, float, bool], ...]


@dataclass(frozen=True)
class Field:
    """One network: its place, its axis upwards and what is drawn in it."""

    left: int
    title: str
    scale: tuple[int, int, int]
    original: float
    lines: tuple[Line, ...]

    def x(self, fewer: float) -> float:
        """The place of a number across."""
        return round(self.left + (fewer - FEWER[0]) / (FEWER[1] - FEWER[0]) * ACROSS, 1)

    def y(self, accuracy: float) -> float:
        """The place of an accuracy from above."""
        low, high, _ = self.scale
        return round(TOP + (high - accuracy) / (high - low) * FIELD, 1)


def lines_of(
    contest: Sequence[Row], criteria: Sequence[Row], network: str, value: Callable[[Point], float], *, corrected: bool
) -> tuple[Line, ...]:
    """The lines of a network; with `corrected` also Torch-Pruning's best criterion with our rebalancing."""
    found = []
    for method, (style, shape) in SERIES.items():
        points = [each for target in TARGETS if (each := point(contest, network, target, method)) is not None]
        places = tuple((each.macs_ratio, value(each), each.earlier) for each in points)
        found.append(Line(style, shape, METHODS[method], places))
    if corrected:
        same = chosen(criteria, subject=network, criterion="torch-pruning fpgm", ranking="global", corrected=SQUARES)
        tasks = {task: chosen(same, task=task, samples=512, seed=0, cuts=1) for task in (HALF, THIRD)}
        places = tuple((1 / row["macs"], row["quality"], False) for rows in tasks.values() for row in rows)
        found.append(Line(*CORRECTED, places))
    return tuple(found)


def picture(title: str, subtitle: str, fields: Sequence[Field], notes: Sequence[str]) -> str:
    """The whole picture as SVG.

    Args:
        title: what it shows.
        subtitle: how it was measured.
        fields: from left to right.
        notes: below the legend.
    """
    said = f"{title}. {subtitle} The numbers are in the table of the page."
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(said)}</desc>',
        _style(),
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        _text(24, 30, title, "head"),
        _text(24, 50, subtitle, "small"),
    ]
    for field in fields:
        drawn += _grid(field)
        drawn += [part for line in field.lines for part in _line(field, line)]
    drawn += _legend(fields[0].lines)
    drawn += [_text(24, HEIGHT - 14 - 16 * (len(notes) - place - 1), note, "small") for place, note in enumerate(notes)]
    return "\n".join([*drawn, "</svg>", ""])


def _style() -> str:
    light = [f".{name} {{ --c: {pair[0]}; }}" for name, pair in COLOURS.items()]
    dark = [f".{name} {{ --c: {pair[1]}; }}" for name, pair in COLOURS.items()]
    rules = [
        ".card { fill: #ffffff; stroke: #d0d7de; }",
        ".grid { stroke: #e3e7eb; }",
        ".axis { stroke: #8b949e; }",
        ".whole { stroke: #1f2328; stroke-dasharray: 2 4; }",
        ".line { fill: none; stroke: var(--c); stroke-width: 2; }",
        ".dashed { stroke-dasharray: 6 4; }",
        ".mark { fill: var(--c); stroke: var(--c); stroke-width: 1.6; stroke-dasharray: none; }",
        ".hollow { fill: #ffffff; }",
        'text { fill: #1f2328; font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }',
        ".small { font-size: 12px; fill: #57606a; }",
        ".head { font-size: 15px; font-weight: 600; }",
        ".mid { text-anchor: middle; }",
        ".end { text-anchor: end; }",
        *light,
        "@media (prefers-color-scheme: dark) {",
        ".card { fill: #161b22; stroke: #30363d; }",
        ".grid { stroke: #262c34; }",
        ".axis { stroke: #8b949e; }",
        ".whole { stroke: #e6edf3; }",
        ".hollow { fill: #161b22; }",
        "text { fill: #e6edf3; }",
        ".small { fill: #9da7b1; }",
        *dark,
        "}",
    ]
    return "<style>\n" + "\n".join(rules) + "\n</style>"


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" class="{style}">{escape(words)}</text>'


def _grid(field: Field) -> list[str]:
    right, ground = field.left + ACROSS, TOP + FIELD
    found = [_text(field.left, TOP - 10, f"{field.title}: accuracy in percent", "name")]
    low, high, step = field.scale
    for value in range(low, high + 1, step):
        y = field.y(value)
        found.append(f'<line class="grid" x1="{field.left}" x2="{right}" y1="{y}" y2="{y}"/>')
        found.append(_text(field.left - 8, y + 4, str(value), "small end"))
    found.append(f'<line class="axis" x1="{field.left}" x2="{right}" y1="{ground}" y2="{ground}"/>')
    for fewer in (1, 2, 3):
        x = field.x(fewer)
        found.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{ground}" y2="{ground + 4}"/>')
        found.append(_text(x, ground + 18, "original" if fewer == 1 else f"1/{fewer} of the MACs", "small mid"))
    y = field.y(field.original)
    found.append(f'<line class="whole" x1="{field.left}" x2="{right}" y1="{y}" y2="{y}"/>')
    return found


def _line(field: Field, line: Line) -> list[str]:
    places = [(1.0, field.original), *((fewer, accuracy) for fewer, accuracy, _ in line.points)]
    path = " ".join(f"{field.x(fewer)},{field.y(accuracy)}" for fewer, accuracy in places)
    found = [f'<polyline class="line {line.style}" points="{path}"/>']
    for fewer, accuracy, earlier in line.points:
        told = f"{line.title}: {accuracy:.2f} % at {fewer:.2f} times fewer MACs"
        found.append(_mark(field.x(fewer), field.y(accuracy), line, told, hollow=earlier))
    return found


def _mark(x: float, y: float, line: Line, told: str = "", *, hollow: bool = False) -> str:
    inner = f"<title>{escape(told)}</title>" if told else ""
    style = f"{line.style} mark{' hollow' if hollow else ''}"
    return f'<path class="{style}" transform="translate({x} {y})" d="{SHAPES[line.shape]}">{inner}</path>'


def _legend(lines: Sequence[Line]) -> list[str]:
    found = []
    for place, line in enumerate(lines):
        x, y = 40 + 280 * (place % 3), TOP + FIELD + 46 + 20 * (place // 3)
        found.append(f'<line class="line {line.style}" x1="{x - 14}" x2="{x + 14}" y1="{y}" y2="{y}"/>')
        found.append(_mark(x, y, line))
        found.append(_text(x + 22, y + 4, line.title, "name"))
    return found


def pictures() -> Mapping[Path, str]:
    """Every picture and its file."""
    contest = json.loads((RESULTS / "compress_cifar.json").read_text(encoding="utf-8"))["rows"]
    criteria = json.loads((RESULTS / "criteria.json").read_text(encoding="utf-8"))["rows"]

    def fields(name: str, value: Callable[[Point], float]) -> list[Field]:
        return [
            Field(
                LEFT + place * (ACROSS + BETWEEN),
                title,
                SCALES[name][network],
                original(contest, network),
                lines_of(contest, criteria, network, value, corrected=name == "cut"),
            )
            for place, (network, title) in enumerate(RESNETS.items())
        ]

    subtitle = (
        "CIFAR-10, 8,000 test images. The dotted line is the original; the other lines only connect measurements."
    )
    hollow = "Hollow marks: measured by the earlier protocol."
    corrected = "* All 10,000 test images. Only idap's lines and this one include rebalancing."
    return {
        ASSETS / "accuracy_cut.svg": picture(
            "Accuracy after the cut, without any training",
            subtitle,
            fields("cut", lambda each: each.cut),
            [f"{hollow} {corrected}"],
        ),
        ASSETS / "accuracy_recovered.svg": picture(
            "Accuracy after an equal recovery: 10,000 training images, twice",
            subtitle,
            fields("recovered", lambda each: each.recovered),
            [f"{hollow} The scales of the two networks differ, and neither begins at zero."],
        ),
    }


def main() -> None:
    for file, drawn in pictures().items():
        file.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
