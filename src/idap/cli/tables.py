"""The closing table of a compression, before and after, and the latency table of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from idap.cost.latency import LatencyTable


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Plain numbers of two models; each pair is (before, after).

    Attributes:
        parameters: number of parameters.
        macs: multiply-adds for one sample.
        metric_name: name of the metric.
        val: metric on the validation data.
        test: metric on the test data, which is used only once; None if there is none.
        latency: median seconds of one forward pass; None if it was not measured.
        batch: number of samples in that pass.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    metric_name: str
    val: tuple[float, float]
    test: tuple[float, float] | None = None
    latency: tuple[float, float] | None = None
    batch: int = 1

    def to_json(self) -> dict[str, Any]:
        """The numbers as a dict; each pair is a dict with the keys before and after."""
        return {
            name: dict(zip(("before", "after"), value, strict=True)) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def comparison_table(numbers: Comparison, title: str = "") -> Table:
    """Draw the closing table.

    Args:
        numbers: numbers of the two models.
        title: shown above the table; "" for none.

    Returns:
        A rich table with a row per number: before, after, change.
    """
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    table.add_row("parameters", *(f"{count:,}" for count in numbers.parameters), change(*numbers.parameters))
    table.add_row("MACs per sample", *(short(count) for count in numbers.macs), change(*numbers.macs))
    if numbers.latency is not None:
        label = f"latency, batch of {numbers.batch}"
        table.add_row(label, *(f"{seconds * 1000:.2f} ms" for seconds in numbers.latency), change(*numbers.latency))
    table.add_row(f"{numbers.metric_name} (validation)", *metric_cells(numbers.metric_name, numbers.val))
    if numbers.test is not None:
        table.add_row(f"{numbers.metric_name} (test)", *metric_cells(numbers.metric_name, numbers.test))
    return table


def short(count: float, unit: str = "") -> str:
    """A large number with a letter, and its unit.

    >>> short(40_551_424), short(999), short(1500, "B"), short(12, "B")
    ('40.55 M', '999', '1.50 kB', '12 B')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {letter}{unit}"
    return f"{count:.0f} {unit}".rstrip()


def change(before: float, after: float) -> str:
    """How much a number fell or rose, as a share of what it was.

    >>> change(100, 49.8), change(0, 1)
    ('−50.2%', '')
    """
    return f"{(after - before) / before:+.1%}".replace("-", "−") if before else ""


def metric_cells(name: str, values: Sequence[float]) -> list[str]:
    """Format values of a metric; of two values, also the change.

    >>> metric_cells("accuracy", [0.975, 0.97]), metric_cells("perplexity", [12.345678])
    (['97.50%', '97.00%', '−0.50 points'], ['12.35'])
    """
    accuracy = name == "accuracy"
    cells = [f"{value:.2%}" if accuracy else f"{value:.4g}" for value in values]
    if len(values) == 2:
        by = values[1] - values[0]
        cells.append((f"{by * 100:+.2f} points" if accuracy else f"{by:+.4g}").replace("-", "−"))
    return cells


SHARES = (0.5, 0.25)
"""Widths that are shown, as shares of the group's size."""


def latency_document(table: "LatencyTable", steps: Mapping[str, int]) -> dict[str, Any]:
    """The table as plain data: for each group its curve and the step of its widths.

    Args:
        table: the measured table.
        steps: group name -> step, of which useful widths are multiples; 1 if there are no steps.
    """
    groups = {}
    for name in table.groups:
        curve = table.curve(name)
        groups[name] = {
            "step": steps[name], "widths": curve.widths, "seconds": curve.seconds, "spread": curve.spread
        }  # fmt: skip
    return {
        "batch": table.batch,
        "device": table.device,
        "threads": table.threads,
        "unmeasured": table.unmeasured,
        "groups": groups,
    }


def latency_table(table: "LatencyTable", steps: Mapping[str, int]) -> Table:
    """Draw the table: for each group the time of its layers, the share of it at narrower widths, and the step."""
    title = f"Latency of layers, batch of {table.batch}, {table.device}, {table.threads} threads"
    found = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("group")
    for name in ("units", "layers, ms", *(f"at {share:.0%}" for share in SHARES), "step"):
        found.add_column(name, justify="right", no_wrap=True)
    for name in table.groups:
        curve = table.curve(name)
        size, whole = curve.widths[-1], curve.seconds[-1]
        left = [f"{curve.at(max(1, round(share * size))) / whole:.0%}" for share in SHARES]
        step = str(steps[name]) if steps[name] > 1 else "none"
        found.add_row(name, str(size), f"{1000 * whole:.3g}", *left, step)
    return found
